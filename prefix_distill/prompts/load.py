"""Load a prompt set from files, the hub, a preset or the embedded laboratory."""

import csv
import gzip
import itertools
import json
import random
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from ..engine.models import LAB, Model, is_path
from ..errors import UserError
from ..lab import task
from . import answers
from .presets import PRESETS, Preset, nearest

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "instruction", "query", "input")
ANSWER_COLUMNS = (
    "answer",
    "solution",
    "final_answer",
    "ground_truth",
    "target",
    "gold",
    "output",
    "response",
)
PRIVILEGED = (  # the teacher's user turn where it is shown a reference solution, after arXiv 2601.18734; ours in wording
    "{problem}\n\nA reference solution of this problem, between the two lines:\n-----\n{solution}\n-----\n\nRead it until you "
    "understand why it is right. Then solve the problem yourself, step by step and in your own words, without mentioning it."
)
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
}  # names of roles where turns are written {"from": …, "value": …}
HALF = re.compile("[\ud800-\udfff]")  # cannot be written as UTF-8
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # of a prompt template
BUFFER = 1_000  # rows of a streamed set among which the next one is drawn


@dataclass(frozen=True)
class Prompt:
    """One problem: chat messages ending with the user's turn, the reference answer if the data has one, and what only the
    teacher's prompt shows, if anything. ``around``: what stands before and after the problem in that turn (template, instruction).
    ``worked``: what it shows as an example. ``index``: row (of a streamed set: place in the stream) · number of sets + set, in the order
    in which they are named."""

    index: int
    messages: tuple[dict, ...]
    answer: str | None
    privileged: str | None = None
    around: tuple[str, str] = ("", "")
    worked: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the data's order; streamed, an iterator over them in a drawn order. ``answer_format``: how the task itself says its
    answers are written, or None. ``max_new_tokens``: the longest response the task needs (tokens), where it is known.
    ``privileged_template``: the form in which the task's own networks have met privileged prompts. ``elsewhere``: its other splits by
    use (test, examples), as (name, split) to load. ``notes``: what was chosen."""

    name: str
    prompts: tuple[Prompt, ...] | Iterator[Prompt]
    answer_format: str | None = None
    max_new_tokens: int | None = None
    privileged_template: str | None = None
    elsewhere: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        return not isinstance(self.prompts, tuple)

    @property
    def answered(self) -> bool:
        """Do all prompts carry a reference answer?"""
        return all(p.answer is not None for p in self.prompts)


@dataclass(frozen=True)
class Source:
    """One data set, as named: ``place`` is a file, a folder, a hub id or lab:TASK; ``count`` the rows of name#count."""

    text: str
    name: str
    place: str
    preset: Preset | None
    count: int | None

    @property
    def local(self) -> bool:
        """Is it a file, which has no splits?"""
        return _there(self.place, Path.is_file)


def sources(text: str) -> list[tuple[str, Fraction]]:
    """``gsm8k:3,more.jsonl#100:1`` → [("gsm8k", 3), ("more.jsonl#100", 1)]. The weight (1 where none is given) follows the last colon;
    one data set alone has none, so that lab:TASK:20-25 and C:\\x.jsonl stay what they are. UserError on an empty name or weight 0."""
    if "," not in text or _there(text):
        return [(text, Fraction(1))]
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:\s].*?)(?::([0-9]{1,6}(?:\.[0-9]{1,6})?))?", part.strip(), re.S)
        if match is None or Fraction(match[2] or 1) == 0:
            raise UserError(
                f"dataset {text[:200]}: expected data sets and their weights such as gsm8k:3,more.jsonl:1, got '{part.strip()[:80]}'; "
                "name one, with a weight above 0"
            )
        found.append((match[1], Fraction(match[2] or 1)))
    return found


