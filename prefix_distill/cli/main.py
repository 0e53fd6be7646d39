"""Run a command; turn errors into one line on stderr and an exit code."""

import contextlib
import inspect
import io
import json
import math
import os
import sys
import warnings
from typing import Annotated, Optional, TypedDict

import typer

from .. import display
from ..config import sections as configuration
from ..display import tell
from ..errors import AT_ONCE, MemoryShortage, PreflightError, Stopped, UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a large reasoning model into a small one, on-policy, from prefixes of the student's own answers.",
    epilog="Exit codes: 0 done, 1 stopped in good order, 2 bad input, 3 a check before the run, 4 out of memory, 130 interrupted "
    "(prefix-distill help exit-codes). More pages: prefix-distill help.",
)


class Wording(TypedDict, total=False):
    """What a command says of a config option in words of its own."""

    flag: str
    help: str
    shown: str  # the default, in words


def with_options(*sections: str, reworded: dict[str, Wording] | None = None):
    """Give a command one flag per config option: of sections, of single keys, of all by default.

    ``reworded`` adds single keys, each with its own flag, help or default in words.
    """
    reworded = reworded or {}

    def decorate(function):
        own = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        made = []
        for path, field in configuration.options(*sections, *reworded).items():
            kind = configuration.value_type(field.type)
            words = {**field.metadata, **reworded.get(path, {})}
            shown = words["shown"] or (str(field.default) if field.default is not None else "none")
            text = typer.Option(
                words["flag"],
                help=words["help"],
                show_default=shown,
                autocompletion=_completion(configuration.choices(field.type)),
            )
            made.append(
                inspect.Parameter(
                    path.replace(".", "__"),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[Optional[kind], text],
                )
            )

        def command(**given):
            passed = {k: given.pop(k) for k in [p.name for p in own]}
            return function(
                **passed, flags={k.replace("__", "."): v for k, v in given.items() if v is not None}
            )

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature([*own, *made])
        command.__annotations__ = {p.name: p.annotation for p in [*own, *made]}
        return command

    return decorate


