"""Check options and their combinations; parse options whose text has a grammar."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..maths.formulas import parse_divergence
from ..maths.schedule import OffPolicy, check_prefix, parse_off_policy, warmup_steps
from ..maths.weights import parse_position_weight, parse_selection, parse_window
from .access import flag, get, options
from .options import choices, describe_limits
from .sections import SELF, TRACKERS, Config
from .stop_when import parse_stop_when

Names = Mapping[str, str]  # option → how the user wrote it: a flag, a keyword, or its key


def check(config: Config, names: Names) -> None:
    """Raise UserError if an option or a combination of options breaks a rule.

    ``names``: how the user wrote the options, for errors; the default is the key of an option.
    """
    for path, declared in options().items():
        _check_value(names.get(path, path), get(config, path), declared)
    _check_out(config.checkpoint.out)
    _check_batch(config)
    _check_loss(config)
    _check_teacher_ema(config)
    _check_self_distillation(config)
    _check_prompt_template(config)
    _check_adapter(config)
    _check_teacher_device(config)
    _check_selection(config)
    _check_extrapolation(config)
    _check_stop_when(config)
    _check_eval_sampling(config, names)
    parse_window(config.weights.window)
    _check_template_settings(config)
    parse_trackers(config.trackers.to)
    check_repository(config.export.push, config.export.public)
    check_prefix(config.schedule.prefix, config.rollout.max_new_tokens)
    warmup_steps(config.schedule.warmup, config.train.steps)


def _check_template_settings(config: Config) -> None:
    """Raise UserError if a variable or the date of the chat templates cannot be read."""
    for setting in ("variables", "teacher_variables", "date"):
        getattr(config.data, setting)


def _check_out(out: str | None) -> None:
    """Raise UserError if the path is empty, which would mean the current folder."""
    if out is not None and not out.strip():
        raise UserError(f"--out {out!r}: expected a folder name, got empty text; name a folder")


def _check_value(name: str, value: object, declared: dataclasses.Field[Any]) -> None:
    """Raise UserError unless ``value`` is None or allowed by its option, called ``name``."""
    allowed = choices(declared.type)
    if allowed and value not in allowed:
        raise UserError(f"{name} {value}: expected one of {', '.join(allowed)}; change it")
    if not isinstance(value, (int, float)):
        return
    limits = declared.metadata
    if not math.isfinite(value):
        raise UserError(f"{name} {value}: expected a finite number; change it")
    too_low = value < limits.get("low", -math.inf) or value <= limits.get("above", -math.inf)
    too_high = value > limits.get("high", math.inf) or value >= limits.get("below", math.inf)
    if too_low or too_high:
        expected = describe_limits(limits)
        if expected.startswith("at"):
            expected = f"of {expected}"
        raise UserError(f"{name} {_shorten(value)}: expected a number {expected}; change it")


def _shorten(value: float) -> str:
    """Return a number as a user writes it: -1 rather than -1.0."""
    if isinstance(value, float) and value.is_integer():
        return f"{value:.15g}"
    return str(value)


def _is_changed(config: Config, path: str) -> bool:
    """Return whether an option differs from its default."""
    changed: bool = get(config, path) != options()[path].default
    return changed


def _check_batch(config: Config) -> None:
    """Raise UserError if a rank would get no prompt."""
    ranks, prompts = config.runtime.gpus or 1, config.train.batch_size
    if ranks > prompts:
        raise UserError(
            f"--batch-size {prompts}: expected at least {ranks} prompts, one for each rank; raise "
            "it, or lower --gpus"
        )


def _check_loss(config: Config) -> None:
    """Raise UserError if divergence, estimator, clip and off-policy loss are incompatible."""
    name, _ = parse_divergence(config.divergence.name)
    estimator, _ = parse_estimator(config.divergence.estimator)
    off_policy = parse_off_policy(config.rollout.off_policy)
    if estimator == "sampled":
        _check_sampled(config, name, off_policy)
    if off_policy == parse_off_policy("sft"):
        _check_cross_entropy(config)
    clip = config.divergence.clip
    if clip is not None and (name != "forward-kl" or estimator != "full"):
        raise UserError(
            f"--clip {clip:g} with --divergence {config.divergence.name} --estimator "
            f"{config.divergence.estimator}: it clips the forward KL over the whole vocabulary; "
            "use --divergence forward-kl --estimator full, or omit --clip"
        )


def _check_cross_entropy(config: Config) -> None:
    """Raise UserError if an option of the divergence is set, but no rollout has that loss."""
    for path in (
        "divergence.name",
        "divergence.estimator",
        "divergence.temperature",
        "divergence.clip",
    ):
        if _is_changed(config, path):
            raise UserError(
                f"{flag(path)} {get(config, path)} with --off-policy sft: all rollouts are the "
                f"teacher's, and their loss is the cross-entropy; omit {flag(path)}, or use "
                "--off-policy divergence"
            )


def _check_sampled(config: Config, name: str, off_policy: OffPolicy | None) -> None:
    """Raise UserError if ``--estimator sampled`` is incompatible with another option."""
    if name != "reverse-kl":
        raise _sampled_error(
            f"--divergence {config.divergence.name}",
            "sampled tokens estimate the reverse KL only; use --divergence reverse-kl",
        )
    if config.divergence.temperature != 1:
        raise _sampled_error(
            f"--kl-temperature {config.divergence.temperature:g}",
            "the estimate holds at temperature 1 only; use --kl-temperature 1",
        )
    if config.rollout.temperature == 0:
        raise _sampled_error(
            "--temperature 0",
            "temperature 0 is greedy, but the estimate needs sampled tokens; use --temperature 1",
        )
    if off_policy is not None and off_policy.loss == "divergence":
        raise _sampled_error(
            f"--off-policy {config.rollout.off_policy}",
            "the student must sample all tokens; use --off-policy none",
        )


def _sampled_error(option: str, reason: str) -> UserError:
    return UserError(f"--estimator sampled with {option}: {reason}, or --estimator full")


def _check_prompt_template(config: Config) -> None:
    template = config.data.prompt_template
    if template is not None and template.count("{prompt}") != 1:
        raise UserError(
            f"--prompt-template {template[:60]!r}: expected {{prompt}} in it once, got it "
            f"{template.count('{prompt}')} times; put it where the prompt belongs"
        )


def _check_adapter(config: Config) -> None:
    """Raise UserError if an option needs a LoRA adapter, or conflicts with merging it."""
    has_adapter = config.adapter.rank is not None
    for path in ("adapter.alpha", "adapter.targets", "adapter.merge"):
        if not has_adapter and _is_changed(config, path):
            raise UserError(
                f"{flag(path)}: applies only with --lora; add --lora 16, or omit {flag(path)}"
            )
    if has_adapter and not config.adapter.merge and _is_changed(config, "checkpoint.dtype"):
        raise UserError(
            f"--save-dtype {config.checkpoint.dtype} with --lora: the adapter is saved in float32; "
            "add --lora-merge to save whole weights, or omit --save-dtype"
        )
    bits = config.models.student_quantize
    if bits != "none" and not has_adapter:
        raise UserError(
            f"--student-quantize {bits}: quantized weights cannot be trained; add --lora 16 to "
            "train an adapter"
        )
    if bits != "none" and config.adapter.merge:
        raise UserError(
            f"--student-quantize {bits} with --lora-merge: no adapter can be merged into quantized "
            "weights; omit --lora-merge, and merge into the full weights later"
        )


def _check_teacher_device(config: Config) -> None:
    spread = config.runtime.teacher_device == "auto"
    memory = config.runtime.teacher_memory
    if memory is not None and not spread:
        raise UserError(
            f"--teacher-memory {memory:g}: applies only with --teacher-device auto; add it, or "
            "omit --teacher-memory"
        )
    for option, is_given in (
        ("--gpus", (config.runtime.gpus or 1) > 1),
        ("--teacher self", config.models.teacher == SELF),
        ("--teacher-quantize", config.models.teacher_quantize != "none"),
    ):
        if spread and is_given:
            raise UserError(
                f"--teacher-device auto with {option}: it spreads one teacher, with its own "
                "unquantized weights, over all GPUs; omit one of them"
            )


def _check_selection(config: Config) -> None:
    if config.weights.keep is not None and config.weights.select == "all":
        raise UserError(
            f"--keep {config.weights.keep:g}: applies only with --select; add --select soft-or, or "
            "omit --keep"
        )
    parse_selection(config.weights.select, selected(config))
    parse_position_weight(config.weights.position)


def _check_extrapolation(config: Config) -> None:
    settings, rank = config.extrapolation, config.adapter.rank
    if rank is not None and (settings.kind != "none" or settings.diagnostics):
        given = f"--extrapolate {settings.kind}"
        if settings.kind == "none":
            given = "--extrapolate-diagnostics"
        # Δ of the merged weights is s·(B A − B₀ A₀), and W + 2k·Δ = (1+2k)·s·B A − 2k·s·B₀ A₀
        raise UserError(
            f"{given} with --lora {rank}: the displacement of the merged weights is a difference "
            f"of two products of rank {rank}, of rank up to 2·{rank}, which no factors A and B of "
            f"rank {rank} hold; omit --lora, or use a higher --lr"
        )
    if settings.kind != "none":
        return
    for path in ("extrapolation.score", "extrapolation.problems", "extrapolation.reset"):
        if _is_changed(config, path):
            raise UserError(
                f"{flag(path)} {get(config, path)}: applies only with --extrapolate; add "
                f"--extrapolate effopd, or omit {flag(path)}"
            )


def _check_teacher_ema(config: Config) -> None:
    models = config.models
    if models.teacher_ema is None:
        return
    given = f"--teacher-ema {models.teacher_ema:g}"
    if models.teacher != SELF:
        raise UserError(f"{given}: applies only with --teacher self; add it, or omit --teacher-ema")
    if models.teacher_quantize != "none":
        raise UserError(
            f"{given} with --teacher-quantize {models.teacher_quantize}: the moving average needs "
            "float32 weights; omit one of them"
        )
    if config.adapter.rank is not None:
        raise UserError(
            f"{given} with --lora: the teacher is the student without its adapter, and its weights "
            "never change; omit one of them"
        )


def _check_self_distillation(config: Config) -> None:
    """Raise UserError if a teacher equals its student, or if its template is incomplete."""
    data = config.data
    has_column = data.privileged_column is not None
    same_thinking = data.teacher_thinking == data.student_thinking
    same_variables = data.teacher_template_args == data.template_args
    same_prompts = same_thinking and same_variables and not has_column
    if config.models.teacher == SELF and same_prompts:
        raise UserError(
            "--teacher self: teacher and student are the same model with the same prompt, so the "
            "loss is zero; name a column that only the teacher sees with --privileged-column, such "
            "as solution"
        )
    template = data.privileged_template
    if template is None:
        return
    if not has_column:
        raise UserError(
            "--privileged-template: applies only with --privileged-column; add it, or omit "
            "--privileged-template"
        )
    for name in ("problem", "solution"):
        if f"{{{name}}}" not in template:
            raise UserError(
                f"--privileged-template {template[:60]!r}: it has no {{{name}}}; put it where the "
                f"{name} belongs"
            )


def _check_stop_when(config: Config) -> None:
    """Raise UserError if the run would not measure what --stop-when looks at."""
    rule, settings = parse_stop_when(config.train.stop_when), config.evaluate
    given = f"--stop-when {config.train.stop_when}"
    if rule.patience is not None and not (settings.every and settings.problems):
        raise UserError(
            f"{given}: expected evaluations of the accuracy, got none; add --eval-every 10 and "
            "--problems of at least 1"
        )
    if rule.collapse and not (settings.every or settings.tail_every):
        raise UserError(
            f"{given}: expected evaluations or tail probes, got none; add --eval-every or "
            "--tail-every"
        )


def _check_eval_sampling(config: Config, names: Names) -> None:
    """Raise UserError if the model's own sampling and another one are asked for."""
    if config.evaluate.sampling != "model":
        return
    given = names.get("evaluate.sampling", flag("evaluate.sampling"))
    for path in ("evaluate.temperature", "evaluate.top_p", "evaluate.top_k"):
        if _is_changed(config, path):
            name = names.get(path, flag(path))
            raise UserError(
                f"{name} {get(config, path)} with {given} model: the model's own settings are "
                f"used; omit one of them"
            )


