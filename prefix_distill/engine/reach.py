"""Which parameters a text token reaches: those are trained, the others are frozen.

A multimodal model has towers and projectors that text never runs, and a router may have a bias that
only corrects its choice. Neither gets a gradient.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import UserError
from .device import is_out_of_memory
from .models import Model
from .text_ids import make_row
from .trace import describe_failure

TOKENS = 128  # long enough for layers that only run on long texts
NAMED = 3  # the most modules that a note names


def find_unreached(model: Model) -> frozenset[str]:
    """Return the names of the parameters that no text token reaches.

    One forward pass over some tokens builds the graph of the hidden states, which backward would
    follow; its leaves are the parameters that get a gradient. An expert that got none of these
    tokens is no leaf either. It counts as reached, because a module beside it in its list ran.
    UserError: the hidden states have no gradient.
    """
    with _watching_calls(model.net) as called, _requiring_gradients(model.net):
        hidden_BTD = _run_trunk(model)
        leaves = _find_leaves(hidden_BTD)
    head = model.net.get_output_embeddings()
    for p in (head.weight, getattr(head, "bias", None)):
        leaves.add(id(p))  # the loss computes the logits from these
    executed = _with_parents(called)
    modules = dict(model.net.named_modules())
    unreached = []
    for name, p in model.net.named_parameters():
        # torch gives integers, such as quantized weights, no gradient
        if id(p) in leaves or (not p.is_floating_point() and _owner(name) in executed):
            continue
        if not _is_expert(_owner(name), modules, executed):
            unreached.append(name)
    return frozenset(unreached)


def _run_trunk(model: Model) -> torch.Tensor:
    count = min(TOKENS, model.positions or TOKENS)
    try:
        with torch.enable_grad():
            hidden_BTD = model.trunk(make_row(model, count))
    except Exception as error:  # a network may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model {model.name}: expected hidden states with gradients, got "
            f"{type(error).__name__} ({describe_failure(model.net, error)}); use a model that can "
            "be trained"
        ) from None
    if hidden_BTD.grad_fn is None:
        raise UserError(
            f"model {model.name}: its hidden states have no gradient (grad_fn is None), so it "
            "cannot be trained; use a model whose forward pass can be differentiated"
        )
    return hidden_BTD


@contextlib.contextmanager
def _watching_calls(net: torch.nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules that are called inside the ``with`` block."""
    called: set[str] = set()
    names = {module: name for name, module in net.named_modules()}

    def note(module: torch.nn.Module, _: object) -> None:
        called.add(names[module])

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _requiring_gradients(net: torch.nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient inside the ``with`` block."""
    frozen = [p for p in net.parameters() if p.is_floating_point() and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _find_leaves(root: torch.Tensor) -> set[int]:
    """Return the ``id`` of every leaf of the graph that computed ``root``."""
    leaves = set()
    seen: set[Any] = set()
    waiting: list[Any] = [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


def _with_parents(names: Iterable[str]) -> set[str]:
    """Return names of modules, and those of the modules that contain them."""
    found = {""}
    for name in names:
        while name not in found:
            found.add(name)
            name = _owner(name)
    return found


def _owner(name: str) -> str:
    """Return the name of the module that a parameter or a module belongs to."""
    return name.rpartition(".")[0]


def _is_expert(name: str, modules: dict[str, torch.nn.Module], executed: set[str]) -> bool:
    """Return whether a module did not run, but one of its class beside it in its list did."""
    if name in executed:
        return False
    while _owner(name) not in executed:
        name = _owner(name)
    siblings = modules[_owner(name)]
    if not isinstance(siblings, torch.nn.ModuleList | torch.nn.ModuleDict):
        return False
    for child, sibling in siblings.named_children():
        ran = f"{_owner(name)}.{child}" in executed
        if ran and type(sibling) is type(modules[name]):
            return True
    return False


def describe_unreached(model: Model) -> str:
    """Return a note on the frozen parameters: how many, and where they are."""
    parameters = dict(model.net.named_parameters())
    count = sum(parameters[name].numel() for name in model.unreached)
    reached = _with_parents(_owner(name) for name in parameters.keys() - model.unreached)
    places: dict[str, None] = {}
    for name in sorted(model.unreached):
        place = name
        while _owner(place) not in reached:
            place = _owner(place)
        places[place] = None
    named = ", ".join(list(places)[:NAMED])
    if len(places) > NAMED:
        named += f" and {len(places) - NAMED} more"
    return (
        f"no text token reaches {count:,} parameters of the student, so they are frozen and left "
        f"out of the optimizer: {named}"
    )