def _completion(values: tuple[str, ...]):
    """Return the shell completion of an option that has only ``values``; None without them."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete if values else None


ConfigFile = Annotated[
    Optional[str], typer.Option("--config", help="YAML file of sections; flags override it.")
]
Assignments = Annotated[
    list[str], typer.Option("--set", help="section.key=value; overrides flags and file.")
]


@app.callback()
def program(
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="No bars, boxes or colours, tables as lines: for screen readers and logs (also: "
            "PREFIX_DISTILL_PLAIN=1, NO_COLOR=1, TERM=dumb).",
        ),
    ] = False,
):
    if plain:
        os.environ["PREFIX_DISTILL_PLAIN"] = "1"  # ranks hear of it, too
    if display.plain() or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars


@app.command()
@with_options()
def run(
    config_file: ConfigFile = None,
    assignments: Assignments = [],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out exactly where it stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load and check everything, write nothing.")
    ] = False,
    **flags,
):
    """Distil: the student writes a prefix, the teacher scores it, the student learns from it."""
    from datetime import datetime
    from pathlib import Path

    flags = flags["flags"]
    values = configuration.read_yaml(config_file) if config_file else {}
    values |= flags | configuration.read_assignments(assignments)
    if resume:
        values = _resumed(values)
    elif values.get("checkpoint.out") is None:
        values["checkpoint.out"] = f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    config = configuration.build(values)

    from ..training.folder import RunFolder

    folder = RunFolder(Path(config.checkpoint.out))
    if not resume:
        folder.refuse_if_used()
    _start_ranks(config.runtime)
    quiet_libraries()
    from ..training import prepare as preflight

    prepared = preflight.prepare(config)
    if not resume:
        _examine(prepared, config.evaluate.check_samples)
    folder = RunFolder(
        Path(prepared.place.gather(config.checkpoint.out)[0])
    )  # the default holds the time, which ranks may not share
    for text in prepared.notes:
        _say(prepared, text)
    for text in prepared.warnings:
        _say(prepared, f"warning: {text}")
    if dry_run:
        _finish(prepared, _plan(prepared))
        return
    document = train_in(prepared, folder, resume)
    if prepared.place.first:
        _print_pushed(document, folder.model, config.export.push, config.export.public)


def _print_pushed(document: dict, folder, repository: str | None, public: bool) -> None:
    """The result document, with the address that ``folder`` was pushed to, if it was to be; a push that failed is said after it."""
    from ..results.export import push

    failed, url = None, None
    if repository is not None:
        try:
            url = push(folder, repository, public)
        except Stopped as error:
            failed = error
    print(json.dumps({**document, "pushed": url}))
    if failed is not None:
        raise failed


@app.command()
@with_options()
def check(config_file: ConfigFile = None, assignments: Assignments = [], **flags):
    """Before training: do student, teacher, prompts, sampling and this device go together? Takes what run takes, writes nothing."""
    values = (
        (configuration.read_yaml(config_file) if config_file else {})
        | flags["flags"]
        | configuration.read_assignments(assignments)
    )
    config = configuration.build(values)
    _start_ranks(config.runtime)
    quiet_libraries()
    from ..planning import checks
    from ..training import prepare as preflight

    prepared = preflight.prepare(config)
    failed = None
    try:
        _examine(prepared, config.evaluate.check_samples, math.inf)
    except (PreflightError, MemoryShortage) as error:
        failed = error
    if prepared.place.first:
        from rich.table import Table

        table = Table("", "check", "what was found")
        for row in prepared.checks:
            table.add_row(
                {"ok": "ok", "warning": "WARNING", "error": "ERROR"}[row.status],
                row.name,
                row.found,
            )
        display.show(table, width=None if sys.stderr.isatty() else 200)
        shown = next(row for row in prepared.checks if row.name == "prompts").facts
        for role in ("student", "teacher"):
            last = " ".join(f"{token!r}={i}" for i, token in shown[role]["last"])
            tell(
                f"the {role}'s prompt, {shown[role]['ids']} ids, the last ones {last}:\n{shown[role]['text']}"
            )
        for text in prepared.notes:
            tell(text)
    _finish(
        prepared,
        checks.document(prepared.checks) | {"notes": prepared.notes, "warnings": prepared.warnings},
    )
    if failed is not None:
        raise failed


def train_in(prepared, folder, resume: bool = False, label: str = "") -> dict:
    """Opens the run folder, shows progress, trains; the result document."""
    from ..display import Display, Reporter
    from ..engine import device as runtime
    from ..planning.checks import document
    from ..training.session import train
    from ..training.trackers import Trackers

    place = prepared.place
    with (
        folder.alone() if place.first else contextlib.nullcontext(),
        runtime.Interrupt() as interrupt,
    ):
        if place.first and not resume:
            folder.create(
                configuration.as_dict(prepared.config),
                {
                    **runtime.description(),
                    "seed": prepared.config.runtime.seed,
                    "notes": prepared.notes,
                    "warnings": prepared.warnings,
                    "ranks": place.world,
                    "generation_config": {
                        name: model.generation_config.to_diff_dict()
                        for name, model in (
                            ("student", prepared.student),
                            ("teacher", prepared.teacher),
                        )
                    },
                },
            )
        if place.first and prepared.checks:
            folder.write_json("preflight.json", document(prepared.checks))
        place.wait()
        if not folder.made:
            raise UserError(
                f"--out {folder.path}: rank {place.rank} does not see what rank 0 wrote there; on several machines it must be "
                "on a file system that they share"
            )
        display = Display(prepared.config.train.steps, label, place.first)
        reporter: contextlib.AbstractContextManager[Reporter] = contextlib.nullcontext(display)
        if place.first:
            reporter = Trackers(display, folder, prepared.config)
        with reporter as report, display:
            return train(prepared, folder, report, resume, interrupt)


def _examine(prepared, samples: int, limit: float | None = None) -> None:
    """Asks the models (``checks.examine``). Warnings join the run's; PreflightError, the first error."""
    from ..planning import checks

    prepared.checks = checks.examine(prepared, samples, *([] if limit is None else [limit]))
    for check in prepared.checks:
        if check.status == "error":
            raise (MemoryShortage if check.name == "memory" else PreflightError)(
                f"{check.name}: {check.found}"
            )
        known = ("sampling", "end of text")  # these the preparation has said
        if check.status == "warning" and check.name not in known:
            prepared.warnings.append(f"{check.name}: {check.found}")


