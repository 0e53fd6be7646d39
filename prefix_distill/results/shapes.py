"""Read the files of a run folder, and check every value that a report uses.

Each file has a type below. Further keys are allowed: a file holds more than a report needs.
"""

import json
import numbers
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from .. import config as configuration
from ..errors import UserError

LARGEST = 1e30  # limit on numbers: sums over runs must not overflow
SHOWN_KEYS = 4  # of an object that lacks a key
SHOWN_CHARACTERS = 100  # of a value in an error
ADVICE = "restore the file, or omit this run"
NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a finite number",
    numbers.Real: "a number",
}


TokenValues = list[list[float | None]]  # rollout by rollout, a number per token


class Mean(TypedDict):
    value: float


class Accuracy(TypedDict):
    value: float
    low: float
    high: float
    n: int


class Quadrant(TypedDict):
    tokens: float
    divergence: float


class Quadrants(TypedDict):
    quadrants: dict[str, Quadrant]


class Evaluation(TypedDict):
    step: int
    accuracy: Accuracy | None
    kl: Mean
    kl_prefix: float | None
    kl_tail: float | None
    finish_rate: float
    mean_tokens: float
    flops_useful: float
    flops_executed: float
    seconds: float
    quadrants: NotRequired[Quadrants]
    finished_accuracy: NotRequired[Accuracy | None]


class PrefixDecision(TypedDict):
    reason: str


class Extrapolation(TypedDict):
    step: int
    k: int
    scores: list[numbers.Real]  # NaN where a candidate's weights overflow
    flops: float


class TailWarning(TypedDict):
    text: str


class Result(TypedDict):
    evaluations: list[Evaluation]
    prefix: int
    full_rollout_cost: float
    prefix_decisions: NotRequired[list[PrefixDecision]]
    extrapolations: NotRequired[list[Extrapolation]]
    warnings: NotRequired[list[TailWarning]]


class RunFile(TypedDict):
    """run.json of a finished run."""

    seed: int
    result: Result


class StartedRunFile(TypedDict):
    """run.json of a run that has not finished."""

    seed: int


class Estimate(TypedDict):
    value: float
    low: float
    high: float
    n: int


class Phase(TypedDict):
    useful: float
    executed: float


class Flops(TypedDict):
    useful: float
    executed: float
    by_phase: dict[str, Phase]


class Seconds(TypedDict):
    total: float


class RunDocument(Result):
    """The result of a run, as the command prints it."""

    steps: int
    resumed_from: int | None
    accuracy_before: Estimate | None
    accuracy_after: Estimate | None
    kl_before: Estimate | None
    kl_after: Estimate | None
    tokens: int
    flops: Flops
    seconds: Seconds


class LoadedRun(TypedDict):
    """run.json of a finished run, as ``load`` reads it."""

    result: RunDocument
    notes: NotRequired[list[str]]
    warnings: NotRequired[list[str]]


class ScoresRow(TypedDict):
    """A line of scores.jsonl: the share of correct answers of every problem."""

    step: int
    right: list[float]


class ContextsFile(TypedDict):
    """before.json and after.json: reverse KL per token of the fixed contexts."""

    kl_by_token: TokenValues


class AlsoFile(TypedDict):
    """also-NAME.json: the evaluation on another dataset."""

    accuracy: Mean | None


class ArmsFile(TypedDict):
    """arms.json of a comparison."""

    arms: dict[str, object]
    seeds: list[int]
    start: dict[str, str]


class Models(TypedDict):
    student: str


class Rollout(TypedDict):
    max_new_tokens: int


class Schedule(TypedDict):
    lr: float


class ConfigFile(TypedDict):
    """config.yaml."""

    models: Models
    rollout: Rollout
    schedule: Schedule


class ShapeError(ValueError):
    """A value has another type than expected."""


def read_json(file: Path, kind: Any) -> Any:
    """Return the document in a JSON file. UserError: it is unreadable or not of type ``kind``."""
    return _parse(_read_text(file), kind, str(file))


def read_json_lines(file: Path, kind: Any) -> list:
    """Return the documents in a file of JSON lines.

    UserError: the file is unreadable, or a line is not of type ``kind``.
    """
    documents = []
    for number, line in enumerate(_read_text(file).rstrip("\n").split("\n"), start=1):
        documents.append(_parse(line, kind, f"{file} line {number}"))
    return documents


def read_config(file: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's config.yaml. UserError: a setting has a wrong type."""
    sections = configuration.read_tree(str(file))
    check(sections, dict[str, dict[str, object]], str(file))
    check(sections, ConfigFile, str(file))
    return sections


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {ADVICE}") from None
    except ValueError:
        raise UserError(f"{file}: expected UTF-8 text, got other bytes; {ADVICE}") from None


def _parse(text: str, kind: Any, name: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name}: expected JSON, got {reprlib.repr(text)} ({error}); {ADVICE}"
        ) from None
    check(document, kind, name)
    return document


def check(document: object, kind: Any, name: str) -> None:
    """Raise UserError unless a document has the type ``kind``; name the first value at fault.

    ``kind``: a TypedDict, dict, list, str, int, float, object or a union with None, nested as
    annotations are. ``name``: the file, and the line in it.
    """
    try:
        _check_value(document, kind, "")
    except ShapeError as error:
        raise UserError(f"{name}: {error}; {ADVICE}") from None


def _check_value(value: Any, kind: Any, path: str) -> None:
    if kind is object:
        return
    if isinstance(kind, types.UnionType):
        if value is not None:
            _check_value(value, typing.get_args(kind)[0], path)
        return
    if typing.is_typeddict(kind):
        _check_type(value, dict, path)
        _check_fields(value, kind, path)
        return
    base = typing.get_origin(kind) or kind
    _check_type(value, base, path)
    if base is list:
        [kind_of_items] = typing.get_args(kind)
        for index, item in enumerate(value):
            _check_value(item, kind_of_items, f"{path}[{index}]")
    elif base is dict:
        _, kind_of_values = typing.get_args(kind)
        for key, item in value.items():
            if not isinstance(key, str):
                raise ShapeError(f"{_at(path)}expected text as keys, got {_shown(key)}")
            _check_value(item, kind_of_values, f"{path}.{key}")


def _check_fields(value: dict, kind: Any, path: str) -> None:
    for key, kind_of_field in typing.get_type_hints(kind).items():
        if key in value:
            _check_value(value[key], kind_of_field, f"{path}.{key}")
        elif key in kind.__required_keys__:
            raise ShapeError(f"{_at(path)}expected the key '{key}', got {_shown_keys(value)}")


def _check_type(value: object, kind: type, path: str) -> None:
    if not _has_type(value, kind):
        raise ShapeError(f"{_at(path)}expected {NAMES[kind]}, got {_shown(value)}")


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and abs(value) < 1 << 63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < LARGEST  # false for NaN
    if kind is numbers.Real:
        return isinstance(value, float) or _has_type(value, float)
    return isinstance(value, kind)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return reprlib.repr(value)[:SHOWN_CHARACTERS]


def _shown_keys(value: dict) -> str:
    """Name the first keys of an object: the keys ranks, result, …"""
    if not value:
        return "no keys"
    keys = [str(key) for key in value]
    names = ", ".join(keys[:SHOWN_KEYS])
    if len(keys) > SHOWN_KEYS:
        names += ", …"
    return f"the keys {names[:SHOWN_CHARACTERS]}"


def _at(path: str) -> str:
    """Return where a value is in its document, with a colon; "" for the document itself."""
    if not path:
        return ""
    return path.removeprefix(".") + ": "
