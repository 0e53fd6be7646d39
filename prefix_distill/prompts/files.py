"""JSONL, CSV and Parquet files and hub data sets become rows."""

import csv
import gzip
import itertools
import json
import tempfile
import zlib
from functools import partial
from pathlib import Path

from ..errors import UserError
from .presets import nearest
from .sources import FORMATS, Source, is_path

UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)


def open_rows(source: Source, split: str, streaming: bool):
    """All rows, or, ``streaming``, an IterableDataset of them."""
    name, preset = source.place, source.preset
    path = Path(name)
    try:
        path = path.expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"dataset {name[:200]!r}: cannot be a path ({error.__class__.__name__}); give a file "
            "or a hub id"
        ) from None
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if there and path.is_dir() and preset is not None:
        return _library(source, split, streaming, str(path))
    if suffix not in FORMATS and not there:
        if is_path(name):
            raise UserError(f"dataset {name}: no such file; check the path")
        if "/" not in name and (near := nearest(name)):
            raise UserError(f"dataset {name}: neither a file nor a preset; did you mean {near}?")
        return _library(source, split, streaming)
    if path.is_dir():
        raise UserError(f"dataset {name}: it is a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"dataset {name}: no such file; check the path")
    if suffix not in FORMATS:
        raise UserError(
            f"dataset {name}: expected one of {', '.join(FORMATS)} (also .gz), got '{path.suffix}'"
        )
    if path.stat().st_size == 0:
        raise UserError(f"dataset {name}: it has no rows; give one with at least one prompt")
    if streaming:
        return _streamed(name, path, suffix)
    try:
        if suffix == ".parquet":
            return _quietly("parquet", data_files=str(path), split="train")
        with _opened(path) as file:
            return list(_table(file)) if suffix == ".csv" else _objects(file.read())
    except UNREADABLE as error:
        raise _unreadable(name, suffix, error) from None


def _unreadable(name: str, suffix: str, error: Exception) -> UserError:
    return UserError(
        f"dataset {name}: not readable as {suffix[1:]} ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}); repair the file"
    )


def _opened(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(
        path, "rt", encoding="utf-8-sig", newline=""
    )


def _library(source: Source, split: str, streaming: bool, folder: str | None = None):
    """A hub data set, or a folder that holds one, as the datasets library reads it."""
    from datasets import get_dataset_config_names, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    preset, name = source.preset, source.place
    config = None if preset is None else preset.config
    try:
        if folder is not None:
            if config not in get_dataset_config_names(folder):
                config = None
            if streaming:
                return load_dataset(folder, config, split=split, streaming=True)
            return _quietly(folder, name=config, split=split)
        if preset is None or name != preset.hub:
            config = None
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds
        why = (str(error).strip().splitlines() or [""])[0][:200]
        if folder is not None:
            raise UserError(
                f"dataset {source.text}: the folder does not hold split {split} of it "
                f"({type(error).__name__}: {why}); name a file in it, or change --split"
            ) from None
        if preset is not None:
            raise UserError(
                f"dataset {source.text}: the hub gave no {name} ({type(error).__name__}: {why}); "
                f"check the network, or give a copy as {source.name.split('=')[0]}=FOLDER"
            ) from None
        raise UserError(
            f"dataset {name}: not a local file, and the hub gave none ({type(error).__name__}: "
            f"{why})"
        ) from None


def _streamed(name: str, path: Path, suffix: str):
    """The rows of a file, one at a time. UserError for .json, which is one document."""
    from datasets import IterableDataset

    if suffix == ".json":
        raise UserError(
            f"dataset {name}: a .json file is one document, which --streaming cannot read row by "
            "row; write it as .jsonl, or leave --streaming out"
        )
    return IterableDataset.from_generator(partial(_read, name, path, suffix))


def _read(name: str, path: Path, suffix: str):
    try:
        if suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as table:
                for rows in table.iter_batches(batch_size=100):
                    yield from rows.to_pylist()
            return
        with _opened(path) as file:
            yield from _table(file) if suffix == ".csv" else _lines(file)
    except UNREADABLE as error:
        raise _unreadable(name, suffix, error) from None


def iterate_rows(name: str, rows):
    """The rows of an IterableDataset; what stops it is one line."""
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:  # the hub client and the readers of formats raise many kinds
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"dataset {name}: reading it stopped ({type(error).__name__}: {why}); check the "
            "network or the file"
        ) from None


def _quietly(*what, **options):
    """``load_dataset`` into memory: the Arrow copy leaves nothing behind. ValueError on what it
    cannot read."""
    from datasets import load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what it says of a damaged file is in its exception, too
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return load_dataset(*what, **options, cache_dir=scratch, keep_in_memory=True)
        except Exception as error:
            raise ValueError(str(error.__cause__ or error)) from None


def _objects(text: str) -> list[dict]:
    """One JSON list of objects, one object, or a line for each."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = list(_lines(text.split("\n")))
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows):
        _object(number, row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [dict.fromkeys(columns) | row for row in rows[:1]] + rows[
        1:
    ]  # the first row stands for what columns there are


def _lines(lines):
    """The objects of JSON lines."""
    count = itertools.count()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        if line.strip():
            yield _object(next(count), row)


def _object(number: int, row) -> dict:
    if not isinstance(row, dict):
        raise ValueError(
            f'row {number}: expected an object such as {{"prompt": …}}, got {str(row)[:60]!r}'
        )
    return row


def _table(file):
    """Rows of a CSV file as text; an empty cell is None."""
    reader = csv.reader(file, strict=True)
    columns = next(reader, [])
    if len(set(columns)) < len(columns):
        raise ValueError(f"line 1: two columns of one name among {', '.join(columns)}")
    for cells in reader:
        if cells and len(cells) != len(columns):
            raise ValueError(
                f"line {reader.line_num}: expected {len(columns)} cells, got {len(cells)}"
            )
        if cells:
            yield {column: cell or None for column, cell in zip(columns, cells, strict=True)}
