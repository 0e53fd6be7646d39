"""Check options and their combinations; parse options whose text has a grammar."""

import dataclasses
import math
import re
from typing import Any

from ..errors import UserError
from ..maths.formulas import parse_divergence
from ..maths.schedule import OffPolicy, check_prefix, parse_off_policy, warmup_steps
from ..maths.weights import parse_position_weight, parse_selection, parse_window
from .options import choices
from .sections import SELF, TRACKERS, Config, flag, get, options


def _check_value(path: str, value: object, declared: dataclasses.Field[Any]) -> None:
    """Raise UserError unless ``value`` is None or allowed by its option."""
    allowed = choices(declared.type)
    if allowed and value not in allowed:
        raise UserError(f"{path} '{value}': {flag(path)} must be one of {', '.join(allowed)}")
    if not isinstance(value, (int, float)):
        return
    limits = declared.metadata
    too_low = value < limits.get("low", -math.inf) or value <= limits.get("above", -math.inf)
    too_high = value > limits.get("high", math.inf)
    if too_low or too_high or not math.isfinite(value):
        words = {"low": "at least", "above": "above", "high": "at most"}
        bounds = " and ".join(f"{words[name]} {limits[name]}" for name in words if name in limits)
        raise UserError(f"{path} {value}: expected a finite number {bounds}; change {flag(path)}")


def check(config: Config) -> None:
    """Raise UserError if an option or a combination of options breaks a rule."""
    for path, declared in options().items():
        _check_value(path, get(config, path), declared)
    if (config.runtime.gpus or 1) > config.train.batch_size:
        raise UserError(
            f"--batch-size {config.train.batch_size}: {config.runtime.gpus} ranks need at least "
            "one prompt each; raise it"
        )
    _check_loss(config)
    _check_teacher(config)
    _check_prompt_template(config)
    _check_adapter(config)
    _check_teacher_device(config)
    _check_selection(config)
    _check_extrapolation(config)
    parse_window(config.weights.window)
    parse_trackers(config.trackers.to)
    check_repository(config.export.push, config.export.public)
    check_prefix(config.schedule.prefix, config.rollout.max_new_tokens)
    warmup_steps(config.schedule.warmup, config.train.steps)


def _check_loss(config: Config) -> None:
    """Raise UserError if divergence, estimator, clip and off-policy loss are incompatible."""
    name, _ = parse_divergence(config.divergence.name)
    estimator, _ = parse_estimator(config.divergence.estimator)
    off_policy = parse_off_policy(config.rollout.off_policy)
    if estimator == "sampled":
        _check_sampled(config, name, off_policy)
    if off_policy is not None and off_policy == parse_off_policy("sft"):
        for path in (
            "divergence.name",
            "divergence.estimator",
            "divergence.temperature",
            "divergence.clip",
        ):
            if get(config, path) != options()[path].default:
                raise UserError(
                    f"{flag(path)} {get(config, path)} with --off-policy sft: every rollout is the "
                    "teacher's and has the cross-entropy as its loss; leave it out, or use "
                    "--off-policy divergence"
                )
    if config.divergence.clip is not None and (name != "forward-kl" or estimator != "full"):
        raise UserError(
            f"--clip {config.divergence.clip:g} with --divergence {config.divergence.name} "
            f"--estimator {config.divergence.estimator}: the entry-wise clip is of the forward KL "
            "over the whole vocabulary; use --divergence forward-kl --estimator full, or leave it "
            "out"
        )


def _check_sampled(config: Config, name: str, off_policy: OffPolicy | None) -> None:
    """Raise UserError if ``--estimator sampled`` is incompatible with another option."""
    for wrong, got, instead in (
        (
            name != "reverse-kl",
            f"--divergence {config.divergence.name}",
            "the student's own tokens estimate the reverse KL only: use reverse-kl, or "
            "--estimator full",
        ),
        (
            config.divergence.temperature != 1,
            f"--kl-temperature {config.divergence.temperature:g}",
            "it teaches the student's distribution as it is: use 1, or --estimator full",
        ),
        (
            config.rollout.temperature == 0,
            "--temperature 0",
            "a greedy token is no sample of the student's distribution: use 1, or --estimator full",
        ),
        (
            off_policy is not None and off_policy.loss == "divergence",
            f"--off-policy {config.rollout.off_policy}",
            "the tokens must be the student's own: use --estimator full",
        ),
    ):
        if wrong:
            raise UserError(f"--estimator sampled with {got}: {instead}")


def _check_prompt_template(config: Config) -> None:
    if (
        config.data.prompt_template is not None
        and config.data.prompt_template.count("{prompt}") != 1
    ):
        raise UserError(
            f"--prompt-template {config.data.prompt_template[:60]!r}: expected {{prompt}} in it "
            "once; put it where the prompt belongs"
        )


