"""How far the student is from the teacher, token by token: fused with both output heads, in chunks.

Axes: N taught tokens, D student width, E teacher width, V the shared support (vocabulary ids both models own).
All logarithms are natural; all values are nats. Matmuls run in ``dtype``; from the logits on everything is float32.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Head:
    """A model's output head, cut to the support.

    logits = softcap·tanh(z/softcap) with z = scale·(hidden·weightᵀ + bias); no softcap when ``softcap`` is None.
    ``weight_VD`` may be a slice of a trainable (also tied) parameter: its gradient flows back through the slice.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 logits [N, V] of hidden rows; the matmul runs in ``dtype``."""
        return _logits(hidden_ND, self.weight_VD.to(dtype), self.bias_V, self.scale, self.softcap)


def _logits(hidden_ND, weight_VD, bias_V, scale, softcap):
    # autocast off: the matmul runs in the dtype that was asked for, whatever the caller's context
    with torch.autocast(hidden_ND.device.type, enabled=False):
        raw_NV = (hidden_ND.to(weight_VD.dtype) @ weight_VD.T).float()
    if bias_V is not None:
        raw_NV += bias_V.float()
    if scale != 1.0:
        raw_NV *= scale
    if softcap is not None:
        raw_NV = softcap * torch.tanh(raw_NV / softcap)
    return raw_NV


def per_token(name: str, beta: float | None, student_logp: torch.Tensor, teacher_logp: torch.Tensor) -> torch.Tensor:
    """Divergence per row of two log-probability tables [N, V] → [N], nats, unreduced.

    reverse-kl  KL(S‖T) = Σ S (log S − log T)                                   [MiniLLM, arXiv 2306.08543, eq. 1]
    forward-kl  KL(T‖S) = Σ T (log T − log S)
    jsd         β KL(T‖m) + (1−β) KL(S‖m),  m = β T + (1−β) S,  0 < β < 1           [GKD, arXiv 2306.13649, eq. 3]
    """
    if name == "reverse-kl":
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
    if name == "forward-kl":
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)
    mixture_logp = _mixture(beta, student_logp, teacher_logp)
    return beta * (teacher_logp.exp() * (teacher_logp - mixture_logp)).sum(-1) + (1 - beta) * (
        student_logp.exp() * (student_logp - mixture_logp)
    ).sum(-1)


def _mixture(beta, student_logp, teacher_logp):
    return torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))


def _logit_gradient(name, beta, student_logp, teacher_logp, value_N):
    """∂ per_token / ∂ (student logits), by hand [N, V].

    reverse-kl  S_k (log S_k − log T_k − KL(S‖T)) ;  forward-kl  S_k − T_k ;
    jsd         (1−β) S_k (log(S_k/m_k) − KL(S‖m))
    """
    student = student_logp.exp()
    if name == "forward-kl":
        return student - teacher_logp.exp()
    if name == "reverse-kl":
        return student * (student_logp - teacher_logp - value_N[:, None])
    ratio = student_logp - _mixture(beta, student_logp, teacher_logp)
    return (1 - beta) * student * (ratio - (student * ratio).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Terms:
    """What the loss measures: divergence, its temperature, the matmul dtype and the chunk's memory budget."""

    name: str
    beta: float | None = None
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    memory_bytes: int = 256 << 20

    def chunk(self, vocabulary: int) -> int:
        """Rows per chunk: about eight float32 tables [rows, V] are alive at once and share ``memory_bytes``."""
        return max(1, self.memory_bytes // (8 * 4 * vocabulary))


def weighted(
    terms: Terms, student_ND: torch.Tensor, student_head: Head, teacher_NE: torch.Tensor, teacher_head: Head,
    weight_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_n weight_n · D(S_n, T_n) with its gradient, and the detached values D_n [N] (nats).

    S = softmax(student logits / temperature), T likewise; ``weight_N`` is already divided (by the taught tokens of the
    whole update, say) and is not renormalised. The gradient to the hidden rows, the head's weight and its bias is
    computed in the same pass from closed forms, so no [N, V] table outlives its chunk and nothing is projected again.
    No gradient reaches the teacher. A frozen head gets none computed.

    Source: losses of arXiv 2306.13649 and 2602.15260; the fusion is ours.
    """
    return _Weighted.apply(
        student_ND, student_head.weight_VD, student_head.bias_V, weight_N, teacher_NE.detach(), student_head,
        teacher_head, terms,
    )


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_ND, weight_VD, bias_V, weight_N, teacher_NE, student_head, teacher_head, terms):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(student_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        compute_VD = weight_VD.to(terms.dtype)
        value_N = torch.empty(len(student_ND), dtype=torch.float32, device=student_ND.device)
        cap, size = student_head.softcap, terms.chunk(len(weight_VD))
        for start in range(0, len(student_ND), size):
            rows = slice(start, start + size)
            logits = _logits(student_ND[rows], compute_VD, bias_V, student_head.scale, cap)
            student_logp = F.log_softmax(logits / terms.temperature, -1)
            teacher_logp = _teacher_logp(teacher_NE[rows], teacher_head, terms).to(logits.device)
            value_N[rows] = per_token(terms.name, terms.beta, student_logp, teacher_logp)
            if not (need_hidden or need_weight or need_bias):
                continue
            grad = _logit_gradient(terms.name, terms.beta, student_logp, teacher_logp, value_N[rows])
            grad *= weight_N[rows, None].float() / terms.temperature
            if cap is not None:
                grad *= 1 - (logits / cap).square()  # d softcap·tanh(z/softcap) / dz
            grad *= student_head.scale
            if need_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(terms.dtype)
            with torch.autocast(grad.device.type, enabled=False):
                if need_hidden:
                    grad_hidden[rows] = (grad @ compute_VD).to(grad_hidden.dtype)
                if need_weight:
                    grad_weight += grad.T @ student_ND[rows].to(terms.dtype)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(value_N)
        return (weight_N.float() * value_N).sum(), value_N

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        if hidden is not None:
            hidden = hidden * grad_loss
        if weight is not None:
            weight = (weight * grad_loss).to(ctx.dtypes[0])
        if bias is not None:
            bias = (bias * grad_loss).to(ctx.dtypes[1])
        return hidden, weight, bias, None, None, None, None, None


def _teacher_logp(teacher_NE, head, terms):
    return F.log_softmax(head.logits(teacher_NE, terms.dtype) / terms.temperature, -1)


@torch.no_grad()
def statistics(
    terms: Terms, student_ND: torch.Tensor, student_head: Head, teacher_NE: torch.Tensor, teacher_head: Head,
    token_N: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Per-token facts without gradient, each [N] float32: ``divergence``, ``entropy`` of S (nats), and the
    log-probability of the realised token ``token_N`` under each model (``student_logp``, ``teacher_logp``)."""
    rows_of = {"divergence": [], "entropy": [], "student_logp": [], "teacher_logp": []}
    size = terms.chunk(len(student_head.weight_VD))
    for start in range(0, len(student_ND), size):
        rows = slice(start, start + size)
        student_logp = F.log_softmax(student_head.logits(student_ND[rows], terms.dtype) / terms.temperature, -1)
        teacher_logp = _teacher_logp(teacher_NE[rows], teacher_head, terms).to(student_logp.device)
        token = token_N[rows, None].to(student_logp.device)
        rows_of["divergence"].append(per_token(terms.name, terms.beta, student_logp, teacher_logp))
        rows_of["entropy"].append(-(student_logp.exp() * student_logp).sum(-1))
        rows_of["student_logp"].append(student_logp.gather(1, token)[:, 0])
        rows_of["teacher_logp"].append(teacher_logp.gather(1, token)[:, 0])
    return {name: torch.cat(chunks) if chunks else student_ND.new_zeros(0) for name, chunks in rows_of.items()}
