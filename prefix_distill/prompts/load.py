"""Load a prompt set from files, the hub, a preset or the embedded laboratory."""

import itertools
import re

from ..errors import UserError
from ..lab import task
from ..lab.task import LAB, MAX_NEW_TOKENS
from .files import iterate_rows, open_rows
from .prompt import PromptSet
from .rows import BUFFER, RowFormat
from .sources import Source, parse_source
from .stream import shuffled


def load_prompts(
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
    preset = source.preset
    split = split or (
        ("test" if evaluated else "train")
        if preset is None
        else preset.test
        if evaluated
        else preset.split
    )
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
        rows, streaming = (
            _embedded(
                name, source.place[len(LAB) :], split, limit if source.count is None else None
            ),
            False,
        )
    else:
        rows = open_rows(source, split, streaming)
    if streaming:
        reading = iterate_rows(
            name,
            rows
            if evaluated and source.count is None
            else rows.shuffle(seed=seed, buffer_size=BUFFER),
        )
        seen = list(
            itertools.islice(iterate_rows(name, rows), BUFFER)
            if source.local
            else itertools.islice(reading, 1)
        )
        if not seen:
            raise UserError(f"dataset {name}: it has no rows; give one with at least one prompt")
        form = form.columns(
            {key: value for row in reversed(seen) for key, value in row.items()}
        )  # in a file, a row may lack one
        prompts = (
            form.prompt(index, row)
            for index, row in enumerate(reading if source.local else itertools.chain(seen, reading))
        )
        if source.count is not None:
            prompts = tuple(itertools.islice(prompts, source.count))
            _enough(source, len(prompts))
            prompts = prompts[:limit]
        elif limit is not None:
            prompts = tuple(itertools.islice(prompts, limit))
    else:
        if len(rows) == 0:
            raise UserError(f"dataset {name}: it has no rows; give one with at least one prompt")
        form = form.columns(rows[0])
        order = range(len(rows))
        if source.count is not None:
            _enough(source, len(rows))
            order = sorted(shuffled(order, seed, "sample")[: source.count])
        if limit is not None and limit < len(order):
            order = (
                [order[i * len(order) // limit] for i in range(limit)]
                if evaluated and preset and preset.sorted
                else order[:limit]
            )
        prompts = tuple(form.prompt(index, rows[index]) for index in order)
    return PromptSet(
        name,
        prompts,
        **_task(source, split),
        notes=form.notes(split, None if streaming else len(rows)),
    )


def _enough(source: Source, there: int) -> None:
    if there < source.count:
        raise UserError(
            f"dataset {source.text}: it has {there:,} rows, expected at least the {source.count:,} "
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
