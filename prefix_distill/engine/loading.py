"""Load a model from a hub id, a folder, an adapter, a GGUF file or a built-in task."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .. import config as configuration
from ..errors import UserError, first_line, one_line
from ..lab.task import LAB, model_path
from ..prompts.sources import is_path
from . import adapter
from .adapter import FILE
from .hub import check_reachable
from .models import Model
from .placement import PLAIN, Storage, make_quantization, plan_spread

if TYPE_CHECKING:
    from .transformers_names import CausalLM

ADAPTER = {"adapter": True}
MOST_LAYERS = 1000  # published language models have a few hundred at most
# largest difference in nats between the model's logits and head(trunk)
LOGIT_TOLERANCE = 1e-3
LOGIT_TOLERANCE_OF_HALF_PRECISION = 0.25


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    storage: Storage = PLAIN,
) -> Model:
    """Load a model by hub id, folder (weights or a LoRA adapter), ``.gguf`` file or
    ``lab:TASK/ROLE``. Dropout is off and all weights are frozen.

    ``dtype``: "auto" for that of the files. It reads safetensors or GGUF, never pickle, and runs no
    code of the folder without ``trust_remote_code``. ``storage``: quantized, or spread over devices
    with the head on ``device``.

    UserError: the model is missing or unreadable, lacks a weight that its config.json names, has no
    EOS id, or has weights that are not finite.
    """
    folder, extra = locate(name)
    if extra == ADAPTER and storage == PLAIN:
        return _load_with_adapter(
            name, Path(folder), device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if extra and storage != PLAIN:
        raise UserError(
            f"model {name}: an adapter or a .gguf file cannot be quantized or spread over devices; "
            "export it to a folder of weights first (prefix-distill export)"
        )
    gguf = _gguf_argument(extra)
    package = storage.package
    if gguf:
        package = "gguf"
    scratch = None
    with _explain_failure(name, package):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **gguf
        )
        if not extra:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            check_config(name, folder, config)
        if storage.quantize != "none":
            quantization = make_quantization(storage.quantize, dtype)
            extra = {"quantization_config": quantization, "device_map": {"": device}}
        if storage.spread is not None:
            scratch = tempfile.TemporaryDirectory(prefix="prefix-distill-")
            device_map = plan_spread(
                config, device, dtype, limit=storage.spread, trust_remote_code=trust_remote_code
            )
            extra = {"device_map": device_map, "offload_folder": scratch.name}
        net, loading_info = _read_weights(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
    _check_complete(name, loading_info)
    if storage == PLAIN:
        net = net.to(device)
    model = _make_model(name, net, tokenizer)
    _check_finite(model)
    if storage.spread is None:
        return model
    return replace(model, home=device, scratch=scratch)


def _gguf_argument(extra: dict) -> dict:
    """Return the argument of ``from_pretrained`` that names a GGUF file, if any."""
    if "gguf_file" in extra:
        return {"gguf_file": extra["gguf_file"]}
    return {}


def _read_weights(folder: str, **options: Any) -> tuple["CausalLM", dict[str, Any]]:
    """Return the network and its loading info, which lists missing and mismatched weights."""
    safetensors_only: bool | None = True
    if "gguf_file" in options:
        safetensors_only = None
    return AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=safetensors_only,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # _check_complete reports them by name
        **options,
    )  # type: ignore[return-value]  # with output_loading_info, it returns a pair


@contextlib.contextmanager
def _explain_failure(name: str, package: str | None) -> Iterator[None]:
    """Turn the libraries' exceptions for a model's files into UserError."""
    try:
        yield
    except ImportError as error:
        hint = first_line(error)
        if package is not None:
            hint = f'install the extra {package}: pip install -e ".[{package}]" in the checkout'
        raise UserError(f"model {name}: a package is missing; {hint}") from None
    except UserError:
        raise
    except Exception as error:  # unreadable files raise anything from OSError to struct.error
        check_reachable(name, error)
        hint = "give a hub id, a folder with config.json and safetensors, or a readable .gguf file"
        if "trust_remote_code" in str(error):
            hint = "read that code, then add --trust-remote-code to run it"
        raise UserError(
            f"model {name}: cannot be loaded ({type(error).__name__}: {one_line(error)}); {hint}"
        ) from None


def _check_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Raise UserError if a weight is missing or has the wrong shape."""
    mismatched = sorted(loading_info["mismatched_keys"])
    if mismatched:
        key, in_file, in_config = mismatched[0]
        raise UserError(
            f"model {name}: weight {key} has shape {list(in_file)}, but its config.json asks for "
            f"{list(in_config)} ({len(mismatched)} such weights); use the config.json that came "
            "with the weights"
        )
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise UserError(
            f"model {name}: its files lack the weight {missing[0]} that its config.json asks for "
            f"({len(missing)} such weights); use a complete copy"
        )


