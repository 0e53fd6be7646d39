"""Read settings from YAML files and ``--set``; suggest the nearest known key for an unknown one."""

import contextlib
import difflib
import itertools
import reprlib
import typing
from collections.abc import Iterable
from typing import Any

from ..errors import UserError
from ..plugins import load_plugins
from .options import NAMES, choices, value_type
from .rules import check
from .sections import SECTIONS, Config, flag, options

if typing.TYPE_CHECKING:
    import yaml

LARGEST = 1 << 16  # limit on the characters of a YAML file and on its expanded nodes
MERGE = "tag:yaml.org,2002:merge"  # tag of the key <<


def build(values: dict[str, object]) -> Config:
    """Return a checked Config: ``{"train.steps": 5, …}`` over the defaults. Load its plugins.

    UserError: a key is unknown, or a value, a plugin or a combination of options is invalid.
    """
    config = assemble(values)
    load_plugins(config.runtime.plugin)
    check(config)
    return config


def assemble(values: dict[str, object]) -> Config:
    """Return a Config of known keys and values of the right types, without the other checks.

    It runs no code of a plugin. UserError: a key is unknown, or a value has another type.
    """
    known = options()
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path, value in values.items():
        if path not in known:
            path = path[:80]
            near = difflib.get_close_matches(path, known, 1, 0.4)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; known sections: {', '.join(sections)}"
            )
            raise UserError(f"unknown setting '{path}'{hint}")
        section, key = path.split(".")
        sections[section][key] = _typed(path, value, known[path].type)
    return Config(**{name: section(**sections[name]) for name, section in SECTIONS.items()})


def read_tree(path: str) -> dict[Any, Any]:
    """Read a YAML file and return its keys.

    UserError: the file is missing or damaged, repeats a key, or has more than LARGEST characters or
    expanded nodes.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"config file {path}: cannot be read as UTF-8 text ({type(error).__name__}); check its "
            "path"
        ) from None
    if len(text) > LARGEST:
        raise UserError(
            f"config file {path}: it has more than {LARGEST:,} characters; settings fit in far "
            "fewer"
        )
    try:
        tree = _yaml(text)
    except ValueError as error:
        raise UserError(
            f"config file {path}: not valid YAML ({' '.join(str(error).split())[:300]}); repair it"
        ) from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"config file {path}: expected sections such as 'train: {{steps: 5}}', got "
            f"{type(tree).__name__}"
        )
    return tree


def _yaml(text: str) -> Any:
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
    """Raise ValueError if a mapping node gives a key or the merge key twice."""
    seen = set()
    merges = False
    for key, _ in mapping.value:
        if key.tag == MERGE:
            if merges:  # versions of PyYAML differ in which of the two wins
                raise ValueError(
                    f"the merge key '<<' is there twice, again in line {key.start_mark.line + 1}; "
                    "merge a list: <<: [*a, *b]"
                )
            merges = True
            continue
        if key.id != "scalar":
            continue
        if key.value in seen:
            raise ValueError(
                f"the key {key.value[:80]!r} is there twice, again in line "
                f"{key.start_mark.line + 1}"
            )
        seen.add(key.value)


def _merge(mapping: "yaml.MappingNode") -> None:
    """Replace a mapping node's merge keys by the pairs of the mappings they name.

    The merge keys of those mappings must already be resolved. In a list of mappings the first must
    win. PyYAML 6.0.4 can let the last one win, so this function merges instead.
    """
    merged: list[tuple[yaml.Node, yaml.Node]] = []
    own: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in mapping.value:
        if key.tag != MERGE:
            own.append((key, value))
            continue
        sources = value.value if value.id == "sequence" else [value]
        for source in reversed(sources):  # the last of equal keys wins
            if source.id != "mapping":
                line = key.start_mark.line + 1
                raise ValueError(
                    f"the merge key in line {line} needs a mapping or a list of mappings"
                )
            merged += source.value
    mapping.value = merged + own


def flatten(path: str, tree: dict[Any, Any]) -> dict[str, object]:
    """Sections with keys → ``{"section.key": value}``. UserError on a wrong shape."""
    values = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise UserError(
                f"config file {path}: section {reprlib.repr(section)} must hold keys, got "
                f"{reprlib.repr(keys)}"
            )
        values.update({f"{section}.{key}": value for key, value in keys.items()})
    return values


def read_yaml(path: str) -> dict[str, object]:
    """A YAML file of sections → ``{"section.key": value}``. UserError on a missing file or a
    wrong shape."""
    return flatten(path, read_tree(path))


def read_assignments(assignments: list[str]) -> dict[str, object]:
    """``["train.steps=5"]`` → ``{"train.steps": 5}``; the value is read as YAML."""
    values = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected section.key=value, such as train.steps=5")
        try:
            values[path.strip()] = _yaml(value)
        except ValueError:
            raise UserError(f"--set {text}: the value is not valid YAML; quote it") from None
    return values


def _typed(path: str, value: object, kind: object) -> object:
    """``value`` as the declared type; an int is a float, a number is text where text is due,
    nothing else is bent."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    base = value_type(kind)
    if base is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(
            f"{path}: expected a number below 2^63, got one of {value.bit_length()} bits; give a "
            "smaller one"
        )
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if base is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, bool):  # YAML 1.1 reads on and off as true and false
        word = "on" if value else "off"
        if word in choices(kind):
            value = word
    if type(value) is not base:
        raise UserError(
            f"{path}: expected {NAMES[base]}, got {reprlib.repr(value)}; change {flag(path)}"
        )
    if isinstance(value, str) and not is_text(value):
        raise UserError(
            f"{path}: expected Unicode text without NUL, got {reprlib.repr(value)}; change "
            f"{flag(path)}"
        )
    return value


def is_text(value: str) -> bool:
    """Return whether files, file names and tokenizers can hold ``value``.

    Half of a surrogate pair has no UTF-8 form: Python makes it from bytes that are not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
