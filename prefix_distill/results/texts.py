"""Read the texts that a run folder stores: answers, rollouts and tokens with their KL.

It needs no torch. A run may still write the files while they are read.
"""

import dataclasses
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from .. import config as configuration
from ..errors import UserError
from ..files import read_rows
from ..prompts.answers import extract_reference
from ..training.text_lines import EVALUATIONS
from .shapes import check, read_json

BEFORE, AFTER = "examples-before.jsonl", "examples-after.jsonl"
LOCK = ".lock"


class AnswerRow(TypedDict):
    """One answer to a problem; ``prefix_characters``: how much of its text lies in the prefix."""

    text: str
    tokens: int
    finished: object
    correct: NotRequired[object]
    prefix_characters: NotRequired[int]


class StoredAnswer(AnswerRow):
    """An answer with its problem."""

    problem: int
    prompt: str
    reference: str | None


class Context(TypedDict):
    prompt: str
    tokens: list[str]


class EvaluationRow(TypedDict):
    """A line of samples.jsonl."""

    step: int
    prefix: int
    evaluation: dict[str, object]
    answers: list[StoredAnswer]
    kl: list[list[float | None]]
    contexts: NotRequired[list[Context]]


class RolloutRow(TypedDict):
    """A line of rollouts.jsonl."""

    step: int
    prefix: int
    answers: list[StoredAnswer]


