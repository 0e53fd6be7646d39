"""Measure the bytes of each part of a step by running it on shape-only tensors."""

from dataclasses import dataclass, field

import torch
from transformers import Cache

from ..engine import scoring
from ..engine.decoding_loop import contiguous_head_input
from ..engine.masters import Masters
from ..engine.models import Model
from ..engine.rollout import Rollout, Side, student_sides
from ..engine.transformers_names import name_cache_argument
from ..maths.divergence import Head, Terms
from ..maths.fused import statistics, weighted
from .ghosts import StorageCounter, make_ghost, storage_of


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch of a step. ``accumulates``: its gradients are added to earlier ones.

    ``rollouts`` are not compared; ``parts.Training`` compares their sizes.
    """

    rollouts: list[Rollout] = field(compare=False)
    terms: Terms
    accumulates: bool
    autocast: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One call of ``generate``: the first ``rows`` of ``samples`` responses to each prompt.

    ``prompts``: lengths in tokens, the longest first; ``new_tokens``: the longest response.
    """

    prompts: tuple[int, ...]
    samples: int
    rows: int
    new_tokens: int


def measure_weights(network: Masters) -> dict[str, float]:
    """Return the bytes of parameters and buffers, those of the working copy, and what trains.

    ``trainable`` is a number of elements.
    """
    tensors = [*network.model.net.parameters(), *network.model.net.buffers()]
    return {
        "all": sum(storage_of(t).nbytes() for t in tensors),
        "copy": sum(storage_of(t).nbytes() for t in network.copies),
        "trainable": sum(t.numel() for t in tensors if t.requires_grad),
    }


def _count_beside(model: Model, *known: torch.Tensor) -> StorageCounter:
    """Return a counter of the storages other than the model's and those of ``known``."""
    return StorageCounter([*model.net.parameters(), *model.net.buffers(), *known])


def measure_forward(model: Model, sides: list[Side], autocast: bool) -> dict[str, float]:
    """Return the peak bytes of a forward pass without gradient, and the bytes that it returns."""
    counter = _count_beside(model)
    with torch.no_grad(), counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden_ND = scoring.hidden_rows(model, sides)
        peak, kept = counter.take_peak(), counter.live
        del hidden_ND
    return {"peak": peak, "rows": kept}


def measure_update(network: Masters, teacher: Head, work: MicroBatch) -> dict[str, float]:
    """Return the peak bytes of each phase of a student's micro-batch, and those at its end.

    Each value is linear in the depth of the network; their maximum is not. Gradients that earlier
    micro-batches have left are not counted.
    """
    model = network.student
    gradients: list[torch.Tensor] = []
    # Later micro-batches find gradients that are held all the time and are counted elsewhere.
    for p in network.weights.values():
        p.grad = None
        if work.accumulates:
            p.grad = make_ghost(p.shape)
            gradients.append(p.grad)
    count = len(scoring.tokens(work.rollouts))
    teacher_NE = make_ghost((count, teacher.weight_VD.shape[1]))
    masters = network.copies.values()
    counter = _count_beside(model, *masters, *gradients, teacher_NE, teacher.weight_VD)
    with counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.autocast):
            student_ND = scoring.hidden_rows(model, student_sides(work.rollouts))
        forward = counter.take_peak()
        # The values are bound to a name, as in a step: they stay alive and count.
        loss, _value_N, _ = weighted(
            work.terms,
            student_ND=student_ND,
            student_head=network.head(),
            teacher_NE=teacher_NE,
            teacher_head=teacher,
            weight_N=torch.ones(count),
            token_N=scoring.tokens(work.rollouts),
        )
        loss_peak = counter.take_peak()
        loss.backward()
        backward, end = counter.take_peak(), counter.live
    for p in network.weights.values():
        p.grad = None
    return {"read": forward, "loss": loss_peak, "backward": backward, "end": end}


@torch.no_grad()
def measure_generation(model: Model, work: Generation) -> dict[str, float]:
    """Return the peak bytes of the prefill, and of the step that samples the last token."""
    width = work.prompts[0]
    mask = torch.tensor([[0] * (width - p) + [1] * p for p in work.prompts])
    # Rows of the same prompt stand together, as ``generate`` orders them.
    prompt_of_row = torch.arange(work.rows) // work.samples
    prefills_once = model.prefills_once and work.samples > 1 and width > 1
    prefill = _count_beside(model)
    with prefill:
        if prefills_once:
            # The hidden states are freed at once, as in engine/sampling.py.
            cache = model.trunk_cached(torch.zeros_like(mask)[:, :-1], mask[:, :-1])[1]
            cache.batch_select_indices(prompt_of_row)
            _sample_token(model, mask[prompt_of_row], width=1, cache=cache)
            del cache
        else:
            _sample_token(model, mask[prompt_of_row], width=width, cache=None)
    # The cache grows with every token, so the last step needs most.
    last = _count_beside(model)
    with last:
        ids = torch.zeros(1, max(1, width + work.new_tokens - 2), dtype=torch.long)
        cache = model.trunk_cached(ids, torch.ones_like(ids))[1]
        # Filling the cache with one row and repeating it is faster than sampling all tokens.
        cache.batch_select_indices(torch.zeros(work.rows, dtype=torch.long))
        last.take_peak()
        full_mask = _extend_mask(mask[prompt_of_row], ids.shape[1] + 1)
        _sample_token(model, full_mask, width=1, cache=cache)
        last_peak = last.take_peak()
        del cache
    return {"prefill": prefill.peak, "last token": last_peak}


def _extend_mask(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return the mask of rows that have grown to ``width`` tokens."""
    grown = torch.ones(len(mask), width - mask.shape[1], dtype=torch.long)
    return torch.cat([mask, grown], 1)


def _sample_token(model: Model, mask: torch.Tensor, width: int, cache: Cache | None) -> None:
    """Run the last ``width`` positions of ``mask`` and sample a token (engine/sampling.py)."""
    rows = len(mask)
    cache_argument = {name_cache_argument(model.net.forward): cache}
    with contiguous_head_input(model.net.get_output_embeddings()):
        out = model.net(
            input_ids=torch.zeros(rows, width, dtype=torch.long),
            attention_mask=mask,
            use_cache=True,
            position_ids=(mask.cumsum(-1) - 1).clamp_(min=0)[:, -width:],
            logits_to_keep=1,
            **cache_argument,
        )
    # ``generate`` copies the logits, and the sampler adds noise of the same size.
    scores = out.logits[:, -1].to(copy=True, dtype=torch.float32)
    noise = torch.empty(rows, model.support or scores.shape[1])
    scores[:, : noise.shape[1]] -= noise.neg_().log1p_()
    scores.argmax(-1)


@torch.no_grad()
def measure_comparison(
    student: Head, teacher: Head, dtype: torch.dtype, rollouts: list[Rollout]
) -> int:
    """Return the peak bytes of the tables that compare both models, beside their hidden rows."""
    count = len(scoring.tokens(rollouts))
    student_ND = make_ghost((count, student.weight_VD.shape[1]))
    teacher_NE = make_ghost((count, teacher.weight_VD.shape[1]))
    counter = StorageCounter([student_ND, teacher_NE, student.weight_VD, teacher.weight_VD])
    with counter:
        statistics(
            Terms(name="reverse-kl", dtype=dtype),
            student_ND=student_ND,
            student_head=student,
            teacher_NE=teacher_NE,
            teacher_head=teacher,
            token_N=scoring.tokens(rollouts),
        )
    return counter.peak
