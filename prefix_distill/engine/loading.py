"""Load a model: hub id, folder, adapter, GGUF file or embedded model."""

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
from ..errors import UserError
from ..lab.task import LAB, model_path
from ..prompts.sources import is_path
from . import adapter
from .adapter import FILE
from .models import Model
from .placement import make_quantization, plan_spread

if TYPE_CHECKING:
    from .transformers_names import CausalLM

ADAPTER = {"adapter": True}
MOST_LAYERS = 1000  # the deepest published language models have some hundred


def load_model(  # noqa: PLR0913  loading options of one model, all by keyword
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    quantize: str = "none",
    spread: int | None = None,
) -> Model:
    """Loads a model by hub id, folder (with weights, or a LoRA adapter), ``.gguf`` file or
    ``lab:TASK/ROLE``; dropout off, nothing trainable yet.

    ``quantize``: ``nf4`` or ``int8``, the linear layers but the head in so many bits (bitsandbytes,
    through transformers). ``spread``: bytes of each GPU (without one: of main memory) that it may
    fill; layers that do not fit stay in main memory, or on disk, and come when they are needed
    (accelerate). The head stays on ``device``.

    ``dtype``: "auto" for that of the files. Reads safetensors (or GGUF) only, never pickle, and
    runs no code of the folder's unless asked to. UserError when it is missing or unreadable, lacks
    a weight that its config.json asks for, has no end-of-sequence id or has non-finite weights.
    """
    folder, extra = locate(name)
    if extra == ADAPTER and quantize == "none" and spread is None:
        return _with_adapter(name, Path(folder), device, dtype, trust_remote_code)
    if extra and (quantize != "none" or spread is not None):
        raise UserError(
            f"model {name}: an adapter or a .gguf file can be neither quantised nor spread; export "
            "it to a folder of weights first (prefix-distill export)"
        )
    gguf = {k: v for k, v in extra.items() if k == "gguf_file"}
    scratch = None
    with _explain_failure(name, _name_package(bool(gguf), quantize, spread)):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **gguf
        )
        if not extra:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            check_config(name, folder, config)
        if quantize != "none":
            extra = {
                "quantization_config": make_quantization(quantize, dtype),
                "device_map": {"": device},
            }
        if spread is not None:
            scratch = tempfile.TemporaryDirectory(prefix="prefix-distill-")
            extra = {
                "device_map": plan_spread(config, device, dtype, spread, trust_remote_code),
                "offload_folder": scratch.name,
            }
        net, loading_info = _read_weights(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
    _check_complete(name, loading_info)
    placed = quantize != "none" or spread is not None
    model = _make_model(name, net if placed else net.to(device), tokenizer)
    _check_finite(model)
    if spread is None:
        return model
    return replace(model, home=device, scratch=scratch)


def _read_weights(folder: str, **options: Any) -> tuple["CausalLM", dict[str, Any]]:
    """Return the network and its loading info, which lists missing and mismatched weights."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=None if "gguf_file" in options else True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # _check_complete reports them by name
        **options,
    )  # type: ignore[return-value]  # with output_loading_info, it returns a pair


def _name_package(gguf: bool, quantize: str, spread: int | None) -> str | None:
    """Return the extra of this package that the load needs, or None."""
    if gguf:
        return "gguf"
    if quantize != "none":
        return "quantize"
    return None if spread is None else "spread"


@contextlib.contextmanager
def _explain_failure(name: str, package: str | None) -> Iterator[None]:
    """Turn the libraries' exceptions for a model's files into UserError."""
    try:
        yield
    except ImportError as error:
        hint = (
            f'pip install "prefix-distill[{package}]"'
            if package
            else str(error).strip().splitlines()[0]
        )
        raise UserError(f"model {name}: a package is missing; {hint}") from None
    except UserError:
        raise
    except (
        Exception
    ) as error:  # from_pretrained raises anything from OSError to struct.error on unreadable files
        hint = "give a hub id, a folder with config.json and safetensors, or a readable .gguf file"
        if "trust_remote_code" in str(error):
            hint = "read that code, then add --trust-remote-code to run it"
        raise UserError(
            f"model {name}: cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); {hint}"
        ) from None


def _check_complete(name: str, loading_info: dict[str, Any]) -> None:
    """Raise UserError if a weight is missing or has the wrong shape."""
    if wrong := sorted(loading_info["mismatched_keys"]):
        key, held, due = wrong[0]
        raise UserError(
            f"model {name}: weight {key} has shape {list(held)}, but its config.json asks for "
            f"{list(due)} ({len(wrong)} such weights); use the config.json that came with the "
            "weights"
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"model {name}: its files lack the weight {missing[0]} that its config.json asks for "
            f"({len(missing)} such weights); use a complete copy"
        )


def _make_model(name: str, net: "CausalLM", tokenizer: PreTrainedTokenizerBase) -> Model:
    """Return the frozen Model of a loaded network; the sampler's settings replace its generation
    config. UserError: the model has no EOS token."""
    generation_config, net.generation_config = net.generation_config, GenerationConfig()
    model = Model(
        name,
        net.eval().requires_grad_(False),
        tokenizer,
        generation_config,
        _eos(name, generation_config, tokenizer, len(net.get_output_embeddings().weight)),
    )
    if not model.eos:
        raise UserError(
            f"model {name}: neither its generation config nor its tokenizer names an "
            "end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return model


def _check_finite(model: Model) -> None:
    """Raise UserError if a weight contains NaN or infinity."""
    for key, weight in model.net.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise UserError(
                f"model {model.name}: weight {key} holds NaN or infinity; use an intact copy"
            )


def count(name: str, trust_remote_code: bool = False) -> int:
    """Parameters of a model, from its config alone."""
    folder, extra = locate(name)
    if extra == ADAPTER:
        return count(adapter.base_of(Path(folder)), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            **{k: v for k, v in extra.items() if k == "gguf_file"},
        )
        with torch.device("meta"):
            return sum(
                p.numel()
                for p in AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code
                ).parameters()
            )
    except Exception as error:  # as in load
        raise UserError(
            f"model {name}: its config cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give a hub id or a folder with config.json"
        ) from None


def _with_adapter(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool,
) -> Model:
    """A folder with an adapter in peft's format: its base model with the adapter added to the
    weights."""
    base = adapter.base_of(folder)
    if (Path(base) / FILE).is_file():
        raise UserError(
            f"model {name}: its base model {base} is an adapter itself; merge that first "
            "(prefix-distill export)"
        )
    model = load_model(
        base,
        device=torch.device("cpu"),
        dtype="auto" if dtype == "auto" else torch.float32,
        trust_remote_code=trust_remote_code,
    )
    net = adapter.applied(model.net, folder)
    model.net = net.to(device, net.dtype if dtype == "auto" else dtype).eval().requires_grad_(False)
    model.name = name
    if (folder / "tokenizer_config.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model


def with_adapter(model: Model, settings: configuration.Adapter, seed: int) -> Model:
    """``model`` with a LoRA adapter that trains (``adapter.attach``), its weights in their
    dtype."""
    if (Path(model.name) / FILE).is_file():
        raise UserError(
            f"--lora with --student {model.name}: it is an adapter itself; merge it first "
            "(prefix-distill export)"
        )
    base = (
        model.name
        if model.name.startswith(LAB) or not Path(model.name).expanduser().exists()
        else str(Path(model.name).expanduser().absolute())
    )
    base = (
        locate(base)[0] if base.startswith(LAB) else base
    )  # so that plain transformers finds it, too
    return replace(model, adapter=adapter.attach(model.net, settings, seed, base))


def locate(name: str) -> tuple[str, dict]:
    """(folder or hub id, what ``from_pretrained`` needs besides; ADAPTER for a folder that holds an
    adapter). UserError where a path leads nowhere."""
    if name.startswith(LAB):
        task, _, role = name[len(LAB) :].partition("/")
        try:
            return str(model_path(task, role)), {}
        except ValueError as error:
            raise UserError(f"model {name}: {error}") from None
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for ~NOBODY
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise UserError(f"model {name}: no such file; check the path")
        from transformers import GgufConfig

        return str(path.parent), {
            "gguf_file": path.name,
            "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True),
        }
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        if (path / FILE).is_file() and not (path / "config.json").is_file():
            return str(path), ADAPTER
        if not (path / "config.json").is_file():
            raise UserError(
                f"model {name}: the folder has no config.json; give a folder written by "
                "save_pretrained"
            )
    elif is_path(name) or name.count("/") > 1:
        raise UserError(f"model {name}: no such folder; check the path")
    return str(path) if os.path.isdir(path) else name, {}


def check_config(name: str, folder: str, config: PreTrainedConfig) -> None:
    """Refuses what transformers would build, read or replace without a word."""
    text = config.get_text_config(decoder=True)
    for key, most in (
        ("num_hidden_layers", MOST_LAYERS),
        ("hidden_size", None),
        ("vocab_size", None),
        ("max_position_embeddings", None),
    ):
        value = getattr(text, key, None)
        if isinstance(value, int) and not 1 <= value <= (most or value):
            raise UserError(
                f"model {name}: its config.json has {key} {value}; expected at least "
                f"1{f' and at most {most}' if most else ''}; use the config.json that came with "
                "the weights"
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
        GenerationConfig.from_pretrained(
            folder
        )  # from_pretrained below falls back on config.json when this is damaged


def _eos(
    name: str, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, rows: int
) -> frozenset[int]:
    ids = generation_config.eos_token_id
    ids = {
        i if type(i) is int else repr(i)
        for i in [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
        if i is not None
    }
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < rows]:
        raise UserError(
            f"model {name}: end-of-sequence id {wrong[0]}; expected an id of its vocabulary, 0 to "
            f"{rows - 1}; repair eos_token_id in generation_config.json"
        )
    return frozenset(ids)


def check_rows(model: Model) -> None:
    """Refuses a tokenizer with more ids than the head has rows."""
    ids, rows = (
        max(model.tokenizer.get_vocab().values(), default=-1) + 1,
        len(model.net.get_output_embeddings().weight),
    )
    if rows < ids:
        raise UserError(
            f"vocabulary: the tokenizer of {model.name} has ids up to {ids - 1}, but its head has "
            f"only {rows} rows; resize the model's embeddings or use its own tokenizer"
        )


@torch.no_grad()
def check_head(model: Model) -> float:
    """Refuses a model whose logits are not head(trunk): the loss would teach another
    distribution → how far they are (nats)."""
    ids = torch.tensor([sorted(model.tokenizer.get_vocab().values())[:8]], device=model.device)
    ours = model.head().logits(model.trunk(ids)[0])
    with model.form():
        own = (
            model.net(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            .logits[0, :, : model.support]
            .float()
        )
    own = own.to(ours.device)
    if not torch.isfinite(own).all():
        raise UserError(
            f"model {model.name}: its logits hold NaN or infinity; use an intact copy or --dtype "
            "float32"
        )
    gap = (torch.log_softmax(ours, -1) - torch.log_softmax(own, -1)).abs().max().item()
    if gap > (1e-3 if model.net.dtype == torch.float32 else 0.25):
        raise UserError(
            f"model {model.name}: its logits are not its output head applied to its hidden states "
            f"(log-probabilities differ by {gap:.2g} nats); this architecture is not supported"
        )
    return gap
