"""A rollout: a prompt, the sampled response, and which of its tokens are taught."""

from dataclasses import dataclass, replace
from typing import NamedTuple


class Unit(NamedTuple):
    """Text between two boundaries that both tokenizations of a response share: ``size`` of the
    student's tokens from position ``start`` on, ``teacher_size`` of the teacher's from
    ``teacher_start`` on."""

    start: int
    size: int
    teacher_start: int
    teacher_size: int

    @property
    def exact(self) -> bool:
        """One token on each side."""
        return self.size == self.teacher_size == 1


@dataclass(frozen=True)
class Rollout:
    """A response between both models' prompts, with its place in the update.

    ``prompt``: slot of the prompt in the update's global batch; ``sample``: 0 … G − 1.
    ``teacher_ids`` are the response in the teacher's tokens (the same ids where the tokenizers
    match). ``kept``: positions that are taught, ascending (None: all). ``off_policy``: the teacher
    wrote it. ``sampler_logp``: log-probability of each id where it was drawn, if recorded.

    ``units``: where the tokenizers differ, the units of the response (None: every token is its
    own). What is taught then is units, each named by its first position: those of one token on each
    side, and with ``spans`` the others.
    """

    prompt: int
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

    def keep(self, positions: tuple[int, ...]) -> "Rollout":
        """Return the rollout with other taught positions."""
        return replace(self, kept=positions)

    @property
    def taught(self) -> tuple[int, ...]:
        """Positions of the response that are taught, ascending."""
        if self.kept is not None:
            return self.kept
        if self.units is None:
            return tuple(range(len(self.ids)))
        return tuple(u.start for u in self.units if u.exact or self.spans)

    @property
    def taught_units(self) -> tuple[Unit, ...]:
        """The units that are taught; tokens as units of one where the tokenizers match."""
        if self.units is None:
            return tuple(Unit(t, 1, t, 1) for t in self.taught)
        taught = set(self.taught)
        return tuple(u for u in self.units if u.start in taught)

    @property
    def counted(self) -> int:
        """Response tokens that the loss is averaged over: all of them, or those of what was
        chosen."""
        return len(self.ids) if self.kept is None else sum(u.size for u in self.taught_units)

    def rows(self, teacher: bool = False) -> list[int]:
        """Positions of the tokens that the loss looks at, ascending, in the student's tokens or
        in the teacher's."""
        if self.units is None:
            return list(self.taught)
        sides = [
            (u.teacher_start, u.teacher_size) if teacher else (u.start, u.size)
            for u in self.taught_units
        ]
        return [t for start, size in sides for t in range(start, start + size)]

    def extent(self, teacher: bool = False) -> int:
        """Tokens up to the last taught one: no model needs to read further. At least 1."""
        if self.units is None and self.kept is None:
            return len(self.ids)
        return max(self.rows(teacher), default=0) + 1
