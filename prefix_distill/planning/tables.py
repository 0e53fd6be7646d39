"""A plan as rich tables."""

from rich.table import Table

from ..display import flops_text
from .cards import CARDS


def tables(document: dict) -> list[Table]:
    """The plan as rich tables: prefixes, components, cards."""
    return [_tabulate_prefixes(document), _tabulate_memory(document), _tabulate_cards(document)]


def _tabulate_prefixes(document: dict) -> Table:
    """Return the table of FLOPs, time and memory by prefix."""
    table = Table(
        "prefix",
        "tokens",
        "FLOPs an update",
        "in all",
        "time",
        "memory, GiB",
        "set by",
        title=f"{document['method']}, {document['updates']} updates",
    )
    for row in document["prefixes"]:
        low, high = row["tokens"]
        tokens = str(low) if low == high else f"{low}–{high}"
        table.add_row(
            row["prefix"],
            tokens,
            flops_text(row["flops_per_update"]),
            flops_text(row["flops_total"]),
            _duration(row["seconds"]),
            _gib(row["memory"]["total"]),
            row["memory"]["set_by"],
        )
    return table


def _tabulate_memory(document: dict) -> Table:
    """Return the table of memory by component and phase, for the config's own prefix."""
    memory = document["prefixes"][0]["memory"]
    table = Table(
        "component",
        "GiB",
        title=f"memory, --prefix {document['prefixes'][0]['prefix']}, micro-batches of "
        f"{document['micro_batch_size']}",
    )
    for name, size in memory["weights"].items():
        table.add_row(name, _gib(size))
    for name, size in memory["phases"].items():
        table.add_row(f"while in {name}, beside these", _gib(size))
    if memory["teacher_device"] is not None:
        table.add_row("the teacher's device", _gib(memory["teacher_device"]))
    return table


def _tabulate_cards(document: dict) -> Table:
    """Return the table of the largest micro-batch that fits on each card."""
    table = Table(
        "",
        "needs, GiB",
        *(f"{card} GB" for card in CARDS),
        title="largest micro-batch that fits (rollouts)",
    )
    methods = dict.fromkeys(
        (row["method"], row["gradient_checkpointing"]) for row in document["cards"]
    )
    for method, recomputes in methods:
        rows = [
            r
            for r in document["cards"]
            if (r["method"], r["gradient_checkpointing"]) == (method, recomputes)
        ]
        cells = [
            "does not fit" if r["micro_batch"] is None else str(r["micro_batch"]) for r in rows
        ]
        table.add_row(
            method + (", gradient checkpointing" if recomputes else ""),
            _gib(rows[0]["total"]),
            *cells,
        )
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds:.3g} s"
