"""Write a model folder that plain transformers loads."""

import shutil
from pathlib import Path

from ..files import replace_folder
from . import adapter
from .models import Model


def save_model(model: Model, folder: Path, card: str | None = None, merged: bool = False) -> None:
    """Write a model folder atomically, with ``card`` as its README.md.

    The folder holds the config, the generation config, the float32 weights (safetensors), the
    tokenizer and the chat template. Of a model with an adapter, only the adapter is written, in
    peft's format, unless ``merged``.
    """
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if model.adapter is None or merged:
            weights = None
            if merged:
                weights = adapter.merge_weights(model.net)
            model.net.save_pretrained(scratch, state_dict=weights)
        else:
            model.adapter.save_pretrained(str(scratch), save_embedding_layers=False)
            (scratch / "README.md").unlink()  # peft's template of a model card
        model.generation_config.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
