"""Write the rows of a summary as text: for the screen, for Markdown, for the page."""

from collections.abc import Iterable

from ..display import flops_text, short_time_text

# of the table on the screen, which fits 80 columns; the files have all HEADINGS
SCREEN_HEADINGS = ("arm", "accuracy % [95%]", "FLOPs", "time", "÷ full")
HEADINGS = (
    "arm",
    "accuracy [95%]",
    "useful FLOPs",
    "executed FLOPs",
    "FLOPs of full rollouts ÷ these",
    "training time",
    "KL beyond the prefix, before → after",
    "finished",
    "accuracy of finished answers",
    "tokens",
    "cost saving (×) to reach 50% of the reference's gain",
    "to reach 90%",
    "to reach 100%",
)


def screen_cells(row: dict) -> list[str]:
    """Return a summary row as text, under SCREEN_HEADINGS."""
    accuracy = "–"
    if row["accuracy"] is not None:
        accuracy = f"{100 * row['accuracy']:.1f}"
        if row["low"] is not None:
            accuracy += f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return [
        arm_text(row),
        accuracy,
        flops_text(row["flops_useful"]),
        short_time_text(row["seconds"]),
        saving_text(row),
    ]


def cells(row: dict) -> list[str]:
    """Return a summary row as text, under HEADINGS."""
    ratios = row["cost_ratios"]
    return [
        arm_text(row),
        accuracy_cell(row),
        flops_text(row["flops_useful"]),
        flops_text(row["flops_executed"]),
        saving_text(row),
        short_time_text(row["seconds"]),
        _tail_text(row),
        f"{row['finish_rate']:.0%}",
        _percent_text(row["finished_accuracy"]),
        f"{row['mean_tokens']:.0f}",
        ratio_text(ratios.get(0.5)),
        ratio_text(ratios.get(0.9)),
        ratio_text(ratios.get(1.0)),
    ]


def arm_text(row: dict) -> str:
    """Return an arm's name, and where its runs are if they have not finished."""
    if row["state"] == "finished":
        return str(row["arm"])
    return f"{row['arm']} ({row['state']}, step {row['updates']})"


def saving_text(row: dict) -> str:
    """Return how many times the arm's FLOPs full rollouts take, by the arm's own estimate.

    An arm with full rollouts needs no estimate: 1.
    """
    if row["full_rollouts"]:
        return "1.0×"
    full = row["full_rollout_cost"]
    if not full or not row["flops_useful"]:
        return "–"
    return f"{full / row['flops_useful']:.1f}×"


def recommendation_text(prefix: int | str | None) -> str:
    """Return what a probe recommends, as a title; ``prefix`` None: nothing."""
    if prefix is None:
        return "no recommendation: the teacher did not beat the student on these problems"
    if prefix == "full":
        return "recommended: full rollouts (--prefix full)"
    return f"recommended: --prefix {prefix}"


def _percent_text(share: float | None) -> str:
    """Return a share in percent with one decimal; "–" without one."""
    return "–" if share is None else f"{share:.1%}"


def accuracy_cell(row: dict) -> str:
    """Return an accuracy with its interval and its number of answers."""
    accuracy = row["accuracy"]
    low = row["low"]
    high = row["high"]
    answers = row["answers"]
    if accuracy is None:
        return "–"
    if low is None:
        return f"{accuracy:.1%} of {answers:,}"
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}] of {answers:,}"


def _tail_text(row: dict) -> str:
    """Return the KL beyond the arm's own prefix, before → after training."""
    before = row["kl_tail_before"]
    after = row["kl_tail"]
    if before is None or after is None:
        return "–"
    return f"{before:.3g} → {after:.3g}"


def ratio_text(ratio: dict | None) -> str:
    """Return a cost ratio with its interval, and the share of draws that reach the accuracy.

    The share is omitted if it is 100%.
    """
    if ratio is None:
        return "–"
    value = ratio["value"]
    reached = ratio["reached"]
    if value is None:
        return f"not reached ({reached:.0%} of bootstrap samples)"
    text = f"{value:.1f} × [{ratio['low']:.1f}, {ratio['high']:.1f}]"
    if reached < 1:
        text += f", reached in {reached:.0%} of bootstrap samples"
    return text


def markdown_table(summary_rows: list[dict]) -> str:
    """Return the summary as a Markdown table."""
    text = _markdown_line(HEADINGS)
    text += "|---|" + "--:|" * (len(HEADINGS) - 1) + "\n"
    for row in summary_rows:
        text += _markdown_line(cells(row))
    return text


def _markdown_line(texts: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    line = "|"
    for text in texts:
        clean = text.replace("|", "\\|").replace("\n", " ")
        line += f" {clean} |"
    return line + "\n"
