"""Tables that map option names of transformers and TRL to ours."""

import math
from collections.abc import Callable

from ..errors import UserError
from .renamed import FORMER as FORMER
from .renamed import OF_EVAL as OF_EVAL
from .renamed import RENAMED as RENAMED

# what HfArgumentParser takes for true and false
# options of the program, which may also follow a command
PROGRAM_SWITCHES = ("--plain", "--verbose", "-v", "--json")
TRUE = ("true", "yes", "1", "t", "y")
FALSE = ("false", "no", "0", "f", "n")
OFF = ("false", "no", "none", "null", "")  # of an option whose feature does not exist here
BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # with their defaults
RESUME = "resume_from_checkpoint"
LORA = "use_peft"
EPOCHS = "num_train_epochs"
PUSH, REPOSITORY, PRIVATE = "push_to_hub", "hub_model_id", "hub_private_repo"
# options whose translation depends on the whole line → the flag that the command needs for it
DEPENDENT = {
    **dict.fromkeys(BATCH, "--batch-size"),
    RESUME: "--resume",
    LORA: "--lora",
    EPOCHS: "--epochs",
    **dict.fromkeys((PUSH, REPOSITORY, PRIVATE), "--push-to-hub"),
}
LISTS = ("lora_target_modules", "report_to")  # several words there, one with commas here

Convert = Callable[[str], list[str]]  # a value → the words of our command line


def read_switch(name: str, text: str) -> bool:
    """Return the value of a switch; raise UserError if it is neither true nor false."""
    if text.lower() not in (*TRUE, *FALSE):
        raise UserError(f"--{name} {text[:40]}: expected True or False")
    return text.lower() in TRUE


def _read_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--{name} {text[:40]}: expected a number")
    return value


def _convert_beta(text: str) -> list[str]:
    limits = {0.0: "forward-kl", 1.0: "reverse-kl"}
    return ["--divergence", limits.get(_read_number("beta", text), f"jsd:{text}")]


def _convert_lmbda(text: str) -> list[str]:
    on_policy = _read_number("lmbda", text)
    if on_policy != 1:
        raise UserError(
            f"--lmbda {text}: TRL trains the remaining batches on the dataset's answers, which is "
            f"not possible here; use --off-policy divergence:{1 - on_policy:g}, with which the "
            "teacher samples that share of the rollouts"
        )
    return ["--off-policy", "none"]


def _convert_warmup_steps(text: str) -> list[str]:
    value = _read_number("warmup_steps", text)
    if 0 < value < 1:
        return ["--warmup", f"{100 * value:g}%"]
    return ["--warmup", f"{value:g}"]


def _convert_warmup_ratio(text: str) -> list[str]:
    return ["--warmup", f"{100 * _read_number('warmup_ratio', text):g}%"]


def _convert_schedule(text: str) -> list[str]:
    kinds = {
        "linear": "linear",
        "cosine": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
    }
    if text not in kinds:
        raise UserError(
            f"--lr_scheduler_type {text[:40]}: expected {', '.join(kinds)}; use --lr-schedule with "
            "one of its values"
        )
    return ["--lr-schedule", kinds[text]]


def _strategy(name: str, flag: str) -> Convert:
    """Return the conversion of a strategy: ``no`` becomes 0 steps."""

    def convert(text: str) -> list[str]:
        if text == "no":
            return [flag, "0"]
        if text != "steps":
            raise UserError(f"--{name} {text[:40]}: use {flag} with a number of steps")
        return []

    return convert


def _switch(name: str, *, on: str, off: str) -> Convert:
    """Return the conversion of a switch: the words of ``on`` or of ``off``."""

    def convert(text: str) -> list[str]:
        if read_switch(name, text):
            return on.split()
        return off.split()

    return convert


