"""Read the rows of JSONL, JSON, CSV and Parquet files and of datasets on the hub."""

import csv
import gzip
import itertools
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import UserError
from ..files import describe_lfs_pointer, describe_special, is_lfs_pointer
from .presets import closest_preset
from .sources import FORMATS, Source, is_path

if TYPE_CHECKING:  # the import takes a second, and most files do not need it
    from datasets import Dataset, IterableDataset

Row = dict[str, Any]

UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)


def read_rows(source: Source, split: str) -> "list[Row] | Dataset":
    """Return all rows of a dataset. Raise UserError if it cannot be read."""
    path = _find_local(source)
    if path is None:
        return _load_from_hub(source, split, streaming=False)
    if path.is_dir():
        return _load_folder(source, path, split, streaming=False)
    file_format = _file_format(path)
    try:
        if file_format == ".parquet":
            return _load_into_memory("parquet", data_files=str(path), split="train")
        with _open(path) as file:
            if file_format == ".csv":
                return list(_read_table(file))
            return _read_objects(file.read())
    except UNREADABLE as error:
        raise _unreadable(source, path, error) from None


def stream_rows(source: Source, split: str) -> "IterableDataset":
    """Return a dataset that reads its rows on demand.

    Raise UserError if it cannot be read, and for a .json file, which is a single document.
    """
    path = _find_local(source)
    if path is None:
        return _load_from_hub(source, split, streaming=True)
    if path.is_dir():
        return _load_folder(source, path, split, streaming=True)
    if _file_format(path) == ".json":
        raise UserError(
            f"dataset {source.location}: --streaming cannot read a .json file row by row; convert "
            "it to .jsonl, or omit --streaming"
        )
    from datasets import IterableDataset

    return IterableDataset.from_generator(partial(_stream_file, source, path))


def no_rows(name: str) -> UserError:
    """Return the error for a dataset without rows."""
    return UserError(f"dataset {name}: it has no rows; give a dataset with at least one prompt")


def _find_local(source: Source) -> Path | None:
    """Return the file, or the folder with a copy of a preset; None for a dataset on the hub.

    Raise UserError if the name is a path but not that of a readable dataset.
    """
    name = source.location
    path = Path(name)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"dataset {name[:200]!r}: not a valid path ({type(error).__name__}); give a file or a "
            "hub id"
        ) from None
    if path.is_dir() and source.preset is not None:
        return path
    file_format = _file_format(path)
    if not exists and file_format not in FORMATS and not is_path(name):
        close = closest_preset(name)
        if close is not None and "/" not in name:
            raise UserError(f"dataset {name}: neither a file nor a preset; did you mean {close}?")
        return None
    if path.is_dir():
        raise UserError(f"dataset {name}: expected a file, got a folder; name a file in it")
    special = describe_special(path)
    if special is not None:
        raise UserError(f"dataset {name}: expected a regular file, got {special}; name a file")
    if not path.is_file():
        raise UserError(f"dataset {name}: no such file; check the path")
    if file_format not in FORMATS:
        raise UserError(
            f"dataset {name}: expected one of {', '.join(FORMATS)} (also .gz), got "
            f"'{path.suffix}'; convert the file"
        )
    if path.stat().st_size == 0:
        raise no_rows(name)
    if is_lfs_pointer(path):
        raise UserError(f"dataset {name}: {describe_lfs_pointer(path)}")
    return path


def _file_format(path: Path) -> str:
    """Return the suffix of a file without .gz, in lower case."""
    if _is_compressed(path):
        path = path.with_suffix("")
    return path.suffix.lower()


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _unreadable(source: Source, path: Path, error: Exception) -> UserError:
    message = " ".join(str(error).split())[:200]
    return UserError(
        f"dataset {source.location}: not readable as {_file_format(path)[1:]} "
        f"({type(error).__name__}: {message}); repair the file"
    )


def _open(path: Path) -> IO[str]:
    if _is_compressed(path):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _load_folder(source: Source, folder: Path, split: str, *, streaming: bool) -> Any:
    """Load a folder that holds a copy of a preset's repository."""
    from datasets import get_dataset_config_names, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    assert source.preset is not None  # `_find_local` accepts a folder for a preset only
    config = source.preset.config
    try:
        if config not in get_dataset_config_names(str(folder)):
            config = None
        if streaming:
            return load_dataset(str(folder), config, split=split, streaming=True)
        return _load_into_memory(str(folder), name=config, split=split)
    except Exception as error:  # the library raises many types
        for file in sorted(folder.rglob("*")):
            if _file_format(file) in FORMATS and is_lfs_pointer(file):
                raise UserError(f"dataset {source.text}: {describe_lfs_pointer(file)}") from None
        raise UserError(
            f"dataset {source.text}: split {split} cannot be loaded from the folder "
            f"({_describe(error)}); name a file in it, or change --split"
        ) from None


