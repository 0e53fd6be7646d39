"""Metrics and evaluations on their way to TensorBoard, Weights & Biases or Trackio, from rank 0.
metrics.jsonl stays the record.

A resumed run goes on in the same place, and what it does again is not there twice: TensorBoard's
reader drops all from the first repeated step on and gets it anew; of the others, which cannot drop,
trackers.json keeps the id and how far they have been told.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, Self

from .. import config as configuration
from ..config import Config
from ..display import Reporter
from ..errors import UserError
from ..files import read_rows
from .folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROJECT = "prefix-distill"
FILE = "trackers.json"  # {name: {id, at}} in the run folder
EVALUATION = {
    "finish_rate": "finish_rate",
    "mean_tokens": "mean_tokens",
    "kl_prefix": "kl_prefix_nats",
    "kl_tail": "kl_tail_nats",
    "sampler_kl": "sampler_kl_nats",
    "kl": "kl_nats",
    "accuracy": "accuracy",
}


def check(config: Config) -> None:
    """UserError where the package of a tracker is missing."""
    for name in configuration.parse_trackers(config.trackers.to):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to {name}: the package {name} is not installed; "
                f'pip install "prefix-distill[{name}]", or leave it out'
            )


class Tracker(Protocol):
    """Receives the numbers of a run."""

    def log(self, step: int, late: int, values: dict[str, float]) -> None:
        """Record the numbers of an update (``late`` 0) or of measurements after it (1)."""

    def close(self, well: bool) -> None:
        """Flush and close; ``well``: whether the run succeeded."""


class Trackers:
    """Passes reports of a run (see display.Reporter) to its display, and numbers to trackers.

    ``config`` names the trackers; ``folder``: the run folder. A tracker that raises is disabled
    with a warning; training continues. Use as a context manager: leaving it flushes and closes.
    """

    def __init__(self, display: Reporter, folder: RunFolder, config: Config):
        self.display = display
        self.folder = folder
        self.told: dict[str, dict] = {}
        self.note, self.warn, self.own = display.note, display.warn, display.own
        self.settings = configuration.as_dict(config)
        self.settings["checkpoint"].pop("out")
        self.name = config.trackers.name or folder.path.absolute().name
        self.names = configuration.parse_trackers(config.trackers.to)
        self.open: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        if self.names and (self.folder.path / FILE).is_file():
            try:
                self.told = self.folder.read_json(FILE)
            except UserError:
                self.warn(
                    f"{FILE} cannot be read: --report-to begins a new run in place of the one that "
                    "it named"
                )
        for name in self.names:
            with self._harmless(name):
                self.open[name] = self._start(name)
        return self

    def _start(self, name: str) -> Tracker:
        if name == "tensorboard":
            return _TensorBoard(self)
        if name == "wandb":
            return _Wandb(self)
        return _Trackio(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name in list(self.open):
            with self._harmless(name):
                self.open.pop(name).close(kind is None)

    def row(self, row: dict, useful: float, full: float) -> None:
        """One update's metrics, by their names in metrics.jsonl."""
        self.display.row(row, useful, full)
        self._send(row["step"], 0, numbers(row))

    def evaluation(self, row: dict) -> None:
        """One evaluation: evaluation/accuracy, evaluation/kl_nats, … and the ends of their
        intervals."""
        self.display.evaluation(row)
        self._send(row["step"], 1, measured("evaluation", row))

    def tail(self, row: dict) -> None:
        """One tail probe: tail_probe/kl_nats, …"""
        self.display.tail(row)
        self._send(row["step"], 1, measured("tail_probe", row))

    def id(self, name: str) -> str:
        """The run's id with a tracker that knows runs by one; kept in the run folder."""
        self.told.setdefault(name, {"id": secrets.token_hex(4), "at": [-1, 0]})
        self.folder.write_json(FILE, self.told)
        return self.told[name]["id"]

    def _send(self, step: int, late: int, values: dict[str, float]) -> None:
        """``late``: 0 for an update's row, 1 for what is measured after it."""
        for name, tracker in list(self.open.items()):
            with self._harmless(name):
                if name not in self.told:
                    tracker.log(step, late, values)
                elif [step, late] > self.told[name]["at"]:
                    tracker.log(step, late, values)
                    self.told[name]["at"] = [step, late]
                    self.folder.write_json(FILE, self.told)

    @contextlib.contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                yield
        except Exception as error:  # whatever another's package raises
            self.open.pop(name, None)
            self.warn(
                f"--report-to {name} is off from here on: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}; metrics.jsonl has all of it"
            )


def numbers(row: dict) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl but its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float))
    }


def measured(kind: str, row: dict) -> dict[str, float]:
    """The numbers of an evaluation or a tail probe; of what has an interval, its ends, too."""
    found: dict[str, float] = {}
    for key, name in EVALUATION.items():
        value = row.get(key)
        if isinstance(value, dict):
            found |= {
                f"{kind}/{name}": value["value"],
                f"{kind}/{name}_low": value["low"],
                f"{kind}/{name}_high": value["high"],
            }
        elif value is not None:
            found[f"{kind}/{name}"] = value
    return found


class _TensorBoard:
    """Event files in the run folder's tensorboard/."""

    def __init__(self, run: Trackers):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.folder.path / "tensorboard"
        self.metrics = run.folder.path / "metrics.jsonl"
        self.writer: SummaryWriter | None = None
        self.text = f"run {run.name}\n\n```json\n{json.dumps(run.settings, indent=1)}\n```"
        self.make = SummaryWriter

    def log(self, step: int, late: int, values: dict[str, float]) -> None:
        if self.writer is None:  # the first that a run says tells where it goes on
            self.writer = self._begin(step, late)
        _add_scalars(self.writer, step, values)
        self.writer.flush()

    def _begin(self, step: int, late: int) -> "SummaryWriter":
        new = step == 0 or not self.path.exists()
        writer = self.make(str(self.path), purge_step=step)
        if new:
            writer.add_text("config", self.text, step)
        if late:  # purge_step also drops the update's own row; write it again
            for row in read_rows(self.metrics)[0]:
                if row.get("step") == step:
                    _add_scalars(writer, step, numbers(row))
        return writer

    def close(self, well: bool) -> None:
        if self.writer is not None:
            self.writer.close()


def _add_scalars(writer: "SummaryWriter", step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


class _Wandb:
    """Files in the run folder's wandb/; project from WANDB_PROJECT, else PROJECT. The axis is
    the step that each row holds."""

    def __init__(self, run: Trackers):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id("wandb"),
            resume="allow",
            dir=str(run.folder.path),
            config=run.settings,
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, late: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, well: bool) -> None:
        self.run.finish(0 if well else 1)


class _Trackio:
    """Trackio's own folder (TRACKIO_DIR), project PROJECT; the id makes the name one of a kind."""

    def __init__(self, run: Trackers):
        import trackio

        self.run = trackio.init(
            project=PROJECT,
            name=f"{run.name}-{run.id('trackio')}",
            config=run.settings,
            resume="allow",
        )
        self.finish = trackio.finish

    def log(self, step: int, late: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, well: bool) -> None:
        self.finish()
