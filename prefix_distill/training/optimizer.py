"""The optimizer and its step."""

import math
from collections.abc import Iterable

import torch

from ..config import Config


class NonFiniteGradient(Exception):
    """A gradient is not finite; the message names it."""


def make_optimizer(trained: Iterable[torch.nn.Parameter], config: Config) -> torch.optim.AdamW:
    """Return AdamW in float32, fused: one pass over weight, gradient and moments.

    Matrices have weight decay; norms and biases have none.
    """
    parameters = list(trained)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": config.train.weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, fused=True)  # every step sets its rate


def step_optimizer(
    optimizer: torch.optim.Optimizer,
    trained: dict[str, torch.nn.Parameter],
    rate: float,
    grad_clip: float,
) -> float:
    """Clip the gradients, take one step at learning rate ``rate``; return the norm before clipping.

    ``grad_clip`` 0 clips nothing. NonFiniteGradient: a
    gradient is not finite; no weight was changed.
    """
    gradients: dict[str, torch.Tensor] = {}
    for name, p in trained.items():
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # of an expert that got no token in this step
        gradients[name] = p.grad
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    if not math.isfinite(norm):
        raise NonFiniteGradient(_name_non_finite(gradients))
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(list(trained.values()), grad_clip, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _name_non_finite(gradients: dict[str, torch.Tensor]) -> str:
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            return f"the gradient of {name} is not finite"
    return "the gradient's norm is not finite"
