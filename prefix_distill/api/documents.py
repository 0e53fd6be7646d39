"""The results of the functions: frozen dataclasses with their units.

``to_dict()`` of a result is the JSON document that the command prints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..display import flops_text
from ..errors import Stopped
from .jobs import Outcome, check_error
from .result import Estimate, Flops, Result, listing

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """A finished run.

    ``out``: the run folder; ``model``: the folder of the trained student, which transformers loads;
    ``steps``: optimizer updates; ``resumed_from``: the step after which a resumed run continued;
    ``accuracy_before``, ``accuracy_after``: shares of correct held-out answers, None without
    reference answers; ``accuracy_teacher``: that of the teacher, None if it was not measured;
    ``gap_closed``: the share of the gap between untrained student and teacher;
    ``kl_before``, ``kl_after``: held-out reverse KL, nats per token; ``prefix``:
    the last prefix, tokens; ``tokens``: tokens trained on; ``flops``: of training;
    ``full_rollout_flops``: useful FLOPs of as many steps with full rollouts; ``seconds``: wall
    time with evaluations; ``notes``: automatic choices; ``warnings``: what may be wrong;
    ``pushed``: address on the hub; ``stopped``: why the run ended before its last step, if it did.
    """

    out: Path
    model: Path
    steps: int
    resumed_from: int | None
    accuracy_before: Estimate | None
    accuracy_after: Estimate | None
    accuracy_teacher: Estimate | None
    gap_closed: float | None
    kl_before: Estimate | None
    kl_after: Estimate | None
    prefix: int
    tokens: int
    flops: Flops
    full_rollout_flops: float
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    pushed: str | None
    stopped: str | None

    @classmethod
    def read(cls, outcome: Outcome) -> Self:
        """Return the result of a run that has ended."""
        document = outcome["document"]
        out = Path(document["out"])
        late_warnings = [warning["text"] for warning in document["warnings"]]
        return cls(
            document=document,
            out=out,
            model=out / "model",
            steps=document["steps"],
            resumed_from=document["resumed_from"],
            accuracy_before=Estimate.read(document["accuracy_before"]),
            accuracy_after=Estimate.read(document["accuracy_after"]),
            accuracy_teacher=Estimate.read(document.get("accuracy_teacher")),
            gap_closed=document.get("gap_closed"),
            kl_before=Estimate.read(document["kl_before"]),
            kl_after=Estimate.read(document["kl_after"]),
            prefix=document["prefix"],
            tokens=document["tokens"],
            flops=Flops(**document["flops"]),
            full_rollout_flops=document["full_rollout_cost"],
            seconds=document["seconds"]["total"],
            notes=tuple(outcome["notes"]),
            warnings=(*outcome["warnings"], *late_warnings),
            pushed=document["pushed"],
            stopped=(document.get("stopped") or {}).get("reason"),
        )

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return a row per evaluation: accuracy, KL (nats per token), cost so far (FLOPs, s)."""
        rows: list[dict[str, Any]] = self.to_dict()["evaluations"]
        return rows

    def metrics(self) -> list[dict[str, Any]]:
        """Return a row per step, as in metrics.jsonl: names end in their unit.

        UserError: the file is damaged.
        """
        from ..results.shapes import read_json_lines

        file = self.out / "metrics.jsonl"
        if not file.exists():
            return []  # a run of no steps
        rows: list[dict[str, Any]] = read_json_lines(file, dict[str, object])
        return rows

    def tables(self) -> list["Table"]:
        rows = {
            "run folder": str(self.out),
            "model": str(self.model),
            "steps": str(self.steps),
            "prefix": f"{self.prefix} tokens",
            "accuracy": _change(_share(self.accuracy_before), _share(self.accuracy_after)),
            "accuracy of the teacher": _share(self.accuracy_teacher),
            "held-out reverse KL": _change(_nats(self.kl_before), _nats(self.kl_after)),
            "training FLOPs": f"{flops_text(self.flops.useful)} useful, "
            f"{flops_text(self.flops.executed)} executed",
            "with full rollouts": flops_text(self.full_rollout_flops),
            "wall time": f"{self.seconds:.1f} s",
        }
        return [listing("Run", rows)]

    def remarks(self) -> list[str]:
        return [f"warning: {text}" for text in self.warnings]


