"""The output layer of a network: what goes into it, and what the network does to its logits."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

SMALL, LARGE = 1e-3, 1e6  # logits at which a softcap changes nothing, and everything


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What a network does to the output layer's logits: softcap·tanh(scale·x / softcap).

    Without ``softcap`` it is scale·x.
    """

    scale: float
    softcap: float | None = None


def contains_head(net: PreTrainedModel) -> bool:
    """Return whether the decoder that transformers names holds the output layer."""
    return net.get_output_embeddings() in set(net.get_decoder().modules())


def name_outside_decoder(net: PreTrainedModel) -> frozenset[str]:
    """Return the parameters outside the decoder, the embeddings and the output layer.

    They are those of towers that text does not run, as far as names tell.
    """
    if contains_head(net):
        return frozenset()
    inside: set[int] = set()
    for module in (net.get_decoder(), net.get_input_embeddings(), net.get_output_embeddings()):
        inside.update(id(p) for p in module.parameters())
    return frozenset(name for name, p in net.named_parameters() if id(p) not in inside)


@contextlib.contextmanager
def _replacing_forward(
    layer: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let ``layer`` compute ``forward`` inside the ``with`` block."""
    before = vars(layer).get("forward")  # accelerate's hooks lie there
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextlib.contextmanager
def capture_head_input(net: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Run ``net`` without its output layer; the list gets the input of that layer.

    The logits get one column of zeros, so that no [B, T, V] tensor exists.
    """
    captured: list[torch.Tensor] = []

    def capture(hidden_BTD: torch.Tensor) -> torch.Tensor:
        captured.append(hidden_BTD)
        return hidden_BTD.new_zeros(*hidden_BTD.shape[:-1], 1)

    with _replacing_forward(net.get_output_embeddings(), capture):
        yield captured


@torch.no_grad()
def measure_scaling(net: PreTrainedModel, ids_BT: torch.Tensor) -> Scaling:
    """Return what ``net`` does to its output layer's logits, from two logits that it is given."""
    layer = net.get_output_embeddings()
    ids = len(layer.weight)
    given_V = torch.full((ids,), SMALL, device=ids_BT.device)
    given_V[ids // 2 :] = LARGE

    def give(hidden_BTD: torch.Tensor) -> torch.Tensor:
        return given_V.expand(*hidden_BTD.shape[:-1], ids)

    with _replacing_forward(layer, give):
        output = net(input_ids=ids_BT, use_cache=False)
    small, large = output.logits[0, -1, [0, ids // 2]].tolist()
    scale = small / SMALL
    if abs(large) < 0.5 * abs(scale) * LARGE:
        return Scaling(scale=scale, softcap=abs(large))
    return Scaling(scale=scale)