def _resumed(values: dict) -> dict:
    """The settings of the run in --out. What is given now may lengthen it, save at other times, spread its work otherwise, or mend what
    stopped it (rate, precision, device), which is said."""
    from pathlib import Path

    out = values.get("checkpoint.out")
    if out is None:
        raise UserError("--resume: name the run folder with --out")
    saved_file = Path(str(out)) / "config.yaml"
    if not saved_file.is_file():
        raise UserError(
            f"--resume {out}: no config.yaml in it; name the folder of a run, or drop --resume"
        )
    from ..training.folder import RunFolder

    RunFolder(saved_file.parent).check_format()
    saved = configuration.read_yaml(str(saved_file))
    configuration.build(saved)
    if "runtime.gpus" not in values and os.environ.get("LOCAL_WORLD_SIZE") not in (
        None,
        str(saved.get("runtime.gpus")),
    ):
        saved["runtime.gpus"] = None  # another launcher has settled it
    if not {"train.steps", "schedule.lr_schedule"} <= saved.keys():
        raise UserError(
            f"--resume {out}: its config.yaml is damaged (no train.steps or schedule.lr_schedule); start anew with another --out"
        )
    free = {
        "train.steps",
        "checkpoint.save_every",
        "checkpoint.out",
        "runtime.gpus",
        "runtime.rank_timeout",
        "runtime.check_ranks_every",
        "train.micro_batch_size",
        "rollout.rows",
        *configuration.options("trackers", "export"),
    }
    remedies = {
        "schedule.lr",
        "train.grad_clip",
        "runtime.dtype",
        "runtime.head_dtype",
        "runtime.head_memory_mb",
        "runtime.device",
        "runtime.teacher_device",
        "train.gradient_checkpointing",
    }
    for path, value in values.items():
        if path not in configuration.options():
            configuration.build({path: value})  # raises, with the nearest known key
        if path in remedies and value != saved.get(path):
            _note(
                f"{path} was {saved.get(path)!r} and is {value!r} from here on: the rest differs from a run that had it from the start"
            )
        elif path not in free and value != saved.get(path):
            raise UserError(
                f"--resume {out}: {path} was {saved.get(path)!r}, got {value!r}; leave it out, or start anew "
                "with another --out"
            )
    steps, schedule = values.get("train.steps", saved["train.steps"]), saved["schedule.lr_schedule"]
    if steps != saved["train.steps"] and schedule != "constant":
        _note(
            f"{saved['train.steps']} updates become {steps}: the {schedule} learning rate is stretched over all of them, "
            "so the rest differs from a run planned this long"
        )
    return saved | values


def _plan(prepared) -> dict:
    from ..planning.checks import document

    config = prepared.config
    prompts = prepared.train_prompts[: config.train.batch_size]
    lengths = {"prefix": prepared.prefix.length(0), "full": config.rollout.max_new_tokens}
    beside = [
        flag
        for flag, on in (
            ("--select", prepared.selection),
            ("--extrapolate", prepared.extrapolation_prompts),
            ("--off-policy", prepared.off_policy),
            ("--tail-every", config.evaluate.tail_every),
        )
        if on
    ]
    return {
        "dry_run": True,
        "checks": document(prepared.checks)["checks"],
        "config": configuration.as_dict(config),
        "notes": prepared.notes,
        "warnings": prepared.warnings,
        "flops_per_update": {
            name: prepared.update_cost(prompts, length) for name, length in lengths.items()
        },
        "not_in_flops_per_update": beside,
    }


