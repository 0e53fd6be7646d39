"""Read and write a run folder: settings, provenance, metrics and atomic checkpoints.

    config.yaml  run.json  metrics.jsonl  scores.jsonl  samples.jsonl  rollouts.jsonl  before.json
    after.json  teacher-text.json  displacement.json  examples-{before,after,teacher}.jsonl
    checkpoints/step-00000025/{student,optimizer}.safetensors state.json (and anchor, teacher where
    a run has them)  model/  best/  .lock

All files are safetensors, JSON, JSON lines or YAML. No file contains the folder's own path, so the
folder can be moved. Files have the permissions of the user's umask.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import Stopped, UserError
from ..files import (
    PARTIAL,
    make_folder,
    read_rows,
    recover_folders,
    remove_folder,
    replace_folder,
    share_equal_files,
    sync,
    write_atomically,
    write_rows,
)
from .checkpoints import (
    DAMAGE,
    FORMAT,
    check_checkpoint_format,
    digest_facts,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
    step_of,
    write_state_dicts,
)

if TYPE_CHECKING:
    import torch
    from filelock import AcquireReturnProxy

    from ..engine.models import Model
    from .checkpoints import Tensors

KEPT = 2  # checkpoints while a run trains: the newest one, and one to fall back on
LOCK = ".lock"
# what a run that was killed while it was created leaves behind, besides PARTIAL files
LEFT_BEHIND = {LOCK, "run.json", "preflight.json"}
SUBFOLDERS = ("", "best", "checkpoints", "plugins", "displacements")  # in which files are written


class RunFolder:
    """Reads and writes one run's files.

    Every write of more than a line is atomic: scratch file, fsync, rename. Disk errors raise
    Stopped and name the newest checkpoint. ``kept``: checkpoints that stay while the run trains.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.kept = KEPT

    @property
    def is_created(self) -> bool:
        """Return whether a run has been created here."""
        return (self.path / "config.yaml").is_file()

    @property
    def newest_checkpoint_text(self) -> str:
        """Name the newest checkpoint, as a clause of a message."""
        checkpoints = list_checkpoints(self.path)
        if not checkpoints:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is {checkpoints[0].name}"

    @property
    def newest_step(self) -> int:
        """Return the number of steps that the newest checkpoint holds; 0 without a checkpoint."""
        for checkpoint in list_checkpoints(self.path):
            return step_of(checkpoint)
        return 0

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and lock it, so that one run at a time works in it.

        The system releases the lock when the process ends. UserError: another process holds the
        lock, or the folder cannot be created.
        """
        try:
            make_folder(self.path)
            lock = self._acquire_lock()
        except Timeout:
            raise UserError(
                f"--out {self.path}: another run is working in it; wait for it, stop it, or "
                "name another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); name another folder"
            ) from None
        with lock:
            yield

    def _acquire_lock(self) -> "AcquireReturnProxy":
        with warnings.catch_warnings():
            # without flock, the lock is a file that names its process; a user need not know
            warnings.filterwarnings("ignore", message="flock not supported")
            # a new lock object, because filelock lets one object acquire its lock twice
            return FileLock(self.path / LOCK, timeout=0).acquire()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn disk errors (full, read-only, gone) into Stopped, which names a checkpoint."""
        try:
            if not self.path.is_dir():
                raise FileNotFoundError(None, "the run folder is gone")
            yield
        except Stopped as error:  # a model that differs when it is read back
            raise Stopped(f"{error}; {self.newest_checkpoint_text}") from None
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            message = (
                f"{self.path / name} cannot be written ({reason}); {self.newest_checkpoint_text}"
            )
            if self.has_checkpoint:
                message += ": fix the cause, then --resume"
            raise Stopped(message) from None

    @property
    def model(self) -> Path:
        """Return the folder of the final model."""
        return self.path / "model"

    @property
    def best(self) -> Path:
        """Return the folder of the best model so far."""
        return self.path / "best"

    def check_unused(self) -> None:
        """Raise UserError unless the folder is missing or empty, and can be written."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"--out {self.path}: it is a file; name a folder")
        if os.path.isdir(self.path):
            for file in self.path.iterdir():
                if file.name not in LEFT_BEHIND and not file.name.endswith(PARTIAL):
                    raise UserError(
                        f"--out {self.path}: the folder is not empty; add --resume to continue it, "
                        "or name another"
                    )
        try:
            with contextlib.suppress(FileNotFoundError):
                self.path.lstat()
            os.rmdir(tempfile.mkdtemp(dir=self._existing_parent()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise UserError(
                f"--out {self.path}: cannot be written ({reason}); name another folder"
            ) from None

    def _existing_parent(self) -> Path:
        """Return the folder itself, or the nearest parent that exists."""
        folder = self.path
        for parent in self.path.absolute().parents:
            if os.path.exists(folder):
                break
            folder = parent
        return folder

    def create(self, config: dict, facts: dict | None = None, checks: dict | None = None) -> None:
        """Create the folder: run.json with ``facts``, preflight.json, then config.yaml.

        config.yaml is last, because a folder that has it is a run that can be resumed. UserError:
        the folder is used or cannot be created.
        """
        self.check_unused()
        make_folder(self.path)
        self.write_json("run.json", {"format": FORMAT, **(facts or {})})
        if checks is None:
            (self.path / "preflight.json").unlink(missing_ok=True)
        else:
            self.write_json("preflight.json", checks)
        self.write_config(config)

    def recover(self) -> None:
        """Repair what a killed process left: a replacement or a deletion that is not finished."""
        with self._writing("a file"):
            for name in SUBFOLDERS:
                recover_folders(self.path / name)

    def prune(self, step: int) -> None:
        """Delete the checkpoints that a kill left besides those of a run restored at ``step``.

        These are checkpoints beyond the newest ``kept``, and damaged ones after ``step``.
        """
        with self._writing("checkpoints"):
            for checkpoint in list_checkpoints(self.path):
                if step_of(checkpoint) > step:
                    remove_folder(checkpoint)
            remove_old_checkpoints(self.path, self.kept)

    def write_config(self, config: dict) -> None:
        """Write config.yaml, without the folder's own path and without --allow-changed.

        That permission holds for one resume.
        """
        import yaml

        sections = {name: dict(section) for name, section in config.items()}
        for key in ("out", "allow_changed"):
            sections.get("checkpoint", {}).pop(key, None)
        with self._writing("config.yaml"):
            write_atomically(
                self.path / "config.yaml",
                yaml.safe_dump(sections, sort_keys=False, allow_unicode=True),
            )

    def write_json(self, name: str, tree: object) -> None:
        """Write ``tree`` as JSON."""
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        with self._writing(name):
            write_atomically(self.path / name, f"{text}\n")

    def finish(self, keep: int) -> None:
        """Free what a finished run does not need.

        Keep the newest ``keep`` checkpoints, and store files of best/ that equal those of model/
        or adapter/ once, as hard links.
        """
        with self._writing("best"):
            remove_old_checkpoints(self.path, keep)
            for name in ("model", "adapter"):
                share_equal_files(self.path / name, self.best)

    def save_model(
        self, name: str, model: "Model", card: str, dtype: "torch.dtype | None" = None
    ) -> list[str]:
        """Write a model folder, or an adapter's (``engine.saving.save_model``); return notes."""
        with self._writing(name):
            from ..engine.saving import save_model

            return save_model(model, self.path / name, card, dtype=dtype)

    def save_merged_model(
        self, name: str, model: "Model", card: str, dtype: "torch.dtype | None" = None
    ) -> list[str]:
        """Write a model folder with the adapter merged into the weights; return notes."""
        with self._writing(name):
            from ..engine.saving import save_merged_model

            return save_merged_model(model, self.path / name, card, dtype=dtype)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write ``content`` to ``name``; make its folder."""
        file = self.path / name
        with self._writing(name):
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, content)

    def read_json(self, name: str):
        """Return the content of the JSON file ``name``. UserError: it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"run folder {self.path}: {name} cannot be read ({type(error).__name__}); start "
                "again with another --out"
            ) from None

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """Write a file of JSON lines."""
        with self._writing(name):
            write_rows(self.path / name, rows)

    def write_tensors(self, name: str, tensors: "Tensors") -> None:
        """Write a safetensors file."""
        from safetensors.torch import save as serialize

        file = self.path / name
        with self._writing(name):
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, serialize({k: t.contiguous() for k, t in tensors.items()}))

    def read_tensors(self, name: str) -> "Iterator[tuple[Path, Tensors]]":
        """Yield path and tensors of each safetensors file in a subfolder, by name."""
        from safetensors.torch import load_file

        for file in sorted((self.path / name).glob("*.safetensors")):
            yield file, load_file(file)

    def remove(self, name: str) -> None:
        """Delete a subfolder."""
        with self._writing(name):
            remove_folder(self.path / name)

    def append(self, name: str, row: dict) -> None:
        """Append one row to a file of JSON lines."""
        with self._writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def check_format(self) -> None:
        """Raise UserError if this version cannot read the folder or its newest checkpoint."""
        document = self.read_json("run.json")
        version = None
        if isinstance(document, dict):
            version = document.get("format", 1)  # the first version did not write it
        if version != FORMAT:
            raise UserError(
                f"run folder {self.path}: format {version!r}, this version reads {FORMAT}; "
                "continue with the version that wrote it (run.json names it), or start again with "
                "another --out"
            )
        for newest in list_checkpoints(self.path)[:1]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                # a damaged checkpoint is skipped later
                state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
                check_checkpoint_format(newest, state)

    def rewind(self, name: str, step: int, warn: Callable[[str], None]) -> list[dict]:
        """Drop incomplete lines, and rows of steps after ``step``, from a file of JSON lines.

        It warns of incomplete lines and returns the rows that are left. UserError: the file cannot
        be read.
        """
        try:
            rows, torn = read_rows(self.path / name)
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: {name} cannot be read ({error.strerror}); remove or "
                "repair it, then --resume"
            ) from None
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        if torn:
            lines = "line"
            if torn > 1:
                lines = "lines"
            warn(f"{name}: removed {torn} incomplete {lines} left by the interruption")
        rows = [row for row in rows if row["step"] <= step]
        self.write_rows(name, rows)
        return rows

    def save_checkpoint(self, step: int, tensors: "dict[str, Tensors]", facts: dict) -> None:
        """Write the checkpoint after ``step`` steps, with checksums, and delete older ones.

        ``tensors``: state dicts by name; ``facts``: plain data. All rows of JSON lines reach the
        disk before the checkpoint does.
        """
        parent = self.path / "checkpoints"
        scratch = parent / ".partial"
        with self._writing(f"checkpoints/step-{step:08d}"):
            for file in self.path.glob("*.jsonl"):
                sync(file)
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                scratch.mkdir(parents=True)
                state = {
                    "format": FORMAT,
                    "step": step,
                    "sha256": write_state_dicts(scratch, tensors),
                    "facts": facts,
                    "facts_sha256": digest_facts(step, facts),
                }
                write_atomically(scratch / "state.json", json.dumps(state))
                replace_folder(scratch, parent / f"step-{step:08d}")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            remove_old_checkpoints(self.path, self.kept)

    def read_latest_checkpoint(
        self, warn: Callable[[str], None]
    ) -> "tuple[int, dict[str, Tensors], dict]":
        """Return (step, tensors, facts) of the newest intact checkpoint; warn of damaged ones.

        UserError: there is none.
        """
        for folder in list_checkpoints(self.path):
            try:
                return read_checkpoint(folder)
            except DAMAGE as error:
                warn(f"checkpoint {folder.name} is damaged ({error}); using the one before it")
        raise UserError(
            f"--resume {self.path}: no intact checkpoint in it; start again with another --out"
        )

    @property
    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, intact or damaged."""
        return bool(list_checkpoints(self.path))
