"""Decode ids one by one, as a stream shows them."""

from collections.abc import Sequence

from .models import Model

UNFINISHED = "\ufffd"  # what decodes from a part of a character's bytes


class TokenTexts:
    """The texts of ids that come one by one; joined they are the text of all ids.

    ``special``: whether special tokens have a text. An id that ends inside a character has none;
    the id that completes the character has it.
    """

    def __init__(self, model: Model, special: bool):
        self.tokenizer = model.tokenizer
        self.special = special
        # the ids since the last complete character, after some ids of context: some tokenizers drop
        # the space before the first id
        self.context: list[int] = []
        self.pending: list[int] = []

    def add(self, token: int, last: bool = False) -> str:
        """Return the text that an id completes. ``last``: no other id follows."""
        self.pending.append(token)
        before = self._decode(self.context)
        text = self._decode(self.context + self.pending)
        if text.endswith(UNFINISHED) and not last:
            return ""
        self.context, self.pending = self.pending, []
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not self.special))


def split_text(model: Model, ids: Sequence[int]) -> list[str]:
    """Return the text of each id, with special tokens."""
    texts = TokenTexts(model, special=True)
    final = len(ids) - 1
    return [texts.add(token, last=i == final) for i, token in enumerate(ids)]