def _check_adapter(config: Config) -> None:
    """Raise UserError if an option needs a LoRA adapter, or conflicts with merging it."""
    for path in (
        ("adapter.alpha", "adapter.targets", "adapter.merge") if config.adapter.rank is None else ()
    ):
        if get(config, path) != options()[path].default:
            raise UserError(f"{flag(path)}: it needs an adapter; add --lora 16, or leave it out")
    if config.models.student_quantize != "none" and (
        config.adapter.rank is None or config.adapter.merge
    ):
        raise UserError(
            f"--student-quantize {config.models.student_quantize}: weights of so few bits do not "
            "train and take no adapter in; "
            + (
                "leave --lora-merge out, and merge into the full weights later"
                if config.adapter.merge
                else "add --lora 16"
            )
        )


def _check_teacher_device(config: Config) -> None:
    if config.runtime.teacher_memory is not None and config.runtime.teacher_device != "auto":
        raise UserError(
            f"--teacher-memory {config.runtime.teacher_memory:g}: it limits --teacher-device auto; "
            "add that, or leave it out"
        )
    for wrong, got in (
        ((config.runtime.gpus or 1) > 1, "--gpus"),
        (config.models.teacher == SELF, "--teacher self"),
        (config.models.teacher_quantize != "none", "--teacher-quantize"),
    ):
        if wrong and config.runtime.teacher_device == "auto":
            raise UserError(
                f"--teacher-device auto with {got}: it spreads one teacher with weights of its own "
                "over all GPUs; leave one of them out"
            )


def _check_selection(config: Config) -> None:
    if config.weights.keep is not None and config.weights.select == "all":
        raise UserError(
            f"--keep {config.weights.keep:g}: it is the share that --select keeps; add --select "
            "soft-or, or leave it out"
        )
    parse_selection(config.weights.select, selected(config))
    parse_position_weight(config.weights.position)


def _check_extrapolation(config: Config) -> None:
    if config.extrapolation.kind == "none":
        for path in ("extrapolation.score", "extrapolation.problems", "extrapolation.reset"):
            if get(config, path) != options()[path].default:
                raise UserError(
                    f"{flag(path)} {get(config, path)}: nothing is extrapolated; add --extrapolate "
                    "effopd, or leave it out"
                )


def _check_teacher(config: Config) -> None:
    models, data = config.models, config.data
    if models.teacher_ema is not None and (models.teacher != SELF or models.teacher_ema == 1):
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --teacher {models.teacher}: it averages "
            "the student into a copy of itself; use --teacher self and a number below 1, such as "
            "0.999, or leave it out"
        )
    if models.teacher_ema is not None and models.teacher_quantize != "none":
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --teacher-quantize "
            f"{models.teacher_quantize}: an average needs its weights in float32; leave one of "
            "them out"
        )
    if models.teacher_ema is not None and config.adapter.rank is not None:
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --lora: its teacher is the student without "
            "the adapter, which does not move; leave one of them out"
        )
    if (
        models.teacher == SELF
        and data.privileged_column is None
        and data.teacher_thinking == data.student_thinking
    ):
        raise UserError(
            "--teacher self: the student's own weights behind the same prompt have nothing to "
            "teach; name what the teacher alone sees with --privileged-column, such as solution"
        )
    if data.privileged_template is not None:
        if data.privileged_column is None:
            raise UserError(
                "--privileged-template: it needs what the teacher alone sees; name it with "
                "--privileged-column"
            )
        if missing := [
            name for name in ("{problem}", "{solution}") if name not in data.privileged_template
        ]:
            raise UserError(
                f"--privileged-template {data.privileged_template[:60]!r}: it has no {missing[0]}; "
                f"put it where the {missing[0][1:-1]} belongs"
            )


def selected(config: Config) -> float:
    """The share of tokens that --select keeps."""
    return 0.5 if config.weights.keep is None else config.weights.keep


def parse_estimator(text: str) -> tuple[str, int | None]:
    """``full`` → ("full", None), ``sampled`` → ("sampled", None), ``top-k:64`` → ("top-k", 64).
    UserError otherwise."""
    name, _, size = text.partition(":")
    if text in ("full", "sampled"):
        return text, None
    if name == "top-k" and re.fullmatch(r"0*[1-9]\d{0,17}", size, re.ASCII):
        return name, int(size)
    raise UserError(
        f"estimator '{text}': --estimator must be full, sampled or top-k:K with K at least 1, such "
        "as top-k:64"
    )


def parse_trackers(text: str) -> tuple[str, ...]:
    """``none`` → (), ``tensorboard,wandb`` → both. UserError otherwise."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ("none",):
        return ()
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UserError(
            f"--report-to {text!r}: expected none, or some of {', '.join(TRACKERS)} with commas, "
            f"got {unknown[0]!r}"
        )
    return names


def check_repository(name: str | None, public: bool) -> None:
    """UserError unless ``name`` can be a hub repository's, or is None and nothing is to be
    public."""
    if name is None and public:
        raise UserError(
            "--hub-public: nothing is pushed; add --push-to-hub USER/NAME, or leave it out"
        )
    if name is not None and not re.fullmatch(
        r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII
    ):
        raise UserError(
            f"--push-to-hub {name[:80]!r}: expected USER/NAME of letters, digits, '-', '_' and "
            "'.', such as me/my-student"
        )
