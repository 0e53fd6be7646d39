"""Divergences and prefix schedules that a user's module registers: adapters, and checks before use.

A module that ``--plugin`` loads calls ``register_divergence`` or ``register_schedule``, usually as
decorators. Both are exported by ``prefix_distill``.
"""

import functools
import inspect
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .formulas import AUTOGRAD_TABLES, DIVERGENCES, Divergence
from .registry import describe_error
from .schedule import SCHEDULES, PrefixSchedule, Request, State

if TYPE_CHECKING:
    from torch import Tensor

PROBED_ROWS = (5, 1)  # rows of the random tables on which a divergence is tried
PROBED_COLUMNS = 7

F = TypeVar("F", bound=Callable[..., Any])


def register_divergence(
    name: str,
    *,
    gradient: "Callable[..., Tensor] | None" = None,
    tables: int = AUTOGRAD_TABLES,
) -> Callable[[F], F]:
    """Return a decorator that registers a function as ``--divergence NAME[:number…]``.

    The function is called as ``value(student_logp, teacher_logp, *numbers)`` with float32
    log-probabilities [N, V] of both models and returns the divergence of every row, [N], in nats.
    It runs on one chunk of tokens at a time and must not change its inputs. ``gradient``, called
    with the same arguments, returns the gradient with respect to the student's logits, [N, V];
    without it, autograd computes the gradient inside the chunk. ``tables``: how many float32 tables
    [N, V] the function keeps alive; the number of rows in a chunk follows from it.

    UserError: the name is invalid or taken.
    """

    def register(value: F) -> F:
        check = functools.partial(_check_divergence, name)
        entry = Divergence(value=value, gradient=gradient, tables=tables, check=check)
        DIVERGENCES.add(name, entry)
        return value

    return register


