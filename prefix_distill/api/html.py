"""HTML of results for notebooks. Every text is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table with a caption."""
    parts = ["<table>"]
    if title:
        parts.append(f"<caption>{escape(title)}</caption>")
    parts.append(f"<thead>{_row(headings, 'th')}</thead><tbody>")
    for cells in rows:
        parts.append(_row(cells, "td"))
    parts.append("</tbody></table>")
    return "".join(parts)


def from_rich(shown: "Table") -> str:
    """Return a rich table as HTML."""
    headings = [str(column.header) for column in shown.columns]
    columns = [map(str, column.cells) for column in shown.columns]
    return table(str(shown.title or ""), headings, zip(*columns, strict=True))


def paragraphs(texts: Iterable[str]) -> str:
    """Return one HTML paragraph per text."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _row(cells: Iterable[str], tag: str) -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"
