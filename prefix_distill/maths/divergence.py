"""How far the student is from the teacher, token by token: fused with both output heads, in chunks.

Axes: N taught tokens, D student width, E teacher width, V the shared support (vocabulary ids both
models own). All logarithms are natural; all values are nats. Matmuls run in ``dtype``; from the
logits on everything is float32.
"""

import math
from dataclasses import dataclass, replace

import torch


@dataclass
class Head:
    """A model's output head, cut to the support.

    logits = softcap·tanh(z/softcap) with z = scale·(hidden·weightᵀ + bias); no softcap when
    ``softcap`` is None. ``weight_VD`` may be a slice of a trainable (also tied) parameter: its
    gradient flows back through the slice.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head without gradient, its matmul in ``dtype``."""
        return replace(self, weight_VD=self.weight_VD.detach().to(dtype))

    def logits(self, hidden_ND: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 logits [N, V] of hidden rows, into ``out`` if given; the matmul runs in the
        weight's dtype."""
        # autocast off: the matmul runs in the dtype that was asked for, whatever the caller's
        # context
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
        """Return the derivative of softcap·tanh(z/softcap) at the logits, in ``out`` if given; None
        without a softcap."""
        if self.softcap is None:
            return None
        return torch.div(logits_NV, self.softcap, out=out).square_().neg_().add_(1)


def _checked_beta(name: str, beta: float | None) -> float:
    """Return the β of the JSD; raise ValueError for another name or a missing β."""
    if name != "jsd" or beta is None:
        raise ValueError(
            f"divergence {name!r} with β = {beta}: expected reverse-kl, forward-kl, or jsd with "
            "its β"
        )
    return beta


def per_token(
    name: str, beta: float | None, student_logp: torch.Tensor, teacher_logp: torch.Tensor
) -> torch.Tensor:
    """Divergence per row of two log-probability tables [N, V] → [N], nats, unreduced.

    reverse-kl  KL(S‖T) = Σ S (log S − log T)                     [MiniLLM, arXiv 2306.08543, eq. 1]
    forward-kl  KL(T‖S) = Σ T (log T − log S)
    jsd         β KL(T‖m) + (1−β) KL(S‖m),  m = β T + (1−β) S     [GKD, arXiv 2306.13649, eq. 3]

    with 0 < β < 1. ValueError: the name is unknown, or the JSD has no β.
    """
    if name == "reverse-kl":
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
    if name == "forward-kl":
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)
    beta = _checked_beta(name, beta)
    mixture_logp = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    return beta * (teacher_logp.exp() * (teacher_logp - mixture_logp)).sum(-1) + (1 - beta) * (
        student_logp.exp() * (student_logp - mixture_logp)
    ).sum(-1)


def value_and_gradient(  # noqa: PLR0913  the operands of one formula and its work tables
    name: str,
    beta: float | None,
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    spare: torch.Tensor,
    spare_too: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``per_token`` [N] and its gradient with respect to the student's logits [N, V], by hand, in
    the tables given.

    reverse-kl  S_k (log S_k − log T_k − KL(S‖T)) ;  forward-kl  S_k − T_k ;
    jsd         (1−β) S_k (log(S_k/m_k) − KL(S‖m))

    All tables are overwritten (``spare_too`` serves the JSD alone); the gradient is one of them.
    ValueError as in ``per_token``.
    """
    if name == "reverse-kl":
        gap, student = teacher_logp.neg_().add_(student_logp), student_logp.exp_()
        value = torch.mul(student, gap, out=spare).sum(-1)
        return value, spare.addcmul_(student, value[:, None], value=-1)
    if name == "forward-kl":
        gap, teacher = torch.sub(teacher_logp, student_logp, out=spare), teacher_logp.exp_()
        return gap.mul_(teacher).sum(-1), student_logp.exp_().sub_(teacher)
    beta = _checked_beta(name, beta)
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


@dataclass(frozen=True)
class Terms:
    """What the loss measures: divergence, its temperature, the matmul dtype and the chunk's memory
    budget.

    ``name``: a divergence of ``per_token``, or cross-entropy, −log S of the realised token (no
    teacher). ``sampled``: the reverse KL from the realised token alone (``_at_token``).

    ``top_k``: on the teacher's k most likely tokens and one bucket with the rest of the mass on
    both sides, which keeps it a divergence between distributions (never above the full one); None
    is the whole vocabulary. ``clip``: κ, the most that one vocabulary entry may add to the forward
    KL (``_clipped``); None is no clip.
    """

    name: str
    beta: float | None = None
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    memory_bytes: int = 256 << 20
    top_k: int | None = None
    sampled: bool = False
    clip: float | None = None

    @property
    def taught_by(self) -> str:
        """``teacher``, or ``text`` for the cross-entropy."""
        return "text" if self.name == "cross-entropy" else "teacher"

    @property
    def by_token(self) -> bool:
        """Return whether the loss compares the realised tokens alone."""
        return self.sampled or self.taught_by == "text"

    def top(self, vocabulary: int) -> int | None:
        """Return ``top_k``, or None if it covers the whole vocabulary."""
        if self.top_k is None or self.top_k >= vocabulary:
            return None
        return self.top_k

    def chunk(self, vocabulary: int, softcap: bool = False) -> int:
        """Rows per chunk: as many as ``memory_bytes`` holds of what is alive at once, float32
        tables [rows, V]: both log-probabilities and one to work in, one more for each of the JSD, a
        top-k and a soft-cap, half a one for bfloat16, a quarter for a clip.

        More rows read both heads fewer times and add into the head's gradient fewer times; beyond
        some hundreds of rows the matmuls are compute-bound and nothing is gained.
        """
        tables = (
            3
            + (self.name == "jsd")
            + (self.top_k is not None)
            + softcap
            + 0.5 * (self.dtype != torch.float32)
            + 0.25 * (self.clip is not None)
        )
        return max(1, int(self.memory_bytes / (4 * vocabulary * tables)))
