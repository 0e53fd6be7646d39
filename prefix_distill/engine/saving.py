"""Write a model folder that plain transformers loads."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..files import replace_folder
from . import adapter
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
        model.net.save_pretrained(scratch, state_dict=adapter.merge_weights(model.net))


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
