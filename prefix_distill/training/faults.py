"""Find where the first number that is not finite appears."""

import torch

from ..engine import scoring
from ..engine.models import Model
from ..engine.rollout import Rollout, Side
from .run import Run


@torch.no_grad()
def find_non_finite(run: Run, rollout: Rollout) -> str:
    """Return which weight, hidden state or logit of the two models is not finite.

    Weights are checked first, then hidden states and logits on ``rollout``, the teacher's before
    the student's. The result completes the phrase "… not finite".
    """
    sides = (
        ("teacher", run.pair.teacher, rollout.teacher),
        ("student", run.pair.student, rollout.student),
    )
    for role, model, _ in sides:
        for name, p in model.net.named_parameters():
            if not torch.isfinite(p).all():
                return f"the {role}'s weight {name} is"
    for role, model, side in sides:
        part = _find_in_pass(run, model, side)
        if part is not None:
            return f"the {role}'s {part} there are"
    return "it is"


def _find_in_pass(run: Run, model: Model, side: Side) -> str | None:
    with run.place.autocast(model.device):
        hidden_ND = scoring.hidden_rows(model, [side])
    if not torch.isfinite(hidden_ND).all():
        return "hidden states"
    logits_NV = model.head().to(run.place.head_dtype).logits(hidden_ND)
    if not torch.isfinite(logits_NV).all():
        return "logits"
    return None