@dataclass(frozen=True, kw_only=True)
class CheckResult(Result):
    """The checks of models, prompts, sampling and device before a run.

    ``ok``: whether no check failed; ``checks``: {name, status, found, facts} of each, ``status`` is
    ok, warning or error; ``notes``: automatic choices; ``warnings``: what may be wrong.
    """

    ok: bool
    checks: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return the result of the command's document."""
        return cls(
            document=document,
            ok=document["ok"],
            checks=tuple(document["checks"]),
            notes=tuple(document["notes"]),
            warnings=tuple(document["warnings"]),
        )

    def raise_for_error(self) -> None:
        """Raise PreflightError or MemoryShortage for the first check that failed, as `run` does."""
        for check in self.checks:
            if check["status"] == "error":
                raise check_error(check["name"], check["found"])

    def tables(self) -> list["Table"]:
        from rich.table import Table

        words = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}
        table = Table("", "check", "result")
        for check in self.checks:
            table.add_row(words[check["status"]], check["name"], check["found"])
        return [table]


@dataclass(frozen=True, kw_only=True)
class DryRun(Result):
    """What a run would do: its resolved config, and FLOPs per step. Nothing was written."""


@dataclass(frozen=True, kw_only=True)
class PlanResult(Result):
    """What a run would need.

    ``prefixes``: a row per prefix with tokens, FLOPs, seconds (None at an unknown speed) and memory
    (bytes); ``cards``: a row per card with the flags that fit, bytes and seconds; ``notes``:
    assumptions; ``warnings``: what may be wrong.
    """

    prefixes: tuple[dict[str, Any], ...]
    cards: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return the result of the command's document."""
        return cls(
            document=document,
            prefixes=tuple(document["prefixes"]),
            cards=tuple(document["cards"]),
            notes=tuple(document["notes"]),
            warnings=tuple(document["warnings"]),
        )

    def tables(self) -> list["Table"]:
        from ..planning.tables import tabulate

        return tabulate(self.to_dict())

    def remarks(self) -> list[str]:
        return [*self.notes, *(f"warning: {text}" for text in self.warnings)]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Result):
    """The answers of a model to a dataset.

    ``accuracy``: share of correct answers; ``finished_accuracy``: the same among finished answers;
    ``pass_at_k``: share of problems with a correct answer among ``samples``; all three None without
    reference answers; ``finish_rate``: share of answers that end; ``mean_tokens``: mean length of
    an answer, tokens; ``seconds``: wall time; ``examples``: JSON lines with all answers;
    ``warnings``: what may be wrong.
    """

    model: str
    dataset: str
    accuracy: Estimate | None
    finished_accuracy: Estimate | None
    pass_at_k: Estimate | None
    samples: int
    finish_rate: float
    mean_tokens: float
    seconds: float
    examples: Path
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return the result of the command's document."""
        return cls(
            document=document,
            model=document["model"],
            dataset=document["dataset"],
            accuracy=Estimate.read(document["accuracy"]),
            finished_accuracy=Estimate.read(document.get("finished_accuracy")),
            pass_at_k=Estimate.read(document["pass_at_k"]),
            samples=document["samples"],
            finish_rate=document["finish_rate"],
            mean_tokens=document["mean_tokens"],
            seconds=document["seconds"],
            examples=Path(document["examples"]),
            warnings=tuple(document.get("warnings", ())),
        )

    def tables(self) -> list["Table"]:
        rows = {
            "model": self.model,
            "dataset": self.dataset,
            "accuracy": _share(self.accuracy),
            "accuracy of finished answers": _share(self.finished_accuracy),
            f"pass@{self.samples}": _share(self.pass_at_k),
            "finish rate": f"{self.finish_rate:.1%}",
            "mean length": f"{self.mean_tokens:.0f} tokens",
            "wall time": f"{self.seconds:.1f} s",
            "answers": str(self.examples),
        }
        return [listing("Evaluation", rows)]

    def remarks(self) -> list[str]:
        return [f"warning: {text}" for text in self.warnings]


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Result):
    """Where teacher and student disagree, and the prefix to train with.

    ``out``: folder of probe.json and probe.png; ``recommended_prefix``: tokens, "full", or None if
    the teacher did not beat the student; ``reason``: why; ``expected_saving``: FLOPs of a step
    with full rollouts over those with the prefix; ``kl``: reverse KL, nats per token; ``flops``: of
    the probe; ``seconds``: wall time.
    """

    out: Path
    recommended_prefix: int | str | None
    reason: str
    expected_saving: float
    kl: Estimate | None
    flops: Flops
    seconds: float

    @classmethod
    def read(cls, document: dict[str, Any], out: Path) -> Self:
        """Return the result of the command's document."""
        return cls(
            document=document,
            out=out,
            recommended_prefix=document["recommended_prefix"],
            reason=document["reason"],
            expected_saving=document["expected_saving"],
            kl=Estimate.read(document["kl"]),
            flops=Flops(**document["flops"]),
            seconds=document["seconds"],
        )

    def tables(self) -> list["Table"]:
        from ..planning.probe_tables import tabulate_probe

        return tabulate_probe(self.to_dict())

    def remarks(self) -> list[str]:
        return [self.reason]

    def picture(self) -> Path | None:
        return self.out / "probe.png"


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Accuracy and cost of arms, each a mean over its seeds.

    ``out``: folder of report.html, report.md, report.csv and report.png; ``page``: report.html;
    ``runs``: number of runs; ``reference``: the arm to compare the others with; ``arms``: a row per
    arm, with accuracy and its interval, KL (nats per token), FLOPs and seconds.
    """

    out: Path
    page: Path
    runs: int
    reference: str | None
    arms: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return the result of the command's document."""
        return cls(
            document=document,
            out=Path(document["out"]),
            page=Path(document["page"]),
            runs=document["runs"],
            reference=document["reference"],
            arms=tuple(document["arms"]),
        )

    def tables(self) -> list["Table"]:
        from rich.table import Table

        from ..results.cells import SCREEN_HEADINGS, screen_cells

        table = Table(*SCREEN_HEADINGS)
        table.columns[0].overflow = "fold"
        for row in self.arms:
            table.add_row(*screen_cells(row))
        return [table]

    def remarks(self) -> list[str]:
        return [*(f"warning: {text}" for text in self.document["warnings"]), f"page: {self.page}"]

    def picture(self) -> Path | None:
        return self.out / "report.png"


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """An exported model.

    ``out``: its folder; ``gguf``: the GGUF file, if one was written; ``pushed``: address on the
    hub.
    """

    out: Path
    gguf: Path | None
    pushed: str | None

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return the result of the command's document."""
        gguf = document.get("gguf")
        return cls(
            document=document,
            out=Path(document["out"]),
            gguf=None if gguf is None else Path(gguf),
            pushed=document["pushed"],
        )

    def tables(self) -> list["Table"]:
        return [listing("Export", {name: str(value) for name, value in self.document.items()})]


class PushFailed(Stopped):
    """A model was written, but could not be pushed to the hub. ``result``: what was written."""

    def __init__(self, message: str, result: RunResult | ExportResult):
        super().__init__(message)
        self.result = result


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else estimate.as_share()


def _nats(estimate: Estimate | None) -> str:
    return "–" if estimate is None else estimate.as_nats()


def _change(before: str, after: str) -> str:
    return f"{before} → {after}"
