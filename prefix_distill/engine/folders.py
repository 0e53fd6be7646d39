"""Find the files of a model, and refuse those that transformers would misread silently."""

import json
import os
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from ..errors import UserError
from ..lab.task import LAB, model_path
from ..prompts.sources import is_path
from . import hub
from .adapter_files import FILE, WEIGHTS
from .hub import UNREAD, find_pinned
from .model_files import check_pointer, check_pointers, is_gguf

ADAPTER = {"adapter": True}
WEIGHT_SUFFIXES = (".safetensors", ".bin")
MOST_LAYERS = 1000  # published language models have a few hundred at most


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
    if is_gguf(path):
        if not os.path.isfile(path):
            raise UserError(f"model {name}: no such file; check the path")
        check_pointer(name, path)
        from transformers import GgufConfig

        return str(path.parent), {
            "gguf_file": path.name,
            "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True),
        }
    pinned = find_pinned(name, (*UNREAD, *hub.WEIGHTS))
    if pinned is not None:
        path = pinned
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        if is_path(name) or name.count("/") > 1:
            raise UserError(f"model {name}: no such folder; check the path")
        return name, {}
    check_pointers(name, path)
    if _find_weights(path) is not None and (path / "config.json").is_file():
        return str(path), {}
    if (path / FILE).is_file():
        return str(path), ADAPTER
    if (path / "config.json").is_file():
        return str(path), {}
    raise UserError(
        f"model {name}: the folder has no config.json; give a folder written by save_pretrained"
    )


def _find_weights(folder: Path) -> Path | None:
    """Return a file with weights of a whole model; None if the folder holds an adapter at most."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith(("model", "pytorch_model")) and file.suffix in WEIGHT_SUFFIXES:
            return file
    return None


def describe_left_over(name: str, folder: str) -> str | None:
    """Return a warning if a folder of weights also holds an adapter, which is left out.

    Merging leaves such files behind. Transformers adds the adapter to the weights once more.
    """
    path = Path(folder)
    if not (path / FILE).is_file():
        return None
    weights = _find_weights(path)
    if weights is None:
        return None
    return (
        f"model {name}: the weights in {weights.name} are used as they are, and the adapter "
        f"({FILE}) in the same folder is left out; to add the adapter, move {FILE} and {WEIGHTS} "
        "to a folder of their own and name that folder"
    )


def check_config(name: str, folder: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a config or file list that transformers would misread silently."""
    text = config.get_text_config(decoder=True)
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        value = getattr(text, key, None)
        unlimited = key == "max_position_embeddings" and value == -1
        if isinstance(value, int) and value < 1 and not unlimited:
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
