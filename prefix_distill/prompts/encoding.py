"""Encode prompts, so that a control token in a text does not become a control token."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import UserError
from .chat import Piece

PROBE = "a"  # a text that shows what a tokenizer adds to plain text


def find_control_tokens(tokenizer: Any, text: str) -> set[str]:
    """Return the special tokens that ``text`` spells out."""
    specials = set()
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            specials.add(token.content)
    return specials


def encode(tokenizer: Any, pieces: Sequence[Piece], kept: Collection[str] = ()) -> list[int]:
    """Return the ids of a prompt without adding special tokens.

    Control tokens that a given piece spells out are encoded as text, except those in ``kept``.
    ValueError: the tokenizer encodes the text after a control token in another way than alone.
    """
    text = "".join(piece.text for piece in pieces)
    given = "".join(piece.text for piece in pieces if piece.is_given)
    quoted = find_control_tokens(tokenizer, given) - set(kept)
    if not quoted:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids
    harmless = []
    for piece in pieces:
        words = piece.text
        if piece.is_given:
            words = _pattern(quoted).sub("-", words)
        harmless.append(Piece(text=words, is_given=piece.is_given))
    whole = "".join(piece.text for piece in harmless)
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    if _encode_between_tokens(tokenizer, harmless, kept) != expected:
        raise ValueError(", ".join(sorted(quoted)))
    return _encode_between_tokens(tokenizer, pieces, kept)


def _encode_between_tokens(
    tokenizer: Any, pieces: Sequence[Piece], kept: Collection[str]
) -> list[int]:
    """Return the ids of the text between the control tokens, and of these tokens."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
        tokens = set(kept)
        if not piece.is_given:
            tokens = find_control_tokens(tokenizer, piece.text)
        for part in _pattern(tokens).split(piece.text):
            if part not in tokens:
                text += part
                continue
            ids += _encode_text(tokenizer, text)
            ids.append(tokenizer.convert_tokens_to_ids(part))
            text = ""
    return ids + _encode_text(tokenizer, text)


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text in which no special token counts."""
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def _pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that splits a text at the tokens; it keeps them, the longest first."""
    if not tokens:
        return re.compile("(?!)")  # matches nowhere
    listed = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, listed))})")


def find_added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after plain text, such as BOS and EOS."""
    whole: list[int] = tokenizer(PROBE).input_ids
    bare: list[int] = tokenizer(PROBE, add_special_tokens=False).input_ids
    for start in range(len(whole) - len(bare) + 1):
        end = start + len(bare)
        if whole[start:end] == bare:
            return whole[:start], whole[end:]
    raise UserError(
        "the tokenizer changes plain text when it adds special tokens, so that prompts cannot be "
        "encoded; use a tokenizer that adds them before or after the text"
    )
