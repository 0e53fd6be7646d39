"""Align two tokenizations of one text by bytes: units of text, and the shared vocabulary.

    common boundaries = byte ends shared by both tokenizations
    a unit = the text between two consecutive common boundaries
    shared vocabulary O = pairs of ids with the same bytes, and EOS with EOS

Source: SimCT, arXiv 2605.07711. Bytes make the alignment exact where a character is split between
tokens.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import UserError
from .loading import check_rows
from .models import Model
from .rollout import Rollout, Unit
from .token_bytes import PROBES, Bytes, decode_valid


@dataclass(frozen=True)
class Shared:
    """O as two lists of ids of equal length, without end-of-sequence, and each side's
    end-of-sequence ids, which are one event: a turn that ends."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_eos: tuple[int, ...]
    teacher_eos: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """Student and teacher with different tokenizers. ``mode``: strict (units of one token on each
    side), simct (all units) or simct-released (neighbouring units that are not 1:1 are one, as in
    the authors' code). ``student_eos``, ``teacher_eos``: ids that end a turn, the one that is put
    at the end of a text first; ``positions``: the teacher's, in tokens (None: unlimited)."""

    mode: str
    student: Bytes
    teacher: Bytes
    student_eos: tuple[int, ...]
    teacher_eos: tuple[int, ...]
    positions: int | None = None

    @functools.cached_property
    def shared(self) -> Shared:
        """Computed once, ordered by the student's ids."""
        ours, theirs = self.student.canonical(), self.teacher.canonical()
        pairs = sorted(
            (i, theirs[piece])
            for piece, i in ours.items()
            if piece in theirs
            and i not in self.student_eos
            and theirs[piece] not in self.teacher_eos
        )
        return Shared(
            tuple(student_id for student_id, _ in pairs),
            tuple(teacher_id for _, teacher_id in pairs),
            self.student_eos,
            self.teacher_eos,
        )

    def rollout(self, rollout: Rollout) -> Rollout:
        """The same rollout as both models read it: with the teacher's tokens of its text, and those
        of its units for which the teacher has positions."""
        teacher_ids, units = self.align(rollout.ids, rollout.finished)
        if self.positions is not None:
            room = self.positions - len(rollout.teacher_prompt)
            units = tuple(u for u in units if u.teacher_start + u.teacher_size <= room)
        return replace(rollout, teacher_ids=teacher_ids, units=units, spans=self.mode != "strict")

    def align(
        self, ids: tuple[int, ...], finished: bool, written: tuple[int, ...] | None = None
    ) -> tuple[tuple[int, ...], tuple[Unit, ...]]:
        """(the teacher's ids of the text of the student's ``ids``, the units); with ``written``,
        these are the teacher's ids of the same text, without end-of-sequence.

        The last unit is kept where end-of-sequence closes both sides. Where the text was cut, the
        unit at its end is dropped: more text could have been tokenized otherwise. As cut counts a
        text from where it stops being valid UTF-8 (a character cut in two), from a special token
        on, and from where the teacher's tokenizer does not give it back (it normalises).
        """
        body = ids[:-1] if finished else ids
        data, ends = self.student.read(body)
        text = decode_valid(data)
        teacher_ids = self.teacher.encode(text) if written is None else written
        theirs, their_ends = self.teacher.read(teacher_ids)
        same = _common(text.encode(), theirs)
        whole = (
            finished
            and len(ends) == len(body)
            and same == len(data) == len(theirs)
            and len(their_ends) == len(teacher_ids)
        )
        ours, others = (
            {end: i + 1 for i, end in enumerate(side) if end <= same} for side in (ends, their_ends)
        )
        units: list[Unit] = []
        start = (0, 0)
        for end in sorted(ours.keys() & others.keys()):
            unit = Unit(start[0], ours[end] - start[0], start[1], others[end] - start[1])
            start = (ours[end], others[end])
            if self.mode == "simct-released" and units and not unit.exact and not units[-1].exact:
                last = units.pop()
                unit = Unit(
                    last.start,
                    last.size + unit.size,
                    last.teacher_start,
                    last.teacher_size + unit.teacher_size,
                )
            units.append(unit)
        if whole:
            return (*teacher_ids, self.teacher_eos[0]), (
                *units,
                Unit(len(body), 1, len(teacher_ids), 1),
            )
        if units and ends[start[0] - 1] == same:
            units.pop()
        return teacher_ids[: len(others)], tuple(units)

    def to_student(self, ids: tuple[int, ...], finished: bool) -> tuple[int, ...]:
        """The student's tokens of a text that the teacher wrote. Of a text that was cut, without
        the last token."""
        body = ids[:-1] if finished else ids
        data, ends = self.teacher.read(body)
        text = decode_valid(data)
        if finished and len(ends) == len(body) and len(text.encode()) == len(data):
            return (*self.student.encode(text), self.student_eos[0])
        return self.student.encode(text)[:-1]


