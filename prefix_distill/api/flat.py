"""Read YAML files of settings: sections of keys, or names as on the command line, also of TRL."""

import json
import os

from .. import config as configuration
from ..config.access import SECTIONS
from ..errors import UserError
from .spellings import known, translate


def read_settings_file(path: str) -> tuple[dict[str, object], dict[str, str], list[str]]:
    """Read a YAML file of settings; return them, the names in errors, and notes.

    Settings: ``section.key`` → value. A file has sections, as in ``train: {steps: 5}``, or flat
    names: flags, or those of transformers and TRL, as in ``max_steps: 5``. Both may be mixed.
    UserError: as `config.read_tree` and `spellings.translate`, or a setting is given twice.
    """
    source = f"config file {path}"
    sections, flat = {}, {}
    for key, value in configuration.read_tree(path).items():
        if _is_flat(key, value):
            flat[key] = value
        else:
            sections[key] = value
    values = configuration.flatten(source, sections)
    if not flat:
        return values, {}, []
    try:
        words, notes = _translate(flat)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    given = _read_words(words, source)
    for option in given.keys() & values.keys():
        raise UserError(
            f"{source}: {option} is set twice, in its section and as {configuration.flag(option)}; "
            "remove one of them"
        )
    return values | given, {option: configuration.flag(option) for option in given}, notes


def _is_flat(key: object, value: object) -> bool:
    """Return whether an entry of the file is a name with a value, rather than a section."""
    if not isinstance(key, str):
        return False
    if isinstance(value, dict):
        return key not in SECTIONS and known(key)
    return key not in SECTIONS or f"--{key}" in _flags()


def _flags() -> dict[str, str]:
    """Return flag → option."""
    return {configuration.flag(option): option for option in configuration.options()}


def _translate(flat: dict[str, object]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that the entries stand for, and notes."""
    valued = {"--set"}
    switches: dict[str, str | None] = {"--resume": None}
    for flag, option in _flags().items():
        if configuration.value_type(configuration.options()[option].type) is bool:
            switches[flag] = option
        else:
            valued.add(flag)
    words = []
    for name, value in flat.items():
        if value is not None or not (known(name) or _flag_of(name) in valued | switches.keys()):
            words.append(f"--{name}={_write(value)}")
    world = os.environ.get("WORLD_SIZE", "1")
    ranks = int(world) if world.isdecimal() else 1
    words, notes = translate(words, valued=valued, switches=switches, world=ranks)
    if "--resume" in words:
        raise UserError("resume_from_checkpoint: give --resume on the command line instead")
    return words, notes


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _write(value: object) -> str:
    """Return a value as text of a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _read_words(words: list[str], source: str) -> dict[str, object]:
    """Return option → value of translated words."""
    flags = _flags()
    values: dict[str, object] = {}
    rest = list(words)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if flag == "--set":
            values |= configuration.read_assignments([rest.pop(0)])
            continue
        option = flags[flag]
        kind = configuration.value_type(configuration.options()[option].type)
        if kind is bool:
            values[option] = True
            continue
        if not equals:
            text = rest.pop(0)
        values[option] = _read(text, kind)
    return values


def _read(text: str, kind: type) -> object:
    """Return a text as a whole number if an option is one and it is one; else unchanged."""
    if kind is int and text.removeprefix("-").isdecimal():
        return int(text)
    return text