def _make_model(name: str, net: "CausalLM", tokenizer: PreTrainedTokenizerBase) -> Model:
    """Return the frozen Model of a loaded network, whose own generation config becomes blank.

    UserError: the model has no EOS token.
    """
    generation_config = net.generation_config
    net.generation_config = GenerationConfig()
    vocabulary = len(net.get_output_embeddings().weight)
    eos = _read_eos(name, generation_config, tokenizer, vocabulary=vocabulary)
    return Model(
        name=name,
        net=net.eval().requires_grad_(False),
        tokenizer=tokenizer,
        generation_config=generation_config,
        eos=eos,
    )


def _check_finite(model: Model) -> None:
    """Raise UserError if a weight contains NaN or infinity."""
    for key, weight in model.net.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise UserError(
                f"model {model.name}: weight {key} contains NaN or infinity; use an intact copy"
            )


def count_parameters(name: str, trust_remote_code: bool = False) -> int:
    """Return a model's number of parameters from its config, without its weights."""
    folder, extra = locate(name)
    if extra == ADAPTER:
        return count_parameters(adapter.read_base(Path(folder)), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **_gguf_argument(extra)
        )
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # unreadable files raise anything, as in _explain_failure
        check_reachable(name, error)
        raise UserError(
            f"model {name}: its config cannot be read ({type(error).__name__}: {one_line(error)}); "
            "give a hub id or a folder with config.json"
        ) from None
    return sum(p.numel() for p in net.parameters())


def _load_with_adapter(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool,
) -> Model:
    """Load the base model of an adapter in peft's format and add the adapter to its weights."""
    base = adapter.read_base(folder)
    if (Path(base) / FILE).is_file():
        raise UserError(
            f"model {name}: its base model {base} is an adapter itself; merge that first "
            "(prefix-distill export)"
        )
    loaded_dtype: torch.dtype | Literal["auto"] = torch.float32
    if dtype == "auto":
        loaded_dtype = "auto"
    model = load_model(
        base,
        device=torch.device("cpu"),
        dtype=loaded_dtype,
        trust_remote_code=trust_remote_code,
    )
    net = adapter.merge_into(model.net, folder)
    if dtype != "auto":
        net = net.to(dtype)
    model.net = net.to(device).eval().requires_grad_(False)
    model.name = name
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model


def add_adapter(model: Model, settings: configuration.Adapter, seed: int) -> Model:
    """Return ``model`` with a new LoRA adapter that is trained; its weights keep their dtype."""
    path = Path(os.path.expanduser(model.name))
    if (path / FILE).is_file():
        raise UserError(
            f"--lora with --student {model.name}: it is an adapter itself; merge it first "
            "(prefix-distill export)"
        )
    base = model.name
    if base.startswith(LAB):
        base, _ = locate(base)  # the adapter's base must also load in plain transformers
    elif os.path.exists(path):
        base = str(path.absolute())
    return replace(model, adapter=adapter.attach(model.net, settings, seed=seed, base=base))


