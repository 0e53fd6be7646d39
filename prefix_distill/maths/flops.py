"""The FLOP ledger: matmul FLOPs by phase, useful (real tokens, causal pairs) and executed (with
padding and rectangles).

One multiply-add is 2 FLOPs. Counted: linear layers, attention's two products, the output head. Not
counted: embedding lookups, norms, activations, softmax, the optimizer, sampling.
"""

from dataclasses import dataclass, field
from typing import TypedDict

STRETCH = 32  # tokens decoded before rows that have ended leave the batch
OUTSIDE = ("evaluation",)  # phases that are reported but are no part of the totals


@dataclass(frozen=True)
class Shape:
    """What a model costs. ``trunk``: matmul parameters per token, head excluded (MoE: active
    experts); ``head``: D·V; ``attention``: per layer (heads·head_dim, sliding window in tokens or
    None); ``frozen``: how many of the trunk's, with the head, do not train (behind a LoRA adapter),
    so that no gradient of theirs is computed in a training step; None: all train."""

    trunk: int
    head: int
    attention: tuple[tuple[int, int | None], ...]
    frozen: int | None = None

    def saved(self, tokens: float, rows: float) -> float:
        """FLOPs of the weight gradients that a training step does not compute."""
        return 0.0 if self.frozen is None else 2.0 * (self.frozen * tokens + self.head * rows)

    def linear(self, tokens: float) -> float:
        """Trunk FLOPs of ``tokens`` tokens."""
        return 2.0 * self.trunk * tokens

    def output(self, rows: float) -> float:
        """Head FLOPs of ``rows`` rows."""
        return 2.0 * self.head * rows

    def causal(self, past: int, queries: int) -> float:
        """Attention FLOPs of ``queries`` tokens after ``past`` cached ones: 4·A·c for a query that
        sees c keys (itself included), c capped by the layer's window."""
        return sum(
            4.0 * width * _visible(past, queries, window) for width, window in self.attention
        )

    def rectangle(self, queries: int, past: int = 0) -> float:
        """Attention FLOPs as run: every query against every key, ``past`` ones from a cache
        included, of which a sliding layer holds one less than its window."""
        return sum(
            4.0 * width * queries * ((past if window is None else min(past, window - 1)) + queries)
            for width, window in self.attention
        )


def _visible(past: int, queries: int, window: int | None) -> float:
    """Σ_{i=1..queries} min(past + i, window)."""
    if window is None or past + queries <= window:
        return queries * past + queries * (queries + 1) / 2
    growing = max(0, window - past)
    return growing * past + growing * (growing + 1) / 2 + (queries - growing) * window


class Cost(TypedDict):
    """FLOPs of one phase."""

    useful: float
    executed: float


