"""Check the files of a model folder, and read its tokenizer."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..files import describe_lfs_pointer, is_lfs_pointer

GGUF = ".gguf"
INDEX = "model.safetensors.index.json"
# patterns of the files that transformers reads beside weights in an index
READ = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "model.safetensors",
    "adapter_model.safetensors",
)
# patterns of the files of published tokenizers that hold a vocabulary
VOCABULARIES = ("tokenizer.*", "vocab*", "tekken.json", "*.model", "*.tiktoken", "*.spm")


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, in capital letters or not."""
    return path.suffix.lower() == GGUF


def check_pointers(name: str, folder: Path) -> None:
    """Raise UserError if a file that will be read is a git-lfs pointer, or an index names it."""
    files = [file for pattern in READ for file in sorted(folder.glob(pattern))]
    files += _files_of_index(folder)
    for file in files:
        check_pointer(name, file)


def check_pointer(name: str, file: Path) -> None:
    """Raise UserError if a file is a git-lfs pointer."""
    if is_lfs_pointer(file):
        raise UserError(f"model {name}: {describe_lfs_pointer(file)}")


def _files_of_index(folder: Path) -> list[Path]:
    """Return the files of sharded weights; none if the index cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / str(file) for file in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def read_tokenizer(name: str, folder: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer. UserError: a local folder has no file with a vocabulary."""
    path = Path(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:
        if "gguf_file" not in options and _lacks_tokenizer(path):
            raise _no_tokenizer(name) from None
        raise
    if "gguf_file" not in options and _lacks_tokenizer(path, tokenizer):
        raise _no_tokenizer(name)
    return tokenizer


def _lacks_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Return whether a local folder has no file with a vocabulary.

    transformers may fail then, or give the class of ``tokenizer`` an empty vocabulary. Tokenizers
    of bytes need no file.
    """
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        return False
    if tokenizer is None:
        return True
    needed = type(tokenizer).vocab_files_names.values()
    return bool(needed) and not any((folder / file).is_file() for file in needed)


def _no_tokenizer(name: str) -> UserError:
    """Return the error for a folder without tokenizer files."""
    return UserError(
        f"model {name}: the folder has no tokenizer.json or other vocabulary file; copy the "
        "tokenizer files (tokenizer.json, tokenizer_config.json, …) of the model that it was "
        "trained from"
    )
