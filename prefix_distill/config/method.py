"""The options of the method: rollouts, loss, token weights, training, extrapolation."""

from dataclasses import dataclass
from typing import Literal

from .options import AUTO, main_option, option


@dataclass(frozen=True, kw_only=True)
class Schedule:
    prefix: str = main_option(
        "25%",
        "--prefix",
        "Tokens of a rollout to sample and train on: 512, 25% (of --max-new-tokens), full or a "
        "schedule. Schedules: linear:L0:d (L0 + d·k at step k), staircase:L0:dH:n (dH more every n "
        "steps), auto (starts at 10% and doubles when the KL of its last tokens stops falling). "
        "Plugins add more.",
    )
    lr: float | None = main_option(
        None,
        "--lr",
        "Peak learning rate of AdamW.",
        shown="5e-05; of the built-in pair 0.0004",
        above=0,
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "linear",
        "--lr-schedule",
        "Learning rate after warm-up: constant, linear (down to 0) or cosine (down to 0).",
    )
    warmup: str = option(
        "5%", "--warmup", "Linear warm-up, in steps (20) or as a share of all steps (5%)."
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    samples: int = main_option(4, "--samples", "Rollouts per prompt.", low=1)
    temperature: float = option(
        1.0,
        "--temperature",
        "Sampling temperature of rollouts; 0 is greedy. The loss has its own, --kl-temperature.",
        low=0,
    )
    top_p: float = option(
        1.0,
        "--top-p",
        "Probability mass that nucleus sampling keeps; 1 keeps all tokens.",
        above=0,
        high=1,
    )
    top_k: int = option(
        0, "--top-k", "Number of most likely tokens that sampling keeps; 0 keeps all.", low=0
    )
    max_new_tokens: int | None = main_option(
        None,
        "--max-new-tokens",
        "Longest full response, in tokens.",
        shown="the built-in task's, else what the models' positions allow, up to 2048",
        low=1,
    )
    eos: Literal["student", "teacher", "union"] = option(
        "union",
        "--eos",
        "Whose end-of-sequence (EOS) tokens stop a rollout: student, teacher or union. With "
        "different tokenizers, union means the student's.",
    )
    begin: str | None = option(
        None,
        "--begin",
        "Text forced at the start of every rollout, such as a think tag. It is not trained on.",
    )
    off_policy: str = option(
        "none",
        "--off-policy",
        "Rollouts that the teacher samples instead of the student: none, sft (trained with "
        "cross-entropy) or divergence (trained with --divergence). Add a share, such as sft:0.5.",
    )
    rows: int | None = option(
        None,
        "--generation-rows",
        "Rollouts per call of generate, on each rank. auto: at most 64, as many as fit.",
        shown=AUTO,
        low=1,
    )


@dataclass(frozen=True, kw_only=True)
class Divergence:
    name: str = main_option(
        "reverse-kl",
        "--divergence",
        "Loss per token, in nats, between student S and teacher T: reverse-kl, forward-kl or "
        "jsd:β. Reverse KL: Σ S(log S − log T). Forward KL: Σ T(log T − log S). JSD: "
        "β·KL(T‖m) + (1 − β)·KL(S‖m), m = βT + (1 − β)S. Plugins add more (see "
        "prefix-distill help plugins).",
    )
    estimator: str = option(
        "full",
        "--estimator",
        "How the divergence is computed: full (whole vocabulary), top-k:K (the teacher's K most "
        "likely tokens and one bucket for the rest) or sampled (the sampled token only; needs "
        "reverse-kl).",
    )
    temperature: float = option(
        1.0, "--kl-temperature", "Temperature of both distributions in the loss.", above=0
    )
    clip: float | None = option(
        None,
        "--clip",
        "With forward-kl, cap the contribution of each vocabulary entry, in nats: "
        "Σ_v min(T(log T − log S), κ).",
        above=0,
    )
    reduction: Literal["token", "sequence", "sum"] = option(
        "token",
        "--reduction",
        "How token losses are combined: token (mean over all trained tokens), sequence (mean of "
        "per-rollout means) or sum (mean of per-rollout sums).",
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    window: str = option(
        "all",
        "--window",
        "Tokens of a rollout to train on: all, K in a row (first:K, middle:K, last:K, random:K), "
        "K at random positions (scattered:K), or the K highest (highest-kl:K, highest-entropy:K).",
    )
    select: str = option(
        "all",
        "--select",
        "Tokens of the window to keep, by importance (TIP): all, soft-or, overconfident, "
        "entropy-sample, entropy, divergence, random or bottom (see prefix-distill help methods).",
    )
    keep: float | None = option(
        None,
        "--keep",
        "Share of every rollout's tokens that --select keeps.",
        shown="0.5",
        above=0,
        high=1,
    )
    position: str = option(
        "uniform",
        "--position-weight",
        "Weight of a token by its position in the rollout: uniform, moderate (rises from 0.31 to "
        "1), decreasing (falls from 1 to 0.31) or sigmoid:w,τ,s.",
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = main_option(
        100, "--steps", "Steps to train; a step is one optimizer update.", low=0
    )
    epochs: float | None = option(
        None,
        "--epochs",
        "Passes over the training rows, in place of --steps: epochs × rows / --batch-size steps, "
        "rounded up.",
        above=0,
    )
    stop_when: str = option(
        "none",
        "--stop-when",
        "End the run early. 'accuracy 3': after three evaluations without a higher accuracy. "
        "collapse: if fewer answers end, more repeat themselves, or the KL beyond the prefix "
        "rises. Separate both with a comma.",
    )
    max_hours: float | None = option(
        None,
        "--max-hours",
        "Time limit in hours: training stops early enough to evaluate and save. The clock starts "
        "before the models load, and starts again on resume.",
        above=0,
    )
    batch_size: int = main_option(
        8, "--batch-size", "Prompts per step, over all ranks together.", low=1
    )
    micro_batch_size: int | None = option(
        None,
        "--micro-batch-size",
        "Rollouts per forward pass, on each rank. auto: on a CPU at most 8, on a GPU at most all "
        "of a step, as many as fit.",
        shown=AUTO,
        low=1,
    )
    gradient_checkpointing: bool = option(
        False,
        "--gradient-checkpointing",
        "Recompute each layer in the backward pass: less memory, more time.",
    )
    weight_decay: float = option(
        0.0, "--weight-decay", "Weight decay of AdamW, on matrices only.", low=0
    )
    grad_clip: float = option(
        1.0, "--grad-clip", "Largest gradient norm; 0 turns clipping off.", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    kind: Literal["none", "effopd", "always-1", "random"] = option(
        "none",
        "--extrapolate",
        "After steps 1, 2, 4, 8, …, extrapolate the weights along their displacement since the "
        "last such step. Values: none, effopd (as far as --extrapolate-score rises), always-1 and "
        "random (controls without a score).",
    )
    score: Literal["accuracy", "heldout-kl"] = option(
        "accuracy",
        "--extrapolate-score",
        "Score of a candidate: accuracy (of one full answer per problem) or heldout-kl (minus the "
        "reverse KL on new rollouts of the current prefix).",
    )
    problems: int = option(
        50,
        "--extrapolate-problems",
        "Training prompts that are scored. All candidates use the same prompts and seeds.",
        low=1,
    )
    modules: Literal["attention-mlp", "all"] = option(
        "attention-mlp",
        "--extrapolate-modules",
        "Weights to extrapolate: attention-mlp (linear layers of the trunk) or all.",
    )
    reset: bool = option(
        False, "--extrapolate-reset", "Reset AdamW's moments of the extrapolated weights."
    )
    diagnostics: bool = option(
        False,
        "--extrapolate-diagnostics",
        "Record norm, effective rank and cosine to the final displacement, for every module. Keeps "
        "copies of the weights in the run folder until the run ends.",
    )
