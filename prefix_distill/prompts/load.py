"""Load a prompt set from files, the hub, a preset or a built-in task."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import UserError
from ..lab import task
from ..lab.task import LAB, MAX_NEW_TOKENS
from .account import describe, describe_in_full
from .files import Table, iterate_rows, no_rows, read_rows, stream_rows
from .prompt import Prompt, PromptSet
from .readers import Row
from .row_format import RowFormat
from .rows import BUFFER, PromptBuilder
from .sources import Source, parse_source
from .stream import shuffle

if TYPE_CHECKING:  # the import takes a second, and a plain file does not need it
    from datasets import Dataset, IterableDataset

DEFAULT_FORMAT = RowFormat()
PEEKED = 100  # rows of a stream from the hub, or of a table, by which columns are chosen


@dataclass(frozen=True, kw_only=True)
class _Selection:
    """The rows to use: the split, the most prompts, and whether the prompts are evaluated."""

    split: str
    limit: int | None
    evaluated: bool


def load_prompts(
    name: str,
    row_format: RowFormat = DEFAULT_FORMAT,
    *,
    split: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> PromptSet:
    """Load the prompts of one dataset for training.

    ``name`` is a file of one of ``FORMATS``, a pattern of files, a folder, a hub id, a preset,
    ``lab:TASK`` or ``lab:TASK:20-25`` (problems with 20 to 25 steps). With ``#N`` it is a sample of
    N rows. ``split`` defaults to the preset's training split, else train. ``part`` is (position of
    the dataset, number of datasets), which makes the prompts' indices unique.

    Raise UserError on a missing file or column, an empty dataset, a row without a prompt or
    privileged text, and on fewer than N rows.
    """
    source = parse_source(name)
    if source.is_embedded and part[1] == 1:  # in a mixture the columns are those of the others
        _check_embedded_column(source, row_format.prompt_column, "prompt")
        _check_embedded_column(source, row_format.answer_column, "answer")
    selection = _Selection(split=split or source.training_split, limit=None, evaluated=False)
    return _load(source, row_format, selection, part=part)


def load_evaluation_prompts(
    name: str,
    row_format: RowFormat = DEFAULT_FORMAT,
    *,
    split: str | None = None,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> PromptSet:
    """Load the first ``limit`` prompts of one dataset for evaluation.

    Of a preset that is sorted by subject, load evenly spaced prompts instead. Streamed rows keep
    their order. ``split`` defaults to the preset's test split, else test. The other arguments and
    errors are those of ``load_prompts``.
    """
    source = parse_source(name)
    selection = _Selection(split=split or source.test_split, limit=limit, evaluated=True)
    return _load(source, row_format, selection, part=part)


def _load(
    source: Source, row_format: RowFormat, selection: _Selection, part: tuple[int, int]
) -> PromptSet:
    builder = PromptBuilder(source=source, row_format=row_format, part=part)
    if source.is_embedded:
        _check_embedded_column(
            source, row_format.privileged_column, known="solution", flag="privileged"
        )
        table = Table(rows=_embedded_rows(source, selection))
        return _select(builder, table, selection)
    if row_format.streaming:
        return _stream(builder, stream_rows(source, selection.split), selection)
    return _select(builder, read_rows(source, selection.split), selection)


def _check_embedded_column(
    source: Source, column: str | None, known: str, flag: str | None = None
) -> None:
    """Raise UserError unless ``column`` is None or the one that embedded problems have."""
    if column not in (None, known):
        raise UserError(
            f"dataset {source.text}: expected the column {known}, got '{column}'; change "
            f"--{flag or known}-column"
        )


def _stream(builder: PromptBuilder, rows: "IterableDataset", selection: _Selection) -> PromptSet:
    """Return a set that reads its rows on demand, or now if the number of rows is known."""
    source = builder.source
    order = rows
    if not selection.evaluated or source.count is not None:
        order = rows.shuffle(seed=builder.row_format.seed, buffer_size=BUFFER)
    remaining = iterate_rows(source.text, order)
    if source.is_file:
        first_rows = list(itertools.islice(iterate_rows(source.text, rows), BUFFER))
    else:
        # a second pass over the hub would download the rows twice
        first_rows = list(itertools.islice(remaining, PEEKED))
        remaining = itertools.chain(first_rows, remaining)
    if not first_rows:
        raise no_rows(source.text)
    columns: Row = {}
    for row in reversed(first_rows):  # a row of a file may lack a column
        columns.update(row)
    builder = builder.detect_columns(columns).count_positions(first_rows)
    prompts: Iterator[Prompt] | tuple[Prompt, ...] = _build_each(builder, remaining)
    if source.count is not None:
        counted = tuple(itertools.islice(prompts, source.count))
        _check_count(source, len(counted))
        prompts = counted[: selection.limit]
    elif selection.limit is not None:
        prompts = tuple(itertools.islice(prompts, selection.limit))
    if isinstance(prompts, tuple):
        return _make_set(builder, selection.split, prompts, available=None)
    # what is said of the stream is counted in its first rows; prompts come later
    peeking = replace(builder, readings=Counter(), changes=Counter())
    peeked = tuple(_build_each(peeking, first_rows))
    loaded = _make_set(
        peeking,
        selection.split,
        peeked,
        available=None,
        remarks=(f"its references were counted in the first {len(peeked):,} rows",),
    )
    return replace(loaded, prompts=prompts)


def _build_each(builder: PromptBuilder, rows: Iterable[Row]) -> Iterator[Prompt]:
    for index, row in enumerate(rows):
        yield builder.build(index, row)


def _select(builder: PromptBuilder, table: Table, selection: _Selection) -> PromptSet:
    """Return a set of all rows, or of those that name#count and the limit select."""
    source, limit = builder.source, selection.limit
    rows = table.rows
    if len(rows) == 0:
        raise no_rows(source.text)
    builder = builder.detect_columns(_unite_columns(rows)).count_positions(rows)
    order: Sequence[int] = range(len(rows))
    if source.count is not None:
        _check_count(source, len(rows))
        order = sorted(shuffle(order, builder.row_format.seed, "sample")[: source.count])
    if limit is not None and limit < len(order):
        if source.preset is not None and source.preset.sorted:
            order = [order[i * len(order) // limit] for i in range(limit)]
        else:
            order = order[:limit]
    prompts = tuple(builder.build(index, rows[index]) for index in order)
    return _make_set(builder, selection.split, prompts, available=len(rows), remarks=table.remarks)


def _unite_columns(rows: "list[Row] | Dataset") -> Row:
    """Return a row with every column, and the first value of each that is not null.

    Of a table with a schema, the first ``PEEKED`` rows are read.
    """
    columns: Row = {}
    if not isinstance(rows, list):
        rows = rows.select(range(min(len(rows), PEEKED)))
    for row in rows:
        for name, value in row.items():
            if columns.get(name) is None:
                columns[name] = value
    return columns


def _check_count(source: Source, available: int) -> None:
    if source.count is not None and available < source.count:
        raise UserError(
            f"dataset {source.text}: expected at least {source.count:,} rows, got {available:,}; "
            "lower the number after #, or omit it"
        )


def _make_set(
    builder: PromptBuilder,
    split: str,
    prompts: tuple[Prompt, ...] | Iterator[Prompt],
    *,
    available: int | None,
    remarks: tuple[str, ...] = (),
) -> PromptSet:
    """Return the prompts with the properties of their task.

    ``available`` is the number of rows in the dataset, or None if they are streamed.
    """
    source = builder.source
    notes = describe(builder, split, available, remarks=remarks)
    first = None
    if isinstance(prompts, tuple) and prompts:
        first = prompts[0]
    account = describe_in_full(builder, first)
    if source.is_embedded:
        other_splits = {"test": (source.location, "test")}
        if split != "train":
            other_splits["examples"] = (source.location, "train")
        return PromptSet(
            name=source.text,
            prompts=prompts,
            answer_format="hash",
            max_new_tokens=MAX_NEW_TOKENS,
            privileged_template="{solution} {problem}",
            other_splits=other_splits,
            notes=notes,
        )
    answer_format = None
    if builder.own_answer_format != "auto":
        answer_format = builder.own_answer_format
    return PromptSet(
        name=source.text,
        prompts=prompts,
        answer_format=answer_format,
        other_splits=_other_splits(source, split),
        notes=notes,
        account=account,
    )


def _other_splits(source: Source, split: str) -> dict[str, tuple[str, str]]:
    """Return the preset's splits for testing and for examples, except ``split``."""
    preset = source.preset
    if preset is None or source.is_file:
        return {}
    uses = {"test": preset.test, "examples": preset.examples or preset.split}
    return {use: (source.name, other) for use, other in uses.items() if other != split}


def _embedded_rows(source: Source, selection: _Selection) -> list[Row]:
    """Return problems of a built-in task as rows.

    By default 4,000 training problems or 2,000 others, and at most 900 per number of steps.
    """
    task_name, colon, steps = source.location[len(LAB) :].partition(":")
    limit = selection.limit
    if source.count is not None:
        limit = None  # sample from all rows first
    default = 4_000 if selection.split == "train" else 2_000
    try:
        span = None
        if colon:
            span = _parse_steps(steps)
            default = min(default, task.PROBLEMS_PER_STEPS * len(span))
        problems = task.sample_problems(task_name, selection.split, limit or default, steps=span)
    except ValueError as error:
        raise UserError(f"dataset {source.text}: {error}") from None
    rows = []
    for problem in problems:
        rows.append(
            {"prompt": problem.prompt, "answer": problem.answer, "solution": problem.solution}
        )
    return rows


def _parse_steps(text: str) -> range:
    if not re.fullmatch(r"[0-9]{1,2}-[0-9]{1,2}", text):
        raise ValueError(f"steps {text!r}: expected a range such as 20-25")
    low, high = text.split("-")
    return range(int(low), int(high) + 1)
