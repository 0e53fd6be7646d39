"""The closing summary of each command that trains, measures or reports, from its result.

`prospects` has those of the commands before training.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..display import Summary, count_text, flops_text, time_text
from ..results.cells import accuracy_cell, arm_text
from .documents import Comparison, EvaluationResult, ExportResult, RunResult
from .result import Estimate, Result


def summarize(result: Result) -> Summary | None:
    """Return what a command shows last; None if the tables of its result say everything."""
    if isinstance(result, RunResult):
        return summarize_run(result)
    if isinstance(result, EvaluationResult):
        return summarize_evaluation(result)
    if isinstance(result, ExportResult):
        return summarize_export(result)
    if isinstance(result, Comparison):
        return summarize_comparison(result)
    return None


def summarize_run(result: RunResult) -> Summary:
    """Return before and after, the cost, and where the model is."""
    out = shlex.quote(str(result.out))
    last = result.evaluations[-1]
    rows = {
        "accuracy": _describe_accuracy(result),
        "teacher": _describe_teacher(result),
        "KL": _change(_nats(result.kl_before), _nats(result.kl_after))
        + " nats per token, student to teacher",
        "answers": _describe_answers(last["finish_rate"], last["mean_tokens"]),
        "FLOPs": _describe_cost(result),
        "rounded": _describe_rounding(result),
        "hub": result.pushed or "",
        "model": str(result.model),
    }
    command = f"prefix-distill show {out}"
    took = time_text(result.seconds)
    title = f"{result.out}: {result.steps} steps, {took} of training and evaluation"
    return Summary(title=title, rows=rows, command=command, warnings=result.warnings)


def _describe_accuracy(result: RunResult) -> str:
    if result.accuracy_before is None and result.accuracy_after is None:
        return _share(None)
    return _change(_share(result.accuracy_before), _share(result.accuracy_after))


def _describe_answers(finish_rate: float, mean_tokens: float) -> str:
    return f"{finish_rate:.0%} finished, {mean_tokens:.0f} tokens on average"


def _describe_teacher(result: RunResult) -> str:
    if result.accuracy_teacher is None:
        return ""
    text = _share(result.accuracy_teacher)
    if result.gap_closed is not None:
        text += f"; {result.gap_closed:.0%} of the gap is closed"
    return text


def _describe_cost(result: RunResult) -> str:
    """Return the training FLOPs; with a prefix, also what full rollouts would take."""
    useful = result.flops.useful
    text = f"{flops_text(useful)} for {result.tokens:,} tokens"
    if useful and not result.document.get("full_rollouts"):
        ratio = result.full_rollout_flops / useful
        text += f"; full rollouts: {flops_text(result.full_rollout_flops)}, {ratio:.1f}×"
    return text


def _describe_rounding(result: RunResult) -> str:
    loss = result.document.get("rounding")
    if loss is None or loss["kept"] is None:
        return ""
    return f"model/ in {loss['dtype']} keeps {loss['kept']:.0%} of the KL gain"


def summarize_evaluation(result: EvaluationResult) -> Summary:
    """Return accuracy, lengths and where the answers are."""
    finished = ""
    if result.finished_accuracy is not None and result.finish_rate < 1:
        finished = result.finished_accuracy.as_share()
    pass_at_k = {}
    if result.samples > 1 and result.pass_at_k is not None:
        pass_at_k = {f"pass@{result.samples}": result.pass_at_k.as_share()}
    rows = {
        "accuracy": _share(result.accuracy),
        "of finished": finished,
        **pass_at_k,
        "answers": _describe_answers(result.finish_rate, result.mean_tokens),
        "time": time_text(result.seconds),
        "file": str(result.examples),
    }
    title = f"{result.model} on {result.dataset}"
    return Summary(title=title, rows=rows, warnings=result.warnings)


def summarize_export(result: ExportResult) -> Summary:
    """Return where the exported model is."""
    gguf = ""
    if result.gguf is not None:
        gguf = str(result.gguf)
    rows = {
        "dtype": str(result.document.get("dtype") or ""),
        "GGUF": gguf,
        "hub": result.pushed or "",
    }
    return Summary(title=f"model folder {result.out}", rows=rows)


def summarize_comparison(result: Comparison) -> Summary:
    """Return the best arms, what they save, where the report is, and how to see the answers."""
    rows = {
        "best": "",
        "reference": "",
        "saving": "",
        "page": str(result.page),
        "picture": str(result.picture()),
        "tables": f"{result.out / 'report.md'}, {result.out / 'report.csv'}",
    }
    best = _find_best(result.arms)
    rows["best"] = "; ".join(_describe_arm(row) for row in best)
    for row in result.arms:
        if row["arm"] == result.reference and row not in best:
            rows["reference"] = _describe_arm(row)
    if result.reference is not None:
        rows["saving"] = _describe_saving(result.arms, best, result.reference)
    runs, arms = count_text(result.runs, "run"), count_text(len(result.arms), "arm")
    title = f"{result.out}: {runs} of {arms}"
    return Summary(
        title=title,
        rows=rows,
        command=_look_at(best[0]),
        warnings=tuple(result.document["warnings"]),
    )


def _find_best(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the arms of the highest accuracy, or of the lowest KL where one has no accuracy."""
    merits = []
    is_graded = all(row["accuracy"] is not None for row in arms)
    for row in arms:
        merits.append(row["accuracy"] if is_graded else -row["kl"])
    highest = max(merits)
    return [row for row, merit in zip(arms, merits, strict=True) if merit == highest]


