"""Ids of plain text, on which models are checked before a run."""

from collections.abc import Iterable

import torch

from .models import Model
from .vocabulary import known_tokens

TEXT = "Tom has 12 apples. He gives 5 of them to Anna and buys 30 more. How many has he now? 12-5=7"
FEWEST = 20  # different tokens of TEXT that a tokenizer must know
FEWEST_OF_PROMPTS = 4  # different text tokens that prompts must have


def text_ids(model: Model, count: int) -> list[int]:
    """Return ``count`` ids of plain text, without EOS; a short text is repeated.

    A tokenizer that does not know most of the text gives the ids of its vocabulary, without special
    tokens. These may have embeddings that were never trained.
    """
    ids = _select_text(model, model.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    if len(set(ids)) < FEWEST:
        limit = model.vocabulary
        known = [i for i in sorted(known_tokens(model).values()) if i < limit]
        ids = _select_text(model, known) or known
    return (ids * count)[:count]


def text_of(model: Model, prompts: Iterable[tuple[int, ...]], count: int) -> list[int]:
    """Return ``count`` ids of the text of some prompts, without the special tokens of a template.

    A short text is repeated. Prompts without text give the ids of plain text.
    """
    ids: list[int] = []
    for prompt in prompts:
        ids += _select_text(model, list(prompt))
    if len(set(ids)) < FEWEST_OF_PROMPTS:
        return text_ids(model, count)
    return (ids * count)[:count]


def _select_text(model: Model, ids: list[int]) -> list[int]:
    """Return the ids that are no special tokens and that the head knows."""
    left_out = {*model.tokenizer.all_special_ids, *model.eos}
    for i, token in model.tokenizer.added_tokens_decoder.items():
        if token.special:
            left_out.add(i)
    ids_of_head = min(model.vocabulary, model.id_limit)
    return [i for i in ids if i < ids_of_head and i not in left_out]


def make_row(model: Model, count: int) -> torch.Tensor:
    """Return ``count`` ids of plain text [1, T] on the model's device."""
    return torch.tensor([text_ids(model, count)], device=model.device)
