"""Show progress and tables on stderr: a live line on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

# phases of a step in its metrics row → the name that is shown
PHASES = {"student_decode": "sampling", "teacher_score": "teacher", "student_update": "training"}
PLAIN_LINES = 50  # progress lines of one run without a terminal, about


def print_line(text: str) -> None:
    """Print a line on stderr; do nothing if stderr is closed."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # Python flushes stderr again at exit, and the text in its buffer must not fail then.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends


def is_plain() -> bool:
    """Return whether to print plain lines: no bars, boxes or colours.

    Screen readers and log files need them.
    """
    for name in ("PREFIX_DISTILL_PLAIN", "NO_COLOR"):
        if os.environ.get(name):
            return True
    return os.environ.get("TERM") == "dumb"


def is_verbose() -> bool:
    """Return whether notes are printed in full."""
    return bool(os.environ.get("PREFIX_DISTILL_VERBOSE"))


def print_tables(*tables: "Table", width: int | None = None) -> None:
    """Print rich tables on stderr.

    If ``is_plain()``, print a line with the first cell of each row, then a line "column: value" for
    every other cell.
    """
    if not is_plain():
        from rich.console import Console

        console = Console(stderr=True, width=width)
        with console.capture() as text:
            console.print(*tables)
        print_line(text.get().removesuffix("\n"))
        return
    for table in tables:
        _tell_table(table)


