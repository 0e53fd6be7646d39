"""LoRA through peft: the student's own weights stay as they are, a low-rank correction of its
linear layers is trained.

W x + (α/r)·B A x,   A [r, in] random, B [out, r] zero, both float32                       [LoRA,
                     arXiv 2106.09685, eq. 3]
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
from ..errors import UserError
from ..maths.seeds import seed_of

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .transformers_names import CausalLM

FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's for the one adapter


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError(
            'LoRA adapters need the package peft; pip install "prefix-distill[lora]"'
        ) from None
    return peft


def attach(
    net: PreTrainedModel, settings: configuration.Adapter, seed: int, base: str
) -> "PeftModel":
    """Puts a fresh adapter into ``net``'s target layers → peft's wrapper of the same network.
    Nothing else trains.

    ``settings``: the ``adapter`` section; ``base``: the model that the adapter's files will name. A
    is drawn by ``seed``, whatever has been drawn before. UserError where peft finds no target
    layer.
    """
    if settings.rank is None:
        raise ValueError("adapter.rank is None: set a rank to attach an adapter")
    peft = _peft()
    targets = (
        settings.targets
        if settings.targets == "all-linear"
        else [name.strip() for name in settings.targets.split(",")]
    )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=targets,
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
            f"--lora-targets {settings.targets}: {' '.join(str(error).split())[:200]}; use "
            "all-linear, or names of linear layers such as q_proj,v_proj"
        ) from None
    wrapper.peft_config[NAME].base_model_name_or_path = base
    return wrapper


@contextlib.contextmanager
def without(net: torch.nn.Module) -> Iterator[None]:
    """``net`` as it was before an adapter came, while this lasts."""
    layers = _layers(net)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(net: torch.nn.Module) -> "list[BaseTunerLayer]":
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def merged(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the network without adapter that computes what ``net`` computes with it: W
    + (α/r)·B A, in W's dtype. ``net`` itself is not touched."""
    deltas = {}
    for layer in _layers(net):
        delta = layer.get_delta_weight(NAME)  # type: ignore[attr-defined]  # every LoRA layer has this method
        deltas[id(layer.get_base_layer().weight)] = delta
    state = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        delta = deltas.get(id(tensor))
        value = (
            tensor.detach()
            if delta is None
            else (tensor.detach().float() + delta.float()).to(tensor.dtype)
        )
        state[name.replace(".base_layer.", ".")] = value
    return state


def base_of(folder: Path) -> str:
    """The model that the adapter in ``folder`` was trained on. UserError where its files are not
    peft's, or are pickled."""
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


def applied(net: "CausalLM", folder: Path) -> "CausalLM":
    """``net`` with the adapter in ``folder`` added to its weights, for good. UserError where
    they do not fit each other."""
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(net, str(folder)).merge_and_unload()
    except (
        Exception
    ) as error:  # peft raises anything from KeyError to RuntimeError on files that do not fit
        raise UserError(
            f"model {folder}: its adapter does not fit the base model ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); name the base it was trained on in {FILE}"
        ) from None
