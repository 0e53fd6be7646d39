"""The commands run, check and plan."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import config as configuration
from ..api.flat import read_settings_file
from ..api.launch import is_first_rank
from ..display import print_line, print_text
from ..training.resume import resume_settings
from .app import Terminal, app, finish, note, show
from .options import Assignments, ConfigFile, read_number, repeat_options, with_options


def read_settings(
    config_file: str | None, flags: dict[str, object], assignments: list[str] | None
) -> tuple[dict[str, object], dict[str, str]]:
    """Return ``section.key`` → value, and ``section.key`` → flag of the options given by flags.

    Flags override the file, and --set overrides both.
    """
    values: dict[str, object] = {}
    names: dict[str, str] = {}
    if config_file:
        values, names, notes = read_settings_file(config_file)
        if notes:
            note(f"translated: {'; '.join(notes)} (see prefix-distill help migration)")
    assigned = configuration.read_assignments(assignments or [])
    names |= {path: configuration.flag(path) for path in flags}
    names = {path: name for path, name in names.items() if path not in assigned}
    return values | flags | assigned, names


def build_config(
    config_file: str | None, flags: dict[str, object], assignments: list[str] | None
) -> configuration.Config:
    """Return the checked config of the file, the flags and the assignments."""
    values, names = read_settings(config_file, flags, assignments)
    return configuration.build(values, names)


@app.command()
@with_options()
def run(
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run the checks and estimate the cost; write nothing.")
    ] = False,
    **flags: dict,
) -> None:
    """Train the student: it samples a prefix, the teacher scores it, the student learns from it."""
    from ..api import work
    from ..api.documents import PushFailed
    from ..api.prospects import summarize_dry_run
    from ..api.summaries import summarize

    values, names = read_settings(config_file, flags["flags"], assignments)
    if resume:
        values, notes = resume_settings(values)
        for text in notes:
            note(text)
    config = configuration.build(values, names)
    if dry_run:
        with Terminal() as terminal:
            tried = work.dry_run(config, terminal, resume)
        words = repeat_options(flags["flags"], config_file, assignments)
        if resume:
            words.append("--resume")
        finish(tried.to_dict(), summarize_dry_run(tried, words))
        return
    try:
        with Terminal() as terminal:
            result = work.distil(config, terminal, resume)
    except PushFailed as error:
        finish(error.result.to_dict(), summarize(error.result))
        raise
    finish(result.to_dict(), summarize(result))


@app.command()
@with_options()
def check(config_file: ConfigFile = None, assignments: Assignments = None, **flags: dict) -> None:
    """Check before training that models, prompts, sampling settings and device are compatible.

    It takes the options of run and writes nothing.
    """
    from ..api import work
    from ..api.prospects import summarize_check

    config = build_config(config_file, flags["flags"], assignments)
    with Terminal() as terminal:
        result = work.check(config, terminal)
    for text in result.notes:
        note(text)
    show(result, width=200)
    for check in result.checks:
        if check["name"] == "data":
            for text in check["facts"]["account"]:
                note(text)
        if check["name"] == "prompts":
            _show_prompts(check["facts"])
    words = repeat_options(flags["flags"], config_file, assignments)
    finish(result.to_dict(), summarize_check(result, words))
    result.raise_for_error()


def _show_prompts(facts: dict) -> None:
    """Show the first prompt of both models, with its last tokens."""
    if not is_first_rank():
        return
    for role in ("student", "teacher"):
        prompt = facts[role]
        last = ", ".join(f"{i} {token!r}" for i, token in prompt["last"])
        print_line(f"{role} prompt ({prompt['ids']} tokens; last ids and tokens: {last}):")
        print_text(prompt["text"])  # a break would look like one of the prompt


# the options of `plan` besides those of `run`
ASSUMPTIONS: dict[str, Any] = {
    "prompt_tokens": Annotated[
        int | None,
        typer.Option(
            parser=read_number("--prompt-tokens", int, 128),
            metavar="INT",
            help="Length of every prompt, in tokens; replaces --dataset.",
        ),
    ],
    "prefixes": Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Other prefixes to compare with --prefix, comma-separated: 64,25%,full.",
            show_default="25%,50%,full",
        ),
    ],
    "card": Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Cards to fit, comma-separated: 4090, t4, a100-80, m3-max:128, or GB such as 24.",
            show_default="8 to 80 GB",
        ),
    ],
    "device_tflops": Annotated[
        float | None,
        typer.Option(
            parser=read_number("--device-tflops", float, 100),
            metavar="FLOAT",
            help="Sustained speed of the device, in TFLOP/s, to estimate times.",
        ),
    ],
    "measure": Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure the speed of a matrix product on this machine to estimate times, which "
            "are then lower bounds.",
        ),
    ],
    "from_run": Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Run folder whose measured speeds are used to estimate times.",
        ),
    ],
}


def with_assumptions(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options in ASSUMPTIONS to a command, which gets them as keyword arguments."""
    parameters = list(inspect.signature(function).parameters.values())
    keywords = parameters.pop()
    for name, annotation in ASSUMPTIONS.items():
        default = False if name == "measure" else None
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    function.__dict__["__signature__"] = inspect.Signature([*parameters, keywords])
    return function


@app.command()
@with_options()
@with_assumptions
def plan(config_file: ConfigFile = None, assignments: Assignments = None, **options: Any) -> None:
    """Compute what a run needs: memory, FLOPs, time, and the GPUs it fits.

    It downloads config files, tokenizers and the dataset, but no weights. It writes nothing.
    """
    from ..api import work
    from ..api.prospects import summarize_plan

    flags = options.pop("flags")
    config = build_config(config_file, flags, assignments)
    options["tflops"] = options.pop("device_tflops")
    with Terminal() as terminal:
        result = work.plan(config, terminal, options)
    show(result, width=140)
    words = repeat_options(flags, config_file, assignments)
    if config.models.student is not None and config.data.dataset is None:
        words += [configuration.flag("data.dataset"), "DATASET"]  # a plan does not need one
    summary = summarize_plan(result, words, for_cards=options["card"] is not None)
    finish(result.to_dict(), summary)
