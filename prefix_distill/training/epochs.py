"""Compute the number of steps of some epochs."""

import math

from .. import config as configuration
from ..config import Config
from ..errors import UserError
from ..prompts.prompt import PromptSet
from .run import Notes


def settle_steps(config: Config, train: list[PromptSet], notes: Notes) -> Config:
    """Return the config with the steps of --epochs; unchanged without --epochs.

    ``train``: the training sets, without the prompts that are held out. UserError: a set is
    streamed, so its length is not known, or another number of steps is given.
    """
    epochs, batch = config.train.epochs, config.train.batch_size
    if epochs is None:
        return config
    rows = 0
    for s in train:
        if s.streamed:
            raise UserError(
                f"--epochs {epochs:g}: dataset {s.name} is streamed, so its number of rows is not "
                "known; use --steps, or omit --streaming"
            )
        rows += len(tuple(s.prompts))
    steps = math.ceil(epochs * rows / batch)
    default = configuration.options()["train.steps"].default
    if config.train.steps not in (default, steps):
        raise UserError(
            f"--steps {config.train.steps} with --epochs {epochs:g}: the epochs are {steps} steps; "
            "omit one of them"
        )
    notes.note(
        f"steps {steps}: --epochs {epochs:g} × {rows} training rows / --batch-size {batch}, "
        "rounded up"
    )
    return configuration.replace(config, train={"steps": steps})