@app.command()
@with_options()
def plan(
    config_file: ConfigFile = None,
    assignments: Assignments = [],
    prompt_tokens: Annotated[
        Optional[int],
        typer.Option(help="Length of every prompt (tokens), where no data set is to be read."),
    ] = None,
    prefixes: Annotated[
        Optional[str],
        typer.Option(
            help="Prefix schedules beside --prefix, by commas: 64,25%,full.",
            show_default="25%,50%,full",
        ),
    ] = None,
    device_tflops: Annotated[
        Optional[float],
        typer.Option(help="Sustained rate of the device (10^12 FLOP/s), for times."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time a matmul of the student's on this machine, for lower bounds of times.",
        ),
    ] = False,
    from_run: Annotated[
        Optional[str],
        typer.Option(help="Run folder whose measured rates, phase by phase, give the times."),
    ] = None,
    **flags,
):
    """What a run would need, from config files alone: memory, FLOPs, time, and which cards it fits. Nothing is downloaded or written."""
    values = configuration.read_yaml(config_file) if config_file else {}
    config = configuration.build(
        values | flags["flags"] | configuration.read_assignments(assignments)
    )
    quiet_libraries()
    from ..planning import plan as planning

    document = planning.plan(config, prompt_tokens, prefixes, device_tflops, measure, from_run)
    for text in document["notes"]:
        tell(text)
    display.show(*planning.tables(document), width=None if sys.stderr.isatty() else 140)
    print(json.dumps(document))


@app.command("eval")
@with_options(
    "data.prompt_column",
    "data.answer_column",
    "data.system",
    "data.instruction",
    "data.prompt_template",
    "data.template",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.max_new_tokens",
    "rollout.rows",
    "evaluate.answer_format",
    "runtime.gpus",
    "runtime.seed",
    reworded={
        "models.student": {
            "flag": "--model",
            "help": "Hub id, folder, .gguf file or lab:TASK/ROLE.",
        },
        "models.trust_remote_code": {"flag": "--trust-remote-code/--no-trust-remote-code"},
        "data.dataset": {
            "help": "As for run: file, hub id, lab:TASK, a preset (gsm8k, …), name#1000."
        },
        "data.split": {"shown": "the preset's, else test"},
        "data.streaming": {"help": "Read only the rows that are evaluated."},
        "data.student_thinking": {
            "flag": "--thinking",
            "help": "Thinking switch of the chat template: auto, on or off.",
        },
        "data.few_shot": {
            "help": "Rows that are not evaluated, shown with their solutions before every problem."
        },
        "rollout.begin": {"help": "Text forced at the start of every response."},
        "evaluate.problems": {
            "flag": "--limit",
            "help": "Problems evaluated, from the first (0: all).",
            "shown": "200; all of name#N",
        },
        "evaluate.rollouts": {
            "flag": "--samples",
            "help": "Answers sampled per problem (k of avg@k and pass@k).",
        },
        "evaluate.temperature": {
            "flag": "--temperature",
            "help": "Sampling temperature (0 is greedy).",
        },
        "runtime.dtype": {"help": "Compute: auto, float32 or bfloat16."},
        "runtime.device": {"help": "auto, cpu, cuda, cuda:1, mps."},
    },
)
def evaluate_command(
    out: Annotated[
        Optional[str],
        typer.Option(help="File for the per-problem JSONL.", show_default="eval-<time>.jsonl"),
    ] = None,
    **flags,
):
    """Measure a model: accuracy with its interval, pass@k, finish rate, length, repetition."""
    from datetime import datetime

    values = flags["flags"]
    if "#" in values.get("data.dataset", ""):
        values.setdefault("evaluate.problems", 0)  # name#N says how many
    values["train.batch_size"] = max(1, values.get("runtime.gpus", 1))  # a prompt for every rank
    values["checkpoint.out"] = out or f"eval-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    config = configuration.build(values)
    _start_ranks(config.runtime)
    quiet_libraries()
    from ..training.prepare import evaluate_model

    place, notes, document = evaluate_model(config)
    for text in notes if place.first else ():
        tell(text)
    if place.first:
        print(json.dumps(document))


