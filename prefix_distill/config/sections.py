"""All options: one frozen section per part of the program, with default, help and limits.

The sections of the method are in ``method``.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from .method import Divergence, Extrapolation, Sampling, Schedule, Train, Weights
from .options import option

SELF = "self"  # --teacher self: the student's own initial weights
TRACKERS = ("tensorboard", "wandb", "trackio")


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
        "the embedded task's, else a built-in one",
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
    plugin: str | None = option(
        None,
        "--plugin",
        "Python file, or installed entry point, that registers a divergence or a prefix schedule; "
        "several with commas, or give the flag again.",
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


SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Config)


def options(*sections: str) -> dict[str, dataclasses.Field[Any]]:
    """``section.key`` → field, for the named sections or single keys (all if none is named)."""
    return {
        f"{name}.{key.name}": key
        for name, section in SECTIONS.items()
        for key in dataclasses.fields(section)
        if not sections or name in sections or f"{name}.{key.name}" in sections
    }


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def get(config: Config, path: str) -> Any:
    """Return the value of one option: ``get(config, "train.steps")``."""
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def flag(path: str) -> str:
    """The command-line flag of ``section.key``."""
    name: str = options()[path].metadata["flag"]
    return name


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy with some keys of some sections changed: ``replace(config,
    rollout={"max_new_tokens": 64})``."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **keys)
            for name, keys in sections.items()
        },
    )
