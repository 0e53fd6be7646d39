"""Find out on a run's own prompts where its models run a prompt once for all its samples."""

from ..config import Config
from ..display import phase
from ..engine import sharing
from ..engine.models import Model
from ..engine.pair import Pair
from ..engine.ranks import Place
from ..engine.sharing import Comparison, Sharing
from .run import Notes, Problems

Prompts = list[tuple[int, ...]]


def settle_sharing(
    config: Config, pair: Pair, problems: Problems, *, place: Place, notes: Notes
) -> tuple[Sharing, ...]:
    """Let both models share prompts where that is exact; note the way and the reason.

    The prompts of the first step are asked in the dtype of the weights: what float32 computes
    alike, autocast does as well, and its rounding would hide a fault.
    """
    first = problems.train[: config.train.batch_size]
    found = (
        _settle_student(pair.student, [r.student_ids for r in first], place),
        _settle_teacher(pair.teacher, [r.teacher_ids for r in first], place),
    )
    for result in found:
        if config.rollout.samples > 1:
            notes.note(result.text)
        else:
            notes.detail(result.text)
    return found


@phase("checking the student's shared prompts")
def _settle_student(student: Model, prompts: Prompts, place: Place) -> Sharing:
    """Find out whether sampling and training may share a prompt between its samples."""
    hidden = _compare_hidden(student, prompts, place)
    gradients = None
    obstacle = None
    if student.shares_prompts and student.recomputes:
        obstacle = "training uses --gradient-checkpointing, whose layers cannot fill the KV cache"
    elif student.shares_prompts:
        gradients = _agree(sharing.check_shared_gradients(student, prompts), place)
        student.trains_on_shared_prompts = gradients.is_exact
    phases = {"sampling": student.prefills_once, "training": student.encodes_prompt_once}
    return Sharing(
        role="student",
        hidden=hidden,
        gradients=gradients,
        once=tuple(name for name, is_shared in phases.items() if is_shared),
        repeated=tuple(name for name, is_shared in phases.items() if not is_shared),
        obstacle=obstacle,
    )


@phase("checking the teacher's shared prompts")
def _settle_teacher(teacher: Model, prompts: Prompts, place: Place) -> Sharing:
    """Find out whether scoring may share a prompt between its samples."""
    hidden = _compare_hidden(teacher, prompts, place)
    phases = ("scoring",)
    if teacher.shares_prompts:
        return Sharing(role="teacher", hidden=hidden, gradients=None, once=phases, repeated=())
    return Sharing(role="teacher", hidden=hidden, gradients=None, once=(), repeated=phases)


def _compare_hidden(model: Model, prompts: Prompts, place: Place) -> Comparison:
    """Set ``model.shares_prompts`` by the hidden states after a shared prompt."""
    hidden = _agree(sharing.check_sharing(model, prompts), place)
    model.shares_prompts = hidden.is_exact
    return hidden


def _agree(comparison: Comparison, place: Place) -> Comparison:
    """Return the same comparison on every rank: the first that is not exact, if there is one."""
    comparisons: list[Comparison] = place.gather(comparison)
    for other in comparisons:
        if not other.is_exact:
            return other
    return comparisons[0]
