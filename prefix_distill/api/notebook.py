"""The functions for notebooks and programs: keyword options in, results out.

The keywords are the flags of the command line with underscores. Nothing is printed, no function
ends the process, and all of them work outside the main thread. Notes and warnings go to the logger
"prefix_distill". Errors are UserError, Stopped or classes of them; the message is one line.

Ctrl-C in the main thread saves the state of a run after the current step and raises Interrupted;
a second one raises KeyboardInterrupt at once.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Unpack

from .. import config as configuration
from ..errors import UserError
from ..training.resume import resume_settings
from . import arguments, settings, work
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
# the options of `plan` alone, and their types
PLAN_KINDS: dict[str, type] = {
    "prompt_tokens": int,
    "card": str,
    "device_tflops": float,
    "measure": bool,
    "from_run": str,
}


def run(
    config: configuration.Config | None = None,
    *,
    on_step: OnStep | None = None,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Distill the teacher into the student, as ``prefix-distill run``.

        result = run(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-1.7B", dataset="gsm8k",
                     prefix=512, steps=100, out="runs/first")

    ``config``: settings that the options override; default: the defaults. `RunOptions` lists the
    options; ``prefix-distill run --help`` describes them. The built-in pair and
    task are used if neither a model nor a dataset is named. With ``gpus=N``, N processes of this
    machine share the work.

    ``on_step(row)`` is called after every step with its row of metrics.jsonl. If it raises, the run
    saves its state and stops after that step, and the exception is raised; `resume` continues the
    run.
    """
    observer = LogObserver(on_step)
    settled = settings.name_run_folder(_config(config, options))
    return work.distil(settings.pin_paths(settled), observer)


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
        given["out"] = arguments.read_path("out", out)
    values = settings.read_options(given, settings.run_names())
    values, notes = resume_settings(values)
    for text in notes:
        observer.note(text)
    config = settings.pin_paths(configuration.build(values, settings.run_flags()))
    return work.distil(config, observer, resume=True)


def check(config: configuration.Config | None = None, **options: Unpack[RunOptions]) -> CheckResult:
    """Check that a run's models, prompts, sampling and device are compatible; write nothing."""
    return work.check(_config(config, options), LogObserver())


def plan(config: configuration.Config | None = None, **options: Unpack[PlanOptions]) -> PlanResult:
    """Compute the memory, FLOPs and time that a run needs, and the GPUs it fits.

    `PlanOptions` describes the options besides those of `run`. No weights are downloaded, and
    nothing is written.
    """
    given, rest = settings.take_options(options, dict.fromkeys(PLAN_KINDS) | {"prefixes": None})
    assumptions: dict[str, object] = {"prefixes": arguments.read_prefixes(given.pop("prefixes"))}
    for name, value in given.items():
        if value is not None:
            assumptions[name] = arguments.read_value(name, value, PLAN_KINDS[name])
    if "device_tflops" in assumptions:
        assumptions["tflops"] = assumptions.pop("device_tflops")
    return work.plan(_config(config, rest), LogObserver(), assumptions)


def evaluate(
    model: Name | None = None, /, *, out: Name | None = None, **options: Unpack[EvalOptions]
) -> EvaluationResult:
    """Measure a model on a dataset, as ``prefix-distill eval``.

    ``out``: file for the answers, JSON lines; default: runs/eval-<time>.jsonl.
    """
    values = settings.read_options({"model": model, **options}, settings.eval_names())
    file = None
    if out is not None:
        file = arguments.read_path("out", out)
    return work.evaluate(settings.evaluation_config(values, file), LogObserver())


def probe(
    out: Name | None = None, *, problems: int = 100, **options: Unpack[ProbeOptions]
) -> ProbeResult:
    """Measure where teacher and student disagree, and recommend a prefix length; train nothing.

    ``out``: folder for probe.json and probe.png, default: runs/probe-<time>; ``problems``: number
    of training prompts.
    """
    values = settings.read_options(options, settings.probe_names())
    folder = None
    if out is not None:
        folder = arguments.read_path("out", out)
    count = arguments.read_value("problems", problems, int)
    return work.probe(settings.probe_config(values, folder, count), LogObserver())


def compare(
    arms_file: Name, out: Name | None = None, *, on_step: OnStep | None = None
) -> Comparison:
    """Train every arm of a YAML file with every seed, and compare accuracy with cost.

    A second call with the same folder ``out`` continues; default: runs/compare-<time>.
    ``on_step(row)``: as in `run`; the row has the key "run" with arm and seed.
    """
    observer = LogObserver(on_step)
    file = arguments.read_path("arms_file", arms_file)
    return work.compare(file, settings.read_out("out", out, "compare").absolute(), observer)


def report(
    folders: Iterable[Name],
    out: Name | None = None,
    *,
    reference: str | None = None,
    title: str = "Prefix distillation",
) -> Comparison:
    """Write report.html, report.md, report.csv and report.png about finished runs to ``out``,
    by default runs/report-<time>.

    ``folders``: run folders or folders that contain them; ``reference``: the arm to compare
    the others with.
    """
    if reference is not None:
        reference = arguments.read_value("reference", reference, str)
    title = arguments.read_value("title", title, str)
    paths = arguments.read_folders("folders", folders)
    return work.report(
        paths, settings.read_out("out", out, "report"), reference=reference, title=title
    )


def export(source: Name, out: Name | None = None, **options: Unpack[ExportOptions]) -> ExportResult:
    """Save the student of a run, or any model, in a new folder, or push it to the hub.

    ``source``: a run folder, or a model as in `run`; `ExportOptions` describes the options.
    """
    choices, rest = settings.take_options(
        options, {"which": "model", "dtype": "auto", "gguf": None}
    )
    values = settings.read_options(rest, settings.export_names())
    config = configuration.build(values, settings.run_flags())
    folder = None
    if out is not None:
        folder = arguments.read_folder("out", out)
    path = arguments.read_path("source", source)
    return work.export(path, config, LogObserver(), out=folder, choices=choices)


def _config(
    config: configuration.Config | None, options: Mapping[str, object]
) -> configuration.Config:
    """Return the checked config with the options over it."""
    checked = arguments.read_config(config)
    values = {}
    if checked is not None:
        values = settings.flatten(checked)
    given = settings.read_options(options, settings.run_names())
    return configuration.build(values | given, settings.run_flags())
