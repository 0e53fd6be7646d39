"""Load a model from a hub id, a folder, an adapter, a GGUF file or a built-in task."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from .. import config as configuration
from ..errors import UserError, first_line, one_line
from ..lab.task import LAB
from ..prompts.sources import split_revision
from . import adapter, adapter_check, adapter_files, targets
from .adapter_files import FILE
from .casting import cast
from .classes import AutoClass, choose_class
from .dropout import turn_off_dropout
from .folders import ADAPTER, check_config, describe_left_over, locate
from .hub import check_reachable, contacting, find_pinned
from .kept_state import find_blanks
from .model_files import read_tokenizer
from .models import Model
from .placement import PLAIN, Storage, make_quantization, plan_spread
from .text_ids import make_row
from .trace import describe_logits

if TYPE_CHECKING:
    from .transformers_names import CausalLM


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
    output layer or no EOS id, or has weights that are not finite.
    """
    find_pinned(name)  # locate downloads no weights
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
    package = "gguf" if gguf else storage.package
    with _explain_failure(name, package):
        with contacting(folder):
            options = {"trust_remote_code": trust_remote_code, **gguf}
            tokenizer = read_tokenizer(name, folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
            if not extra:
                check_config(name, folder, config)
        extra |= _quantization_options(storage, device, dtype)
        scratch = None
        if storage.spread is not None:
            scratch = tempfile.TemporaryDirectory(prefix="prefix-distill-")
            device_map = plan_spread(
                config, device, dtype, limit=storage.spread, trust_remote_code=trust_remote_code
            )
            extra = {"device_map": device_map, "offload_folder": scratch.name}
        auto_class = choose_class(name, config)
        net, loading_info = _read_weights(
            auto_class, folder, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
    _check_complete(name, loading_info)
    _check_unadapted(name, net)
    if storage == PLAIN:
        net.to(device)
    model = _make_model(name, net, tokenizer)
    _check_finite(model)
    model.left_out = describe_left_over(name, folder)
    if storage.spread is None:
        return model
    return replace(model, home=device, scratch=scratch)


def _quantization_options(
    storage: Storage, device: torch.device, dtype: torch.dtype | Literal["auto"]
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize the weights, if any."""
    if storage.quantize == "none":
        return {}
    quantization = make_quantization(storage.quantize, dtype)
    return {"quantization_config": quantization, "device_map": {"": device}}


def _check_unadapted(name: str, net: "CausalLM") -> None:
    """Raise UserError if transformers has added an adapter to the loaded weights."""
    if getattr(net, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {name}: it holds a model and an adapter ({FILE}), which transformers added to "
            "the weights; use a copy with only one of them"
        )


def _gguf_argument(extra: dict) -> dict:
    """Return the argument of ``from_pretrained`` that names a GGUF file, if any."""
    if "gguf_file" in extra:
        return {"gguf_file": extra["gguf_file"]}
    return {}


# A subfolder that no model has: transformers looks for an adapter there, and adds none.
NO_ADAPTER = {"subfolder": ".no-adapter"}


def _read_weights(
    auto_class: AutoClass, folder: str, **options: Any
) -> tuple["CausalLM", dict[str, Any]]:
    """Return the network and its loading info, which lists missing and mismatched weights."""
    safetensors_only: bool | None = True
    if "gguf_file" in options:
        safetensors_only = None
        if options["dtype"] == "auto":
            options["dtype"] = None  # GGUF names no dtype, and "auto" asks the suffix in lower case
    if os.path.isdir(folder):
        options["adapter_kwargs"] = NO_ADAPTER
    return auto_class.from_pretrained(
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

    UserError: the model has no output layer, or no EOS token.
    """
    if net.get_output_embeddings() is None:
        raise UserError(
            f"model {name}: {type(net).__name__} names no output layer (get_output_embeddings is "
            f"None), so the loss has no head to compute logits with; {describe_logits(net)}; use "
            "another model"
        )
    generation_config = net.generation_config
    net.generation_config = GenerationConfig()
    blanks = find_blanks(net)
    turn_off_dropout(net)
    vocabulary = len(net.get_output_embeddings().weight)
    eos = _read_eos(name, generation_config, tokenizer, vocabulary=vocabulary)
    return Model(
        name=name,
        net=net.eval().requires_grad_(False),
        tokenizer=tokenizer,
        generation_config=generation_config,
        eos=eos,
        blanks=blanks,
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
        return count_parameters(adapter_files.read_base(Path(folder)), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **_gguf_argument(extra)
        )
        with torch.device("meta"):
            net = choose_class(name, config).from_config(
                config, trust_remote_code=trust_remote_code
            )
    except UserError:
        raise
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
    base = adapter_files.read_base(folder)
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
    ids_BT = make_row(model, adapter_check.FEW_TOKENS)
    net = adapter_files.merge_folder(model.net, folder, ids_BT)
    if dtype != "auto":
        cast(net, dtype)
    model.net = net.to(device).eval().requires_grad_(False)
    model.name = name
    _take_settings(model, folder, trust_remote_code)
    return model


def _take_settings(model: Model, folder: Path, trust_remote_code: bool) -> None:
    """Replace tokenizer, generation config and EOS ids by those that lie in the folder."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model.eos = _read_eos(
        model.name,
        model.generation_config,
        model.tokenizer,
        vocabulary=len(model.net.get_output_embeddings().weight),
    )


def add_adapter(
    model: Model, settings: configuration.Adapter, seed: int
) -> tuple[Model, targets.Targets]:
    """Return ``model`` with a new LoRA adapter that is trained, and the weights it changes.

    The model's weights keep their dtype. UserError: the adapter cannot be trained and merged.
    """
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
    base, revision = split_revision(base)
    wrapper, chosen = adapter_check.attach_checked(model, settings, seed=seed, base=base)
    wrapper.peft_config[adapter.NAME].revision = revision
    return replace(model, adapter=wrapper), chosen


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
    for i in configured:
        if i is None:
            continue
        if type(i) is not int or not 0 <= i < vocabulary:
            raise UserError(
                f"model {name}: EOS id {i!r}; expected an id of its vocabulary, 0 to "
                f"{vocabulary - 1}; repair eos_token_id in generation_config.json"
            )
        ids.add(i)
    own = tokenizer.eos_token_id
    if own is not None and own >= vocabulary:
        raise UserError(
            f"model {name}: the tokenizer's EOS token {tokenizer.eos_token!r} has id {own}; "
            f"expected an id of the model, 0 to {vocabulary - 1}; repair eos_token in "
            "tokenizer_config.json"
        )
    if own is not None:
        ids.add(own)
    if not ids:
        raise UserError(
            f"model {name}: neither its generation config nor its tokenizer names an "
            "end-of-sequence (EOS) token; set eos_token in tokenizer_config.json"
        )
    return frozenset(ids)
