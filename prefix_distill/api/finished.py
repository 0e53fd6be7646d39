"""Read the result of a finished run from its folder."""

from pathlib import Path

from ..errors import UserError
from .documents import RunResult


def load(out: str | Path) -> RunResult:
    """Return the result of the finished run in the folder ``out``.

    UserError: the folder holds no finished run, or its run.json is damaged.
    """
    from ..results import shapes
    from .arguments import read_folder

    file = read_folder("out", out) / "run.json"
    if not file.is_file():
        raise UserError(f"run folder {out}: expected a run.json, got none; check the path")
    facts = shapes.read_json(file, dict[str, object])
    if "result" not in facts:
        raise UserError(
            f"run folder {out}: expected a finished run, got an unfinished one; continue it with "
            "resume"
        )
    shapes.check(facts, shapes.LoadedRun, str(file))
    document = {"out": str(out), **facts["result"], "pushed": None}
    notes, warnings = facts.get("notes", []), facts.get("warnings", [])
    return RunResult.read({"document": document, "notes": notes, "warnings": warnings})
