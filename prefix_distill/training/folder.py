"""The run folder: resolved config, provenance, metric rows, atomic checkpoints. safetensors and
JSON only.

    config.yaml  run.json  metrics.jsonl  scores.jsonl  teacher-text.json  before.json  after.json
    displacement.json checkpoints/step-00000025/{student,optimizer}.safetensors state.json (and
    anchor, teacher where a run has them) model/  best/  examples-before.jsonl  examples-after.jsonl
    .lock

No file holds the folder's own path: it can be moved. Files get the user's umask.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import Stopped, UserError
from ..files import read_rows, replace_folder, sha256_of, sync, write_atomically, write_rows

FORMAT = 1  # of the folder and of its checkpoints; a reader refuses what it does not know
KEPT = 2  # checkpoints on disk: the newest and one to fall back on
LOCK = ".lock"
DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # what reading a damaged checkpoint raises


class RunFolder:
    """Reads and writes one run's files. Every write of more than a line is atomic: scratch file,
    fsync, rename. What the disk refuses is Stopped, with what is safe: nothing half-written takes
    the place of something whole."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def made(self) -> bool:
        """Has a run been created here?"""
        return (self.path / "config.yaml").is_file()

    @property
    def newest(self) -> str:
        """In words: what there is to go back to."""
        kept = self._checkpoints()
        return f"{kept[0].name} is the last good state" if kept else "there is no earlier state"

    @contextlib.contextmanager
    def alone(self):
        """Makes the folder; one process works in it at a time. The system frees the lock when the
        process ends, however it ends. UserError where another one holds it, or the folder cannot be
        made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A new lock object each time, so that a second call in this process fails too.
            held = FileLock(self.path / LOCK, timeout=0).acquire()
        except Timeout:
            raise UserError(
                f"--out {self.path}: another process is working in it; "
                "wait for it, stop it, or name another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); name another folder"
            ) from None
        with held:
            yield

    @contextlib.contextmanager
    def _writing(self, name: str):
        """What the disk refuses (full, read-only, gone) ends the run in one line."""
        try:
            if not self.path.is_dir():
                raise FileNotFoundError(None, "the run folder is gone")
            yield
        except (OSError, SafetensorError) as error:
            raise Stopped(
                f"{self.path / name} cannot be written "
                f"({getattr(error, 'strerror', None) or error}); {self.newest}"
                + (": mend the disk, then --resume" if self.started else "")
            ) from None

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def refuse_if_used(self) -> None:
        """UserError unless the folder is absent or empty, and can be made."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"--out {self.path}: it is a file; name a folder")
        unborn = {
            LOCK,
            "run.json",
            ".run.json.partial",
            ".config.yaml.partial",
        }  # what a run killed while it was created leaves
        if os.path.isdir(self.path) and any(
            file.name not in unborn for file in self.path.iterdir()
        ):
            raise UserError(
                f"--out {self.path}: the folder is not empty; add --resume to continue it, or name "
                "another"
            )
        try:
            with contextlib.suppress(FileNotFoundError):
                self.path.lstat()
            os.rmdir(
                tempfile.mkdtemp(
                    dir=next(
                        p for p in (self.path, *self.path.absolute().parents) if os.path.exists(p)
                    )
                )
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", error)
            raise UserError(
                f"--out {self.path}: cannot be written ({why}); name another folder"
            ) from None

    def create(self, config: dict, facts: dict | None = None) -> None:
        """Makes the folder: run.json with ``facts``, then config.yaml. UserError when it is used
        or cannot be made."""
        self.refuse_if_used()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("run.json", {"format": FORMAT, **(facts or {})})
        self.write_config(config)

    def write_config(self, config: dict) -> None:
        """config.yaml, but for where the folder is."""
        import yaml

        config = {
            section: {k: v for k, v in keys.items() if (section, k) != ("checkpoint", "out")}
            for section, keys in config.items()
        }
        with self._writing("config.yaml"):
            write_atomically(
                self.path / "config.yaml",
                yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            )

    def write_json(self, name: str, tree) -> None:
        """``name`` ← ``tree`` as JSON."""
        with self._writing(name):
            write_atomically(
                self.path / name, json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
            )

    def save_model(self, name: str, model, card: str | None = None, merged: bool = False) -> None:
        """The folder ``name`` ← a model that transformers loads, with its ``card`` (of one with an
        adapter: the adapter, or both ``merged``)."""
        with self._writing(name):
            from ..engine.saving import save_model

            save_model(model, self.path / name, card, merged)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write ``content`` to ``name``; make its folder."""
        file = self.path / name
        with self._writing(name):
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, content)

    def read_json(self, name: str):
        """The JSON file ``name``; UserError when it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"run folder {self.path}: {name} cannot be read ({type(error).__name__}); start "
                "anew with another --out"
            ) from None

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """``name`` ← one JSON line per row."""
        with self._writing(name):
            write_rows(self.path / name, rows)

    def write_tensors(self, name: str, tensors: dict) -> None:
        """``name`` ← tensors, as safetensors."""
        from safetensors.torch import save as serialised

        file = self.path / name
        with self._writing(name):
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, serialised({k: v.contiguous() for k, v in tensors.items()}))

    def read_tensors(self, name: str):
        """(file, tensors) of every file of tensors in the folder ``name``, by name, one at a
        time."""
        from safetensors.torch import load_file

        for file in sorted((self.path / name).glob("*.safetensors")):
            yield file, load_file(file)

    def remove(self, name: str) -> None:
        """Deletes the folder ``name``."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def append(self, name: str, row: dict) -> None:
        """One more row of the JSON lines ``name``."""
        with self._writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def check_format(self) -> None:
        """UserError where the folder or its newest checkpoint was written in a format that this
        version does not know."""
        document = self.read_json("run.json")
        found = (
            document.get("format", 1) if isinstance(document, dict) else None
        )  # the first format did not say so
        if found != FORMAT:
            raise UserError(
                f"run folder {self.path}: format {found!r}, this version reads {FORMAT}; go on "
                "with the version that wrote it (run.json names it), or start anew with another "
                "--out"
            )
        for newest in self._checkpoints()[:1]:
            with contextlib.suppress(
                OSError, ValueError, KeyError, TypeError
            ):  # a damaged one is passed over later
                _check_known(
                    newest, json.loads((newest / "state.json").read_text(encoding="utf-8"))
                )

    def rewind(self, name: str, step: int, warn, whole: bool = False) -> None:
        """Drops what was appended to ``name`` beyond ``step`` completed updates, and torn lines;
        ``warn`` is told of these, and, of a file that should hold the ``whole`` run, of rows that
        are missing."""
        rows, torn = read_rows(self.path / name)
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        if torn:
            warn(
                f"{name}: {torn} line{'s' * (torn > 1)} cut short by the interruption "
                f"{'are' if torn > 1 else 'is'} dropped"
            )
        if whole and (missing := set(range(1, step + 1)) - {row["step"] for row in rows}):
            warn(
                f"{name}: the rows of {len(missing)} earlier updates are missing (the first: "
                f"{min(missing)}); the run itself does not need them"
            )
        self.write_rows(name, [row for row in rows if row["step"] <= step])

    def save(self, step: int, tensors: dict[str, dict], facts: dict) -> None:
        """Checkpoint after ``step`` updates: named state dicts of tensors, plus plain facts, with
        checksums. The rows up to it reach the disk before it does."""
        from safetensors.torch import save_file

        parent = self.path / "checkpoints"
        scratch = parent / ".partial"
        with self._writing(f"checkpoints/step-{step:08d}"):
            for rows in self.path.glob("*.jsonl"):
                sync(rows)
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                scratch.mkdir(parents=True)
                sums = {}
                for name, state in tensors.items():
                    file = scratch / f"{name}.safetensors"
                    save_file({k: v.detach().contiguous() for k, v in state.items()}, file)
                    sums[file.name] = sha256_of(file)
                write_atomically(
                    scratch / "state.json",
                    json.dumps(
                        {
                            "format": FORMAT,
                            "step": step,
                            "sha256": sums,
                            "facts": facts,
                            "facts_sha256": _digest_of(step, facts),
                        }
                    ),
                )
                replace_folder(scratch, parent / f"step-{step:08d}")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            for old in self._checkpoints()[KEPT:]:
                shutil.rmtree(old)

    def latest(self, warn) -> tuple[int, dict[str, dict], dict]:
        """(step, tensors, facts) of the newest intact checkpoint; a damaged one is named through
        ``warn`` and passed over. UserError when there is none."""
        for folder in self._checkpoints():
            try:
                return _intact(folder)
            except DAMAGE as error:
                warn(
                    f"checkpoint {folder.name} is damaged ({error}); falling back on the one "
                    "before it"
                )
        raise UserError(
            f"--resume {self.path}: no intact checkpoint in it; start anew with another --out"
        )

    def student(self, step: int) -> dict:
        """The student's weights in the checkpoint after ``step`` updates. UserError when it is
        damaged."""
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        try:
            return _intact(folder)[1]["student"]
        except DAMAGE as error:
            raise UserError(
                f"checkpoint {folder}: it is damaged ({error}); choose another"
            ) from None

    @property
    def started(self) -> bool:
        """Is there a checkpoint, damaged or not?"""
        return bool(self._checkpoints())

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"), reverse=True)


def _check_known(folder: Path, state: dict) -> None:
    if state["format"] != FORMAT:
        raise UserError(
            f"checkpoint {folder}: format {state['format']}, this version reads {FORMAT}; resume "
            "with the version that wrote it"
        )


def _intact(folder: Path) -> tuple[int, dict[str, dict], dict]:
    """(step, tensors, facts) of a checkpoint; one of DAMAGE where it is not what was written."""
    from safetensors.torch import load_file

    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _check_known(folder, state)
    for name, digest in state["sha256"].items():
        if sha256_of(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    if not isinstance(state["facts"], dict) or state["facts_sha256"] != _digest_of(
        state["step"], state["facts"]
    ):
        raise ValueError("state.json does not match its checksum")
    tensors = {Path(name).stem: load_file(folder / name) for name in state["sha256"]}
    return state["step"], tensors, state["facts"]


def _digest_of(step: int, facts: dict) -> str:
    return hashlib.sha256(json.dumps([step, facts]).encode()).hexdigest()