def register_schedule(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a function or class as ``--prefix NAME[:text…]``.

    It is called as ``make(arguments, limit)`` with the texts behind the name and the longest
    response in tokens. It returns a function ``step → tokens``, or an object with
    ``length(step)``. Steps count from 0; lengths are cut to 1 … ``limit``. An object that also has
    ``observe(step, state, signal, reached)`` is called as ``length(step, state)`` instead; see
    ``PrefixSchedule.observe``. ``state`` is saved in every checkpoint, so it holds JSON values.

    UserError: the name is invalid or taken.
    """

    def register(make: F) -> F:
        SCHEDULES.add(name, functools.partial(_build_schedule, name, make))
        return make

    return register


def _check_divergence(name: str, text: str, parameters: tuple[float, ...]) -> None:
    """Raise UserError unless a registered divergence works on small random tables."""
    divergence = DIVERGENCES.find(name)
    if divergence is None:
        return
    source = DIVERGENCES.source(name)
    try:
        for rows in PROBED_ROWS:
            _try_divergence(divergence, parameters, rows)
    except _WrongResult as wrong:
        code = inspect.unwrap(wrong.function).__code__
        raise UserError(
            f"divergence '{text}': {source}, line {code.co_firstlineno}: {wrong}"
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also exit
        raise UserError(f"divergence '{text}': {describe_error(error, source)}") from None


class _WrongResult(Exception):
    """A user's function returned something else than it should."""

    def __init__(self, function: Callable[..., Any], message: str) -> None:
        super().__init__(f"{function.__name__} {message}")
        self.function = function


def _try_divergence(divergence: Divergence, parameters: tuple[float, ...], rows: int) -> None:
    """Call the user's functions on random tables; raise _WrongResult if a result is wrong."""
    import torch

    from .divergence import differentiate

    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(2, rows, PROBED_COLUMNS, generator=generator)
    student_logp, teacher_logp = torch.log_softmax(logits, -1)
    tables = student_logp.clone(), teacher_logp.clone()
    if divergence.gradient is None:
        tables[0].requires_grad_(True)
    with torch.enable_grad():
        value = divergence.value(*tables, *parameters)
    _check_result(divergence.value, value, (rows,))
    if divergence.gradient is not None:
        gradient = divergence.gradient(*tables, *parameters)
        _check_result(divergence.gradient, gradient, student_logp.shape)
    elif value.requires_grad:
        _, gradient = differentiate(divergence, parameters, student_logp.clone(), tables[1])
        _check_result(divergence.value, gradient, student_logp.shape, "a gradient")
    else:
        raise _WrongResult(
            divergence.value,
            "returned values that autograd cannot follow; compute them from student_logp with "
            "torch, or give a gradient",
        )
    if not torch.equal(tables[0], student_logp) or not torch.equal(tables[1], teacher_logp):
        raise _WrongResult(divergence.value, "or its gradient changed its inputs; work on copies")


def _check_result(
    function: Callable[..., Any], result: Any, shape: tuple[int, ...], what: str = "a tensor"
) -> None:
    """Raise _WrongResult unless ``result`` is a finite tensor of floats of this shape."""
    import torch

    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        raise _WrongResult(
            function, f"returned {type(result).__name__}; expected a tensor of floats"
        )
    if result.shape != shape:
        raise _WrongResult(
            function,
            f"returned {what} of shape {list(result.shape)} for log-probabilities of shape "
            f"{[shape[0], PROBED_COLUMNS]}; expected {list(shape)}",
        )
    if not result.isfinite().all():
        raise _WrongResult(function, f"returned {what} that is not finite on a random table")


@dataclass(frozen=True, kw_only=True)
class Registered(PrefixSchedule):
    """A prefix schedule of a user's module.

    ``rule``: what the module made for ``text`` (``register_schedule``); ``source``: the module, for
    messages.
    """

    rule: Any
    source: str

    @property
    def has_state(self) -> bool:
        """Return whether the length depends on what the updates measured."""
        return hasattr(self.rule, "observe")

    def length(self, step: int, state: State | None = None) -> int:
        if self.has_state:
            tokens = self.rule.length(step, dict(state or {}))
        else:
            tokens = getattr(self.rule, "length", self.rule)(step)
        try:
            whole = operator.index(tokens)
        except TypeError:
            raise UserError(
                f"prefix '{self.text}': {self.source}: the length of step {step} is {tokens!r}; "
                "return a whole number of tokens"
            ) from None
        return max(1, min(whole, self.limit))

    def longest(self, steps: int) -> int:
        if self.has_state:
            return self.limit
        return max(self.length(step) for step in range(max(1, steps)))

    def observe(self, step: int, state: State, signal: float | None, reached: float) -> str | None:
        if not self.has_state:
            return None
        reason = self.rule.observe(step, state, signal, reached)
        self._check_state(state)
        if reason is None:
            return None
        return str(reason)

    def _check_state(self, state: State) -> None:
        """Raise UserError unless a checkpoint can hold ``state`` and return it unchanged."""
        try:
            same = json.loads(json.dumps(state)) == state
        except (TypeError, ValueError):
            same = False
        window = state.get("window", 0)
        if not same or type(window) is not int or window < 0:
            raise UserError(
                f"prefix '{self.text}': {self.source}: observe left the state "
                f"{repr(state)[:200]}; use JSON values with text as keys, lists for tuples, and a "
                "position of at least 0 for 'window'"
            )


def _build_schedule(
    name: str, make: Callable[[tuple[str, ...], int], Any], request: Request
) -> PrefixSchedule:
    """Make a registered schedule and try its first two lengths. UserError: one of them fails."""
    source = SCHEDULES.source(name)
    try:
        rule = make(request.parts, request.limit)
        if not callable(getattr(rule, "length", rule)):
            raise UserError(
                f"expected a function of the step, or an object with length(step), got {rule!r:.80}"
            )
        schedule = Registered(text=request.text, limit=request.limit, rule=rule, source=source)
        schedule.length(0)
        schedule.length(1)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also exit
        if isinstance(error, UserError) and str(error).startswith("prefix '"):
            raise
        raise UserError(f"prefix '{request.text}': {describe_error(error, source)}") from None
    return schedule
