"""Divergences and prefix schedules that a user's module registers: adapters, and checks before use.

A module that ``--plugin`` loads calls ``register_divergence`` or ``register_schedule``, usually as
decorators. Both are exported by ``prefix_distill``.
"""

import functools
import json
import operator
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PluginError, UserError
from .formulas import AUTOGRAD_TABLES, DIVERGENCES, Divergence
from .registry import describe_error
from .schedule import SCHEDULES, PrefixSchedule, Request, State
from .user_functions import (
    WrongResult,
    check_arguments,
    check_callable,
    check_gradient,
    check_name,
    check_values,
    find_file,
    name_of,
)

if TYPE_CHECKING:
    from torch import Tensor

PROBED_ROWS = (5, 1)  # rows of the random tables on which a divergence is tried
PROBED_COLUMNS = 300  # a formula may use the 10 most likely tokens, so not a few

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

    UserError: the name is invalid or taken, or another argument is not as described.
    """
    check_name("register_divergence", name)
    if gradient is not None:
        check_callable(f"divergence {name!r}: gradient", gradient)
    if type(tables) is not int or tables < 1:
        raise UserError(
            f"divergence {name!r}: tables: expected a whole number of at least 1, got "
            f"{reprlib.repr(tables)}; give the number of float32 tables that it keeps alive"
        )

    def register(value: F) -> F:
        check_callable(f"divergence {name!r}", value)
        check = functools.partial(_check_divergence, name)
        entry = Divergence(value=value, gradient=gradient, tables=tables, check=check)
        DIVERGENCES.add(name, entry)
        return value

    return register


def register_schedule(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a function or class as ``--prefix NAME[:text…]``.

    It is called as ``make(arguments, limit)`` with the texts after the name and the longest
    response in tokens. It returns a function ``step → tokens``, or an object with
    ``length(step)``. Steps count from 0; lengths are cut to 1 … ``limit``. An object that also has
    ``observe(step, state, signal, reached)`` is called as ``length(step, state)`` instead; see
    ``PrefixSchedule.observe``. ``state`` is saved in every checkpoint, so it holds JSON values.

    UserError: the name is invalid or taken, or what it decorates is not callable.
    """
    check_name("register_schedule", name)

    def register(make: F) -> F:
        check_callable(f"prefix schedule {name!r}", make)
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
    except WrongResult as wrong:
        raise UserError(f"--divergence {text}: {wrong}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also exit
        reason = describe_error(error, find_file(divergence.value, source))
        raise UserError(f"--divergence {text}: {reason}") from None


def _try_divergence(divergence: Divergence, parameters: tuple[float, ...], rows: int) -> None:
    """Call the user's functions on random tables; raise WrongResult if a result is wrong."""
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
    check_values(divergence.value, value, student_logp)
    _check_finite(divergence.value, value, "a tensor")
    if divergence.gradient is not None:
        gradient = divergence.gradient(*tables, *parameters)
        check_gradient(divergence.gradient, gradient, student_logp)
        _check_finite(divergence.gradient, gradient, "a tensor")
    else:
        _, gradient = differentiate(
            divergence, parameters, student_logp=student_logp.clone(), teacher_logp=tables[1]
        )
        _check_finite(divergence.value, gradient, "a gradient")
    if not torch.equal(tables[0], student_logp) or not torch.equal(tables[1], teacher_logp):
        raise WrongResult(divergence.value, "or its gradient changed its inputs; work on copies")


def _check_finite(function: Callable[..., Any], result: "Tensor", what: str) -> None:
    """Raise WrongResult unless all numbers are finite."""
    if not result.isfinite().all():
        raise WrongResult(function, f"returned {what} that is not finite on a random table")


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
        """Return whether the length depends on what earlier steps measured."""
        return hasattr(self.rule, "observe")

    def length(self, step: int, state: State | None = None) -> int:
        if self.has_state:
            tokens = self.rule.length(step, dict(state or {}))
        else:
            tokens = getattr(self.rule, "length", self.rule)(step)
        try:
            whole = operator.index(tokens)
        except TypeError:
            raise PluginError(
                f"--prefix {self.text}: {self.source}: the length of step {step} is {tokens!r}; "
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
        observe = self.rule.observe  # the plugin chose the names of its arguments
        reason = observe(step, state, signal, reached)
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
            raise PluginError(
                f"--prefix {self.text}: {self.source}: observe left the state "
                f"{repr(state)[:200]}; use JSON values with text as keys, lists for tuples, and a "
                "position of at least 0 for 'window'"
            )


def _make_rule(make: Callable[..., Any], request: Request, source: str) -> Any:
    """Return what the user's ``make`` makes. UserError: it fails, with what it was called with."""
    try:
        return make(request.parts, request.limit)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also exit
        text = describe_error(error, find_file(make, source))
        if isinstance(error, UserError):
            if str(error).startswith("--prefix "):
                raise
            raise UserError(f"--prefix {request.text}: {text}") from None
        given = f"arguments={list(request.parts)} and limit={request.limit}"
        raise UserError(
            f"--prefix {request.text}: {text}; {name_of(make)} got {given}; change the texts after "
            "the name in --prefix, or the function"
        ) from None


def _build_schedule(
    name: str, make: Callable[[tuple[str, ...], int], Any], request: Request
) -> PrefixSchedule:
    """Make a registered schedule and try its first two lengths. UserError: one of them fails."""
    source = SCHEDULES.source(name)
    rule = _make_rule(make, request, source)
    try:
        if not callable(getattr(rule, "length", rule)):
            raise UserError(
                f"expected a function of the step, or an object with length(step), got {rule!r:.80}"
            )
        schedule = Registered(text=request.text, limit=request.limit, rule=rule, source=source)
        if schedule.has_state:
            check_arguments(rule.length, ("step", "state"))
            check_arguments(rule.observe, ("step", "state", "signal", "reached"))
        schedule.length(0)
        schedule.length(1)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may also exit
        if isinstance(error, UserError) and str(error).startswith("--prefix "):
            raise
        text = describe_error(error, find_file(make, source))
        raise UserError(f"--prefix {request.text}: {text}") from None
    return schedule
