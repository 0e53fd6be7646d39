"""Load a prompt set from files, the hub, a preset or the embedded laboratory."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..lab import task
from ..lab.task import LAB, MAX_NEW_TOKENS
from .files import iterate_rows, open_rows
from .prompt import Prompt, PromptSet
from .rows import BUFFER, RowFormat
from .sources import Source, parse_source
from .stream import shuffled

if TYPE_CHECKING:  # the import takes a second, and a plain file does not need it
    from datasets import Dataset, IterableDataset


def load_prompts(  # noqa: PLR0913  each is an option of the command line
    name: str,
    *,
    split: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system: str | None = None,
    instruction: str | None = None,
    limit: int | None = None,
    privileged_column: str | None = None,
    prompt_template: str | None = None,
    seed: int = 0,
    streaming: bool = False,
    evaluated: bool = False,
    worked: bool = False,
    part: tuple[int, int] = (0, 1),
) -> PromptSet:
    """Reads a ``.jsonl/.json/.csv/.parquet`` file (the first three also ``.gz``; UTF-8), a hub data
    set, a preset, ``lab:TASK`` or ``lab:TASK:20-25`` (of so many steps), or ``#N`` rows of one,
    drawn by ``seed``.

    Columns are found by the usual names, are the preset's, or given (``doc.question`` reaches into
    a record). ``evaluated``: the split to evaluate on and, of ``limit`` prompts, the first (of a
    preset that is sorted by subject: evenly spaced ones). ``streaming``: rows are read as they are
    asked for, drawn from a buffer of BUFFER by ``seed``; evaluated ones in their order. ``worked``:
    with what each shows as an example. ``part``: (set, number of sets). UserError on a missing
    file, a missing column, an empty set, a row without a prompt or without what
    ``privileged_column`` should hold, and on fewer rows than are asked for.
    """
    source = parse_source(name)
    split = split or _default_split(source, evaluated)
    form = RowFormat(
        source,
        prompt_column,
        answer_column,
        system,
        instruction,
        privileged_column,
        prompt_template,
        seed,
        worked,
        part,
    )
    if source.place.startswith(LAB):
        if privileged_column not in (None, "solution"):
            raise UserError(
                f"dataset {name}: no column '{privileged_column}'; it has solution; change "
                "--privileged-column"
            )
        most = limit if source.count is None else None
        rows = _embedded(name, source.place[len(LAB) :], split, most)
        return _select(form, rows, split, limit, evaluated)
    rows = open_rows(source, split, streaming)
    if streaming:
        return _stream(form, rows, split, limit, evaluated)
    return _select(form, rows, split, limit, evaluated)


def _default_split(source: Source, evaluated: bool) -> str:
    """Return the preset's split, or the usual train or test."""
    if source.preset is None:
        return "test" if evaluated else "train"
    return source.preset.test if evaluated else source.preset.split


def _stream(
    form: RowFormat, rows: "IterableDataset", split: str, limit: int | None, evaluated: bool
) -> PromptSet:
    """Return a set whose rows are read on demand; a set with a known number of rows is read at
    once."""
    source = form.source
    in_order = evaluated and source.count is None
    drawn = rows if in_order else rows.shuffle(seed=form.seed, buffer_size=BUFFER)
    reading: Iterator[dict] = iterate_rows(source.text, drawn)
    if source.local:
        seen = list(itertools.islice(iterate_rows(source.text, rows), BUFFER))
    else:
        seen = list(itertools.islice(reading, 1))
        reading = itertools.chain(seen, reading)
    _refuse_empty(source, len(seen))
    # a row of a file may lack a column
    form = form.columns({key: value for row in reversed(seen) for key, value in row.items()})
    prompts: Iterator[Prompt] = (form.prompt(index, row) for index, row in enumerate(reading))
    first: tuple[Prompt, ...] | Iterator[Prompt] = prompts
    if source.count is not None:
        counted = tuple(itertools.islice(prompts, source.count))
        _refuse_fewer(source, source.count, len(counted))
        first = counted[:limit]
    elif limit is not None:
        first = tuple(itertools.islice(prompts, limit))
    return PromptSet(source.text, first, **_task(source, split), notes=form.notes(split, None))


def _select(
    form: RowFormat,
    rows: "list[dict] | Dataset",
    split: str,
    limit: int | None,
    evaluated: bool,
) -> PromptSet:
    """Return the set of all rows, or of those that name#count and ``limit`` select."""
    source = form.source
    _refuse_empty(source, len(rows))
    form = form.columns(rows[0])
    order: Sequence[int] = range(len(rows))
    if source.count is not None:
        _refuse_fewer(source, source.count, len(rows))
        order = sorted(shuffled(order, form.seed, "sample")[: source.count])
    if limit is not None and limit < len(order):
        if evaluated and source.preset is not None and source.preset.sorted:
            order = [order[i * len(order) // limit] for i in range(limit)]
        else:
            order = order[:limit]
    prompts = tuple(form.prompt(index, rows[index]) for index in order)
    notes = form.notes(split, len(rows))
    return PromptSet(source.text, prompts, **_task(source, split), notes=notes)


def _refuse_empty(source: Source, there: int) -> None:
    if there == 0:
        raise UserError(f"dataset {source.text}: it has no rows; give one with at least one prompt")


def _refuse_fewer(source: Source, count: int, there: int) -> None:
    if there < count:
        raise UserError(
            f"dataset {source.text}: it has {there:,} rows, expected at least the {count:,} "
            "behind #; ask for fewer, or leave #… out"
        )


def _task(source: Source, split: str) -> dict:
    """What a PromptSet knows of the task."""
    if source.place.startswith(LAB):
        return {
            "answer_format": "hash",
            "max_new_tokens": MAX_NEW_TOKENS,
            "privileged_template": "{solution} {problem}",
            "elsewhere": {"test": (source.place, "test")}
            | ({} if split == "train" else {"examples": (source.place, "train")}),
        }
    preset = source.preset
    if preset is None:
        return {}
    uses = (
        {} if source.local else {"test": preset.test, "examples": preset.examples or preset.split}
    )
    return {
        "answer_format": None if preset.answer_format == "auto" else preset.answer_format,
        "elsewhere": {use: (source.name, other) for use, other in uses.items() if other != split},
    }


def _embedded(name: str, text: str, split: str, limit: int | None) -> list[dict]:
    task_name, colon, steps = text.partition(":")
    try:
        span = None
        if colon:
            if not re.fullmatch(r"[0-9]{1,2}-[0-9]{1,2}", steps):
                raise ValueError(f"steps {steps!r}: expected a range such as 20-25")
            low, high = map(int, steps.split("-"))
            span = range(low, high + 1)
        most = {"train": 4_000}.get(split, 2_000)
        if span is not None and limit is None:
            most = min(most, 900 * len(span))
        problems = task.problems(task_name, split, limit or most, steps=span)
    except ValueError as error:
        raise UserError(f"dataset {name}: {error}") from None
    return [
        {"prompt": problem.prompt, "answer": problem.answer, "solution": problem.solution}
        for problem in problems
    ]
