"""A rollout: a prompt, the sampled response, and the tokens that the loss compares."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple


class Unit(NamedTuple):
    """Text between two boundaries that both tokenizations of a response share.

    It has ``size`` student tokens from position ``start`` on, and ``teacher_size`` teacher tokens
    from position ``teacher_start`` on.
    """

    start: int
    size: int
    teacher_start: int
    teacher_size: int

    @property
    def exact(self) -> bool:
        """Return whether the unit is one token on each side."""
        return self.size == self.teacher_size == 1

    @property
    def student_span(self) -> range:
        """Return the positions of the student's tokens."""
        return range(self.start, self.start + self.size)

    @property
    def teacher_span(self) -> range:
        """Return the positions of the teacher's tokens."""
        return range(self.teacher_start, self.teacher_start + self.teacher_size)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A rollout in the tokens of one model.

    ``prompt``: the ids of its prompt; ``ids``: the ids of the response; ``rows``: the response
    positions that the loss compares, ascending.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Return the number of response tokens up to the last compared one, at least 1."""
        if not self.rows:
            return 1
        return self.rows[-1] + 1  # rows are ascending

    @property
    def read(self) -> tuple[int, ...]:
        """Return the response ids that the forward pass needs.

        The last compared token and everything after it predict no compared token.
        """
        return self.ids[: self.extent - 1]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A response after both models' prompts.

    ``slot``: the prompt's position in the step's global batch; ``sample``: 0 … G − 1.
    ``ids``: the response in the student's tokens; ``teacher_ids``: in the teacher's, the same ids
    if the tokenizers match. ``finished``: the response ends with an EOS token. ``kept``: positions
    of the taught tokens, ascending; None is all. ``off_policy``: the teacher sampled the response.
    ``sampler_logp``: the log-probability of each id when it was sampled, if recorded.

    ``units``: the aligned units of the response if the tokenizers differ; None if every token is
    its own unit. The first position of a unit identifies it. Units of one token on each side are
    taught, and with ``spans`` the longer ones as well.
    """

    slot: int
    sample: int
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    finished: bool
    kept: tuple[int, ...] | None = None
    off_policy: bool = False
    sampler_logp: tuple[float, ...] | None = None
    units: tuple[Unit, ...] | None = None
    spans: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Return (slot, sample), which identifies the rollout within its step."""
        return self.slot, self.sample

    def keep(self, positions: tuple[int, ...]) -> "Rollout":
        """Return the rollout with other taught positions."""
        return replace(self, kept=positions)

    @cached_property
    def taught(self) -> tuple[int, ...]:
        """The taught positions of the response, ascending, in the student's tokens."""
        if self.kept is not None:
            return self.kept
        if self.units is None:
            return tuple(range(len(self.ids)))
        return tuple(u.start for u in self.units if u.exact or self.spans)

    @cached_property
    def taught_units(self) -> tuple[Unit, ...]:
        """The taught units; if the tokenizers match, every taught token is a unit."""
        if self.units is None:
            return tuple(
                Unit(start=t, size=1, teacher_start=t, teacher_size=1) for t in self.taught
            )
        taught = set(self.taught)
        return tuple(u for u in self.units if u.start in taught)

    @property
    def counted(self) -> int:
        """Return the number of tokens that the loss is averaged over.

        These are all response tokens, or those of the kept units.
        """
        if self.kept is None:
            return len(self.ids)
        return sum(u.size for u in self.taught_units)

    @cached_property
    def student(self) -> Side:
        """The rollout in the student's tokens."""
        rows = self.taught
        if self.units is not None:
            rows = tuple(t for u in self.taught_units for t in u.student_span)
        return Side(prompt=self.student_prompt, ids=self.ids, rows=rows)

    @cached_property
    def teacher(self) -> Side:
        """The rollout in the teacher's tokens."""
        rows = self.taught
        if self.units is not None:
            rows = tuple(t for u in self.taught_units for t in u.teacher_span)
        return Side(prompt=self.teacher_prompt, ids=self.teacher_ids, rows=rows)


def student_sides(rollouts: list[Rollout]) -> list[Side]:
    """Return the student's side of each rollout."""
    return [r.student for r in rollouts]


def teacher_sides(rollouts: list[Rollout]) -> list[Side]:
    """Return the teacher's side of each rollout."""
    return [r.teacher for r in rollouts]


def copy_as_student(rollouts: list[Rollout]) -> list[Rollout]:
    """Return the rollouts with the student's tokens on both sides, to compare two students."""
    return [
        replace(r, teacher_prompt=r.student_prompt, teacher_ids=r.ids, units=None) for r in rollouts
    ]


def rollout_of(
    slot: int,
    prompt: tuple[int, ...],
    ids: tuple[int, ...],
    finished: bool = False,
    teacher_prompt: tuple[int, ...] | None = None,
) -> Rollout:
    """Return sample 0 of a prompt, with the same response ids for both models.

    ``teacher_prompt``: the teacher's own prompt; None is the student's.
    """
    if teacher_prompt is None:
        teacher_prompt = prompt
    return Rollout(
        slot=slot,
        sample=0,
        student_prompt=prompt,
        teacher_prompt=teacher_prompt,
        ids=ids,
        teacher_ids=ids,
        finished=finished,
    )
