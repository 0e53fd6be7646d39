"""Measure the bytes of each part of an update by running it on shape-only tensors."""

import torch

from ..engine import scoring
from ..engine.models import Model
from ..engine.rollout import Rollout, Side, student_sides
from ..engine.transformers_names import name_cache_argument
from ..maths.divergence import Head, Terms
from ..maths.fused import statistics, weighted
from .ghosts import Live, ghost, storage_of


def weights(model: Model) -> dict[str, float]:
    """Bytes of a network's parameters and buffers, and how many numbers of them train with an
    adapter."""
    tensors = [*model.net.parameters(), *model.net.buffers()]
    return {
        "all": sum(storage_of(t).nbytes() for t in tensors),
        "trainable": sum(t.numel() for t in tensors if t.requires_grad),
    }


def _live(model: Model, *known: torch.Tensor) -> Live:
    return Live([*model.net.parameters(), *model.net.buffers(), *known])


def reading(model: Model, sides: list[Side], autocast: bool) -> dict[str, float]:
    """Bytes while a model reads rollouts without gradient (``peak``), and of the hidden rows
    that stay (``rows``)."""
    live = _live(model)
    with torch.no_grad(), live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rows = scoring.hidden_rows(model, sides)
        peak, kept = live.highest(), live.now
        del rows
    return {"peak": peak, "rows": kept}


def updating(  # noqa: PLR0913  the operands of one update
    model: Model,
    rollouts: list[Rollout],
    terms: Terms,
    teacher: Head,
    autocast: bool,
    accumulated: bool,
) -> dict[str, float]:
    """Bytes while the student reads a micro-batch (``read``), while the loss is taken (``loss``)
    and gradients flow (``backward``), and when they are there (``end``): each of them is a straight
    line in the depth, their maximum is not. ``accumulated``: they are there already, and not
    counted."""
    trained = list(model.trained.values())
    for p in trained:
        p.grad = ghost(p.shape) if accumulated else None
    live = _live(model, *(p.grad for p in trained if p.grad is not None))
    count = sum(len(r.taught) for r in rollouts)
    teacher_NE = ghost((count, teacher.weight_VD.shape[1]))
    live.known |= {storage_of(t)._cdata for t in (teacher_NE, teacher.weight_VD)}
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            student_ND = scoring.hidden_rows(model, student_sides(rollouts))
        read = live.highest()
        # bound to a name, as in an update, so that the values stay alive and count
        loss, _value_N, _ = weighted(
            terms,
            student_ND,
            model.head(),
            teacher_NE,
            teacher,
            torch.ones(count),
            scoring.tokens(rollouts),
        )
        loss_peak = live.highest()
        loss.backward()
        backward, end = live.highest(), live.now
    for p in trained:
        p.grad = None
    return {"read": read, "loss": loss_peak, "backward": backward, "end": end}


@torch.no_grad()
def generating(
    model: Model, prompts: list[int], samples: int, rows: int, new: int
) -> dict[str, float]:
    """Bytes of one generate call of ``rows`` responses, the longest prompt first: the prefill,
    and the last of ``new`` tokens."""
    count, width = rows, prompts[0]
    shared = model.shares_prompts and samples > 1 and width > 1
    begin, end = _live(model), _live(model)
    mask = torch.tensor([[0] * (width - p) + [1] * p for p in prompts])
    with begin:
        if shared:
            hidden, cache = model.trunk_cached(torch.zeros_like(mask)[:, :-1], mask[:, :-1])
            del hidden
            cache.batch_select_indices(torch.arange(count) // samples)
            _draw(model, count, mask[torch.arange(count) // samples], 1, cache)
            del cache
        else:
            _draw(model, count, mask[torch.arange(count) // samples], width, None)
    with end:
        ids = torch.zeros(1, max(1, width + new - 2), dtype=torch.long)
        hidden, cache = model.trunk_cached(ids, torch.ones_like(ids))
        del hidden
        cache.batch_select_indices(torch.zeros(count, dtype=torch.long))
        end.highest()
        _draw(
            model,
            count,
            torch.cat(
                [
                    mask[torch.arange(count) // samples],
                    torch.ones(count, ids.shape[1] + 1 - width, dtype=torch.long),
                ],
                1,
            ),
            1,
            cache,
        )
        last = end.highest()
        del cache
    return {"prefill": begin.peak, "last token": last}


def _draw(model: Model, rows: int, mask: torch.Tensor, width: int, cache) -> None:
    """A step of ``generate`` and the draw from its logits (engine/sampling.py)."""
    cache_argument = {name_cache_argument(model.net.forward): cache}
    out = model.net(
        input_ids=torch.zeros(rows, width, dtype=torch.long),
        attention_mask=mask,
        use_cache=True,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0)[:, -width:],
        logits_to_keep=1,
        **cache_argument,
    )
    scores = out.logits[:, -1].to(copy=True, dtype=torch.float32)
    race = torch.empty(rows, model.support or scores.shape[1])
    scores[:, : race.shape[1]] -= race.neg_().log1p_()
    scores.argmax(-1)


@torch.no_grad()
def comparing(models: list[Model], dtype: torch.dtype, rollouts: list[Rollout]) -> int:
    """Bytes of the tables in which both models' hidden rows are compared, beside these rows."""
    heads = [m.head() for m in models]
    count = sum(len(r.taught) for r in rollouts)
    rows = [ghost((count, h.weight_VD.shape[1])) for h in heads]
    live = Live([*rows, *(h.weight_VD for h in heads)])
    with live:
        statistics(
            Terms("reverse-kl", dtype=dtype),
            rows[0],
            heads[0],
            rows[1],
            heads[1],
            scoring.tokens(rollouts),
        )
    return live.peak
