"""Find out, by measuring, whether a prompt can run once for several responses.

A shared prompt must change no more than a padded batch changes on the same rows, which is rounding.
Every comparison computes three responses to two prompts: one by one, padded, and after shared
prompts. Shapes: N hidden rows of all responses together, D their width.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import DynamicLayer

from .device import is_out_of_memory
from .models import Model
from .rollout import Side
from .scoring import hidden_rows, to_device
from .text_ids import text_ids, text_of
from .trace import describe_failure

# relative changes up to FLOOR are rounding even if a padded batch changes nothing; those above
# CEILING are none, whatever a padded batch changes
FLOOR = 1e-5
FLOOR_OF_HALF_PRECISION = 0.03
CEILING = 1e-3
CEILING_OF_HALF_PRECISION = 0.1
# the same for gradients, which add the rounding of all tokens
GRADIENT_FLOOR = 1e-4
GRADIENT_FLOOR_OF_HALF_PRECISION = 0.1
GRADIENT_CEILING = 1e-2
GRADIENT_CEILING_OF_HALF_PRECISION = 0.3
TIMES_NOISE = 2.0

LONGEST_PROMPT = 48  # tokens of a prompt that are read, to bound time and memory
SHORTER = 5  # tokens by which one of the two prompts is shorter, so that it is padded
RESPONSES = (9, 16, 12)  # lengths in tokens: two after the shorter prompt, one after the other
SHORT = 2  # tokens of responses of which one is read, as in a decoding step
LONG = 67  # tokens of responses that a recurrent layer reads in more than one chunk of 64
OFFSET = 5  # tokens of text between the starts of two responses

Forward = Callable[[], torch.Tensor]  # returns the hidden rows [N, D] of all sides
Values = list[torch.Tensor]
Computation = Callable[[Model, Forward], Values]
Measure = Callable[[Model, Values, Values], float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much a shared prompt changes ``what``, relative to its norm.

    ``noise``: how much a padded batch changes it; ``allowed``: the largest change that counts as
    rounding. ``failure``: why nothing was computed after a shared prompt, or None.
    """

    what: str
    change: float
    noise: float
    allowed: float
    failure: str | None = None

    @property
    def is_exact(self) -> bool:
        """Return whether the change is rounding."""
        return self.failure is None and self.change <= self.allowed

    @property
    def reason(self) -> str:
        """Return what was measured, in words."""
        if self.failure is not None:
            return f"{self.what} after a shared prompt cannot be computed ({self.failure})"
        text = f"{self.what} change by {self.change:.1g} of their norm"
        if not self.is_exact:
            text += f", expected at most {self.allowed:.1g}"
        return f"{text} (in a padded batch by {self.noise:.1g})"

    @property
    def facts(self) -> dict[str, float | bool | str]:
        """Return what was measured, in numbers."""
        facts: dict[str, float | bool | str] = {"exact": self.is_exact}
        if self.failure is not None:
            return facts | {"failure": self.failure}
        return facts | {"change": self.change, "noise": self.noise, "allowed": self.allowed}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Where a model runs a prompt once for all its samples, and why.

    ``hidden``: the hidden states after a shared prompt; ``gradients``: the same of gradients, None
    if the model does not train on shared prompts. ``once`` and ``repeated``: the phases of a run
    in which the model runs a prompt once, and once per sample. ``obstacle``: why ``repeated``, if
    no measurement tells.
    """

    role: str
    hidden: Comparison
    gradients: Comparison | None
    once: tuple[str, ...]
    repeated: tuple[str, ...]
    obstacle: str | None = None

    @property
    def text(self) -> str:
        """Return the phases and the reason, in words."""
        parts = []
        if self.once:
            parts.append(f"once for all its samples in {' and '.join(self.once)}")
        if self.repeated:
            parts.append(f"once per sample in {' and '.join(self.repeated)}")
        reasons = [self.hidden.reason]
        if self.gradients is not None:
            reasons.append(self.gradients.reason)
        if self.obstacle is not None:
            reasons.append(self.obstacle)
        return f"the {self.role} runs a prompt {', '.join(parts)}: {'; '.join(reasons)}"

    @property
    def facts(self) -> dict[str, object]:
        """Return the phases and the measurements, as JSON values."""
        facts: dict[str, object] = {
            "once": list(self.once),
            "per_sample": list(self.repeated),
            "hidden_states": self.hidden.facts,
        }
        if self.gradients is not None:
            facts["gradients"] = self.gradients.facts
        return facts


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The smallest and the largest change that can count as rounding."""

    floor: float
    ceiling: float

    def allow(self, noise: float) -> float:
        """Return the largest change that counts as rounding beside this noise."""
        return min(self.ceiling, max(self.floor, TIMES_NOISE * noise))


