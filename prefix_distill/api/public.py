"""The public names, which `prefix_distill` loads when they are first used."""

from ..errors import Interrupted, MemoryShortage, PreflightError, Stopped, UserError
from ..maths.registered import register_divergence, register_schedule
from .documents import (
    CheckResult,
    Comparison,
    EvaluationResult,
    ExportResult,
    PlanResult,
    ProbeResult,
    PushFailed,
    RunResult,
)
from .finished import load
from .notebook import check, compare, evaluate, export, plan, probe, report, resume, run
from .result import Estimate, Flops
from .settings import Config

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
