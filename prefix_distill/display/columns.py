"""Lay the columns of the live line out in the width of the terminal."""

from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

BETWEEN = " · "
ROOM = 12  # cells beside a text that is cut
EXTRA = 9  # columns from this rank on are shown only where all others have room for their longest


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a line.

    ``texts``: its texts, from the longest to the shortest. ``rank``: where there is no room for all
    columns, those of the highest rank are left out.
    """

    texts: tuple[str, ...]
    rank: int


def fit_columns(columns: list[Column], width: int) -> str:
    """Return the columns in their order as one line of at most ``width`` cells.

    First every column gets its shortest text, in the order of ranks, as far as there is room. Then
    longer texts use the room that is left, and then the extra columns.
    """
    line = _Line(columns, width)
    first, *others = sorted(range(len(columns)), key=lambda i: columns[i].rank)
    line.choose(first, (columns[first].texts[-1], _crop(columns[first], width)))
    needed = [i for i in others if columns[i].rank < EXTRA]
    for i in needed:
        line.choose(i, columns[i].texts[-1:])
    for i in (first, *needed):
        line.choose(i, columns[i].texts)
    for i in others[len(needed) :]:
        line.choose(i, columns[i].texts)
    return line.text


def _crop(column: Column, width: int) -> str:
    """Return the shortest text of a column, cut so that a short column fits beside it."""
    room = max(1, width - ROOM, width // 2)
    return set_cell_size(column.texts[-1], room - 1).rstrip() + "…"


class _Line:
    """A line in the making. ``chosen``: the text of each column that is shown."""

    def __init__(self, columns: list[Column], width: int):
        self.columns = columns
        self.width = width
        self.chosen: dict[int, str] = {}

    @property
    def text(self) -> str:
        return BETWEEN.join(self.chosen[i] for i in sorted(self.chosen))

    def choose(self, i: int, texts: tuple[str, ...]) -> None:
        """Show the first of ``texts`` that fits in column ``i``."""
        former = dict(self.chosen)
        for text in texts:
            self.chosen[i] = text
            if cell_len(self.text) <= self.width:
                return
        self.chosen = former