def check_sharing(model: Model, prompts: list[tuple[int, ...]] | None = None) -> Comparison:
    """Compare hidden states after a shared prompt with those of single rows.

    ``prompts``: ids of a run's prompts; the default is plain text. The ids of the responses are
    text of the prompts. The precision is that of the caller's autocast context.
    """
    limits = Limits(
        floor=model.choose_tolerance(FLOOR, FLOOR_OF_HALF_PRECISION),
        ceiling=model.choose_tolerance(CEILING, CEILING_OF_HALF_PRECISION),
    )
    return _compare_all(model, prompts, _HIDDEN_STATES, limits=limits)


def check_shared_gradients(
    model: Model, prompts: list[tuple[int, ...]] | None = None
) -> Comparison:
    """Compare the gradients of all weights after a shared prompt with those of single rows."""
    limits = Limits(
        floor=model.choose_tolerance(GRADIENT_FLOOR, GRADIENT_FLOOR_OF_HALF_PRECISION),
        ceiling=model.choose_tolerance(GRADIENT_CEILING, GRADIENT_CEILING_OF_HALF_PRECISION),
    )
    return _compare_all(model, prompts, _GRADIENTS, limits=limits)


def make_sides(model: Model, prompts: list[tuple[int, ...]] | None) -> list[Side]:
    """Return three responses to two prompts of different lengths.

    The prompts are the starts of the longest and of the shortest of the given ones.
    """
    given = prompts or [tuple(text_ids(model, 12)), tuple(text_ids(model, 7))]
    starts = [prompt[: _count_prompt_tokens(model)] for prompt in given]
    long = max(starts, key=len)
    short = min(starts, key=len)
    short = short[: max(1, len(long) - SHORTER)]
    text = text_of(model, given, OFFSET * len(RESPONSES) + max(RESPONSES))
    sides = []
    for k, (prompt, count) in enumerate(zip((short, short, long), RESPONSES, strict=True)):
        ids = tuple(text[OFFSET * k : OFFSET * k + count])
        sides.append(Side(prompt=prompt, ids=ids, rows=tuple(range(count))))
    return sides


def make_groups(model: Model, prompts: list[tuple[int, ...]] | None) -> list[list[Side]]:
    """Return the sides of ``make_sides``, and the same with short and with long responses.

    A group is a micro-batch. Layers with a state of their own take another path for a single token
    and for more tokens than a chunk. Long responses end where the model's positions do.
    """
    sides = make_sides(model, prompts)
    longest = max(len(side.prompt) for side in sides)
    long = min([LONG, *(limit - longest for limit in _limits(model))])
    groups = [sides]
    for count in (SHORT, long):
        if count == SHORT or count > max(RESPONSES):
            text = text_of(model, [side.prompt for side in sides], OFFSET * len(sides) + count)
            groups.append(
                [
                    replace(side, ids=tuple(text[OFFSET * k :][:count]), rows=tuple(range(count)))
                    for k, side in enumerate(sides)
                ]
            )
    return groups


def _limits(model: Model) -> list[int]:
    """Return the numbers of tokens that no checked row may exceed."""
    return [limit for limit in (model.positions, model.rope_switch) if limit is not None]


def _count_prompt_tokens(model: Model) -> int:
    """Return how many tokens of a prompt are read, so that no row crosses a limit of positions."""
    return max(1, min([LONGEST_PROMPT, *(limit - max(RESPONSES) for limit in _limits(model))]))


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What is computed of groups of rows, and how two results are compared."""

    name: str
    compute: Computation
    measure: Measure


def _compare_all(
    model: Model, prompts: list[tuple[int, ...]] | None, result: _Result, limits: Limits
) -> Comparison:
    """Return the first comparison of a group that is not exact, else the one that changes most."""
    if not model.is_full_precision and _carries_state(model, prompts):
        return Comparison(
            what=result.name,
            change=float("nan"),
            noise=float("nan"),
            allowed=limits.floor,
            failure="in half precision, rounding would hide a lost recurrent state",
        )
    comparisons = []
    for sides in make_groups(model, prompts):
        comparison = _compare(model, sides, result, limits=limits)
        if not comparison.is_exact:
            return comparison
        comparisons.append(comparison)
    return max(comparisons, key=operator.attrgetter("change"))


@torch.no_grad()
def _carries_state(model: Model, prompts: list[tuple[int, ...]] | None) -> bool:
    """Return whether a layer's cache is a recurrent state, and not keys and values of tokens."""
    ids_BT = torch.tensor([make_sides(model, prompts)[0].prompt])
    ids_BT = to_device(ids_BT, model.device)
    try:
        _, cache = model.trunk_cached(ids_BT, torch.ones_like(ids_BT))
    except Exception as error:  # the comparison describes it
        if is_out_of_memory(error):
            raise
        return False
    layers = getattr(cache, "layers", None)
    return layers is None or not all(_keeps_tokens(layer) for layer in layers)


