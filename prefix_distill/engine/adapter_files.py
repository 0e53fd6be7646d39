"""Read an adapter in peft's format and merge it into its base model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, one_line
from .adapter import NAME, adapted_layers, tied_configs
from .adapter_check import compare
from .peft_names import import_peft

if TYPE_CHECKING:
    from peft import PeftModel

    from .transformers_names import CausalLM

FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# kinds of adapters that add vectors to the prompt or to the KV cache
VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def read_base(folder: Path) -> str:
    """Return the base model of the adapter in ``folder``, with the revision that it names.

    UserError: the files are not in peft's format, the weights are pickled, or the adapter is of a
    kind that has no merged weights.
    """
    try:
        settings = json.loads((folder / FILE).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        settings, base = {}, None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"model {folder}: its {FILE} names no base model; repair base_model_name_or_path in it"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"model {folder}: it has no {WEIGHTS}; expected an adapter in peft's format as "
            "safetensors"
        )
    kind = settings.get("peft_type")
    if kind in VIRTUAL_TOKENS:
        raise UserError(
            f"model {folder}: an adapter of type {kind} is a prefix of vectors, which no change of "
            "the weights equals; expected LoRA or another adapter of weights"
        )
    revision = settings.get("revision")
    if isinstance(revision, str) and revision and not Path(base).exists():
        return f"{base}@{revision}"
    return base


def merge_folder(net: "CausalLM", folder: Path, ids_BT: torch.Tensor) -> "CausalLM":
    """Return ``net`` with the adapter in ``folder`` added to its weights.

    ``ids_BT``: the text on which both are compared. UserError: they do not fit each other, or the
    merged network differs from the one with adapter.
    """
    if getattr(net, "is_quantized", False):
        raise UserError(
            f"model {folder}: its base model has quantized weights, into which no adapter can be "
            "merged; use the full weights as base"
        )
    plain = _compute_logits(net, ids_BT)
    wrapper = _load_onto(net, folder)
    adapted = _compute_logits(wrapper, ids_BT)
    net = _merge(wrapper)
    vocabulary = min(plain.shape[-1], adapted.shape[-1])
    gap = compare(
        plain[..., :vocabulary],
        adapted=adapted[..., :vocabulary],
        merged=_compute_logits(net, ids_BT)[..., :vocabulary],
    )
    if gap is not None:
        raise UserError(
            f"model {folder}: its adapter cannot be merged ({gap}); expected an adapter of layers "
            "that are used in one place each"
        )
    return net


@torch.no_grad()
def _compute_logits(net: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return net(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits


def _load_onto(net: "CausalLM", folder: Path) -> "PeftModel":
    """Return ``net`` with the adapter in ``folder`` as a part of its own.

    UserError: they do not fit each other.
    """
    peft = import_peft()
    try:
        _resize_vocabulary(net, folder)
        config = peft.PeftConfig.from_pretrained(str(folder))
        wrapper = peft.get_peft_model(net, config)
        result = wrapper.load_adapter(str(folder), NAME)
    except Exception as error:  # peft raises anything from KeyError to RuntimeError here
        raise UserError(
            f"model {folder}: its adapter does not fit the base model ({type(error).__name__}: "
            f"{one_line(error)}); name the base it was trained on in {FILE}"
        ) from None
    for names, fault in (
        (result.unexpected_keys, "has no place in the base model"),
        (result.missing_keys, f"is not in {WEIGHTS}"),
    ):
        if names:
            raise UserError(
                f"model {folder}: its adapter does not fit the base model, because {names[0]} "
                f"{fault} ({len(names)} such tensors); name the base it was trained on in {FILE}"
            )
    return wrapper


def _resize_vocabulary(net: "CausalLM", folder: Path) -> None:
    """Give ``net`` as many rows of the vocabulary as the adapter's file has.

    peft saves embedding and head as a whole if the vocabulary was resized for training.
    ValueError: the file lacks the rows that the base does not have.
    """
    from safetensors import safe_open

    rows = {}
    embedding: Any = net.get_input_embeddings()
    head: Any = net.get_output_embeddings()
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
        for part in (embedding, head):
            for name, module in net.named_modules():
                key = f"base_model.model.{name}.weight"
                if module is part and key in names:
                    rows[id(part.weight)] = file.get_slice(key).get_shape()[0]
    if not rows or max(rows.values()) == len(embedding.weight):
        return
    if rows.keys() != {id(embedding.weight), id(head.weight)}:
        raise ValueError("it was trained with more tokens, but holds only embedding or head")
    net.resize_token_embeddings(max(rows.values()), mean_resizing=False)


def _merge(wrapper: "PeftModel") -> "CausalLM":
    """Return the network with the adapter added to its weights.

    A head that is tied to the embedding gets its own weight if either of them has an adapter.
    """
    net: Any = wrapper.get_base_model()
    layers = adapted_layers(net).values()
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    is_tied = _weight_owner(head).weight is _weight_owner(embedding).weight
    if is_tied and (head in layers or embedding in layers):
        owner = _weight_owner(head)
        owner.weight = torch.nn.Parameter(owner.weight.detach().clone(), requires_grad=False)
    net = wrapper.merge_and_unload()
    if net.get_output_embeddings().weight is not net.get_input_embeddings().weight:
        for config in tied_configs(net):
            config.tie_word_embeddings = False
    return net


def _weight_owner(module: Any) -> Any:
    """Return the module that holds the weight, which may lie inside an adapter's layer."""
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    return module
