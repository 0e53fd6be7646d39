"""Check the functions that a user's module registers, and what they return."""

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, UserError
from .registry import PROGRAM

if TYPE_CHECKING:
    from torch import Size, Tensor


class WrongResult(PluginError):
    """A user's function returned something else than it should; the message names its line."""

    def __init__(self, function: Callable[..., Any], message: str) -> None:
        super().__init__(f"{_locate(function)}{name_of(function)} {message}")


def name_of(function: object) -> str:
    """Return the name of a function, or of the type of an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


def _locate(function: object) -> str:
    """Return ``FILE, line N: `` of a function; "" if it is not written in Python."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__code__"):
        function = inspect.getattr_static(type(function), "__call__", function)
    code = None
    if callable(function):
        code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    return f"{code.co_filename}, line {code.co_firstlineno}: "


def find_file(function: Callable[..., Any], source: str) -> str:
    """Return the file of a function of PROGRAM, which may have many; otherwise ``source``."""
    if source != PROGRAM:
        return source
    try:
        return inspect.getfile(inspect.unwrap(function))
    except (TypeError, OSError):
        return source  # not written in Python


def check_name(decorator: str, name: object) -> None:
    """Raise UserError if ``name`` is the decorated function: the parentheses are missing."""
    if callable(name):
        raise UserError(
            f"@{decorator}: expected a name, got {name_of(name)}; write "
            f'@{decorator}("name") above it'
        )


def check_callable(what: str, value: object) -> None:
    """Raise UserError unless ``value`` can be called."""
    if not callable(value):
        raise UserError(f"{what}: expected a function, got {reprlib.repr(value)}; pass a function")


def check_arguments(function: Callable[..., Any], names: tuple[str, ...]) -> None:
    """Raise UserError unless ``function`` takes these arguments by position."""
    check_callable(name_of(function), function)
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise UserError(
            f"expected {name_of(function)}({', '.join(names)}), got a function of other arguments "
            f"({error}); correct its definition"
        ) from None
    except ValueError:
        return  # not written in Python


def check_values(function: Callable[..., Any], result: object, table: "Tensor") -> None:
    """Raise WrongResult unless ``result`` is [N] floats for log-probabilities [N, V]."""
    _check_shape(function, result, table, expected=table.shape[:1])


def check_gradient(function: Callable[..., Any], result: object, table: "Tensor") -> None:
    """Raise WrongResult unless ``result`` is [N, V] floats for log-probabilities [N, V]."""
    _check_shape(function, result, table, expected=table.shape)


def _check_shape(
    function: Callable[..., Any], result: object, table: "Tensor", *, expected: "Size"
) -> None:
    import torch

    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        raise WrongResult(
            function, f"returned {type(result).__name__}; expected a tensor of floats"
        )
    if result.shape != expected:
        raise WrongResult(
            function,
            f"returned a tensor of shape {list(result.shape)} for log-probabilities of shape "
            f"{list(table.shape)}; expected {list(expected)}",
        )


def check_graph(function: Callable[..., Any], value: "Tensor") -> None:
    """Raise WrongResult unless autograd can follow ``value``."""
    if not value.requires_grad:
        raise WrongResult(
            function,
            "returned values that autograd cannot follow; compute them from student_logp with "
            "torch, or give a gradient",
        )
