"""Turn config options into command-line flags."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import typer

from .. import config as configuration
from ..errors import UserError
from .completion import complete_option

T = TypeVar("T", int, float)

ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of sections, such as 'train: {steps: 5}', or of names, such as 'steps: 5' "
        "or TRL's 'max_steps: 5'. Flags override it.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one option by its key, such as train.steps=5. It overrides flags and file, and "
        "may be repeated.",
    ),
]
METAVARS: dict[type, str | None] = {int: "INT", float: "FLOAT", str: "TEXT", bool: None}
FOLDERS = ("checkpoint.out",)
# examples in errors, for options whose default is none: of a type, or of one option
EXAMPLES: dict[type | str, float] = {int: 8, float: 0.5, "schedule.lr": 5e-5}

# options that may be given several times; their values are joined by commas
REPEATABLE = ("runtime.plugin", "data.template_args", "data.teacher_template_args")


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
    words = reworded or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function).parameters.values()
        command_parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        config_parameters = []
        for path, field in configuration.options(*sections, *words).items():
            config_parameters.append(_parameter(path, field, words.get(path, {})))

        def command(**given: object) -> None:
            passed = {p.name: given.pop(p.name) for p in command_parameters}
            flags = {}
            for name, value in given.items():
                if isinstance(value, list):
                    value = ",".join(value) or None
                if value is not None:
                    flags[name.replace("__", ".")] = value
            function(**passed, flags=flags)

        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        signature = inspect.Signature([*command_parameters, *config_parameters])
        command.__signature__ = signature  # type: ignore[attr-defined]  # inspect.signature reads it
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def repeat_options(
    flags: Mapping[str, object],
    config_file: str | None = None,
    assignments: Sequence[str] | None = None,
) -> list[str]:
    """Return the words of the given options, so that another command can repeat them."""
    words = []
    if config_file:
        words += ["--config", config_file]
    for path, value in flags.items():
        words.append(configuration.flag(path))
        if value is not True:
            words.append(str(value))
    for text in assignments or ():
        words += ["--set", text]
    return words


def read_number(flag: str, kind: type[T], example: object) -> Callable[[str], T]:
    """Return a parser for the value of ``flag``; it raises UserError for anything but a number."""

    def parse(text: str) -> T:
        try:
            return kind(text)
        except ValueError:
            expected = configuration.NAMES[kind]
            raise UserError(f"{flag} {text[:80]}: expected {expected}, such as {example}") from None

    return parse


def read_number_or_auto(
    flag: str, kind: type[T], example: object
) -> Callable[[str], T | Literal["auto"]]:
    """Return a parser as ``read_number`` does, which also accepts ``auto``."""
    parse_number = read_number(flag, kind, f"{example}, or auto")

    def parse(text: str) -> T | Literal["auto"]:
        if text == configuration.AUTO:
            return configuration.AUTO
        return parse_number(text)

    return parse


def _parameter(path: str, field: dataclasses.Field[Any], words: Wording) -> inspect.Parameter:
    """Return the parameter of a command that a config option becomes; None is "not given"."""
    kind: Any = configuration.value_type(field.type)
    values = configuration.choices(field.type)
    metavar = METAVARS[kind]
    if values:
        metavar = "NAME"
    if path in FOLDERS:
        metavar = "FOLDER"
    flag = words.get("flag", field.metadata["flag"])
    parser = None
    if kind in EXAMPLES:
        example = EXAMPLES.get(path, EXAMPLES[kind])
        parser = read_number(flag, kind, field.default or example)
        if configuration.is_automatic(field):
            metavar = f"{metavar}|auto"
            parser = read_number_or_auto(flag, kind, example)
    if path in REPEATABLE:
        kind = list[str]
    option = typer.Option(
        flag,
        help=words.get("help", field.metadata["help"]),
        metavar=metavar,
        parser=parser,
        show_default=words.get("shown") or configuration.describe_default(field),
        autocompletion=complete_option(path),
        rich_help_panel=configuration.topic(path),
    )
    return inspect.Parameter(
        path.replace(".", "__"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
