"""Check before training that an adapter has the effect that its merged weights have.

A layer passes if the hidden states with the adapter equal those with W + (α/r)·B A in W's place. A
network fails this where it reads a weight without calling the layer, or uses it in two places.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .. import config as configuration
from ..errors import UserError, one_line
from . import adapter
from .adapter import NAME
from .models import Model
from .peft_names import import_peft
from .targets import ALL, Site, Targets, find_targets
from .text_ids import make_row

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

FEW_TOKENS = 8  # length of the text that is run
STRENGTH = 0.5  # ‖ΔW‖/‖W‖ of the random adapter that is tried
# largest difference between adapter and merged weights, as a share of the adapter's effect
TOLERANCE = 0.01
TOLERANCE_OF_HALF_PRECISION = 0.5
# and of the hidden states, where the effect is lost in rounding
NOISE = 1e-5
NOISE_OF_HALF_PRECISION = 0.02

States = Callable[[], torch.Tensor]  # hidden states of a few tokens


def attach_checked(
    model: Model, settings: configuration.Adapter, *, seed: int, base: str
) -> "tuple[PeftModel, Targets]":
    """Add a new adapter to ``model.net`` and try it; return peft's wrapper and the targets.

    ``base``: the base model that the adapter's files name. ``all-linear`` leaves out the layers
    that fail, or whose adapter peft could not load again. UserError: a layer that was named fails,
    or peft finds no target.
    """
    net, ids_BT = model.net, make_row(model, FEW_TOKENS)
    states = functools.partial(model.trunk, ids_BT)
    targets = find_targets(net, settings.targets, ids_BT)
    attach = functools.partial(adapter.attach, net, settings, seed=seed, base=base)
    wrapper = attach(targets)
    faults = _find_unreadable(wrapper, targets.sites)
    if not faults and find_fault(net, targets.sites, states) is None:
        return wrapper, targets
    wrapper.unload()
    faults |= _find_faults(net, targets.without(faults), states, attach=attach)
    named = [name.strip() for name in settings.targets.split(",")]
    for site in targets.sites:
        if site.pattern in faults:
            _check_not_named(site, named, obstacle=faults[site.pattern])
    targets = targets.without(faults)
    if not targets.sites:
        pattern, obstacle = next(iter(faults.items()))
        raise UserError(
            f"--lora-targets {settings.targets}: no weight can have an adapter; {pattern}: "
            f"{obstacle}"
        )
    wrapper = attach(targets)
    fault = find_fault(net, targets.sites, states)
    if fault is not None:
        raise UserError(
            f"--lora-targets {settings.targets}: {fault}; name other layers, or omit --lora to "
            "train all weights"
        )
    return wrapper, targets


def _check_not_named(site: Site, named: list[str], *, obstacle: str) -> None:
    """Raise UserError if --lora-targets names a weight that cannot have an adapter."""
    for name in named:
        if name != ALL and site.is_called(name):
            raise UserError(
                f"--lora-targets {name}: {site.name} cannot have an adapter, because {obstacle}; "
                f"use {ALL} or other names"
            )


def _find_unreadable(wrapper: "PeftModel", sites: list[Site]) -> dict[str, str]:
    """Return the obstacle at each kind of layer whose saved adapter peft does not find again.

    On loading, peft applies the renaming of the model's type also to the names of an adapter.
    """
    peft = import_peft()
    state = peft.get_peft_model_state_dict(wrapper, adapter_name=NAME, save_embedding_layers=False)
    result = peft.set_peft_model_state_dict(wrapper, state, adapter_name=NAME)
    lost = {}
    for key in result.missing_keys:
        module, dot, _ = key.removeprefix("base_model.model.").partition(".lora_")
        if dot:
            lost[module] = key
    faults = {}
    for site in sites:
        if site.module in lost:
            renamed = next(iter(result.unexpected_keys), "another name")
            faults[site.pattern] = f"peft loads a saved adapter of it as {renamed}"
    return faults


def _find_faults(
    net: PreTrainedModel,
    targets: Targets,
    states: States,
    *,
    attach: "Callable[[Targets], PeftModel]",
) -> dict[str, str]:
    """Return the obstacle at each kind of layer that fails, by its pattern."""
    faults = {}
    for site in _first_of_each_kind(targets.sites):
        alone = Targets(sites=[site], obstacles={}, others=[])
        wrapper = attach(alone)
        fault = find_fault(net, [site], states)
        if fault is not None:
            faults[site.pattern] = fault
        wrapper.unload()
    return faults


def _first_of_each_kind(sites: list[Site]) -> list[Site]:
    """Return the first site of every pattern; the layers of a network repeat."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.pattern, site)
    return list(first.values())