def _look_at(row: dict[str, Any]) -> str:
    """Return the command that shows the first run of an arm, or continues it."""
    folder = shlex.quote(row["folders"][0])
    if row["state"] == "interrupted":
        return f"prefix-distill run --resume --out {folder}"
    return f"prefix-distill show {folder}"


def _describe_arm(row: dict[str, Any]) -> str:
    """Return an arm with its accuracy and its useful FLOPs."""
    accuracy = accuracy_cell(row)
    if row["accuracy"] is None:
        accuracy = f"KL {row['kl']:.3g} nats per token"
    return f"{arm_text(row)}: {accuracy}, {flops_text(row['flops_useful'])}"


@dataclass(frozen=True, order=True, kw_only=True)
class _Saving:
    """How much cheaper an arm reaches a share of the reference's gain."""

    share: float
    times: float
    arm: str
    interval: str

    def describe(self, reference: str) -> str:
        gain = f"{self.share:.0%} of the gain of {reference}"
        return f"{self.times:.1f}× {self.interval} for {self.arm} to reach {gain}"


def _describe_saving(
    arms: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]], reference: str
) -> str:
    """Return the cost ratios of the best arms; if that is the reference, of the cheapest other."""
    others = [row for row in arms if row["arm"] != reference and row["cost_ratios"]]
    savings = [saving for saving in map(_find_saving, others) if saving is not None]
    names = [row["arm"] for row in best]
    shown = [saving for saving in savings if saving.arm in names] or sorted(savings)[-1:]
    if others and not shown:
        return f"none: no other arm reaches half of the gain of {reference}"
    return "; ".join(saving.describe(reference) for saving in shown)


def _find_saving(row: dict[str, Any]) -> _Saving | None:
    """Return the cost ratio at the highest share of the reference's gain that an arm reaches."""
    for share, ratio in row["cost_ratios"].items():
        if ratio["value"] is not None:
            interval = f"[{ratio['low']:.1f}, {ratio['high']:.1f}]"
            times = ratio["value"]
            return _Saving(share=share, times=times, arm=row["arm"], interval=interval)
    return None


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured, because no problem has a reference answer that can be graded"
    return estimate.as_share()


def _nats(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _change(before: str, after: str) -> str:
    return f"{before} → {after}"
