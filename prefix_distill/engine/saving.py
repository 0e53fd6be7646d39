"""Write a model folder that plain transformers loads."""

import shutil
from pathlib import Path

from ..files import replace_folder
from . import adapter
from .models import Model


def save_model(model: Model, folder: Path, card: str | None = None, merged: bool = False) -> None:
    """Writes config, generation config, weights (safetensors), tokenizer and chat template, as they
    came, and ``card`` as README.md, atomically.

    The weights are the float32 master weights. Of a model with an adapter: the adapter alone in
    peft's format, or ``merged``.
    """
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if model.adapter is not None and not merged:
            model.adapter.save_pretrained(str(scratch), save_embedding_layers=False)
            (scratch / "README.md").unlink()  # peft's empty form
        else:
            weights = adapter.merged(model.net) if merged else None
            model.net.save_pretrained(scratch, state_dict=weights)
        model.generation_config.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
