"""Look at the texts of a run: its answers, its rollouts, and the KL of its tokens."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import accuracy_text
from ..results import show as rendering
from ..results.texts import (
    EvaluationRow,
    Problem,
    RolloutRow,
    Texts,
    choose_problems,
    choose_steps,
    read_stored,
    read_texts,
    state_of,
)
from ..training.text_lines import EVALUATIONS, ROLLOUTS, one_line, rollout_line

if TYPE_CHECKING:
    from rich.console import RenderableType

LOOK = 0.5  # seconds between looks at a running folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What to show: ``limit`` problems (0: all), only ``wrong`` ones, or the ``kl`` of tokens.

    ``step``: the evaluation to show between the first and the last, None for several.
    """

    step: int | None = None
    wrong: bool = False
    limit: int = 3
    kl: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The chosen texts of a run."""

    texts: Texts
    choice: Choice
    problems: list[Problem]

    @property
    def steps(self) -> list[int]:
        """Return the evaluations to show."""
        most = rendering.COLUMNS_SHOWN
        return choose_steps(self.texts.steps, self.choice.step, most)

    @property
    def kl_steps(self) -> list[int]:
        """Return the evaluations whose KL is shown: the first, the last and ``step``."""
        return choose_steps(self.texts.steps, self.choice.step, 2)

    def lines(self) -> Iterator[str]:
        """Yield plain lines."""
        if self.choice.kl:
            yield from rendering.plain_tokens(self.texts, self.kl_steps, self.choice.limit)
        else:
            yield from rendering.plain_answers(self.texts, self.problems, self.steps)

    def renderables(self, width: int) -> "Iterator[RenderableType]":
        """Yield what rich prints on a terminal of ``width`` columns."""
        if self.choice.kl:
            return rendering.render_tokens(self.texts, self.kl_steps, self.choice.limit)
        steps = self.steps
        beside = width // rendering.NARROWEST
        if beside > 1:  # fewer evaluations stand side by side rather than one below the other
            steps = choose_steps(self.texts.steps, self.choice.step, min(beside, len(steps)))
        return rendering.render_answers(self.texts, self.problems, steps, width=width)

    def remark(self) -> str:
        """Return how much is shown, and the state of the run."""
        texts = self.texts
        if self.choice.kl:
            return f"{texts.path}: {len(texts.contexts)} fixed rollouts; the run is {texts.state}"
        return (
            f"{len(self.problems)} of {len(texts.problems)} problems (--limit); evaluations after "
            f"the steps {', '.join(map(str, texts.steps))}; the run is {texts.state}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document of the command."""
        document: dict[str, Any] = {
            "run": str(self.texts.path),
            "state": self.texts.state,
            "steps": self.texts.steps,
            "problems": [],
        }
        if self.choice.kl:
            shown = self.texts.contexts[: self.choice.limit or None]
            document["contexts"] = [dataclasses.asdict(context) for context in shown]
            return document
        for problem in self.problems:
            answers = [dataclasses.asdict(a) for _, a in sorted(problem.answers.items())]
            document["problems"].append(
                {
                    "problem": problem.number,
                    "prompt": problem.prompt,
                    "reference": problem.reference,
                    "answers": answers,
                }
            )
        return document


def look(folder: Path, choice: Choice) -> View:
    """Return the chosen texts of a run folder. UserError: it holds none, or ``step`` is unknown."""
    texts = read_texts(folder)
    view = View(
        texts=texts, choice=choice, problems=choose_problems(texts, choice.wrong, choice.limit)
    )
    choose_steps(texts.steps, choice.step, 2)  # raises for an unknown step
    return view


def follow(folder: Path, choice: Choice) -> Iterator[str]:
    """Yield the evaluations and rollouts of a run as lines, the stored ones and then the new ones.

    It ends when the run does. UserError: the folder holds no run.
    """
    shown = {EVALUATIONS: 0, ROLLOUTS: 0}
    while True:
        state = state_of(folder)  # before reading, so that the last rows are not missed
        for row in _new_rows(folder, shown):
            yield from _row_lines(row, choice)
        if state != "running":
            yield f"the run is {state}"
            return
        time.sleep(LOOK)


def _new_rows(folder: Path, shown: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows that were not shown yet, by step; count them in ``shown``."""
    rows: list[dict[str, Any]] = []
    for name, kind in ((ROLLOUTS, RolloutRow), (EVALUATIONS, EvaluationRow)):
        stored = read_stored(folder / name, kind)
        if len(stored) < shown[name]:  # a resumed run has dropped rows
            shown[name] = len(stored)
        rows += stored[shown[name] :]
        shown[name] = len(stored)
    rows.sort(key=lambda row: row["step"])
    return rows


def _row_lines(row: dict[str, Any], choice: Choice) -> Iterator[str]:
    answers = row["answers"][: choice.limit or None]
    if "evaluation" not in row:
        for answer in answers:
            yield rollout_line(row, answer)
        return
    numbers = row["evaluation"]
    yield (
        f"after step {row['step']}: accuracy {accuracy_text(numbers['accuracy'])}, "
        f"held-out reverse KL {numbers['kl']['value']:.4f} nats"
    )
    for answer in answers:
        if choice.wrong and answer.get("correct") is not False:
            continue
        words = {True: "right", False: "wrong", None: "not graded"}[answer.get("correct")]
        yield f"  {one_line(answer['prompt'])} → {one_line(answer['text'])} ({words})"
