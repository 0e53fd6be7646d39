"""Load a student and its teacher, and check that they are compatible."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator

import torch

from .. import config as configuration
from ..config import Config
from ..display import phase
from ..engine import exactness, loading, reach, trunk
from ..engine.adapter import find_packed
from ..engine.alignment import match_tokenizers
from ..engine.causality import check_causality
from ..engine.decoding_loop import describe_steps
from ..engine.free_memory import read_free_memory
from ..engine.models import Model, with_checkpointing
from ..engine.pair import Pair
from ..engine.placement import Storage
from ..engine.ranks import Place, join_ranks
from ..engine.recomputation import check_recomputation
from ..engine.shapes import read_shape
from ..engine.targets import ALL
from ..engine.units import shared_support
from ..engine.vocabulary import describe_unused_tokens
from ..errors import PreflightError, UserError
from ..maths.flops import describe_not_counted
from ..maths.schedule import parse_off_policy
from ..maths.weights import parse_window
from ..prompts.templates import student_renderer, teacher_renderer
from .run import Notes, settled
from .turn_end import add_turn_end

HALF = 0.5  # share of the weights below which an adapter on all of them is worth a warning


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
    with as_preflight_error():
        trunk.choose_trunk(student)
        student.unreached = reach.find_unreached(student)
    if student.unreached:
        notes.note(reach.describe_unreached(student))
    if config.adapter.rank is not None:
        student = _add_adapter(config, student, where, notes=notes)
    teacher = _load_teacher(config, student, where, notes=notes)
    _note_same_weights(config, student, teacher, notes=notes)
    add_turn_end(student_renderer(student, config), student, notes)
    add_turn_end(teacher_renderer(teacher, config), teacher, notes)
    with as_preflight_error():
        alignment, tokenizers = match_tokenizers(student, teacher, config.models.cross_tokenizer)
    if alignment is None:
        notes.detail(tokenizers)
    else:
        notes.note(tokenizers)
    for model in (student, teacher):
        _note_unused(model, notes)
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
        with as_preflight_error():
            check_recomputation(student)
    pair = Pair(
        student=student,
        teacher=teacher,
        student_shape=read_shape(student, settled(student.support, "the student's support")),
        teacher_shape=read_shape(teacher, teacher.support),
        alignment=alignment,
        shared_support=support,
        tokenizers=tokenizers,
    )
    notes.note(*describe_not_counted([pair.student_shape, pair.teacher_shape]))
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


@phase("loading the student")
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


def _note_unused(model: Model, notes: Notes) -> None:
    """Note the tokens of a model that are not used, and warn of files that are left out."""
    notes.note(*describe_unused_tokens(model))
    if model.left_out is not None and model.left_out not in notes.warnings:
        notes.warn(model.left_out)


def _add_adapter(config: Config, student: Model, where: Place, notes: Notes) -> Model:
    student, targets = loading.add_adapter(student, config.adapter, config.runtime.seed)
    packed = find_packed(student.net)
    if config.adapter.merge and packed is not None:
        raise UserError(
            f"--lora-merge with --student {student.name}: no adapter can be merged into the "
            f"quantized weight {packed}; omit --lora-merge, and merge into the full weights later"
        )
    trained = sum(p.numel() for p in student.trainable.values())
    notes.note(
        f"LoRA of rank {config.adapter.rank} on {config.adapter.targets}: {targets.describe()}, "
        f"which hold {targets.covered:.0%} of the weights between embedding and head; "
        f"{trained:,} parameters train, {student.parameters - trained:,} are frozen in "
        f"{str(where.dtype)[6:]}",
        *targets.describe_obstacles(),
    )
    if config.adapter.targets == ALL and targets.covered < HALF:
        notes.warn(
            f"LoRA leaves {1 - targets.covered:.0%} of the weights between embedding and head "
            "without an adapter; they do not learn; omit --lora to train all weights"
        )
    return student


@phase("loading the teacher")
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


def _note_same_weights(config: Config, student: Model, teacher: Model, *, notes: Notes) -> None:
    """Warn if the teacher was named like the student, or has equal weights under another name."""
    if config.models.teacher == configuration.SELF:
        return
    if not (_are_one_model(config) or _have_equal_weights(student, teacher)):
        return
    text = f"the teacher {config.models.teacher} and the student have the same weights"
    if config.data.privileged_column is not None:
        notes.note(f"{text}; --teacher self trains the same and needs no second copy with --lora")
        return
    notes.warn(
        f"{text}: wherever both see the same prompt, the divergence is 0 and there is nothing to "
        "teach; use another --teacher, or --teacher self with --privileged-column"
    )


def _are_one_model(config: Config) -> bool:
    """Return whether student and teacher are one hub id, folder or file."""
    names = []
    for name in (config.models.student, config.models.teacher):
        names.append(os.path.expanduser(settled(name, "--student and --teacher")))
    if all(map(os.path.exists, names)):
        return os.path.samefile(*names)
    return names[0] == names[1]


def _have_equal_weights(student: Model, teacher: Model) -> bool:
    """Return whether all weights are equal in the teacher's dtype; stop at the first difference.

    A new adapter of the student changes nothing yet, so its weights are left out.
    """
    weights = {}
    for name, parameter in student.net.named_parameters():
        if "lora_" not in name:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            weights[plain] = parameter.detach()
    others = dict(teacher.net.named_parameters())
    if weights.keys() != others.keys():
        return False
    for name, other in others.items():
        weight = weights[name]
        if weight.is_meta or other.is_meta or weight.shape != other.shape:
            return False
        if not torch.equal(weight.to(other.device, other.dtype), other.detach()):
            return False
    return True


def _can_share_weights(config: Config, where: Place) -> bool:
    """Return whether the teacher can be the student's own network with its adapter off."""
    return (
        config.adapter.rank is not None
        and where.device == where.teacher_device
        and config.models.teacher_quantize in ("none", config.models.student_quantize)
    )


def _check_forward_pass(role: str, model: Model, notes: Notes) -> None:
    """Check the model's output head and causality; find how its rows decode together."""
    with as_preflight_error(), phase(f"checking the {role}'s forward pass"):
        trunk.choose_trunk(model)
        check_causality(model)
        exactness.check_window(model)
        model.decoding = exactness.find_decoding(model)
    notes.note(*model.decoding.restrictions(f"the {role}"))
    notes.detail(*describe_steps(f"the {role}", model))


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