@app.command()
def demo(
    out: Annotated[
        Optional[str],
        typer.Option(help="Folder for runs and picture.", show_default="runs/demo-<time>"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, rollouts and evaluation.")] = 0,
):
    """Three minutes, offline: distil the embedded pair with a prefix and with full rollouts, side by side."""
    from datetime import datetime
    from pathlib import Path

    from ..training.folder import RunFolder

    folder = RunFolder(Path(out or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}"))
    folder.refuse_if_used()
    quiet_libraries()
    from ..results.demo import demonstrate

    table, document = demonstrate(folder.path, seed, train_in)
    display.show(table)
    print(json.dumps(document))


@app.command()
@with_options(
    "models",
    "data",
    "rollout.samples",
    "rollout.max_new_tokens",
    "rollout.eos",
    "rollout.begin",
    "rollout.rows",
    "evaluate.answer_format",
    "runtime",
)
def probe(
    out: Annotated[str, typer.Option(help="Folder for probe.json and probe.png.")],
    problems: Annotated[
        int,
        typer.Option(help="Training prompts that are probed, from the first of the shuffled ones."),
    ] = 100,
    **flags,
):
    """Before training: where the teacher disagrees, whether a prefix will do, and how long it should be."""
    from pathlib import Path

    from ..training.folder import RunFolder

    if problems < 1:
        raise UserError(
            f"--problems {problems}: expected at least 1 prompt; some tens give an accuracy worth looking at"
        )
    config = configuration.build(
        flags["flags"]
        | {
            "train.steps": 1,
            "train.batch_size": problems,
            "evaluate.problems": 0,
            "evaluate.kl_prompts": 1,
            "checkpoint.out": out,
        }
    )
    folder = RunFolder(Path(out))
    folder.refuse_if_used()
    _start_ranks(config.runtime)
    quiet_libraries()
    from ..planning import probe as probing
    from ..training import prepare as preflight

    prepared = preflight.prepare(config)
    for text in prepared.notes + [f"warning: {text}" for text in prepared.warnings]:
        _say(prepared, text)
    document = probing.probe(prepared, lambda text: _say(prepared, text))
    if prepared.place.first:
        folder.create(configuration.as_dict(prepared.config))
        folder.write_json("probe.json", document)
        probing.draw(document, Path(out) / "probe.png")
        display.show(probing.table(document), probing.corner_table(document))
        _say(prepared, document["reason"])
    _finish(prepared, document)


@app.command()
def compare(
    arms_file: Annotated[
        str,
        typer.Argument(
            metavar="ARMS.YAML", help="base, seeds, arms, reference, tune, also: see the README."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Folder of the comparison; a second call goes on in it.")
    ],
):
    """Run several arms × seeds from one file, one after another, and report accuracy against cost."""
    from pathlib import Path

    from ..results import compare as comparison

    arms = comparison.read(arms_file)
    quiet_libraries()
    comparison.compare(arms, Path(out), train_in, tell)
    _report([Path(out)], arms.reference, Path(out), Path(arms_file).stem)


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Run folders, or folders that hold them."),
    ],
    out: Annotated[
        str, typer.Option(help="Folder for report.html, report.md, report.csv and report.png.")
    ],
    reference: Annotated[
        Optional[str], typer.Option(help="Arm whose accuracy the others have to reach.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Prefix distillation",
):
    """Tables, picture and one self-contained page from any set of run folders."""
    from pathlib import Path

    _report([Path(folder) for folder in folders], reference, Path(out), title)


@app.command("export")
@with_options(
    "models.trust_remote_code",
    "export.public",
    reworded={
        "export.push": {
            "help": "Hub repository, USER/NAME, that gets the folder; private if it is made here."
        },
    },
)
def export_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run folder, or a model: folder, hub id, .gguf file, lab:TASK/ROLE.",
        ),
    ],
    out: Annotated[
        Optional[str],
        typer.Option(
            help="Folder for the model; only to push a folder as it is, it can be left out.",
            show_default="none",
        ),
    ] = None,
    which: Annotated[
        str,
        typer.Option(
            help="Of a run folder: model, best, or the number of an update with a checkpoint."
        ),
    ] = "model",
    dtype: Annotated[
        str, typer.Option(help="Weights as auto (as they are), float32, bfloat16 or float16.")
    ] = "auto",
    gguf: Annotated[
        Optional[str],
        typer.Option(
            help="Write a GGUF file for llama.cpp, too: f32, f16, bf16 or q8_0.",
            show_default="none",
        ),
    ] = None,
    **flags,
):
    """A run's student, or any model, as a folder of its own: in another dtype, as GGUF, on the hub."""
    from pathlib import Path

    config = configuration.build(flags["flags"])
    repository = config.export.push
    if out is None and (repository is None or dtype != "auto" or gguf is not None):
        raise UserError(
            "--out: name the folder to write; without it a folder can only be pushed as it is (--push-to-hub)"
        )
    quiet_libraries()
    from ..results import export as exporting

    if out is None:
        folder = exporting.folder_of(source, which)
        if folder is None:
            raise UserError(
                f"export {source}: no run folder and no model folder; check the path, or name a folder with --out"
            )
        document = {"out": str(folder)}
    else:
        folder = Path(out)
        document = exporting.export(
            source, which, folder, dtype, gguf, config.models.trust_remote_code
        )
        if gguf is not None:
            _note(
                f"smaller types are llama.cpp's to make: llama-quantize {document['gguf']} Q4_K_M"
            )
    _print_pushed(document, folder, repository, config.export.public)


@app.command("env")
def environment():
    """Versions, devices, precisions and threads, for a bug report. No host name, no user, no path, no secret."""
    from ..engine import device as runtime

    document = runtime.environment()
    for name, value in document.items():
        for line in (
            value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        ):
            tell(
                f"{name}: "
                + (
                    ", ".join(f"{k} {v}" for k, v in line.items() if v is not None)
                    if isinstance(line, dict)
                    else str(line)
                )
            )
    print(json.dumps(document))


@app.command("help")
def help_command(
    topic: Annotated[
        Optional[str], typer.Argument(metavar="[TOPIC]", help="A page; none: the list of them.")
    ] = None,
):
    """A page of documentation, in Markdown, on stdout: recipes, methods, migration, machines, exit-codes."""
    import difflib
    from importlib.resources import files

    pages = {
        file.name.removesuffix(".md"): file
        for file in files("prefix_distill").joinpath("help").iterdir()
        if file.name.endswith(".md")
    }
    if topic is None:
        for name in sorted(pages):
            print(
                f"prefix-distill help {name:12} {pages[name].read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"
            )
        return
    if topic not in pages:
        near = difflib.get_close_matches(topic, pages, 1, 0.4)
        raise UserError(
            f"help {topic[:80]}: no such page; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(pages))}")
        )
    print(pages[topic].read_text(encoding="utf-8"), end="")


