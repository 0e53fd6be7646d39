"""The closing summaries of the commands before training: check, run --dry-run, plan, probe.

Each ends with the next command. ``words``: the options of the command itself, which it repeats.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..display import Summary, count_text, flags_text, flops_text, memory_text, time_text
from .documents import CheckResult, DryRun, PlanResult, ProbeResult

NOT_COUNTED = "without evaluations; decoding takes longer"
UNKNOWN_SPEED = "not known; --card NAME, --measure or --from-run RUN gives it"


def summarize_check(result: CheckResult, words: Sequence[str]) -> Summary:
    """Return the verdict, the warnings, the price, and the command that trains."""
    passed = sum(check["status"] == "ok" for check in result.checks)
    failed = sum(check["status"] == "error" for check in result.checks)
    parts = [f"{passed} of {len(result.checks)} checks are ok"]
    if result.warnings:
        parts.append(count_text(len(result.warnings), "warning"))
    if failed:
        parts.append(count_text(failed, "error"))
    title = ", ".join(parts)
    if not result.ok:
        return Summary(title=title, rows={}, warnings=result.warnings)
    rows = _describe_price(result.document["price"], result.document["steps"])
    command = _command("run", words)
    return Summary(title=title, rows=rows, command=command, warnings=result.warnings)


def summarize_dry_run(result: DryRun, words: Sequence[str]) -> Summary:
    """Return what the run would cost, and the command that trains."""
    document = result.document
    steps = document["config"]["train"]["steps"]
    rows = _describe_price(document["price"], steps)
    for check in document["checks"]:
        if check["name"] == "memory":
            rows["memory"] = check["found"]
    return Summary(
        title=f"dry run of {count_text(steps, 'step')}: nothing was written",
        rows=rows,
        command=_command("run", words),
        warnings=tuple(document["warnings"]),
    )


def _describe_price(price: dict[str, Any], steps: int) -> dict[str, str]:
    """Return the rows of FLOPs, time and disk."""
    from ..planning.disk import describe_sizes

    flops, full = price["flops"], price["full_rollout_flops"]
    text = f"{flops_text(flops)} for {count_text(steps, 'step')}"
    if full > flops > 0:
        text += f"; full rollouts: {flops_text(full)}, {full / flops:.1f}×"
    if price["not_in_flops"]:
        text += f"; not counted: {', '.join(price['not_in_flops'])}"
    time = f"at least {time_text(price['least_seconds'])} on this machine, {NOT_COUNTED}"
    return {"FLOPs": text, "time": time, "disk": describe_sizes(price["disk"])}


def summarize_plan(result: PlanResult, words: Sequence[str], *, for_cards: bool) -> Summary:
    """Return what the run needs, what it fits, its price, and the command that checks it.

    ``for_cards``: the user named the cards, so the command has the flags of the first that fits.
    """
    from ..planning.disk import describe_sizes

    document = result.document
    first = document["prefixes"][0]
    needed = memory_text(first["memory"]["total"])
    rows = {
        "machine": _describe_machine(document["machine"], for_cards=for_cards),
        "cards": _describe_cards(document["cards"]),
        "FLOPs": _describe_flops(document),
        "time": _describe_time(document),
        "disk": describe_sizes(document["disk"]),
    }
    flags = _choose_flags(document, for_cards=for_cards)
    command = ""
    if flags is not None:
        command = _command("check", [*words, *flags])
    steps = count_text(document["updates"], "step")
    title = f"{document['method']}, {steps}, --prefix {first['prefix']}: needs {needed}"
    return Summary(title=title, rows=rows, command=command, warnings=result.warnings)


def _describe_machine(machine: dict[str, Any] | None, *, for_cards: bool) -> str:
    """Return whether the run fits this machine, and otherwise with which flags it does."""
    if machine is None:
        return ""
    free = f"{memory_text(machine['free_bytes'])} free on {machine['device']}"
    if machine["fits"]:
        return f"fits, {free}"
    if machine["flags"] is None:
        return f"does not fit, {free}; choose smaller models or one of the cards"
    if for_cards:
        return f"does not fit, {free}; it does with {flags_text(machine['flags'])}"
    return f"does not fit, {free}; it does with the flags of the next command"


def _describe_cards(fits: list[dict[str, Any]]) -> str:
    """Return the flags that fit each card; those of the smallest, where cards need the same."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in fits:
        names = [word for word in row["flags"] or () if word.startswith("--")]
        groups.setdefault(tuple(names), []).append(row)
    parts = []
    for rows in groups.values():
        smallest = min(rows, key=_memory_of)
        flags = "does not fit"
        if smallest["fits"]:
            flags = flags_text(smallest["flags"])
        cards = ", ".join(row["card"] for row in rows)
        parts.append(f"{cards}: {flags}")
    return "; ".join(parts)


def _memory_of(row: dict[str, Any]) -> float:
    memory: float = row["memory_gb"]
    return memory


def _describe_flops(document: Mapping[str, Any]) -> str:
    """Return the FLOPs of the run, and those of the full rollouts that were planned beside it."""
    first, *others = document["prefixes"]
    flops = first["flops_total"]
    text = flops_text(flops)
    for row in others:
        if row["prefix"] == "full" and row["flops_total"] > flops > 0:
            full = row["flops_total"]
            text += f"; full rollouts: {flops_text(full)}, {full / flops:.1f}×"
    return text


def _describe_time(document: Mapping[str, Any]) -> str:
    """Return the time at the given speed and on the cards whose speed is known."""
    parts = []
    seconds = document["prefixes"][0]["seconds"]
    if seconds is not None:
        parts.append(f"{time_text(seconds)} ({document['rate']['source']})")
    on_cards = []
    for row in document["cards"]:
        if row["seconds"] is not None:
            on_cards.append(f"{row['card']}: {time_text(row['seconds'])}")
    if on_cards:
        parts.append(f"{', '.join(on_cards)} (assumed rates)")
    return "; ".join(parts) or UNKNOWN_SPEED


def _choose_flags(document: Mapping[str, Any], *, for_cards: bool) -> Sequence[str] | None:
    """Return the flags with which the run fits: here, or else the first card that it fits."""
    machine = document["machine"]
    if machine is not None and not for_cards:
        if machine["fits"]:
            return ()
        if machine["flags"] is not None:
            flags: list[str] = machine["flags"]
            return flags
    for row in document["cards"]:
        if row["fits"]:
            flags = row["flags"]
            return flags
    return None


def summarize_probe(result: ProbeResult, words: Sequence[str]) -> Summary:
    """Return the recommended prefix and why, and the command that trains with it."""
    prefix = result.recommended_prefix
    recommendation, command = "no prefix is recommended", ""
    if prefix is not None:
        recommendation = f"--prefix {prefix} is recommended"
        command = _command("run", [*words, "--prefix", str(prefix)])
    saving = ""
    if isinstance(prefix, int):
        saving = f"full rollouts take {result.expected_saving:.1f}× the FLOPs of a step"
    kl = ""
    if result.kl is not None:
        kl = result.kl.as_nats()
    rows = {
        "why": result.reason,
        "saving": saving,
        "KL": kl,
        "time": time_text(result.seconds),
        "picture": str(result.picture()),
    }
    return Summary(title=f"{result.out}: {recommendation}", rows=rows, command=command)


def _command(name: str, words: Sequence[str]) -> str:
    return shlex.join(["prefix-distill", name, *words])
