"""The closing summary of each command, from its result."""

import shlex

from ..display import Summary, flops_text, time_text
from .documents import EvaluationResult, ExportResult, RunResult
from .result import Estimate, Result


def summarize(result: Result) -> Summary | None:
    """Return what a command shows last; None if the tables of its result say everything."""
    if isinstance(result, RunResult):
        return summarize_run(result)
    if isinstance(result, EvaluationResult):
        return summarize_evaluation(result)
    if isinstance(result, ExportResult):
        return summarize_export(result)
    return None


def summarize_run(result: RunResult) -> Summary:
    """Return before and after, the cost, and where the model is."""
    out = shlex.quote(str(result.out))
    last = result.evaluations[-1]
    answers = f"{last['finish_rate']:.0%} finished, {last['mean_tokens']:.0f} tokens on average"
    rows = {
        "accuracy": _change(_share(result.accuracy_before), _share(result.accuracy_after)),
        "teacher": _describe_teacher(result),
        "KL": _change(_nats(result.kl_before), _nats(result.kl_after))
        + " nats per token, student to teacher",
        "answers": answers,
        "FLOPs": _describe_cost(result),
        "rounded": _describe_rounding(result),
        "hub": result.pushed or "",
        "model": str(result.model),
    }
    command = f"prefix-distill show {out}"
    took = time_text(result.seconds)
    title = f"{result.out}: {result.steps} steps, {took} of training and evaluation"
    return Summary(title=title, rows=rows, command=command, warnings=result.warnings)


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
        "answers": f"{result.finish_rate:.1%} finished, {result.mean_tokens:.0f} tokens on average",
        "time": time_text(result.seconds),
        "file": str(result.examples),
    }
    return Summary(title=f"{result.model} on {result.dataset}", rows=rows)


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


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured, because no problem has a reference answer"
    return estimate.as_share()


def _nats(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _change(before: str, after: str) -> str:
    if before == after:
        return before
    return f"{before} → {after}"
