"""Write files atomically, swap folders, read JSON lines, compute checksums, tell files' kinds."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path


def replace_folder(scratch: Path, folder: Path) -> None:
    """Move ``scratch`` to ``folder``, replacing what is there.

    A reader sees the old folder or the new one, never a partly written one.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in scratch.iterdir():
        os.chmod(file, 0o666 & ~umask)  # safetensors lets only the owner read its files
        sync(file)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(scratch, folder)
    _sync_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_names(folder: Path) -> None:
    """Write the names of a folder's files to the disk, on systems that can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def sync(file: Path) -> None:
    """Write the content of ``file`` from the system's buffers to the disk."""
    mode = "rb"
    if os.name != "posix":
        mode = "rb+"  # Windows only syncs a file that is open for writing
    with open(file, mode) as handle:
        os.fsync(handle.fileno())


def read_rows(file: Path) -> tuple[list[dict], int]:
    """Return (rows, number of damaged lines) of a file of JSON lines; ([], 0) if it is missing.

    A process that is killed while it writes leaves a damaged last line. Values other than objects
    are dropped.
    """
    if not file.exists():
        return [], 0
    rows = []
    damaged = 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                damaged += 1
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows, damaged


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write one JSON line per row to ``file``, atomically."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(file, "".join(lines))


def sha256_of(file: Path) -> str:
    """Return the SHA-256 checksum of a file as hexadecimal digits."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``file``: a scratch file, fsync, rename.

    On an OSError the old content stays and no scratch file is left.
    """
    if isinstance(content, str):
        content = content.encode()
    scratch = file.with_name(f".{file.name}.partial")
    try:
        with open(scratch, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, file)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(file: Path) -> bool:
    """Return whether git stored a pointer in place of the file's content."""
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as handle:
            return handle.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def describe_lfs_pointer(file: Path) -> str:
    """Return what is wrong with a git-lfs pointer, and what to do."""
    return f"{file} is a git-lfs pointer in place of the file; run `git lfs pull` in {file.parent}"


def describe_special(file: Path) -> str | None:
    """Return the kind of a file that may block its reader or never end; None: another kind."""
    kinds = {
        "a FIFO": stat.S_ISFIFO,
        "a device": stat.S_ISCHR,
        "a block device": stat.S_ISBLK,
        "a socket": stat.S_ISSOCK,
    }
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        return None
    for kind, is_kind in kinds.items():
        if is_kind(mode):
            return kind
    return None
