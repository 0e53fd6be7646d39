"""Read the rows of files, of folders of files, and of datasets on the hub."""

import csv
import gzip
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ..display import phase
from ..errors import UserError, first_line
from ..files import describe_lfs_pointer, describe_special, is_lfs_pointer
from .presets import closest_preset
from .readers import (
    Row,
    choose_separator,
    read_json_lines,
    read_lines,
    read_objects,
    read_table,
    read_texts,
)
from .saved import find_saved, list_shards, load_saved, refuse_other_folder
from .sources import FORMATS, Source, is_path, list_matches

if TYPE_CHECKING:  # the import takes a second, and most files do not need it
    from datasets import Dataset, IterableDataset

UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the marks at the start of the file


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a dataset, and remarks on how they were found."""

    rows: "list[Row] | Dataset"
    remarks: tuple[str, ...] = ()


def read_rows(source: Source, split: str) -> Table:
    """Return all rows of a dataset. Raise UserError if it cannot be read."""
    path = _find_local(source)
    if path is None:
        return Table(rows=_load_from_hub(source, split, streaming=False))
    if isinstance(path, Path) and path.is_dir():
        saved = find_saved(source.text, path, split)
        if saved is not None:
            return Table(rows=load_saved(source.text, saved))
        path = list_shards(source, path, split)
    if isinstance(path, Path):
        return _read_file(source, path)
    return _read_files(source, path)


def _read_files(source: Source, paths: list[Path]) -> Table:
    """Read several files as one dataset."""
    remarks = [f"rows from {len(paths)} files, {paths[0].name} to {paths[-1].name}"]
    if all(_file_format(path) == ".parquet" for path in paths):
        full = [path for path in paths if not _is_empty_parquet(source, path)]
        if not full:
            raise no_rows(source.location)
        return Table(rows=_load_parquet(source, full), remarks=tuple(remarks))
    rows: list[Row] = []
    for path in paths:
        table = _read_file(source, path)
        rows.extend(table.rows)
        for remark in table.remarks:
            remarks.append(f"{path.name}: {remark}")
    return Table(rows=rows, remarks=tuple(remarks))


def _read_file(source: Source, path: Path) -> Table:
    file_format = _file_format(path)
    if file_format == ".parquet":
        if _is_empty_parquet(source, path):
            raise no_rows(source.location)
        return Table(rows=_load_parquet(source, [path]))
    try:
        _check_encoding(path)
        with _open(path) as file:
            return _parse_file(path, file)
    except UNREADABLE as error:
        raise _unreadable(source, path, error) from None


def _parse_file(path: Path, file: IO[str]) -> Table:
    """Return the rows of an open text file. Raise ValueError if they cannot be read."""
    file_format = _file_format(path)
    if file_format in (".csv", ".tsv"):
        rows = list(read_table(file, _separator_of(path)))
        return Table(rows=rows, remarks=_describe_separator(path))
    if file_format == ".txt":
        return Table(rows=list(read_texts(file)), remarks=("one prompt per line",))
    read = read_objects
    if file_format == ".jsonl":
        read = read_json_lines
    objects, remarks = read(file.read())
    return Table(rows=objects, remarks=remarks)


def _is_empty_parquet(source: Source, path: Path) -> bool:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            return bool(table.metadata.num_rows == 0)
    except UNREADABLE as error:
        raise _unreadable(source, path, error) from None


def _load_parquet(source: Source, paths: list[Path]) -> "Dataset":
    try:
        return _load_into_memory("parquet", data_files=list(map(str, paths)), split="train")
    except UNREADABLE as error:
        raise _unreadable(source, paths[0], error) from None


def _separator_of(path: Path) -> str | None:
    if _file_format(path) == ".tsv":
        return "\t"
    return None


def _describe_separator(path: Path) -> tuple[str, ...]:
    """Return a remark if the cells of a .csv file are not separated by commas."""
    if _file_format(path) != ".csv":
        return ()
    with _open(path) as file:
        separator = choose_separator(file.readline())
    if separator == ",":
        return ()
    return (f"cells separated by {'tabs' if separator == chr(9) else 'semicolons'}",)


def _check_encoding(path: Path) -> None:
    """Raise UnicodeError if the text is UTF-16."""
    with _open_bytes(path) as file:
        start = file.read(2)
    if start in UTF_16:
        raise UnicodeError("the text is UTF-16, expected UTF-8")


def stream_rows(source: Source, split: str) -> "IterableDataset":
    """Return a dataset that reads its rows on demand.

    Raise UserError if it cannot be read, and for a .json file, which is a single document.
    """
    path = _find_local(source)
    if path is None:
        return cast("IterableDataset", _load_from_hub(source, split, streaming=True))
    if isinstance(path, Path) and path.is_dir():
        saved = find_saved(source.text, path, split)
        if saved is not None:
            return load_saved(source.text, saved).to_iterable_dataset()
        path = list_shards(source, path, split)
    paths = [path] if isinstance(path, Path) else path
    if any(_file_format(file) == ".json" for file in paths):
        raise UserError(
            f"dataset {source.location}: --streaming cannot read a .json file row by row; convert "
            "it to .jsonl, or omit --streaming"
        )
    from datasets import IterableDataset

    return IterableDataset.from_generator(partial(_stream_files, source, paths))


def no_rows(name: str) -> UserError:
    """Return the error for a dataset without rows."""
    return UserError(f"dataset {name}: it has no rows; give a dataset with at least one prompt")


def _find_local(source: Source) -> Path | list[Path] | None:
    """Return the file, the folder, or the files of a pattern; None for a dataset on the hub.

    Raise UserError if the name is a path but not that of a readable dataset.
    """
    name = source.location
    path = Path(name)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"dataset {name[:200]!r}: not a valid path ({_describe(error)}); give a file or a "
            "hub id"
        ) from None
    if path.is_dir():
        refuse_other_folder(source.text, path)
        return path
    if not exists and source.is_pattern:
        return _find_matches(source)
    file_format = _file_format(path)
    if not exists and file_format not in FORMATS and not is_path(name):
        close = closest_preset(name)
        if close is not None and "/" not in name:
            raise UserError(f"dataset {name}: neither a file nor a preset; did you mean {close}?")
        return None
    _check_file(source, path)
    return path


def _find_matches(source: Source) -> list[Path]:
    """Return the files that a pattern such as data/*.parquet matches, sorted by name."""
    paths = list_matches(source.location)
    if not paths:
        raise UserError(f"dataset {source.location}: no file matches the pattern; check the path")
    for path in paths:
        _check_file(source, path)
    return paths


def _check_file(source: Source, path: Path) -> None:
    """Raise UserError unless ``path`` is a file of a known format with content."""
    name = source.location
    file_format = _file_format(path)
    special = describe_special(path)
    if special is not None:
        raise UserError(f"dataset {name}: expected a regular file, got {special}; name a file")
    if not path.is_file():
        raise UserError(f"dataset {name}: no such file; check the path")
    if file_format == ".arrow":
        raise UserError(
            f"dataset {name}: expected the folder that save_to_disk wrote, got a file in it; name "
            "the folder"
        )
    if file_format not in FORMATS:
        raise UserError(
            f"dataset {name}: expected one of {', '.join(FORMATS)} (also .gz), got "
            f"'{path.suffix}'; convert the file"
        )
    if path.stat().st_size == 0:
        raise no_rows(name)
    if is_lfs_pointer(path):
        raise UserError(f"dataset {name}: {describe_lfs_pointer(path)}")


def _file_format(path: Path) -> str:
    """Return the suffix of a file without .gz, in lower case."""
    if _is_compressed(path):
        path = path.with_suffix("")
    return path.suffix.lower()


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _unreadable(source: Source, path: Path, error: Exception) -> UserError:
    reason, advice = _describe(error), "repair the file"
    if isinstance(error, UnicodeError):
        advice = "save the file as UTF-8"
    if isinstance(error, UnicodeDecodeError):
        reason = f"{_locate_other_bytes(path)}expected UTF-8, got other bytes"
    elif isinstance(error, RecursionError):
        reason = "its objects are nested too deeply"
    name = source.location
    if Path(name).expanduser() != path:  # one of several files
        name += f": {path.name}"
    return UserError(
        f"dataset {name}: not readable as {_file_format(path)[1:]} ({reason}); {advice}"
    )


def _locate_other_bytes(path: Path) -> str:
    """Return the number of the first line that is not UTF-8."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number}: "
    return ""


def _open(path: Path) -> IO[str]:
    if _is_compressed(path):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _open_bytes(path: Path) -> IO[bytes]:
    if _is_compressed(path):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")


@phase("contacting the hub for the dataset")
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
    """Return the first line of an exception's text; its type if it has none."""
    return first_line(error) or type(error).__name__


def _stream_files(source: Source, paths: list[Path]) -> Iterator[Row]:
    """Yield the rows of files, one at a time."""
    for path in paths:
        try:
            yield from _stream_file(path)
        except UNREADABLE as error:
            raise _unreadable(source, path, error) from None


def _stream_file(path: Path) -> Iterator[Row]:
    if _file_format(path) == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as table:
            for rows in table.iter_batches(batch_size=100):
                yield from rows.to_pylist()
        return
    _check_encoding(path)
    with _open(path) as file:
        if _file_format(path) in (".csv", ".tsv"):
            yield from read_table(file, _separator_of(path))
        elif _file_format(path) == ".txt":
            yield from read_texts(file)
        else:
            yield from read_lines(file)


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
