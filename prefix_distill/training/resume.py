"""Resolve the settings of a resumed run."""

import os
from pathlib import Path

from .. import config as configuration
from ..errors import UserError

# options that a resumed run may change: length, saving, parallelism, the path of a plugin (whose
# content is compared by hash)
FREE = (
    "train.steps",
    "train.stop_when",
    "train.max_hours",
    "checkpoint.save_every",
    "checkpoint.keep",
    "evaluate.teacher",
    "checkpoint.dtype",
    "checkpoint.save_minutes",
    "checkpoint.out",
    "checkpoint.allow_changed",
    "runtime.gpus",
    "runtime.plugin",
    "runtime.rank_timeout",
    "runtime.check_ranks_every",
    "train.micro_batch_size",
    "rollout.rows",
)
# options that can fix a stopped run; they change its result, so each change is reported
REMEDIES = (
    "schedule.lr",
    "train.grad_clip",
    "runtime.dtype",
    "runtime.head_dtype",
    "runtime.head_memory_mb",
    "runtime.device",
    "runtime.teacher_device",
    "evaluate.grader",
    "evaluate.grader_timeout",
    "train.gradient_checkpointing",
)


def resume_settings(values: dict) -> tuple[dict, list[str]]:
    """Return the settings of the run in --out, and notes.

    A resumed run may change length, saving and parallelism. It may also change learning rate, dtype
    or device, which the notes report. UserError: the folder holds no run, or another setting
    changes.
    """
    out = values.get("checkpoint.out")
    if out is None or not str(out).strip():
        raise UserError("--resume: name the run folder with --out")
    plugin = {"runtime.plugin": values["runtime.plugin"]} if "runtime.plugin" in values else {}
    saved = _read_saved_settings(str(out), plugin)
    if "runtime.gpus" not in values and os.environ.get("LOCAL_WORLD_SIZE") not in (
        None,
        str(saved.get("runtime.gpus")),
    ):
        saved["runtime.gpus"] = None  # another launcher has set the number
    if not {"train.steps", "schedule.lr_schedule"} <= saved.keys():
        raise UserError(
            f"--resume {out}: its config.yaml is damaged (no train.steps or schedule.lr_schedule); "
            "start again with another --out"
        )
    values = _without_auto(values)
    notes = _check_changes(str(out), saved, values)
    if "train.steps" in values:
        saved["train.epochs"] = None  # the run's length no longer follows from its epochs
    steps = values.get("train.steps", saved["train.steps"])
    _check_steps(str(out), steps)
    schedule = saved["schedule.lr_schedule"]
    if steps != saved["train.steps"] and schedule != "constant":
        notes.append(
            f"the run now has {steps} steps instead of {saved['train.steps']}; the {schedule} "
            f"learning rate schedule now spans {steps} steps, so the result will differ from a run "
            f"of {steps} steps from the start"
        )
    return saved | values, notes


def _without_auto(values: dict) -> dict:
    """Return the settings without those that are ``auto``: the run has chosen their values."""
    known = configuration.options()
    kept = {}
    for path, value in values.items():
        if (
            path in known
            and value == configuration.AUTO
            and configuration.is_automatic(known[path])
        ):
            continue
        kept[path] = value
    return kept


def _read_saved_settings(out: str, plugin: dict) -> dict:
    """Read the folder's config.yaml, with the new path of a ``plugin`` that has moved.

    UserError: it is missing or damaged.
    """
    from .folder import RunFolder

    saved_file = Path(out) / "config.yaml"
    if not saved_file.is_file():
        raise UserError(
            f"--resume {out}: it has no config.yaml; name the folder of a run, or omit --resume"
        )
    RunFolder(saved_file.parent).check_format()
    saved = configuration.read_yaml(str(saved_file))
    saved |= plugin
    configuration.build(saved)
    return saved


def _check_steps(out: str, steps: object) -> None:
    """Raise UserError if the run has done more than ``steps`` steps."""
    from .folder import RunFolder

    done = RunFolder(out).newest_step
    # a value of another type is refused when the config is built
    if isinstance(steps, int) and steps < done:
        raise UserError(
            f"--resume {out}: {done} steps are done; --steps must be at least {done}, got {steps}"
        )


def _check_changes(out: str, saved: dict, values: dict) -> list[str]:
    """Return a note on each changed remedy; raise UserError for a change that is not allowed."""
    notes = []
    free = {*FREE, *configuration.options("trackers", "export")}
    for path, value in values.items():
        if path not in configuration.options():
            configuration.build({path: value})  # raises, with the nearest known key
        before = saved.get(path)
        if path in free or value == before:
            continue
        flag = configuration.flag(path)
        if path not in REMEDIES:
            raise UserError(
                f"--resume {out}: {flag} was {before}, got {value}; omit {flag}, or start again "
                "with another --out"
            )
        notes.append(
            f"{flag} changes from {before} to {value}; the result will differ from a run that used "
            f"{value} throughout"
        )
    return notes