def _source(text: str) -> Source:
    """``name``, ``name#1000``, ``preset=place`` or ``preset=place#1000``."""
    name, mark, digits = text.rpartition("#")
    if not mark or _there(text) or re.search(r"[/\\.]", digits):
        name, digits = text, None
    elif not re.fullmatch("[0-9]{1,12}", digits) or int(digits) == 0 or not name:
        raise UserError(
            f"dataset {text[:200]}: expected a number of rows behind #, such as {name[:80] or 'gsm8k'}#1000, got '{digits[:80]}'"
        )
    short, given, place = name.partition("=")
    if given and not _there(name) and not re.search(r"[/\\]", short):
        if short.lower() not in PRESETS or not place or place.startswith(LAB):
            near = nearest(short)
            raise UserError(
                f"dataset {text[:200]}: expected PRESET=PLACE such as gsm8k=my.jsonl, a file, folder or hub id; "
                + (
                    f"did you mean {near}?"
                    if near and near != short.lower()
                    else f"presets are {', '.join(PRESETS)}"
                )
            )
    else:
        short, place = name, ""
    preset = PRESETS.get(short.lower())
    return Source(
        text,
        name,
        name if preset is None else place or preset.hub,
        preset,
        None if digits is None else int(digits),
    )


def _there(text: str, what=Path.exists) -> bool:
    try:
        return what(Path(text).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False


def load(
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
    """Reads a ``.jsonl/.json/.csv/.parquet`` file (the first three also ``.gz``; UTF-8), a hub data set, a preset, ``lab:TASK`` or ``lab:TASK:20-25``
    (of so many steps), or ``#N`` rows of one, drawn by ``seed``.

    Columns are found by the usual names, are the preset's, or given (``doc.question`` reaches into a record). ``evaluated``: the split
    to evaluate on and, of ``limit`` prompts, the first (of a preset that is sorted by subject: evenly spaced ones). ``streaming``: rows are
    read as they are asked for, drawn from a buffer of BUFFER by ``seed``; evaluated ones in their order. ``worked``: with what each
    shows as an example. ``part``: (set, number of sets). UserError on a missing file, a missing column, an empty set, a row without a
    prompt or without what ``privileged_column`` should hold, and on fewer rows than are asked for.
    """
    source = _source(name)
    preset = source.preset
    split = split or (
        ("test" if evaluated else "train")
        if preset is None
        else preset.test
        if evaluated
        else preset.split
    )
    form = _Form(
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
                f"dataset {name}: no column '{privileged_column}'; it has solution; change --privileged-column"
            )
        rows, streaming = (
            _embedded(
                name, source.place[len(LAB) :], split, limit if source.count is None else None
            ),
            False,
        )
    else:
        rows = _rows(source, split, streaming)
    if streaming:
        reading = _told(
            name,
            rows
            if evaluated and source.count is None
            else rows.shuffle(seed=seed, buffer_size=BUFFER),
        )
        seen = list(
            itertools.islice(_told(name, rows), BUFFER)
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
            f"dataset {source.text}: it has {there:,} rows, expected at least the {source.count:,} behind #; ask for fewer, or leave "
            "#… out"
        )


@dataclass(frozen=True)
class _Form:
    """How a row of a data set becomes a prompt; what is None is the preset's, or found by ``columns``."""

    source: Source
    prompt_column: str | None
    answer_column: str | None
    system: str | None
    instruction: str | None
    privileged_column: str | None
    template: str | None
    seed: int
    worked: bool
    part: tuple[int, int]

    def columns(self, first: dict) -> "_Form":
        """The same with its columns, which ``first``, a row, must have."""
        name, preset = self.source.text, self.source.preset
        if self.source.place.startswith(LAB):
            return replace(self, prompt_column="prompt", answer_column="answer")
        prompt, answer, instruction = self.prompt_column, self.answer_column, self.instruction
        if preset is not None:
            prompt, answer, instruction = (
                chosen if given is None else given
                for given, chosen in (
                    (prompt, preset.prompt),
                    (answer, preset.answer),
                    (instruction, preset.instruction),
                )
            )
        prompt = _column(name, first, prompt, PROMPT_COLUMNS, "--prompt-column", required=True)
        answer = _column(
            name,
            first,
            answer,
            ANSWER_COLUMNS if preset is None else (),
            "--answer-column",
            required=False,
        )
        if self.privileged_column is not None:
            _column(name, first, self.privileged_column, (), "--privileged-column", required=True)
        return replace(self, prompt_column=prompt, answer_column=answer, instruction=instruction)

    def prompt(self, index: int, row: dict) -> Prompt:
        """Row ``index`` as a prompt. UserError where it is none."""
        name, preset = self.source.text, self.source.preset
        value, answer = _reach(row, self.prompt_column), None
        if self.answer_column is not None:
            answer = _reach(row, self.answer_column)
        if preset is not None and isinstance(value, str) and (preset.options or preset.wrong):
            value, answer = self._choice(index, row, value, answer)
        messages, closing = _messages(name, index, value)
        if preset is not None and preset.cut:
            messages[-1] = {
                **messages[-1],
                "content": re.sub(preset.cut, "", messages[-1]["content"]),
            }
        if self.answer_column is None:
            answer = (
                closing
                if preset is None or answers.extract(str(closing), "boxed") is not None
                else None
            )
        privileged = None if self.privileged_column is None else _reach(row, self.privileged_column)
        if self.privileged_column is not None and not (
            isinstance(privileged, str) and privileged.strip()
        ):
            raise UserError(
                f"dataset {name}: row {index} has no text in '{self.privileged_column}' (got {str(privileged)[:60]!r}); remove or "
                "repair the row, or change --privileged-column"
            )
        answer = None if answer is None else str(answer)
        around = self._around(index, row)
        messages[-1] = {
            **messages[-1],
            "content": f"{around[0]}{messages[-1]['content']}{around[1]}",
        }
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        worked = self._solution(row, closing, answer) if self.worked else None
        for text in (
            *(m["content"] for m in messages),
            answer or "",
            privileged or "",
            worked or "",
        ):
            if HALF.search(text):
                raise UserError(
                    f"dataset {name}: row {index} has half of a surrogate pair in {text[:60]!r}; repair the row"
                )
        return Prompt(
            index * self.part[1] + self.part[0], tuple(messages), answer, privileged, around, worked
        )

    def _choice(self, index: int, row: dict, question: str, answer) -> tuple[str, str]:
        """The question with its options A, B, …, and the right one's letter. Where wrong ones are given, the order is drawn by the
        seed and the row."""
        preset = self.source.preset
        if preset.wrong:
            options = shuffled(
                [answer, *(row.get(column) for column in preset.wrong)], self.seed, "options", index
            )
            answer = chr(ord("A") + options.index(answer))
        else:
            options = _reach(row, preset.options)
        if (
            not isinstance(options, list)
            or not 2 <= len(options) <= 26
            or not all(isinstance(o, str) and o.strip() for o in options)
        ):
            raise UserError(
                f"dataset {self.source.text}: row {index} has no options of text in "
                f"'{preset.options or ', '.join(preset.wrong)}' (got {str(options)[:60]!r}); repair the row"
            )
        return "\n".join(
            [
                question.strip(),
                "",
                *(f"{chr(ord('A') + i)}. {o.strip()}" for i, o in enumerate(options)),
            ]
        ), answer

    def _around(self, index: int, row: dict) -> tuple[str, str]:
        """What stands before and after the problem: the template with this row's fields, the instruction before its end."""
        closing = f"\n\n{self.instruction}" if self.instruction else ""
        if self.template is None:
            return "", closing

        def field_of(match) -> str:
            if not match[1]:
                return match[0][:1] if match[1] is None else "{}"
            value = _reach(row, match[1])
            if value is None:
                raise UserError(
                    f"dataset {self.source.text}: row {index} has no '{match[1]}' for --prompt-template; it has {', '.join(row)} "
                    "(a brace itself is written twice)"
                )
            return str(value)

        before, after = (FIELD.sub(field_of, text) for text in self.template.split("{prompt}"))
        return before, closing + after

    def _solution(self, row: dict, closing: str | None, answer: str | None) -> str | None:
        """What this row shows as an example: its solution; under an instruction to box the answer, with the answer boxed."""
        preset, text = self.source.preset, None
        if preset is not None and preset.solution:
            text = _reach(row, preset.solution)
        elif self.answer_column not in ("solution", None) and isinstance(row.get("solution"), str):
            text = row["solution"]
        text = closing or answer if text is None else text
        if (
            text is None
            or (answer is None and self.answer_column is not None)
            or not (text := str(text)).strip()
        ):
            return None
        if (
            answer is not None
            and "\\boxed" in (self.instruction or "")
            and answers.extract(text, "boxed") is None
        ):
            final = answers.reference(answer)
            text = (
                re.sub(preset.solution_cut, "", text)
                if preset is not None and preset.solution_cut
                else text
            )
            text = (
                f"{'' if text.strip() == final else text.strip() + chr(10) * 2}\\boxed{{{final}}}"
            )
        return text

    def notes(self, split: str, there: int | None) -> tuple[str, ...]:
        """What was chosen; ``there``: rows of the set, None where it is streamed."""
        source, preset, notes = self.source, self.source.preset, []
        if preset is not None:
            where = source.place + (
                f" ({preset.config})" if preset.config and source.place == preset.hub else ""
            )
            where += "" if source.local else f", split {split}"
            notes.append(
                f"dataset {source.name}: {where}; prompt {self.prompt_column}, answer {self.answer_column or 'boxed in the last turn'}, "
                f"read as {preset.answer_format}; instruction {self.instruction or 'none'!r}; license: {preset.license}; {preset.note}"
            )
        if source.count is not None:
            notes.append(
                f"dataset {source.text}: {source.count:,} {'rows' if there is None else f'of {there:,} rows'}, drawn by --seed {self.seed}"
            )
        if there is None:
            notes.append(
                f"dataset {source.text}: streamed, row by row as they are needed, drawn by --seed {self.seed} from a buffer of {BUFFER:,} "
                "rows (evaluated ones: the first, in their order)"
                + (
                    "; its subjects stand one after another"
                    if preset is not None and preset.sorted
                    else ""
                )
            )
        return tuple(notes)


def _task(source: Source, split: str) -> dict:
    """What a PromptSet knows of the task."""
    if source.place.startswith(LAB):
        return {
            "answer_format": "hash",
            "max_new_tokens": task.MAX_NEW_TOKENS,
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


def _rows(source: Source, split: str, streaming: bool):
    """All rows, or, ``streaming``, an IterableDataset of them."""
    name, preset = source.place, source.preset
    path = Path(name)
    try:
        path = path.expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"dataset {name[:200]!r}: cannot be a path ({error.__class__.__name__}); give a file or a hub id"
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


UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)


def _unreadable(name: str, suffix: str, error: Exception) -> UserError:
    return UserError(
        f"dataset {name}: not readable as {suffix[1:]} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
        "repair the file"
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
    try:
        if folder is not None:
            config = preset.config if preset.config in get_dataset_config_names(folder) else None
            return (
                load_dataset(folder, config, split=split, streaming=True)
                if streaming
                else _quietly(folder, name=config, split=split)
            )
        config = preset.config if preset is not None and name == preset.hub else None
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds
        why = (str(error).strip().splitlines() or [""])[0][:200]
        if folder is not None:
            raise UserError(
                f"dataset {source.text}: the folder does not hold split {split} of it ({type(error).__name__}: {why}); name a file in it, "
                "or change --split"
            ) from None
        if preset is not None:
            raise UserError(
                f"dataset {source.text}: the hub gave no {name} ({type(error).__name__}: {why}); check the network, or give a copy as "
                f"{source.name.split('=')[0]}=FOLDER"
            ) from None
        raise UserError(
            f"dataset {name}: not a local file, and the hub gave none ({type(error).__name__}: {why})"
        ) from None


def _streamed(name: str, path: Path, suffix: str):
    """The rows of a file, one at a time. UserError for .json, which is one document."""
    from datasets import IterableDataset

    if suffix == ".json":
        raise UserError(
            f"dataset {name}: a .json file is one document, which --streaming cannot read row by row; write it as .jsonl, or leave "
            "--streaming out"
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


def _told(name: str, rows):
    """The rows of an IterableDataset; what stops it is one line."""
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:  # the hub client and the readers of formats raise many kinds
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"dataset {name}: reading it stopped ({type(error).__name__}: {why}); check the network or the file"
        ) from None


def _quietly(*what, **options):
    """``load_dataset`` into memory: the Arrow copy leaves nothing behind. ValueError on what it cannot read."""
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
            yield {column: cell or None for column, cell in zip(columns, cells)}


def _reach(row, column: str):
    for key in column.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _column(
    name: str, row: dict, given: str | None, usual: tuple[str, ...], flag: str, required: bool
) -> str | None:
    if given is not None:
        if _reach(row, given) is None and given.split(".")[0] not in row:
            raise UserError(
                f"dataset {name}: no column '{given}'; it has {', '.join(row)}; change {flag}"
            )
        return given
    for column in usual:
        if column in row:
            return column
    if required:
        raise UserError(
            f"dataset {name}: no prompt column ({', '.join(usual)}) among {', '.join(row)}; name it with {flag}"
        )
    return None


def _messages(name: str, index: int, value) -> tuple[list[dict], str | None]:
    """Text or a list of chat messages → messages ending with the user's turn, and a closing assistant turn as answer."""
    answer = None
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict)
            and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys())
            for m in value
        )
    ):
        messages = [
            {"role": m["role"], "content": m["content"]}
            if "role" in m
            else {"role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m["value"]}
            for m in value
        ]
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
    else:
        messages = []
    if (
        not messages
        or not all(isinstance(m["content"], str) for m in messages)
        or not messages[-1]["content"].strip()
    ):
        raise UserError(
            f"dataset {name}: row {index} has no prompt text (got {str(value)[:60]!r}); remove or repair the row"
        )
    if not all(m["role"] in ROLES for m in messages) or messages[-1]["role"] not in (
        "user",
        "tool",
    ):
        raise UserError(
            f"dataset {name}: row {index} has the roles {', '.join(str(m['role'])[:20] for m in messages[:9])} before its answer; "
            f"expected some of {', '.join(ROLES)}, the user's last; repair the row"
        )
    return messages, answer


def render(
    model: Model,
    messages: tuple[dict, ...],
    template: str,
    thinking: str = "auto",
    index: int | None = None,
    glue: str = "\n\n",
) -> list[int]:
    """Prompt ids in the model's own chat template (with its generation prompt), or as plain text (with its BOS): the messages with an empty
    line between them, and ``glue`` before an answer.

    ``thinking``: on or off sets the template's enable_thinking, auto leaves it alone. UserError when ``template`` is 'chat' and
    the tokenizer has none, when the template has no such switch, or when it refuses the messages (of prompt ``index``).
    """
    tokenizer = model.tokenizer
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"model {model.name}: its tokenizer has no chat template; use --template plain or auto"
        )
    chat = template != "plain" and tokenizer.chat_template
    if thinking != "auto" and "enable_thinking" not in (chat or ""):
        raise UserError(
            f"model {model.name}: its chat template has no thinking switch (enable_thinking); leave --student-thinking and "
            "--teacher-thinking at auto for it"
        )
    if not chat:
        text = messages[0]["content"]
        for message in messages[1:]:
            text += (
                ("" if text[-1:].isspace() else glue) if message["role"] == "assistant" else "\n\n"
            ) + message["content"]
        return tokenizer(text).input_ids
    switch = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, **switch
        )
    except Exception as error:  # jinja's TemplateError, or what the template raises itself
        raise UserError(
            f"model {model.name}: its chat template refuses prompt {index} ({str(error)[:200] or type(error).__name__}); "
            "drop --system or use --template plain"
        ) from None


