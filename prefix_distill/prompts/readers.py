"""Parse the text of JSON, JSONL, CSV and TSV files into rows."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .names import PROMPT_COLUMNS

Row = dict[str, Any]

LONGEST_CELL = 2**31 - 1  # characters; the csv module's own limit is 131,072
LONGEST_INT = 4_000  # digits; Python refuses to convert more than 4,300


def parse_json(text: str) -> Any:
    """Parse JSON. A whole number of thousands of digits stays text.

    Raise ValueError if it is no JSON, or an object has the same key twice.
    """
    return json.loads(text, object_pairs_hook=_make_object, parse_int=_read_int)


def _make_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {key[:60]!r} twice, expected distinct keys")
    return row


def _read_int(digits: str) -> int | str:
    if len(digits) > LONGEST_INT:
        return digits
    return int(digits)


def read_objects(text: str) -> tuple[list[Row], tuple[str, ...]]:
    """Parse one JSON list of objects, one object, or one object per line.

    Return (rows, remarks). An object with one list of objects, such as {"data": [...]}, stands for
    that list. Raise ValueError if there are no rows to read.
    """
    _, _, rest = text.lstrip().partition("\n")
    if rest.strip() and _starts_with_object_line(text):
        return list(read_lines(text.split("\n"))), ()
    try:
        parsed = parse_json(text)
    except json.JSONDecodeError:
        parsed = list(read_lines(text.split("\n")))
    except ValueError as error:
        if "\n" in text.strip():
            raise
        raise ValueError(f"line 1: {error}") from None
    remarks: tuple[str, ...] = ()
    if isinstance(parsed, dict):
        parsed, remarks = _unwrap(parsed)
    if not isinstance(parsed, list):
        parsed = [parsed]
    for number, row in enumerate(parsed):
        _check_object(number, row)
    return parsed, remarks


def read_json_lines(text: str) -> tuple[list[Row], tuple[str, ...]]:
    """Parse one object per line. Text that is no such lines is read by ``read_objects``.

    Return (rows, remarks).
    """
    if _starts_with_object_line(text):
        return list(read_lines(text.split("\n"))), ()
    return read_objects(text)


def read_texts(lines: Iterable[str]) -> Iterator[Row]:
    """Yield each line of plain text as a row with the column text; skip empty lines."""
    for line in lines:
        if line.strip():
            yield {"text": line.strip()}


def _starts_with_object_line(text: str) -> bool:
    """Return whether the first line is a whole object."""
    first, _, _ = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first, parse_int=_read_int), dict)
    except ValueError:
        return False


def _unwrap(document: Row) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of an object, and a remark if they are the only list of objects in it."""
    if any(name.strip().lower() in PROMPT_COLUMNS for name in document):
        return [document], ()
    lists = [name for name, value in document.items() if _is_list_of_objects(value)]
    if not lists:
        return [document], ()
    if len(lists) > 1:
        raise ValueError(
            f"expected one list of rows, got the lists {', '.join(lists)[:200]}; save one of them "
            "as a file"
        )
    [name] = lists
    remark = f"rows from the list '{name}' of the file"
    others = [other for other in document if other != name]
    if others:
        remark += f"; not used beside it: {', '.join(others)[:200]}"
    return document[name], (remark,)


def _is_list_of_objects(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, dict) for entry in value)


def read_lines(lines: Iterable[str]) -> Iterator[Row]:
    """Yield the object on each line of JSON text; skip empty lines."""
    count = itertools.count()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        _check_object(next(count), row)
        yield row


def _check_object(number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError(
            f'row {number}: expected an object such as {{"prompt": …}}, got {str(row)[:60]!r}'
        )


def read_table(
    file: Iterable[str], separator: str | None = None
) -> Iterator[dict[str, str | None]]:
    """Yield the rows of CSV text; an empty cell is None.

    ``separator`` None: the comma, unless the first line has none but a semicolon or a tab.
    """
    lines = iter(file)
    header = next(lines, "")
    if separator is None:
        separator = choose_separator(header)
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(
        itertools.chain([header], lines),
        delimiter=separator,
        strict=True,
        skipinitialspace=f"{separator} " in header,  # "a, b": quotes follow the space
    )
    columns = [name.strip() for name in next(reader, [])]
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


def choose_separator(header: str) -> str:
    """Return what separates the column names of a CSV header: a comma, a semicolon or a tab."""
    for separator in (",", ";", "\t"):
        if separator in header:
            return separator
    return ","
