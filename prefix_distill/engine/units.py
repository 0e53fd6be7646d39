"""Units of rollouts as tensors, for the loss across tokenizers."""

from dataclasses import dataclass, field

import torch

from ..maths.simct import Support, Units
from .alignment import SharedVocabulary
from .rollout import Rollout


def shared_support(
    vocabulary: SharedVocabulary,
    mode: str,
    student_device: torch.device,
    teacher_device: torch.device,
) -> Support:
    """Return the tokens that both models have, as tensors on their devices."""
    return Support(
        student=torch.tensor(vocabulary.student + vocabulary.student_eos, device=student_device),
        teacher=torch.tensor(vocabulary.teacher + vocabulary.teacher_eos, device=teacher_device),
        common=len(vocabulary.student),
        raw=mode == "simct-released",
    )


@dataclass(kw_only=True)
class _UnitRows:
    """One model's part of ``Units`` during its construction.

    ``first`` and ``token``: the first row and token of every unit; ``row``, ``span`` and ``id``:
    those of every token in a span.
    """

    first: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    id: list[int] = field(default_factory=list)
    rows: int = 0

    def add_exact(self, ids: tuple[int, ...]) -> None:
        """Add a unit of one token."""
        self.first.append(self.rows)
        self.token.append(ids[0])
        self.rows += 1

    def add_span(self, ids: tuple[int, ...], span: int) -> None:
        """Add the tokens of span number ``span``."""
        self.first.append(self.rows)
        self.token.append(ids[0])
        self.row.extend(range(self.rows, self.rows + len(ids)))
        self.span.extend([span] * len(ids))
        self.id.extend(ids)
        self.rows += len(ids)


def units_of(rollouts: list[Rollout]) -> Units:
    """Return the taught units of ``rollouts``, rollout by rollout."""
    student, teacher = _UnitRows(), _UnitRows()
    kinds: list[bool] = []
    spans = 0
    for r in rollouts:
        for u in r.taught_units:
            student_ids = r.ids[u.start : u.start + u.size]
            teacher_ids = r.teacher_ids[u.teacher_start : u.teacher_start + u.teacher_size]
            kinds.append(u.exact)
            if u.exact:
                student.add_exact(student_ids)
                teacher.add_exact(teacher_ids)
            else:
                student.add_span(student_ids, spans)
                teacher.add_span(teacher_ids, spans)
                spans += 1
    exact = torch.tensor(kinds, dtype=torch.bool)
    return Units(
        first=_tensors(student.first, teacher.first),
        exact=exact.nonzero()[:, 0],
        spans=(~exact).nonzero()[:, 0],
        row=_tensors(student.row, teacher.row),
        span=_tensors(student.span, teacher.span),
        id=_tensors(student.id, teacher.id),
        token=_tensors(student.token, teacher.token),
    )


def _tensors(student: list[int], teacher: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(student, dtype=torch.long), torch.tensor(teacher, dtype=torch.long)
