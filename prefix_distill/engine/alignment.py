"""Align two tokenizations of one text by bytes: units of text, and the shared vocabulary.

    common boundaries = byte positions where a token ends in both tokenizations
    a unit = the text between two consecutive common boundaries
    shared vocabulary O = pairs of ids with the same bytes, and EOS with EOS

Source: SimCT, arXiv 2605.07711. Bytes make the alignment exact where a character is split between
tokens.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..errors import UserError
from .models import Model
from .rollout import Rollout, Unit
from .token_bytes import PROBES, TokenBytes, decode_valid
from .vocabulary import check_vocabulary, count_ids, known_tokens


@dataclass(frozen=True, kw_only=True)
class SharedVocabulary:
    """The shared vocabulary O: paired ids of both sides without EOS, and each side's EOS ids.

    The EOS ids of a side count as one event, the end of the turn.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_eos: tuple[int, ...]
    teacher_eos: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The alignment of a student and a teacher with different tokenizers.

    ``mode``: strict (only units of one token on each side), simct (all units) or simct-released
    (adjacent units that are not 1:1 are merged, as in the authors' code). ``student_eos``,
    ``teacher_eos``: ids that end a turn; the first one is appended to texts. ``positions``: the
    teacher's longest sequence in tokens (None: unlimited).
    """

    mode: str
    student: TokenBytes
    teacher: TokenBytes
    student_eos: tuple[int, ...]
    teacher_eos: tuple[int, ...]
    positions: int | None = None

    @functools.cached_property
    def shared_vocabulary(self) -> SharedVocabulary:
        """Return the shared vocabulary in the order of the student's ids."""
        teacher_id_of = self.teacher.canonical()
        pairs = []
        for piece, student_id in self.student.canonical().items():
            teacher_id = teacher_id_of.get(piece)
            if teacher_id is None or student_id in self.student_eos:
                continue
            if teacher_id not in self.teacher_eos:
                pairs.append((student_id, teacher_id))
        pairs.sort()
        return SharedVocabulary(
            student=tuple(student_id for student_id, _ in pairs),
            teacher=tuple(teacher_id for _, teacher_id in pairs),
            student_eos=self.student_eos,
            teacher_eos=self.teacher_eos,
        )

    def align_rollout(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the teacher's tokens of its text, and with its units.

        Units beyond the teacher's last position are dropped.
        """
        teacher_ids, units = self.align(rollout.ids, rollout.finished)
        if self.positions is not None:
            room = self.positions - len(rollout.teacher_prompt)
            units = tuple(u for u in units if u.teacher_start + u.teacher_size <= room)
        return replace(rollout, teacher_ids=teacher_ids, units=units, spans=self.mode != "strict")

    def align(
        self, ids: tuple[int, ...], finished: bool, written: tuple[int, ...] | None = None
    ) -> tuple[tuple[int, ...], tuple[Unit, ...]]:
        """Return the teacher's ids of the student's text, and the units.

        ``written``: the teacher's ids of the same text without EOS, if the teacher wrote it.

        The last unit is kept if EOS closes both sides. If the text is cut, the unit at its end is
        dropped, because more text could change its tokens. A text counts as cut where it stops
        being valid UTF-8, at a special token, and where the teacher's tokenizer changes it.
        """
        body = _without_eos(ids, finished)
        data, ends = self.student.decode(body)
        text = decode_valid(data)
        teacher_ids = written
        if teacher_ids is None:
            teacher_ids = self.teacher.encode(text)
        teacher_data, teacher_ends = self.teacher.decode(teacher_ids)
        common = _common_length(text.encode(), teacher_data)
        tokens_until = _count_tokens(ends, common)
        teacher_tokens_until = _count_tokens(teacher_ends, common)
        boundaries = sorted(tokens_until.keys() & teacher_tokens_until.keys())
        units = self._make_units(
            [(tokens_until[byte], teacher_tokens_until[byte]) for byte in boundaries]
        )
        if (
            finished
            and len(ends) == len(body)
            and len(teacher_ends) == len(teacher_ids)
            and common == len(data) == len(teacher_data)
        ):
            units.append(
                Unit(start=len(body), size=1, teacher_start=len(teacher_ids), teacher_size=1)
            )
            return (*teacher_ids, self.teacher_eos[0]), tuple(units)
        if boundaries and boundaries[-1] == common:
            units.pop()
        return teacher_ids[: len(teacher_tokens_until)], tuple(units)

    def _make_units(self, stops: list[tuple[int, int]]) -> list[Unit]:
        """Return the units that end after so many tokens of the student and the teacher."""
        units: list[Unit] = []
        start = teacher_start = 0
        for stop, teacher_stop in stops:
            unit = Unit(
                start=start,
                size=stop - start,
                teacher_start=teacher_start,
                teacher_size=teacher_stop - teacher_start,
            )
            start, teacher_start = stop, teacher_stop
            if self.mode == "simct-released" and units and not unit.exact and not units[-1].exact:
                last = units.pop()
                unit = Unit(
                    start=last.start,
                    size=last.size + unit.size,
                    teacher_start=last.teacher_start,
                    teacher_size=last.teacher_size + unit.teacher_size,
                )
            units.append(unit)
        return units

    def to_student(self, ids: tuple[int, ...], finished: bool) -> tuple[int, ...]:
        """Return the student's tokens of a text that the teacher wrote.

        If the text is cut, the last token is left out.
        """
        body = _without_eos(ids, finished)
        data, ends = self.teacher.decode(body)
        text = decode_valid(data)
        student_ids = self.student.encode(text)
        if finished and len(ends) == len(body) and len(text.encode()) == len(data):
            return (*student_ids, self.student_eos[0])
        return student_ids[:-1]


def _without_eos(ids: tuple[int, ...], finished: bool) -> tuple[int, ...]:
    if finished:
        return ids[:-1]
    return ids


def _count_tokens(ends: list[int], common: int) -> dict[int, int]:
    """Return, for each byte where a token ends, how many tokens end there or before."""
    return {end: count for count, end in enumerate(ends, 1) if end <= common}


def match_tokenizers(student: Model, teacher: Model, mode: str) -> tuple[Alignment | None, str]:
    """Return how two models' tokens are compared, and why; set the ``support`` of both heads.

    None: tokens are compared by id. Either the token → id maps are equal, or every id with text has
    the same bytes on both sides and only special tokens differ. Otherwise, an Alignment. UserError:
    a model has too few ids, the tokenizers differ and ``mode`` is off, or a tokenizer changes plain
    text.
    """
    check_vocabulary(student)
    check_vocabulary(teacher)
    student_vocabulary = known_tokens(student)
    teacher_vocabulary = known_tokens(teacher)
    # a head may have more rows than the tokenizer has ids
    student.support = count_ids(student)
    teacher.support = count_ids(teacher)
    if student_vocabulary == teacher_vocabulary:
        return None, _describe_equal(student, teacher)
    count, examples = _list_differing_ids(student_vocabulary, teacher_vocabulary)
    student_bytes = TokenBytes(student.tokenizer, student.name, ids=student.support)
    teacher_bytes = TokenBytes(teacher.tokenizer, teacher.name, ids=teacher.support)
    smaller = min(student.support, teacher.support)
    if (
        _differ_in_special_tokens(student_bytes, teacher_bytes, smaller)
        and student.eos & teacher.eos
        and max(student.eos | teacher.eos) < smaller
    ):
        student.support = teacher.support = smaller
        with_text = len(student_bytes.table) - student_bytes.table.count(None)
        return None, (
            f"vocabulary: the {with_text:,} ids with text are the same in student and teacher; "
            f"{count} special tokens have other names (student / teacher: {examples}) and are "
            "compared by id"
        )
    if mode == "off":
        raise UserError(
            f"tokenizers differ on {count} ids (student / teacher: {examples}) and "
            "--cross-tokenizer is off; choose a pair with one tokenizer, or --cross-tokenizer "
            "strict, simct or simct-released"
        )
    _check_plain_text(student_bytes)
    _check_plain_text(teacher_bytes)
    alignment = Alignment(
        mode=mode,
        student=student_bytes,
        teacher=teacher_bytes,
        student_eos=_order_eos(student),
        teacher_eos=_order_eos(teacher),
        positions=teacher.positions,
    )
    common = len(alignment.shared_vocabulary.student)
    if not common:
        raise UserError(
            f"tokenizers: no token of {student.name} has the same bytes as a token of "
            f"{teacher.name}; choose another pair"
        )
    return alignment, (
        f"tokenizers differ on {count:,} ids (student / teacher: {examples}): units of text are "
        f"compared (--cross-tokenizer {mode}); student ({student.support:,} tokens) and teacher "
        f"({teacher.support:,} tokens) share {common:,} tokens"
    )


def _describe_equal(student: Model, teacher: Model) -> str:
    """Describe two models with one vocabulary, whose heads are cut to its ids."""
    ids = student.support
    student_rows = len(student.net.get_output_embeddings().weight)
    teacher_rows = len(teacher.net.get_output_embeddings().weight)
    if student_rows == teacher_rows == ids:
        return f"vocabulary: the same {ids:,} ids in student and teacher"
    return (
        f"vocabulary: the same {ids:,} ids in student and teacher; padding rows of the output "
        f"heads are cut (student {student_rows:,} rows, teacher {teacher_rows:,})"
    )


def _list_differing_ids(student: dict[str, int], teacher: dict[str, int]) -> tuple[int, str]:
    """Return how many ids differ between two vocabularies, and describe the first three."""
    student_tokens = {i: token for token, i in student.items()}
    teacher_tokens = {i: token for token, i in teacher.items()}
    differing = []
    for i in sorted(student_tokens.keys() | teacher_tokens.keys()):
        if student_tokens.get(i) != teacher_tokens.get(i):
            differing.append(i)
    examples = []
    for i in differing[:3]:
        here = _describe_token(student_tokens, i)
        there = _describe_token(teacher_tokens, i)
        examples.append(f"id {i} {here} / {there}")
    return len(differing), ", ".join(examples)


def _describe_token(tokens: dict[int, str], i: int) -> str:
    if i in tokens:
        return repr(tokens[i])
    return "none"


def _check_plain_text(side: TokenBytes) -> None:
    """Raise UserError if a tokenizer changes plain text."""
    text = side.find_changed_text()
    if text is None:
        return
    data, _ = side.decode(side.encode(text))
    raise UserError(
        f"model {side.name}: its tokenizer changes the text {text!r} to {decode_valid(data)!r}, so "
        "it cannot be aligned with another; choose a pair with one tokenizer"
    )


def _order_eos(model: Model) -> tuple[int, ...]:
    """Return the EOS ids: first the tokenizer's, then the others in ascending order."""
    return tuple(sorted(model.eos, key=lambda i: (i != model.tokenizer.eos_token_id, i)))


def _differ_in_special_tokens(student: TokenBytes, teacher: TokenBytes, ids: int) -> bool:
    """Return whether two tokenizers differ in special tokens only.

    Ids below ``ids`` then have the same bytes, other ids have none, and plain text has equal ids.
    """
    if student.table[:ids] != teacher.table[:ids]:
        return False
    if any(student.table[ids:]) or any(teacher.table[ids:]):
        return False
    return all(student.encode(text) == teacher.encode(text) for text in PROBES)


def _common_length(a: bytes, b: bytes) -> int:
    """Return the length of the longest common prefix."""
    if a == b:
        return len(a)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):  # one may be longer
        if x != y:
            return i
    return min(len(a), len(b))


def count_by_unit(rollouts: Iterable[Rollout]) -> Counter[str]:
    """Count the student's tokens in rollouts that have units.

    ``exact``: in units of one token on each side; ``span``: in other units; ``dropped``: in no
    unit; ``tokens``: all of them.
    """
    counts = Counter(tokens=0, exact=0, span=0, dropped=0)
    for rollout in rollouts:
        if rollout.units is None:
            continue
        counts["tokens"] += len(rollout.ids)
        counts["dropped"] += len(rollout.ids)
        for unit in rollout.units:
            kind = "span"
            if unit.exact:
                kind = "exact"
            counts[kind] += unit.size
            counts["dropped"] -= unit.size
    return counts


def token_shares(counts: Iterable[Mapping[str, int]]) -> dict[str, float]:
    """Return the shares of all tokens: ``exact_share``, ``span_share`` and ``dropped_share``."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    tokens = max(1, total["tokens"])
    return {f"{kind}_share": total[kind] / tokens for kind in ("exact", "span", "dropped")}
