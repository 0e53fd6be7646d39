"""Names of transformers' and TRL's command lines → our flags, so that a line written for them is
understood or refused by name.

A name stands for what it means there (transformers 5, TRL 1.16): the same setting under another
name, a conversion of its value, or one line that says what to use instead. `prefix-distill help
migration` shows the table.
"""

import fnmatch
import math
from collections.abc import Callable

from ..errors import UserError

TRUE, FALSE = (
    ("true", "yes", "1", "t", "y"),
    ("false", "no", "0", "f", "n"),
)  # as HfArgumentParser reads them
OFF = ("false", "no", "none", "null", "")  # nothing that has no counterpart here is on
RENAMED = {
    "output_dir": "--out",
    "model_name_or_path": "--student",
    "teacher_model_name_or_path": "--teacher",
    "dataset_name": "--dataset",
    "dataset_train_split": "--split",
    "dataset_test_split": "--eval-split",
    "learning_rate": "--lr",
    "max_steps": "--steps",
    "max_grad_norm": "--grad-clip",
    "max_completion_length": "--max-new-tokens",
    "max_prompt_length": "--max-prompt-tokens",
    "num_generations": "--samples",
    "eval_steps": "--eval-every",
    "save_steps": "--save-every",
    "ddp_timeout": "--rank-timeout",
    "torch_dtype": "--dtype",
    "lora_r": "--lora",
    "lora_target_modules": "--lora-targets",
}
BATCH = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}  # defaults of transformers
RESUME, LORA = "resume_from_checkpoint", "use_peft"
LISTS = ("lora_target_modules", "report_to")  # several words there, one with commas here