def selected(config: Config) -> float:
    """Return the share of tokens that --select keeps."""
    if config.weights.keep is None:
        return 0.5
    return config.weights.keep


def parse_estimator(text: str) -> tuple[str, int | None]:
    """Parse ``full``, ``sampled`` or ``top-k:64`` → name and K ("top-k", 64), else None.

    UserError: anything else.
    """
    if text in ("full", "sampled"):
        return text, None
    name, _, size = text.partition(":")
    if name == "top-k" and re.fullmatch(r"0*[1-9]\d{0,17}", size, re.ASCII):
        return name, int(size)
    raise UserError(
        f"--estimator {text}: expected full, sampled or top-k:K with K of at least 1, such as "
        "top-k:64; change it"
    )


def parse_trackers(text: str) -> tuple[str, ...]:
    """Parse ``none`` → (), or ``tensorboard,wandb`` → both names. UserError: anything else."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ("none",):
        return ()
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"--report-to {text}: expected none, or comma-separated names of "
                f"{', '.join(TRACKERS)}, got {name!r}; correct it"
            )
    return names


def check_repository(name: str | None, public: bool) -> None:
    """Raise UserError if ``name`` is no hub repository, or if ``public`` is set without a name."""
    if name is None and public:
        raise UserError(
            "--hub-public: applies only with --push-to-hub; add it, or omit --hub-public"
        )
    pattern = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*"
    if name is not None and not re.fullmatch(pattern, name, re.ASCII):
        raise UserError(
            f"--push-to-hub {name[:80]!r}: expected USER/NAME of letters, digits, '-', '_' and "
            "'.', such as me/my-student"
        )
