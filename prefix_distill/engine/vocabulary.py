"""The ids of a tokenizer that its model can read and write.

A tokenizer may have ids without a row in the embedding or the output layer. Some are padding or
special tokens that were added after training; transformers adds one to the tokenizer of some GGUF
files. They do no harm unless a text uses them.
"""

from ..errors import UserError
from .models import Model

SHOWN = 3  # most tokens that a note names


def known_tokens(model: Model) -> dict[str, int]:
    """Return token → id of the tokenizer's tokens that have a row in the model."""
    limit = model.id_limit
    return {token: i for token, i in model.tokenizer.get_vocab().items() if i < limit}


def count_ids(model: Model) -> int:
    """Return the number of ids up to the tokenizer's last one that has a row in the model."""
    return max(known_tokens(model).values()) + 1


def check_vocabulary(model: Model) -> None:
    """Raise UserError if ordinary tokens of the tokenizer have no row in the model.

    Ordinary tokens may occur in any text. Added tokens occur only where a text contains their name,
    so that rendering refuses the prompts that do.
    """
    added = model.tokenizer.added_tokens_decoder
    ordinary = set(model.tokenizer.get_vocab().values()) - added.keys()
    last = max(ordinary, default=-1)
    if last >= model.id_limit:
        raise UserError(
            f"vocabulary: the tokenizer of {model.name} has ids up to {last}, but the model has "
            f"only {model.id_limit} ids; resize the model's embeddings or use its own tokenizer"
        )


def describe_unused_tokens(model: Model) -> list[str]:
    """Return a note that names the tokens without a row in the model, if there are any."""
    names = []
    limit = model.id_limit
    for token, i in model.tokenizer.get_vocab().items():
        if i >= limit:
            names.append((i, token))
    if not names:
        return []
    shown = ", ".join(f"{token!r} (id {i})" for i, token in sorted(names)[:SHOWN])
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN} more"
    return [
        f"vocabulary: the tokenizer of {model.name} has tokens beyond the model's "
        f"{limit} ids, which are not used: {shown}"
    ]
