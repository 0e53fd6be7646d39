"""Config options become command-line flags."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import typer

from .. import config as configuration

ConfigFile = Annotated[
    str | None, typer.Option("--config", help="YAML file of sections; flags override it.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; overrides flags and file.")
]


# options that may be given several times; their values are joined by commas
REPEATABLE = ("runtime.plugin",)


class Wording(TypedDict, total=False):
    """A command's own flag, help text or shown default for a config option."""

    flag: str
    help: str
    shown: str  # the default, in words


def with_options(
    *sections: str, reworded: dict[str, Wording] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add one flag per config option to a command.

    ``sections``: sections or single options; default: all options. ``reworded`` adds single options
    with their own flag, help or shown default.
    """
    reworded = reworded or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        made = []
        for path, field in configuration.options(*sections, *reworded).items():
            kind: Any = configuration.value_type(field.type)
            if path in REPEATABLE:
                kind = list[str]
            words = {**field.metadata, **reworded.get(path, {})}
            shown = words["shown"] or (str(field.default) if field.default is not None else "none")
            text = typer.Option(
                words["flag"],
                help=words["help"],
                show_default=shown,
                autocompletion=_completion(configuration.choices(field.type)),
            )
            made.append(
                inspect.Parameter(
                    path.replace(".", "__"),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, text],
                )
            )

        def command(**given: object) -> None:
            passed = {p.name: given.pop(p.name) for p in own}
            flags = {}
            for name, value in given.items():
                if isinstance(value, list):
                    value = ",".join(value) or None
                if value is not None:
                    flags[name.replace("__", ".")] = value
            function(**passed, flags=flags)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        signature = inspect.Signature([*own, *made])
        command.__signature__ = signature  # type: ignore[attr-defined]  # inspect.signature reads it
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def _completion(values: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    """Return the shell completion of an option limited to ``values``; None if there are none."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete if values else None
