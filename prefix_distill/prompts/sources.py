"""Names of data sets: ``gsm8k``, ``name#1000``, ``a:3,b:1``."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from ..lab.task import LAB
from .presets import PRESETS, Preset, nearest

FORMATS = (".jsonl", ".json", ".csv", ".parquet")


def is_path(name: str) -> bool:
    """Is it written as a path, of this or another system, and so no hub id?"""
    return name.startswith((".", "~", "/", "\\")) or "\\" in name or name[1:3] == ":/"


@dataclass(frozen=True)
class Source:
    """One data set, as named: ``place`` is a file, a folder, a hub id or lab:TASK; ``count`` the
    rows of name#count."""

    text: str
    name: str
    place: str
    preset: Preset | None
    count: int | None

    @property
    def local(self) -> bool:
        """Is it a file, which has no splits?"""
        return _there(self.place, Path.is_file)


def sources(text: str) -> list[tuple[str, Fraction]]:
    """``gsm8k:3,more.jsonl#100:1`` → [("gsm8k", 3), ("more.jsonl#100", 1)]. The weight (1 where
    none is given) follows the last colon; one data set alone has none, so that lab:TASK:20-25 and
    C:\\x.jsonl stay what they are. UserError on an empty name or weight 0."""
    if "," not in text or _there(text):
        return [(text, Fraction(1))]
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:\s].*?)(?::([0-9]{1,6}(?:\.[0-9]{1,6})?))?", part.strip(), re.S)
        if match is None or Fraction(match[2] or 1) == 0:
            raise UserError(
                f"dataset {text[:200]}: expected data sets and their weights such as "
                f"gsm8k:3,more.jsonl:1, got '{part.strip()[:80]}'; name one, with a weight above 0"
            )
        found.append((match[1], Fraction(match[2] or 1)))
    return found


def parse_source(text: str) -> Source:
    """``name``, ``name#1000``, ``preset=place`` or ``preset=place#1000``."""
    name, mark, digits = text.rpartition("#")
    count = None
    if not mark or _there(text) or re.search(r"[/\\.]", digits):
        name = text
    elif not re.fullmatch("[0-9]{1,12}", digits) or int(digits) == 0 or not name:
        raise UserError(
            f"dataset {text[:200]}: expected a number of rows behind #, such as "
            f"{name[:80] or 'gsm8k'}#1000, got '{digits[:80]}'"
        )
    else:
        count = int(digits)
    short, given, place = name.partition("=")
    if given and not _there(name) and not re.search(r"[/\\]", short):
        if short.lower() not in PRESETS or not place or place.startswith(LAB):
            near = nearest(short)
            raise UserError(
                f"dataset {text[:200]}: expected PRESET=PLACE such as gsm8k=my.jsonl, a file, "
                "folder or hub id; "
                + (
                    f"did you mean {near}?"
                    if near and near != short.lower()
                    else f"presets are {', '.join(PRESETS)}"
                )
            )
    else:
        short, place = name, ""
    preset = PRESETS.get(short.lower())
    return Source(
        text,
        name,
        name if preset is None else place or preset.hub,
        preset,
        count,
    )


def _there(text: str, what=Path.exists) -> bool:
    try:
        return what(Path(text).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False
