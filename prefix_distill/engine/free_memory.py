"""Read how many bytes can still be allocated: of a device, the machine, a container, a process."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

ROOT = Path("/")
# share of an Apple GPU's memory that its allocator may keep unused before it is released
MOST_CACHED = 0.125
# version of cgroups → files with a limit, file with the use, and the row of memory.stat with the
# page cache that the system takes back first
CGROUP_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}
# limits of a process (`ulimit -v`, `ulimit -d`) → row of /proc/self/status with the use
PROCESS_LIMITS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}


def read_free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on ``device``; None where unknown.

    In main memory it is the least of what the machine, each control group (a container, a batch
    job) and the limits of the process leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [
        free
        for free in (read_available(), read_cgroup_free(), read_process_free())
        if free is not None
    ]
    if not known:
        return None
    return max(0, min(known))


def release_cache(device: torch.device) -> None:
    """Return unused memory to an Apple GPU's system if torch keeps much of it.

    Its allocator keeps buffers by size. Batches of ever new lengths, and a growing KV cache, fill
    the memory with buffers that no later tensor fits. Every forward pass and every stretch of
    decoding begins with this call, so at most MOST_CACHED of the memory and the buffers of one such
    piece of work are kept.
    """
    if device.type != "mps":
        return
    cached = torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory()
    if cached > MOST_CACHED * torch.mps.recommended_max_memory():
        torch.mps.empty_cache()


def read_available(root: Path = ROOT) -> int | None:
    """Return the bytes that the machine can still give; None: not Linux."""
    return _read_table(root / "proc/meminfo").get("MemAvailable")


def read_process_free(root: Path = ROOT) -> int | None:
    """Return the least that the limits of this process leave; None: no limit.

    Where the use is not known, a limit counts as a whole.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = _read_table(root / "proc/self/status")
    free = []
    for name, row in PROCESS_LIMITS.items():
        number = getattr(resource, name, None)  # not every system has RLIMIT_AS
        if number is None:
            continue
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - used.get(row, 0))
    return min(free, default=None)


def read_cgroup_free(root: Path = ROOT) -> int | None:
    """Return the least that this process's control groups leave; None: no limit.

    A group is limited by every group around it as well. Page cache counts as free.
    """
    free = []
    for version, folder in _find_cgroups(root):
        limits, use, cache = CGROUP_FILES[version]
        used = _read_bytes(folder / use)
        if used is None:  # the root group has no such file
            continue
        used -= min(used, _read_table(folder / "memory.stat").get(cache, 0))
        for name in limits:
            limit = _read_bytes(folder / name)
            if limit is not None:
                free.append(limit - used)
    return min(free, default=None)


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted hierarchy of control groups. ``root``: the group that ``point`` shows."""

    version: int
    root: PurePosixPath
    point: PurePosixPath


def _find_cgroups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of each memory group of this process, with the groups around it."""
    groups = _read_groups(root)
    for mount in _read_mounts(root):
        if mount.version not in groups:
            continue
        group = groups[mount.version]
        below = PurePosixPath()
        # Without a namespace of its own, a container sees a path that it cannot reach.
        if group.is_relative_to(mount.root) and ".." not in group.parts:
            below = group.relative_to(mount.root)
        top = root / str(mount.point).lstrip("/")
        for inner in (below, *below.parents):
            yield mount.version, top / inner


def _read_groups(root: Path) -> dict[int, PurePosixPath]:
    """Return version → path of the memory group of this process."""
    groups = {}
    for line in _read_lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            groups[1] = PurePosixPath(path)
        elif number == "0":
            groups[2] = PurePosixPath(path)
    return groups


def _read_mounts(root: Path) -> Iterator[Mount]:
    """Yield the mounted hierarchies that can limit memory."""
    for line in _read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields = before.split()
        kind, _, options = after.split(maxsplit=2)
        version = 2
        if kind == "cgroup" and "memory" in options.split(","):
            version = 1
        elif kind != "cgroup2":
            continue
        yield Mount(version=version, root=PurePosixPath(fields[3]), point=PurePosixPath(fields[4]))


def _read_lines(file: Path) -> list[str]:
    """Return the lines of a file; [] if it is missing or not readable."""
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _read_bytes(file: Path) -> int | None:
    """Return the number in a file; None if it is missing or says "max"."""
    lines = _read_lines(file)
    if not lines or not lines[0].strip().isdecimal():
        return None
    return int(lines[0])


def _read_table(file: Path) -> dict[str, int]:
    """Return name → bytes of a file of rows such as ``MemAvailable:  12 kB`` or ``anon 4096``."""
    table = {}
    for line in _read_lines(file):
        name, *values = line.replace(":", " ").split()
        if values and values[0].isdecimal():
            factor = 1
            if values[-1] == "kB":
                factor = 1024
            table[name] = int(values[0]) * factor
    return table
