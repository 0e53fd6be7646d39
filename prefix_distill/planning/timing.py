"""The time of a run on a card: decoding by memory bandwidth, everything else by matmul rate.

Loading, compiling and saving are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..config import Config, replace
from ..engine.memory import read_batch_sizes
from ..engine.shapes import attention_widths
from ..maths import flops
from ..maths.flops import Batch, Ledger, Shape
from ..maths.schedule import PrefixSchedule
from .case import Case, PromptLengths
from .gpus import Card

# Assumptions, until they are measured on the card.
STEP_SECONDS = 0.025  # least time of a decoding step, which launches the kernels of all layers
EFFICIENCY = 0.4  # share of the matmul rate that prefill, scoring and updates reach
BANDWIDTH_SHARE = 0.7  # share of the memory bandwidth that decoding and AdamW reach
# bytes that AdamW reads and writes per trained parameter: weight, gradient, two moments
ADAMW_BYTES = 28

ASSUMPTIONS = (
    f"The times are assumed, not measured: {EFFICIENCY:.0%} of the data sheet's matmul rate (or "
    f"--device-tflops) and {BANDWIDTH_SHARE:.0%} of its memory bandwidth.",
    f"A decoding step takes at least {1000 * STEP_SECONDS:g} ms.",
    "All answers reach their limit. Loading and saving are not counted.",
)
DECODE = "student_decode"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run computes. ``student``: its config; ``limit``: the longest answer.

    ``shapes``: those of the student and the teacher; ``prompts``: their lengths for both.
    """

    config: Config
    student: PreTrainedConfig
    shapes: Sequence[Shape]
    prompts: Sequence[PromptLengths]
    schedule: PrefixSchedule
    limit: int