def _tell_table(table: "Table") -> None:
    if table.title:
        print_line(f"{table.title}")
    names = [str(column.header) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        if names[0]:
            print_line(f"{names[0]}: {first}")
        else:
            print_line(f"{first}")
        for name, cell in zip(names[1:], cells, strict=True):
            print_line(f"  {name}: {cell or '–'}")


def flops_text(value: float) -> str:
    """Return a number of FLOPs with its unit: 1.5e12 → "1.5 TFLOP"."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def accuracy_text(score: dict | None) -> str:
    """Return an accuracy {value, low, high, n} as text, in percent."""
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

    def warn_on_this_rank(self, text: str, /) -> None:
        """Show a warning that only this rank reports."""

    def row(self, row: dict, useful: float, full: float, /) -> None:
        """Show one step: its metrics row and the useful FLOPs so far.

        ``full``: the useful FLOPs that as many steps with full rollouts would take.
        """

    def evaluation(self, row: dict, /) -> None:
        """Show one evaluation: its row in ``Progress.evaluations``."""

    def tail(self, row: dict, /) -> None:
        """Show one tail probe: its row in ``Progress.tail_probes``."""


class Observer(Protocol):
    """Receives the progress of a call that may train several runs.

    The parameters are positional-only, so that an implementation may rename them.
    """

    def note(self, text: str, /) -> None:
        """Receive a progress note."""

    def warn(self, text: str, /) -> None:
        """Receive a warning."""

    def watch(
        self, steps: int, label: str, stop: Callable[[], None], /
    ) -> contextlib.AbstractContextManager[Reporter]:
        """Return the reporter of rank 0 for a run of ``steps`` steps.

        ``label`` names the run among several. ``stop()`` asks the run to save its state and stop
        after the current step.
        """

    def watch_other_rank(self) -> contextlib.AbstractContextManager[Reporter]:
        """Return the reporter of any rank but rank 0."""


class Terminal:
    """An observer that shows progress on stderr."""

    def note(self, text: str) -> None:
        """Print a progress note."""
        print_line(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.note(f"warning: {text}")

    @contextlib.contextmanager
    def watch(self, steps: int, label: str, stop: Callable[[], None]) -> Iterator[Reporter]:
        """Show the progress of a run; Ctrl-C stops it, so ``stop`` is not needed."""
        with Display(steps, label) as shown:
            yield shown

    @contextlib.contextmanager
    def watch_other_rank(self) -> Iterator[Reporter]:
        """Show this rank's own warnings."""
        yield RankWarnings()


class RankWarnings:
    """Shows nothing but the warnings that only this rank reports: a ``Reporter``."""

    def warn_on_this_rank(self, text: str) -> None:
        """Print a warning."""
        print_line(f"warning: {text}")

    def note(self, text: str) -> None:
        """Show nothing: rank 0 shows it."""

    def warn(self, text: str) -> None:
        """Show nothing: rank 0 shows it."""

    def row(self, row: dict, useful: float, full: float) -> None:
        """Show nothing: rank 0 shows it."""

    def evaluation(self, row: dict) -> None:
        """Show nothing: rank 0 shows it."""

    def tail(self, row: dict) -> None:
        """Show nothing: rank 0 shows it."""


class Display:
    """Shows the progress of one run: a ``Reporter``.

    Without a terminal it prints about 50 lines, however long the run is. A terminal or pipe that
    closes does not stop the run.
    """

    def __init__(self, steps: int, label: str = ""):
        from rich.console import Console

        self.steps = steps
        self.label = label
        self.console = Console(stderr=True)
        self.seen = 0  # steps shown
        self.plain_every = max(1, steps // PLAIN_LINES)
        self.started = time.perf_counter()
        self.bar: Progress | None = None
        if self.console.is_terminal and not is_plain():
            self.bar = self._bar()
            self.task = self.bar.add_task(label or "distilling", total=steps)

    def _bar(self) -> "Progress":
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=False,
        )

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def note(self, text: str) -> None:
        """Show a progress note."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Show a warning that every rank reports."""
        self.note(f"warning: {text}")

    def warn_on_this_rank(self, text: str) -> None:
        """Show a warning that only this rank reports, whichever rank it is."""
        self._print(f"warning: {text}")

    def row(self, row: dict, useful: float, full: float) -> None:
        """Show one step: its metrics row and the useful FLOPs so far.

        ``full``: the useful FLOPs that as many steps with full rollouts would take.
        """
        self.seen += 1
        step = row["step"]
        text = (
            f"divergence {_divergence(row):.4f} nats, "
            f"prefix {row['rollout/prefix_tokens']} tokens, "
            f"{row['rollout/finished_share']:.0%} finished, {_speeds(row)}{flops_text(useful)} "
            f"useful so far ({flops_text(full)} with full rollouts)"
        )
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.update(
                    self.task, completed=step, description=f"{self.label} {text}".strip()
                )
        elif step % self.plain_every == 0 or self.seen == 1 or step == self.steps:
            left = (time.perf_counter() - self.started) / self.seen * (self.steps - step)
            self._labelled(f"step {step}/{self.steps}: {text}, {left:.0f} s left")

    def evaluation(self, row: dict) -> None:
        """Show one evaluation: accuracy, finish rate, length, and KL on the fixed contexts."""
        name = "accuracy"
        if row["graded_by"] is not None:
            name = "score"
        text = (
            f"after step {row['step']}: {name} {accuracy_text(row['accuracy'])}, "
            f"{row['finish_rate']:.0%} finished, {row['mean_tokens']:.0f} tokens per answer, "
            f"held-out reverse KL {row['kl']['value']:.4f} nats"
        )
        if row["kl_tail"] is not None:
            text += f" (beyond the prefix {row['kl_tail']:.4f})"
        if row["sampler_kl"] is not None:
            text += f", KL between decoding copy and student {row['sampler_kl']:.2g} nats"
        self._labelled(text)

    def tail(self, row: dict) -> None:
        """Show one tail probe: KL beyond the prefix, and how full answers end."""
        if row["kl_tail"] is None:
            tail = "no token beyond the prefix"
        else:
            tail = f"KL {row['kl_tail']:.4f} nats beyond the prefix"
        self._labelled(
            f"tail probe after step {row['step']}: {tail}, {row['finish_rate']:.0%} of the full "
            f"answers finished, {row['mean_tokens']:.0f} tokens per answer"
        )

    def _labelled(self, text: str) -> None:
        self.note(f"{self.label} {text}".strip())

    def _print(self, text: str) -> None:
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.console.print(text, highlight=False, markup=False)
        else:
            print_line(text)


def _divergence(row: dict) -> float:
    """Return the mean divergence of a step, in nats, from its metrics row."""
    for name, value in row.items():
        if name.startswith("loss/") and name.endswith("_nats") and value is not None:
            return value
    raise ValueError("a metrics row has at least one divergence")


def _speeds(row: dict) -> str:
    """Return the tokens per second of each phase of a step, each followed by a comma."""
    text = ""
    for phase, name in PHASES.items():
        speed = row.get(f"time/{phase}_tokens_per_s")
        if speed is not None:
            text += f"{name} {speed:,.0f} tok/s, "
    return text
