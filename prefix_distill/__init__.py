"""On-policy prefix distillation on one machine."""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "register_divergence": "maths.registered",
    "register_schedule": "maths.registered",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
