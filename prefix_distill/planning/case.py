"""The settings and lengths that determine the memory of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..config import SELF, Adapter, Config
from ..engine.memory import read_batch_sizes
from ..engine.rollout import Rollout, rollout_of
from ..maths.divergence import Terms
from ..training.prepare import read_loss

Ids = tuple[int, ...]
PromptLengths = tuple[int, int]  # tokens of a prompt: the student's, the teacher's


class Network(NamedTuple):
    """How a network is loaded. ``recomputes``: with gradient checkpointing.

    ``copied_in``: the dtype of its working copy (engine/masters.py); None: there is none.
    """

    dtype: torch.dtype
    adapter: Adapter | None = None
    recomputes: bool = False
    copied_in: torch.dtype | None = None


class Dtypes(NamedTuple):
    """The dtype of the networks, and that of the output heads in the loss."""

    compute: torch.dtype
    head: torch.dtype


class Lengths(NamedTuple):
    """Lengths in tokens. ``prefix``: the longest rollout in training; ``limit``: in evaluation."""

    prompts: Sequence[PromptLengths]
    prefix: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """The settings and lengths that determine the memory of one rank.

    ``prompts``: the prompts of a step; ``prefix`` and ``limit``: the longest rollout in training
    and in evaluation; ``micro_batch``: rollouts in one forward pass; ``rows``: responses sampled
    together; ``answers``: responses sampled in an evaluation; ``compared``: responses of an
    evaluation on which both models are compared; ``support``: ids that both models have;
    ``packs_weights``: the sampler keeps its weights in another layout as well (engine/packing.py).

    Of the teacher: ``starts_as_student``: it has the student's initial weights; ``follows_student``
    (--teacher-ema): its weights are an average in float32; ``has_own_device``: it is not on the
    student's device; ``samples_text`` (--off-policy): it writes rollouts.
    """

    terms: Terms
    dtype: torch.dtype
    prompts: tuple[PromptLengths, ...]
    samples: int
    prefix: int
    limit: int
    micro_batch: int
    rows: int
    answers: int = 0
    compared: int = 0
    adapter: Adapter | None = None
    recomputes: bool = False
    starts_as_student: bool = False
    follows_student: bool = False
    has_own_device: bool = False
    samples_text: bool = False
    support: int | None = None
    packs_weights: bool = False

    def update(self) -> list[Rollout]:
        """Return the rollouts of a step, each as long as the prefix."""
        return make_rollouts(self.prompts, self.samples, self.prefix)

    @property
    def student(self) -> Network:
        """Return the student as it samples and is evaluated: in float32 if all weights train."""
        if self.adapter is None:
            return Network(torch.float32, copied_in=self.dtype)
        return Network(self.dtype, self.adapter)

    @property
    def training(self) -> Network:
        """Return the student in a step."""
        return self.student._replace(recomputes=self.recomputes)

    @property
    def teacher(self) -> Network:
        """Return the teacher, the same in every phase."""
        if self.follows_student:
            return Network(torch.float32)
        return Network(self.dtype)

    @property
    def autocast(self) -> bool:
        """Return whether forward passes run in bfloat16 by autocast."""
        return self.dtype == torch.bfloat16


def make_rollouts(prompts: Sequence[PromptLengths], samples: int, response: int) -> list[Rollout]:
    """Return ``samples`` rollouts of ``response`` tokens for every prompt.

    The ids have no meaning, but prompts differ in them, so that no two prompts count as one.
    """
    rollouts = []
    for slot, (student, teacher) in enumerate(prompts):
        response_ids = (0,) * response
        first = rollout_of(slot, (slot,) * student, response_ids, teacher_prompt=(slot,) * teacher)
        for sample in range(samples):
            rollouts.append(replace(first, sample=sample))
    return rollouts


def choose_adapter(config: Config) -> Adapter | None:
    """Return the LoRA adapter that trains, or None if all weights train."""
    if config.adapter.rank:
        return config.adapter
    return None


def describe_adapter(adapter: Adapter | None) -> str:
    """Return what trains: all weights, or LoRA of some rank."""
    if adapter is None or not adapter.rank:
        return "all weights"
    return f"LoRA of rank {adapter.rank}"


def build_case(
    config: Config, dtypes: Dtypes, lengths: Lengths, support: int | None, ranks: int = 1
) -> Case:
    """Return the ``Case`` of one of ``ranks`` ranks.

    A step has the longest of ``lengths.prompts``, repeated if there are too few.
    """
    # The rank with the most prompts determines the memory.
    size = _divide_up(config.train.batch_size, ranks)
    batch_sizes = read_batch_sizes(config)
    longest = sorted(lengths.prompts, key=sum, reverse=True)[:size]
    repeats = _divide_up(size, len(longest))
    return Case(
        terms=read_loss(config, dtypes.head),
        dtype=dtypes.compute,
        prompts=tuple((longest * repeats)[:size]),
        samples=config.rollout.samples,
        prefix=lengths.prefix,
        limit=lengths.limit,
        micro_batch=batch_sizes.micro_batch_size,
        rows=batch_sizes.rows,
        answers=_divide_up(config.evaluate.problems * config.evaluate.rollouts, ranks),
        compared=_divide_up(config.evaluate.kl_prompts, ranks),
        adapter=choose_adapter(config),
        recomputes=config.train.gradient_checkpointing,
        starts_as_student=config.models.teacher == SELF,
        follows_student=config.models.teacher_ema is not None,
        has_own_device=config.runtime.teacher_device not in (None, config.runtime.device),
        samples_text=config.rollout.off_policy != "none",
        support=support,
    )


def _divide_up(number: int, parts: int) -> int:
    """Return ``number`` / ``parts``, rounded up."""
    return -(-number // parts)
