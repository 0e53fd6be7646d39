"""The settings and lengths that determine the memory of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import SELF, Adapter, Config, parse_divergence, parse_estimator
from ..engine.rollout import Rollout
from ..maths.divergence import Terms

Settings = tuple[torch.dtype, Adapter | None, bool]  # a network: dtype, adapter, recomputes


@dataclass(frozen=True)
class Case:
    """What sets the memory of one rank. ``prompts``: (student's, teacher's) lengths of the prompts
    of an update; ``prefix`` and ``limit``: longest rollout in training and in evaluation;
    ``problems``: answers of an evaluation; ``contexts``: its rollouts that both models read;
    ``own``: the teacher is the student's initial weights; ``averaged``: it follows the student, in
    float32; ``apart``: it has a device of its own; ``text``: it writes rollouts."""

    terms: Terms
    dtype: torch.dtype
    prompts: tuple[tuple[int, int], ...]
    samples: int
    prefix: int
    limit: int
    micro: int
    rows: int
    problems: int = 0
    contexts: int = 0
    adapter: Adapter | None = None
    recomputes: bool = False
    own: bool = False
    averaged: bool = False
    apart: bool = False
    text: bool = False
    support: int | None = None

    def rollouts(
        self,
        length: int,
        prompts: Sequence[tuple[int, int]] | None = None,
        samples: int | None = None,
    ) -> list[Rollout]:
        """An update's rollouts, each of ``length`` tokens; prompts that differ in their ids."""
        response = (0,) * length
        return [
            Rollout(i, s, (i,) * p, (i,) * t, response, response, False)
            for i, (p, t) in enumerate(prompts or self.prompts)
            for s in range(samples or self.samples)
        ]

    @property
    def trained_dtype(self) -> torch.dtype:
        """Return the dtype of the student's weights: float32 if all of them train."""
        return torch.float32 if self.adapter is None else self.dtype

    @property
    def student(self) -> Settings:
        """Return the settings of the student when loaded and evaluated."""
        return self.trained_dtype, self.adapter, False

    @property
    def training(self) -> Settings:
        """Return the settings of the student in an update."""
        return self.trained_dtype, self.adapter, self.recomputes

    @property
    def decoding(self) -> Settings:
        """Return the settings of the student when it samples."""
        return self.dtype, self.adapter, False

    @property
    def teacher(self) -> Settings:
        """Return the settings of the teacher in every phase."""
        return torch.float32 if self.averaged else self.dtype, None, False

    @property
    def autocast(self) -> bool:
        return self.dtype == torch.bfloat16


def terms(config: Config, head_dtype: torch.dtype) -> Terms:
    """The loss that a config asks for."""
    wanted = config.divergence
    name, parameters = parse_divergence(wanted.name)
    estimator, top_k = parse_estimator(wanted.estimator)
    return Terms(
        name,
        parameters,
        wanted.temperature,
        head_dtype,
        config.runtime.head_memory_mb << 20,
        top_k,
        estimator == "sampled",
        wanted.clip,
    )


def case(  # noqa: PLR0913  a plan has no Run that holds these
    config: Config,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    prompts: Sequence[tuple[int, int]],
    prefix: int,
    limit: int,
    world: int = 1,
    support: int | None = None,
) -> Case:
    """The ``Case`` of a config. ``prompts``: (student's, teacher's) lengths, of which an update is
    made of the longest; ``prefix``: the longest of the run; ``world``: ranks that share the update.
    """
    share = -(-config.train.batch_size // world)
    longest = sorted(prompts, key=sum, reverse=True)[:share]
    return Case(
        terms(config, head_dtype),
        dtype,
        tuple(longest[i % len(longest)] for i in range(share)),
        config.rollout.samples,
        prefix,
        limit,
        config.train.micro_batch_size,
        config.rollout.rows,
        -(-config.evaluate.problems * config.evaluate.rollouts // world),
        -(-config.evaluate.kl_prompts // world),
        config.adapter if config.adapter.rank else None,
        config.train.gradient_checkpointing,
        config.models.teacher == SELF,
        config.models.teacher_ema is not None,
        config.runtime.teacher_device not in (None, config.runtime.device),
        config.rollout.off_policy != "none",
        support,
    )