def locate(name: str) -> tuple[str, dict]:
    """Return a model's folder or hub id, and further arguments of ``from_pretrained``.

    Of a folder that contains an adapter, the second value is ADAPTER. UserError: the path does not
    exist.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for ~NOBODY
    if name.startswith(LAB):
        task, _, role = name[len(LAB) :].partition("/")
        try:
            return str(model_path(task, role)), {}
        except ValueError as error:
            raise UserError(f"model {name}: {error}") from None
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise UserError(f"model {name}: no such file; check the path")
        from transformers import GgufConfig

        return str(path.parent), {
            "gguf_file": path.name,
            "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True),
        }
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        if is_path(name) or name.count("/") > 1:
            raise UserError(f"model {name}: no such folder; check the path")
        return name, {}
    if (path / "config.json").is_file():
        return str(path), {}
    if (path / FILE).is_file():
        return str(path), ADAPTER
    raise UserError(
        f"model {name}: the folder has no config.json; give a folder written by save_pretrained"
    )


def check_config(name: str, folder: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a config or file list that transformers would misread silently."""
    text = config.get_text_config(decoder=True)
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise UserError(
                f"model {name}: its config.json has {key} {value}; expected at least 1; use the "
                "config.json that came with the weights"
            )
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(
            f"model {name}: its config.json has num_hidden_layers {layers}; expected at most "
            f"{MOST_LAYERS}; use the config.json that came with the weights"
        )
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if not file.endswith(".safetensors"):
                raise UserError(
                    f"model {name}: {index.name} names {file}; expected .safetensors files only; "
                    "convert the weights"
                )
    if (Path(folder) / "generation_config.json").is_file():
        # loading the model would use config.json instead of a damaged file
        GenerationConfig.from_pretrained(folder)


def _read_eos(
    name: str,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
) -> frozenset[int]:
    """Return the EOS ids of the generation config and the tokenizer.

    UserError: there is none, or one is not an id below ``vocabulary``.
    """
    configured = generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    ids = set()
    for i in (*configured, tokenizer.eos_token_id):
        if i is None:
            continue
        if type(i) is not int or not 0 <= i < vocabulary:
            raise UserError(
                f"model {name}: EOS id {i!r}; expected an id of its vocabulary, 0 to "
                f"{vocabulary - 1}; repair eos_token_id in generation_config.json"
            )
        ids.add(i)
    if not ids:
        raise UserError(
            f"model {name}: neither its generation config nor its tokenizer names an "
            "end-of-sequence (EOS) token; set eos_token in tokenizer_config.json"
        )
    return frozenset(ids)


def check_head_rows(model: Model) -> None:
    """Raise UserError if the tokenizer has more ids than the head has rows."""
    ids = max(model.tokenizer.get_vocab().values(), default=-1) + 1
    rows = len(model.net.get_output_embeddings().weight)
    if rows < ids:
        raise UserError(
            f"vocabulary: the tokenizer of {model.name} has ids up to {ids - 1}, but its head has "
            f"only {rows} rows; resize the model's embeddings or use its own tokenizer"
        )


@torch.no_grad()
def check_head(model: Model) -> float:
    """Return the largest difference between head(trunk) and the model's logits, in nats.

    UserError: they differ too much, so that the loss would train another distribution, or they are
    not finite.
    """
    ids = torch.tensor([sorted(model.tokenizer.get_vocab().values())[:8]], device=model.device)
    ours = model.head().logits(model.trunk(ids)[0])
    with model.adapter_context():
        output = model.net(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    theirs = output.logits[0, :, : model.support].float().to(ours.device)
    if not torch.isfinite(theirs).all():
        raise UserError(
            f"model {model.name}: its logits contain NaN or infinity; use an intact copy or "
            "--dtype float32"
        )
    gap = (torch.log_softmax(ours, -1) - torch.log_softmax(theirs, -1)).abs().max().item()
    tolerance = LOGIT_TOLERANCE_OF_HALF_PRECISION
    if model.net.dtype == torch.float32:
        tolerance = LOGIT_TOLERANCE
    if gap > tolerance:
        raise UserError(
            f"model {model.name}: head(hidden states) does not equal its logits (they differ by "
            f"{gap:.2g} nats in log-probability); this architecture is not supported"
        )
    return gap
