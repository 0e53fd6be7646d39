"""Complete a config: the built-in pair and task if none is named, and the learning rate."""

from .. import config as configuration
from ..config import SELF, Config
from ..errors import UserError
from ..lab.task import LAB
from ..plugins import load_plugins
from .run import Notes

TASK = "choice"  # the built-in task, lab:choice, and its pair
DATASET = LAB + TASK
STUDENT, TEACHER = f"{DATASET}/student", f"{DATASET}/teacher"
RATE = 5e-5  # the default --lr
BUILT_IN_RATE = 4e-4  # the default --lr of the built-in pair, as in the demo


def fill_in(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in pair and task if none is named, and a learning rate.

    UserError: only some of student, teacher and dataset are named.
    """
    check_names({**_models(config), "--dataset": config.data.dataset})
    return fill_in_rate(_fill_in_dataset(_fill_in_pair(config, notes), notes), notes)


def fill_in_planned(config: Config, notes: Notes, has_prompts: bool) -> Config:
    """Return the config as ``fill_in`` does, but named models need no dataset.

    ``has_prompts``: the length of the prompts is given in place of a dataset.
    """
    names = _models(config)
    if config.data.dataset is not None:
        names["--dataset"] = config.data.dataset
    check_names(names)
    config = _fill_in_pair(config, notes)
    if not any(names.values()) and not has_prompts:
        config = _fill_in_dataset(config, notes)
    return fill_in_unused_rate(config)


def check_names(names: dict[str, str | None]) -> None:
    """Raise UserError if some of the names are given and others are missing.

    ``names``: flag → what was given.
    """
    given = [flag for flag, name in names.items() if name is not None]
    missing = [flag for flag, name in names.items() if name is None]
    if given and missing:
        raise UserError(
            f"expected {_list(list(names))} together, got {_list(given)} only; add "
            f"{_list(missing)}, or omit {_list(given)} to use the built-in ones"
        )


def _list(flags: list[str]) -> str:
    """Return flags as words: "--a, --b and --c"."""
    if len(flags) == 1:
        return flags[0]
    return f"{', '.join(flags[:-1])} and {flags[-1]}"


def _models(config: Config) -> dict[str, str | None]:
    """Return flag → the named model; ``self`` names no model besides the student."""
    models = config.models
    if models.teacher == SELF:
        return {"--student": models.student}
    return {"--student": models.student, "--teacher": models.teacher}


def _fill_in_pair(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in pair if no model is named."""
    # Again, because another config may have been built since this one.
    for plugin in load_plugins(config.runtime.plugin):
        notes.note(plugin.describe())
    student = STUDENT
    if config.models.teacher == SELF:
        student = f"{STUDENT}-told"
    config = _fill(config, notes, option="models.student", value=student)
    return _fill(config, notes, option="models.teacher", value=TEACHER)


def _fill_in_dataset(config: Config, notes: Notes) -> Config:
    """Return the config with the built-in task if no dataset is named."""
    return _fill(config, notes, option="data.dataset", value=DATASET)


def fill_in_rate(config: Config, notes: Notes) -> Config:
    """Return the config with a learning rate: the built-in pair has its own."""
    if config.schedule.lr is not None:
        return config
    config = fill_in_unused_rate(config)
    rate = config.schedule.lr
    if rate == BUILT_IN_RATE:
        notes.note(f"no --lr was given; using {rate:g}, the learning rate of the built-in pair")
    return config


def fill_in_unused_rate(config: Config) -> Config:
    """Return the config with the learning rate of a run, for a command that does not train."""
    if config.schedule.lr is not None:
        return config
    rate = RATE
    pair = (config.models.student or STUDENT, config.models.teacher or TEACHER)
    if pair == (STUDENT, TEACHER):
        rate = BUILT_IN_RATE
    return configuration.replace(config, schedule={"lr": rate})


def _fill(config: Config, notes: Notes, *, option: str, value: str) -> Config:
    """Return the config with ``value`` for an option that is not given, and note it."""
    section, key = option.split(".")
    if configuration.get(config, option) is not None:
        return config
    notes.note(f"no --{key} was given; using the built-in {value}")
    return configuration.replace(config, **{section: {key: value}})
