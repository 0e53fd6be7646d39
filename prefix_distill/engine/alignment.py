"""Two tokenizations of one text → units of text that both models have an opinion on, and the tokens
they share. In bytes.

    common boundaries = byte ends shared by both tokenizations ;  a unit = the text between two
    consecutive ones shared vocabulary O = pairs of ids with the same bytes, and end-of-sequence
    with end-of-sequence

Source: SimCT, arXiv 2605.07711. Bytes make the alignment exact where a character is split between
tokens.
"""

import functools
import json
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from ..errors import UserError
from .loading import check_rows
from .rollout import Rollout, Unit

PROBES = (
    "Two words, 2 Words.",
    " leading",
    "double  space",
    "line\nline\n\n\tline",
    "(3+4)*5 = 35\\boxed{x_1^2}",
    "naïve Ångström café",
)


def _alphabet() -> dict[str, int]:
    """The 256 characters that byte-level tokenizers write bytes with (GPT-2): printable Latin-1
    stands for itself, the rest for 256, 257, …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = _alphabet()


class Bytes:
    """A tokenizer in bytes: what every id stands for, and its tokenization of a text that goes on
    from a prompt.

    ``table[id]``: the bytes of an id; None for special tokens and ids without text. ``encode`` puts
    no space or special token in front, and takes the text of a special token as text. UserError for
    a tokenizer that cannot be read this way.
    """

    def __init__(self, tokenizer, name: str):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise UserError(
                f"model {name}: its tokenizer has no fast form (tokenizer.json), so its tokens "
                "cannot be aligned with another tokenizer's; convert it, or choose a pair with one "
                "tokenizer"
            )
        spec = json.loads(core.to_str())
        self.name, special = (
            name,
            {a["id"] for a in spec["added_tokens"] if a["special"]}
            | set(tokenizer.all_special_ids),
        )
        added = {a["id"] for a in spec["added_tokens"]}
        meaning, own = self._meaning(spec), core.get_vocab(with_added_tokens=False)
        vocabulary = core.get_vocab(with_added_tokens=True)
        self.table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i not in special:
                self.table[i] = (meaning(token) if token in own else token.encode()) or None
        unknown = spec["model"].get("unk_token")
        if isinstance(unknown, str) and unknown in vocabulary:
            self.table[vocabulary[unknown]] = None
        self.fallback = {
            i
            for token, i in vocabulary.items()
            if i not in added and _fallback_byte(token) is not None
        }
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        for stage in ("normalizer", "pre_tokenizer"):
            spec[stage] = _without_prefix(spec[stage])
        self.core = Tokenizer.from_str(json.dumps(spec))
        self.core.encode_special_tokens = True

    def _meaning(self, spec: dict):
        """token → bytes, as the tokenizer's own decoder puts text together. UserError for one
        that loses bytes."""
        model, stages = spec["model"], _stages(spec["decoder"], "decoders")
        kinds = {stage["type"] for stage in stages}
        lossy = (
            model["type"] == "WordPiece"
            or model.get("end_of_word_suffix")
            or model.get("continuing_subword_prefix")
        )
        if lossy or kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
            raise UserError(
                f"model {self.name}: its tokenizer ({model['type']}, decoder "
                f"{', '.join(sorted(kinds)) or 'none'}) does not keep the bytes of a text, so it "
                "cannot be aligned with another; choose a pair with one tokenizer"
            )
        if "ByteLevel" in kinds:
            return lambda token: (
                bytes(ALPHABET[c] for c in token)
                if all(c in ALPHABET for c in token)
                else token.encode()
            )
        spaces = [stage["replacement"] for stage in stages if stage["type"] == "Metaspace"]
        swaps = [(space, " ") for space in spaces] + [
            (stage["pattern"].get("String"), stage["content"])
            for stage in stages
            if stage["type"] == "Replace"
        ]

        def text(token: str) -> bytes:
            if "ByteFallback" in kinds and (byte := _fallback_byte(token)) is not None:
                return bytes([byte])
            for old, new in swaps:
                token = token.replace(old, new) if old else token
            return token.encode()

        return text

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text`` as the continuation of something."""
        return tuple(self.core.encode(text, add_special_tokens=False).ids)

    def read(self, ids) -> tuple[bytes, list[int]]:
        """The bytes of ``ids`` up to the first without any, and where each of these ids ends in
        them."""
        data, ends = bytearray(), []
        for i in ids:
            piece = self.table[i] if i < len(self.table) else None
            if piece is None:
                break
            data += piece
            ends.append(len(data))
        return bytes(data), ends

    def canonical(self) -> dict[bytes, int]:
        """bytes → id. Of several ids with the same bytes, the one that ``encode`` gives, else
        one that is no byte fallback."""
        groups: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.table):
            if piece is not None:
                groups.setdefault(piece, []).append(i)
        return {
            piece: ids[0] if len(ids) == 1 else self._own(piece, ids)
            for piece, ids in groups.items()
        }

    def _own(self, piece: bytes, ids: list[int]) -> int:
        text = _valid(piece)
        found = self.encode(text) if len(text.encode()) == len(piece) else ()
        if len(found) == 1 and found[0] in ids:
            return found[0]
        return min(ids, key=lambda i: (i in self.fallback, i))

    def changes(self) -> str | None:
        """A plain text that the tokenizer makes another text of (it lower-cases, say); None where
        it does not. One that ends at a character it has no token for is not another text."""
        return next(
            (
                text
                for text in PROBES
                if not text.encode().startswith(self.read(self.encode(text))[0])
            ),
            None,
        )


