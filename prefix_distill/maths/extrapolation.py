"""Extrapolation along the recent displacement: EffOPD (arXiv 2605.11739) and two controls.

The search follows steps t = 1, 2, 4, 8, …. Let W be the weights and Δ = W − anchor; the first
anchor is θ₀. The candidates W + 2k·Δ, k = 1, 2, …, 5, are scored in turn. Each one is accepted
while its score is above that of the last accepted point, which is W at first. The last accepted
point becomes the weights and the next anchor, even if it is W. The two controls skip the scores.
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


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The accepted point W + 2k·Δ; ``k`` = 0: W.

    ``scores``: of W and of the candidates that were scored, in order; only ``effopd`` scores.
    """

    k: int
    scores: list[float] = field(default_factory=list)


def due(t: int) -> bool:
    """Return whether the search follows step ``t`` (1 is the first): at powers of two."""
    return t > 0 and t & (t - 1) == 0


@torch.no_grad()
def snapshot(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """Return float32 copies on the CPU without gradient; pinned if the parameter is on a GPU."""
    copies = {}
    for name, p in parameters.items():
        copies[name] = torch.empty(p.shape, dtype=torch.float32, pin_memory=p.is_cuda).copy_(p)
    return copies


@torch.no_grad()
def extrapolate(
    parameters: dict[str, Parameter],
    anchor: dict[str, Tensor],
    kind: str,
    score: Callable[[], float],
    key: tuple[object, ...],
) -> Accepted:
    """Run one search from the parameters' values W; change ``parameters`` and ``anchor`` in place.

    ``anchor``: the accepted point of the last search, as a ``snapshot``. ``effopd``: ``score()``
    scores the current parameters; higher is better, and an equal score or NaN is rejected.
    ``always-1``: k = 1. ``none``: k = 0, only the anchor moves. ``random``: each k is accepted with
    probability 1/2, by a generator seeded with ``key``.

    Afterwards parameters and anchor hold the accepted point: W bit for bit (k = 0), or W + 2k·(W −
    anchor) in float32 with difference, product and sum rounded in turn. If ``score`` raises, the
    parameters are W and the anchor is unchanged. The search needs a copy of W on the CPU and one
    tensor on the GPU.

    ValueError: ``kind`` is unknown, or a parameter is not float32.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise ValueError(f"{name} is {p.dtype}: only float32 master weights are extrapolated")
    search = _Search(parameters=parameters, start=snapshot(parameters), anchor=anchor)
    try:
        if kind == "effopd":
            best, scores = search.climb(score)
        else:
            best, scores = {"none": 0, "always-1": 1}.get(kind, _sample_k(key)), []
        search.move_to(best)
    except BaseException:
        search.write(0)
        raise
    for name, p in parameters.items():
        anchor[name].copy_(p)
    return Accepted(k=best, scores=scores)


@dataclass(kw_only=True)
class _Search:
    """The parameters during a search; ``at``: the k of the point that they hold."""

    parameters: dict[str, Parameter]
    start: dict[str, Tensor]
    anchor: dict[str, Tensor]
    at: int = 0

    def climb(self, score: Callable[[], float]) -> tuple[int, list[float]]:
        """Try k = 1, 2, … while the score rises; return the last accepted k and all scores."""
        scores = [score()]
        for k in range(1, CANDIDATES + 1):
            self.move_to(k)
            scores.append(score())
            if not scores[-1] > scores[-2]:  # also for NaN
                return k - 1, scores
        return CANDIDATES, scores

    def move_to(self, k: int) -> None:
        """Write the point W + 2k·Δ unless the parameters hold it."""
        if self.at != k:
            self.write(k)

    def write(self, k: int) -> None:
        """Set the parameters to W + 2k·(W − anchor), one tensor at a time."""
        self.at = k
        for name, p in self.parameters.items():
            p.copy_(self.start[name], non_blocking=True)
            if k:
                delta = self.anchor[name].to(p.device, non_blocking=True, copy=True)
                torch.sub(p, delta, out=delta)
                p.add_(delta.mul_(2 * k))


def _sample_k(key: tuple[object, ...]) -> int:
    """Return how many candidates are accepted before the first rejection, each with p = 1/2."""
    rng = random.Random("/".join(map(str, ("extrapolate", *key))))
    for k in range(CANDIDATES):
        if rng.random() < 0.5:
            return k
    return CANDIDATES


def effective_rank(matrix: Tensor) -> float:
    """Return exp(−Σ p·ln p) with p = σ/Σσ over the singular values σ of ``matrix`` [m, n].

    It is between 1 and the smaller side; 0 for a zero matrix, NaN if an entry is not finite.
    Source: Roy & Vetterli, EUSIPCO 2007.
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
    """Return, by name, the norm, effective rank and cosine of displacements Δ.

    ``norm``: ‖Δ‖₂. ``effective_rank``: of matrices, else None. ``cosine``: of Δ with ``final``;
    None if either is zero. ``all``: norm and cosine of all tensors as one vector. Sums in float64.
    """
    table: dict[str, dict[str, float | None]] = {}
    squares = others = inner = 0.0
    for name, d in delta.items():
        f = final[name].to(d.device)
        norm, other = _norm(d), _norm(f)
        product = (d * f).sum(dtype=torch.float64).item()
        rank = None
        if d.dim() == 2:
            rank = effective_rank(d)
        cosine = _ratio(product, norm * other)
        table[name] = {"norm": norm, "effective_rank": rank, "cosine": cosine}
        squares += norm**2
        others += other**2
        inner += product
    cosine = _ratio(inner, math.sqrt(squares * others))
    table["all"] = {"norm": math.sqrt(squares), "effective_rank": None, "cosine": cosine}
    return table


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).item())


def _ratio(product: float, norms: float) -> float | None:
    """Return the cosine; None if one of the norms is zero."""
    if not norms:
        return None
    return product / norms
