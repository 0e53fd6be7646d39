"""Helpers of the benchmarks: silent reporter, memory, machine, child processes, results."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a benchmark's parent process need not import torch
    import torch

HERE = Path(__file__).parent


class Silent:
    """A reporter (``prefix_distill.display.Reporter``) that shows nothing.

    A benchmark overrides the methods whose calls it measures.
    """

    def note(self, text: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def warn_on_this_rank(self, text: str) -> None: ...
    def row(self, row: dict, useful: float, full: float) -> None: ...
    def evaluation(self, row: dict) -> None: ...
    def tail(self, row: dict) -> None: ...


def require(package: str, install: str) -> ModuleSpec:
    """Return the spec of ``package``; without it, exit with code 2 and one line.

    The tests skip a benchmark that exits this way.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        print(f"the package {package} is not installed: {install}", file=sys.stderr)
        sys.exit(2)
    return spec


def gradient(leaf: "torch.Tensor") -> "torch.Tensor":
    """Return the gradient of ``leaf`` after a backward pass; raise ValueError if there is none."""
    if leaf.grad is None:
        raise ValueError("expected a gradient after the backward pass, got None")
    return leaf.grad


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes (Linux only)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def reset_peak() -> int:
    """Reset the peak that ``memory("VmHWM")`` returns; return the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def fastest(work, seconds: float = 1.0) -> float:
    """Return the seconds of the fastest of several calls of ``work``, after one warm-up call.

    The minimum estimates a limit of the machine; an average would not.
    """
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def without_checkpointing(arguments: type) -> dict:
    """Return the option that turns gradient checkpointing off.

    ``arguments``: a class of training arguments. If it has the newer option name, the older one
    warns.
    """
    fields = {field.name for field in dataclasses.fields(arguments)}
    if "activation_checkpointing" in fields:
        return {"activation_checkpointing": False}
    return {"gradient_checkpointing": False}


def checkpoints(net) -> bool:
    """Return whether a layer of ``net`` uses gradient checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in net.modules())


def child(script: str, *arguments) -> dict:
    """Run ``script`` in a separate process; return its last printed line, a JSON document.

    Every process has the thread settings of our command line.
    """
    from prefix_distill.cli.quiet import calm_threads

    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    calm_threads(environment)
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 2:  # the last line of stderr names what is missing or wrong
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        sys.exit(2)
    if done.returncode:
        sys.exit(
            f"{Path(script).name} {' '.join(map(str, arguments))}: failed\n{done.stderr.strip()}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """Return processor, threads and package versions for a result."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
            "unknown",
        ),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def record(name: str, document: dict, keep: bool) -> None:
    """Print the document as one JSON line; with ``keep``, also write results/NAME.json."""
    if keep:
        (HERE / "results" / f"{name}.json").write_text(
            json.dumps(document, indent=1) + "\n", encoding="utf-8"
        )
    print(json.dumps(document))
