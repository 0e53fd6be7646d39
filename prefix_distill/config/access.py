"""Read and change a config by path: ``section.key``."""

import dataclasses
import typing
from typing import Any

from .sections import Config

SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Config)
TOPICS: dict[str, str] = {key.name: key.metadata["topic"] for key in dataclasses.fields(Config)}
MAIN = "Main options"  # the topic of every main_option


def options(*sections: str) -> dict[str, dataclasses.Field[Any]]:
    """Return path → field of the named sections or single options (of all if none is named)."""
    selected = {}
    for name, section in SECTIONS.items():
        for key in dataclasses.fields(section):
            path = f"{name}.{key.name}"
            if not sections or name in sections or path in sections:
                selected[path] = key
    return selected


def topic(path: str) -> str:
    """Return the topic of an option: its section's, or ``MAIN`` for a ``main_option``."""
    if options()[path].metadata["main"]:
        return MAIN
    section, _ = path.split(".")
    return TOPICS[section]


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the config as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def get(config: Config, path: str) -> Any:
    """Return the value of one option: ``get(config, "train.steps")``."""
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def flag(path: str) -> str:
    """Return the command-line flag of an option."""
    name: str = options()[path].metadata["flag"]
    return name


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a copy with other values: ``replace(config, rollout={"max_new_tokens": 64})``."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()
    }
    return dataclasses.replace(config, **changed)
