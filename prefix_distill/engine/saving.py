"""Write a model folder that plain transformers loads."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from ..display import memory_text
from ..errors import Stopped, one_line
from ..files import replace_folder
from . import adapter
from .adapter_files import WEIGHTS
from .casting import cast_state
from .free_memory import read_free_memory
from .models import Model

if TYPE_CHECKING:
    from peft import PeftModel


def save_model(
    model: Model, folder: Path, card: str | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model folder, with ``card`` as its README.md; return notes.

    The folder holds the config, the generation config with the model's ``stop_ids``, the weights
    (safetensors) in ``dtype`` (None: their own), the tokenizer and the chat template. Of a model
    with an adapter, only the adapter is written, in its own dtype and in peft's format. The folder
    gets its name after its weights were read back and compared. Stopped: they differ; ``folder`` is
    as before.
    """
    with _new_folder(model, folder, card) as scratch:
        if model.adapter is not None:
            _save_adapter(model.adapter, scratch, folder)
            return []
        weights = _write_weights(model, model.net.state_dict(), scratch, dtype=dtype)
        return _check_weights(model, weights, dtype, scratch=scratch, folder=folder)


def save_merged_model(
    model: Model, folder: Path, card: str | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model folder as ``save_model`` does, with the adapter merged into the weights."""
    with _new_folder(model, folder, card) as scratch:
        weights = adapter.merge_weights(model.net)
        with adapter.saved_as_untied(model.net, weights), adapter.without_layers(model.net):
            weights = _write_weights(model, weights, scratch, dtype=dtype)
        return _check_weights(model, weights, dtype, scratch=scratch, folder=folder)


def _write_weights(
    model: Model, weights: dict[str, torch.Tensor], scratch: Path, *, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Write config and weights in ``dtype`` (None: their own); return the weights as written."""
    if dtype is None or dtype == model.net.dtype:
        model.net.save_pretrained(scratch, state_dict=weights)
        return weights
    weights = cast_state(model.net, weights, dtype)
    model.net.save_pretrained(scratch, state_dict=weights)
    file = scratch / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")  # save_pretrained writes the network's own
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return weights


def _save_adapter(wrapper: "PeftModel", scratch: Path, folder: Path) -> None:
    """Write the adapter's files to ``scratch`` and compare them. Stopped: they differ."""
    from peft import get_peft_model_state_dict

    wrapper.save_pretrained(str(scratch), save_embedding_layers=False)
    (scratch / "README.md").unlink()  # peft's template of a model card
    state = get_peft_model_state_dict(wrapper, save_embedding_layers=False)
    _compare(state, load_file(scratch / WEIGHTS), folder)


def _check_weights(
    model: Model,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    *,
    scratch: Path,
    folder: Path,
) -> list[str]:
    """Load ``scratch`` with transformers and compare it with the weights in ``state``.

    Return a note on ``folder`` if memory does not suffice for that. Stopped: they differ.
    """
    size = sum(t.numel() * t.element_size() for t in state.values())
    free = read_free_memory(torch.device("cpu"))
    if free is not None and size > free:
        return [
            f"{folder}: it was not read back, because a second copy needs {memory_text(size)} "
            f"of memory and {memory_text(free)} is free"
        ]
    network: Any = type(model.net)
    try:
        net, loading_info = network.from_pretrained(
            scratch,
            dtype=dtype or model.net.dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the comparison reports them
        )
    except Exception as error:  # transformers raises anything here
        raise Stopped(
            f"{folder}: it is not written, because its files cannot be read back "
            f"({type(error).__name__}: {one_line(error)}); report this model's architecture"
        ) from None
    saved = net.state_dict()
    for name in loading_info["missing_keys"]:
        saved.pop(name, None)
    _compare(state, saved, folder)
    return []


def _compare(state: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise Stopped if a tensor in ``state`` is not the one that was saved."""
    for name, tensor in state.items():
        if name not in saved:
            fault = "is missing"
        elif not torch.equal(saved[name].to(tensor.dtype), tensor.cpu()):
            fault = "differs"
        else:
            continue
        raise Stopped(
            f"{folder}: it is not written, because the weight {name} {fault} when its files are "
            "read back; report this model's architecture"
        )


def _make_generation_config(model: Model) -> GenerationConfig:
    """Return the model's generation config, with the ids at which responses end as EOS ids."""
    made = copy.deepcopy(model.generation_config)
    named = made.eos_token_id
    if not isinstance(named, list):
        named = [named]
    if model.stop_ids is not None and set(named) != model.stop_ids:
        made.eos_token_id = sorted(model.stop_ids)
    return made


@contextlib.contextmanager
def _new_folder(model: Model, folder: Path, card: str | None) -> Iterator[Path]:
    """Yield a folder for weights; add the other files, then move it to ``folder``."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        _make_generation_config(model).save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
