"""How the answers of an evaluation are graded."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from . import answers, expressions
from .own_grader import Grade, OwnGrader
from .prompt import Prompt

TEXT_FORMATS = ("exact", "choice")  # formats that compare text only


@dataclass(frozen=True, kw_only=True)
class Grader:
    """Grades answers by their references, or with a user's function.

    ``answer_format``: how final answers are read; ``own``: the user's function, which replaces
    references and their format.
    """

    answer_format: str = "auto"
    own: OwnGrader | None = None

    @property
    def name(self) -> str | None:
        """Return the name of the user's function; None if references grade."""
        return None if self.own is None else self.own.name

    def can_grade(self, prompt: Prompt) -> bool:
        """Return whether an answer to a prompt can be graded."""
        return self.own is not None or prompt.answer is not None

    def start(self, prompts: Iterable[Prompt]) -> None:
        """Start what grades these prompts, so that a fault is found before any work."""
        if self.own is not None:
            self.own.start()
        elif self.answer_format not in TEXT_FORMATS and any(p.answer for p in prompts):
            expressions.start()

    def grade(self, prompt: Prompt, response: str) -> Grade | None:
        """Return the grade of a response; None if it cannot be graded.

        GraderError: the user's function failed.
        """
        if self.own is not None:
            if prompt.row is None:
                raise ValueError("row is None: expected the row, because a function grades it")
            return self.own.grade(prompt.row, response, prompt.index)
        if prompt.answer is None:
            return None
        is_right = answers.is_correct(response, prompt.answer, self.answer_format)
        return Grade(score=float(is_right))


def describe_graded(dataset: str, grader: str) -> str:
    """Return in words that a user's function grades a dataset."""
    return f"{dataset}: {grader} grades every answer; accuracy is its mean score"


def describe_timeouts(grader: Grader, count: int) -> str:
    """Return in words how many answers a user's grader did not grade in time."""
    seconds = 0.0
    if grader.own is not None:
        seconds = grader.own.seconds
    return (
        f"{count} answers scored 0, because {grader.name} took longer than {seconds:g} s for each; "
        "raise --grader-timeout"
    )


def load_grader(name: str | None, seconds: float) -> OwnGrader | None:
    """Return the user's grader and start it; None if there is none.

    UserError: the file is missing, cannot be imported, or lacks the function.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise UserError(f"grader: expected FILE.py:FUNCTION as text, got {type(name).__name__}")
    own = OwnGrader(name, seconds)
    own.start()
    return own
