"""Tiny configs for every model class that the installed transformers can distil, for models.py.

A tiny config is the class's default config with its size fields replaced (``SIZES``) and its lists
of layers cut to one layer of every kind. ``OVERRIDES`` holds what these rules cannot know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VOCABULARY = 264  # 260 ids of the tokenizer; the last four rows are padding, as in real models
PAD, EOS, UNUSED = 256, 257, 263

# field name → size; the first pattern that matches wins, and no size is raised
SIZES = [
    (r"hidden_size_per_layer_input", 8),
    (r".*vocab_size.*|unpadded_vocab_size|.*group_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 512),
    (r"original_max_position_embeddings|max_target_positions|max_source_positions", 256),
    (r".*(lora_rank|low_?rank|laurel_rank|gate_rank|norm_rank|adapter_rank)$", 8),
    (r"index_head_dim", 32),
    (r"index_n_heads", 32),  # with few heads, scores after the ReLU are often equal, namely zero
    (r"index_topk|index_block_size|index_kpool", 8),
    (r"index_topk_blocks", 2),
    (r"qk_head_dim", 32),
    (r".*(head_dim|d_head|dim_head|headdim|head_size|kv_channels|d_kv)$|rotary_dim", 16),
    (r".*(query_groups|o_groups|num_kv_heads|kv_n_heads|num_key_value_heads|kv_heads)", 2),
    (
        r".*(n_heads|num_heads|n_head|attention_heads|mamba_heads|resampler_heads|value_heads|key_heads)",
        4,
    ),
    (r".*(d_state|state_size|ssm_state_size)", 8),
    (r"d_rel|linear_head_dim", 8),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 2),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_expand|expand", 1),  # so that heads × head size is the width
    (r"(zero_expert_num|.*num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r".*(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k)", 2),
    (r".*(shared_experts)", 1),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"base_channels|latent_channels|num_filters|.*_channels?$", 32),
    (r".*(sliding_window|window_size|window_len|local_attention|attention_chunk_size)", 8),
    (r"rel_extent|chunk_size|mamba_chunk_size|keep_window_size|sliding_window_size", 8),
    (r".*(first_k_dense_replace|num_dense_layers|start_index|sparse_step|layer_step)", 1),
    (r".*(layer_period|layer_group_size|every_n_layers|_layer_interval|n_layers_per_.*)", 2),
    (r".*(layer_offset)", 1),
    (r"image_size|resolution|crop_size|max_image_size", 32),
    (r"patch_size", 16),
    (r".*(intermediate_size(_mlp)?|ffn_dim|d_ff|dff|dim_ff|d_inner|mlp_dim|ffn_hidden_size)", 64),
    (r".*(feed_forward_size|expert_dim|ffn_size|intermediate_multiple_size)", 64),
    (r".*(hidden_size.*|d_model|n_embd|emb_dim|embed_dim|embedding_(dim|size)|hidden_dim)", 64),
    (r".*(projection_dim|proj_dim|output_dim|input_dim|lru_width|d_ssm|conv_dim|_out_dim)", 64),
    (r".*(hidden_size|embedding_size|width|embeds?_dim)$", 64),
]
LAYERS = re.compile(r"(num_hidden_layers|n_layers?|(de|en)coder_layers|num_layers|layers|depth)$")
OTHER_LAYERS = re.compile(r".*(_num_layers|num_.*_layers|_depth|num_blocks|max_window_layers)$")
# lists of layer numbers
INDICES = re.compile(
    r".*(_idxs|_indices|_indexes|_layer_ids?|only_layers|moe_layers|(attention|source|scaling)_layers)$"
)
# sizes that a default config leaves open
UNSET = {"head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
UNSET |= {"top_k_experts": 2}
# arguments of the default config, where the class refuses its own defaults
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
}
OVERRIDES = Path(__file__).with_name("model_overrides.yaml")
LABELS = ("id2label", "label2id")
TOKENS = re.compile(r".*_(token_id|token_index|token_ids)$|(.*_)?(start|end|newline|patch)_id$")


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """A class of transformers' mappings, and a ``model_type`` whose config it takes."""

    name: str
    model_type: str
    multimodal: bool


def list_classes() -> list[ModelClass]:
    """Return all classes of the causal mapping, then those with a text model of the image one."""
    from transformers.models.auto import modeling_auto

    classes = {}
    for multimodal, mapping in (
        (False, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (True, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        by_name: dict[str, list[str]] = {}
        for model_type, name in mapping.items():
            by_name.setdefault(name, []).append(model_type)
        for name, model_types in by_name.items():
            model_type = _choose_type(name, model_types)
            if name in classes or (multimodal and not _has_text_model(model_type)):
                continue
            classes[name] = ModelClass(name=name, model_type=model_type, multimodal=multimodal)
    return list(classes.values())


def _choose_type(name: str, model_types: list[str]) -> str:
    """Return the model type whose config the class names as its own, or else the first one."""
    import transformers

    if len(model_types) == 1:  # importing every class takes half a minute
        return model_types[0]

    own = getattr(getattr(transformers, name), "config_class", None)
    for model_type in model_types:
        if transformers.CONFIG_MAPPING[model_type] is own:
            return model_type
    return model_types[0]


def _has_text_model(model_type: str) -> bool:
    """Return whether a config has a vocabulary, itself or in its text model."""
    config = _default_config(model_type)
    return hasattr(config.get_text_config(decoder=True), "vocab_size")


def _default_config(model_type: str):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {}))


def tiny_config(model_type: str):
    """Return the tiny config of a model type."""
    config = _default_config(model_type)
    fields = shrink(config.to_dict())
    for override in yaml.safe_load(OVERRIDES.read_text(encoding="utf-8")):
        _merge(fields, override.get(model_type, {}))
    return type(config).from_dict(fields)


def build(model_class: ModelClass, seed: int):
    """Return a random float32 network of a class, whose next-token distributions are not flat."""
    import torch

    config = tiny_config(model_class.model_type)
    network_class = choose_network(model_class, config)
    torch.manual_seed(seed)
    net = network_class._from_config(find_config(config, network_class.config_class))
    spread_weights(net.float())
    return net.eval(), config


def choose_network(model_class: ModelClass, config):
    """Return the class, or the multimodal one around it if its own config loads no model."""
    import transformers

    network_class = getattr(transformers, model_class.name)
    around = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), network_class)
    if network_class.config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return network_class
    return around


