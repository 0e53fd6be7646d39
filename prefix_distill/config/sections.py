"""Every option once, one frozen section per part of the program: default, help and limits."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal

SELF = "self"  # --teacher self: the student's own initial weights
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
TRACKERS = ("tensorboard", "wandb", "trackio")


def option(default: object, flag: str, help: str, shown: str | None = None, **limits: float):
    """Declare a config field: its flag, its help (with the unit), its default in words, its limits.

    ``low`` and ``high`` are the smallest and the largest number; every number exceeds ``above``.
    A ``Literal`` type lists the only values of an option.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "shown": shown, **limits})


@dataclass(frozen=True)
class Models:
    student: str | None = option(
        None,
        "--student",
        "Student: hub id, folder, .gguf file or lab:TASK/student.",
        "the embedded student",
    )
    teacher: str | None = option(
        None,
        "--teacher",
        "Teacher: hub id, folder, .gguf file or lab:TASK/teacher; self: a frozen copy "
        "of the student, with --privileged-column.",
        "the embedded teacher",
    )
    teacher_ema: float | None = option(
        None,
        "--teacher-ema",
        "With --teacher self: after every update the teacher becomes "
        "α·teacher + (1−α)·student, 0 < α < 1.",
        "none: the teacher stays as it is",
        above=0,
        high=1,
    )
    cross_tokenizer: Literal["strict", "simct", "simct-released", "off"] = option(
        "strict",
        "--cross-tokenizer",
        "Where the tokenizers differ, units of text are compared: strict (units of one token on "
        "each side), simct (all), simct-released (as its authors' code), or off (refuse).",
    )
    student_quantize: Literal["none", "nf4", "int8"] = option(
        "none",
        "--student-quantize",
        "Student's frozen linear layers in 4 or 8 bits (bitsandbytes), with --lora: none, "
        "nf4 or int8.",
    )
    teacher_quantize: Literal["none", "nf4", "int8"] = option(
        "none", "--teacher-quantize", "Teacher's linear layers, likewise: none, nf4 or int8."
    )
    trust_remote_code: bool = option(
        False, "--trust-remote-code", "Run model code that comes with a hub repository."
    )


@dataclass(frozen=True)
class Adapter:
    rank: int | None = option(
        None,
        "--lora",
        "Rank of a LoRA adapter: it alone trains, the student's own weights stay as they are, in "
        "the compute dtype.",
        "none: all weights train",
        low=1,
        high=4096,
    )
    alpha: float | None = option(
        None, "--lora-alpha", "α: the adapter counts α/rank.", "twice the rank", above=0
    )
    targets: str = option(
        "all-linear",
        "--lora-targets",
        "Linear layers that get an adapter: all-linear (all but the output head), or names "
        "such as q_proj,v_proj.",
    )
    merge: bool = option(
        False,
        "--lora-merge",
        "Write model/ with the adapter added to the weights, and the adapter itself to adapter/.",
    )


@dataclass(frozen=True)
class Data:
    dataset: str | None = option(
        None,
        "--dataset",
        "Training prompts: .jsonl/.json/.csv/.parquet file, hub id, lab:TASK, a preset (gsm8k, "
        "math, …; gsm8k=FILE: a copy of its form); name#1000: so many of its rows, by --seed; "
        "several with weights: gsm8k:3,more.jsonl:1.",
        "the embedded task",
    )
    split: str | None = option(
        None, "--split", "Split of a hub or embedded data set.", "the preset's, else train"
    )
    prompt_column: str | None = option(
        None,
        "--prompt-column",
        "Column (a.b reaches into records) with the prompt.",
        "the preset's, else found by name",
    )
    answer_column: str | None = option(
        None,
        "--answer-column",
        "Column with the reference answer.",
        "the preset's, else found by name",
    )
    streaming: bool = option(
        False,
        "--streaming",
        "Read only the rows that the run needs, drawn from a buffer of 1,000 rows by --seed.",
    )
    privileged_column: str | None = option(
        None,
        "--privileged-column",
        "Column that the teacher's prompt shows and the student's "
        "does not, such as a reference solution.",
    )
    privileged_template: str | None = option(
        None,
        "--privileged-template",
        "Teacher's user turn with {problem} and {solution} in it; --instruction follows it.",
        "the embedded task's, else as in data.py",
    )
    student_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--student-thinking",
        "Thinking switch of the student's chat template: on, off, or auto "
        "(what the template does by itself).",
    )
    teacher_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--teacher-thinking",
        "Thinking switch of the teacher's chat template: on, off or auto.",
    )
    system: str | None = option(None, "--system", "System message put before every prompt.")
    instruction: str | None = option(
        None, "--instruction", "Text appended to every prompt after a blank line.", "the preset's"
    )
    prompt_template: str | None = option(
        None,
        "--prompt-template",
        "User's turn with {prompt}, and {COLUMN}s of its row, in it ({{ is a brace), "
        "such as 'Question: {prompt} Answer:'.",
    )
    few_shot: int = option(
        0,
        "--few-shot",
        "Training rows with their solutions shown before every prompt, drawn by --seed and not "
        "taught.",
        low=0,
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto", "--template", "Prompt format: chat, plain, or auto (chat where a template exists)."
    )
    max_prompt_tokens: int = option(
        1024, "--max-prompt-tokens", "Longer prompts are dropped and counted (tokens).", low=1
    )


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


