"""A device's FLOPs per second, and the time that a planned run takes."""

import json
import math
from pathlib import Path

import torch

from .. import config as configuration
from ..config import Config
from ..engine.device import Clock
from ..engine.models import Model
from ..engine.ranks import join_ranks
from ..errors import UserError
from ..maths.flops import Ledger


def read_rate(from_run: str | Path) -> dict:
    """Return the rates that a run measured, by phase: {source, flops_per_second,
    optimizer_seconds}."""
    try:
        rows = [
            json.loads(line)
            for line in (Path(from_run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        phases = [
            key[len("flops/") :]
            for key in rows[-1]
            if key.startswith("flops/") and not key.endswith("_total")
        ]
        found = {
            p: rows[-1][f"flops/{p}"] / seconds
            for p in phases
            if (seconds := sum(row.get(f"time/{p}_s", 0) for row in rows))
        }
        optimizer = sum(row["time/optimizer_s"] for row in rows) / len(rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"--from-run {from_run}: it has no metrics.jsonl with a row of an update; name the "
            "folder of a run that has trained"
        ) from None
    return {
        "source": f"measured in {from_run}",
        "flops_per_second": found,
        "optimizer_seconds": optimizer,
    }


def measure_rate(config: Config, student: Model, dtype: torch.dtype) -> dict:
    """FLOP/s of the student's own matmuls on this machine: a micro-batch's tokens through one
    feed-forward matrix, forward. What a device does at best; decoding, which reads all weights for
    few rows, stays far below."""
    where = join_ranks(
        configuration.replace(config, runtime={"dtype": str(dtype)[6:], "gpus": None}).runtime,
        lambda: 0,
    )
    width = student.config.hidden_size
    inner = getattr(student.config, "intermediate_size", None) or 4 * width
    tokens, clock = 64 * config.train.micro_batch_size, Clock(where.device)
    x = torch.randn(tokens, width, device=where.device, dtype=dtype)
    w = torch.randn(width, inner, device=where.device, dtype=dtype)
    x @ w
    best, start = math.inf, clock.now()
    while (begun := clock.now()) - start < 1:
        x @ w
        best = min(best, clock.now() - begun)
    return {
        "source": f"one matmul of {tokens} × {width} × {inner} in {str(dtype)[6:]} on "
        f"{where.device}, the best of a second: times are lower bounds",
        "flops_per_second": 2.0 * tokens * width * inner / best,
    }


def estimate_seconds(ledger: Ledger, rate: dict) -> float:
    """Return the seconds of the ledger's work at a rate. UserError: the rate lacks a phase."""
    speed = rate["flops_per_second"]
    if not isinstance(speed, dict):
        return ledger.total() / speed
    if missing := [p for p in ledger.useful if p not in speed]:
        raise UserError(
            f"--from-run: that run has no rate of {missing[0]}; name one that sampled and trained"
        )
    return sum(f / speed[p] for p, f in ledger.useful.items())