def _report(folders, reference, out, title: str) -> None:
    from ..results import summary as reporting

    runs = reporting.collect(folders)
    arms = reporting.by_arm(runs)
    if reference is not None and reference not in arms:
        raise UserError(f"--reference {reference}: no such arm; there are {', '.join(arms)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".partial").touch()
        (out / ".partial").unlink()
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name another folder"
        ) from None
    rows = reporting.summary(runs, reference)
    reporting.write_csv(runs, out / "report.csv")
    (out / "report.md").write_text(reporting.markdown(rows), encoding="utf-8")
    (out / "report.html").write_text(reporting.page(runs, rows, reference, title), encoding="utf-8")
    (out / "report.png").write_bytes(reporting.png(reporting.draw(runs, title)))
    from rich.table import Table

    table = Table()
    for heading in reporting.HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*reporting.cells(row))
    display.show(table, width=None if sys.stderr.isatty() else 200)
    print(json.dumps({"out": str(out), "runs": len(runs), "reference": reference, "arms": rows}))


def _say(prepared, text: str) -> None:
    if prepared.place.first:
        _note(text)


def _note(text: str) -> None:
    """A line on stderr, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        tell(text)


def _finish(prepared, document: dict) -> None:
    if prepared.place.first:
        print(json.dumps(document))


def quiet_libraries() -> None:
    """Imports the heavy libraries with their own chatter off."""
    import logging

    import transformers

    hide_deprecations()  # once more: the import may have put filters before ours
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def hide_deprecations() -> None:
    """Hide FutureWarning and DeprecationWarning, about which a user can do nothing.

    They name a library's old names, which another library or this package uses. Python's own
    ``-W``, ``-X dev`` and ``PYTHONWARNINGS`` still show them or make them errors.
    """
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def calm_threads(environment) -> None:
    """How OpenMP's threads wait, where nothing else is set; before torch is imported. Long spinning at
    barriers slows torch down when another process is busy; sleeping at once makes every small matmul wait for a wake-up."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "20000")  # some tens of microseconds


