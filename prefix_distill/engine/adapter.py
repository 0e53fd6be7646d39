"""LoRA adapters through peft: the student's weights are frozen, and a low-rank update of its linear
layers is trained.

W x + (α/r)·B A x,   A [r, in] random, B [out, r] zero, both float32

Source: LoRA, arXiv 2106.09685, eq. 3.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .. import config as configuration
from ..errors import UserError, one_line
from ..maths.seeds import seed_of

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .transformers_names import CausalLM

FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's name of a single adapter


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError(
            "LoRA adapters need the package peft; install the extra lora: "
            'pip install -e ".[lora]" in the checkout'
        ) from None
    return peft


def attach(
    net: PreTrainedModel,
    settings: configuration.Adapter,
    *,
    seed: int,
    base: str,
    excluded: list[str] | None = None,
) -> "PeftModel":
    """Add a new adapter to the target layers of ``net`` and return peft's wrapper of ``net``.

    Only the adapter is trained. ``settings``: the ``adapter`` section; ``base``: the base model
    that the adapter's files name; ``excluded``: modules that get no adapter. A depends on ``seed``
    only. UserError: peft finds no target layer.
    """
    if settings.rank is None:
        raise ValueError("adapter.rank is None: set a rank to attach an adapter")
    peft = _peft()
    targets: str | list[str] = settings.targets
    if settings.targets != "all-linear":
        targets = [name.strip() for name in settings.targets.split(",")]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=targets,
        exclude_modules=excluded or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "adapter"))
            wrapper = peft.get_peft_model(net, config)
    except ValueError as error:
        raise UserError(
            f"--lora-targets {settings.targets}: {one_line(error)}; use all-linear, or names of "
            "linear layers such as q_proj,v_proj"
        ) from None
    wrapper.peft_config[NAME].base_model_name_or_path = base
    return wrapper


@contextlib.contextmanager
def disable(net: torch.nn.Module) -> Iterator[None]:
    """Run ``net`` without its adapter inside the ``with`` block."""
    layers = _adapted_layers(net)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _adapted_layers(net: torch.nn.Module) -> "list[BaseTunerLayer]":
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def merge_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of an equal network without adapter; ``net`` does not change.

    W + (α/r)·B A, in W's dtype
    """
    deltas = {}
    for layer in _adapted_layers(net):
        delta = layer.get_delta_weight(NAME)  # type: ignore[attr-defined]  # every LoRA layer has this method
        deltas[id(layer.get_base_layer().weight)] = delta
    state = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        value = tensor.detach()
        if id(tensor) in deltas:
            value = (value.float() + deltas[id(tensor)].float()).to(tensor.dtype)
        state[name.replace(".base_layer.", ".")] = value
    return state


def read_base(folder: Path) -> str:
    """Return the base model of the adapter in ``folder``.

    UserError: the files are not in peft's format, or the weights are pickled.
    """
    try:
        base = json.loads((folder / FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"model {folder}: its {FILE} names no base model; repair base_model_name_or_path in it"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"model {folder}: it has no {WEIGHTS}; expected an adapter in peft's format as "
            "safetensors"
        )
    return base


def merge_into(net: "CausalLM", folder: Path) -> "CausalLM":
    """Return ``net`` with the adapter in ``folder`` added to its weights.

    UserError: they do not fit each other.
    """
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(net, str(folder)).merge_and_unload()
    except Exception as error:  # peft raises anything from KeyError to RuntimeError here
        raise UserError(
            f"model {folder}: its adapter does not fit the base model ({type(error).__name__}: "
            f"{one_line(error)}); name the base it was trained on in {FILE}"
        ) from None