class Summary(Cost):
    """FLOPs of all phases of training, and of each phase."""

    by_phase: dict[str, Cost]


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

    def waste(self, other: "Ledger") -> None:
        """Adds work that has to be done again: executed, and of no use."""
        for phase in other.useful:
            self.add(phase, 0.0, other.executed[phase])

    def total(self, kind: str = "useful") -> float:
        """Sum over the phases of training."""
        phases: dict[str, float] = getattr(self, kind)
        return sum(v for phase, v in phases.items() if phase not in OUTSIDE)

    def summary(self) -> Summary:
        """{useful, executed, by_phase: {phase: {useful, executed}}}"""
        return {
            "useful": self.total("useful"),
            "executed": self.total("executed"),
            "by_phase": {
                p: {"useful": self.useful[p], "executed": self.executed[p]} for p in self.useful
            },
        }

    def generation(
        self,
        shape: Shape,
        reads: list[tuple[int, list[int]]],
        prefill: str = "student_prefill",
        decode: str = "student_decode",
    ) -> None:
        """One batch of responses; ``reads``: (prompt length, lengths of the responses to it). The
        head runs once per row after the prefill, then once per decoded token.

        A prompt with several responses is prefilled once, but for its last token, which every row
        runs. Executed: every row is padded to the longest prompt and stays in the batch until its
        stretch of tokens ends or all rows have ended.
        """
        rows = [(p, n) for p, lengths in reads for n in lengths]
        width, steps, shared = (
            max(p for p, _ in rows),
            max(n for _, n in rows),
            len(rows) > len(reads),
        )
        common = 1 if shared else 0  # tokens of the prompt that every row runs itself
        self.add(
            prefill,
            sum(shape.linear(p - common) + shape.causal(0, p - common) for p, _ in reads)
            + sum(
                shape.linear(common) + shape.causal(p - common, common) + shape.output(1)
                for p, _ in rows
            ),
            len(reads) * (shape.linear(width - common) + shape.rectangle(width - common))
            + len(rows)
            * (shape.linear(common) + shape.rectangle(common, width - common) + shape.output(1)),
        )
        self.add(
            decode,
            sum(
                shape.linear(n - 1) + shape.output(n - 1) + shape.causal(p, n - 1) for p, n in rows
            ),
            sum(
                sum(n > t - t % STRETCH for _, n in rows)
                * (shape.linear(1) + shape.output(1) + shape.rectangle(1, width + t - 1))
                for t in range(1, steps)
            ),
        )

    def forward(  # noqa: PLR0913  the switches of one formula
        self,
        phase: str,
        shape: Shape,
        reads: list[tuple[int, list[int]]],
        passes: int = 1,
        idle: bool = False,
        recomputed: bool = False,
        taught: float | None = None,
    ) -> None:
        """One forward over prompts + responses with the head on taught rows; a response's last
        token is not read.

        ``reads``: (prompt length, lengths of the responses behind it); a prompt with several is
        read once. ``taught``: rows that the head projects (None: one for every response token; 0:
        none). ``passes`` 3 is a training step: forward, input gradient, weight gradient of every
        matmul that trains (attention's products: forward and two gradients; the first layer's
        frozen matmuls count an input gradient that nobody needs). ``idle``: run only to keep step
        with other ranks, so executed and of no use. ``recomputed``: the layers run once more in
        backward (gradient checkpointing), which is executed and of no use; an upper bound, as torch
        leaves a layer as soon as it has what backward needs (without its last matmul, often).
        """
        rows = [(p, n) for p, lengths in reads for n in lengths]
        linear, executed_linear = linear_tokens(reads)
        taught = sum(n for _, n in rows) if taught is None else taught
        output = shape.output(taught)
        saved = [
            shape.saved(tokens, taught) if passes == 3 else 0.0
            for tokens in (linear, executed_linear)
        ]
        causal = sum(shape.causal(0, p) for p, _ in reads) + sum(
            shape.causal(p, n - 1) for p, n in rows
        )
        width, longest = max(p for p, _ in reads), max(n - 1 for _, n in rows)
        if len(rows) > len(reads):
            pairs = len(reads) * shape.rectangle(width) + len(rows) * shape.rectangle(
                longest, width
            )
        else:
            pairs = len(rows) * shape.rectangle(max(p + n - 1 for p, n in rows))
        self.add(
            phase,
            0.0 if idle else passes * (shape.linear(linear) + causal + output) - saved[0],
            (passes + recomputed) * (shape.linear(executed_linear) + pairs)
            + passes * output
            - saved[1],
        )


def linear_tokens(reads: list[tuple[int, list[int]]]) -> tuple[int, int]:
    """Tokens that a forward's linear layers need and run: (useful, executed with padding)."""
    rows = [(p, n - 1) for p, lengths in reads for n in lengths]
    useful = sum(p for p, _ in reads) + sum(n for _, n in rows)
    if len(rows) > len(reads):
        return useful, len(reads) * max(p for p, _ in reads) + len(rows) * max(n for _, n in rows)
    return useful, len(rows) * max(p + n for p, n in rows)


def update_ledger(  # noqa: PLR0913  the operands of one formula
    student: Shape,
    teacher: Shape,
    prompts: list[tuple[int, int]],
    samples: int,
    response: float,
    behind: tuple[int, int, int],
    teacher_tokens: float = 1.0,
    heads: tuple[float, float] = (1.0, 1.0),
) -> Ledger:
    """FLOPs of one update: generation, scoring, training.

    ``prompts``: their lengths for (student, teacher); ``samples`` rollouts each, all of
    ``response`` tokens (a mean, rounded); ``behind``: how many responses follow one reading of
    their prompt in generation, scoring and training. Across tokenizers, ``teacher_tokens`` of the
    teacher's make one of the student's, and the loss reads the shares ``heads`` of both heads.
    """
    ledger = Ledger()
    lengths = [max(1, round(response * ratio)) for ratio in (1, teacher_tokens)]
    rows = [
        len(prompts) * samples * length * share
        for length, share in zip(lengths, heads, strict=True)
    ]

    def reads(side: int, phase: int) -> list[tuple[int, list[int]]]:
        each = min(behind[phase], samples)
        return [
            (p[side], [lengths[side]] * min(each, samples - start))
            for p in prompts
            for start in range(0, samples, each)
        ]

    ledger.generation(student, reads(0, 0))
    ledger.forward("teacher_score", teacher, reads(1, 1), taught=rows[1])
    ledger.forward("student_update", student, reads(0, 2), passes=3, taught=rows[0])
    return ledger
