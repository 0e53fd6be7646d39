"""The parts of a run that need memory, each measured on a network of ghosts.

Equal parts need equal memory, so that a part is the key of its own measurement.
"""

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..engine.masters import Masters
from ..engine.rollout import Rollout, Side
from ..maths.divergence import Head
from . import measuring
from .measuring import Generation, MicroBatch

Bytes = dict[str, float]  # by phase or component
# of every rollout: its slot, and the lengths of both prompts and of the response
Sizes = tuple[tuple[int, int, int, int], ...]


class Part(Hashable, Protocol):
    """What a network does, and how much memory that takes."""

    def measure(self, network: Masters) -> Bytes:
        """Return the bytes of the part on ``network``, by what they are used for."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a network."""

    def measure(self, network: Masters) -> Bytes:
        """Return the bytes of all weights and of their copy, and the number of those that train."""
        return measuring.measure_weights(network)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A forward pass without gradient. ``sizes``: those of the rollouts that have ``sides``."""

    sizes: Sizes
    autocast: bool
    sides: list[Side] = field(compare=False)

    def measure(self, network: Masters) -> Bytes:
        """Return the peak bytes, and the bytes of the hidden rows."""
        return measuring.measure_forward(network.student, self.sides, self.autocast)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The forward and backward pass of a micro-batch. ``sizes``: those of its rollouts."""

    sizes: Sizes
    support: int | None
    work: MicroBatch
    teacher_head: Head = field(compare=False)

    def measure(self, network: Masters) -> Bytes:
        """Return the peak bytes of each phase, and those at the end."""
        network = copy.copy(network)
        network.student = replace(network.student, support=self.support)
        return measuring.measure_update(network, self.teacher_head, self.work)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A call of ``generate``."""

    support: int | None
    work: Generation

    def measure(self, network: Masters) -> Bytes:
        """Return the peak bytes of the prefill and of the last token."""
        model = replace(network.sampler, support=self.support)
        return measuring.measure_generation(model, self.work)


def describe_sizes(group: list[Rollout]) -> Sizes:
    """Return what of a group of rollouts determines its memory."""
    sizes = []
    for r in group:
        sizes.append((r.slot, len(r.student_prompt), len(r.teacher_prompt), len(r.ids)))
    return tuple(sizes)
