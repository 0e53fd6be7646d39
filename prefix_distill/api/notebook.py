"""The functions for notebooks and programs: keyword options in, results out.

The keywords are the flags of the command line with underscores. Nothing is printed, no function
ends the process, and all of them work outside the main thread. Notes and warnings go to the logger
"prefix_distill". Errors are UserError, Stopped or classes of them; the message is one line.

Ctrl-C in the main thread saves the state of a run after the current update and raises Interrupted;
a second one raises KeyboardInterrupt at once.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Unpack

from .. import config as configuration
from ..errors import UserError
from ..training.resume import resume_settings
from . import settings, work
from .documents import (
    CheckResult,
    Comparison,
    EvaluationResult,
    ExportResult,
    PlanResult,
    ProbeResult,
    RunResult,
)
from .keywords import EvalOptions, ExportOptions, PlanOptions, ProbeOptions, RunOptions
from .observers import LogObserver, OnStep

Name = str | os.PathLike[str]


def run(
    config: configuration.Config | None = None,
    *,
    on_step: OnStep | None = None,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Distil the teacher into the student, as ``prefix-distill run``.

        result = run(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-1.7B", dataset="gsm8k",
                     prefix=512, steps=100, out="runs/first")

    ``config``: settings that the options override; default: the defaults. `RunOptions` lists the
    options; ``prefix-distill run --help`` describes them. A model or dataset that is not named
    comes from the embedded laboratory. With ``gpus=N``, N processes of this machine share the work.

    ``on_step(row)`` is called after every update with its row of metrics.jsonl. If it raises, the
    run saves its state and stops after that update, and the exception is raised; `resume` continues
    the run.
    """
    return work.distil(_config(config, options), LogObserver(on_step))


def resume(
    out: Name | None = None, /, *, on_step: OnStep | None = None, **options: Unpack[RunOptions]
) -> RunResult:
    """Continue the run in the folder ``out`` exactly where it stopped.

    Options may change length, saving and parallelism, such as ``steps=200``, and what can fix a
    stopped run: learning rate, clipping, dtype, device. UserError: another option differs.
    """
    observer = LogObserver(on_step)
    given: dict[str, object] = dict(options)
    if out is not None and "out" in given:
        raise UserError(
            f"resume: the run folder is given twice, {out} and out={given['out']}; a run "
            "is resumed in its own folder, so omit one of them"
        )
    if out is not None:
        given["out"] = out
    values = settings.read_options(given, settings.run_names())
    values, notes = resume_settings(values)
    for text in notes:
        observer.note(text)
    return work.distil(configuration.build(values), observer, resume=True)


def check(config: configuration.Config | None = None, **options: Unpack[RunOptions]) -> CheckResult:
    """Check that models, prompts, sampling and device of a run go together. Nothing is written."""
    return work.check(_config(config, options), LogObserver())


def plan(config: configuration.Config | None = None, **options: Unpack[PlanOptions]) -> PlanResult:
    """Compute the memory, FLOPs and time that a run needs, and the GPUs it fits.

    `PlanOptions` describes the options beside those of `run`. No weights are downloaded, and
    nothing is written.
    """
    assumptions, rest = settings.take_options(
        options,
        {
            "prompt_tokens": None,
            "prefixes": None,
            "device_tflops": None,
            "measure": False,
            "from_run": None,
        },
    )
    assumptions["tflops"] = assumptions.pop("device_tflops")
    prefixes = assumptions["prefixes"]
    if isinstance(prefixes, Iterable) and not isinstance(prefixes, str):
        assumptions["prefixes"] = ",".join(map(str, prefixes))
    return work.plan(_config(config, rest), LogObserver(), assumptions)


def evaluate(
    model: Name | None = None, /, *, out: Name | None = None, **options: Unpack[EvalOptions]
) -> EvaluationResult:
    """Measure a model on a dataset, as ``prefix-distill eval``.

    ``out``: file for the answers, JSON lines; default: eval-<time>.jsonl.
    """
    values = settings.read_options({"model": model, **options}, settings.eval_names())
    file = None if out is None else os.fspath(out)
    return work.evaluate(settings.evaluation_config(values, file), LogObserver())


def probe(out: Name, *, problems: int = 100, **options: Unpack[ProbeOptions]) -> ProbeResult:
    """Measure, before training, where the teacher disagrees and how long a prefix should be.

    ``out``: folder for probe.json and probe.png; ``problems``: number of training prompts.
    """
    values = settings.read_options(options, settings.probe_names())
    return work.probe(settings.probe_config(values, os.fspath(out), problems), LogObserver())


def compare(arms_file: Name, out: Name, *, on_step: OnStep | None = None) -> Comparison:
    """Run the arms × seeds of a YAML file, one after another, and report accuracy against cost.

    A second call with the same folder ``out`` continues. ``on_step(row)``: as in `run`; the row has
    the key "run" with arm and seed.
    """
    return work.compare(os.fspath(arms_file), Path(out), LogObserver(on_step))


def report(
    folders: Iterable[Name],
    out: Name,
    *,
    reference: str | None = None,
    title: str = "Prefix distillation",
) -> Comparison:
    """Write report.html, report.md, report.csv and report.png about finished runs to ``out``.

    ``folders``: run folders or folders that hold them; ``reference``: the arm whose accuracy the
    others have to reach.
    """
    return work.report([Path(folder) for folder in folders], Path(out), reference, title)


def export(source: Name, out: Name | None = None, **options: Unpack[ExportOptions]) -> ExportResult:
    """Write the student of a run, or any model, to a folder of its own.

    ``source``: a run folder, or a model as in `run`; `ExportOptions` describes the options.
    """
    choices, rest = settings.take_options(
        options, {"which": "model", "dtype": "auto", "gguf": None}
    )
    config = configuration.build(settings.read_options(rest, settings.export_names()))
    folder = None if out is None else Path(out)
    return work.export(os.fspath(source), config, folder, choices)


def _config(
    config: configuration.Config | None, options: Mapping[str, object]
) -> configuration.Config:
    """Return the checked config with the options over it."""
    values = {} if config is None else settings.flatten(config)
    return configuration.build(values | settings.read_options(options, settings.run_names()))
