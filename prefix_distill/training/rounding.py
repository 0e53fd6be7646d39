"""Measure what a saved model loses when its weights are rounded."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..engine.evaluate import held_out_facts
from ..engine.loading import load_model
from ..engine.scoring import Scorer
from ..maths.intervals import token_mean
from .tails import divergence_by_token

if TYPE_CHECKING:
    from ..engine.rollout import Rollout
    from .state import State

SMALL = 0.9  # share of the KL gain below which a run warns


def measure_rounding(state: "State", contexts: "list[Rollout]") -> dict:
    """Return the held-out reverse KL of model/ as saved, and the share of the gain it keeps.

    {dtype, kl: nats per token, kept: (before - saved) / (before - trained), or None if training did
    not lower the KL}. Every rank loads the saved weights and computes with them as the run does.
    """
    run, progress = state.run, state.progress
    student = run.pair.student
    saved = load_model(
        str(state.folder.model),
        device=student.device,
        dtype=torch.float32,
        trust_remote_code=run.config.models.trust_remote_code,
    )
    rounded = dataclasses.replace(student, net=saved.net, adapter=None)
    pair = dataclasses.replace(run.pair, student=rounded)
    meter = state.meter()
    facts = held_out_facts(
        Scorer.reverse_kl(pair, run.place, run.method.terms.memory_bytes),
        contexts,
        run.limits,
        meter=meter,
        phase="evaluation",
    )
    state.count(meter)
    kl = token_mean(divergence_by_token(contexts, facts))["value"]
    before, trained = (progress.evaluations[i]["kl"]["value"] for i in (0, -1))
    kept = None
    if before > trained:
        kept = (before - kl) / (before - trained)
    return {"dtype": run.config.checkpoint.dtype, "kl": kl, "kept": kept}


def describe_rounding(loss: dict, trained: float) -> str:
    """Return a rounding's cost in words; ``trained``: the KL before the rounding, in nats."""
    text = (
        f"model/ in {loss['dtype']}: held-out reverse KL {loss['kl']:.4f} nats, "
        f"{trained:.4f} nats before the rounding"
    )
    if loss["kept"] is None:
        return text
    return f"{text}; {loss['kept']:.1%} of the KL gain is kept"