def match(student: Model, teacher: Model, mode: str) -> tuple[Alignment | None, str]:
    """How two ``Model``s' tokens compare, and why; sets the ``support`` of both heads, the leading
    ids they may speak about.

    None: id by id, on the ids both have; the token → id maps are equal, or every id with text
    stands for the same bytes on both sides and some special ones are named differently or missing.
    Else an Alignment. UserError where a head has too few rows, where the tokenizers differ and
    ``mode`` is off, and for a tokenizer that changes plain text.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    real = [max(vocabulary.values()) + 1 for vocabulary in (ours, theirs)]
    rows = [len(m.net.get_output_embeddings().weight) for m in (student, teacher)]
    for model in (student, teacher):
        check_rows(model)
    if ours == theirs:
        student.support = teacher.support = real[0]
        if rows == real:
            return None, f"vocabulary {real[0]:,}: equal on both sides"
        return None, (
            f"vocabulary {real[0]:,}: both heads cut to the real ids (student {rows[0]:,} rows, "
            f"teacher {rows[1]:,})"
        )
    differing, shown = _list_differing_ids(ours, theirs)
    sides = Bytes(student.tokenizer, student.name), Bytes(teacher.tokenizer, teacher.name)
    both = min(real)
    if (
        _same_text(*sides, both)
        and student.eos & teacher.eos
        and max(student.eos | teacher.eos) < both
    ):
        student.support = teacher.support = both
        return None, (
            f"vocabulary {both:,}: all {sum(piece is not None for piece in sides[0].table):,} ids "
            f"with text stand for the same bytes on both sides, {differing} special ids differ "
            f"by name (student / teacher: {shown}) and are compared by id"
        )
    if mode == "off":
        raise UserError(
            f"tokenizers differ on {differing} ids (student / teacher: {shown}) and "
            "--cross-tokenizer is off; choose a pair with one tokenizer, or --cross-tokenizer "
            "strict, simct or simct-released"
        )
    for side in sides:
        _check_plain_text(side)
    student.support, teacher.support = real
    found = Alignment(
        mode, *sides, _order_eos(student), _order_eos(teacher), positions=teacher.positions
    )
    common = len(found.shared.student)
    if not common:
        raise UserError(
            f"tokenizers: not one token of {student.name} has the bytes of one of {teacher.name}; "
            "choose another pair"
        )
    return found, (
        f"tokenizers differ on {differing:,} ids (student / teacher: {shown}): units of text are "
        f"compared (--cross-tokenizer {mode}); {common:,} tokens are shared, of the student's "
        f"{real[0]:,} and the teacher's {real[1]:,}"
    )


def _list_differing_ids(ours: dict[str, int], theirs: dict[str, int]) -> tuple[int, str]:
    """Return how many ids differ between two vocabularies, and describe the first three."""
    names = [{i: token for token, i in vocabulary.items()} for vocabulary in (ours, theirs)]
    differ = [
        i for i in sorted(names[0].keys() | names[1].keys()) if names[0].get(i) != names[1].get(i)
    ]
    shown = ", ".join(
        f"id {i} " + " / ".join(repr(side[i]) if i in side else "none" for side in names)
        for i in differ[:3]
    )
    return len(differ), shown


def _check_plain_text(side: Bytes) -> None:
    """Raise UserError if a tokenizer changes plain text."""
    if (text := side.changes()) is not None:
        raise UserError(
            f"model {side.name}: its tokenizer makes another text of {text!r} "
            f"({decode_valid(side.read(side.encode(text))[0])!r}), so it cannot be aligned with "
            "another; choose a pair with one tokenizer"
        )


def _order_eos(model: Model) -> tuple[int, ...]:
    """Return the EOS ids: the tokenizer's own first, the others ascending."""
    return tuple(sorted(model.eos, key=lambda i: (i != model.tokenizer.eos_token_id, i)))


def _same_text(ours: Bytes, theirs: Bytes, both: int) -> bool:
    """Does every id below ``both`` stand for the same bytes, none beyond it for any, and is
    plain text tokenized alike?"""
    return (
        ours.table[:both] == theirs.table[:both]
        and not any(ours.table[both:] + theirs.table[both:])
        and all(ours.encode(text) == theirs.encode(text) for text in PROBES)
    )


def _common(a: bytes, b: bytes) -> int:
    """Length of the common start of two byte strings."""
    if a == b:
        return len(a)
    pairs = zip(a, b, strict=False)  # one may be longer
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def census(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """The students' tokens of rollouts with units: in units of one token on each side (``exact``),
    in other units (``span``), in none (``dropped``), together (``tokens``)."""
    found = {"tokens": 0, "exact": 0, "span": 0, "dropped": 0}
    for r in rollouts:
        if r.units is not None:
            exact, all_units = sum(u.exact for u in r.units), sum(u.size for u in r.units)
            found["tokens"] += len(r.ids)
            found["exact"] += exact
            found["span"] += all_units - exact
            found["dropped"] += len(r.ids) - all_units
    return found


def shares(counts: list[dict[str, int]]) -> dict[str, float]:
    """Censuses → the shares of all tokens: ``exact_share``, ``span_share``, ``dropped_share``."""
    total = {name: sum(c[name] for c in counts) for name in ("tokens", "exact", "span", "dropped")}
    return {
        f"{name}_share": total[name] / max(1, total["tokens"])
        for name in ("exact", "span", "dropped")
    }