def _switch(name: str, text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise UserError(f"--{name} {text[:40]}: expected True or False")
    return text.lower() in TRUE


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--{name} {text[:40]}: expected a number")
    return value


def _beta(text: str) -> list[str]:
    ends = {0: "forward-kl", 1: "reverse-kl"}
    return ["--divergence", ends.get(_number("beta", text), f"jsd:{text}")]


def _lmbda(text: str) -> list[str]:
    if (own := _number("lmbda", text)) != 1:
        raise UserError(
            f"--lmbda {text}: there the other batches have the data set's answers; here the "
            f"teacher writes them: use --off-policy divergence:{1 - own:g} for that share of the "
            "rollouts"
        )
    return ["--off-policy", "none"]


def _warmup(text: str) -> list[str]:
    value = _number("warmup_steps", text)
    return ["--warmup", f"{100 * value:g}%" if 0 < value < 1 else f"{value:g}"]


def _schedule(text: str) -> list[str]:
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


def _strategy(name: str, flag: str) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        if text == "no":
            return [flag, "0"]
        if text != "steps":
            raise UserError(f"--{name} {text[:40]}: use {flag} with a number of updates")
        return []

    return convert


CONVERTED: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "beta": (
        _beta,
        "`--divergence jsd:β`, the same β and mixture; 0: `forward-kl`, 1: `reverse-kl`",
    ),
    "lmbda": (_lmbda, "1: `--off-policy none`; below 1 refused, see `--off-policy divergence:0.5`"),
    "warmup_steps": (_warmup, "`--warmup 20`; below 1 a share, as `--warmup 5%`"),
    "warmup_ratio": (
        lambda text: ["--warmup", f"{100 * _number('warmup_ratio', text):g}%"],
        "`--warmup 5%` for 0.05",
    ),
    "lr_scheduler_type": (
        _schedule,
        "`--lr-schedule linear`, `cosine` or `constant` (also for `constant_with_warmup`)",
    ),
    "bf16": (
        lambda text: ["--dtype", "bfloat16" if _switch("bf16", text) else "float32"],
        "`--dtype bfloat16`, False: `--dtype float32`",
    ),
    "use_cpu": (
        lambda text: ["--device", "cpu" if _switch("use_cpu", text) else "auto"],
        "`--device cpu`, False: `--device auto`",
    ),
    "activation_checkpointing": (
        lambda text: (
            ["--gradient-checkpointing"]
            if _switch("activation_checkpointing", text)
            else ["--set", "train.gradient_checkpointing=false"]
        ),
        "`--gradient-checkpointing`",
    ),
    "dataset_streaming": (
        lambda text: (
            ["--streaming"]
            if _switch("dataset_streaming", text)
            else ["--set", "data.streaming=false"]
        ),
        "`--streaming`",
    ),
    "load_in_4bit": (
        lambda text: ["--student-quantize", "nf4" if _switch("load_in_4bit", text) else "none"],
        "`--student-quantize nf4`",
    ),
    "load_in_8bit": (
        lambda text: ["--student-quantize", "int8" if _switch("load_in_8bit", text) else "none"],
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
SWITCHES = (
    "bf16",
    "use_cpu",
    "activation_checkpointing",
    "dataset_streaming",
    "load_in_4bit",
    "load_in_8bit",
    LORA,
)  # may stand without a value
ALREADY = {  # what is so here anyway; another value is refused with the hint of REFUSED
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
}
_HINTS = {
    "use --steps: E epochs of N prompts are E·N / --batch-size updates": "num_train_epochs",
    "use --off-policy divergence:0.5 (the run's divergence on the teacher's text) or sft "
    "(cross-entropy), with the share of rollouts": "seq_kd",
    "use --max-prompt-tokens for the prompt and --max-new-tokens for the response": "max_length "
    "truncation_mode "
    "vllm_max_model_length",
    "use --generation-rows, which holds for every call of generate": "per_device_eval_batch_size "
    "auto_find_batch_size "
    "generation_batch_size",
    "use --dtype bfloat16 or float32": "fp16 tf32 half_precision_backend *_full_eval",
    "use --plain": "disable_tqdm",
    "use --seed, which settles prompts, rollouts and evaluation alike": "data_seed "
    "full_determinism",
    "use --student-thinking, --teacher-thinking and --template": "chat_template_kwargs "
    "chat_template_path",
    "sampling has --temperature, --top-p and --top-k only": "min_p repetition_penalty "
    "generation_kwargs",
    "download that revision and give its folder": "model_revision teacher_model_revision",
    "a preset (gsm8k, math, …) knows its own; else give a local file": "dataset_config "
    "dataset_kwargs "
    "dataset_num_proc",
    "use --prompt-column": "dataset_text_field",
    "give the settings in config.json, or prepare the model folder": "model_init_kwargs "
    "teacher_model_init_kwargs "
    "attn_implementation",
    "an adapter is plain LoRA of --lora, --lora-alpha and --lora-targets, without dropout; leave "
    "it out": "lora_* use_rslora use_dora",
    "--student-quantize and --teacher-quantize have nf4 (with nested constants) and int8; leave it "
    "out": "bnb_* use_bnb_nested_quant",
    "every update is a row of metrics.jsonl and every evaluation is in scores.jsonl; leave it out": "log_* "
    "logging_* "
    "num_completions_to_print "
    "skip_memory_metrics "
    "include_num_input_tokens_seen "
    "include_for_metrics",
    "the run is named by its folder, --out": "run_name project trackio_*",
    "a run evaluates before, after and every --eval-every updates, with --eval-samples problems; "
    "leave it out": "do_eval do_predict eval_* prediction_loss_only batch_eval_metrics label_names",
    "a run keeps its newest two checkpoints, and its best student in best/; leave it out": "save_* "
    "load_best_model_at_end "
    "metric_for_best_model "
    "greater_is_better "
    "enable_jit_checkpoint "
    "overwrite_output_dir",
    "--resume goes on with the same prompts in the same order; leave it out": "ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "the optimizer is AdamW (0.9, 0.999, 1e-8), fused, in float32; leave it out": "optim optim_* "
    "adam_* "
    "lr_scheduler_kwargs",
    "dropout is off in both models, as in evaluation; leave it out": "disable_dropout "
    "neftune_noise_alpha "
    "label_smoothing_factor",
    "the loss is fused and in chunks (--head-memory-mb) anyway; leave it out": "use_liger_* "
    "liger_kernel_config "
    "loss_type "
    "router_aux_loss_coef",
    "responses are sampled by transformers' generate with a KV cache; leave it out": "use_vllm "
    "vllm_* "
    "cache_implementation "
    "use_cache "
    "use_transformers_paged",
    "each rank holds both models (DDP); leave it out": "deepspeed fsdp* ddp_* parallelism_config "
    "accelerator_config ds3_* local_rank",
    "recomputing is by layer, not re-entrant; leave it out": "gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs "
    "activation_offloading",
    "prompts are shuffled by --seed, and never packed; leave it out": "shuffle_dataset packing* "
    "eval_packing padding_free "
    "pad_to_multiple_of "
    "train_sampling_strategy "
    "group_by_length "
    "length_column_name "
    "remove_unused_columns "
    "completion_only_loss "
    "assistant_only_loss "
    "dataloader_* "
    "average_tokens_across_devices",
    "special tokens come from the model's folder; leave it out": "eos_token pad_token",
    "there is nothing here that it could change; leave it out": "do_train debug torch_compile* "
    "torch_empty_cache_steps "
    "ignore_bias_buffers "
    "max_tool_calling_iterations",
    "name the repository with --push-to-hub USER/NAME, which keeps it private without --hub-public": "push_to_hub "
    "hub_*",
}
REFUSED = {name: hint for hint, names in _HINTS.items() for name in names.split()}


def hint(name: str) -> str | None:
    """What to use instead of ``name``, where it has no counterpart; None where it is not known."""
    return REFUSED.get(name) or next(
        (
            REFUSED[pattern]
            for pattern in REFUSED
            if "*" in pattern and fnmatch.fnmatch(name, pattern)
        ),
        None,
    )


def known(name: str) -> bool:
    """Is ``name`` one of transformers' or TRL's that is understood or refused with a hint?"""
    return (
        any(name in names for names in (RENAMED, CONVERTED, BATCH, (RESUME, LORA)))
        or hint(name) is not None
    )


def translate(
    arguments: list[str], valued: set[str], switches: dict[str, str | None], world: int = 1
) -> tuple[list[str], list[str]]:
    """The arguments of one command → (the same in our flags, ["--learning_rate 1e-4 as --lr 1e-4",
    …] for what was another tool's).

    ``valued``: the command's flags that take a value; ``switches``: those that take none → their
    config key, if they have one. Our flags may be written with underscores, and our switches with
    True or False behind them. A name that neither we nor the tables know, or whose flag this
    command has not, is left for the parser to refuse. ``world``: ranks, where --gpus does not say
    it. UserError, one line for all: refused names, a value that cannot be converted, two names for
    one flag.
    """
    made, said, wrong, given, apart = [], [], [], {}, {}
    rest = list(arguments)

    def put(words: list[str], spelled: str) -> None:
        flag = words[0].partition("=")[0]
        if flag != "--set" and given.setdefault(flag, spelled) != spelled:
            raise UserError(f"{given[flag]} and {spelled} both set {flag}; give one of them")
        made.extend(words)

    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name, own = flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")
        if word == "--":
            made += [word, *rest]
            break
        if not word.startswith("--"):
            made.append(word)
        elif own in valued:
            words = [f"{own}={value}"] if equals else [own, *rest[:1]]
            del rest[: 0 if equals else 1]
            while name in LISTS and rest and not rest[0].startswith("-"):
                words[-1] += f",{rest.pop(0)}"
            put(words, own)
        elif own in switches:
            if not equals and rest and rest[0] in ("True", "False", "true", "false"):
                equals, value = "=", rest.pop(0)
            if own == "--plain":
                made.insert(0, own)
            elif not equals or _switch(name, value):
                put([own], own)
            elif switches[own] is not None and "--set" in valued:
                made += ["--set", f"{switches[own]}=false"]
        elif not known(name):
            made.append(word)
        else:
            verbatim = [word]
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                verbatim.append(value)
                while name in LISTS and rest and not rest[0].startswith("-"):
                    value += f",{rest.pop(0)}"
            elif not equals and (
                name in SWITCHES or name not in {*RENAMED, *CONVERTED, *BATCH, RESUME}
            ):
                value = "True"
            elif not equals:
                raise UserError(f"{flag}: expected a value; see prefix-distill help migration")
            spelled = f"{flag} {value}"
            target = (
                "--model"
                if name == "model_name_or_path" and "--model" in valued
                else RENAMED.get(name)
            )
            try:
                if name in (*BATCH, RESUME, LORA):
                    if "--resume" in switches:
                        apart[name] = spelled, value
                    else:
                        made += verbatim
                    continue
                if name in CONVERTED:
                    words = CONVERTED[name][0](value)
                elif target is not None and not (name == "max_steps" and value.startswith("-")):
                    words = [target, value]
                elif (
                    any(_same(value, so) for so in ALREADY[name])
                    if name in ALREADY
                    else value.lower() in OFF
                ):
                    words = []
                else:
                    raise UserError(f"{spelled}: {hint(name) or hint('num_train_epochs')}")
            except UserError as error:
                wrong.append(str(error))
                continue
            if words and words[0] not in valued | switches.keys():
                made += verbatim
                continue
            if words:
                put(words, flag)
            said.append(f"{spelled} as {' '.join(words) or 'what is so anyway'}")
    if wrong:
        raise UserError("; ".join(wrong))
    if batch := {name: apart[name] for name in BATCH if name in apart}:
        _batch(batch, put, made, said, world)
    if RESUME in apart:
        _resume(*apart[RESUME], made, said)
    if LORA in apart:
        words = (
            ["--lora", "16"]
            if _switch(LORA, apart[LORA][1]) and _value(made, "--lora") is None
            else []
        )
        made += words
        said.append(f"{apart[LORA][0]} as {' '.join(words) or 'what is so anyway'}")
    return made, said


def _same(value: str, so: str) -> bool:
    try:
        return float(value) == float(so)
    except ValueError:
        return value.lower() in {"true": TRUE, "false": FALSE}.get(so, (so,))


def _value(made: list[str], flag: str) -> str | None:
    """What ``flag`` was given, last."""
    found = [
        made[i + 1] if word == flag else word.partition("=")[2]
        for i, word in enumerate(made)
        if (word == flag and i + 1 < len(made)) or word.startswith(f"{flag}=")
    ]
    return found[-1] if found else None


def _batch(batch: dict, put, made: list[str], said: list[str], world: int) -> None:
    """Prompts per update over all ranks, and how many are read at once: there they are two
    factors of one number."""
    sizes = {}
    for name, default in BATCH.items():
        spelled, value = batch.get(name, ("", str(default)))
        if not (value.isascii() and value.isdecimal() and 0 < int(value) < 1 << 31):
            raise UserError(f"{spelled}: expected a whole number of at least 1")
        sizes[name] = int(value)
    each, turns = sizes.values()
    gpus = _value(made, "--gpus")
    ranks = int(gpus) if gpus and gpus.isdecimal() else world
    names = " ".join(spelled for spelled, _ in batch.values())
    put(["--batch-size", str(each * turns * ranks)], names)
    put(["--micro-batch-size", str(each)], names)
    said.append(
        f"{names} as --batch-size {each * turns * ranks} --micro-batch-size {each} ({ranks} "
        f"rank{'s' * (ranks > 1)}; every prompt has --samples rollouts)"
    )


def _resume(spelled: str, value: str, made: list[str], said: list[str]) -> None:
    """True: the run in --out; a folder: the run in it."""
    if value.lower() in OFF:
        said.append(f"{spelled} as what is so anyway")
        return
    out = _value(made, "--out")
    words = ["--resume"]
    if value.lower() not in TRUE:
        if out is None:
            words = ["--resume", "--out", value]
        elif value.rstrip("/\\") != out.rstrip("/\\"):
            raise UserError(
                f"{spelled}: a run goes on in its own folder, from its newest whole checkpoint; "
                "use --resume --out with that folder"
            )
    if "--resume" not in made:
        made.extend(words)
    said.append(f"{spelled} as {' '.join(words)}")
