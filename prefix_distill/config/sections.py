"""All options: one frozen section per part of the program, with default, help and limits.

The sections of the method are in ``method``, and those of what a run writes in ``saving``.
``access`` reads and changes a config by path.
"""

from dataclasses import dataclass, field
from typing import Literal

from .evaluation import Evaluation
from .method import Divergence, Extrapolation, Sampling, Schedule, Train, Weights
from .options import main_option, option
from .saving import Checkpoint, Export, Trackers
from .template_args import TemplateSettings

SELF = "self"  # --teacher self: the student's own initial weights
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class Models:
    student: str | None = main_option(
        None,
        "--student",
        "Student model: hub id, folder, .gguf file or lab:TASK/student.",
        shown="built in, if neither a model nor a dataset is named",
    )
    teacher: str | None = main_option(
        None,
        "--teacher",
        "Teacher model: hub id, folder, .gguf file or lab:TASK/teacher. self means the student's "
        "initial weights; it needs --privileged-column, or thinking switches that differ.",
        shown="built in, if neither a model nor a dataset is named",
    )
    teacher_ema: float | None = option(
        None,
        "--teacher-ema",
        "With --teacher self, make the teacher a moving average of the student: after every step, "
        "teacher = α·teacher + (1 − α)·student. The value is α.",
        shown="none (the teacher does not change)",
        above=0,
        below=1,
    )
    cross_tokenizer: Literal["strict", "simct", "simct-released", "off"] = option(
        "strict",
        "--cross-tokenizer",
        "How models with different tokenizers are compared: strict (units of text that are one "
        "token in both), simct (all units of text), simct-released (as SimCT's released code) or "
        "off (rejected).",
    )
    student_quantize: Literal["none", "nf4", "int8"] = option(
        "none",
        "--student-quantize",
        "With --lora, quantize the student's frozen linear layers: none, nf4 (4 bits) or int8 "
        "(8 bits). Needs bitsandbytes.",
    )
    teacher_quantize: Literal["none", "nf4", "int8"] = option(
        "none",
        "--teacher-quantize",
        "Quantize the teacher's linear layers: none, nf4 (4 bits) or int8 (8 bits). Needs "
        "bitsandbytes.",
    )
    trust_remote_code: bool = option(
        False, "--trust-remote-code", "Run model code from a hub repository or model folder."
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    rank: int | None = option(
        None,
        "--lora",
        "Rank of a LoRA adapter. Only the adapter is trained; the student's weights are frozen in "
        "the compute dtype.",
        shown="none (all weights are trained)",
        low=1,
        high=4096,
    )
    alpha: float | None = option(
        None,
        "--lora-alpha",
        "LoRA alpha; the adapter is scaled by alpha/rank.",
        shown="twice the rank",
        above=0,
    )
    targets: str = option(
        "all-linear",
        "--lora-targets",
        "Matrices that get an adapter: all-linear (linear layers, experts and routers, without the "
        "output head), or comma-separated names, such as q_proj,v_proj or experts.",
    )
    merge: bool = option(
        False,
        "--lora-merge",
        "Merge the adapter into the weights of model/, and write the adapter itself to adapter/.",
    )


@dataclass(frozen=True, kw_only=True)
class Data(TemplateSettings):
    dataset: str | None = main_option(
        None,
        "--dataset",
        "Training prompts: .jsonl, .json, .csv or .parquet file, hub id, lab:TASK or preset "
        "(gsm8k, math, …). Use gsm8k=FILE for a local copy, name#1000 for 1,000 rows chosen by "
        "--seed, and a:3,b:1 to mix two sets 3 to 1.",
        shown="built in, if neither a model nor a dataset is named",
    )
    split: str | None = option(
        None, "--split", "Split of a hub or built-in dataset.", shown="the preset's, else train"
    )
    prompt_column: str | None = option(
        None,
        "--prompt-column",
        "Column with the prompt; a.b is the field b of a record a.",
        shown="the preset's, else found by name",
    )
    answer_column: str | None = option(
        None,
        "--answer-column",
        "Column with the reference answer.",
        shown="the preset's, else found by name",
    )
    streaming: bool = option(
        False,
        "--streaming",
        "Read only the rows that the run needs, shuffled by --seed in a buffer of 1,000 rows.",
    )
    privileged_column: str | None = option(
        None,
        "--privileged-column",
        "Column that only the teacher's prompt contains, such as a reference solution.",
    )
    privileged_template: str | None = option(
        None,
        "--privileged-template",
        "Template of the teacher's user turn. It must contain {problem} and {solution}; "
        "--instruction is appended.",
        shown="the built-in task's, else a general one",
    )
    student_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--student-thinking",
        "Thinking switch of the student's chat template: on, off or auto (the template's default).",
    )
    teacher_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--teacher-thinking",
        "Thinking switch of the teacher's chat template: on, off or auto (the template's default).",
    )
    system: str | None = option(
        None, "--system", "System message of every prompt, also in place of a row's own."
    )
    instruction: str | None = option(
        None,
        "--instruction",
        "Text appended to every prompt after a blank line.",
        shown="the preset's",
    )
    prompt_template: str | None = option(
        None,
        "--prompt-template",
        "Template of the user turn. It must contain {prompt} and may contain any {COLUMN}, such as "
        "'Question: {prompt} Answer:'. Write {{ for a literal brace.",
    )
    few_shot: int = option(
        0,
        "--few-shot",
        "Number of solved training rows shown before every prompt. They are chosen by --seed and "
        "not trained on.",
        low=0,
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto",
        "--template",
        "Prompt format: chat, plain or auto (chat if the tokenizer has a chat template).",
    )
    template_args: str | None = option(
        None,
        "--template-arg",
        "Variable of the student's chat template, such as reasoning_effort=low; may be repeated. "
        "check lists the variables.",
    )
    teacher_template_args: str | None = option(
        None,
        "--teacher-template-arg",
        "Variable of the teacher's chat template, as for --template-arg; may be repeated.",
    )
    template_date: str | None = option(
        None,
        "--template-date",
        "Date that chat templates write, such as 2026-05-31. A resumed run keeps it.",
        shown="the day on which the run starts",
    )
    max_prompt_tokens: int = option(
        1024,
        "--max-prompt-tokens",
        "Longest prompt, in tokens. Longer prompts are dropped and counted.",
        low=1,
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "--dtype",
        "Compute dtype: auto, float32 or bfloat16. Trained weights stay in float32.",
    )
    head_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "--head-dtype",
        "Dtype of the output head's matmuls: auto (as --dtype), float32 or bfloat16.",
    )
    device: str = option(
        "auto", "--device", "Device of the student: auto, cpu, cuda, cuda:1 or mps."
    )
    teacher_device: str | None = option(
        None,
        "--teacher-device",
        "Device of the teacher. auto spreads its layers over all GPUs, then over main memory and "
        "disk.",
        shown="the student's",
    )
    teacher_memory: float | None = option(
        None,
        "--teacher-memory",
        "With --teacher-device auto, the memory of each GPU that the teacher may use, in GiB. "
        "Without a GPU it limits main memory.",
        shown="half of the free memory",
        low=0,
    )
    gpus: int | None = main_option(
        None,
        "--gpus",
        "Ranks to start on this machine, one GPU each; with --device cpu, one process each.",
        shown="1, or the ranks of a launcher such as torchrun",
        low=1,
    )
    rank_timeout: int = option(
        1800,
        "--rank-timeout",
        "Seconds that ranks wait for each other before the run stops.",
        low=1,
    )
    check_ranks_every: int = option(
        50,
        "--check-ranks-every",
        "Steps between comparisons of all ranks' weights; 0 compares only before checkpoints.",
        low=0,
    )
    plugin: str | None = option(
        None,
        "--plugin",
        "Python file, or installed entry point, that registers a divergence or a prefix schedule. "
        "For several, repeat the flag or give comma-separated names.",
    )
    seed: int = option(0, "--seed", "Seed of prompts, rollouts and evaluation.")
    head_memory_mb: int = option(
        256, "--head-memory-mb", "Memory for one chunk of logits in the loss, in MiB.", low=1
    )


