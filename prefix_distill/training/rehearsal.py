"""One update before the first evaluation, which changes nothing: what can fail, fails here."""

import itertools
from dataclasses import replace
from typing import NoReturn

import torch

from ..display import phase
from ..engine.device import Clock, is_out_of_memory
from ..engine.meter import Meter
from ..engine.rollout import Rollout, rollout_of
from ..errors import Stopped, UserError
from .faults import describe_network_failure, describe_non_finite, explain_shortage
from .optimizer import NonFiniteGradient, step_optimizer
from .state import State
from .update import Update

MOST_TOKENS = 256  # of a rehearsal on a CPU


@phase("rehearsing a step", at_stop="finishing this rehearsal")
def rehearse(state: State) -> None:
    """Take one step at learning rate 0 on a micro-batch of the longest prompts.

    Its responses have the full length of the first step's prefix, and AdamW's moments exist. If
    memory runs out, the micro-batch is halved for the whole run. Gradients and moments are dropped
    afterwards; weights, random numbers, ledger and seconds stay as they were. MemoryShortage: one
    rollout, or the moments, do not fit. Stopped: a divergence or a gradient is not finite, or the
    network's code fails.
    """
    run = state.run
    if not run.config.train.steps:
        return
    devices = [run.place.device] if run.place.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            _take_step(state)
        except Exception as error:
            if isinstance(error, UserError | Stopped) or is_out_of_memory(error):
                raise
            # a network may raise anything
            _refuse(describe_network_failure(state.pair, error), hint="use another model")
        finally:
            state.optimizer.state.clear()
            state.optimizer.zero_grad(set_to_none=True)


def _take_step(state: State) -> None:
    run = state.run
    update = Update(state, 0, prompts=[], prefix=run.method.prefix.length(0))
    update.meter = Meter(Clock(device=run.place.device))
    rollouts = run.pair.align(_make_rollouts(state, update.prefix))
    if not run.place.sum(sum(len(r.taught) for r in rollouts)):
        return  # two tokenizers may have no unit in common in this text
    losses = update.backward(update.select(rollouts))
    reason = describe_non_finite(run, losses)
    if reason is not None:
        _refuse(reason)
    try:
        with explain_shortage(run):
            step_optimizer(
                state.optimizer,
                run.pair.student.trainable,
                rate=0.0,
                grad_clip=run.config.train.grad_clip,
            )
    except NonFiniteGradient as error:  # on every rank, because gradients are all-reduced
        _refuse(str(error))


def _refuse(reason: str, hint: str = "use an intact copy of the model") -> NoReturn:
    raise Stopped(
        f"rehearsal of step 1: {reason}; nothing was trained or saved; {hint}, or --dtype float32 "
        "if it was not used"
    )


def _make_rollouts(state: State, length: int) -> list[Rollout]:
    """Return a micro-batch of the longest prompts; a response repeats its prompt's tokens.

    On a CPU it ends after MOST_TOKENS, because a full one would take as long as a step.
    """
    run = state.run
    samples = run.config.rollout.samples
    of_rank = -(-run.config.train.batch_size // run.place.world) * samples
    count = min(run.limits.micro_batch_size, of_rank)
    prompts = sorted(
        run.problems.train, key=lambda p: len(p.student_ids) + len(p.teacher_ids), reverse=True
    )
    rollouts: list[Rollout] = []
    tokens = 0
    for i in range(count):
        if run.place.device.type == "cpu" and tokens >= MOST_TOKENS:
            break
        slot, sample = divmod(i, samples)
        prompt = prompts[slot % len(prompts)]
        ids = tuple(itertools.islice(itertools.cycle(prompt.student_ids), length))
        rollout = rollout_of(slot, prompt.student_ids, ids, teacher_prompt=prompt.teacher_ids)
        tokens += len(rollout.student_prompt) + len(rollout.ids)
        rollouts.append(replace(rollout, sample=sample))
    return rollouts
