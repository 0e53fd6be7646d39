"""A tokenizer in bytes: the bytes of each id, and how it tokenizes a text's continuation."""

import json
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise UserError(
                f"model {name}: its tokenizer has no fast form (tokenizer.json), so its tokens "
                "cannot be aligned with another tokenizer's; convert it, or choose a pair with one "
                "tokenizer"
            )
        spec = json.loads(core.to_str())
        self.name = name
        special = {a["id"] for a in spec["added_tokens"] if a["special"]}
        special |= set(tokenizer.all_special_ids)
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

    def _meaning(self, spec: dict) -> Callable[[str], bytes]:
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

    def read(self, ids: Iterable[int]) -> tuple[bytes, list[int]]:
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
        text = decode_valid(piece)
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


def decode_valid(data: bytes) -> str:
    """The longest start of ``data`` that is valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
