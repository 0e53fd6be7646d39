"""Read a tokenizer in bytes: the bytes of each id, and the tokens of a text's continuation."""

import json
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

# plain texts that a tokenizer must return unchanged
PROBES = (
    "Two words, 2 Words.",
    " leading",
    "double  space",
    "line\nline\n\n\tline",
    "(3+4)*5 = 35\\boxed{x_1^2}",
    "naïve Ångström café",
)
# decoder stages that keep the bytes of a text
LOSSLESS_STAGES = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each of the 256 characters that byte-level tokenizers use (GPT-2).

    A printable Latin-1 character stands for its own byte. The characters 256, 257, … stand for the
    other bytes in ascending order.
    """
    alphabet = {}
    for byte in (*range(33, 127), *range(161, 173), *range(174, 256)):
        alphabet[chr(byte)] = byte
    printable = set(alphabet.values())
    character = 256
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(character)] = byte
            character += 1
    return alphabet


ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """The bytes of a tokenizer's ids, and its tokenization of the continuation of a prompt.

    ``table[id]``: the bytes of an id; None for special tokens and ids without text. ``encode`` adds
    no leading space and no special token, and treats the text of a special token as text. ``ids``:
    the model has only the ids below it (None: all), so added tokens beyond count as text.
    UserError: the tokenizer has no tokenizer.json, or it does not keep the bytes of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, ids: int | None = None):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise UserError(
                f"model {name}: its tokenizer has no fast version (tokenizer.json), so its tokens "
                "cannot be aligned with another tokenizer's; convert it, or choose a pair with one "
                "tokenizer"
            )
        spec = json.loads(core.to_str())
        if ids is not None:
            spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < ids]
        self.name = name
        token_bytes = self._token_decoder(spec)
        added = {token["id"] for token in spec["added_tokens"]}
        special = set(tokenizer.all_special_ids)
        special.update(token["id"] for token in spec["added_tokens"] if token["special"])
        model_tokens = core.get_vocab(with_added_tokens=False)
        self.core = _continuation_tokenizer(spec)
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        unknown = spec["model"].get("unk_token")
        self.table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        self.fallback: set[int] = set()
        for token, i in vocabulary.items():
            if i not in added and _fallback_byte(token) is not None:
                self.fallback.add(i)
            if i in special or token == unknown:
                continue
            if token in model_tokens:
                self.table[i] = token_bytes(token) or None
            else:
                self.table[i] = token.encode() or None

    def _token_decoder(self, spec: dict) -> Callable[[str], bytes]:
        """Return the function token → bytes that the tokenizer's decoder implies.

        UserError: the decoder does not keep the bytes of a text.
        """
        model = spec["model"]
        stages = _stages(spec["decoder"], "decoders")
        kinds = {stage["type"] for stage in stages}
        lossy = (
            model["type"] == "WordPiece"
            or model.get("end_of_word_suffix")
            or model.get("continuing_subword_prefix")
        )
        if lossy or kinds - LOSSLESS_STAGES:
            raise UserError(
                f"model {self.name}: its tokenizer ({model['type']}, decoder "
                f"{', '.join(sorted(kinds)) or 'none'}) does not keep the bytes of a text, so it "
                "cannot be aligned with another; choose a pair with one tokenizer"
            )
        if "ByteLevel" in kinds:
            return _byte_level_bytes
        replacements = []
        for stage in stages:
            if stage["type"] == "Metaspace":
                replacements.append((stage["replacement"], " "))
        for stage in stages:
            if stage["type"] == "Replace" and stage["pattern"].get("String"):
                replacements.append((stage["pattern"]["String"], stage["content"]))

        def token_bytes(token: str) -> bytes:
            byte = _fallback_byte(token)
            if "ByteFallback" in kinds and byte is not None:
                return bytes([byte])
            for old, new in replacements:
                token = token.replace(old, new)
            return token.encode()

        return token_bytes

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of ``text`` as a continuation."""
        return tuple(self.core.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> tuple[bytes, list[int]]:
        """Return the bytes of ``ids``, and the end of each id in them.

        It stops before the first id without bytes.
        """
        data = bytearray()
        ends: list[int] = []
        for i in ids:
            if i >= len(self.table):
                break
            piece = self.table[i]
            if piece is None:
                break
            data += piece
            ends.append(len(data))
        return bytes(data), ends

    def canonical(self) -> dict[bytes, int]:
        """Return the id of each byte string.

        Of several ids with the same bytes, it is the one that ``encode`` returns, or else the first
        one that is no byte fallback.
        """
        groups: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.table):
            if piece is not None:
                groups.setdefault(piece, []).append(i)
        return {piece: self._choose_id(piece, ids) for piece, ids in groups.items()}

    def _choose_id(self, piece: bytes, ids: list[int]) -> int:
        if len(ids) == 1:
            return ids[0]
        text = decode_valid(piece)
        if len(text.encode()) == len(piece):
            encoded = self.encode(text)
            if len(encoded) == 1 and encoded[0] in ids:
                return encoded[0]
        return min(ids, key=lambda i: (i in self.fallback, i))

    def find_changed_text(self) -> str | None:
        """Return a plain text that the tokenizer changes, for example to lower case; else None.

        A text that ends at a character without a token counts as unchanged.
        """
        for text in PROBES:
            data, _ = self.decode(self.encode(text))
            if not text.encode().startswith(data):
                return text
        return None


def _byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; of a token in other characters, its UTF-8."""
    try:
        return bytes(ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def _continuation_tokenizer(spec: dict) -> Tokenizer:
    """Return the tokenizer of ``spec`` without prefixes, special tokens, truncation and padding."""
    changes: dict[str, dict | None] = {"post_processor": None, "truncation": None, "padding": None}
    for stage in ("normalizer", "pre_tokenizer"):
        changes[stage] = _without_prefix(spec[stage])
    core = Tokenizer.from_str(json.dumps(spec | changes))
    core.encode_special_tokens = True
    return core


def _stages(part: dict | None, name: str) -> list[dict]:
    """Return the stages of a decoder as a flat list; ``name`` is the key of a sequence's stages."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    stages = []
    for inner in part[name]:
        stages.extend(_stages(inner, name))
    return stages


def _without_prefix(part: dict | None) -> dict | None:
    """Return a normalizer or pre-tokenizer that adds nothing in front of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "Sequence":
        key = "normalizers"
        if key not in part:
            key = "pretokenizers"
        stages = []
        for inner in part[key]:
            stage = _without_prefix(inner)
            if stage is not None:
                stages.append(stage)
        if not stages:
            return None
        return part | {key: stages}
    if "add_prefix_space" in part:
        return part | {"add_prefix_space": False}
    return part


def _fallback_byte(token: str) -> int | None:
    """Return 0x41 for the token "<0x41>"; None for a token of another kind."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def decode_valid(data: bytes) -> str:
    """Return the longest prefix of ``data`` that is valid UTF-8, as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
