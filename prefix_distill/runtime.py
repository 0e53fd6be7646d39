"""Where we run: device, dtype, ranks, seeds, clocks, and the reason of each automatic choice.

Every sum, gather and decision that involves ranks goes through this file, also when there is only one.
"""

import contextlib
import hashlib
import os
import platform
import re
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .errors import UserError

SMALL_MODEL = 50e6  # parameters; below it bfloat16 autocast costs more on a CPU than its matmuls save


def seed_of(*parts) -> int:
    """A 63-bit seed that depends on every part: ``seed_of(seed, step, prompt, sample)``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Clock:
    """Seconds per phase, summed; phases are an open list of names."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str):
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def now(self) -> float:
        """Seconds on a monotonic clock, after the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Place:
    """Devices, dtypes and ranks of a command, with the reasons of automatic choices."""

    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    head_dtype: torch.dtype
    rank: int
    world: int
    reasons: tuple[str, ...]

    @property
    def first(self) -> bool:
        """Is this the rank that writes and prints?"""
        return self.rank == 0

    def autocast(self, device: torch.device):
        """bfloat16 autocast on ``device`` when that is the compute dtype; nothing in float32."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def total(self, value: float) -> float:
        """The sum of ``value`` over all ranks (float64; the same number on every rank)."""
        return sum(self.gather(value))

    def gather(self, value) -> list:
        """[value of rank 0, value of rank 1, …] on every rank; ``value`` is any plain object."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Every rank reaches this line before one goes on."""
        if self.world > 1:
            dist.barrier()


def place(runtime, parameters: int) -> Place:
    """Resolves the ``runtime`` section for a student of ``parameters`` parameters. UserError on a missing device."""
    reasons = []
    world = _counted("WORLD_SIZE", 1, 1)
    rank, local_rank = _counted("RANK", 0, 0, world), _counted("LOCAL_RANK", 0, 0)
    if world > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]):
        raise UserError(f"environment WORLD_SIZE={world}: {missing[0]} is not set; start the ranks with torchrun, or unset WORLD_SIZE")
    _counted("MASTER_PORT", 0, 0, 65536)
    device = _device(runtime.device, local_rank, reasons)
    teacher_device = device if runtime.teacher_device is None else _device(runtime.teacher_device, 0, reasons)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if runtime.dtype == "auto":
        dtype, reason = _best_dtype(device, parameters)
        reasons.append(reason)
    else:
        dtype = getattr(torch, runtime.dtype)
    head_dtype = dtype if runtime.head_dtype == "auto" else getattr(torch, runtime.head_dtype)
    return Place(device, teacher_device, dtype, head_dtype, rank, world, tuple(reasons))


def _counted(name: str, default: int, low: int, end: int = 1 << 31) -> int:
    """The whole number in the environment variable ``name``, from ``low`` to below ``end``."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) < end:
        raise UserError(f"environment {name}={text[:40]!r}: expected a whole number from {low} to {end - 1}; start the ranks with torchrun, "
                        f"or unset {name}")
    return int(text)


def _device(text: str, local_rank: int, reasons: list[str]) -> torch.device:
    if text == "auto":
        if torch.cuda.is_available():
            text, why = f"cuda:{local_rank}", "a GPU is visible"
        elif torch.backends.mps.is_available():
            text, why = "mps", "Apple's GPU is available"
        else:
            text, why = "cpu", "no GPU is visible"
        reasons.append(f"device {text}: {why}")
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(f"device '{text}': not available here ({(str(error).splitlines() or [''])[0][:200]}); use cpu or auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _best_dtype(device: torch.device, parameters: int) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "bfloat16: the GPU supports it"
        return torch.float32, "float32: the GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        if parameters >= SMALL_MODEL:
            return torch.bfloat16, f"bfloat16: the CPU has AMX tiles and the student {parameters / 1e6:.0f} M parameters"
        return torch.float32, f"float32: a student of {parameters / 1e6:.2f} M parameters gains nothing from bfloat16 on a CPU"
    return torch.float32, f"float32: {device.type} without fast bfloat16"


def description() -> dict:
    """Versions and hardware for run.json. No host name, no user, no environment variables."""
    import transformers

    from . import __version__

    return {
        "prefix_distill": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "system": platform.system(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