def glue(settings) -> str:
    """What stands between a question and its answer in plain text: a template such as "Question: {prompt}\\nAnswer:" ends with the answer's
    name."""
    return "\n\n" if settings.prompt_template is None else " "


def teacher_messages(prompt: Prompt, template: str) -> tuple[dict, ...]:
    """The messages that the teacher reads: with something privileged, the problem in its last turn is ``template`` with the problem and
    the solution put in."""
    if prompt.privileged is None:
        return prompt.messages
    last, (before, after) = prompt.messages[-1], prompt.around
    fields = {
        "{problem}": last["content"][len(before) : len(last["content"]) - len(after)],
        "{solution}": prompt.privileged,
    }
    content = re.sub(r"\{problem\}|\{solution\}", lambda match: fields[match[0]], template)
    return (*prompt.messages[:-1], {**last, "content": f"{before}{content}{after}"})


@dataclass(frozen=True)
class Rendered:
    """A prompt as ids for both models; their templates and so their lengths may differ."""

    prompt: Prompt
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


def render_all(
    prompts, student: Model, teacher: Model, config, limit: int | None = None
) -> tuple[list[Rendered], int]:
    """Renders for both models, with the forced ``--begin`` text at the end, until ``limit`` prompts are kept.

    Drops what exceeds ``max_prompt_tokens`` on either side. Returns the kept ones and how many were dropped. UserError
    when nothing is left.
    """
    begin = [begin_ids(model, config.rollout.begin) for model in (student, teacher)]
    settings = config.data
    kept, dropped = [], 0
    for prompt in prompts:
        if limit is not None and len(kept) == limit:
            break
        shown = teacher_messages(prompt, settings.privileged_template or PRIVILEGED)
        ids = [
            tuple(
                render(model, messages, settings.template, thinking, prompt.index, glue(settings))
            )
            for model, messages, thinking in (
                (student, prompt.messages, settings.student_thinking),
                (teacher, shown, settings.teacher_thinking),
            )
        ]
        if max(map(len, ids)) > settings.max_prompt_tokens:
            dropped += 1
        else:
            kept.append(Rendered(prompt, ids[0] + begin[0], ids[1] + begin[1]))
    if not kept and not dropped:
        raise UserError(
            "dataset: no row is left to be taught or evaluated; give one with more rows, or --eval-dataset"
        )
    if not kept:
        raise UserError(
            f"dataset: all {dropped} prompts are longer than --max-prompt-tokens "
            f"{settings.max_prompt_tokens}; raise it"
        )
    return kept, dropped


