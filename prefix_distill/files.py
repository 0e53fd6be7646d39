"""Write files atomically, swap folders, read JSON lines, compute checksums, tell files' kinds."""

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import stat
import threading
from pathlib import Path

# suffixes of hidden names: unfinished writes, folders that are being replaced or deleted
PARTIAL, OLD, DELETED = ".partial", ".old", ".deleted"
HIDDEN = (PARTIAL, OLD, DELETED)


_written = threading.Event()


def has_written() -> bool:
    """Return whether this process has begun to write files that stay."""
    return _written.is_set()


def make_folder(folder: Path) -> None:
    """Create a folder for files that stay, with its parents, unless it exists."""
    _written.set()
    folder.mkdir(parents=True, exist_ok=True)


def forget_writing() -> None:
    """Count only what is written from now on, for another command in the same process."""
    _written.clear()


def replace_folder(scratch: Path, folder: Path) -> None:
    """Move ``scratch`` to ``folder``, replacing what is there.

    A reader never sees a partly written folder. A process that is killed between the two renames
    leaves the old folder under a hidden name; ``recover_folders`` puts it back.
    """
    _written.set()
    umask = os.umask(0)
    os.umask(umask)
    for path in scratch.rglob("*"):
        if path.is_dir():
            _sync_names(path)
            continue
        os.chmod(path, 0o666 & ~umask)  # safetensors lets only the owner read its files
        sync(path)
    old = _hide(folder, OLD)
    if folder.exists():
        os.rename(folder, old)
    os.rename(scratch, folder)
    _sync_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def share_equal_files(source: Path, target: Path) -> None:
    """Replace the files in ``target`` that equal those in ``source`` by hard links to them.

    A file is replaced atomically. Where the file system has no hard links, both files stay.
    """
    for file in list(target.glob("*")):
        original = source / file.name
        if not file.is_file() or not original.is_file() or original.samefile(file):
            continue
        if not filecmp.cmp(original, file, shallow=False):
            continue
        link = file.with_name(f".{file.name}{PARTIAL}")
        link.unlink(missing_ok=True)
        try:
            os.link(original, link)
        except OSError:
            return
        os.replace(link, file)


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` if it exists; it is never seen partly deleted."""
    if folder.exists():
        deleted = _hide(folder, DELETED)
        os.rename(folder, deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _hide(folder: Path, suffix: str) -> Path:
    """Return a hidden name for ``folder``, and free that name if the folder will take it."""
    hidden = folder.with_name(f".{folder.name}{suffix}")
    if folder.exists():
        shutil.rmtree(hidden, ignore_errors=True)
    return hidden


def recover_folders(parent: Path) -> None:
    """Repair what killed processes left in ``parent``.

    A folder whose replacement was not finished gets its name back. Everything else under a hidden
    name is deleted: scratch files and folders, replaced folders, and folders that were being
    deleted.
    """
    for path in list(parent.glob(".*")):
        folder = path.with_name(path.name[1:].removesuffix(OLD))
        if path.name.endswith(OLD) and not folder.exists():
            os.rename(path, folder)
        elif path.name.endswith(HIDDEN):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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
    _written.set()
    if isinstance(content, str):
        content = content.encode()
    scratch = file.with_name(f".{file.name}{PARTIAL}")
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
