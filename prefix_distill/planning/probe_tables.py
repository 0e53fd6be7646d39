"""A probe as rich tables."""

from rich.table import Table

from ..results.cells import recommendation_text

HEADINGS = (
    "N",
    "share of the KL in the first N tokens",
    "student accuracy after the teacher's first N tokens",
    "teacher accuracy after the student's first N tokens",
)


def tabulate_probe(document: dict) -> list[Table]:
    """Return the tables of a probe: accuracy and KL by prefix, and the quadrants."""
    return [_tabulate_curves(document), _tabulate_quadrants(document["quadrants"])]


def _tabulate_curves(document: dict) -> Table:
    """Return the table of the KL and of both models' accuracy by prefix length."""
    table = Table(title=recommendation_text(document["recommended_prefix"]))
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    student_curve, teacher_curve = document["teacher_prefix_curve"], document["teacher_decay_curve"]
    shares = {n: f"{share:.0%}" for n, share in document["kl_share_by_tokens"].items()}
    # Without reference answers there are no curves.
    if student_curve[0] is None:
        for n, share in shares.items():
            table.add_row(n, share, "–", "–")
        return table
    for student, teacher in zip(student_curve, teacher_curve, strict=True):
        # At N = 0 there is an accuracy, but no share of the KL.
        n = str(student["tokens"])
        table.add_row(n, shares.get(n, "–"), _format_accuracy(student), _format_accuracy(teacher))
    return table


def _format_accuracy(point: dict) -> str:
    return f"{point['value']:.0%} [{point['low']:.0%}, {point['high']:.0%}]"


def _tabulate_quadrants(quadrants: dict) -> Table:
    """Return the table of the quadrants of entropy and divergence."""
    entropy, kl = quadrants["borders"]
    table = Table(
        title=f"student tokens by quadrant (thresholds: medians, {entropy:.2g} nats entropy, "
        f"{kl:.2g} nats KL)"
    )
    table.add_column("quadrant")
    table.add_column("share of the tokens", justify="right")
    table.add_column("share of the KL", justify="right")
    for name, share in quadrants["quadrants"].items():
        table.add_row(name, f"{share['tokens']:.0%}", f"{share['divergence']:.0%}")
    return table
