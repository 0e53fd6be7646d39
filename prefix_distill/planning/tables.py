"""A plan as rich tables."""

from rich.table import Table

from ..display import flops_text, short_time_text


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
    """Return the table of the flags with which the run fits each card, and its time there.

    It is at most 80 columns wide; the rule and the assumptions stand below it.
    """
    table = Table(title="flags that fit each card", caption=_describe_fits(document))
    table.add_column("card", max_width=10)
    table.add_column("flags that fit", max_width=46)
    table.add_column("GiB")
    table.add_column("time, assumed")
    for row in document["cards"]:
        if row["fits"]:
            table.add_row(
                row["card"],
                " ".join(row["flags"]),
                _format_gib(row["total"]),
                _format_seconds(row["seconds"]),
            )
        else:
            table.add_row(row["card"], "does not fit", "–", "–")
    return table


def _describe_fits(document: dict) -> str:
    """Return the rule by which flags were found, and what their times assume."""
    lines = [document["rule"]]
    if any(row["seconds"] is not None for row in document["cards"]):
        lines += document["assumptions"]
    return "\n".join(lines)


def _format_gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _format_seconds(seconds: float | None) -> str:
    """Return a duration in one unit; a dash if it is not known."""
    return "–" if seconds is None else short_time_text(seconds)