def _keeps_tokens(layer: object) -> bool:
    """Return whether a layer of a KV cache keeps nothing but keys and values of tokens."""
    # by name, because older versions of transformers lack these classes
    names = [kind.__name__ for kind in type(layer).__mro__]
    return isinstance(layer, DynamicLayer) and not any("LinearAttention" in n for n in names)


def _compare(model: Model, sides: list[Side], result: _Result, *, limits: Limits) -> Comparison:
    """Compare a result after a shared prompt with that of single rows."""
    model = replace(model, recomputes=False, trains_on_shared_prompts=True)
    alone = replace(model, shares_prompts=False)
    shared = replace(model, shares_prompts=True)
    noise = change = float("nan")
    failure = None
    try:
        expected = result.compute(model, functools.partial(_run_one_by_one, alone, sides))
        changes = []
        for forward in (
            functools.partial(hidden_rows, alone, sides),
            functools.partial(_run_padded_left, model, sides),
            functools.partial(hidden_rows, shared, sides),
        ):
            computed = result.compute(model, forward)
            changes.append(result.measure(model, expected, computed))
        noise, change = max(changes[:2]), changes[2]
        if not math.isfinite(change):
            failure = "they are not finite"
    except Exception as error:
        # an architecture may lack the cache, the mask or the positions, and may raise anything
        if is_out_of_memory(error):
            raise
        failure = describe_failure(model.net, error)
    return Comparison(
        what=result.name,
        change=change,
        noise=noise,
        allowed=limits.allow(noise),
        failure=failure,
    )


def _run_one_by_one(model: Model, sides: list[Side]) -> torch.Tensor:
    """Return the hidden rows [N, D] of sides that run alone."""
    return torch.cat([hidden_rows(model, [side]) for side in sides])


def _run_padded_left(model: Model, sides: list[Side]) -> torch.Tensor:
    """Return the hidden rows [N, D] of a batch that is padded on the left and masked."""
    rows = [side.prompt + side.read for side in sides]
    width = max(map(len, rows))
    ids_BT = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    hidden_BTD, _ = model.trunk_cached(
        to_device(ids_BT, model.device), to_device(mask_BT, model.device)
    )
    parts = []
    for hidden_TD, side in zip(hidden_BTD, sides, strict=True):
        count = len(side.ids)
        parts.append(hidden_TD[width - count : width])
    return torch.cat(parts)


@torch.no_grad()
def _compute_hidden(_: Model, forward: Forward) -> Values:
    """Return the hidden rows [N, D] in float32."""
    return [forward().float()]


def _measure_hidden(model: Model, expected: Values, computed: Values) -> float:
    """Return the relative change of hidden states: the largest one, or the median one.

    In half precision it is the median of all tokens, because rounding alone may send a single token
    to another expert. Tokens without any change are left out: they show that the same kernel ran on
    the same numbers, and not how much rounding changes.
    """
    [expected_ND], [computed_ND] = expected, computed
    size_N = expected_ND.norm(dim=-1).clamp_min(torch.finfo(expected_ND.dtype).tiny)
    change_N = (computed_ND - expected_ND).norm(dim=-1) / size_N
    if model.is_full_precision:
        return change_N.max().item()
    changed_N = change_N[change_N != 0]
    return changed_N.median().item() if len(changed_N) else 0.0  # NaN if one of them is


def _compute_gradients(model: Model, forward: Forward) -> Values:
    """Return the gradients of a fixed function of the rows for all weights that will train."""
    weights = _choose_weights(model)
    was_trained = [p.requires_grad for p in weights]
    for p in weights:
        p.requires_grad_(True)
    try:
        hidden_ND = forward().float()
        direction_D = torch.linspace(-1, 1, hidden_ND.shape[-1], device=hidden_ND.device)
        loss = (hidden_ND @ direction_D).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        for p, trained in zip(weights, was_trained, strict=True):
            p.requires_grad_(trained)
    # a weight without a gradient, such as that of an output layer, counts as 0
    return [torch.zeros(()) if g is None else g.float() for g in gradients]


def _choose_weights(model: Model) -> list[torch.nn.Parameter]:
    """Return those of the adapter, or all that a text token reaches."""
    if model.adapter is not None:
        return list(model.trainable.values())
    weights = []
    for name, p in model.net.named_parameters():
        if p.is_floating_point() and name not in model.unreached:
            weights.append(p)
    return weights


def _measure_gradients(_: Model, expected: Values, computed: Values) -> float:
    """Return the norm of the difference of all gradients over that of the expected ones."""
    difference = sum(
        (c - e).double().square().sum().item() for e, c in zip(expected, computed, strict=True)
    )
    size = sum(e.double().square().sum().item() for e in expected)
    return math.sqrt(difference / max(size, torch.finfo(torch.float32).tiny))


_HIDDEN_STATES = _Result(name="hidden states", compute=_compute_hidden, measure=_measure_hidden)
_GRADIENTS = _Result(name="gradients", compute=_compute_gradients, measure=_measure_gradients)
