"""The float32 weights of a student that trains in bfloat16, and their one copy in bfloat16.

A step of AdamW is often smaller than the resolution of bfloat16, so the optimizer steps float32
master weights. A working copy of them is refreshed after each step. Its networks share tensors:

    sampler   all weights in bfloat16, as a model that is loaded in bfloat16: it decodes
    student   the matrices of linear layers are those of the sampler; embeddings, norms and
              everything else are the masters themselves: it scores and trains, under autocast

Autocast then casts activations and no weight, and the gradients are those of float32 weights under
autocast. A student in bfloat16 throughout would round the sums of its residual stream as well,
which makes the error of its gradients larger (``tests/benchmarks/working_copy.py``).

Each gradient of the copy is added to the master's float32 gradient as soon as it is complete, and
freed. So micro-batches add up in float32, and ranks all-reduce float32 gradients.

Bytes per trained parameter: 4 master, 4 gradient, 8 moments of AdamW, 2 copy. In a run in float32
nothing is copied. Neither is a LoRA student: its adapter is in float32, and its base is frozen.
"""

import copy
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from ..maths.divergence import Head
from .casting import copy_in
from .models import Model

if TYPE_CHECKING:
    from .transformers_names import CausalLM


class Masters:
    """Keeps the networks that compute equal to the master weights that the optimizer steps.

    ``model``: the model with the master weights; ``weights``: those that train, by name, which hold
    the gradients in ``grad``; ``copies``: copied weight → its master. ``student``: the model that
    scores and trains; ``sampler``: the model that decodes.
    """

    def __init__(self, model: Model, dtype: torch.dtype):
        """Copy the weights of ``model`` in ``dtype``, unless it is float32 or an adapter trains."""
        self.model = model
        self.weights = model.trainable
        self.student = self.sampler = model
        self.copies: dict[Parameter, Parameter] = {}
        if model.adapter is not None or dtype == torch.float32:
            return
        model.forget_state()  # tensors with a graph cannot be copied
        self.sampler = replace(model, net=copy_in(model.net, dtype))
        copies = zip(self.sampler.net.parameters(), model.net.parameters(), strict=True)
        for copied, master in copies:
            if copied is not master:
                self.copies[copied] = master
        matrices = _matrices(self.sampler.net)
        self.student = replace(model, net=_with_matrices(model.net, matrices))
        for copied in set(matrices.values()) & self.copies.keys():
            if copied.requires_grad:
                hand_over = functools.partial(_hand_over, self.copies[copied])
                copied.register_post_accumulate_grad_hook(hand_over)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights to the working copy."""
        if self.copies:
            torch._foreach_copy_(list(self.copies), list(self.copies.values()))

    def head(self) -> Head:
        """Return the student's head, with the table to which the loss adds its gradient.

        The loss has this gradient in float32, so no micro-batch needs another table of that size.
        In a run in float32 it takes autograd's path, which keeps the order of its sums.
        """
        head = self.student.head()
        master = self.copies.get(self.student.net.get_output_embeddings().weight)
        if master is None or not master.requires_grad:
            return head
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return replace(head, gradient_VD=master.grad[: len(head.weight_VD)])


def _matrices(net: "CausalLM") -> dict[str, Parameter]:
    """Return the weight of each linear layer, by the path of the layer."""
    matrices: dict[str, Any] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear | Conv1D):
            matrices[path] = module.weight
    return matrices


def _with_matrices(net: "CausalLM", matrices: dict[str, Parameter]) -> "CausalLM":
    """Return a network with the tensors of ``net``, but for the weights of its linear layers."""
    same_tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    mixed = copy.deepcopy(net, same_tensors)
    for path, weight in matrices.items():
        mixed.get_submodule(path).weight = weight
    return mixed


def _hand_over(master: Parameter, copied: Tensor) -> None:
    """Add the gradient of a weight of the copy to its master's, and free it."""
    gradient = copied.grad
    copied.grad = None
    if gradient is None:
        return
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad += gradient
