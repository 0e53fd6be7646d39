"""Explain faults of a step: numbers that are not finite, and no memory for the optimizer."""

import contextlib
from collections.abc import Iterator

import torch

from .. import config as configuration
from ..display import memory_text
from ..engine import scoring
from ..engine.device import is_out_of_memory
from ..engine.models import Model
from ..engine.pair import Pair
from ..engine.rollout import Rollout, Side
from ..engine.trace import describe_failure
from ..errors import MemoryShortage
from .loss import TokenLosses
from .run import Run


def describe_non_finite(run: Run, losses: TokenLosses) -> str | None:
    """Return which divergence is not finite on any rank, and why; None: all are finite.

    All ranks call it and get the same answer.
    """
    reason = None
    found = losses.find_non_finite()
    if found is not None:
        rollout, where = found
        reason = f"{where}{_explain(run, rollout)}"
    return next(filter(None, run.place.gather(reason)), None)


@torch.no_grad()
def _explain(run: Run, rollout: Rollout) -> str:
    """Return which weight, hidden state or logit of the two models is not finite.

    Weights are checked first, then hidden states and logits on ``rollout``, the teacher's before
    the student's.
    """
    sides = (
        ("teacher", run.pair.teacher, rollout.teacher),
        ("student", run.pair.student, rollout.student),
    )
    for role, model, _ in sides:
        for name, p in model.net.named_parameters():
            if not torch.isfinite(p).all():
                return f": the {role}'s weight {name} is not finite"
    for role, model, side in sides:
        part = _find_in_pass(run, model, side)
        if part is not None:
            return f": the {role}'s {part} there are not finite"
    return f", but the logits of both models are finite (--divergence {run.method.terms.name})"


def _find_in_pass(run: Run, model: Model, side: Side) -> str | None:
    with run.place.autocast(model.device):
        hidden_ND = scoring.hidden_rows(model, [side])
    if not torch.isfinite(hidden_ND).all():
        return "hidden states"
    logits_NV = model.head().to(run.place.head_dtype).logits(hidden_ND)
    if not torch.isfinite(logits_NV).all():
        return "logits"
    return None


def describe_network_failure(pair: Pair, error: Exception) -> str:
    """Return that the code of one of the networks failed, where, and why."""
    nets = torch.nn.ModuleDict({"student": pair.student.net, "teacher": pair.teacher.net})
    return f"the network's code failed ({describe_failure(nets, error)})"


@contextlib.contextmanager
def explain_shortage(run: Run) -> Iterator[None]:
    """Turn a shortage of memory in the optimizer's step into MemoryShortage, with what helps.

    AdamW's moments depend on the number of trained parameters alone, so a smaller batch does not
    help.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trained = sum(p.numel() for p in run.pair.student.trainable.values())
        raise MemoryShortage(
            f"rank {run.place.rank}: {run.place.device} is out of memory for AdamW's moments, "
            f"which need {memory_text(8 * trained)} at any batch size; use "
            f"{_remedies_of_moments(run)}"
        ) from None


def _remedies_of_moments(run: Run) -> str:
    """Return what frees memory for AdamW's moments in this run."""
    remedy = "--lora 16"
    if run.pair.student.adapter is not None:
        remedy = "a lower --lora or fewer --lora-targets"
    remedy += ", or a smaller student"
    has_teacher = run.config.models.teacher != configuration.SELF
    if has_teacher and run.place.teacher_device == run.place.device:
        remedy += ", or move the teacher with --teacher-device"
    return remedy
