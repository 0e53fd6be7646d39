"""The plugins of a run in its folder: hashes in run.json, copies in plugins/.

The copies document the run and show what changed; they are never executed.
"""

import difflib
from collections.abc import Sequence

from ..engine.ranks import Place
from ..errors import UserError
from ..plugins import Plugin
from ..prompts.grading import Grader
from .folder import RunFolder

KEY = "plugins"  # in run.json: the plugins in use, and under "earlier" the hashes they had before


def describe_grader(grader: Grader) -> tuple[Plugin, ...]:
    """Return the file of a user's grader, to be recorded as plugins are."""
    own = grader.own
    if own is None:
        return ()
    return (Plugin(name=own.name, file=own.file, source=own.source, divergences={}, schedules={}),)


def record_plugins(folder: RunFolder, place: Place, plugins: Sequence[Plugin]) -> list[str]:
    """Record the plugins in the run folder; return a warning for each one that changed.

    All ranks call it. UserError: the ranks loaded different texts.
    """
    hashes = [plugin.sha256 for plugin in plugins]
    if any(others != hashes for others in place.gather(hashes)):
        raise UserError(
            "--plugin: the files differ between ranks; give every machine the same file"
        )
    if not place.is_first:
        return []
    document = folder.read_json("run.json")
    recorded = {record["file"]: record for record in document.get(KEY, [])}
    records, warnings = [], []
    for plugin in plugins:
        if not plugin.source:
            warnings.append(
                f"{plugin.name}: its text is not known, so the run folder does not record it; "
                "register it in a file and use --plugin"
            )
            continue
        copy = f"plugins/{plugin.sha256[:12]}-{plugin.file.name}"
        record = {"file": plugin.file.name, "sha256": plugin.sha256, "copy": copy, "earlier": []}
        before = recorded.pop(plugin.file.name, None)
        if before is not None:
            record["earlier"] = before["earlier"]
            if before["sha256"] != plugin.sha256:
                record["earlier"] = [*before["earlier"], before["sha256"]]
                warnings.append(_describe_change(folder, before, plugin))
        folder.write_bytes(copy, plugin.source)
        records.append(record)
    warnings += [f"plugin {name}: no longer loaded; the run began with it" for name in recorded]
    if records or KEY in document:
        folder.write_json("run.json", document | {KEY: records})
    return warnings


def _describe_change(folder: RunFolder, before: dict, plugin: Plugin) -> str:
    """Return how a plugin differs from the one that the run used before."""
    size = ""
    copy = folder.path / before["copy"]
    if copy.is_file():
        old = copy.read_text(encoding="utf-8", errors="replace").splitlines()
        new = plugin.source.decode("utf-8", errors="replace").splitlines()
        added, removed = _count_changes(old, new)
        size = f" ({added} lines added, {removed} removed; the earlier text is {before['copy']})"
    return (
        f"plugin {plugin.name}: its content changed since the last checkpoint{size}; the result "
        "differs from a run that used one text throughout"
    )


def _count_changes(old: list[str], new: list[str]) -> tuple[int, int]:
    """Return how many lines were added and removed."""
    changes = list(difflib.ndiff(old, new))
    added = [line for line in changes if line.startswith("+ ")]
    removed = [line for line in changes if line.startswith("- ")]
    return len(added), len(removed)
