"""The divergences by name, between two tables of log-probabilities [N, V] in float32.

N tokens, V the support. S is the student's distribution, T the teacher's. All logarithms are
natural; all values are nats. torch is imported inside the functions, so that the options can be
checked without it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from .registry import BUILT_IN, Registry, registering

if TYPE_CHECKING:
    from torch import Tensor

AUTOGRAD_TABLES = 8  # tables [rows, V] that a registered divergence may keep alive in a chunk


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One divergence D(S, T).

    ``value(student_logp, teacher_logp, *parameters)`` returns D of every row, [N].
    ``gradient``, with the same arguments, returns its gradient to the student's logits, [N, V];
    None: autograd computes it. ``in_tables`` returns both and overwrites the tables that it is
    given; built-in divergences have it. ``tables``: tables [rows, V] that are alive at once, from
    which the number of rows in a chunk follows. ``check`` raises UserError for parameters that are
    out of range.
    """

    value: "Callable[..., Tensor]"
    gradient: "Callable[..., Tensor] | None" = None
    in_tables: "Callable[..., tuple[Tensor, Tensor]] | None" = None
    tables: int = AUTOGRAD_TABLES
    check: Callable[[str, tuple[float, ...]], None] | None = None

    @property
    def needs_two_spares(self) -> bool:
        """Return whether ``in_tables`` works in two spare tables, not one."""
        return self.in_tables is not None and self.tables > 3

    def accepts(self, parameters: tuple[float, ...]) -> bool:
        """Return whether ``value`` takes this number of parameters."""
        try:
            inspect.signature(self.value).bind(None, None, *parameters)
        except TypeError:
            return False
        return True


# cross-entropy is a loss without a teacher; `Terms` has it
DIVERGENCES: Registry[Divergence] = Registry("divergence", reserved=("cross-entropy",))


def reverse_kl(student_logp: "Tensor", teacher_logp: "Tensor") -> "Tensor":
    """Return KL(S‖T) = Σ S (log S − log T). [MiniLLM, arXiv 2306.08543, eq. 1]"""
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def _reverse_kl_in_tables(
    student_logp: "Tensor", teacher_logp: "Tensor", spare: "Tensor", _: "Tensor | None"
) -> "tuple[Tensor, Tensor]":
    """Gradient: S_k (log S_k − log T_k − KL(S‖T))."""
    import torch

    gap, student = teacher_logp.neg_().add_(student_logp), student_logp.exp_()
    value = torch.mul(student, gap, out=spare).sum(-1)
    return value, spare.addcmul_(student, value[:, None], value=-1)


def forward_kl(student_logp: "Tensor", teacher_logp: "Tensor") -> "Tensor":
    """Return KL(T‖S) = Σ T (log T − log S)."""
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def _forward_kl_in_tables(
    student_logp: "Tensor", teacher_logp: "Tensor", spare: "Tensor", _: "Tensor | None"
) -> "tuple[Tensor, Tensor]":
    """Gradient: S_k − T_k."""
    import torch

    gap, teacher = torch.sub(teacher_logp, student_logp, out=spare), teacher_logp.exp_()
    return gap.mul_(teacher).sum(-1), student_logp.exp_().sub_(teacher)


def jsd(student_logp: "Tensor", teacher_logp: "Tensor", beta: float) -> "Tensor":
    """Return β KL(T‖m) + (1−β) KL(S‖m) with m = β T + (1−β) S. [GKD, arXiv 2306.13649, eq. 3]"""
    import torch

    mixture_logp = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    teacher_side = (teacher_logp.exp() * (teacher_logp - mixture_logp)).sum(-1)
    student_side = (student_logp.exp() * (student_logp - mixture_logp)).sum(-1)
    return beta * teacher_side + (1 - beta) * student_side


def _jsd_in_tables(
    student_logp: "Tensor",
    teacher_logp: "Tensor",
    spare: "Tensor",
    spare_too: "Tensor",
    beta: float,
) -> "tuple[Tensor, Tensor]":
    """Gradient: (1−β) S_k (log(S_k/m_k) − KL(S‖m))."""
    import torch

    mixture_logp = torch.logaddexp(
        torch.add(teacher_logp, math.log(beta), out=spare),
        torch.add(student_logp, math.log1p(-beta), out=spare_too),
        out=spare,
    )
    gap = torch.sub(teacher_logp, mixture_logp, out=spare_too)
    teacher_side = gap.mul_(teacher_logp.exp_()).sum(-1)
    gap, student = torch.sub(student_logp, mixture_logp, out=spare), student_logp.exp_()
    product = torch.mul(student, gap, out=spare_too)
    student_side = product.sum(-1)
    gradient = product.addcmul_(student, student_side[:, None], value=-1).mul_(1 - beta)
    return beta * teacher_side + (1 - beta) * student_side, gradient


def _check_beta(text: str, parameters: tuple[float, ...]) -> None:
    (beta,) = parameters
    if beta in (0, 1):
        instead = "forward-kl" if beta == 0 else "reverse-kl"
        raise UserError(f"--divergence {text}: the JSD is zero at β = {beta:g}; use {instead}")
    if not 0 < beta < 1:
        raise _unknown(text)


with registering(BUILT_IN):
    DIVERGENCES.add(
        "reverse-kl", Divergence(value=reverse_kl, in_tables=_reverse_kl_in_tables, tables=3)
    )
    DIVERGENCES.add(
        "forward-kl", Divergence(value=forward_kl, in_tables=_forward_kl_in_tables, tables=3)
    )
    DIVERGENCES.add(
        "jsd", Divergence(value=jsd, in_tables=_jsd_in_tables, tables=4, check=_check_beta)
    )


def find_divergence(name: str) -> Divergence:
    """Return a divergence by its name. ValueError: there is none of this name."""
    divergence = DIVERGENCES.find(name)
    if divergence is None:
        raise ValueError(f"divergence {name!r}: expected a built-in or a registered name")
    return divergence


def parse_divergence(text: str) -> tuple[str, tuple[float, ...]]:
    """Parse ``reverse-kl``, ``forward-kl``, ``jsd:β`` or a registered ``NAME[:number…]`` →
    (name, parameters).

    UserError: the name is unknown, or the parameters are no finite numbers, too many or too few, or
    out of range.
    """
    name, *numbers = text.split(":")
    divergence = DIVERGENCES.find(name)
    parameters = tuple(map(_number, numbers))
    if divergence is None or not all(map(math.isfinite, parameters)):
        raise _unknown(text)
    if not divergence.accepts(parameters):
        raise _unknown(text)
    if divergence.check is not None:
        divergence.check(text, parameters)
    return name, parameters


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _unknown(text: str) -> UserError:
    names = "reverse-kl, forward-kl, jsd:β with 0 < β < 1"
    registered = [_signature(name) for name in DIVERGENCES.names()]
    others = ", ".join(registered) or "a divergence that --plugin registers"
    return UserError(f"--divergence {text}: expected {names}, or {others}")


def _signature(name: str) -> str:
    """Return a registered name with the names of its parameters: ``skew-kl:alpha``."""
    parameters = list(inspect.signature(find_divergence(name).value).parameters)
    return ":".join([name, *parameters[2:]])
