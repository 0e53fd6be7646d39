"""The built-in tasks: chains of two-digit terms.

A problem has two given terms and ``steps`` terms to write. Addition is digit by digit without
carrying (written "+" below: 47 + 85 = 22). Every term has a label; the labels count down to 01:

    prompt    "28:41 27:73"                     the given terms, with labels steps+2 and steps+1
    solution  "26:14 25:87 ... 01:05 ####05"    one labeled term per step; the last one is the
                                                answer

    choice  x[t] = x[t-1] + x[t-2]
    shared  x[t] = x[t-2] + FACTS[units digit of the label]    ten facts, each used about every
                                                               tenth step
    tied    x[t] = x[t-2] + FACTS[label]                       each fact used once, at one step

``shared`` and ``tied`` differ only in which fact a step uses. A short-cut writes no step or one
step and then an answer, so a network must guess that answer. Only ``choice`` is trained with
short-cuts. Two ``choice`` networks (student-told, teacher-half) are also trained on prompts that
show the worked solution before the problem; the response repeats it. A third one (student-merged)
has a different tokenizer, which merges some pairs of characters.

The split of a problem depends only on its numbers, so the splits share no problem.
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
# the numbers of steps of a task's problems
STEPS = {
    "choice": range(20, 31),
    "shared": range(20, 31),
    "tied": range(25, 31),
}
MAX_STEPS = 30
MAX_NEW_TOKENS = 192  # the longest solution has 6 tokens per step and 4 at its end
PROBLEMS_PER_STEPS = 900  # every split has at least this many problems of each number of steps
MODELS = Path(__file__).parent / "models"
_rng = random.Random(7)
FACTS = tuple(_rng.randrange(100) for _ in range(MAX_STEPS + 1))
LAB = "lab:"  # lab:choice/student is the built-in student of the task `choice`


def add(a: int, b: int) -> int:
    """Return the sum of two numbers 0–99, digit by digit modulo 10 (without carrying)."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def label_term(label: int, term: int) -> str:
    """Return a term as text, with its label."""
    return f"{label:02d}:{term:02d}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: its task, the two given terms (0–99) and the number of steps (1–30)."""

    task: str
    first: int
    second: int
    steps: int

    @property
    def split(self) -> str:
        """Return the problem's split: about 50% train, 10% validation, 40% test."""
        digit = ((100 * self.first + self.second) * 617 + self.steps * 4111) % 10007 % 10
        if digit < 5:
            return "train"
        if digit < 6:
            return "validation"
        return "test"

    @property
    def prompt(self) -> str:
        """Return the text of the user's turn: the two given terms with their labels."""
        first = label_term(self.steps + 2, self.first)
        return f"{first} {label_term(self.steps + 1, self.second)}"

    @cached_property
    def terms(self) -> tuple[int, ...]:
        """Return the terms to write, in order."""
        before, last = self.first, self.second
        terms = []
        for label in range(self.steps, 0, -1):
            before, last = last, add(before, self._summand(label, last))
            terms.append(last)
        return tuple(terms)

    def _summand(self, label: int, last: int) -> int:
        """Return what the task adds to the term before the last one."""
        if self.task == "choice":
            return last
        if self.task == "shared":
            return FACTS[label % 10]
        return FACTS[label]

    @property
    def answer(self) -> str:
        """Return the last term as two digits."""
        return f"{self.terms[-1]:02d}"

    def worked(self, steps: int) -> str:
        """Return the first ``steps`` terms, then the final answer."""
        words = []
        for i, term in enumerate(self.terms[:steps]):
            words.append(label_term(self.steps - i, term))
        words.append(f"####{self.answer}")
        return " ".join(words)

    @property
    def solution(self) -> str:
        """Return the worked solution: every term, then the final answer."""
        return self.worked(self.steps)

    @property
    def privileged_prompt(self) -> str:
        """Return the text of a user's turn that shows the worked solution before the problem."""
        return f"{self.solution} {self.prompt}"

    def short_cut(self, rng: random.Random) -> str:
        """Return a short-cut: no term or one term (equally likely), then the correct answer."""
        return self.worked(rng.randrange(2))


def sample_problems(
    task: str, split: str, n: int, seed: int = 0, steps: Sequence[int] | None = None
) -> list[Problem]:
    """Sample ``n`` distinct problems of one split; equal arguments give equal problems.

    ``steps`` lists the numbers of steps to sample from (each 1–30; default: the task's range).
    Raise ValueError on an unknown task or split, on steps out of range, and if ``n`` exceeds
    the number of problems that the split is sure to have.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if steps is None:
        steps = STEPS[task]
    if not steps or min(steps) < 1 or max(steps) > MAX_STEPS:
        raise ValueError(f"the numbers of steps must be between 1 and {MAX_STEPS}")
    available = PROBLEMS_PER_STEPS * len(set(steps))
    if n > available:
        raise ValueError(
            f"expected at most {available} distinct problems with these numbers of steps, got {n}"
        )
    rng = random.Random(f"{task}/{split}/{seed}")
    chosen: dict[Problem, None] = {}  # an ordered set
    while len(chosen) < n:
        problem = Problem(
            task=task,
            first=rng.randrange(100),
            second=rng.randrange(100),
            steps=rng.choice(steps),
        )
        if problem.split == split:
            chosen[problem] = None
    return list(chosen)


def model_path(task: str, role: str) -> Path:
    """Return the folder of a built-in model. Raise ValueError on an unknown task or role."""
    if role not in ROLES.get(task, ()):
        known = []
        for other, roles in ROLES.items():
            known += [f"{other}/{name}" for name in roles]
        raise ValueError(f"no model {task!r} {role!r}: choose from {', '.join(known)}")
    return MODELS / task / role