def find_config(config, wanted: type | None):
    """Return the config, or the one inside it that is of the wanted class."""
    if wanted is None or isinstance(config, wanted):
        return config
    for name in config.sub_configs:
        if isinstance(getattr(config, name), wanted):
            return getattr(config, name)
    return config


def spread_weights(net) -> None:
    """Replace the small initial weights of matrices, so that layers matter; keep the other ones.

    A convolution and the parameters of a recurrence keep their initial values.
    """
    import torch

    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() in (2, 3) and not re.search(r"conv|A_log|dt_|\.A$|\.D$", name):
                p.copy_(torch.randn_like(p) * 0.15)
            elif p.dim() == 1 and name.endswith(("weight", "bias")):
                p.add_(torch.randn_like(p) * 0.05)


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Replace fields; a dict changes only the fields that it names."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(key), dict):
            _merge(fields[key], value)
        else:
            fields[key] = value


def shrink(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config with tiny sizes, also of the configs inside it."""
    kept = choose_layers(fields)
    small = {}
    for key, value in fields.items():
        if key in LABELS or (
            isinstance(value, dict) and not all(isinstance(k, str) for k in value)
        ):
            small[key] = value
        elif key == "per_layer_config" and kept:
            small[key] = _cut_layer_configs(value, kept)
        elif isinstance(value, dict):
            small[key] = shrink_rope(value) if "rope" in key else shrink(value)
        elif kept and isinstance(value, list):
            small[key] = _cut_list(key, value, kept, _count_layers(fields))
        elif kept and LAYERS.fullmatch(key):
            small[key] = len(kept)
        else:
            small[key] = shrink_field(key, value)
    if small.get("is_decoder") is False:
        small["is_decoder"] = True  # as in every checkpoint of a causal language model
    if "num_attention_heads" in fields and fields.get("num_key_value_heads", 0) is None:
        small["num_key_value_heads"] = 2
    parts = [fields.get("qk_nope_head_dim") or 0, fields.get("qk_rope_head_dim") or 0]
    if all(parts) and fields.get("head_dim") == sum(parts):
        small["head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if "kv_lora_rank" in fields:
        small["num_key_value_heads"] = small["num_attention_heads"]
    shared = fields.get("num_kv_shared_layers")
    if shared:
        small["num_kv_shared_layers"] = len(kept) // (1 if shared == _count_layers(fields) else 2)
    return small


def shrink_field(key: str, value: Any) -> Any:
    """Return the tiny value of one field."""
    if value is None:
        return UNSET.get(key)
    if isinstance(value, list) and not INDICES.fullmatch(key):
        return [shrink_field(key, v) for v in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key == "pad_token_id":
        return PAD
    if key == "eos_token_id":
        return EOS
    if TOKENS.fullmatch(key):
        return UNUSED
    if OTHER_LAYERS.fullmatch(key):
        return min(value, 2)
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return min(value, size)
    return value


def shrink_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters for a tiny head: sections of 8 frequencies in total."""
    small: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            small[key] = shrink_rope(value)
        elif key == "mrope_section":
            small[key] = [4, 2, 2][: len(value)]
        elif key == "original_max_position_embeddings":
            small[key] = 64
        else:
            small[key] = value
    return small


def _count_layers(fields: dict[str, Any]) -> int:
    for key, value in fields.items():
        if LAYERS.fullmatch(key) and isinstance(value, int):
            return value
    return 0


def choose_layers(fields: dict[str, Any]) -> list[int]:
    """Return at least two layers, with every kind that the lists of layers distinguish."""
    count = _count_layers(fields)
    if not count:
        return []
    kinds: dict[tuple, int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(_kinds_of(fields, layer, count)), layer)
    kept = sorted(kinds.values())
    if fields.get("num_kv_shared_layers"):
        # the layers that share a cache follow one layer of each kind that has its own
        kept = [0, *(k for k in kept if k)] * 2
        return kept
    for layer in range(count):
        if len(kept) >= 2:
            break
        if layer not in kept:
            kept.append(layer)
    if count == 1:
        return [0]
    return sorted(kept)


def _kinds_of(fields: dict[str, Any], layer: int, count: int) -> Iterator[Any]:
    for key, value in fields.items():
        if key == "per_layer_config" and value:
            yield str(value.get(f"{layer:02}", value.get(str(layer))))
        if not isinstance(value, list) or not value:
            continue
        if INDICES.fullmatch(key):
            yield layer in value
        elif len(value) == count and not isinstance(value[0], (dict, list, float)):
            yield value[layer]


def _cut_layer_configs(value: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the configs of the kept layers, by their new numbers."""
    configs = {int(layer): config for layer, config in value.items()}
    return {str(new): shrink(configs[old]) for new, old in enumerate(kept) if old in configs}


def _cut_list(key: str, value: list, kept: list[int], count: int) -> list:
    if INDICES.fullmatch(key):
        return [new for new, old in enumerate(kept) if old in value]
    if len(value) == count:
        value = [value[layer] for layer in kept]
    return shrink_field(key, value)
