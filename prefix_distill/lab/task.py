"""The laboratory's tasks: chains of two-digit terms, every problem made by arithmetic.

A problem has two given terms and `steps` further terms to write. Terms are added digit by digit
without carrying (a "+" below: 47 + 85 = 22), and the labels count down to 01:

    prompt    "28:41 27:73"                     the given terms, labelled steps+2 and steps+1
    solution  "26:14 25:87 ... 01:05 ####05"    one labelled term per step; the last one is the
                                                answer

    choice  x[t] = x[t-1] + x[t-2]
    shared  x[t] = x[t-2] + FACTS[units digit of the label]    ten facts, each used about every
                                                               tenth step
    tied    x[t] = x[t-2] + FACTS[label]                       every fact used once, the late ones
            only late

`shared` and `tied` differ only in how a fact is looked up. A short-cut (only `choice` is trained on
any) writes none or one of the steps and then the final answer, so it has to guess it. Two `choice`
nets (student-told, teacher-half) also know problems that are told: the worked solution stands
before the prompt, and is then written once more. A third (student-merged) reads and writes with a
tokenizer of its own, which merges an operator with some digits, and some labels.

The split of a problem follows from its defining numbers alone, so the splits share no problem.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TASKS = ("choice", "shared", "tied")
SPLITS = ("train", "validation", "test")
ROLES = {
    "choice": (
        "teacher",
        "student",
        "student-wide",
        "student-told",
        "teacher-half",
        "student-merged",
    ),
    "shared": ("teacher", "student"),
    "tied": ("teacher", "student"),
}
STEPS = {"choice": range(20, 31), "shared": range(20, 31), "tied": range(25, 31)}
MAX_STEPS = 30
MAX_NEW_TOKENS = 192  # the longest worked solution has 6 tokens a step and 4 at its end
MODELS = Path(__file__).parent / "models"
_facts = random.Random(7)
FACTS = tuple(_facts.randrange(100) for _ in range(MAX_STEPS + 1))
LAB = "lab:"  # lab:choice/student is the embedded student of the task `choice`


def add(a: int, b: int) -> int:
    """Sum of two numbers 0-99, digit by digit modulo 10 (no carry)."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


@dataclass(frozen=True)
class Problem:
    """One problem: its task, the two given terms (0-99) and the number of steps (1-30)."""

    task: str
    first: int
    second: int
    steps: int

    @property
    def split(self) -> str:
        """The split this problem belongs to: about 50% train, 10% validation, 40% test."""
        digit = ((100 * self.first + self.second) * 617 + self.steps * 4111) % 10007 % 10
        return "train" if digit < 5 else "validation" if digit < 6 else "test"

    @property
    def prompt(self) -> str:
        """The text of the user's turn: the two given terms with their labels."""
        return f"{self.steps + 2:02d}:{self.first:02d} {self.steps + 1:02d}:{self.second:02d}"

    @cached_property
    def terms(self) -> tuple[int, ...]:
        """The terms to write, in order."""
        before, last, terms = self.first, self.second, []
        for label in range(self.steps, 0, -1):
            change = {"choice": last, "shared": FACTS[label % 10], "tied": FACTS[label]}[self.task]
            before, last = last, add(before, change)
            terms.append(last)
        return tuple(terms)

    @property
    def answer(self) -> str:
        """The last term, two digits."""
        return f"{self.terms[-1]:02d}"

    def worked(self, steps: int) -> str:
        """The first `steps` terms followed by the final answer."""
        lines = [f"{self.steps - i:02d}:{term:02d}" for i, term in enumerate(self.terms[:steps])]
        return " ".join([*lines, f"####{self.answer}"])

    @property
    def solution(self) -> str:
        """The worked solution: every term, then the final answer."""
        return self.worked(self.steps)

    @property
    def told(self) -> str:
        """The text of a told user's turn: the worked solution and the prompt, one space between."""
        return f"{self.solution} {self.prompt}"

    def short_cut(self, rng: random.Random) -> str:
        """A short-cut: none or one of the terms (equally likely), then the correct final answer."""
        return self.worked(rng.randrange(2))


def problems(
    task: str, split: str, n: int, seed: int = 0, steps: Sequence[int] | None = None
) -> list[Problem]:
    """`n` distinct problems of one split, the same ones for the same arguments.

    `steps` lists the numbers of steps to draw from (each 1-30; default: the task's own range).
    Raises ValueError for an unknown task or split, for steps out of range and for more problems
    than the split is sure to hold.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    steps = STEPS[task] if steps is None else steps
    if not steps or min(steps) < 1 or max(steps) > MAX_STEPS:
        raise ValueError(f"steps must lie between 1 and {MAX_STEPS}")
    if n > 900 * len(set(steps)):
        raise ValueError(
            f"at most {900 * len(set(steps))} distinct problems for these steps, asked for {n}"
        )
    rng = random.Random(f"{task}/{split}/{seed}")
    found: dict[Problem, None] = {}
    while len(found) < n:
        problem = Problem(task, rng.randrange(100), rng.randrange(100), rng.choice(steps))
        if problem.split == split:
            found[problem] = None
    return list(found)


def model_path(task: str, role: str) -> Path:
    """Folder of the shipped teacher or student of a task. Raises ValueError for an unknown task
    or role."""
    if role not in ROLES.get(task, ()):
        known = ", ".join(f"{task}/{role}" for task, roles in ROLES.items() for role in roles)
        raise ValueError(f"no model {task!r} {role!r}: there are {known}")
    return MODELS / task / role
