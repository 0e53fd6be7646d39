"""Load a student and its teacher, and check that they are compatible."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch

from .. import config as configuration
from ..config import Config
from ..engine import loading, models, scoring
from ..engine.alignment import match_tokenizers
from ..engine.device import read_free_memory
from ..engine.models import Model, with_checkpointing
from ..engine.pair import Pair
from ..engine.placement import Storage
from ..engine.ranks import Place, join_ranks
from ..engine.units import shared_support
from ..errors import PreflightError, UserError
from ..lab.task import LAB
from ..maths.schedule import parse_off_policy
from ..maths.weights import parse_window
from ..plugins import load_plugins
from .run import Notes, settled

TASK = "choice"  # the built-in default: lab:choice and its pair


def fill_in(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in pair and task where none is given."""
    return fill_in_dataset(fill_in_models(config, notes), notes)


def fill_in_models(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in pair where none is given."""
    student = f"{LAB}{TASK}/student"
    if config.models.teacher == configuration.SELF:
        student = f"{student}-told"
    # Again, because another config may have been built since this one.
    for plugin in load_plugins(config.runtime.plugin):
        notes.note(plugin.describe())
    config = _fill(config, notes, option="models.student", value=student)
    return _fill(config, notes, option="models.teacher", value=f"{LAB}{TASK}/teacher")


def fill_in_dataset(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in task where no dataset is given."""
    return _fill(config, notes, option="data.dataset", value=LAB + TASK)


def _fill(config: Config, notes: Notes, *, option: str, value: str) -> Config:
    """Return the config with ``value`` for an option that is not given, and note it."""
    section, key = option.split(".")
    if getattr(getattr(config, section), key) is not None:
        return config
    notes.note(f"no --{key} was given; using the built-in {value}")
    return configuration.replace(config, **{section: {key: value}})


@contextlib.contextmanager
def as_preflight_error() -> Iterator[None]:
    """Re-raise UserError as PreflightError: each part is valid, the combination is not."""
    try:
        yield
    except UserError as error:
        raise PreflightError(str(error)) from None


def load_pair(config: Config, notes: Notes) -> tuple[Config, Place, Pair]:
    """Load both models, join the ranks and compare the tokenizers.

    Return the config with the options that depend on the models, this rank's place, and the pair.
    UserError: a model cannot be loaded. PreflightError: the models are not compatible.
    """
    student, where = _load_student(config)
    notes.note(*where.reasons)
    if config.adapter.rank is not None:
        student = _add_adapter(config, student, where, notes=notes)
    teacher = _load_teacher(config, student, where, notes=notes)
    with as_preflight_error():
        alignment, tokenizers = match_tokenizers(student, teacher, config.models.cross_tokenizer)
    notes.note(tokenizers)
    support = None
    if alignment is not None:
        config = check_alignment(config, notes)
        support = shared_support(
            alignment.shared_vocabulary,
            alignment.mode,
            student_device=where.device,
            teacher_device=where.teacher_device,
        )
    _check_forward_pass("student", student, notes)
    _check_forward_pass("teacher", teacher, notes)
    if config.train.gradient_checkpointing:
        student = with_checkpointing(student)
        if student.shares_prompts and config.rollout.samples > 1:
            notes.note(
                "the student runs the prompt once per sample, because --gradient-checkpointing "
                "is on"
            )
    pair = Pair(
        student=student,
        teacher=teacher,
        student_shape=models.read_shape(student, settled(student.support, "the student's support")),
        teacher_shape=models.read_shape(teacher, teacher.support),
        alignment=alignment,
        shared_support=support,
        tokenizers=tokenizers,
    )
    return config, where, pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UnloadedModel:
    """A model that loads after its device and dtype are known."""

    name: str
    trust_remote_code: bool

    @property
    def parameters(self) -> int:
        """Return the number of parameters, from the config."""
        return loading.count_parameters(self.name, self.trust_remote_code)


def _load_student(config: Config) -> tuple[Model, Place]:
    """Load the student and join the ranks.

    Without an adapter the weights load in float32 on the CPU first, since the automatic dtype
    depends on their number.
    """
    name = settled(config.models.student, "--student")
    trust = config.models.trust_remote_code
    if config.adapter.rank is not None:
        unloaded = _UnloadedModel(name=name, trust_remote_code=trust)
        where = join_ranks(config.runtime, unloaded)
        student = loading.load_model(
            name,
            device=where.device,
            dtype=where.dtype,
            trust_remote_code=trust,
            storage=Storage(quantize=config.models.student_quantize),
        )
        return student, where
    student = loading.load_model(
        name, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust
    )
    where = join_ranks(config.runtime, student)
    student.net.to(where.device)
    return student, where


def _add_adapter(config: Config, student: Model, where: Place, notes: Notes) -> Model:
    student = loading.add_adapter(student, config.adapter, config.runtime.seed)
    trained = sum(p.numel() for p in student.trainable.values())
    notes.note(
        f"LoRA of rank {config.adapter.rank} on {config.adapter.targets}: {trained:,} parameters "
        f"train, {student.parameters - trained:,} are frozen in {str(where.dtype)[6:]}"
    )
    return student


def _load_teacher(config: Config, student: Model, where: Place, notes: Notes) -> Model:
    """Load the teacher; with ``self`` it is the student, without its adapter if possible."""
    is_self = config.models.teacher == configuration.SELF
    if is_self and _can_share_weights(config, where):
        teacher = dataclasses.replace(student, adapter_off=True)
        teacher.name = f"{teacher.name} (itself)"
        notes.note("teacher self: the student without its adapter, no second copy of the weights")
        return teacher
    source = config.models.student if is_self else config.models.teacher
    averaged = config.models.teacher_ema is not None
    teacher = loading.load_model(
        settled(source, "--teacher"),
        device=where.teacher_device,
        dtype=torch.float32 if averaged else where.dtype,
        trust_remote_code=config.models.trust_remote_code,
        storage=Storage(
            quantize=config.models.teacher_quantize, spread=_spread_limit(config, where, notes)
        ),
    )
    if is_self:
        teacher.name = f"{teacher.name} (itself)"
        what = "frozen"
        if averaged:
            share = config.models.teacher_ema
            what = f"in float32; each step moves it by 1 − {share:g} towards the student"
        notes.note(f"teacher self: a copy of the student's initial weights, {what}")
    return teacher


def _can_share_weights(config: Config, where: Place) -> bool:
    """Return whether the teacher can be the student's own network with its adapter off."""
    return (
        config.adapter.rank is not None
        and where.device == where.teacher_device
        and config.models.teacher_quantize in ("none", config.models.student_quantize)
    )


def _check_forward_pass(role: str, model: Model, notes: Notes) -> None:
    """Check the model's output head, and find out whether it can share a prompt's KV cache."""
    with as_preflight_error():
        loading.check_head(model)
    reason = scoring.check_sharing(model)
    model.shares_prompts = reason is None
    if reason:
        notes.note(f"the {role} runs the prompt once per sample: {reason}")


def _spread_limit(config: Config, where: Place, notes: Notes) -> int | None:
    """Return the bytes of each device that --teacher-device auto may fill; None without it."""
    if config.runtime.teacher_device != "auto":
        return None
    if where.world > 1:
        raise UserError(
            f"--teacher-device auto with {where.world} ranks: it spreads one teacher over all "
            "GPUs; start one rank, or omit --teacher-device"
        )
    if config.runtime.teacher_memory is not None:
        limit = int(config.runtime.teacher_memory * 2**30)
    else:
        limit = (read_free_memory(where.device) or 8 << 30) // 2
    devices = "all GPUs" if where.device.type == "cuda" else where.device.type
    notes.note(
        f"the teacher's layers are spread over {devices}, up to {limit / 2**30:.3g} GiB of each, "
        "then main memory, then disk"
    )
    return limit


def check_alignment(config: Config, notes: Notes) -> Config:
    """Return the config for different tokenizers; UserError: an option needs one tokenizer."""
    estimator, _ = configuration.parse_estimator(config.divergence.estimator)
    off_policy = parse_off_policy(config.rollout.off_policy)
    window = parse_window(config.weights.window)
    ranked = config.weights.select not in ("all", "random") or (
        window is not None and window.statistic is not None
    )
    if estimator != "full":
        _refuse(
            f"--estimator {config.divergence.estimator}",
            "units are compared on all shared tokens; use --estimator full",
        )
    if config.divergence.clip is not None:
        _refuse("--clip", "the clip needs one vocabulary; omit --clip")
    if config.rollout.eos == "teacher":
        _refuse(
            "--eos teacher", "the student's vocabulary lacks the teacher's EOS tokens; omit --eos"
        )
    if off_policy is not None and off_policy.loss == "sft" and ranked:
        _refuse(
            "--off-policy sft with a ranked selection",
            "text without units cannot be ranked; use random, a window by position, or "
            "--off-policy divergence",
        )
    notes.note("rollouts stop at the student's EOS tokens, because the tokenizers differ")
    return configuration.replace(config, rollout={"eos": "student"})


def _refuse(got: str, instead: str) -> None:
    raise UserError(f"{got} with different tokenizers: {instead}")


def describe_tokens(model: Model, ids: Iterable[int]) -> str:
    """Return ids with their tokens: ``<|end|> (1)``."""
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(ids))
