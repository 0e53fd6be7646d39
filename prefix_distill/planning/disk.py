"""The disk space of a run folder, from the numbers of parameters."""

import shutil
from pathlib import Path

from ..config import Config
from ..training.folder import KEPT

CHECKPOINT_BYTES = 12  # per trained parameter, in float32: the weight and AdamW's two moments


def estimate_disk(config: Config, parameters: int, trained: int, base_bytes: int) -> dict[str, int]:
    """Return the bytes of a run folder: ``training``, the most at any time, and ``finished``.

    ``parameters``: of the student; ``trained``: of them or of the adapter, those that train;
    ``base_bytes``: per parameter of the base model, as --lora-merge saves it. Metrics, samples,
    the tokenizer, and copies for --teacher-ema and --extrapolate are not counted.
    """
    itemsize = 4
    if config.checkpoint.dtype == "bfloat16":
        itemsize = base_bytes = 2
    elif config.checkpoint.dtype == "float32":
        base_bytes = 4
    model = trained * itemsize
    if not config.adapter.rank:
        model = parameters * itemsize
    best = 0
    if config.evaluate.every or config.evaluate.tail_every:
        best = model
    if config.adapter.rank and config.adapter.merge:
        model = parameters * base_bytes + trained * 4
    checkpoint = CHECKPOINT_BYTES * trained
    kept = max(KEPT, config.checkpoint.keep)
    # A new checkpoint is complete before the oldest is deleted; model/ comes after the last one.
    training = best + kept * checkpoint + max(checkpoint, model)
    finished = best + config.checkpoint.keep * checkpoint + model
    return {"training": training, "finished": finished}


def describe_disk(disk: dict[str, int]) -> str:
    """Return the result of ``estimate_disk`` as a note."""
    return f"run folder: {describe_sizes(disk)}"


def describe_sizes(disk: dict[str, int]) -> str:
    """Return the most bytes of a run folder, and those after the end, as text."""
    return (
        f"up to {_format_size(disk['training'])} on disk while it trains, "
        f"{_format_size(disk['finished'])} after the end"
    )


def describe_shortage(disk: dict[str, int], out: str | None) -> str | None:
    """Return a warning if the file system of the run folder has less free, else None."""
    folder = Path(out or ".").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if disk["training"] <= free:
        return None
    return (
        f"--out {out or '.'}: the run folder takes up to {_format_size(disk['training'])}, "
        f"{_format_size(free)} are free there; free some space or name another folder"
    )


def _format_size(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e9:.3g} GB"