@dataclass(frozen=True)
class Evaluation:
    dataset: str | None = option(
        None,
        "--eval-dataset",
        "Held-out problems: as --dataset.",
        "the test split of the embedded task or preset, else rows held out of --dataset",
    )
    split: str | None = option(
        None,
        "--eval-split",
        "Split of a hub or embedded evaluation set.",
        "the preset's, else test",
    )
    problems: int = option(
        200,
        "--eval-samples",
        "Held-out problems evaluated before, during and after (0: none).",
        low=0,
    )
    rollouts: int = option(1, "--eval-rollouts", "Answers sampled per held-out problem.", low=1)
    every: int = option(
        0, "--eval-every", "Updates between evaluations (0: only before and after).", low=0
    )
    temperature: float = option(
        1.0, "--eval-temperature", "Sampling temperature of evaluation (0 is greedy).", low=0
    )
    kl_prompts: int = option(
        32, "--kl-prompts", "Held-out prompts whose full-length rollouts measure the KL.", low=1
    )
    tail_every: int = option(
        25,
        "--tail-every",
        "Updates between tail probes, small looks beyond the prefix (0: none).",
        low=0,
    )
    tail_prompts: int = option(8, "--tail-prompts", "Held-out prompts of a tail probe.", low=1)
    check_samples: int = option(
        8,
        "--check-samples",
        "Held-out problems that student and teacher answer before the run, where that takes less "
        "than some 15 seconds (0: none).",
        low=0,
    )
    answer_format: Literal["auto", "boxed", "hash", "last-number", "choice", "exact"] = option(
        "auto",
        "--answer-format",
        "Where an answer is read: auto (as the data set says, else boxed, hash or the last "
        "number), boxed, hash (#### 42), last-number, choice (a letter) or exact.",
    )


@dataclass(frozen=True)
class Runtime:
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "--dtype",
        "Compute: auto, float32 or bfloat16 (student master weights stay float32).",
    )
    head_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "--head-dtype", "Matmuls of the output head: auto (as --dtype), float32, bfloat16."
    )
    device: str = option("auto", "--device", "Student's device: auto, cpu, cuda, cuda:1, mps.")
    teacher_device: str | None = option(
        None,
        "--teacher-device",
        "Teacher's device; auto: its layers are spread over all GPUs and, as far as "
        "they do not fit, main memory and disk.",
        "the student's",
    )
    teacher_memory: float | None = option(
        None,
        "--teacher-memory",
        "With --teacher-device auto: how much of each GPU (without one: of main "
        "memory) the teacher may fill (GiB).",
        "half of what is free",
        low=0,
    )
    gpus: int | None = option(
        None,
        "--gpus",
        "Ranks that are started on this machine, each on a GPU of its own (with --device cpu: "
        "as processes).",
        "1, or what a launcher such as torchrun starts",
        low=1,
    )
    rank_timeout: int = option(
        1800,
        "--rank-timeout",
        "How long ranks wait for each other before the run stops (seconds).",
        low=1,
    )
    check_ranks_every: int = option(
        50,
        "--check-ranks-every",
        "Updates between comparisons of all ranks' weights (0: only before checkpoints).",
        low=0,
    )
    seed: int = option(0, "--seed", "Seed of prompts, rollouts and evaluation.")
    head_memory_mb: int = option(
        256, "--head-memory-mb", "Memory budget of the loss's vocabulary-sized chunk (MiB).", low=1
    )


@dataclass(frozen=True)
class Checkpoint:
    out: str | None = option(None, "--out", "Run folder.", "runs/<time>")
    save_every: int = option(
        25, "--save-every", "Updates between checkpoints (0: only at the end).", low=0
    )


@dataclass(frozen=True)
class Trackers:
    to: str = option(
        "none",
        "--report-to",
        "Where metrics and evaluations go beside metrics.jsonl: none, tensorboard, wandb, trackio; "
        "several with commas.",
    )
    name: str | None = option(
        None,
        "--run-name",
        "The run's name there, and the title of its model card.",
        "the run folder's; the models'",
    )


@dataclass(frozen=True)
class Export:
    push: str | None = option(
        None,
        "--push-to-hub",
        "Hub repository, USER/NAME, that gets model/ after the run; private if it is made here.",
        "none",
    )
    public: bool = option(
        False, "--hub-public", "A repository that is made for --push-to-hub is public."
    )


@dataclass(frozen=True)
class Config:
    models: Models = field(default_factory=Models)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    schedule: Schedule = field(default_factory=Schedule)
    rollout: Sampling = field(default_factory=Sampling)
    divergence: Divergence = field(default_factory=Divergence)
    weights: Weights = field(default_factory=Weights)
    train: Train = field(default_factory=Train)
    extrapolation: Extrapolation = field(default_factory=Extrapolation)
    evaluate: Evaluation = field(default_factory=Evaluation)
    runtime: Runtime = field(default_factory=Runtime)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    trackers: Trackers = field(default_factory=Trackers)
    export: Export = field(default_factory=Export)


def options(*sections: str) -> dict[str, dataclasses.Field]:
    """``section.key`` → field, for the named sections or single keys (all if none is named)."""
    return {
        f"{section.name}.{key.name}": key
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(section.type)
        if not sections or section.name in sections or f"{section.name}.{key.name}" in sections
    }


def as_dict(config: Config) -> dict:
    """The resolved config as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def choices(kind: object) -> tuple[str, ...]:
    """Return the values that the type of an option lists; empty when it is no ``Literal``."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def value_type(kind: object) -> type:
    """Return int, float, str or bool: the type of an option, without None."""
    if choices(kind):
        return str
    return kind if isinstance(kind, type) else typing.get_args(kind)[0]


def get(config: Config, path: str):
    """``get(config, "train.steps")``."""
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def flag(path: str) -> str:
    """The command-line flag of ``section.key``."""
    return options()[path].metadata["flag"]


def replace(config: Config, **sections: dict) -> Config:
    """A copy with some keys of some sections changed: ``replace(config,
    rollout={"max_new_tokens": 64})``."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **keys)
            for name, keys in sections.items()
        },
    )
