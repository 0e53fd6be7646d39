"""Send metrics and evaluations to TensorBoard, Weights & Biases or Trackio, from rank 0.

metrics.jsonl remains the complete record. A resumed run continues in the same place and sends
nothing twice. TensorBoard's reader drops everything from the first repeated step on and receives it
again. The others cannot rewind, so trackers.json keeps the run's id and the last step sent.
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
from ..errors import UserError, one_line
from ..files import read_rows
from .folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROJECT = "prefix-distill"
FILE = "trackers.json"  # {name: {id, at}} in the run folder
# fields of an evaluation row, and their names in a tracker
EVALUATION = {
    "finish_rate": "finish_rate",
    "mean_tokens": "mean_tokens",
    "kl_prefix": "kl_prefix_nats",
    "kl_tail": "kl_tail_nats",
    "sampler_kl": "sampler_kl_nats",
    "kl": "kl_nats",
    "accuracy": "accuracy",
    "finished_accuracy": "finished_accuracy",
}


def check_packages(config: Config) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in configuration.parse_trackers(config.trackers.to):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to {name}: the package {name} is not installed; install the extra "
                f'{name}: pip install -e ".[{name}]" in the checkout, or omit --report-to'
            )


class Tracker(Protocol):
    """Receives the numbers of a run."""

    def log(self, step: int, order: int, values: dict[str, float]) -> None:
        """Record the numbers of a step (``order`` 0) or of measurements after it (1)."""

    def close(self, succeeded: bool) -> None:
        """Flush and close; ``succeeded``: whether the run succeeded."""


class Trackers:
    """Passes reports of a run (see display.Reporter) to its display, and numbers to trackers.

    ``config`` names the trackers; ``folder``: the run folder. A tracker that raises is disabled
    with a warning; training continues. Use as a context manager: leaving it flushes and closes.
    """

    def __init__(self, display: Reporter, folder: RunFolder, config: Config):
        self.display = display
        self.folder = folder
        self.sent: dict[str, dict] = {}  # the content of trackers.json
        self.note = display.note
        self.detail = display.detail
        self.warn = display.warn
        self.warn_on_this_rank = display.warn_on_this_rank
        self.settings = configuration.as_dict(config)
        self.settings["checkpoint"].pop("out")
        self.name = config.trackers.name or folder.path.absolute().name
        self.names = configuration.parse_trackers(config.trackers.to)
        self.open: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        if self.names and (self.folder.path / FILE).is_file():
            try:
                self.sent = self.folder.read_json(FILE)
            except UserError:
                self.warn(
                    f"{FILE} is not valid JSON, so the trackers' run ids are lost; --report-to "
                    "starts a new run in each tracker"
                )
        for name in self.names:
            with self._disabled_on_error(name):
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
            with self._disabled_on_error(name):
                self.open.pop(name).close(kind is None)

    def row(self, row: dict, useful: float, full: float) -> None:
        """Send one step's metrics, named as in metrics.jsonl."""
        self.display.row(row, useful, full)
        self._send(row["step"], 0, row_numbers(row))

    def evaluation(self, row: dict) -> None:
        """Send one evaluation: evaluation/accuracy, evaluation/kl_nats, … with their intervals."""
        self.display.evaluation(row)
        self._send(row["step"], 1, evaluation_numbers("evaluation", row))

    def tail(self, row: dict) -> None:
        """Send one tail probe: tail_probe/kl_nats, …"""
        self.display.tail(row)
        self._send(row["step"], 1, evaluation_numbers("tail_probe", row))

    def id(self, name: str) -> str:
        """Return the run's id in a tracker; the run folder keeps it."""
        self.sent.setdefault(name, {"id": secrets.token_hex(4), "at": [-1, 0]})
        self.folder.write_json(FILE, self.sent)
        return self.sent[name]["id"]

    def _send(self, step: int, order: int, values: dict[str, float]) -> None:
        """Send numbers to each tracker that does not have them; see Tracker.log."""
        for name, tracker in list(self.open.items()):
            with self._disabled_on_error(name):
                if name not in self.sent:
                    tracker.log(step, order, values)
                elif [step, order] > self.sent[name]["at"]:
                    tracker.log(step, order, values)
                    self.sent[name]["at"] = [step, order]
                    self.folder.write_json(FILE, self.sent)

    @contextlib.contextmanager
    def _disabled_on_error(self, name: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result only
                yield
        except Exception as error:  # a tracker's package may raise anything
            self.open.pop(name, None)
            self.warn(
                f"--report-to {name} is disabled: {type(error).__name__}: {one_line(error, 300)}; "
                "training continues, and metrics.jsonl has all numbers"
            )


def row_numbers(row: dict) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl except its step."""
    numbers = {}
    for name, value in row.items():
        if name != "step" and isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


def evaluation_numbers(kind: str, row: dict) -> dict[str, float]:
    """Return the numbers of an evaluation or a tail probe, with the ends of their intervals."""
    numbers: dict[str, float] = {}
    for key, name in EVALUATION.items():
        value = row.get(key)
        if isinstance(value, dict):
            numbers[f"{kind}/{name}"] = value["value"]
            numbers[f"{kind}/{name}_low"] = value["low"]
            numbers[f"{kind}/{name}_high"] = value["high"]
        elif value is not None:
            numbers[f"{kind}/{name}"] = value
    return numbers


class _TensorBoard:
    """Writes event files to tensorboard/ in the run folder."""

    def __init__(self, run: Trackers):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.folder.path / "tensorboard"
        self.metrics = run.folder.path / "metrics.jsonl"
        self.writer: SummaryWriter | None = None
        self.text = f"run {run.name}\n\n```json\n{json.dumps(run.settings, indent=1)}\n```"
        self.make = SummaryWriter

    def log(self, step: int, order: int, values: dict[str, float]) -> None:
        if self.writer is None:  # the first step that is sent is the one to rewind to
            self.writer = self._begin(step, order)
        _add_scalars(self.writer, step, values)
        self.writer.flush()

    def _begin(self, step: int, order: int) -> "SummaryWriter":
        new = step == 0 or not self.path.exists()
        writer = self.make(str(self.path), purge_step=step)
        if new:
            writer.add_text("config", self.text, step)
        if order:  # purge_step also drops the step's own row; write it again
            for row in read_rows(self.metrics)[0]:
                if row.get("step") == step:
                    _add_scalars(writer, step, row_numbers(row))
        return writer

    def close(self, succeeded: bool) -> None:
        if self.writer is not None:
            self.writer.close()


def _add_scalars(writer: "SummaryWriter", step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


class _Wandb:
    """Writes files to wandb/ in the run folder.

    The project is WANDB_PROJECT, or else PROJECT. The x-axis is the step that each row contains.
    """

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

    def log(self, step: int, order: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, succeeded: bool) -> None:
        exit_code = 1
        if succeeded:
            exit_code = 0
        self.run.finish(exit_code)


class _Trackio:
    """Writes to Trackio's own folder (TRACKIO_DIR), in the project PROJECT.

    The run's name contains its id, because Trackio identifies runs by name.
    """

    def __init__(self, run: Trackers):
        import trackio

        self.run = trackio.init(
            project=PROJECT,
            name=f"{run.name}-{run.id('trackio')}",
            config=run.settings,
            resume="allow",
        )
        self.finish = trackio.finish

    def log(self, step: int, order: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self, succeeded: bool) -> None:
        self.finish()
