"""Everything the loop works with."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch

from .. import config as configuration
from ..config import Config
from ..engine import scoring
from ..engine.alignment import Alignment
from ..engine.device import out_of_memory
from ..engine.models import Model
from ..engine.ranks import Place
from ..engine.rollout import Rollout
from ..engine.sampling import Sampler
from ..errors import MemoryShortage
from ..maths import flops
from ..maths.divergence import Terms
from ..maths.flops import Batch, Ledger, Shape
from ..maths.schedule import OffPolicy, PrefixSchedule
from ..maths.simct import Support
from ..maths.weights import PositionWeight, Selection, Window
from ..prompts.prompt import Rendered

T = TypeVar("T")


def settled(value: T | None, name: str) -> T:
    """Return ``value``, which has no default but is set before a run starts. ValueError: it is
    None."""
    if value is None:
        raise ValueError(f"{name} is None: expected a value before the run starts")
    return value


@dataclass(frozen=True)
class Check:
    """One question. ``status``: ok, warning or error; ``found``: the answer in words; ``facts``:
    in numbers."""

    name: str
    status: str
    found: str
    facts: dict = field(default_factory=dict)


def describe_checks(checks: list[Check]) -> dict:
    """As JSON: {ok, checks}."""
    return {
        "ok": not any(check.status == "error" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


@dataclass
class Run:
    """Everything the loop works with. ``notes``: automatic choices with their reasons;
    ``warnings``: what may go wrong. ``text_terms`` and ``text_sampler``: the loss on, and the
    sampling of, responses that the teacher writes. ``say``: where ``halve`` is told. ``fitted``:
    what it has set, for the checkpoint. ``extrapolation_prompts``: the fixed ones on which
    candidates are scored ([] where none is). ``alignment`` and ``shared``: where the tokenizers
    differ, how texts are aligned and which tokens both models share; ``teacher_tokens``: how many
    of the teacher's make one of the student's, in the prompts' text. ``tokenizers``: how the
    vocabularies compare; ``checks``: what the models answered (``Check``), if they were
    asked."""

    config: Config
    place: Place
    student: Model
    teacher: Model
    alignment: Alignment | None
    shared: Support | None
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
    train_prompts: list[Rendered]
    kl_prompts: list[Rendered]
    extrapolation_prompts: list[Rendered]
    problems: list[tuple]
    answer_format: str
    student_shape: Shape
    teacher_shape: Shape
    notes: list[str]
    warnings: list[str]
    tokenizers: str = ""
    teacher_tokens: float = 1.0
    checks: list = dataclasses.field(default_factory=list)
    say: Callable[[str], None] = lambda text: None
    fitted: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def max_new_tokens(self) -> int:
        """Return the longest response in tokens."""
        return settled(self.config.rollout.max_new_tokens, "--max-new-tokens")

    def fit(self, what: str, ledger: Ledger, work: Callable[[Ledger], T]) -> T:
        """``work(ledger)`` of this rank; where memory runs out, again with half of ``what`` (see
        ``halve``) until it fits."""
        while True:
            spent = Ledger()
            try:
                found = work(spent)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            else:
                ledger.merge(spent)
                return found
            ledger.waste(spent)
            self.halve(what)

    def attempt(self, ledger: Ledger, work: Callable[[Ledger], T]) -> T | None:
        """``work(ledger)`` of every rank. Where one runs out of memory: None, and half the
        micro-batch for all from now on."""
        spent, enough = Ledger(), True
        found: T | None = None
        try:
            found = work(spent)
        except Exception as error:
            if not out_of_memory(error):
                raise
            enough = False
        if all(self.place.gather(enough)):
            ledger.merge(spent)
            return found
        del found
        ledger.waste(spent)
        self.halve("micro_batch_size")
        return None

    def halve(self, what: str) -> None:
        """Half as many rollouts at once from now on, in training (``micro_batch_size``) or in
        generation (``rows``). The mathematics stays. MemoryShortage when it was one."""
        section, flag = {
            "micro_batch_size": ("train", "--micro-batch-size"),
            "rows": ("rollout", "--generation-rows"),
        }[what]
        place = self.place.device
        size = getattr(getattr(self.config, section), what)
        if size == 1:
            raise MemoryShortage(
                f"rank {self.place.rank}: {place} has no memory for one rollout at a time; use "
                "--gradient-checkpointing, a lower --head-memory-mb, shorter answers (--prefix, "
                "--max-new-tokens) or a smaller model"
            )
        self.use(**{what: size // 2})
        self.say(
            f"rank {self.place.rank}: {place} ran out of memory; {flag} {size} becomes "
            f"{size // 2}, the mathematics stays the same"
        )
        if place.type in ("cuda", "mps"):
            getattr(torch, place.type).empty_cache()

    def use(self, **sizes: int) -> None:
        """Sets ``micro_batch_size`` and ``rows``; kept in ``fitted``."""
        self.fitted |= sizes
        for what, size in sizes.items():
            self.config = configuration.replace(
                self.config, **{"rollout" if what == "rows" else "train": {what: size}}
            )
        self.sampler, self.text_sampler, self.eval_sampler = (
            dataclasses.replace(sampler, rows=self.config.rollout.rows)
            for sampler in (self.sampler, self.text_sampler, self.eval_sampler)
        )

    def counts_both(self, ledger: Ledger, phase: str) -> Callable[[list[Rollout]], None]:
        """A function that adds one reading of a group of rollouts by student and teacher, heads
        included, to ``phase``."""

        def spent(group: list[Rollout]) -> None:
            for model, shape, teacher in (
                (self.student, self.student_shape, False),
                (self.teacher, self.teacher_shape, True),
            ):
                ledger.forward(
                    phase,
                    shape,
                    scoring.reads(group, model.reads_once, teacher=teacher),
                    taught=scoring.head_rows(model, group, self.shared, teacher, whole=True),
                )

        return spent

    def counts_generation(
        self, ledger: Ledger, phase: str
    ) -> Callable[[list[tuple[int, list[int]]]], None]:
        """Return a callback that adds the FLOPs of a batch of student responses to ``phase``."""
        return lambda reads: ledger.generation(self.student_shape, reads, phase, phase)

    def aligned(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The same rollouts with the teacher's tokens of their texts and the units, where the
        tokenizers differ."""
        return rollouts if self.alignment is None else [self.alignment.rollout(r) for r in rollouts]

    def update_cost(self, prompts: list[Rendered], response: float) -> float:
        """Useful FLOPs of an update on these prompts with responses of ``response`` tokens."""
        samples, micro = self.config.rollout.samples, self.config.train.micro_batch_size
        behind = (
            samples if self.student.shares_prompts else 1,
            micro if self.teacher.reads_once else 1,
            micro if self.student.reads_once else 1,
        )
        batch = Batch(
            prompts=[(len(p.student_ids), len(p.teacher_ids)) for p in prompts],
            samples=samples,
            response=response,
            behind=behind,
        )
        ledger = flops.update_ledger(
            self.student_shape,
            self.teacher_shape,
            batch,
            self.teacher_tokens,
            self._head_shares(),
        )
        return ledger.total()

    def _head_shares(self) -> tuple[float, float]:
        """Return the share of each head's rows that the loss compares; 1 for one tokenizer."""
        if self.shared is None:
            return 1.0, 1.0
        student = settled(self.student.support, "the student's support")
        teacher = settled(self.teacher.support, "the teacher's support")
        return len(self.shared.student) / student, len(self.shared.teacher) / teacher