SAVING = "Checkpoints, trackers and hub"  # a topic of three sections


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections; ``topic`` titles the options of a section in ``--help``."""

    models: Models = field(default_factory=Models, metadata={"topic": "Models"})
    adapter: Adapter = field(default_factory=Adapter, metadata={"topic": "LoRA adapter"})
    data: Data = field(default_factory=Data, metadata={"topic": "Data and prompts"})
    schedule: Schedule = field(default_factory=Schedule, metadata={"topic": "Training"})
    rollout: Sampling = field(default_factory=Sampling, metadata={"topic": "Rollouts"})
    divergence: Divergence = field(default_factory=Divergence, metadata={"topic": "Loss"})
    weights: Weights = field(
        default_factory=Weights, metadata={"topic": "Token selection and weights"}
    )
    train: Train = field(default_factory=Train, metadata={"topic": "Training"})
    extrapolation: Extrapolation = field(
        default_factory=Extrapolation, metadata={"topic": "Extrapolation"}
    )
    evaluate: Evaluation = field(default_factory=Evaluation, metadata={"topic": "Evaluation"})
    runtime: Runtime = field(
        default_factory=Runtime, metadata={"topic": "Devices, precision and seed"}
    )
    checkpoint: Checkpoint = field(default_factory=Checkpoint, metadata={"topic": SAVING})
    trackers: Trackers = field(default_factory=Trackers, metadata={"topic": SAVING})
    export: Export = field(default_factory=Export, metadata={"topic": SAVING})
