"""The keyword options of the functions, for type checkers and editors.

`prefix-distill run --help`, `eval --help` and `probe --help` describe them, with units and
defaults. A test compares the names with the flags.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict


class CommonOptions(TypedDict, total=False):
    """Options of every function that loads a model and prompts."""

    trust_remote_code: bool
    dataset: str | PathLike[str] | None
    split: str | None
    prompt_column: str | None
    answer_column: str | None
    streaming: bool
    system: str | None
    instruction: str | None
    prompt_template: str | None
    few_shot: int
    template: Literal["auto", "chat", "plain"]
    template_arg: str | None
    template_date: str | None
    samples: int
    max_new_tokens: int | None
    begin: str | None
    generation_rows: int | Literal["auto"] | None
    answer_format: Literal["auto", "boxed", "hash", "last-number", "choice", "exact"]
    grader: str | None
    grader_timeout: float
    dtype: Literal["auto", "float32", "bfloat16"]
    device: str
    gpus: int | None
    seed: int


class PushOptions(TypedDict, total=False):
    """Options of every function that uploads a model."""

    push_to_hub: str | None
    hub_public: bool


class ProbeOptions(CommonOptions, total=False):
    """Options of `probe`, which `run`, `check` and `plan` take as well."""

    student: str | PathLike[str] | None
    teacher: str | PathLike[str] | None
    cross_tokenizer: Literal["strict", "simct", "simct-released", "off"]
    teacher_quantize: Literal["none", "nf4", "int8"]
    privileged_column: str | None
    privileged_template: str | None
    student_thinking: Literal["auto", "on", "off"]
    teacher_thinking: Literal["auto", "on", "off"]
    teacher_template_arg: str | None
    max_prompt_tokens: int
    eos: Literal["student", "teacher", "union"]
    head_dtype: Literal["auto", "float32", "bfloat16"]
    teacher_device: str | None
    teacher_memory: float | None
    rank_timeout: int
    head_memory_mb: int


class RunOptions(ProbeOptions, PushOptions, total=False):
    """Options of `run`, `check` and `plan`."""

    teacher_ema: float | None
    student_quantize: Literal["none", "nf4", "int8"]
    lora: int | None
    lora_alpha: float | None
    lora_targets: str
    lora_merge: bool
    prefix: str | int
    lr: float | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup: str | int
    temperature: float
    top_p: float
    top_k: int
    off_policy: str
    divergence: str
    estimator: str
    kl_temperature: float
    clip: float | None
    reduction: Literal["token", "sequence", "sum"]
    window: str
    select: str
    keep: float | None
    position_weight: str
    steps: int
    epochs: float | None
    stop_when: str
    max_hours: float | None
    batch_size: int
    micro_batch_size: int | Literal["auto"] | None
    gradient_checkpointing: bool
    weight_decay: float
    grad_clip: float
    extrapolate: Literal["none", "effopd", "always-1", "random"]
    extrapolate_score: Literal["accuracy", "heldout-kl"]
    extrapolate_problems: int
    extrapolate_modules: Literal["attention-mlp", "all"]
    extrapolate_reset: bool
    extrapolate_diagnostics: bool
    eval_dataset: str | PathLike[str] | None
    eval_split: str | None
    problems: int
    eval_rollouts: int
    eval_every: int
    eval_temperature: float
    eval_teacher: Literal["auto", "off"]
    eval_top_p: float
    eval_top_k: int
    eval_sampling: Literal["options", "model"]
    kl_prompts: int
    tail_every: int
    tail_prompts: int
    check_samples: int
    check_ranks_every: int
    plugin: str | PathLike[str] | None
    out: str | PathLike[str] | None
    save_every: int
    keep_checkpoints: int
    save_dtype: Literal["auto", "float32", "bfloat16"]
    save_minutes: float
    allow_changed: bool
    report_to: str
    run_name: str | None
    print_rollouts: int


class EvalOptions(CommonOptions, total=False):
    """Options of `evaluate`."""

    model: str | PathLike[str] | None
    thinking: Literal["auto", "on", "off"]
    top_p: float
    top_k: int
    sampling: Literal["options", "model"]
    problems: int
    temperature: float


class PlanOptions(RunOptions, total=False):
    """Options of `plan`.

    ``prompt_tokens``: length of every prompt, in place of a dataset; ``prefixes``: prefixes besides
    the run's own; ``card``: cards to fit, such as "4090,t4,24"; ``device_tflops``: the speed of the
    device, 10^12 FLOP/s; ``measure``: time a matrix product on this machine; ``from_run``: a run
    folder whose measured rates are used.
    """

    prompt_tokens: int | None
    prefixes: str | Sequence[str | int] | None
    card: str | None
    device_tflops: float | None
    measure: bool
    from_run: str | PathLike[str] | None


class ExportOptions(PushOptions, total=False):
    """Options of `export`.

    ``which``: of a run folder: model, best or the step of a checkpoint; ``dtype``: "auto" keeps the
    stored one; ``gguf``: also write a GGUF file of this type.
    """

    which: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None
    trust_remote_code: bool
