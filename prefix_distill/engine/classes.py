"""The transformers class of a config's language model."""

import inspect
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from ..errors import UserError

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def choose_class(name: str, config: PreTrainedConfig) -> AutoClass:
    """Return the class that loads the model ``name``, which writes text.

    Multimodal models without a causal class load by the class for images and text, with their
    towers. UserError: there is no class, or its text depends on an encoder.
    """
    own_code = getattr(config, "auto_map", None) or {}
    for auto_class, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        is_known = _can_be_loaded_again(mapping.get(type(config), None))
        if not is_known and auto_class.__name__ not in own_code:
            continue
        if auto_class is AutoModelForImageTextToText and _has_encoder(config):
            raise UserError(
                f"model {name}: {type(config).__name__} describes a decoder that reads an "
                "encoder's states (is_encoder_decoder), which text alone does not give"
                f"{_describe_cross_attention(config)}; use a decoder-only model"
            )
        return auto_class
    raise UserError(
        f"model {name}: {type(config).__name__} describes no model that writes text "
        f"({_describe_mapping(config)}); use a causal language model"
    )


def _describe_mapping(config: PreTrainedConfig) -> str:
    """Return why no mapping has a class that can be loaded again for a config."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        model_class: Any = mapping.get(type(config), None)
        if model_class is not None:
            own = model_class.config_class.__name__
            return (
                f"its class {model_class.__name__} saves the config class {own}, for which no "
                "mapping of transformers has a model, so a trained copy could not be loaded"
            )
    return "neither AutoModelForCausalLM nor AutoModelForImageTextToText has a class for it"


def _describe_cross_attention(config: PreTrainedConfig) -> str:
    """Return a clause on the first module that reads the encoder's states, or nothing.

    The network is built without weights.
    """
    try:
        with torch.device("meta"):
            net = AutoModelForImageTextToText.from_config(config)
        decoder = set(net.get_decoder().modules())
    except Exception:  # the config alone is refused; a network may raise anything
        return ""
    readers = []
    for name, module in net.named_modules():
        arguments = inspect.signature(module.forward).parameters
        if module in decoder and "encoder_hidden_states" in arguments:
            readers.append(name)
    for name in readers:
        if not any(other.startswith(f"{name}.") for other in readers):
            return f": {name} needs the tensor encoder_hidden_states"
    return ""


def _can_be_loaded_again(model_class: Any) -> bool:
    """Return whether the class saves a config from which a model can be loaded.

    The text half of some multimodal models has a config that no mapping knows.
    """
    config: Any = getattr(model_class, "config_class", None)
    return config in MODEL_FOR_CAUSAL_LM_MAPPING or config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _has_encoder(config: PreTrainedConfig) -> bool:
    text = config.get_text_config(decoder=True)
    return bool(getattr(config, "is_encoder_decoder", False)) or bool(
        getattr(text, "is_encoder_decoder", False)
    )