def shuffled(items, *key) -> list:
    """A seeded permutation of ``items``."""
    order = list(items)
    random.Random("/".join(map(str, key))).shuffle(order)
    return order


def begin_ids(model: Model, text: str | None) -> tuple[int, ...]:
    """Ids of the forced start of a response (empty for None)."""
    return tuple(model.tokenizer(text, add_special_tokens=False).input_ids) if text else ()


def batch(rendered: list[Rendered], step: int, size: int, seed: int) -> list[Rendered]:
    """The prompts of update ``step``: ``size`` slots of an endless stream, by arithmetic alone.

    Epoch 0 takes ``rendered`` as it stands (already shuffled); every later epoch is a permutation of its own.
    """
    first, last = step * size // len(rendered), ((step + 1) * size - 1) // len(rendered)
    epochs = {0: rendered} | {
        e: shuffled(rendered, seed, "epoch", e) for e in range(max(1, first), last + 1)
    }
    slots = (divmod(slot, len(rendered)) for slot in range(step * size, (step + 1) * size))
    return [epochs[epoch][position] for epoch, position in slots]


def slots(weights: list[Fraction]) -> Iterator[int]:
    """Which set each slot of an endless stream belongs to: the one that is furthest behind its share, the first of equals."""
    given, total = [0] * len(weights), sum(weights)
    while True:
        behind = [
            weight * (sum(given) + 1) / total - count for weight, count in zip(weights, given)
        ]
        given[behind.index(max(behind))] += 1
        yield behind.index(max(behind))


