"""Run: everything that a training run works with, fixed before its first step."""

import time
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from ..config import Config
from ..engine.evaluate import Evaluation, Problem
from ..engine.memory import MemoryLimits
from ..engine.pair import Pair
from ..engine.ranks import Place
from ..engine.sampling import Sampler
from ..engine.sharing import Sharing
from ..maths import flops
from ..maths.divergence import Terms
from ..maths.flops import Batch
from ..maths.schedule import OffPolicy, PrefixSchedule
from ..maths.weights import PositionWeight, Selection, Window
from ..prompts.grading import Grader
from ..prompts.prompt import Rendered

T = TypeVar("T")


def settled(value: T | None, name: str) -> T:
    """Return ``value``, which has no default but is set before a run starts.

    ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"{name} is None: expected a value before the run starts")
    return value


@dataclass(frozen=True, kw_only=True)
class Check:
    """The answer to one question about a run before it starts.

    ``status``: ok, warning or error; ``text``: the answer in words; ``facts``: in numbers.
    """

    name: str
    status: str
    text: str
    facts: dict = field(default_factory=dict)


def describe_checks(checks: list[Check]) -> dict:
    """Return the checks as JSON values: {ok, checks}; ``found`` is the text of a check."""
    documents = []
    for check in checks:
        documents.append(
            {
                "name": check.name,
                "status": check.status,
                "found": check.text,
                "facts": check.facts,
            }
        )
    return {"ok": not any(check.status == "error" for check in checks), "checks": documents}


@dataclass(kw_only=True)
class Notes:
    """What is reported before a run starts.

    ``lines``: automatic choices with their reasons; ``details``: those lines among them that only
    a developer needs; ``warnings``: what may go wrong; ``account``: how the rows of every dataset
    were read, in full.
    """

    lines: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    account: list[str] = field(default_factory=list)

    def note(self, *lines: str) -> None:
        """Add automatic choices with their reasons."""
        self.lines.extend(lines)

    def detail(self, *lines: str) -> None:
        """Add notes that are shown with --verbose, and recorded in any case."""
        self.lines.extend(lines)
        self.details.extend(lines)

    def warn(self, text: str) -> None:
        """Add a warning: what was measured, why it matters, what to do."""
        self.warnings.append(text)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The prompts of a run.

    ``train``: the prompts of the steps, in order; ``held_out``: the problems of an evaluation, and
    ``teacher_held_out`` the same ones in the teacher's prompt;
    ``kl``: the prompts of the fixed contexts on which the held-out KL is measured;
    ``extrapolation``: the fixed prompts on which EffOPD scores candidates, empty without it.
    ``grader``: how answers are graded; ``teacher_tokens``: the number of the teacher's
    tokens per token of the student's in the prompts' text, 1 if the tokenizers match; ``loaded``:
    a digest of each training set before the prompts are chosen from it, None of a streamed one.
    """

    train: list[Rendered]
    held_out: list[Problem]
    teacher_held_out: list[Problem]
    kl: list[Rendered]
    extrapolation: list[Rendered]
    grader: Grader
    teacher_tokens: float = 1.0
    loaded: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How rollouts are sampled, and how the loss is computed on them.

    ``prefix``: how long rollouts are; ``window``, ``selection``, ``position``: which tokens count,
    and how much; ``off_policy``: which rollouts the teacher samples. ``terms``: the loss;
    ``text_terms``: the loss on the teacher's text. ``sampler``, ``text_sampler`` and
    ``eval_sampler`` sample the student's rollouts, the teacher's text and the evaluations.
    """

    prefix: PrefixSchedule
    window: Window | None
    selection: Selection | None
    position: PositionWeight | None
    off_policy: OffPolicy | None
    terms: Terms
    text_terms: Terms
    sampler: Sampler
    text_sampler: Sampler
    eval_sampler: Sampler

    @property
    def teacher_eval_sampler(self) -> Sampler:
        """Return the sampler of an evaluation with the ids of the teacher."""
        ids = self.text_sampler
        return replace(self.eval_sampler, eos=ids.eos, support=ids.support, pad=ids.pad)

    @property
    def ranks_window(self) -> bool:
        """Return whether the window ranks tokens by a statistic."""
        return self.window is not None and self.window.statistic is not None

    @property
    def ranks_selection(self) -> bool:
        """Return whether the selection ranks tokens by a statistic."""
        return self.selection is not None and self.selection.ranks

    @property
    def needs_forward_kl(self) -> bool:
        """Return whether the selection needs the forward KL of every token."""
        return self.selection is not None and self.selection.kind == "overconfident"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a training run works with, fixed before its first step.

    ``limits`` is lowered when memory runs out. ``shared_prompts``: where each model runs a prompt
    once for all its samples. ``started``: when the run began to load its models,
    in seconds of the monotonic clock. ``checks``: the answers of the pre-flight checks, if
    they were made.
    """

    config: Config
    place: Place
    pair: Pair
    problems: Problems
    method: Method
    notes: Notes
    limits: MemoryLimits
    shared_prompts: tuple[Sharing, ...] = ()
    started: float = field(default_factory=time.monotonic)
    checks: list[Check] = field(default_factory=list)

    @property
    def max_new_tokens(self) -> int:
        """Return the longest response in tokens."""
        return settled(self.config.rollout.max_new_tokens, "--max-new-tokens")

    @property
    def save_dtype(self) -> torch.dtype | None:
        """Return the dtype of saved models; None: that of the student's weights."""
        name = self.config.checkpoint.dtype
        if name == "auto":
            return None
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def evaluation(self) -> Evaluation:
        """Return how held-out problems are sampled and graded."""
        return Evaluation(
            sampler=self.method.eval_sampler,
            samples=self.config.evaluate.rollouts,
            max_new_tokens=self.max_new_tokens,
            grader=self.problems.grader,
        )

    def update_cost(self, prompts: list[Rendered], response: float) -> float:
        """Return the useful FLOPs of a step on these prompts.

        ``response``: the mean length of the responses, in tokens.
        """
        pair, samples = self.pair, self.config.rollout.samples
        micro_batch = self.limits.micro_batch_size
        # responses per forward pass over their prompt: in generation, scoring and training
        responses_per_pass = (
            samples if pair.student.prefills_once else 1,
            micro_batch if pair.teacher.encodes_prompt_once else 1,
            micro_batch if pair.student.encodes_prompt_once else 1,
        )
        batch = Batch(
            prompts=[(len(p.student_ids), len(p.teacher_ids)) for p in prompts],
            samples=samples,
            response=response,
            behind=responses_per_pass,
        )
        ledger = flops.update_ledger(
            pair.student_shape,
            pair.teacher_shape,
            batch,
            teacher_tokens=self.problems.teacher_tokens,
            heads=pair.head_shares(),
        )
        return ledger.total()
