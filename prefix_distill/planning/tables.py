"""A plan as rich tables."""

from rich.table import Table

from ..display import flops_text
from .cards import CARDS


def tabulate(document: dict) -> list[Table]:
    """Return the tables of a plan: prefixes, components, GPUs."""
    return [_tabulate_prefixes(document), _tabulate_memory(document), _tabulate_cards(document)]


def _tabulate_prefixes(document: dict) -> Table:
    """Return the table of FLOPs, time and memory by prefix."""
    table = Table(
        "prefix",
        "tokens",
        "FLOPs per step",
        "FLOPs",
        "time",
        "memory, GiB",
        "peak in",
        title=f"{document['method']}, {document['updates']} steps",
    )
    for row in document["prefixes"]:
        shortest, longest = row["tokens"]
        tokens = str(longest)
        if shortest != longest:
            tokens = f"{shortest}–{longest}"
        table.add_row(
            row["prefix"],
            tokens,
            flops_text(row["flops_per_update"]),
            flops_text(row["flops_total"]),
            _format_seconds(row["seconds"]),
            _format_gib(row["memory"]["total"]),
            row["memory"]["set_by"],
        )
    return table


def _tabulate_memory(document: dict) -> Table:
    """Return the table of memory by component and phase, for the config's own prefix."""
    first = document["prefixes"][0]
    memory = first["memory"]
    table = Table(
        "component",
        "GiB",
        title=f"memory, --prefix {first['prefix']}, micro-batches of "
        f"{document['micro_batch_size']}",
    )
    for name, size in memory["weights"].items():
        table.add_row(name, _format_gib(size))
    for name, size in memory["phases"].items():
        table.add_row(f"{name} (added in this phase)", _format_gib(size))
    if memory["teacher_device"] is not None:
        table.add_row("the teacher's device", _format_gib(memory["teacher_device"]))
    return table


def _tabulate_cards(document: dict) -> Table:
    """Return the table of the largest micro-batch that fits on each GPU."""
    table = Table(
        "",
        "needs, GiB",
        *[f"{card} GB" for card in CARDS],
        title="largest micro-batch (rollouts) that fits a GPU of this size",
    )
    methods: dict[str, list[dict]] = {}
    for row in document["cards"]:
        method = row["method"]
        if row["gradient_checkpointing"]:
            method += ", gradient checkpointing"
        methods.setdefault(method, []).append(row)
    for method, rows in methods.items():
        cells = [_format_micro_batch(row) for row in rows]
        table.add_row(method, _format_gib(rows[0]["total"]), *cells)
    return table


def _format_micro_batch(row: dict) -> str:
    if row["micro_batch"] is None:
        return "does not fit"
    return str(row["micro_batch"])


def _format_gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _format_seconds(seconds: float | None) -> str:
    """Return seconds, or hours from one hour on; a dash if they are not known."""
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds:.3g} s"
