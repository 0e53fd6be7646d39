"""The commands eval and export."""

from typing import Annotated

import typer

from .. import config as configuration
from ..api import settings
from ..api.arguments import read_folder
from .app import Terminal, app, finish, note
from .completion import complete_from
from .options import Wording, with_options

# help and defaults of eval that differ from those of run
EVAL_WORDING: dict[str, Wording] = {
    "models.student": {"help": "Model: hub id, folder, .gguf file or lab:TASK/ROLE."},
    "data.dataset": {
        "help": "Problems: file, hub id, lab:TASK or preset (gsm8k, …); same syntax as for run."
    },
    "data.split": {"shown": "the preset's, else test"},
    "data.streaming": {"help": "Read only the rows that are evaluated."},
    "data.student_thinking": {"help": "Thinking switch of the chat template: auto, on or off."},
    "data.template_args": {
        "help": "Variable of the chat template, such as reasoning_effort=low; may be repeated."
    },
    "data.template_date": {
        "help": "Date that the chat template writes, such as 2026-05-31.",
        "shown": "today",
    },
    "data.few_shot": {
        "help": "Number of other rows, shown with their solutions before every problem."
    },
    "rollout.max_new_tokens": {
        "help": "Longest answer, in tokens.",
        "shown": "the built-in task's, else what the model's positions allow, up to 2048",
    },
    "rollout.begin": {"help": "Text forced at the start of every answer."},
    "evaluate.problems": {
        "help": "Number of problems to evaluate, in order; 0 evaluates all.",
        "shown": "200; with name#N, all N rows",
    },
    "evaluate.rollouts": {"help": "Answers sampled per problem (k of avg@k and pass@k)."},
    "evaluate.temperature": {"help": "Sampling temperature (0 is greedy)."},
    "evaluate.top_p": {"help": "Probability mass that nucleus sampling keeps; 1 keeps all tokens."},
    "evaluate.top_k": {"help": "Number of most likely tokens that sampling keeps; 0 keeps all."},
    "evaluate.sampling": {
        "help": "Sampling: options (--temperature, --top-p, --top-k) or model (what the model's "
        "generation_config.json recommends)."
    },
    "runtime.dtype": {"help": "Compute dtype: auto, float32 or bfloat16."},
    "runtime.device": {"help": "Device: auto, cpu, cuda, cuda:1 or mps."},
    "runtime.seed": {"help": "Seed of the answers, of the rows of name#N and of few-shot rows."},
}
EXPORT_WORDING: dict[str, Wording] = {
    "export.push": {
        "help": "Hub repository (USER/NAME) that the folder is uploaded to. A new repository is "
        "private."
    },
}


def word_eval() -> dict[str, Wording]:
    """Return the flag, help and shown default of each option of eval."""
    wording: dict[str, Wording] = {}
    for path, flag in settings.EVAL_FLAGS.items():
        words = EVAL_WORDING.get(path, Wording())
        wording[path] = words if flag is None else {**words, "flag": flag}
    return wording


@app.command("eval")
@with_options(reworded=word_eval())
def evaluate_command(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File for the answers, in JSON Lines: one line per problem.",
            show_default="runs/eval-<time>.jsonl",
        ),
    ] = None,
    **flags: dict,
) -> None:
    """Evaluate a model: accuracy with its interval, pass@k, finish rate, length, repetition."""
    from ..api import work
    from ..api.summaries import summarize

    config = settings.evaluation_config(flags["flags"], out)
    with Terminal() as terminal:
        result = work.evaluate(config, terminal)
    finish(result.to_dict(), summarize(result))


Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Dtype of the weights: auto (as stored), float32, bfloat16 or float16.",
        autocompletion=complete_from(["auto", "float32", "bfloat16", "float16"]),
    ),
]
Gguf = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Also write a GGUF file for llama.cpp: f32, f16, bf16 or q8_0.",
        show_default="none",
        autocompletion=complete_from(["f32", "f16", "bf16", "q8_0"]),
    ),
]


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
            metavar="FOLDER",
            help="Folder for the model. With --push-to-hub alone, an existing folder is pushed "
            "unchanged.",
            show_default="runs/export-<time>",
        ),
    ] = None,
    which: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What to export from a run folder: model, best, or the step of a checkpoint.",
            autocompletion=complete_from(["model", "best"]),
        ),
    ] = "model",
    dtype: Dtype = "auto",
    gguf: Gguf = None,
    **flags: dict,
) -> None:
    """Save a run's student, or any model, in another dtype or as GGUF, or push it to the hub."""
    from ..api import work
    from ..api.documents import PushFailed
    from ..api.summaries import summarize

    config = configuration.build(flags["flags"], settings.run_flags())
    folder = None
    if out is not None:
        folder = read_folder("--out", out)
    choices: dict[str, object] = {"which": which, "dtype": dtype, "gguf": gguf}
    try:
        with Terminal() as terminal:
            result = work.export(source, config, terminal, out=folder, choices=choices)
    except PushFailed as error:
        finish(error.result.to_dict(), summarize(error.result))
        raise
    if result.gguf is not None:
        note(f"for smaller types use llama.cpp's tool: llama-quantize {result.gguf} Q4_K_M")
    finish(result.to_dict(), summarize(result))