@torch.no_grad()
def find_fault(net: PreTrainedModel, sites: list[Site], states: States) -> str | None:
    """Return how the network with an adapter differs from the one with merged weights.

    None: they are equal up to rounding. The adapter is random meanwhile, on one layer of each kind.
    """
    layers = adapter.adapted_layers(net)
    tried = [layers[site.name] for site in _first_of_each_kind(sites)]
    with _randomized(tried):
        try:
            with adapter.disable(net):
                base = states()
            adapted = states()
        except Exception as error:  # a layer's code sees another module and raises anything
            what = f"{type(error).__name__}: {one_line(error, 120)}"
            return f"its layer does not run with an adapter ({what})"
        if not torch.isfinite(base).all():
            return None  # the check of the output head reports it
        if adapter.find_packed(net) is not None:
            return None  # nothing can be merged
        with _merged(tried), adapter.disable(net):
            merged = states()
    return compare(base, adapted=adapted, merged=merged)


def compare(base: torch.Tensor, *, adapted: torch.Tensor, merged: torch.Tensor) -> str | None:
    """Return how far ``adapted`` and ``merged`` are apart; None if not farther than rounding.

    Each is [1, tokens, values]. A token counts if the adapter changes it. Half of these tokens may
    differ, because rounding can send a token to another expert.
    """
    tolerance, noise = TOLERANCE_OF_HALF_PRECISION, NOISE_OF_HALF_PRECISION
    if base.dtype == torch.float32:
        tolerance, noise = TOLERANCE, NOISE
    base, adapted, merged = base[0].float(), adapted[0].float(), merged[0].float()
    effect_T = torch.maximum((adapted - base).norm(dim=-1), (merged - base).norm(dim=-1))
    gap_T = (adapted - merged).norm(dim=-1)
    rounding_T = noise * base.norm(dim=-1)
    is_changed_T = effect_T > rounding_T
    differs_T = is_changed_T & (gap_T > tolerance * effect_T + rounding_T)
    if 2 * differs_T.sum() <= is_changed_T.sum():
        return None
    share = (gap_T / effect_T)[differs_T].median().item()
    return (
        "the network with the adapter differs from the one with merged weights by "
        f"{share:.0%} of the adapter's effect"
    )


def _factors(layer: "BaseTunerLayer") -> list[torch.nn.Parameter]:
    """Return A and B of one layer."""
    factors = []
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        container = getattr(layer, name, {})
        if NAME in container:
            factor = container[NAME]
            factors.append(getattr(factor, "weight", factor))
    return factors


@contextlib.contextmanager
def _randomized(layers: "list[BaseTunerLayer]") -> Iterator[None]:
    """Give the layers a random adapter inside the ``with`` block."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for layer in layers:
        for factor in _factors(layer):
            kept.append((factor, factor.detach().clone()))
    try:
        for layer in layers:
            _randomize(layer, generator)
        yield
    finally:
        for factor, value in kept:
            factor.copy_(value)


def _randomize(layer: "BaseTunerLayer", generator: torch.Generator) -> None:
    """Set the zero factor of a layer to random numbers, so that ‖ΔW‖ = STRENGTH·‖W‖."""
    factors = _factors(layer)
    zero = factors[-1]
    for factor in factors:
        if not factor.any():
            zero = factor
    zero.copy_(torch.randn(zero.shape, generator=generator))
    weight = getattr(layer.get_base_layer(), adapter.tensor_of(layer))
    size = adapter.read_delta(layer).float().norm().item()
    if weight.dtype in adapter.FULL_DTYPES and size:
        zero.mul_(STRENGTH * weight.float().norm().item() / size)


@contextlib.contextmanager
def _merged(layers: "list[BaseTunerLayer]") -> Iterator[None]:
    """Hold the merged weights in the layers inside the ``with`` block."""
    kept = []
    try:
        for layer in layers:
            weight = getattr(layer.get_base_layer(), adapter.tensor_of(layer))
            kept.append((weight, weight.data))
            weight.data = adapter.merge_tensor(layer)
        yield
    finally:
        for weight, data in kept:
            weight.data = data
