"""Settings of a run that is resumed."""

import os

from .. import config as configuration
from ..errors import UserError


def resume_settings(values: dict) -> tuple[dict, list[str]]:
    """The settings of the run in --out. What is given now may lengthen it, save at other times,
    spread its work otherwise, or mend what stopped it (rate, precision, device), which is said."""
    from pathlib import Path

    out = values.get("checkpoint.out")
    if out is None:
        raise UserError("--resume: name the run folder with --out")
    saved_file = Path(str(out)) / "config.yaml"
    if not saved_file.is_file():
        raise UserError(
            f"--resume {out}: no config.yaml in it; name the folder of a run, or drop --resume"
        )
    from .folder import RunFolder

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
            f"--resume {out}: its config.yaml is damaged (no train.steps or schedule.lr_schedule); "
            "start anew with another --out"
        )
    notes: list[str] = []
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
            notes.append(
                f"{path} was {saved.get(path)!r} and is {value!r} from here on: the rest differs "
                "from a run that had it from the start"
            )
        elif path not in free and value != saved.get(path):
            raise UserError(
                f"--resume {out}: {path} was {saved.get(path)!r}, got {value!r}; leave it out, or "
                "start anew with another --out"
            )
    steps, schedule = values.get("train.steps", saved["train.steps"]), saved["schedule.lr_schedule"]
    if steps != saved["train.steps"] and schedule != "constant":
        notes.append(
            f"{saved['train.steps']} updates become {steps}: the {schedule} learning rate is "
            "stretched over all of them, so the rest differs from a run planned this long"
        )
    return saved | values, notes
