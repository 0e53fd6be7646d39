"""Write and read the files of one checkpoint, with checksums."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import remove_folder, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

FORMAT = 1  # of the run folder and of its checkpoints; other formats are rejected
# what reading a damaged checkpoint raises
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run folder, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete the checkpoints of a run folder, except the newest ``keep``."""
    for old in list_checkpoints(run)[keep:]:
        remove_folder(old)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint holds, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def check_checkpoint_format(folder: Path, state: dict) -> None:
    """Raise UserError if this version cannot read the checkpoint with this state.json."""
    if state["format"] != FORMAT:
        raise UserError(
            f"checkpoint {folder}: format {state['format']}, this version reads {FORMAT}; resume "
            "with the version that wrote it"
        )


def write_state_dicts(folder: Path, state_dicts: "dict[str, Tensors]") -> dict[str, str]:
    """Write each state dict to a safetensors file; return the checksums by file name."""
    from safetensors.torch import save_file

    checksums = {}
    for name, tensors in state_dicts.items():
        file = folder / f"{name}.safetensors"
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, file)
        checksums[file.name] = sha256_of(file)
    return checksums


def read_checkpoint(folder: Path) -> "tuple[int, dict[str, Tensors], dict]":
    """Return (step, tensors, facts) of a checkpoint. One of DAMAGE: a checksum does not match."""
    from safetensors.torch import load_file

    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    check_checkpoint_format(folder, state)
    for name, digest in state["sha256"].items():
        if sha256_of(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    digest = digest_facts(state["step"], state["facts"])
    if not isinstance(state["facts"], dict) or state["facts_sha256"] != digest:
        raise ValueError("state.json does not match its checksum")
    tensors = {Path(name).stem: load_file(folder / name) for name in state["sha256"]}
    return state["step"], tensors, state["facts"]


def read_student(run: Path, step: int) -> "Tensors":
    """Return the student's weights after ``step`` steps. UserError: they are damaged."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    try:
        return read_checkpoint(folder)[1]["student"]
    except DAMAGE as error:
        raise UserError(f"checkpoint {folder}: it is damaged ({error}); choose another") from None


def digest_facts(step: int, facts: dict) -> str:
    """Return the checksum of the plain data of a checkpoint."""
    return hashlib.sha256(json.dumps([step, facts]).encode()).hexdigest()
