"""A device's FLOPs per second, and the time that a planned run takes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import config as configuration
from ..config import Config
from ..engine.device import Clock
from ..engine.memory import read_batch_sizes
from ..engine.models import Model
from ..engine.ranks import join_ranks
from ..engine.shapes import widest_matrix
from ..errors import UserError
from ..maths.flops import Ledger
from .gpus import check_speed


@dataclass(frozen=True, kw_only=True)
class RateSource:
    """Where the speed of the device comes from; with none of the three, no time is forecast.

    ``tflops``: given in 10¹² FLOP/s; ``measure``: measured on this machine; ``from_run``: a run
    folder.
    """

    tflops: float | None = None
    measure: bool = False
    from_run: str | None = None

    def check(self) -> None:
        """Raise UserError if the speed is not above 0, or has two sources."""
        check_speed(self.tflops, self.measure, self.from_run)

    def read(self, config: Config, student: Model, dtype: torch.dtype) -> dict | None:
        """Return {source, flops_per_second: a number, or one per phase}, or None."""
        if self.tflops is not None:
            source = f"--device-tflops {self.tflops:g}"
            return {"source": source, "flops_per_second": self.tflops * 1e12}
        if self.measure:
            return measure_rate(config, student, dtype)
        if self.from_run is not None:
            return read_rate(self.from_run)
        return None


def read_rate(from_run: str | Path) -> dict:
    """Return what a run measured: {source, flops_per_second: by phase, optimizer_seconds}.

    UserError: the folder has no metrics.jsonl with a step.
    """
    try:
        text = (Path(from_run) / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        rates = _divide_by_seconds(rows)
        optimizer = sum(row["time/optimizer_s"] for row in rows) / len(rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"--from-run {from_run}: expected metrics.jsonl with at least one step, got none; name "
            "the folder of a run that has trained"
        ) from None
    return {
        "source": f"measured in {from_run}",
        "flops_per_second": rates,
        "optimizer_seconds": optimizer,
    }


def _divide_by_seconds(rows: list[dict]) -> dict[str, float]:
    """Return the FLOP/s of every phase that took time; FLOPs of the last row are cumulative."""
    rates = {}
    for key, flops in rows[-1].items():
        if not key.startswith("flops/") or key.endswith("_total"):
            continue
        phase = key.removeprefix("flops/")
        seconds = sum(row.get(f"time/{phase}_s", 0) for row in rows)
        if seconds:
            rates[phase] = flops / seconds
    return rates


def measure_rate(config: Config, student: Model, dtype: torch.dtype) -> dict:
    """Return the FLOP/s of a matrix product of the student on this machine, the best of a second.

    A micro-batch's tokens go forward through one feed-forward matrix. This is an upper bound:
    decoding reads all weights for few rows, so it stays far below.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    config = configuration.replace(config, runtime={"dtype": dtype_name, "gpus": None})
    where = join_ranks(config.runtime, student)
    product = Product(
        tokens=64 * read_batch_sizes(config).micro_batch_size,
        width=student.config.hidden_size,
        inner=widest_matrix(student),
    )
    return {
        "source": f"the fastest matrix product of {product.tokens} × {product.width} × "
        f"{product.inner} in one second, in {dtype_name} on {where.device}; times are lower bounds",
        "flops_per_second": product.measure(where.device, dtype),
    }


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product of [tokens, width] with [width, inner]."""

    tokens: int
    width: int
    inner: int

    def measure(self, device: torch.device, dtype: torch.dtype) -> float:
        """Return the FLOP/s of the fastest product in a second."""
        x = torch.randn(self.tokens, self.width, device=device, dtype=dtype)
        w = torch.randn(self.width, self.inner, device=device, dtype=dtype)
        x @ w  # the first product also loads the kernels
        # ``clock.now`` waits for the device, so the times are those of whole products.
        clock = Clock(device=device)
        best = math.inf
        start = before = clock.now()
        while before - start < 1:
            x @ w
            after = clock.now()
            best = min(best, after - before)
            before = after
        return 2.0 * self.tokens * self.width * self.inner / best


def estimate_seconds(ledger: Ledger, rate: dict) -> float:
    """Return the seconds of the ledger's work. UserError: ``rate`` lacks the speed of a phase."""
    speed = rate["flops_per_second"]
    if not isinstance(speed, dict):
        return ledger.total() / speed
    seconds = []
    for phase, flops in ledger.useful.items():
        if phase not in speed:
            raise UserError(
                f"--from-run: its metrics.jsonl has no speed of the phase {phase}; name a run that "
                "sampled and trained"
            )
        seconds.append(flops / speed[phase])
    return sum(seconds)