def _stages(part: dict | None, name: str) -> list[dict]:
    """The stages of a decoder, normalizer or pre-tokenizer, sequences opened."""
    if part is None:
        return []
    return (
        [stage for inner in part[name] for stage in _stages(inner, name)]
        if part["type"] == "Sequence"
        else [part]
    )


def _without_prefix(part: dict | None) -> dict | None:
    """The same stage, but nothing is put in front of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        inner = next(key for key in ("normalizers", "pretokenizers") if key in part)
        stages = [stage for stage in map(_without_prefix, part[inner]) if stage is not None]
        return part | {inner: stages} if stages else None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if "add_prefix_space" in part else part


def _fallback_byte(token: str) -> int | None:
    """0x41 for "<0x41>"."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _valid(data: bytes) -> str:
    """The longest start of ``data`` that is valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


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
            *(tuple(pair[side] for pair in pairs) for side in (0, 1)),
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
        text = _valid(data)
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
        units, start = [], (0, 0)
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
        text = _valid(data)
        if finished and len(ends) == len(body) and len(text.encode()) == len(data):
            return (*self.student.encode(text), self.student_eos[0])
        return self.student.encode(text)[:-1]


def match(student, teacher, mode: str) -> tuple[Alignment | None, str]:
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
    names = [{i: token for token, i in vocabulary.items()} for vocabulary in (ours, theirs)]
    differ = [
        i for i in sorted(names[0].keys() | names[1].keys()) if names[0].get(i) != names[1].get(i)
    ]
    shown = ", ".join(
        f"id {i} " + " / ".join(repr(side[i]) if i in side else "none" for side in names)
        for i in differ[:3]
    )
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
            f"with text stand for the same bytes on both sides, {len(differ)} special ids differ "
            f"by name (student / teacher: {shown}) and are compared by id"
        )
    if mode == "off":
        raise UserError(
            f"tokenizers differ on {len(differ)} ids (student / teacher: {shown}) and "
            "--cross-tokenizer is off; choose a pair with one tokenizer, or --cross-tokenizer "
            "strict, simct or simct-released"
        )
    for side in sides:
        if (text := side.changes()) is not None:
            raise UserError(
                f"model {side.name}: its tokenizer makes another text of {text!r} "
                f"({_valid(side.read(side.encode(text))[0])!r}), so it cannot be aligned with "
                "another; choose a pair with one tokenizer"
            )
    student.support, teacher.support = real
    ends = (
        sorted(model.eos, key=lambda i: (i != model.tokenizer.eos_token_id, i))
        for model in (student, teacher)
    )
    found = Alignment(mode, *sides, *map(tuple, ends), teacher.positions)
    common = len(found.shared.student)
    if not common:
        raise UserError(
            f"tokenizers: not one token of {student.name} has the bytes of one of {teacher.name}; "
            "choose another pair"
        )
    return found, (
        f"tokenizers differ on {len(differ):,} ids (student / teacher: {shown}): units of text are "
        f"compared (--cross-tokenizer {mode}); {common:,} tokens are shared, of the student's "
        f"{real[0]:,} and the teacher's {real[1]:,}"
    )


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
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def census(rollouts) -> dict[str, int]:
    """The students' tokens of rollouts with units: in units of one token on each side (``exact``),
    in other units (``span``), in none (``dropped``), together (``tokens``)."""
    found = {"tokens": 0, "exact": 0, "span": 0, "dropped": 0}
    for r in rollouts:
        if r.units is not None:
            exact, all_units = sum(u.exact for u in r.units), sum(u.size for u in r.units)
            for name, count in zip(
                found, (len(r.ids), exact, all_units - exact, len(r.ids) - all_units)
            ):
                found[name] += count
    return found


def shares(counts: list[dict[str, int]]) -> dict[str, float]:
    """Censuses → the shares of all tokens: ``exact_share``, ``span_share``, ``dropped_share``."""
    total = {name: sum(c[name] for c in counts) for name in ("tokens", "exact", "span", "dropped")}
    return {
        f"{name}_share": total[name] / max(1, total["tokens"])
        for name in ("exact", "span", "dropped")
    }
