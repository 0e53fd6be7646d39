"""What a person sees while it works: a live line on a terminal, plain lines in a pipe; always on
stderr."""

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.table import Table


def tell(text: str) -> None:
    """A line on stderr, as long as anyone reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # the terminal or the pipe has gone; what is left in its buffer must not fail again at the
        # end
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends


def plain() -> bool:
    """Is text wanted that reads well aloud and in a log: no bars, boxes or colours?"""
    return (
        any(os.environ.get(name) for name in ("PREFIX_DISTILL_PLAIN", "NO_COLOR"))
        or os.environ.get("TERM") == "dumb"
    )


def show(*tables: "Table", width: int | None = None) -> None:
    """rich tables on stderr; where ``plain``, a line "column: value" for every cell, behind a
    line with the row's first one."""
    if not plain():
        from rich.console import Console

        console = Console(stderr=True, width=width)
        with console.capture() as text:
            console.print(*tables)
        tell(text.get().removesuffix("\n"))
        return
    for table in tables:
        if table.title:
            tell(f"{table.title}")
        names = [str(column.header) for column in table.columns]
        for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
            tell(f"{names[0]}: {first}" if names[0] else f"{first}")
            for name, cell in zip(names[1:], cells, strict=True):
                tell(f"  {name}: {cell or '–'}")


def flops_text(value: float) -> str:
    """1.5e12 → '1.5 TFLOP'."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def share_text(score: dict | None) -> str:
    """An accuracy with its interval, in per cent."""
    if score is None:
        return "–"
    return f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}] of {score['n']}"


class Reporter(Protocol):
    """Receives the progress of a training run; every rank calls its reporter at the same points.

    The parameters are positional-only, so that an implementation may rename or combine them.
    """

    def note(self, text: str, /) -> None:
        """Show a progress note."""

    def warn(self, text: str, /) -> None:
        """Show a warning that every rank reports."""

    def own(self, text: str, /) -> None:
        """Show a warning that only this rank reports."""

    def row(self, row: dict, useful: float, full: float, /) -> None:
        """Show one update: its metrics row and the useful FLOPs so far.

        ``full``: the useful FLOPs that as many updates with full rollouts would take.
        """

    def evaluation(self, row: dict, /) -> None:
        """Show one evaluation: its row in ``Progress.evaluations``."""

    def tail(self, row: dict, /) -> None:
        """Show one tail probe: its row in ``Progress.tail_probes``."""


class Display:
    """Progress of one run; in a pipe, about fifty lines however long it is. Nothing where not
    ``shown`` (other ranks). A terminal or a pipe that has gone does not stop the run."""

    def __init__(self, steps: int, label: str = "", shown: bool = True):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self.steps, self.label, self.seen = steps, label, 0
        self.plain_every = max(1, steps // 50)
        self.started = time.perf_counter()
        self.bar = None
        self.shown = shown
        if shown and self.console.is_terminal and not plain():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
                transient=False,
            )
            self.task = self.bar.add_task(label or "distilling", total=steps)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def note(self, text: str) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def own(self, text: str) -> None:
        """A warning that only this rank knows of; shown from any rank."""
        self._line(f"warning: {text}", everywhere=True)

    def row(self, row: dict, useful: float, full: float) -> None:
        """One update: its metrics row, useful FLOPs so far, and what as many updates cost with
        full rollouts."""
        self.seen += 1
        divergence = next(
            v
            for k, v in row.items()
            if k.startswith("loss/") and k.endswith("_nats") and v is not None
        )
        speeds = " ".join(
            f"{phase} {row[f'time/{phase}_tokens_per_s']:,.0f}/s"
            for phase in ("student_decode", "teacher_score", "student_update")
            if f"time/{phase}_tokens_per_s" in row
        )
        share = row["rollout/finished_share"]
        text = (
            f"KL {divergence:.4f} nats, prefix {row['rollout/prefix_tokens']}, finished inside "
            f"{share:.0%}, {speeds}, {flops_text(useful)} useful (full rollouts: "
            f"{flops_text(full)})"
        )
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.update(
                    self.task, completed=row["step"], description=f"{self.label} {text}".strip()
                )
        elif row["step"] % self.plain_every == 0 or self.seen == 1 or row["step"] == self.steps:
            left = (time.perf_counter() - self.started) / self.seen * (self.steps - row["step"])
            self._line(
                f"{self.label} step {row['step']}/{self.steps}: {text}, {left:.0f} s left".strip()
            )

    def evaluation(self, row: dict) -> None:
        """One evaluation: accuracy, endings, length, KL on the fixed contexts."""
        tail = "" if row["kl_tail"] is None else f" (beyond the prefix {row['kl_tail']:.4f})"
        if row["sampler_kl"] is not None:
            tail += f", sampler off the student by {row['sampler_kl']:.2g} nats"
        self._line(
            f"{self.label} after update {row['step']}: accuracy {share_text(row['accuracy'])}, "
            f"{row['finish_rate']:.0%} end, {row['mean_tokens']:.0f} tokens, held-out reverse KL "
            f"{row['kl']['value']:.4f} nats{tail}".strip()
        )

    def tail(self, row: dict) -> None:
        """One tail probe."""
        tail = (
            "nothing beyond the prefix"
            if row["kl_tail"] is None
            else f"{row['kl_tail']:.4f} nats beyond the prefix"
        )
        self._line(
            f"{self.label} tail probe after update {row['step']}: {tail}, {row['finish_rate']:.0%} "
            f"of full answers end, {row['mean_tokens']:.0f} tokens".strip()
        )

    def _line(self, text: str, everywhere: bool = False) -> None:
        if not (self.shown or everywhere):
            return
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.console.print(text, highlight=False, markup=False)
        else:
            tell(text)
