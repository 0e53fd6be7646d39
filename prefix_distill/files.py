"""Files: atomic writes, folder swaps, JSON lines, checksums."""

import contextlib
import hashlib
import json
import os
from pathlib import Path


def replace_folder(scratch: Path, folder: Path) -> None:
    """Puts ``scratch`` in ``folder``'s place; a reader sees the old folder or the new one, never
    a half-written one."""
    import shutil

    umask = os.umask(0)
    os.umask(umask)
    for file in scratch.iterdir():
        os.chmod(file, 0o666 & ~umask)  # safetensors makes its files for the owner alone
        sync(file)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(scratch, folder)
    with contextlib.suppress(
        OSError
    ):  # where a folder can be synced, its new names reach the disk, too
        handle = os.open(folder.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def sync(file: Path) -> None:
    """What has been written to ``file`` reaches the disk."""
    with open(
        file, "rb" if os.name == "posix" else "rb+"
    ) as handle:  # Windows syncs only what may be written
        os.fsync(handle.fileno())


def read_rows(file: Path) -> tuple[list[dict], int]:
    """(the rows of a file of JSON lines, how many lines are torn); ([], 0) when it is missing."""
    rows, torn = [], 0
    for line in (
        file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    ):
        try:
            rows.append(json.loads(line))
        except ValueError:
            torn += 1
    return [row for row in rows if isinstance(row, dict)], torn


def write_rows(file: Path, rows: list[dict]) -> None:
    """``file`` ← one JSON line per row, atomically."""
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256_of(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(file: Path, content: str | bytes) -> None:
    scratch = file.with_name(f".{file.name}.partial")
    try:
        with open(scratch, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, file)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
