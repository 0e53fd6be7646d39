"""Read settings from YAML files and ``--set``; suggest the nearest known key for an unknown one."""

import contextlib
import dataclasses
import datetime
import itertools
import re
import reprlib
import typing
from collections.abc import Iterable
from typing import Any

from ..errors import UserError, nearest
from ..plugins import load_plugins
from .access import SECTIONS, options
from .options import AUTO, choices, describe_type, is_automatic, value_type
from .rules import Names, check
from .sections import Config

if typing.TYPE_CHECKING:
    import yaml

LISTED = 20  # unknown settings in an error
LARGEST = 1 << 16  # limit on the characters of a YAML file and on its expanded nodes
CONFIG_FILE = "config file"  # what an error calls the file of --config
# YAML 1.1 reads 1:30 as 90 and 010 as 8; both are more likely to be mistakes
MISREAD = re.compile(r"[-+]?(\d[\d_]*(:\d+)+(\.\d*)?|0[\d_]+)")
TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"  # tag of the key <<


def build(values: dict[str, object], names: Names | None = None) -> Config:
    """Return a checked Config: ``{"train.steps": 5, …}`` over the defaults. Load its plugins.

    ``names``: option → how the user wrote it, such as a flag; an option that is not among them was
    given by its key. UserError begins with that name: a key is unknown, or a value, a plugin or a
    combination of options is invalid.
    """
    names = names or {}
    config = assemble(values, names)
    load_plugins(config.runtime.plugin)
    check(config, names)
    return config


def assemble(values: dict[str, object], names: Names | None = None) -> Config:
    """Return a Config of known keys and values of the right types, without the other checks.

    It runs no code of a plugin. UserError: a key is unknown, or a value has another type.
    """
    names = names or {}
    known = options()
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    unknown = [f"'{path[:80]}'; {_suggest(path[:80])}" for path in values if path not in known]
    if len(unknown) == 1:
        raise UserError(f"unknown setting {unknown[0]}")
    if unknown:
        numbered = [f"({i}) {text}" for i, text in enumerate(unknown[:LISTED], 1)]
        raise UserError(f"unknown settings: {' '.join(numbered)}")
    for path, value in values.items():
        section, key = path.split(".")
        sections[section][key] = _convert(names.get(path, path), value, known[path])
    return Config(**{name: section(**sections[name]) for name, section in SECTIONS.items()})


def _suggest(path: str) -> str:
    """Return advice for an unknown setting: the nearest known one, or the sections.

    A key of another section is nearest; then come similar settings, similar keys and flags.
    """
    keys: dict[str, str] = {}  # key, or flag without dashes → setting
    for known, field in options().items():
        keys[known.partition(".")[2]] = known
        keys[field.metadata["flag"].removeprefix("--").replace("-", "_")] = known
    key = path.rpartition(".")[2]
    found = keys.get(key) or nearest(path, options()) or keys.get(nearest(key, keys) or "")
    if found is not None:
        return f"did you mean {found}?"
    return f"choose a key of these sections: {', '.join(SECTIONS)}"


def read_tree(path: str, kind: str = CONFIG_FILE) -> dict[Any, Any]:
    """Read a YAML file and return its keys; ``kind`` names the kind of file in errors.

    UserError: the file is missing or damaged, repeats a key, or has more than LARGEST characters or
    expanded nodes.
    """
    file_name = f"{kind} {path}"
    text = _read_text(path, file_name)
    if len(text) > LARGEST:
        raise UserError(
            f"{file_name}: expected at most {LARGEST:,} characters, got more; keep only settings "
            "in it"
        )
    try:
        tree = _parse_yaml(text)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file_name}: not valid YAML ({reason}); correct it") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{file_name}: expected sections such as 'train: {{steps: 5}}', got "
            f"{type(tree).__name__}; correct it"
        )
    return tree


