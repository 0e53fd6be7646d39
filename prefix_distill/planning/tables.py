"""A plan as rich tables."""

from collections.abc import Sequence

from rich.table import Table

from ..display import flops_text, memory_text, phase_text, short_time_text

TIME_IN_PREFIXES = "The time is not known; give --from-run RUN, --measure or --device-tflops."
TIME_ON_CARDS = "The time is not known; name a card, such as --card 4090."
MOST_CARD, MOST_FLAGS = 10, 40  # cells, so that a table has at most 80


def tabulate(document: dict) -> list[Table]:
    """Return the tables of a plan: prefixes, components, GPUs."""
    return [_tabulate_prefixes(document), _tabulate_memory(document), _tabulate_cards(document)]


def _tabulate_prefixes(document: dict) -> Table:
    """Return the table of FLOPs, time and memory by prefix; without a time if none is known."""
    table = Table(
        title=f"{document['method']}, {document['updates']} steps", caption_justify="left"
    )
    table.add_column("prefix", overflow="fold")
    for name in ("tokens", "FLOPs per step", "FLOPs"):
        table.add_column(name)
    is_timed = _is_known(document["prefixes"])
    if is_timed:
        table.add_column("time")
    else:
        table.caption = TIME_IN_PREFIXES
    table.add_column("memory")
    table.add_column("peak in")
    for row in document["prefixes"]:
        cells = [row["prefix"], _describe_tokens(row["tokens"])]
        cells += [flops_text(row["flops_per_update"]), flops_text(row["flops_total"])]
        if is_timed:
            cells.append(_format_seconds(row["seconds"]))
        memory = row["memory"]
        table.add_row(*cells, memory_text(memory["total"]), phase_text(memory["set_by"]))
    return table


def _describe_tokens(tokens: Sequence[int]) -> str:
    shortest, longest = tokens
    if shortest != longest:
        return f"{shortest}–{longest}"
    return str(longest)


def _tabulate_memory(document: dict) -> Table:
    """Return the table of memory by component and phase, for the config's own prefix."""
    first = document["prefixes"][0]
    memory = first["memory"]
    table = Table(
        "component",
        "memory",
        title=f"memory, --prefix {first['prefix']}, micro-batches of "
        f"{document['micro_batch_size']}",
    )
    for name, size in memory["weights"].items():
        table.add_row(name, memory_text(size))
    for name, size in memory["phases"].items():
        table.add_row(f"{phase_text(name)} (added in this phase)", memory_text(size))
    if memory["teacher_device"] is not None:
        table.add_row("the teacher's device", memory_text(memory["teacher_device"]))
    return table


def _tabulate_cards(document: dict) -> Table:
    """Return the table of the flags with which the run fits each card, and its time if known.

    It is at most 80 columns wide; the rule and the assumptions stand below it.
    """
    is_timed = _is_known(document["cards"])
    lines = [document["rule"], TIME_ON_CARDS]
    if is_timed:
        lines[1:] = document["assumptions"]
    table = Table(
        title="flags that fit each card", caption="\n".join(lines), caption_justify="left"
    )
    table.add_column("card", max_width=MOST_CARD)
    table.add_column("flags that fit", max_width=MOST_FLAGS)
    table.add_column("memory")
    if is_timed:
        table.add_column("time, assumed")
    for row in document["cards"]:
        cells = [row["card"], "does not fit", "–"]
        if row["fits"]:
            cells[1:] = [" ".join(row["flags"]), memory_text(row["total"])]
        if is_timed:
            cells.append(_format_seconds(row["seconds"]))
        table.add_row(*cells)
    return table


def _is_known(rows: Sequence[dict]) -> bool:
    """Return whether the time of some row is known."""
    return any(row["seconds"] is not None for row in rows)


def _format_seconds(seconds: float | None) -> str:
    """Return a duration in one unit; a dash if it is not known."""
    return "–" if seconds is None else short_time_text(seconds)
