"""The options of what a run writes: checkpoints, trackers, and the hub."""

from dataclasses import dataclass
from typing import Literal

from .options import main_option, option


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    out: str | None = main_option(None, "--out", "Run folder.", shown="runs/run-<time>")
    save_every: int = option(
        25, "--save-every", "Steps between checkpoints; 0 saves only at the end.", low=0
    )
    save_minutes: float = option(
        0.0,
        "--save-minutes",
        "Minutes between checkpoints, besides those of --save-every; 0 saves by steps only.",
        low=0,
    )
    keep: int = option(
        1,
        "--keep-checkpoints",
        "Checkpoints of a finished run; while it trains, at least 2.",
        low=1,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "--save-dtype",
        "Dtype of the weights in model/ and best/; auto: float32, or with --lora-merge that of the "
        "base model. With bfloat16, the run reports how much of the KL gain survives the rounding.",
    )
    allow_changed: bool = option(
        False,
        "--allow-changed",
        "With --resume, continue although the prompts or a model differ from those that the run "
        "began with.",
    )


@dataclass(frozen=True, kw_only=True)
class Trackers:
    to: str = option(
        "none",
        "--report-to",
        "Trackers that get metrics and evaluations besides metrics.jsonl: none, or comma-separated "
        "names of tensorboard, wandb and trackio.",
    )
    name: str | None = option(
        None,
        "--run-name",
        "Name of the run in the trackers, and title of its model card.",
        shown="the run folder's name; in the card, the models' names",
    )
    print_rollouts: int = option(
        0,
        "--print-rollouts",
        "Rollouts to print after every step, with a mark where the prefix ends; a long run prints "
        "after about 200 of its steps. `show` prints them again later.",
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class Export:
    push: str | None = option(
        None,
        "--push-to-hub",
        "Hub repository (USER/NAME) that model/ is uploaded to after the run. A new repository is "
        "private.",
        shown="none",
    )
    public: bool = option(
        False, "--hub-public", "If --push-to-hub creates a repository, make it public."
    )
