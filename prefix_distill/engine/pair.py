"""Pair: a student, its teacher, and how their tokens correspond."""

from dataclasses import dataclass

from ..maths.flops import Shape, find_not_counted
from ..maths.simct import Support
from .alignment import Alignment
from .models import Model
from .rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student, its teacher, and how their tokens correspond.

    ``student_shape`` and ``teacher_shape``: what a token costs in FLOPs. If the tokenizers differ,
    ``alignment`` aligns a text in both and ``shared_support`` lists the tokens that both models
    have; otherwise both are None. ``tokenizers``: how the tokenizers compare, in words.
    """

    student: Model
    teacher: Model
    student_shape: Shape
    teacher_shape: Shape
    alignment: Alignment | None = None
    shared_support: Support | None = None
    tokenizers: str = ""

    @property
    def not_counted(self) -> list[str]:
        """Return the parts of both models that the FLOP ledger leaves out, by name."""
        return find_not_counted([self.student_shape, self.teacher_shape])

    def align(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with the teacher's tokens and the units, if the tokenizers differ."""
        if self.alignment is None:
            return rollouts
        return [self.alignment.align_rollout(r) for r in rollouts]

    def head_shares(self) -> tuple[float, float]:
        """Return the share of each head's columns that the loss compares: (student, teacher).

        Both are 1 if the tokenizers match. ValueError: a model has no support.
        """
        compared = self.shared_support
        if compared is None:
            return 1.0, 1.0
        if self.student.support is None or self.teacher.support is None:
            raise ValueError("support is None: expected a value before the run starts")
        return (
            len(compared.student) / self.student.support,
            len(compared.teacher) / self.teacher.support,
        )