def shares(weights: list[Fraction], count: int) -> list[int]:
    """How many of ``count`` slots belong to each set."""
    taken = list(itertools.islice(slots(weights), count))
    return [taken.count(k) for k in range(len(weights))]


def mixed(parts: list[list], weights: list[Fraction], count: int, seed: int) -> list:
    """``count`` slots of the stream; what is used up comes again, in a permutation of its own, as in ``batch``."""

    def endless(part: list):
        yield from part
        for epoch in itertools.count(1):
            yield from shuffled(part, seed, "epoch", epoch)

    streams = [endless(part) for part in parts]
    return [next(streams[k]) for k in itertools.islice(slots(weights), count)]


def joined(sets: list[PromptSet], weights: list[Fraction]) -> PromptSet:
    """Every prompt of ``sets`` once, in the stream's order as far as they last. What they do not agree on is None."""
    if len(sets) == 1:
        return sets[0]
    left, order = [list(reversed(s.prompts)) for s in sets], []
    for k in slots(weights):
        if not any(left):
            break
        order += [left[k].pop()] if left[k] else []
    agreed = {
        what: values.pop() if len(values := {getattr(s, what) for s in sets}) == 1 else None
        for what in ("answer_format", "max_new_tokens", "privileged_template")
    }
    return PromptSet(", ".join(s.name for s in sets), tuple(order), **agreed)


