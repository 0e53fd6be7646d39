"""Further along the way the updates went: EffOPD (arXiv 2605.11739) and two controls that go
without looking.

With the anchor θ₀ first, after update t = 1, 2, 4, 8, …, W the weights and Δ = W − anchor: the
candidates W + 2k·Δ, k = 1, 2, …, 5, are scored in turn, and each is accepted while its score is
above that of the one accepted before (W's first). The last accepted point becomes the weights, and
the next anchor, also where that is W itself.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

KINDS = ("none", "effopd", "always-1", "random")
MODULES = ("attention-mlp", "all")
CANDIDATES = 5


@dataclass(frozen=True)
class Found:
    """The accepted point W + 2k·Δ (``k`` = 0: W), and score(W) with those of the candidates that
    were scored, in order (``effopd`` alone scores)."""

    k: int
    scores: list[float] = field(default_factory=list)


def due(t: int) -> bool:
    """Whether the search follows update ``t`` (1 is the first): at powers of two."""
    return t > 0 and t & (t - 1) == 0


@torch.no_grad()
def snapshot(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """Copies in float32 on the CPU, without gradient; pinned where the parameter is on a GPU."""
    return {
        name: torch.empty(p.shape, dtype=torch.float32, pin_memory=p.is_cuda).copy_(p)
        for name, p in parameters.items()
    }


@torch.no_grad()
def extrapolate(
    parameters: dict[str, Parameter],
    anchor: dict[str, Tensor],
    kind: str,
    score: Callable[[], float],
    key: tuple[object, ...],
) -> Found:
    """One search (see the module) from the parameters' values W, in place; ``anchor`` is the last
    one's ``snapshot``.

    ``effopd``: ``score()`` judges the parameters as they are, higher is better; an equal one or nan
    is not accepted. ``always-1``: k = 1. ``none``: k = 0, only the anchor moves. ``random``: each k
    is accepted with probability 1/2, by a generator seeded with ``key``.

    Afterwards parameters and anchor hold the accepted point: W bit for bit (k = 0), or W + 2k·(W −
    anchor) in float32, the difference, product and sum rounded in turn. If ``score`` raises, the
    parameters are W and the anchor is as it was. ValueError for parameters that are not float32.
    Costs a copy of W on the CPU and one tensor more on the GPU.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise ValueError(f"{name} is {p.dtype}: only float32 master weights are extrapolated")
    start = snapshot(parameters)
    at = best = 0
    scores: list[float] = []
    try:
        if kind == "effopd":
            scores.append(score())
            value = scores[0]
            for at in range(1, CANDIDATES + 1):
                _write(parameters, start, anchor, at)
                scores.append(score())
                if not scores[-1] > value:  # nan too
                    break
                best, value = at, scores[-1]
        else:
            best = {"none": 0, "always-1": 1}.get(kind, _draw(key))
        if at != best:
            _write(parameters, start, anchor, best)
    except BaseException:
        _write(parameters, start, anchor, 0)
        raise
    for name, p in parameters.items():
        anchor[name].copy_(p)
    return Found(best, scores)


def _write(
    parameters: dict[str, Parameter], start: dict[str, Tensor], anchor: dict[str, Tensor], k: int
) -> None:
    """parameters = start + 2k·(start − anchor), one tensor at a time."""
    for name, p in parameters.items():
        p.copy_(start[name], non_blocking=True)
        if k:
            delta = anchor[name].to(p.device, non_blocking=True, copy=True)
            torch.sub(p, delta, out=delta)
            p.add_(delta.mul_(2 * k))


def _draw(key: tuple[object, ...]) -> int:
    """How many of the candidates are accepted before the first refusal, each with probability
    1/2."""
    rng = random.Random("/".join(map(str, ("extrapolate", *key))))
    return next((k for k in range(CANDIDATES) if rng.random() < 0.5), CANDIDATES)


def effective_rank(matrix: Tensor) -> float:
    """exp(−Σ p·ln p) with p = σ/Σσ over the singular values σ: from 1 to the smaller side of
    ``matrix`` [m, n]; 0 where it is zero, nan where it is not finite. Roy & Vetterli, EUSIPCO 2007.
    """
    matrix = matrix.detach().float()
    if not matrix.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(matrix).double()
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp().item())


@torch.no_grad()
def diagnose(
    delta: dict[str, Tensor], final: dict[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Displacements by name → ``norm`` ‖Δ‖₂, ``effective_rank`` (matrices, else None), ``cosine``
    of Δ with ``final`` (None where either is zero); under ``all`` the norm and cosine of all
    tensors as one vector. Sums in float64."""
    table: dict[str, dict[str, float | None]] = {}
    squares = others = inner = 0.0
    for name, d in delta.items():
        f = final[name].to(d.device)
        norm, other = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (d, f))
        product = (d * f).sum(dtype=torch.float64).item()
        table[name] = {
            "norm": norm,
            "effective_rank": effective_rank(d) if d.dim() == 2 else None,
            "cosine": product / (norm * other) if norm and other else None,
        }
        squares, others, inner = squares + norm**2, others + other**2, inner + product
    table["all"] = {
        "norm": math.sqrt(squares),
        "effective_rank": None,
        "cosine": inner / math.sqrt(squares * others) if squares and others else None,
    }
    return table
