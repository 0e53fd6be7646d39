"""Names of datasets: ``gsm8k``, ``name#1000``, ``a:3,b:1``."""

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from ..lab.task import LAB
from .presets import PRESETS, Preset, closest_preset

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def is_path(name: str) -> bool:
    """Return whether ``name`` is written as a path of any system, and so is not a hub id."""
    return name.startswith((".", "~", "/", "\\")) or "\\" in name or name[1:3] == ":/"


def list_matches(pattern: str) -> list[Path]:
    """Return the files whose path matches a pattern, sorted; ``**`` matches any folders."""
    paths = map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True))
    return sorted(path for path in paths if path.is_file())


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``repo@revision`` of the hub; a path, a file or a built-in name has no revision.

    A revision is a branch, a tag or a commit.
    """
    repo, _, revision = name.rpartition("@")
    is_local = _exists(name) or is_path(name) or name.startswith(LAB)
    if not repo or not revision or is_local or name.endswith(FORMATS):
        return name, None
    return repo, revision


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset as the user names it.

    - ``text``: the whole name; ``name``: the same without ``#count``.
    - ``location``: a file, a folder, a hub id or ``lab:TASK``.
    - ``count``: the number of rows to sample (``name#count``), or None for all rows.
    - ``revision``: the branch, tag or commit of a hub id (``name@revision``), or None.
    """

    text: str
    name: str
    location: str
    preset: Preset | None
    count: int | None
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Return whether the dataset is a local file or a pattern of them, without splits."""
        return self.is_pattern or _exists(self.location, Path.is_file)

    @property
    def is_pattern(self) -> bool:
        """Return whether the location is a pattern of file names, such as data/*.parquet."""
        return glob.has_magic(self.location) and not _exists(self.location)

    @property
    def is_embedded(self) -> bool:
        """Return whether the dataset is that of a built-in task."""
        return self.location.startswith(LAB)

    @property
    def training_split(self) -> str:
        """Return the preset's training split, else train."""
        if self.preset is None:
            return "train"
        return self.preset.split

    @property
    def test_split(self) -> str:
        """Return the preset's test split, else test."""
        if self.preset is None:
            return "test"
        return self.preset.test


def split_sources(text: str) -> list[tuple[str, Fraction]]:
    """Split datasets and weights: ``gsm8k:3,more.jsonl#100:1`` gives [("gsm8k", 3),
    ("more.jsonl#100", 1)].

    The weight follows the last colon and defaults to 1. A single dataset has no weight, so
    ``lab:TASK:20-25`` and ``C:\\x.jsonl`` stay whole. Raise UserError on an empty name or weight 0.
    """
    if "," not in text or _exists(text):
        return [(text, Fraction(1))]
    weighted = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:\s].*?)(?::([0-9]{1,6}(?:\.[0-9]{1,6})?))?", part.strip(), re.S)
        if match is None or Fraction(match[2] or 1) == 0:
            raise UserError(
                f"dataset {text[:200]}: expected datasets with weights above 0, such as "
                f"gsm8k:3,more.jsonl:1, got '{part.strip()[:80]}'; correct this entry"
            )
        weighted.append((match[1], Fraction(match[2] or 1)))
    return weighted


def parse_source(text: str) -> Source:
    """Parse ``name``, ``name#1000``, ``preset=location`` or ``preset=location#1000``.

    Raise UserError on a bad row count or an unknown preset.
    """
    name, count = _split_count(text)
    unpinned, revision = split_revision(name)
    preset_name, location = _split_preset(text, unpinned)
    preset = PRESETS.get(preset_name.lower())
    if preset is None:
        location = unpinned
    elif not location:
        location = preset.hub
    return Source(
        text=text, name=name, location=location, preset=preset, count=count, revision=revision
    )


def _split_count(text: str) -> tuple[str, int | None]:
    """Split ``name#1000`` into the name and the number of rows."""
    name, mark, digits = text.rpartition("#")
    if not mark or _exists(text) or re.search(r"[/\\.]", digits):
        return text, None
    if not re.fullmatch("[0-9]{1,12}", digits) or int(digits) == 0 or not name:
        raise UserError(
            f"dataset {text[:200]}: expected a number of rows after #, such as "
            f"{name[:80] or 'gsm8k'}#1000, got '{digits[:80]}'"
        )
    return name, int(digits)


def _split_preset(text: str, name: str) -> tuple[str, str]:
    """Split ``preset=location``; the location is empty if ``name`` gives none."""
    preset_name, equals, location = name.partition("=")
    if not equals or _exists(name) or re.search(r"[/\\]", preset_name):
        return name, ""
    if preset_name.lower() in PRESETS and location and not location.startswith(LAB):
        return preset_name, location
    advice = f"presets are {', '.join(PRESETS)}"
    close = closest_preset(preset_name)
    if close is not None and close != preset_name.lower():
        advice = f"did you mean {close}?"
    raise UserError(
        f"dataset {text[:200]}: expected PRESET=LOCATION such as gsm8k=my.jsonl, where LOCATION is "
        f"a file, folder or hub id; {advice}"
    )


def _exists(text: str, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Return ``test`` of the path, or False if ``text`` is not a valid path."""
    try:
        return test(Path(text).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False