# their name → conversion of its value, and the row of `prefix-distill help migration`
CONVERTED: dict[str, tuple[Convert, str]] = {
    "beta": (
        _convert_beta,
        "`--divergence jsd:β`, the same β and mixture; 0: `forward-kl`, 1: `reverse-kl`",
    ),
    "lmbda": (
        _convert_lmbda,
        "1: `--off-policy none`; below 1 refused, see `--off-policy divergence:0.5`",
    ),
    "warmup_steps": (_convert_warmup_steps, "`--warmup 20`; below 1 a share, as `--warmup 5%`"),
    "warmup_ratio": (_convert_warmup_ratio, "`--warmup 5%` for 0.05"),
    "lr_scheduler_type": (
        _convert_schedule,
        "`--lr-schedule linear`, `cosine` or `constant` (also for `constant_with_warmup`)",
    ),
    "bf16": (
        _switch("bf16", on="--dtype bfloat16", off="--dtype float32"),
        "`--dtype bfloat16`, False: `--dtype float32`",
    ),
    "use_cpu": (
        _switch("use_cpu", on="--device cpu", off="--device auto"),
        "`--device cpu`, False: `--device auto`",
    ),
    "activation_checkpointing": (
        _switch(
            "activation_checkpointing",
            on="--gradient-checkpointing",
            off="--set train.gradient_checkpointing=false",
        ),
        "`--gradient-checkpointing`",
    ),
    "dataset_streaming": (
        _switch("dataset_streaming", on="--streaming", off="--set data.streaming=false"),
        "`--streaming`",
    ),
    "load_in_4bit": (
        _switch("load_in_4bit", on="--student-quantize nf4", off="--student-quantize none"),
        "`--student-quantize nf4`",
    ),
    "load_in_8bit": (
        _switch("load_in_8bit", on="--student-quantize int8", off="--student-quantize none"),
        "`--student-quantize int8`",
    ),
    "eval_strategy": (
        _strategy("eval_strategy", "--eval-every"),
        "no: `--eval-every 0`; steps: see `eval_steps`",
    ),
    "save_strategy": (
        _strategy("save_strategy", "--save-every"),
        "no: `--save-every 0`; steps: see `save_steps`",
    ),
}
SWITCHES = (  # may stand without a value
    "bf16",
    "use_cpu",
    "activation_checkpointing",
    "dataset_streaming",
    "load_in_4bit",
    "load_in_8bit",
    LORA,
    PUSH,
    PRIVATE,
)
# values that are the only ones here; another value is refused with the hint of REFUSED
ALREADY = {
    "do_train": ("true",),
    "shuffle_dataset": ("true",),
    "disable_dropout": ("true",),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "adam_beta1": ("0.9",),
    "adam_beta2": ("0.999",),
    "adam_epsilon": ("1e-8",),
    "logging_strategy": ("steps",),
    "logging_steps": ("1",),
    "logging_first_step": ("true",),
    "eval_on_start": ("true",),
    "save_total_limit": ("2",),
    "repetition_penalty": ("1",),
    "model_revision": ("main",),
    "teacher_model_revision": ("main",),
    "train_sampling_strategy": ("random",),
    "average_tokens_across_devices": ("true",),
    "remove_unused_columns": ("true", "false"),
    "local_rank": ("-1",),
    "do_eval": ("true",),
    "ds3_gather_for_generation": ("true", "false"),
    "logging_nan_inf_filter": ("false",),
    "lora_dropout": ("0",),
    "lora_task_type": ("causal_lm",),
    "bnb_4bit_quant_type": ("nf4",),
    "use_bnb_nested_quant": ("true",),
    "label_smoothing_factor": ("0",),
    "min_p": ("0", "none"),
    "eval_delay": ("0",),
    "hub_strategy": ("end",),
    "hub_always_push": ("false",),
}
# what to use instead of names that have no counterpart
HINTS = {
    "use --off-policy divergence:0.5 (the run's divergence) or sft:0.5 (cross-entropy), with the "
    "share of rollouts that the teacher samples": "seq_kd",
    "use --max-prompt-tokens for the prompt and --max-new-tokens for the response": (
        "max_length truncation_mode vllm_max_model_length"
    ),
    "use --generation-rows, the rollouts per call of generate": (
        "per_device_eval_batch_size auto_find_batch_size generation_batch_size"
    ),
    "use --dtype bfloat16 or float32": "fp16 tf32 half_precision_backend *_full_eval",
    "use --plain": "disable_tqdm",
    "use --seed, which seeds prompts, rollouts and evaluation": ("data_seed full_determinism"),
    "use --template-arg, --teacher-template-arg and --template": (
        "chat_template_kwargs chat_template_path"
    ),
    "sampling has --temperature, --top-p and --top-k only": (
        "min_p repetition_penalty generation_kwargs"
    ),
    "download that revision and give its folder": "model_revision teacher_model_revision",
    "a preset (gsm8k, math, …) includes these settings; for other datasets give a local file": (
        "dataset_config dataset_kwargs dataset_num_proc"
    ),
    "use --prompt-column": "dataset_text_field",
    "change these settings in the config.json of a model folder": (
        "model_init_kwargs teacher_model_init_kwargs attn_implementation"
    ),
    "an adapter is plain LoRA without dropout, with --lora, --lora-alpha and --lora-targets; omit "
    "it": "lora_* use_rslora use_dora",
    "--student-quantize and --teacher-quantize take nf4 (with nested constants) or int8; omit "
    "it": "bnb_* use_bnb_nested_quant",
    "metrics.jsonl has a row for every step, and scores.jsonl one for every evaluation; omit it": (
        "log_* logging_* num_completions_to_print skip_memory_metrics "
        "include_num_input_tokens_seen include_for_metrics"
    ),
    "name the run with --run-name, or by its folder, --out": "run_name project trackio_*",
    "a run evaluates before, after and every --eval-every steps, on --problems held-out problems; "
    "omit it": ("do_eval do_predict eval_* prediction_loss_only batch_eval_metrics label_names"),
    "a run keeps its newest checkpoints, and its best student in best/; omit it": (
        "save_* load_best_model_at_end metric_for_best_model greater_is_better "
        "enable_jit_checkpoint overwrite_output_dir"
    ),
    "--resume continues with the same prompts in the same order; omit it": (
        "ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "the optimizer is AdamW (0.9, 0.999, 1e-8), fused, in float32; omit it": (
        "optim optim_* adam_* lr_scheduler_kwargs"
    ),
    "dropout is off in both models; omit it": (
        "disable_dropout neftune_noise_alpha label_smoothing_factor"
    ),
    "the loss is always fused and computed in chunks (--head-memory-mb); omit it": (
        "use_liger_* liger_kernel_config loss_type router_aux_loss_coef"
    ),
    "transformers' generate with a KV cache samples the rollouts; omit it": (
        "use_vllm vllm_* cache_implementation use_cache use_transformers_paged"
    ),
    "each rank holds both models (DDP); omit it": (
        "deepspeed fsdp* ddp_* parallelism_config accelerator_config ds3_* local_rank"
    ),
    "gradient checkpointing is per layer and not re-entrant; omit it": (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs activation_offloading"
    ),
    "prompts are shuffled by --seed and never packed; omit it": (
        "shuffle_dataset packing* eval_packing padding_free pad_to_multiple_of "
        "train_sampling_strategy group_by_length length_column_name remove_unused_columns "
        "completion_only_loss assistant_only_loss dataloader_* average_tokens_across_devices"
    ),
    "special tokens come from the model's folder; omit it": "eos_token pad_token",
    "it has no effect here; omit it": (
        "do_train debug torch_compile* torch_empty_cache_steps ignore_bias_buffers "
        "max_tool_calling_iterations"
    ),
    "use --push-to-hub USER/NAME; a new repository is private, unless --hub-public is given": (
        "hub_*"
    ),
}
# their name, or a pattern of names → what to use instead
REFUSED = {name: hint for hint, names in HINTS.items() for name in names.split()}
