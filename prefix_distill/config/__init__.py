"""The configuration of a run: its options, the rules between them, and YAML files."""

from ..maths.formulas import parse_divergence
from .access import MAIN, as_dict, flag, get, options, replace, topic
from .files import (
    LARGEST,
    assemble,
    build,
    flatten,
    is_text,
    read_assignments,
    read_tree,
    read_yaml,
)
from .options import (
    AUTO,
    NAMES,
    choices,
    describe_default,
    describe_limits,
    describe_type,
    is_automatic,
    value_type,
)
from .rules import parse_estimator, parse_trackers, selected
from .sections import SELF, Adapter, Config, Runtime
from .stop_when import StopWhen, parse_stop_when

__all__ = [
    "AUTO",
    "LARGEST",
    "MAIN",
    "NAMES",
    "SELF",
    "Adapter",
    "Config",
    "Runtime",
    "StopWhen",
    "as_dict",
    "assemble",
    "build",
    "choices",
    "describe_default",
    "describe_limits",
    "describe_type",
    "flag",
    "flatten",
    "get",
    "is_automatic",
    "is_text",
    "options",
    "parse_divergence",
    "parse_estimator",
    "parse_stop_when",
    "parse_trackers",
    "read_assignments",
    "read_tree",
    "read_yaml",
    "replace",
    "selected",
    "topic",
    "value_type",
]
