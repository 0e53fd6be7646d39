"""Test the free memory of machines, control groups (versions 1 and 2) and limited processes."""

import os
import subprocess
import sys

import pytest
import torch

from prefix_distill.engine import free_memory
from prefix_distill.engine.device import is_out_of_memory
from prefix_distill.engine.free_memory import read_available, read_cgroup_free, read_process_free

GIB = 1 << 30
V2_MOUNT = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "40 24 0:36 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_CPU_MOUNT = "41 24 0:37 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
NO_LIMIT_OF_V1 = 9223372036854771712


def write(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def group_v2(path, limit, current, *, high="max", cache=0):
    base = f"sys/fs/cgroup{path}"
    return {
        f"{base}/memory.max": limit,
        f"{base}/memory.high": high,
        f"{base}/memory.current": current,
        f"{base}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 77",
    }


def group_v1(path, limit, usage, cache=0):
    base = f"sys/fs/cgroup/memory{path}"
    return {
        f"{base}/memory.limit_in_bytes": limit,
        f"{base}/memory.usage_in_bytes": usage,
        f"{base}/memory.stat": f"inactive_file 3\ntotal_inactive_file {cache}",
    }


def machine_v2(root, group, mount_root="/"):
    write(root, {"proc/self/cgroup": f"0::{group}"})
    write(root, {"proc/self/mountinfo": V2_MOUNT.format(root=mount_root)})


def machine_v1(root, group, mount_root="/"):
    lines = f"12:cpu,cpuacct:/other\n4:memory:{group}\n1:name=systemd:/x\n0::/"
    write(root, {"proc/self/cgroup": lines})
    mounts = f"{V1_CPU_MOUNT}\n{V1_MOUNT.format(root=mount_root)}"
    write(root, {"proc/self/mountinfo": mounts})


def test_the_machine_reports_what_is_available(tmp_path):
    assert read_available(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemFree:  1 kB\nMemAvailable:   2048 kB\nHugePages: 0"})
    assert read_available(tmp_path) == 2 << 20


def test_a_group_of_version_2_leaves_its_limit_less_its_use(tmp_path):
    machine_v2(tmp_path, "/job")
    write(tmp_path, group_v2("/job", 4 * GIB, 3 * GIB, cache=GIB // 2))
    assert read_cgroup_free(tmp_path) == 3 * GIB // 2


def test_a_group_that_is_throttled_has_that_limit(tmp_path):
    machine_v2(tmp_path, "/job")
    write(tmp_path, group_v2("/job", 4 * GIB, GIB, high=2 * GIB))
    assert read_cgroup_free(tmp_path) == GIB


@pytest.mark.parametrize("tightest", ["/slurm", "/slurm/job_7", "/slurm/job_7/step_0"])
def test_the_tightest_of_nested_groups_counts(tmp_path, tightest):
    """Siblings of one group share its limit, so an outer group may leave less."""
    machine_v2(tmp_path, "/slurm/job_7/step_0")
    for path in ("/slurm", "/slurm/job_7", "/slurm/job_7/step_0"):
        left = 5 * GIB
        if path == tightest:
            left = GIB
        write(tmp_path, group_v2(path, 9 * GIB, 9 * GIB - left))
    assert read_cgroup_free(tmp_path) == GIB


def test_groups_without_a_limit_leave_all(tmp_path):
    assert read_cgroup_free(tmp_path) is None
    machine_v2(tmp_path, "/user.slice")
    write(tmp_path, group_v2("/user.slice", "max", GIB))
    assert read_cgroup_free(tmp_path) is None


@pytest.mark.parametrize("outer, left", [(NO_LIMIT_OF_V1, 2 * GIB), (3 * GIB, GIB)])
def test_groups_of_version_1(tmp_path, outer, left):
    machine_v1(tmp_path, "/slurm/job_7")
    write(tmp_path, group_v1("/slurm/job_7", 4 * GIB, 3 * GIB, cache=GIB))
    write(tmp_path, group_v1("/slurm", outer, 2 * GIB))
    assert read_cgroup_free(tmp_path) == left


@pytest.mark.parametrize(
    "group, mount_root",
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the mount shows the container's group
        ("/../../job", "/"),  # a group outside the namespace
        ("/docker/abc", "/kubepods/xyz"),
    ],
)
@pytest.mark.parametrize("machine, group_of", [(machine_v1, group_v1), (machine_v2, group_v2)])
def test_a_container_sees_its_own_group_at_the_mount(
    tmp_path, machine, group_of, group, mount_root
):
    machine(tmp_path, group, mount_root)
    write(tmp_path, group_of("", 4 * GIB, GIB))
    assert read_cgroup_free(tmp_path) == 3 * GIB


def test_the_least_of_all_limits_is_free(monkeypatch):
    limits = {"read_available": 3 * GIB, "read_cgroup_free": 2 * GIB, "read_process_free": None}
    for name, free in limits.items():
        monkeypatch.setattr(free_memory, name, lambda free=free: free)
    assert free_memory.read_free_memory(torch.device("cpu")) == 2 * GIB
    monkeypatch.setattr(free_memory, "read_process_free", lambda: -5)
    assert free_memory.read_free_memory(torch.device("cpu")) == 0
    for name in limits:
        monkeypatch.setattr(free_memory, name, lambda: None)
    assert free_memory.read_free_memory(torch.device("cpu")) is None


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such limits")
@pytest.mark.parametrize("limit, row", [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_limit_of_the_process_counts_less_its_use(tmp_path, limit, row):
    write(tmp_path, {"proc/self/status": f"Name:\tpython\n{row}:\t 1048576 kB"})
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from prefix_distill.engine.free_memory import read_free_memory, read_process_free\n"
        f"resource.setrlimit(resource.{limit}, (8 << 30, -1))\n"
        "print(read_process_free(Path(sys.argv[1])), read_free_memory(torch.device('cpu')))\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    left, free = map(int, done.stdout.split())
    assert left == 7 * GIB and free < 8 * GIB


def test_a_process_without_limits_may_use_all(tmp_path):
    assert read_process_free(tmp_path) is None


@pytest.mark.parametrize("text", ["can't allocate memory", "not enough memory", "MPS backend out"])
def test_allocators_of_all_systems_are_known(text):
    error = RuntimeError(f"DefaultCPUAllocator: {text} of memory: you tried to allocate 9 bytes.")
    assert is_out_of_memory(error)
