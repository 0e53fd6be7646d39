"""The loss of one token, and the output heads that it uses.

Axes: N taught tokens, D student width, E teacher width, V the shared support (vocabulary ids that
both models have). All logarithms are natural; all values are nats. Matmuls run in ``dtype``; from
the logits on everything is float32.
"""

from dataclasses import dataclass, replace

import torch

from .formulas import Divergence, find_divergence
from .user_functions import check_gradient, check_graph, check_values


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's output head, cut to the support.

    logits = softcap·tanh(z/softcap) with z = scale·(hidden·weightᵀ + bias). ``softcap`` None: no
    cap. ``weight_VD`` may be a slice of a trainable parameter, tied or not: the gradient flows back
    through the slice. ``gradient_VD``: where the loss adds this gradient in float32; None: autograd
    gets it.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    gradient_VD: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Head":
        """Return the same head without gradient, with its weight in ``dtype``."""
        return replace(self, weight_VD=self.weight_VD.detach().to(dtype), gradient_VD=None)

    def logits(self, hidden_ND: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return float32 logits [N, V] of hidden rows, in ``out`` if given.

        The matmul runs in the weight's dtype.
        """
        # the matmul runs in the weight's dtype, also if the caller uses autocast
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden_ND = hidden_ND.to(self.weight_VD.dtype)
            if hidden_ND.dtype == torch.float32:
                raw_NV = torch.mm(hidden_ND, self.weight_VD.T, out=out)
            else:
                raw_NV = self._half_product(hidden_ND)
                raw_NV = raw_NV.float() if out is None else out.copy_(raw_NV)
        if self.bias_V is not None:
            raw_NV += self.bias_V.float()
        if self.scale != 1.0:
            raw_NV *= self.scale
        if self.softcap is not None:
            raw_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw_NV

    def _half_product(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Multiply in 16 bits; on CUDA, return the float32 sums unrounded."""
        if hidden_ND.device.type == "cuda":
            return torch.mm(hidden_ND, self.weight_VD.T, out_dtype=torch.float32)
        return torch.mm(hidden_ND, self.weight_VD.T)

    def slope(
        self, logits_NV: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return the derivative of softcap·tanh(z/softcap) at the logits; None without a softcap.

        The result is in ``out`` if given.
        """
        if self.softcap is None:
            return None
        return torch.div(logits_NV, self.softcap, out=out).square_().neg_().add_(1)


def per_token(
    terms: "Terms", student_logp: torch.Tensor, teacher_logp: torch.Tensor
) -> torch.Tensor:
    """Return the divergence of ``terms`` per row of two log-probability tables [N, V] → [N], nats.

    The divergences are in ``formulas``. ValueError: the name of ``terms`` is unknown. WrongResult:
    a user's function returned another shape.
    """
    divergence = find_divergence(terms.name)
    value = divergence.value(student_logp, teacher_logp, *terms.parameters)
    check_values(divergence.value, value, student_logp)
    return value


def value_and_gradient(
    terms: "Terms",
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    spare: torch.Tensor,
    spare_too: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``per_token`` [N] and its gradient with respect to the student's logits [N, V].

    All tables may be overwritten, and the gradient may be one of them. ``spare_too``: for the JSD.
    ValueError: as in ``per_token``.
    """
    divergence = find_divergence(terms.name)
    if divergence.in_tables is not None:
        return divergence.in_tables(student_logp, teacher_logp, spare, spare_too, *terms.parameters)
    # a user's function gets float32, also if the caller uses autocast
    with torch.autocast(student_logp.device.type, enabled=False):
        if divergence.gradient is None:
            return differentiate(
                divergence, terms.parameters, student_logp=student_logp, teacher_logp=teacher_logp
            )
        value = divergence.value(student_logp, teacher_logp, *terms.parameters)
        gradient = divergence.gradient(student_logp, teacher_logp, *terms.parameters)
    check_values(divergence.value, value, student_logp)
    check_gradient(divergence.gradient, gradient, student_logp)
    # the caller scales the gradient in place
    return value, gradient.float().contiguous()


def differentiate(
    divergence: Divergence,
    parameters: tuple[float, ...],
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value [N] and, by autograd, its gradient to the student's logits [N, V].

    With g the gradient to log S, the gradient to logit k is g_k − S_k Σ_j g_j. The graph ends here,
    so it never outlives its chunk.
    """
    with torch.enable_grad():
        leaf = student_logp.detach().requires_grad_(True)
        value = divergence.value(leaf, teacher_logp, *parameters)
        check_values(divergence.value, value, leaf)
        check_graph(divergence.value, value)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    total = gradient.sum(-1, keepdim=True)
    return value.detach(), gradient - student_logp.exp_().mul_(total)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The loss: a divergence with its parameters, temperature, matmul dtype and memory budget.

    ``name``: a divergence of ``formulas``, or ``cross-entropy``, −log S of the realized token (no
    teacher). ``parameters``: the numbers after the name, such as the β of the JSD. ``sampled``:
    the reverse KL from the realized token alone (``estimators.at_token``).

    ``top_k``: compare the teacher's k most likely tokens and one bucket with the rest of the mass
    of both sides. It stays a divergence between distributions, never above the full one. None:
    the whole vocabulary. ``clip``: κ, the most that one vocabulary entry may add to the forward KL
    (``estimators.clipped``); None: no clip. ``memory_bytes``: budget of the tables of one chunk.
    """

    name: str
    parameters: tuple[float, ...] = ()
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    memory_bytes: int = 256 << 20
    top_k: int | None = None
    sampled: bool = False
    clip: float | None = None

    @property
    def taught_by(self) -> str:
        """Return ``teacher``, or ``text`` for the cross-entropy."""
        if self.name == "cross-entropy":
            return "text"
        return "teacher"

    @property
    def by_token(self) -> bool:
        """Return whether the loss compares the realized tokens alone."""
        return self.sampled or self.taught_by == "text"

    @property
    def tables(self) -> int:
        """Return how many tables [rows, V] the divergence keeps alive at once."""
        if self.taught_by == "text":
            return 3
        return find_divergence(self.name).tables

    @property
    def needs_two_spares(self) -> bool:
        """Return whether the divergence works in a second spare table."""
        return self.taught_by == "teacher" and find_divergence(self.name).needs_two_spares

    def top(self, vocabulary: int) -> int | None:
        """Return ``top_k``, or None if it covers the whole vocabulary."""
        if self.top_k is None or self.top_k >= vocabulary:
            return None
        return self.top_k

    def rows_per_chunk(self, vocabulary: int, softcap: bool = False) -> int:
        """Return the rows per chunk: as many as fit into ``memory_bytes``.

        Alive at once are float32 tables [rows, V]: the log-probabilities and work tables of the
        divergence (``tables``), one more table for a top-k, one for a soft-cap, half a table for
        bfloat16, and a quarter for a clip. Larger chunks load the heads less often. Beyond some
        hundreds of rows the matmuls are compute-bound, so larger chunks gain nothing.
        """
        tables = (
            self.tables
            + (self.top_k is not None)
            + softcap
            + 0.5 * (self.dtype != torch.float32)
            + 0.25 * (self.clip is not None)
        )
        return max(1, int(self.memory_bytes / (4 * vocabulary * tables)))
