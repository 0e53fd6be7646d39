"""The FLOP ledger: matmul FLOPs by phase, useful and executed.

Useful FLOPs are those of real tokens and causal pairs; executed FLOPs include padding and full
rectangles of attention. One multiply-add is 2 FLOPs. Counted: linear layers, attention's two
products, the write and the read of a recurrent state, the output head. Not counted: embedding
lookups, convolutions, norms, activations, softmax, divergences, the optimizer, sampling, what a
chunked scan computes beyond its recurrence, the product of a LoRA adapter of fused experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

STRETCH = 32  # tokens decoded before rows that have ended leave the batch
OUTSIDE = ("evaluation",)  # phases that are reported but are no part of the totals

Reads = list[tuple[int, list[int]]]
"""Prompts that a model runs: (prompt length, lengths of the responses after it), in tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model costs.

    ``trunk``: matmul parameters per token without the head (MoE: active experts). ``head``: D·V.
    ``attention``: per layer (heads·head_dim, sliding window in tokens or None). ``frozen``: with
    a LoRA adapter, the number of frozen parameters of the trunk; the head is frozen too. A training
    step computes no gradients to them. None: all parameters train. ``expanded``: weights that run
    again on every cached token in each pass (the latent keys and values of DeepSeek's attention).
    ``recurrent``: elements of the recurrent states of all layers; a token writes and reads each.
    ``not_counted``: parts of this model that do arithmetic and are not counted, by name.
    ``stretch``: rows that have ended leave the batch after so many decoded tokens; None: they stay
    until all have ended.
    """

    trunk: int
    head: int
    attention: tuple[tuple[float, int | None], ...]
    frozen: int | None = None
    expanded: int = 0
    recurrent: int = 0
    not_counted: tuple[str, ...] = ()
    stretch: int | None = STRETCH

    def saved(self, tokens: float, rows: float) -> float:
        """Return the FLOPs of the weight gradients that a training step does not compute."""
        if self.frozen is None:
            return 0.0
        return 2.0 * (self.frozen * tokens + self.head * rows)

    def linear(self, tokens: float) -> float:
        """Return the trunk FLOPs of ``tokens`` tokens."""
        return 2.0 * (self.trunk + 2 * self.recurrent) * tokens

    def output(self, rows: float) -> float:
        """Return the head FLOPs of ``rows`` rows."""
        return 2.0 * self.head * rows

    def causal(self, past: int, queries: int) -> float:
        """Return the attention FLOPs of ``queries`` tokens after ``past`` cached ones.

        4·A·c for a query that attends to c keys (itself included); the layer's window limits c.
        """
        flops = 0.0
        for width, window in self.attention:
            flops += 4.0 * width * _visible(past, queries, window)
        return flops

    def expansion(self, past: int) -> float:
        """Return the FLOPs that one pass spends on ``past`` cached tokens again."""
        return 2.0 * self.expanded * past

    def rectangle(self, queries: int, past: int = 0) -> float:
        """Return the attention FLOPs as executed: every query against every key.

        ``past``: cached keys; a sliding layer caches one key less than its window.
        """
        if not queries:
            return 0.0
        flops = self.expansion(past)
        for width, window in self.attention:
            cached = past
            if window is not None:
                cached = min(past, window - 1)
            flops += 4.0 * width * queries * (cached + queries)
        return flops


def find_not_counted(shapes: Sequence[Shape]) -> list[str]:
    """Return the parts of some models that are not counted, by name."""
    names: set[str] = set()
    for shape in shapes:
        names.update(shape.not_counted)
    return sorted(names)


def describe_not_counted(shapes: Sequence[Shape]) -> list[str]:
    """Return a note that names the parts of some models that are not counted, if there are any."""
    names = find_not_counted(shapes)
    if not names:
        return []
    return [f"the FLOP ledger does not count all of these parts: {', '.join(names)}"]


def _visible(past: int, queries: int, window: int | None) -> float:
    """Σ_{i=1..queries} min(past + i, window)."""
    if window is None or past + queries <= window:
        return queries * past + queries * (queries + 1) / 2
    growing = max(0, window - past)
    return growing * past + growing * (growing + 1) / 2 + (queries - growing) * window


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a model computes its layers.

    ``count``: 1 is a forward pass, 3 a training step: forward, input gradient, and weight gradient
    of every matmul that trains. Attention's products have two gradients. The first layer's frozen
    matmuls count an input gradient that nothing needs. ``recomputed``: the layers run once more in
    backward (gradient checkpointing), which is counted as executed, not useful. It is an upper
    bound, because torch leaves a layer as soon as it has what backward needs.
    """

    count: int = 1
    recomputed: bool = False


FORWARD = Passes()


class Cost(TypedDict):
    """FLOPs of one phase."""

    useful: float
    executed: float


class Summary(Cost):
    """FLOPs of all phases of training, and of each phase."""

    by_phase: dict[str, Cost]


@dataclass(kw_only=True)
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
        """Add work that has to be repeated: it counts as executed, not useful."""
        for phase in other.useful:
            self.add(phase, 0.0, other.executed[phase])

    def total(self, kind: str = "useful") -> float:
        """Return the sum over the phases of training, useful or executed."""
        phases: dict[str, float] = getattr(self, kind)
        return sum(flops for phase, flops in phases.items() if phase not in OUTSIDE)

    def summary(self) -> Summary:
        """Return {useful, executed, by_phase: {phase: {useful, executed}}}."""
        by_phase: dict[str, Cost] = {}
        for phase in self.useful:
            by_phase[phase] = {"useful": self.useful[phase], "executed": self.executed[phase]}
        return {
            "useful": self.total("useful"),
            "executed": self.total("executed"),
            "by_phase": by_phase,
        }

    def generation(
        self,
        shape: Shape,
        reads: Reads,
        prefill: str = "student_prefill",
        decode: str = "student_decode",
    ) -> None:
        """Add one batch of responses.

        The head runs once per row after the prefill, then once per decoded token. A prompt with
        several responses is prefilled once, but for its last token, which every row runs. Executed:
        every row is padded to the longest prompt and stays in the batch until its stretch of tokens
        ends or all rows have ended.
        """
        lengths = _Lengths(reads)
        # tokens of the prompt that every row runs itself, and those that run once for all rows
        repeated = int(lengths.is_shared)
        width = lengths.width - repeated
        together = shape.linear(width) + shape.rectangle(width)
        each = shape.linear(repeated) + shape.rectangle(repeated, width) + shape.output(1)
        self.add(
            prefill,
            _prefill(shape, lengths, repeated),
            len(lengths.prompts) * together + len(lengths.rows) * each,
        )
        self.add(decode, _decode(shape, lengths), _decode_in_stretches(shape, lengths))

    def forward(
        self,
        phase: str,
        shape: Shape,
        reads: Reads,
        taught: float | None = None,
        passes: Passes = FORWARD,
    ) -> None:
        """Add a forward pass over prompts and responses, with the head on the taught rows.

        The last token of a response does not run. A prompt with several responses runs once.
        ``taught``: rows that the head projects; None: one for every response token.
        """
        lengths = _Lengths(reads)
        useful_tokens, executed_tokens = linear_tokens(reads)
        if taught is None:
            taught = sum(lengths.responses)
        output = shape.output(taught)
        useful_saved = executed_saved = 0.0
        if passes.count == 3:
            useful_saved = shape.saved(useful_tokens, taught)
            executed_saved = shape.saved(executed_tokens, taught)
        layers = shape.linear(useful_tokens) + _causal(shape, lengths)
        useful = passes.count * (layers + output) - useful_saved
        layers = shape.linear(executed_tokens) + _rectangles(shape, lengths)
        executed = (passes.count + passes.recomputed) * layers + passes.count * output
        self.add(phase, useful, executed - executed_saved)


class _Lengths:
    """The lengths of what a model runs.

    ``prompts``: of every prompt that runs; ``rows``: (prompt, response) of every response.
    """

    def __init__(self, reads: Reads) -> None:
        self.prompts: list[int] = []
        self.responses: list[int] = []
        self.rows: list[tuple[int, int]] = []
        for prompt, responses in reads:
            self.prompts.append(prompt)
            self.responses += responses
            for response in responses:
                self.rows.append((prompt, response))
        self.width = max(self.prompts)
        self.longest = max(self.responses)
        self.is_shared = len(self.rows) > len(self.prompts)

    @property
    def longest_row(self) -> int:
        """Return the longest prompt and response, without its last token, which does not run."""
        return max(prompt + response - 1 for prompt, response in self.rows)


def _prefill(shape: Shape, lengths: _Lengths, repeated: int) -> float:
    """Return the useful FLOPs of a prefill.

    Every row runs the last ``repeated`` tokens of its prompt and the head.
    """
    prompts = rows = 0.0
    for prompt in lengths.prompts:
        prompts += shape.linear(prompt - repeated) + shape.causal(0, prompt - repeated)
    for prompt, _ in lengths.rows:
        rows += shape.linear(repeated) + shape.causal(prompt - repeated, repeated) + shape.output(1)
        rows += repeated * shape.expansion(prompt - repeated)
    return prompts + rows


def _decode(shape: Shape, lengths: _Lengths) -> float:
    """Return the useful FLOPs of all decoded tokens; the prefill gives the first one."""
    flops = 0.0
    for prompt, response in lengths.rows:
        read = response - 1
        flops += shape.linear(read) + shape.output(read) + shape.causal(prompt, read)
        for past in range(prompt, prompt + read):  # every token is a pass of its own
            flops += shape.expansion(past)
    return flops


def _decode_in_stretches(shape: Shape, lengths: _Lengths) -> float:
    """Return the executed FLOPs of decoding."""
    flops = 0.0
    for step in range(1, lengths.longest):
        start = 0
        if shape.stretch is not None:
            start = step - step % shape.stretch
        running = sum(response > start for response in lengths.responses)
        keys = lengths.width + step - 1
        flops += running * (shape.linear(1) + shape.output(1) + shape.rectangle(1, keys))
    return flops


def _causal(shape: Shape, lengths: _Lengths) -> float:
    """Return the useful attention FLOPs of a forward pass."""
    prompts = rows = 0.0
    for prompt in lengths.prompts:
        prompts += shape.causal(0, prompt)
    for prompt, response in lengths.rows:
        rows += shape.causal(prompt, response - 1)
        if lengths.is_shared and response > 1:
            rows += shape.expansion(prompt)
    return prompts + rows


def _rectangles(shape: Shape, lengths: _Lengths) -> float:
    """Return the executed attention FLOPs of a forward pass."""
    count = len(lengths.rows)
    if not lengths.is_shared:
        return count * shape.rectangle(lengths.longest_row)
    prompts = len(lengths.prompts) * shape.rectangle(lengths.width)
    return prompts + count * shape.rectangle(lengths.longest - 1, lengths.width)


def linear_tokens(reads: Reads) -> tuple[int, int]:
    """Return the tokens that a forward pass's linear layers need, and run with padding."""
    lengths = _Lengths(reads)
    count = len(lengths.rows)
    useful = sum(lengths.prompts) + sum(lengths.responses) - count
    if not lengths.is_shared:
        return useful, count * lengths.longest_row
    return useful, len(lengths.prompts) * lengths.width + count * (lengths.longest - 1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rollouts of a step.

    ``prompts``: their lengths for (student, teacher); ``samples`` rollouts each, all of
    ``response`` tokens (a mean, rounded). ``behind``: responses per forward pass over their prompt
    in generation, scoring and training.
    """

    prompts: Sequence[tuple[int, int]]
    samples: int
    response: float
    behind: tuple[int, int, int]

    def reads(self, side: int, phase: int, response: int) -> Reads:
        """Return what the model ``side`` runs in a phase if responses have ``response`` tokens."""
        each = min(self.behind[phase], self.samples)
        reads = []
        for lengths in self.prompts:
            for start in range(0, self.samples, each):
                count = min(each, self.samples - start)
                reads.append((lengths[side], [response] * count))
        return reads


def update_ledger(
    student: Shape,
    teacher: Shape,
    batch: Batch,
    teacher_tokens: float = 1.0,
    heads: tuple[float, float] = (1.0, 1.0),
) -> Ledger:
    """Return the FLOPs of one step: generation, scoring, training.

    Across tokenizers a student token corresponds to ``teacher_tokens`` teacher tokens on average,
    and the loss uses the shares ``heads`` of both heads.
    """
    ledger = Ledger()
    ours = max(1, round(batch.response))
    theirs = max(1, round(batch.response * teacher_tokens))
    rollouts = len(batch.prompts) * batch.samples
    ledger.generation(student, batch.reads(0, 0, ours))
    scored = rollouts * theirs * heads[1]
    ledger.forward("teacher_score", teacher, batch.reads(1, 1, theirs), taught=scored)
    taught = rollouts * ours * heads[0]
    training = batch.reads(0, 2, ours)
    ledger.forward("student_update", student, training, taught=taught, passes=Passes(count=3))
    return ledger