def _start_ranks(runtime) -> None:
    """With --gpus, unless this process is a rank already: runs the command as so many ranks, and ends with their exit code."""
    from . import launch

    if (runtime.gpus or 1) == 1 or launch.launched():
        return
    launch.check(runtime.gpus, runtime.device)
    code, message = launch.launch(runtime.gpus, sys.argv[1:])
    if message is not None:
        _fail(message, code)
    sys.exit(code)


def _understood(group, arguments: list[str], say: bool) -> list[str]:
    """The arguments in our own flags, --plain first; what was in another tool's is said."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in group.commands:
        return arguments
    at = arguments.index(name) + 1
    valued, switches = set(), {"--plain": None, "--help": None}
    for parameter in group.commands[name].params:
        for flag in parameter.opts:
            if flag.startswith("--") and getattr(parameter, "is_flag", False):
                switches[flag] = (
                    parameter.name.replace("__", ".") if "__" in parameter.name else None
                )
            elif flag.startswith("--"):
                valued.add(flag)
    from .spellings import translate

    ranks = os.environ.get("WORLD_SIZE", "1")
    made, said = translate(arguments[at:], valued, switches, int(ranks) if ranks.isdecimal() else 1)
    if said and say:
        _note(f"understood: {'; '.join(said)} (prefix-distill help migration)")
    plain = made[:1] == ["--plain"]  # an option of the program, taken behind its command, too
    return [*arguments[: at - 1], *made[:plain], name, *made[plain:]]


def main(alone: bool = True) -> None:
    """Runs the command; bad input ends with one line on stderr and exit code 2. Not ``alone``: the launcher speaks for its ranks."""
    calm_threads(os.environ)
    hide_deprecations()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a Windows code page or a C locale lacks some characters of ours
            stream.reconfigure(errors="replace")
    try:
        command = typer.main.get_command(app)
        code = command(
            _understood(command, sys.argv[1:], alone),
            prog_name="prefix-distill",
            standalone_mode=False,
        )
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except (UserError, Stopped) as error:
        _fail(str(error), error.exit_code, alone)
    except KeyboardInterrupt:
        _fail(AT_ONCE, 130, alone)
    except Exception as error:
        if _out_of_memory(error):
            _fail(
                "out of memory; lower --generation-rows or --micro-batch-size, or use --dtype bfloat16",
                4,
                alone,
            )
        if not hasattr(
            error, "format_message"
        ):  # click's own complaints about flags have it; anything else is a bug
            raise
        _fail(error.format_message(), 2, alone)


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from ..engine.device import out_of_memory

    return out_of_memory(error)


def _fail(message: str, code: int, alone: bool = True) -> None:
    """Ends the command with one line, from the launcher where there is one that speaks for its ranks (not ``alone``)."""
    message = " ".join(message.split())
    if len(message) > 1000:
        message = f"{message[:600]} … {message[-300:]}"
    rank = os.environ.get("RANK", "0")
    if not message.startswith("rank ") and rank != "0" and alone:
        message = f"rank {rank}: {message}"
    if alone:
        tell(message if code >= 128 else f"error: {message}")
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from .launch import leave_word

        leave_word(message, code)
    sys.exit(code)