def _read_text(path: str, file_name: str) -> str:
    """Return at most LARGEST + 1 characters of a file. UserError: it is no readable UTF-8 text."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{file_name}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{file_name}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file_name}: expected UTF-8 text, got other bytes; save it as UTF-8"
        ) from None
    except ValueError as error:  # a path with a NUL
        raise UserError(f"{file_name}: not a valid path ({error}); check the path") from None


def _parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML text.

    ValueError: the text is not YAML, uses other types, repeats a key, contains itself, or expands
    to more than LARGEST nodes.
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return None
        _expand(root, {})
        return yaml.constructor.SafeConstructor().construct_document(root)
    except (
        yaml.YAMLError,
        OverflowError,
        RecursionError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:
        # all that PyYAML raises for damaged or deep text
        raise ValueError(str(error)) from None


def _expand(node: "yaml.Node", sizes: dict["yaml.Node", int | None]) -> int:
    """Check the keys of a composed YAML node, resolve its merge keys, and return its expanded size.

    The size is a number of nodes. An alias or a merged mapping counts every time it is used: nine
    lines of aliases of aliases can expand to 10^9 nodes. ``sizes`` remembers finished nodes, so
    each is visited once. None in it marks a node whose children are being counted.
    """
    import yaml

    if node in sizes:
        known = sizes[node]
        if known is None:
            raise ValueError(f"the anchor in line {node.start_mark.line + 1} contains itself")
        return known
    sizes[node] = None
    if isinstance(node, yaml.ScalarNode) and MISREAD.fullmatch(node.value):
        node.tag = TEXT
    children: Iterable[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    if isinstance(node, yaml.MappingNode):
        children = itertools.chain.from_iterable(node.value)
    size = 1
    for child in children:
        size += _expand(child, sizes)
        if size > LARGEST:
            raise ValueError(f"its aliases and merge keys expand to more than {LARGEST:,} nodes")
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        _merge(node)
    sizes[node] = size
    return size


def _check_keys(mapping: "yaml.MappingNode") -> None:
    """Raise ValueError if a mapping node repeats a key or the merge key."""
    seen = set()
    has_merge_key = False
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if key.tag == MERGE:
            if has_merge_key:  # versions of PyYAML differ in which of the two wins
                raise ValueError(
                    f"the merge key '<<' is repeated in line {line}; merge a list: <<: [*a, *b]"
                )
            has_merge_key = True
            continue
        if key.id != "scalar":
            continue
        if key.value in seen:
            raise ValueError(f"the key {key.value[:80]!r} is repeated in line {line}")
        seen.add(key.value)


def _merge(mapping: "yaml.MappingNode") -> None:
    """Replace a mapping node's merge keys by the pairs of the mappings they name.

    The merge keys of those mappings must already be resolved. In a list of mappings the first must
    win. PyYAML 6.0.4 can let the last one win, so this function merges instead.
    """
    merged: list[tuple[yaml.Node, yaml.Node]] = []
    pairs: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in mapping.value:
        if key.tag != MERGE:
            pairs.append((key, value))
            continue
        sources = [value]
        if value.id == "sequence":
            sources = value.value
        for source in reversed(sources):  # the last of equal keys wins
            if source.id != "mapping":
                line = key.start_mark.line + 1
                raise ValueError(
                    f"the merge key in line {line} needs a mapping or a list of mappings"
                )
            merged += source.value
    mapping.value = merged + pairs


def flatten(source: str, tree: dict[Any, Any]) -> dict[str, object]:
    """Return ``{"section.key": value}`` of sections with keys.

    ``source`` names the file, or the part of a file, in errors. UserError: a section has no keys.
    """
    values = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise UserError(
                f"{source}: expected sections with keys, such as 'schedule: {{lr: 1e-4}}', got "
                f"'{str(section)[:80]}: {reprlib.repr(keys)}'; correct it"
            )
        for key, value in keys.items():
            values[f"{section}.{key}"] = value
    return values


def read_yaml(path: str) -> dict[str, object]:
    """Read a YAML file of sections and return ``{"section.key": value}``.

    UserError: as ``read_tree`` and ``flatten``.
    """
    return flatten(f"{CONFIG_FILE} {path}", read_tree(path))


def read_assignments(assignments: list[str]) -> dict[str, object]:
    """Return ``{"train.steps": 5}`` of ``["train.steps=5"]``; the values are read as YAML.

    UserError: an assignment has no ``=``, or its value is not valid YAML.
    """
    values = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected section.key=value, such as train.steps=5")
        try:
            values[path.strip()] = _parse_yaml(value)
        except ValueError:
            raise UserError(f"--set {text}: the value is not valid YAML; quote it") from None
    return values


def _convert(name: str, value: object, declared: dataclasses.Field[Any]) -> object:
    """Return ``value`` as the declared type of an option; ``name`` names the option in errors.

    A whole number may stand for a float, a number or a date for text, and YAML 1.1's readings of
    ``1e-4`` and ``on`` are undone. ``auto`` is None, where it stands for it. UserError: any other
    type.
    """
    kind = declared.type
    if value is None and type(None) in typing.get_args(kind):
        return None
    if value == AUTO and is_automatic(declared):
        return None
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(
            f"{name}: expected a number below 2^63, got one of {value.bit_length()} bits; lower it"
        )
    base = value_type(kind)
    if base is float:
        value = _to_float(value)
    elif isinstance(value, bool):
        value = _to_switch_name(value, kind)
    elif base is str and isinstance(value, (int, float, datetime.date)):
        value = str(value)
    if type(value) is not base:
        expected = describe_type(declared)
        raise UserError(f"{name}: expected {expected}, got {reprlib.repr(value)}; change it")
    if isinstance(value, str) and not is_text(value):
        raise UserError(
            f"{name}: expected Unicode text without NUL, got {reprlib.repr(value)}; change it"
        )
    return value


def _to_float(value: object) -> object:
    """Return a whole number, or text such as 1e-4, as a float; any other value unchanged."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, str)):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _to_switch_name(value: bool, kind: object) -> object:
    """Return on or off for a truth value if an option has that choice, else the truth value."""
    name = "on" if value else "off"  # YAML 1.1 reads on and off as true and false
    if name in choices(kind):
        return name
    return value


def is_text(value: str) -> bool:
    """Return whether files, file names and tokenizers can hold ``value``.

    They cannot hold NUL, or half of a surrogate pair, which has no UTF-8 encoding. Python makes
    such halves from bytes that are not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