def hold_out(prompts: PromptSet, count: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """(training set, held-out set of ``count`` prompts), disjoint, drawn by seed; of a streamed set the first ``count``."""
    if prompts.streamed:
        return prompts, replace(prompts, prompts=tuple(itertools.islice(prompts.prompts, count)))
    held = set(shuffled(range(len(prompts.prompts)), seed, "held-out")[:count])
    parts = [
        tuple(p for i, p in enumerate(prompts.prompts) if (i in held) is inside)
        for inside in (False, True)
    ]
    return tuple(replace(prompts, prompts=part) for part in parts)


def examples(
    prompts: PromptSet, count: int, seed: int, evaluated: tuple[Prompt, ...] = ()
) -> tuple[PromptSet, tuple[dict, ...]]:
    """(the set without them, the turns of ``count`` of its prompts with their solutions), drawn by seed; of a streamed set the first. None
    has the problem of an ``evaluated`` one. UserError where too few have a solution."""
    unseen = {p.messages[-1]["content"] for p in evaluated}
    drawn = (
        prompts.prompts if prompts.streamed else iter(shuffled(prompts.prompts, seed, "few-shot"))
    )
    shown = list(
        itertools.islice(
            (p for p in drawn if p.worked is not None and p.messages[-1]["content"] not in unseen),
            count,
        )
    )
    if len(shown) < count:
        raise UserError(
            f"--few-shot {count}: dataset {prompts.name} has {len(shown)} rows with a solution that are not evaluated; lower it, or name "
            "the solutions with --answer-column"
        )
    if not prompts.streamed:
        taken = {p.index for p in shown}
        prompts = replace(
            prompts, prompts=tuple(p for p in prompts.prompts if p.index not in taken)
        )
    return prompts, tuple(
        turn
        for p in shown
        for turn in (
            *(m for m in p.messages if m["role"] not in ("system", "developer")),
            {"role": "assistant", "content": p.worked},
        )
    )


def behind(prompts: PromptSet, turns: tuple[dict, ...]) -> PromptSet:
    """The same prompts with example turns before them, after a system message."""

    def put(prompt: Prompt) -> Prompt:
        first = sum(
            1
            for _ in itertools.takewhile(
                lambda m: m["role"] in ("system", "developer"), prompt.messages
            )
        )
        return replace(
            prompt, messages=(*prompt.messages[:first], *turns, *prompt.messages[first:])
        )

    return replace(
        prompts,
        prompts=map(put, prompts.prompts) if prompts.streamed else tuple(map(put, prompts.prompts)),
    )
