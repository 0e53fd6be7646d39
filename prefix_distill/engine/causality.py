"""Check that a token's hidden state depends on the tokens before it, and on nothing else.

The loss compares next-token distributions. A model whose tokens see what follows them, such as an
embedding model, predicts what it has already read.
"""

import torch

from ..errors import UserError
from .models import Model
from .text_ids import make_row
from .trace import join, name_difference, recording

TOKENS = 32
NEAR = 8  # hidden states before the first changed token that are compared
# smallest relative change that is no rounding; in half precision of the median position, because
# rounding alone may send a single token to another expert
TOLERANCE = 1e-3
TOLERANCE_OF_HALF_PRECISION = 0.1
TIMES_NOISE = 10.0


@torch.no_grad()
def check_causality(model: Model) -> None:
    """Raise UserError if a hidden state changes with a later token, or with another row.

    The later half of a text is replaced; the last states before it must stay. What they change
    beside another row of the batch is rounding noise, and must be small itself.
    """
    count = min(TOKENS, model.positions or TOKENS)
    ids_BT = make_row(model, count)
    if count < 2:
        return  # nothing follows
    half = count // 2
    changed_BT = ids_BT.clone()
    changed_BT[:, half:] = ids_BT[:, half:].roll(1, -1)
    near = slice(max(0, half - NEAR), half)
    alone_TD = model.trunk(ids_BT)[0, near].float()
    again_TD = model.trunk(ids_BT)[0, near].float()
    pair_BT = torch.cat([ids_BT, ids_BT.flip(-1)])
    beside_TD = model.trunk(pair_BT)[0, near].float()
    changed_TD = model.trunk(changed_BT)[0, near].float()
    allowed = model.choose_tolerance(TOLERANCE, TOLERANCE_OF_HALF_PRECISION)
    if _relative_change(model, alone_TD, again_TD) > allowed:
        return  # not deterministic, which a check of its own says
    noise = _relative_change(model, alone_TD, beside_TD)
    if noise > allowed:
        where = _locate(model, ids_BT, pair_BT, allowed=allowed, tokens=near)
        raise UserError(
            f"model {model.name}: the hidden state of a token changes by {noise:.2g} of its norm "
            f"beside another row of the batch, expected at most {allowed:g}{where}; its numbers "
            "depend on how prompts are batched, so it can be neither scored nor trained; use "
            "another model"
        )
    change = _relative_change(model, alone_TD, changed_TD)
    allowed = max(allowed, TIMES_NOISE * noise)
    if change > allowed:
        where = _locate(model, ids_BT, changed_BT, allowed=allowed, tokens=near)
        raise UserError(
            f"model {model.name}: the hidden state of token {half - 1} changes by {change:.2g} of "
            f"its norm when a later token changes (rounding: {noise:.1g}){where}; expected a "
            "causal language model, got one whose outputs depend on later tokens, such as an "
            "embedding model; use another model"
        )


def _locate(
    model: Model, before_BT: torch.Tensor, after_BT: torch.Tensor, *, allowed: float, tokens: slice
) -> str:
    """Return a clause on the first tensor of row 0 that differs at ``tokens``, or nothing."""
    passes = []
    for ids_BT in (before_BT, after_BT):
        with recording(model.net) as recorded:
            model.trunk(ids_BT)
        passes.append(join(recorded))
    where = name_difference(model, *passes, allowed=allowed, tokens=tokens)
    if where is None:
        return ""
    return f"; {where}"


def _relative_change(model: Model, before_TD: torch.Tensor, after_TD: torch.Tensor) -> float:
    """Return the relative change of the hidden states: the largest one, or the median one."""
    changes_T = (after_TD - before_TD).norm(dim=-1) / before_TD.norm(dim=-1)
    if model.is_full_precision:
        return changes_T.max().item()
    return changes_T.median().item()