def cache_bytes(config: PreTrainedConfig, itemsize: int) -> float:
    """Return the bytes of the KV cache per token, of all layers, beyond any sliding window."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = (getattr(text, "num_key_value_heads", None) or heads) / heads
    return sum(2 * width * shared * itemsize for width, _ in attention_widths(text))


def estimate_run(work: Workload, case: Case, card: Card, trained: float) -> dict[str, float] | None:
    """Return the seconds of a run by phase on ``card``; None if its speed is not known.

    ``trained``: the number of trained parameters.
    """
    rate = card.rate(str(case.dtype).removeprefix("torch."))
    if rate is None or card.bandwidth is None:
        return None
    per_second = rate * 1e12 * EFFICIENCY
    if card.sustained is not None:
        per_second = card.sustained * 1e12
    bytes_per_second = card.bandwidth * 1e9 * BANDWIDTH_SHARE
    decoder = _Decoder(
        rows=case.rows,
        weights=(work.shapes[0].trunk + work.shapes[0].head) * case.dtype.itemsize,
        cache=cache_bytes(work.student, case.dtype.itemsize),
        bytes_per_second=bytes_per_second,
        flops_per_token=2.0 * (work.shapes[0].trunk + work.shapes[0].head),
        flops_per_second=per_second,
    )
    steps = work.config.train.steps
    seconds = _update_seconds(work, case, per_second)
    seconds[DECODE] = _decode_seconds(work, decoder)
    seconds["optimizer"] = steps * ADAMW_BYTES * trained / bytes_per_second
    return seconds | _evaluation_seconds(work, decoder)


def _update_seconds(work: Workload, case: Case, per_second: float) -> dict[str, float]:
    """Return the seconds of all steps by phase at ``per_second`` FLOP/s."""
    train = {"micro_batch_size": case.micro_batch, "gradient_checkpointing": case.recomputes}
    ledger = count_flops(
        replace(work.config, train=train),
        work.shapes,
        prompts=work.prompts,
        schedule=work.schedule,
    )
    seconds = {phase: count / per_second for phase, count in ledger.useful.items()}
    if case.recomputes:
        # A second forward pass comes to the three of a training step.
        seconds["student_update"] *= 4 / 3
    return seconds


def _decode_seconds(work: Workload, decoder: "_Decoder") -> float:
    """Return the seconds in which the rollouts of all steps are decoded."""
    rollouts = work.config.train.batch_size * work.config.rollout.samples
    prompt = max(work.prompts)[0]
    total = 0.0
    for step in range(work.config.train.steps):
        total += decoder.seconds(rollouts, prompt, work.schedule.length(step))
    return total


def _evaluation_seconds(work: Workload, decoder: "_Decoder") -> dict[str, float]:
    """Return the seconds of all evaluations and of all tail probes."""
    evaluation, prompt = work.config.evaluate, max(work.prompts)[0]
    answers = evaluation.problems * evaluation.rollouts
    evaluated = decoder.seconds(answers, prompt, work.limit)
    evaluated += _score_seconds(work, evaluation.kl_prompts, decoder.flops_per_second)
    probed = decoder.seconds(evaluation.tail_prompts, prompt, work.limit)
    probed += _score_seconds(work, evaluation.tail_prompts, decoder.flops_per_second)
    return {
        "evaluation": count_evaluations(work.config) * evaluated,
        "tail_probe": count_probes(work.config) * probed,
    }


def count_evaluations(config: Config) -> int:
    """Return how many evaluations a run has: before, every --eval-every steps, after."""
    steps, every = config.train.steps, config.evaluate.every
    if not steps:
        return 1
    during = 0
    if every:
        during = (steps - 1) // every
    return 2 + during


def count_probes(config: Config) -> int:
    """Return about how many tail probes a run has; an evaluation stands for a probe."""
    every = config.evaluate.tail_every
    if not every:
        return 0
    return max(0, (config.train.steps - 1) // every + 2 - count_evaluations(config))


def _score_seconds(work: Workload, answers: int, flops_per_second: float) -> float:
    """Return the seconds in which both models read ``answers`` full answers."""
    student, teacher = max(work.prompts)
    ledger = Ledger()
    if answers:
        ledger.forward("student", work.shapes[0], [(student, [work.limit])] * answers)
        ledger.forward("teacher", work.shapes[1], [(teacher, [work.limit])] * answers)
    return ledger.total() / flops_per_second


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """How fast a model decodes, ``rows`` answers at a time."""

    rows: int
    weights: float
    cache: float
    bytes_per_second: float
    flops_per_token: float
    flops_per_second: float

    def seconds(self, answers: int, prompt: int, length: int) -> float:
        """Return the seconds of ``answers`` answers; every step reads all weights and the cache."""
        calls, rest = divmod(answers, self.rows)
        total = calls * self._call(self.rows, prompt, length)
        if rest:
            total += self._call(rest, prompt, length)
        return total

    def _call(self, rows: int, prompt: int, length: int) -> float:
        """Return the seconds of one batch of answers; the prefill gives the first token."""
        steps = max(0, length - 1)
        mean_tokens = prompt + length / 2
        read = (self.weights + rows * self.cache * mean_tokens) / self.bytes_per_second
        computed = rows * self.flops_per_token / self.flops_per_second
        return steps * max(STEP_SECONDS, read, computed)


def count_flops(
    config: Config,
    shapes: Sequence[Shape],
    prompts: Sequence[PromptLengths],
    schedule: PrefixSchedule,
) -> Ledger:
    """Return the FLOPs of all steps, whose rollouts are all as long as the prefix.

    The prompts are used in turn.
    """
    size, samples = config.train.batch_size, config.rollout.samples
    micro_batch = read_batch_sizes(config).micro_batch_size
    training = micro_batch
    if config.train.gradient_checkpointing:
        training = 1
    # how many responses follow one forward pass of their prompt: generation, scoring, training
    behind = (samples, micro_batch, training)
    student, teacher = shapes
    ledger = Ledger()
    for step in range(config.train.steps):
        batch = Batch(
            prompts=[prompts[(step * size + i) % len(prompts)] for i in range(size)],
            samples=samples,
            response=schedule.length(step),
            behind=behind,
        )
        ledger.merge(flops.update_ledger(student, teacher, batch))
    return ledger
