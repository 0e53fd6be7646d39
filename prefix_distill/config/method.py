"""The options of the method: rollouts, loss, token weights, updates, extrapolation."""

from dataclasses import dataclass
from typing import Literal

from .options import option


@dataclass(frozen=True)
class Schedule:
    prefix: str = option(
        "25%",
        "--prefix",
        "Response tokens sampled and taught: 512, 25% (of --max-new-tokens), full, linear:L0:d (L0 "
        "+ d·k at update k), staircase:L0:dH:every, auto (grows when its newest tokens have no "
        "more to teach).",
    )
    lr: float = option(5e-5, "--lr", "Peak learning rate of AdamW.", above=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "linear", "--lr-schedule", "After warm-up: constant, linear or cosine, ending at 0."
    )
    warmup: str = option("5%", "--warmup", "Linear warm-up: updates (20) or a share of them (5%).")


@dataclass(frozen=True)
class Sampling:
    samples: int = option(4, "--samples", "Rollouts per prompt.", low=1)
    temperature: float = option(
        1.0, "--temperature", "Sampling temperature (0 is greedy); not the loss's.", low=0
    )
    top_p: float = option(
        1.0, "--top-p", "Nucleus mass kept when sampling (1 keeps all).", above=0, high=1
    )
    top_k: int = option(0, "--top-k", "Most likely tokens kept when sampling (0 keeps all).", low=0)
    max_new_tokens: int | None = option(
        None,
        "--max-new-tokens",
        "Longest full response (tokens).",
        "the embedded task's, else what the models' positions allow, at most 2048",
        low=1,
    )
    eos: Literal["student", "teacher", "union"] = option(
        "union",
        "--eos",
        "Whose end-of-sequence ids stop a rollout: student, teacher or union (of "
        "different tokenizers: the student's).",
    )
    begin: str | None = option(
        None, "--begin", "Text forced at the start of every response, not taught (a think tag)."
    )
    off_policy: str = option(
        "none",
        "--off-policy",
        "Rollouts the teacher writes in the student's place: none, sft (cross-entropy on them) or "
        "divergence (--divergence on them); :0.5 for that share of them.",
    )
    rows: int = option(64, "--generation-rows", "Rollouts per generate call, per rank.", low=1)


@dataclass(frozen=True)
class Divergence:
    name: str = option(
        "reverse-kl",
        "--divergence",
        "reverse-kl Σ S(log S − log T), forward-kl Σ T(log T − log S), "
        "jsd:β = β·KL(T‖m) + (1−β)·KL(S‖m), m = βT + (1−β)S; nats per token.",
    )
    estimator: str = option(
        "full",
        "--estimator",
        "full: the whole vocabulary; top-k:K: the teacher's K most likely tokens "
        "and one bucket with the rest of the mass; sampled: the sampled token alone (reverse-kl).",
    )
    temperature: float = option(
        1.0, "--kl-temperature", "Temperature of both distributions in the loss.", above=0
    )
    clip: float | None = option(
        None,
        "--clip",
        "κ: with forward-kl, Σ_v min(T(log T − log S), κ): the most that one vocabulary "
        "entry may add (nats).",
        above=0,
    )
    reduction: Literal["token", "sequence", "sum"] = option(
        "token",
        "--reduction",
        "token: mean over taught tokens; sequence: mean over rollouts of "
        "their token means; sum: sum over tokens, mean over rollouts.",
    )


@dataclass(frozen=True)
class Weights:
    window: str = option(
        "all",
        "--window",
        "Tokens of a rollout that are taught: all, or K of them: first:K, middle:K, last:K, "
        "random:K (in a row), scattered:K, highest-kl:K, highest-entropy:K.",
    )
    select: str = option(
        "all",
        "--select",
        "Tokens of those that are taught, by importance (TIP): all, soft-or, overconfident, "
        "entropy-sample, entropy, divergence, random or bottom.",
    )
    keep: float | None = option(
        None,
        "--keep",
        "Share of every rollout's tokens that --select keeps.",
        "0.5",
        above=0,
        high=1,
    )
    position: str = option(
        "uniform",
        "--position-weight",
        "Weight of a token by its place in the rollout: uniform, moderate (rises "
        "from 0.31 to 1), decreasing (its mirror image) or sigmoid:w,τ,s.",
    )


@dataclass(frozen=True)
class Train:
    steps: int = option(100, "--steps", "Updates.", low=0)
    batch_size: int = option(8, "--batch-size", "Prompts per update, over all ranks.", low=1)
    micro_batch_size: int = option(
        8, "--micro-batch-size", "Rollouts per forward pass, per rank.", low=1
    )
    gradient_checkpointing: bool = option(
        False,
        "--gradient-checkpointing",
        "Keep only each layer's input in training and run "
        "the layer again in backward: less memory, more time.",
    )
    weight_decay: float = option(
        0.0, "--weight-decay", "AdamW weight decay, on matrices only.", low=0
    )
    grad_clip: float = option(
        1.0, "--grad-clip", "Largest gradient norm (0 turns clipping off).", low=0
    )


@dataclass(frozen=True)
class Extrapolation:
    kind: Literal["none", "effopd", "always-1", "random"] = option(
        "none",
        "--extrapolate",
        "After updates 1, 2, 4, 8, …, try points further along the way since the last such update: "
        "none, effopd (go on while --extrapolate-score rises), always-1 or random (controls).",
    )
    score: Literal["accuracy", "heldout-kl"] = option(
        "accuracy",
        "--extrapolate-score",
        "accuracy (of one full answer a problem), or heldout-kl (minus the reverse KL "
        "on fresh rollouts of the current prefix).",
    )
    problems: int = option(
        50,
        "--extrapolate-problems",
        "Fixed training prompts that are scored, with the same seeds for every candidate.",
        low=1,
    )
    modules: Literal["attention-mlp", "all"] = option(
        "attention-mlp",
        "--extrapolate-modules",
        "What moves: attention-mlp (linear layers of the trunk) or all.",
    )
    reset: bool = option(False, "--extrapolate-reset", "Forget AdamW's moments of what moved.")
    diagnostics: bool = option(
        False,
        "--extrapolate-diagnostics",
        "Norm, effective rank and cosine with the final one of every displacement, module by "
        "module (keeps copies of the weights in the run folder until the end).",
    )