def _load_from_hub(source: Source, split: str, *, streaming: bool) -> Any:
    """Load a dataset from the hub, or from its cache."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    name, preset = source.location, source.preset
    config = None
    if preset is not None and name == preset.hub:
        config = preset.config
    try:
        folder = _find_snapshot(source)
        if folder is not None:
            return load_dataset(folder, config, split=split, streaming=streaming)
        return load_dataset(
            name, config, split=split, streaming=streaming, revision=source.revision
        )
    except Exception as error:  # the hub client raises many types
        reason = _describe(error)
    if preset is None:
        raise UserError(
            f"dataset {name}: neither a local file nor loadable from the hub ({reason}); check "
            "the name and the network"
        )
    raise UserError(
        f"dataset {source.text}: {name} cannot be loaded from the hub ({reason}); check the "
        f"network, or give a copy as {source.name.split('=')[0]}=FOLDER"
    )


def _find_snapshot(source: Source) -> str | None:
    """Return the folder of a pinned dataset in the hub's cache if the hub is switched off."""
    from huggingface_hub import constants, snapshot_download

    if source.revision is None or not constants.HF_HUB_OFFLINE:
        return None
    return snapshot_download(source.location, repo_type="dataset", revision=source.revision)


def _describe(error: Exception) -> str:
    """Return the type of an exception and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _stream_file(source: Source, path: Path) -> Iterator[Row]:
    """Yield the rows of a file, one at a time."""
    try:
        if _file_format(path) == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as table:
                for rows in table.iter_batches(batch_size=100):
                    yield from rows.to_pylist()
            return
        with _open(path) as file:
            if _file_format(path) == ".csv":
                yield from _read_table(file)
            else:
                yield from _read_lines(file)
    except UNREADABLE as error:
        raise _unreadable(source, path, error) from None


def iterate_rows(name: str, rows: "IterableDataset") -> Iterator[Row]:
    """Yield the rows of a streamed dataset; raise UserError if reading fails."""
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:  # the hub client and the format readers raise many types
        raise UserError(
            f"dataset {name}: reading failed ({_describe(error)}); check the network or the file"
        ) from None


def _load_into_memory(*what: str, **options: Any) -> "Dataset":
    """Call ``load_dataset`` without leaving an Arrow copy on disk.

    Raise ValueError if the library cannot read the dataset.
    """
    from datasets import load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # the exception repeats what the library logs about a damaged file
    with tempfile.TemporaryDirectory() as cache:
        try:
            loaded = load_dataset(*what, **options, cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            raise ValueError(str(error.__cause__ or error)) from None
    return cast("Dataset", loaded)  # a named split gives one Dataset


def _read_objects(text: str) -> list[Row]:
    """Parse one JSON list of objects, one object, or one object per line.

    The first row gets every column of the file, because the columns are detected from it.
    """
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        parsed = list(_read_lines(text.split("\n")))
    if not isinstance(parsed, list):
        parsed = [parsed]
    columns: Row = {}
    for number, row in enumerate(parsed):
        _check_object(number, row)
        columns.update(dict.fromkeys(row))
    if parsed:
        parsed[0] = columns | parsed[0]
    return parsed


def _read_lines(lines: Iterable[str]) -> Iterator[Row]:
    """Yield the object on each line of JSON text; skip empty lines."""
    count = itertools.count()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        _check_object(next(count), row)
        yield row


def _check_object(number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(
            f'row {number}: expected an object such as {{"prompt": …}}, got {str(row)[:60]!r}'
        )


def _read_table(file: Iterable[str]) -> Iterator[dict[str, str | None]]:
    """Yield the rows of CSV text; an empty cell is None."""
    reader = csv.reader(file, strict=True)
    columns = next(reader, [])
    if len(set(columns)) < len(columns):
        raise ValueError(f"line 1: expected distinct column names, got {', '.join(columns)}")
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(columns):
            raise ValueError(
                f"line {reader.line_num}: expected {len(columns)} cells, got {len(cells)}"
            )
        yield {column: cell or None for column, cell in zip(columns, cells, strict=True)}