class Example(TypedDict):
    """A line of examples-before.jsonl and examples-after.jsonl."""

    problem: int
    prompt: str
    reference: str | None
    responses: list[AnswerRow]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer after a number of steps.

    ``mark``: where the prefix ends in the text, None if the answer ends inside it or that is not
    stored; ``correct``: None without a reference answer.
    """

    step: int
    text: str
    mark: int | None
    tokens: int
    finished: bool
    correct: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with its answers, by the step after which they were sampled.

    ``reference``: the text in the dataset, which may be a worked solution; ``gold``: the final
    answer in it, or the whole text where a user's function grades.
    """

    number: int
    prompt: str
    reference: str | None
    gold: str | None
    answers: dict[int, Answer]

    @property
    def last(self) -> Answer:
        """Return the newest answer."""
        return self.answers[max(self.answers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A fixed rollout: the text of its tokens, and their KL by the step of the measurement."""

    prompt: str
    tokens: list[str]
    kl: dict[int, list[float | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """What a run folder stores; ``steps``: of the evaluations, ascending; ``state``: as `state`."""

    path: Path
    state: str
    steps: list[int]
    problems: list[Problem]
    contexts: list[ScoredText]


def state_of(folder: Path) -> str:
    """Return "finished", "running" or "interrupted". UserError: the folder holds no run."""
    file = folder / "run.json"
    if not file.is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected a run folder with run.json and config.yaml, got none")
    if "result" in read_json(file, dict[str, object]):
        return "finished"
    if _is_locked(folder / LOCK):
        return "running"
    return "interrupted"


def _is_locked(file: Path) -> bool:
    """Return whether a process works in the folder of the lock."""
    from filelock import FileLock, Timeout

    if not file.is_file():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def read_stored(file: Path, kind: Any) -> list[Any]:
    """Return the complete rows of a file of JSON lines, [] without a file.

    The last line may be incomplete. UserError: a row has another form.
    """
    try:
        rows, _ = read_rows(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    for number, row in enumerate(rows, start=1):
        check(row, kind, f"{file} row {number}")
    return rows


def read_texts(folder: Path) -> Texts:
    """Return the texts of a run folder. UserError: it is none, or it stores no answers."""
    state = state_of(folder)
    evaluations: list[EvaluationRow] = read_stored(folder / EVALUATIONS, EvaluationRow)
    problems: dict[int, Problem] = {}
    answer_format = _find_answer_format(folder)
    for row in evaluations:
        for stored in row["answers"]:
            problem = _problem_of(problems, stored, answer_format)
            problem.answers[row["step"]] = _answer(row["step"], stored)
    for name, step in ((BEFORE, 0), (AFTER, _last_step(folder))):
        for example in read_stored(folder / name, Example):
            if example["responses"]:
                first = example["responses"][0]
                problem = _problem_of(problems, example, answer_format)
                problem.answers[step] = _answer(step, first)
    if not problems and not evaluations:
        raise UserError(
            f"{folder}: it stores no answers yet; the first evaluation of the run writes them"
        )
    steps = {row["step"] for row in evaluations}  # also of a run without held-out problems
    for problem in problems.values():
        steps.update(problem.answers)
    return Texts(
        path=folder,
        state=state,
        steps=sorted(steps),
        problems=list(problems.values()),
        contexts=_read_contexts(evaluations),
    )


def _last_step(folder: Path) -> int:
    """Return the number of steps of a finished run; 0 of another run, which has no AFTER file."""
    result = read_json(folder / "run.json", dict[str, object]).get("result")
    if isinstance(result, dict) and isinstance(result.get("steps"), int):
        return int(result["steps"])
    return 0


def _find_answer_format(folder: Path) -> str | None:
    """Return the --answer-format of a run; None if a user's function grades."""
    file = folder / "config.yaml"
    sections = configuration.read_tree(str(file))
    check(sections, dict[str, dict[str, object]], str(file))
    settings = sections.get("evaluate", {})
    if settings.get("grader") is not None:
        return None
    return str(settings.get("answer_format", "auto"))


def _problem_of(problems: dict[int, Problem], row: Any, answer_format: str | None) -> Problem:
    """Return the problem of an answer; add it if it is new."""
    number = row["problem"]
    if number not in problems:
        reference = row["reference"]
        gold = reference
        if reference is not None and answer_format is not None:
            gold = extract_reference(reference, answer_format)
        problems[number] = Problem(
            number=number, prompt=row["prompt"], reference=reference, gold=gold, answers={}
        )
    return problems[number]


def _answer(step: int, row: Any) -> Answer:
    mark = row.get("prefix_characters")
    if mark is not None and mark >= len(row["text"]):
        mark = None
    correct = row.get("correct")
    return Answer(
        step=step,
        text=row["text"],
        mark=mark,
        tokens=row["tokens"],
        finished=bool(row["finished"]),
        correct=None if correct is None else bool(correct),
    )


def _read_contexts(evaluations: list[EvaluationRow]) -> list[ScoredText]:
    """Return the fixed rollouts with the KL of every evaluation."""
    if not evaluations:
        return []
    contexts = []
    for stored in evaluations[0].get("contexts", []):
        contexts.append(ScoredText(prompt=stored["prompt"], tokens=stored["tokens"], kl={}))
    for row in evaluations:
        for context, numbers in zip(contexts, row["kl"], strict=False):
            context.kl[row["step"]] = numbers
    return contexts


def choose_steps(steps: list[int], step: int | None, most: int) -> list[int]:
    """Return the steps to show: the first and the last evaluation, and others between them.

    ``step``: the only one between them, None for at most ``most`` in all, evenly spread. UserError:
    there was no evaluation after ``step``.
    """
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"--step {step}: expected a step with an evaluation ({known})")
        return sorted({steps[0], step, steps[-1]})
    if len(steps) <= most or most < 2:
        return list(steps)
    chosen = set()
    for i in range(most):
        chosen.add(steps[round(i * (len(steps) - 1) / (most - 1))])
    return sorted(chosen)


def choose_problems(texts: Texts, wrong: bool, limit: int) -> list[Problem]:
    """Return the problems to show: ``limit`` of them (0: all), only ``wrong`` ones if asked.

    A problem is wrong if its newest answer is.
    """
    chosen = []
    for problem in texts.problems:
        if wrong and problem.last.correct is not False:
            continue
        chosen.append(problem)
    if limit:
        chosen = chosen[:limit]
    return chosen
