"""The module that DDP wraps: the student's forward pass and the weighted divergence."""

import contextlib
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..engine import scoring
from ..engine.masters import Masters
from ..engine.rollout import Rollout, student_sides
from ..engine.units import units_of
from ..maths import fused, simct
from ..maths.divergence import Terms
from .run import Run

# (slot, sample) → one number per taught token
PerToken = dict[tuple[int, int], list[float]]
# the loss, its value per token [N], and with --clip the clipped mass per token [N]
Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(kw_only=True)
class TokenLosses:
    """The loss of this rank's rollouts, token by token.

    ``values``: the divergence per taught token, nats; ``clipped``: with --clip, the teacher's mass
    on clipped entries; ``weights``: the weight per token before the division by ``divisor``, the
    sum over all ranks.
    """

    rollouts: list[Rollout]
    weights: PerToken
    divisor: float
    values: PerToken = field(default_factory=dict)
    clipped: PerToken = field(default_factory=dict)

    def find_non_finite(self) -> tuple[Rollout, str] | None:
        """Return the first rollout with a non-finite divergence and a clause on it, or None."""
        for r in self.rollouts:
            for token, value in zip(r.taught, self.values[r.key], strict=True):
                if not math.isfinite(value):
                    where = f"prompt slot {r.slot}, sample {r.sample}, token {token}"
                    return r, f"the divergence of {where} is {value}"
        return None


class StudentLoss(torch.nn.Module):
    """Runs the student over a micro-batch and returns its weighted divergence from the teacher.

    The parameters are the master weights, whose gradients DDP all-reduces.
    """

    def __init__(self, run: Run, masters: Masters):
        super().__init__()
        self.net = run.pair.student.net
        self.run = run
        self.masters = masters

    def forward(
        self,
        rollouts: list[Rollout] | None,
        teacher_NE: torch.Tensor | None = None,
        weight_N: torch.Tensor | None = None,
        student_ND: torch.Tensor | None = None,
    ) -> torch.Tensor | Losses:
        """Return the loss, its value per token, and the clipped mass per token with --clip.

        ``teacher_NE``: the teacher's hidden rows, None if the loss needs no teacher;
        ``student_ND``: the student's, if an earlier forward pass is reused. If ``rollouts`` is
        None, return a zero loss that touches every parameter, so that DDP all-reduces.
        """
        run = self.run
        if rollouts is None or weight_N is None:
            return self._touch_parameters()
        pair, student = run.pair, self.masters.student
        if student_ND is None:
            with run.place.autocast(run.place.device):
                student_ND = scoring.hidden_rows(student, student_sides(rollouts))
        student_head = self.masters.head()
        terms = choose_terms(run, rollouts)
        support = pair.shared_support
        if support is not None and teacher_NE is not None and rollouts[0].units is not None:
            return simct.weighted(
                terms,
                support=support,
                units=units_of(rollouts),
                student_ND=student_ND,
                student_head=student_head,
                teacher_ME=teacher_NE,
                teacher_head=pair.teacher.head(),
                weight_U=weight_N,
            )
        return fused.weighted(
            terms,
            student_ND=student_ND,
            student_head=student_head,
            teacher_NE=teacher_NE,
            teacher_head=pair.teacher.head(),
            weight_N=weight_N.to(student_ND.device),
            token_N=scoring.tokens(rollouts),
            sampler_logp_N=_sampler_logp(rollouts),
        )

    def _touch_parameters(self) -> torch.Tensor:
        """Return a zero loss that touches every parameter."""
        # Not a forward pass, which would touch only the experts that its tokens take.
        touched = [p.flatten()[0] for p in self.masters.weights.values()]
        return 0 * torch.stack(touched).sum()


def choose_terms(run: Run, rollouts: list[Rollout]) -> Terms:
    """Return the loss of a micro-batch, whose rollouts all come from one model."""
    if rollouts[0].off_policy:
        return run.method.text_terms
    return run.method.terms


def _sampler_logp(rollouts: list[Rollout]) -> torch.Tensor | None:
    """Return the log-probability of each taught token when it was sampled; None if not recorded."""
    logp: list[float] = []
    for r in rollouts:
        if r.sampler_logp is None:
            return None
        logp += [r.sampler_logp[t] for t in r.taught]
    return torch.tensor(logp)


def make_loss(run: Run, masters: Masters) -> torch.nn.Module:
    """Return the student's loss, wrapped in DDP if there are several ranks."""
    loss = StudentLoss(run, masters)
    if run.place.world == 1:
        return loss
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "broadcast_buffers"
    if "forward_sync_buffers" in known:  # torch's newer name
        buffers = "forward_sync_buffers"
    # buffers never change, so they are not broadcast
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(loss, **options)


def without_all_reduce(loss: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which DDP does not all-reduce the gradients."""
    if isinstance(loss, DistributedDataParallel):
        return loss.no_sync()
    return contextlib.nullcontext()
