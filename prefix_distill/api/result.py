"""What all results of the API have in common."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from . import html

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95% bootstrap interval from ``low`` to ``high``.

    ``n``: the number of problems (of an accuracy) or tokens (of a KL divergence).
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Self | None:
        """Return the estimate that a document holds; None if it holds none."""
        if values is None:
            return None
        return cls(value=values["value"], low=values["low"], high=values["high"], n=values["n"])

    def as_share(self) -> str:
        """Return the text of a share: "90.0% [85.0%, 94.0%] of 200"."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n:,}"

    def as_nats(self) -> str:
        """Return the text of a divergence: "0.12 [0.10, 0.14] nats per token"."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] nats per token"


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations.

    ``useful``: of the algorithm; ``executed``: with padding and repeated work; ``by_phase``: phase
    → {useful, executed}; ``not_counted``: parts of the two models that are left out.
    """

    useful: float
    executed: float
    by_phase: Mapping[str, Mapping[str, float]]
    not_counted: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result of a function. ``document``: the JSON document of the command."""

    document: Mapping[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document of the command as new plain values."""
        document: dict[str, Any] = json.loads(json.dumps(self.document))
        return document

    def tables(self) -> list["Table"]:
        """Return the result as rich tables."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """Return the sentences below the tables."""
        return []

    def picture(self) -> Path | None:
        """Return a PNG file that shows the result, if there is one."""
        return None

    def _repr_html_(self) -> str:
        parts = [html.from_rich(table) for table in self.tables()]
        parts.append(html.paragraphs(self.remarks()))
        file = self.picture()
        if file is not None and file.is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(f'<img src="data:image/png;base64,{data}" alt="">')
        return "".join(parts)


def listing(title: str, rows: Mapping[str, str]) -> "Table":
    """Return a table of names and values."""
    from rich.table import Table

    table = Table("", "", title=title)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
