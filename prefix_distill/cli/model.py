"""The commands eval and export."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import config as configuration
from ..display import tell
from ..errors import Stopped, UserError
from .app import app, note, start_ranks
from .options import Wording, with_options
from .quiet import quiet_libraries

EVAL_OPTIONS = (
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
)
# flags, help and defaults of eval that differ from those of run
EVAL_WORDING: dict[str, Wording] = {
    "models.student": {
        "flag": "--model",
        "help": "Hub id, folder, .gguf file or lab:TASK/ROLE.",
    },
    "models.trust_remote_code": {"flag": "--trust-remote-code/--no-trust-remote-code"},
    "data.dataset": {"help": "As for run: file, hub id, lab:TASK, a preset (gsm8k, …), name#1000."},
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
}
EXPORT_WORDING: dict[str, Wording] = {
    "export.push": {
        "help": "Hub repository, USER/NAME, that gets the folder; private if it is made here."
    },
}


def print_pushed(document: dict, folder: Path, repository: str | None, public: bool) -> None:
    """The result document, with the address that ``folder`` was pushed to, if it was to be; a
    push that failed is said after it."""
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


@app.command("eval")
@with_options(*EVAL_OPTIONS, reworded=EVAL_WORDING)
def evaluate_command(
    out: Annotated[
        str | None,
        typer.Option(help="File for the per-problem JSONL.", show_default="eval-<time>.jsonl"),
    ] = None,
    **flags: dict,
) -> None:
    """Measure a model: accuracy with its interval, pass@k, finish rate, length, repetition."""
    from datetime import datetime

    values = flags["flags"]
    if "#" in values.get("data.dataset", ""):
        values.setdefault("evaluate.problems", 0)  # N in name#N is the number of problems
    values["train.batch_size"] = max(1, values.get("runtime.gpus", 1))  # one prompt per rank
    values["checkpoint.out"] = out or f"eval-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    config = configuration.build(values)
    start_ranks(config)
    quiet_libraries()
    from ..results.evaluation import evaluate_model

    place, notes, document = evaluate_model(config)
    for text in notes if place.first else ():
        tell(text)
    if place.first:
        print(json.dumps(document))


@app.command("export")
@with_options("models.trust_remote_code", "export.public", reworded=EXPORT_WORDING)
def export_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run folder, or a model: folder, hub id, .gguf file, lab:TASK/ROLE.",
        ),
    ],
    out: Annotated[
        str | None,
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
        str | None,
        typer.Option(
            help="Write a GGUF file for llama.cpp, too: f32, f16, bf16 or q8_0.",
            show_default="none",
        ),
    ] = None,
    **flags: dict,
) -> None:
    """A run's student, or any model, as a folder of its own: in another dtype, as GGUF, on the
    hub."""
    config = configuration.build(flags["flags"])
    repository = config.export.push
    if out is None and (repository is None or dtype != "auto" or gguf is not None):
        raise UserError(
            "--out: name the folder to write; without it a folder can only be pushed as it is "
            "(--push-to-hub)"
        )
    quiet_libraries()
    from ..results import export as exporting

    if out is None:
        folder = _existing_folder(source, which)
        document = {"out": str(folder)}
    else:
        folder = Path(out)
        model = exporting.Source(source, which, config.models.trust_remote_code)
        document = exporting.export(model, folder, dtype, gguf)
    if gguf is not None:
        note(f"smaller types are llama.cpp's to make: llama-quantize {document['gguf']} Q4_K_M")
    print_pushed(document, folder, repository, config.export.public)


def _existing_folder(source: str, which: str) -> Path:
    """Return the model folder at or inside ``source``; raise UserError if there is none."""
    from ..results.export import folder_of

    folder = folder_of(source, which)
    if folder is None:
        raise UserError(
            f"export {source}: no run folder and no model folder; check the path, or name a "
            "folder with --out"
        )
    return folder
