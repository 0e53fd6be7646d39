"""Write a model folder that plain transformers loads."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import Stopped, one_line
from ..files import replace_folder
from . import adapter
from .adapter_files import WEIGHTS
from .free_memory import read_free_memory
from .models import Model


def save_model(model: Model, folder: Path, card: str | None = None) -> None:
    """Write a model folder atomically, with ``card`` as its README.md.

    The folder holds the config, the generation config, the float32 weights (safetensors), the
    tokenizer and the chat template. Of a model with an adapter, only the adapter is written, in
    peft's format.
    """
    with _new_folder(model, Path(folder), card) as scratch:
        if model.adapter is None:
            model.net.save_pretrained(scratch)
        else:
            model.adapter.save_pretrained(str(scratch), save_embedding_layers=False)
            (scratch / "README.md").unlink()  # peft's template of a model card


def save_merged_model(model: Model, folder: Path, card: str | None = None) -> None:
    """Write a model folder as ``save_model`` does, with the adapter merged into the weights."""
    with _new_folder(model, Path(folder), card) as scratch:
        weights = adapter.merge_weights(model.net)
        with adapter.saved_as_untied(model.net, weights):
            model.net.save_pretrained(scratch, state_dict=weights)


def check_model(model: Model, folder: Path) -> list[str]:
    """Read what ``save_model`` wrote, and compare it with ``model``; return notes.

    Stopped: they differ.
    """
    if model.adapter is None:
        return _check_weights(model, folder, model.net.state_dict())
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.adapter, save_embedding_layers=False)
    _compare(state, load_file(folder / WEIGHTS), folder)
    return []


def check_merged_model(model: Model, folder: Path) -> list[str]:
    """Read what ``save_merged_model`` wrote, and compare it with ``model``; return notes.

    Stopped: they differ.
    """
    return _check_weights(model, folder, adapter.merge_weights(model.net))


def _check_weights(model: Model, folder: Path, state: dict[str, torch.Tensor]) -> list[str]:
    """Load a model folder with transformers and compare it with the weights in ``state``.

    Return a note if memory does not suffice for that.
    """
    size = sum(t.numel() * t.element_size() for t in state.values())
    free = read_free_memory(torch.device("cpu"))
    if free is not None and size > free:
        return [
            f"{folder}: it was not read back, because a second copy needs {size / 2**30:.3g} GiB "
            f"of memory and {free / 2**30:.3g} GiB is free"
        ]
    network: Any = type(model.net)
    try:
        net, loading_info = network.from_pretrained(
            folder,
            dtype=model.net.dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the comparison reports them
        )
    except Exception as error:  # transformers raises anything here
        raise Stopped(
            f"{folder}: it cannot be read back ({type(error).__name__}: {one_line(error)}); the "
            "trained weights are in the last checkpoint; report this model's architecture"
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
            f"{folder}: read back, the weight {name} {fault}; the trained weights are in the last "
            "checkpoint; report this model's architecture"
        )


@contextlib.contextmanager
def _new_folder(model: Model, folder: Path, card: str | None) -> Iterator[Path]:
    """Yield a folder for weights; add the other files, then move it to ``folder``."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        model.generation_config.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
