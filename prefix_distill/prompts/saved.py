"""Find the files of a split in a folder, and load folders written by save_to_disk."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import UserError, one_line
from ..files import describe_lfs_pointer, is_lfs_pointer
from .readers import parse_json
from .sources import FORMATS, Source

if TYPE_CHECKING:  # the import takes a second, and most files do not need it
    from datasets import Dataset


def refuse_other_folder(name: str, folder: Path) -> None:
    """Raise UserError if a folder holds a model, an adapter or a run and so no dataset."""
    kind = None
    if (folder / "config.yaml").is_file() and (folder / "run.json").is_file():
        kind = "the folder of a run"
    elif (folder / "adapter_config.json").is_file() or _has_model_config(folder):
        kind = "the folder of a model"
    if kind is not None:
        raise UserError(
            f"dataset {name}: expected a folder of data files, got {kind}; name a dataset with "
            "--dataset, and a model with --student, --teacher or --model"
        )


def _has_model_config(folder: Path) -> bool:
    """Return whether a folder has the config.json of a model, which names its type."""
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def find_saved(name: str, folder: Path, split: str) -> Path | None:
    """Return the folder of a dataset that save_to_disk wrote, or None if it wrote no such folder.

    Raise UserError if it wrote several splits, but not ``split``.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        return folder / choose_split(name, splits, split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return folder
    return None


def choose_split(name: str, splits: list[str], split: str) -> str:
    """Return ``split``, or the train split if the dataset has no other one.

    Raise UserError if the dataset has neither.
    """
    if split in splits:
        return split
    if splits == ["train"]:
        return "train"
    raise UserError(
        f"dataset {name}: expected the split {split}, got the splits {', '.join(splits)}; change "
        "--split"
    )


def load_saved(name: str, folder: Path) -> "Dataset":
    """Load a folder that save_to_disk wrote. Raise UserError if it is damaged."""
    from datasets import load_from_disk
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return cast("Dataset", load_from_disk(str(folder)))
    except Exception as error:  # the library raises many types
        raise UserError(
            f"dataset {name}: the folder of save_to_disk cannot be loaded "
            f"({one_line(error)}); write it again"
        ) from None


def list_shards(source: Source, folder: Path, split: str) -> list[Path]:
    """Return the files of a split in a folder, such as a clone of a repository on the hub.

    The README or the names of files assign files to splits, by the rules of the datasets library.
    A preset names the configuration to read. Raise UserError if the folder has no such split.
    """
    name = source.text
    if not any(_is_data(path) for path in folder.rglob("*")):
        raise UserError(
            f"dataset {name}: expected a folder with {', '.join(FORMATS)} files, or one written by "
            "save_to_disk, got neither; name a file or another folder"
        )
    wanted = None
    if source.preset is not None:
        wanted = source.preset.config
    files = _files_of_splits(name, folder, wanted)
    if source.preset is not None and split not in files:
        raise UserError(
            f"dataset {name}: expected the split {split}, got the splits "
            f"{', '.join(sorted(files))} in the folder; name a file in it, or change --split"
        )
    shards = files[choose_split(name, sorted(files), split)]
    for shard in shards:
        if is_lfs_pointer(shard):
            raise UserError(f"dataset {name}: {describe_lfs_pointer(shard)}")
    return shards


def _files_of_splits(name: str, folder: Path, wanted: str | None) -> dict[str, list[Path]]:
    from datasets import get_dataset_config_names, load_dataset_builder

    with tempfile.TemporaryDirectory() as cache:
        try:
            configs = get_dataset_config_names(str(folder))
            config = _choose_config(configs, wanted)
            builder = None
            if config is not None:
                builder = load_dataset_builder(str(folder), config, cache_dir=cache)
        except Exception as error:  # the library raises many types
            raise UserError(
                f"dataset {name}: the files of the folder cannot be assigned to splits "
                f"({one_line(error)}); name a file, or files as "
                f"{folder}/*.parquet"
            ) from None
    if builder is None:
        raise UserError(
            f"dataset {name}: expected a folder with one configuration, got {', '.join(configs)}; "
            f"name the files of one of them, such as {folder}/{configs[0]}/*.parquet"
        )
    files: dict[str, list[Path]] = {}
    for split, paths in (builder.config.data_files or {}).items():
        shards = sorted(Path(path) for path in paths if _is_data(Path(path)))
        rows = [shard for shard in shards if not _is_text(shard)]
        files[str(split)] = rows or shards  # texts beside rows are no prompts, as requirements.txt
    return files


def _choose_config(configs: list[str], wanted: str | None) -> str | None:
    """Return the wanted configuration, else the only one; None if there are others."""
    if wanted in configs:
        return wanted
    if len(configs) != 1:
        return None
    return configs[0]


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in FORMATS or path.name.lower().endswith(
        tuple(f"{suffix}.gz" for suffix in FORMATS)
    )
