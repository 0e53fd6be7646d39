"""The FLOP ledger: matmul FLOPs by phase, useful (real tokens, causal pairs) and executed (with padding and rectangles).

One multiply-add is 2 FLOPs. Counted: linear layers, attention's two products, the output head. Not counted: embedding
lookups, norms, activations, softmax, the optimizer, sampling.
"""

from dataclasses import dataclass, field

import torch

OUTSIDE = ("evaluation",)  # phases that are reported but are no part of the totals


@dataclass(frozen=True)
class Shape:
    """What a model costs. ``trunk``: matmul parameters per token, head excluded (MoE: active experts); ``head``: D·V;
    ``attention``: per layer (heads·head_dim, sliding window in tokens or None)."""

    trunk: int
    head: int
    attention: tuple[tuple[int, int | None], ...]

    def linear(self, tokens: float) -> float:
        """Trunk FLOPs of ``tokens`` tokens."""
        return 2.0 * self.trunk * tokens

    def output(self, rows: float) -> float:
        """Head FLOPs of ``rows`` rows."""
        return 2.0 * self.head * rows

    def causal(self, past: int, queries: int) -> float:
        """Attention FLOPs of ``queries`` tokens after ``past`` cached ones: 4·A·c for a query that sees c keys (itself
        included), c capped by the layer's window."""
        return sum(4.0 * width * _visible(past, queries, window) for width, window in self.attention)

    def rectangle(self, queries: int, keys: int, cached: bool = False) -> float:
        """Attention FLOPs as run: every query against every key. A cached sliding layer holds only its window."""
        return sum(
            4.0 * width * queries * (min(keys, window) if cached and window else keys)
            for width, window in self.attention
        )


def _visible(past: int, queries: int, window: int | None) -> float:
    """Σ_{i=1..queries} min(past + i, window)."""
    if window is None or past + queries <= window:
        return queries * past + queries * (queries + 1) / 2
    growing = max(0, window - past)
    return growing * past + growing * (growing + 1) / 2 + (queries - growing) * window


def shape(model, support: int | None = None) -> Shape:
    """Reads a Model's Shape from its modules and its config."""
    from transformers.pytorch_utils import Conv1D

    config, net = model.config, model.net
    share = 1.0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        share = getattr(config, "num_experts_per_tok", experts) / experts
    trunk = 0.0
    for name, module in net.get_decoder().named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            trunk += module.weight.numel() * (share if ".experts." in f".{name}." else 1.0)
        elif name.endswith("experts"):  # fused experts keep their matrices as [experts, in, out] parameters
            trunk += share * sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    attention = tuple((width, window if kind == "sliding_attention" else None) for kind in kinds)
    rows, columns = net.get_output_embeddings().weight.shape
    return Shape(round(trunk), min(rows, support or rows) * columns, attention)


@dataclass
class Ledger:
    """FLOPs by phase, useful and executed. Phases are an open list of names."""

    useful: dict[str, float] = field(default_factory=dict)
    executed: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, useful: float, executed: float) -> None:
        self.useful[phase] = self.useful.get(phase, 0.0) + useful
        self.executed[phase] = self.executed.get(phase, 0.0) + executed

    def merge(self, other: "Ledger") -> None:
        for phase in other.useful:
            self.add(phase, other.useful[phase], other.executed[phase])

    def total(self, kind: str = "useful") -> float:
        """Sum over the phases of training."""
        return sum(v for phase, v in getattr(self, kind).items() if phase not in OUTSIDE)

    def summary(self) -> dict:
        """{useful, executed, by_phase: {phase: {useful, executed}}}"""
        return {
            "useful": self.total("useful"), "executed": self.total("executed"),
            "by_phase": {p: {"useful": self.useful[p], "executed": self.executed[p]} for p in self.useful},
        }

    def generation(self, shape: Shape, prompts: list[int], responses: list[int],
                   prefill: str = "student_prefill", decode: str = "student_decode") -> None:
        """One ``generate`` call: the head runs once per row after the prefill, then once per decoded token.

        Executed: every row is padded to the longest prompt and stays in the batch until the longest response ends.
        """
        rows, width, steps = len(prompts), max(prompts), max(responses)
        self.add(
            prefill,
            sum(shape.linear(p) + shape.causal(0, p) + shape.output(1) for p in prompts),
            rows * (shape.linear(width) + shape.rectangle(width, width) + shape.output(1)),
        )
        self.add(
            decode,
            sum(shape.linear(n - 1) + shape.output(n - 1) + shape.causal(p, n - 1) for p, n in zip(prompts, responses)),
            rows * (shape.linear(steps - 1) + shape.output(steps - 1)
                    + sum(shape.rectangle(1, width + t, cached=True) for t in range(1, steps))),
        )

    def forward(self, phase: str, shape: Shape, prompts: list[int], responses: list[int], passes: int = 1,
                idle: bool = False) -> None:
        """One forward over prompt + response with the head on taught rows; the last response token is not read.

        ``passes`` 3 is a training step in which everything trains: forward, input gradient, weight gradient of every
        matmul (attention's products: forward and two gradients). ``idle``: run only to keep step with other ranks, so
        executed and of no use.
        """
        read = [p + n - 1 for p, n in zip(prompts, responses)]
        width = max(read)
        self.add(
            phase,
            0.0 if idle else passes * sum(shape.linear(t) + shape.causal(0, t) + shape.output(n)
                                          for t, n in zip(read, responses)),
            passes * (len(read) * (shape.linear(width) + shape.rectangle(width, width)) + shape.output(sum(responses))),
        )


def update_cost(student: Shape, teacher: Shape, student_prompts: list[int], teacher_prompts: list[int],
                response: float) -> float:
    """Useful FLOPs of one update in which every rollout has ``response`` tokens (its mean, rounded to a token)."""
    ledger, lengths = Ledger(), [max(1, round(response))] * len(student_prompts)
    ledger.generation(student, student_prompts, lengths)
    ledger.forward("teacher_score", teacher, teacher_prompts, lengths)
    ledger.forward("student_update", student, student_prompts, lengths, passes=3)
    return ledger.total()
