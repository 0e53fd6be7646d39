"""Gradient checkpointing: a recomputed layer must give what it gave in the forward pass."""

from dataclasses import replace

import torch

from ..errors import UserError
from .device import is_out_of_memory
from .models import Model
from .text_ids import make_row
from .trace import describe_failure

TOKENS = 16
# largest relative change of a gradient with recomputation
TOLERANCE = 1e-3
TOLERANCE_OF_HALF_PRECISION = 0.1


def check_recomputation(model: Model) -> None:
    """Raise UserError if gradient checkpointing changes a gradient.

    The gradients of one small parameter of every recomputed layer are computed with and without
    recomputation.
    """
    chosen = _choose_parameters(model)
    try:
        without = _gradients(replace(model, recomputes=False), chosen)
        recomputed = _gradients(model, chosen)
    except Exception as error:  # torch compares shapes and dtypes; a layer may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--gradient-checkpointing: layers of model {model.name} cannot be recomputed "
            f"({describe_failure(model.net, error)}); omit --gradient-checkpointing"
        ) from None
    allowed = model.choose_tolerance(TOLERANCE, TOLERANCE_OF_HALF_PRECISION)
    for name, before, after in zip(chosen, without, recomputed, strict=True):
        change = ((after - before).norm() / before.norm().clamp(min=1e-12)).item()
        if change > allowed:
            raise UserError(
                f"--gradient-checkpointing: the gradient of {name} changes by {change:.2g} of its "
                f"norm when layers of {model.name} are recomputed, expected at most {allowed:g}; "
                "omit --gradient-checkpointing"
            )


def _choose_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """Return the smallest reached parameter of every module that transformers checkpoints."""
    chosen = {}
    for prefix, module in model.net.named_modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        parameters = {}
        for name, p in module.named_parameters(prefix=prefix):
            if p.is_floating_point() and name not in model.unreached:
                parameters[name] = p
        if parameters:
            smallest = min(parameters, key=lambda name: parameters[name].numel())
            chosen[smallest] = parameters[smallest]
    return chosen


def _gradients(model: Model, chosen: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients of the chosen parameters, in float32."""
    frozen = [p for p in chosen.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            hidden_BTD = model.trunk(make_row(model, TOKENS)).float()
            weight_D = torch.linspace(-1, 1, hidden_BTD.shape[-1], device=hidden_BTD.device)
            loss = (hidden_BTD * weight_D).sum()
            gradients = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    pairs = zip(gradients, chosen.values(), strict=True)
    return [torch.zeros_like(p) if g is None else g.float() for g, p in pairs]
