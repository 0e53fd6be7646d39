"""The values that shell completion offers; it loads no library of models."""

from collections.abc import Callable, Iterable

from .. import config as configuration
from ..config.sections import SELF, TRACKERS
from ..lab.task import LAB, TASKS
from ..maths.weights import SELECTIONS, WINDOWS
from ..prompts.presets import PRESETS

Complete = Callable[[str], list[str]]

BUILT_IN_DATA = tuple(f"{LAB}{task}" for task in TASKS)
# what stands for option texts that have a grammar; a value with a colon at its end goes on
VALUES: dict[str, tuple[str, ...]] = {
    "models.student": (f"{LAB}choice/student",),
    "models.teacher": (SELF, f"{LAB}choice/teacher"),
    "data.dataset": (*PRESETS, *BUILT_IN_DATA),
    "evaluate.dataset": (*PRESETS, *BUILT_IN_DATA),
    "schedule.prefix": ("25%", "50%", "full", "auto", "linear:", "staircase:"),
    "divergence.name": ("reverse-kl", "forward-kl", "jsd:0.5"),
    "divergence.estimator": ("full", "top-k:64", "sampled"),
    "weights.window": ("all", *(f"{name}:" for name in WINDOWS)),
    "weights.select": ("all", *SELECTIONS),
    "weights.position": ("uniform", "moderate", "decreasing", "sigmoid:"),
    "rollout.off_policy": ("none", "sft", "sft:0.5", "divergence", "divergence:0.5"),
    "train.stop_when": ("none", "accuracy:3", "collapse"),
    "adapter.targets": ("all-linear", "experts"),
    "trackers.to": ("none", *TRACKERS),
    "runtime.device": ("auto", "cpu", "cuda", "mps"),
    "runtime.teacher_device": ("auto", "cpu", "cuda", "mps"),
}


def complete_option(path: str) -> Complete | None:
    """Return the completion of a config option; None if its values cannot be listed."""
    choices = configuration.choices(configuration.options()[path].type)
    values = choices or VALUES.get(path)
    if configuration.is_automatic(configuration.options()[path]):
        values = (configuration.AUTO,)
    if not values:
        return None
    return complete_from(values)


def complete_from(values: Iterable[str]) -> Complete:
    """Return a completion from a list of values."""
    known = tuple(values)

    def complete(incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return complete
