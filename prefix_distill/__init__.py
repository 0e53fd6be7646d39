"""On-policy prefix distillation on one machine.

    from prefix_distill import run
    result = run(prefix=24, steps=30, out="runs/first")

The names load when they are first used, so that importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api.public import (
        CheckResult,
        Comparison,
        Config,
        Estimate,
        EvaluationResult,
        ExportResult,
        Flops,
        Interrupted,
        MemoryShortage,
        PlanResult,
        PreflightError,
        ProbeResult,
        PushFailed,
        RunResult,
        Stopped,
        UserError,
        check,
        compare,
        evaluate,
        export,
        load,
        plan,
        probe,
        register_divergence,
        register_schedule,
        report,
        resume,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "CheckResult",
    "Comparison",
    "Config",
    "Estimate",
    "EvaluationResult",
    "ExportResult",
    "Flops",
    "Interrupted",
    "MemoryShortage",
    "PlanResult",
    "PreflightError",
    "ProbeResult",
    "PushFailed",
    "RunResult",
    "Stopped",
    "UserError",
    "check",
    "compare",
    "evaluate",
    "export",
    "load",
    "plan",
    "probe",
    "register_divergence",
    "register_schedule",
    "report",
    "resume",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(".api.public", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
