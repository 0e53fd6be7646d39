"""Turn keyword options, which are named as the flags of the command line, into a config."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from .. import config as configuration
from ..errors import UserError, nearest
from . import html
from .arguments import plain_value, read_folder, read_path
from .flat import read_settings_file
from .renamed import FORMER, RENAMED

if TYPE_CHECKING:
    from .keywords import RunOptions

LOGGER = logging.getLogger("prefix_distill")

# options of `eval` → its own flag, or None if the flag is the one of `run`
EVAL_FLAGS: dict[str, str | None] = {
    "models.student": "--model",
    "models.trust_remote_code": None,
    "data.dataset": None,
    "data.split": None,
    "data.prompt_column": None,
    "data.answer_column": None,
    "data.streaming": None,
    "data.student_thinking": "--thinking",
    "data.system": None,
    "data.instruction": None,
    "data.prompt_template": None,
    "data.few_shot": None,
    "data.template": None,
    "data.template_args": None,
    "data.template_date": None,
    "rollout.max_new_tokens": None,
    "rollout.begin": None,
    "rollout.rows": None,
    "evaluate.problems": None,
    "evaluate.rollouts": "--samples",
    "evaluate.temperature": "--temperature",
    "evaluate.top_p": "--top-p",
    "evaluate.top_k": "--top-k",
    "evaluate.sampling": "--sampling",
    "evaluate.answer_format": None,
    "evaluate.grader": None,
    "evaluate.grader_timeout": None,
    "runtime.dtype": None,
    "runtime.device": None,
    "runtime.gpus": None,
    "runtime.seed": None,
}
# sections and single options of `probe`
PROBE_OPTIONS = (
    "models.student",
    "models.teacher",
    "models.cross_tokenizer",
    "models.teacher_quantize",
    "models.trust_remote_code",
    "data",
    "rollout.samples",
    "rollout.max_new_tokens",
    "rollout.eos",
    "rollout.begin",
    "rollout.rows",
    "evaluate.answer_format",
    "evaluate.grader",
    "evaluate.grader_timeout",
    "runtime.dtype",
    "runtime.head_dtype",
    "runtime.device",
    "runtime.teacher_device",
    "runtime.teacher_memory",
    "runtime.gpus",
    "runtime.rank_timeout",
    "runtime.seed",
    "runtime.head_memory_mb",
)
# flags of the command that are no options here, and what stands for them
FUNCTIONS = {
    "dry_run": "call check(...) instead of run(...)",
    "resume": "call resume(out) instead of run(...)",
    "config": "pass Config.from_yaml(path) as the first argument",
    "set": "pass the settings as keywords",
}
EXPORT_OPTIONS = ("models.trust_remote_code", "export.push", "export.public")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    """The checked settings of a run, in sections: ``config.schedule.lr``.

    Build one with `from_options` or `from_yaml`, and pass it to `run`, `check` or `plan`.
    """

    @classmethod
    def from_options(cls, **options: "Unpack[RunOptions]") -> Self:
        """Return the defaults changed by options: ``Config.from_options(prefix=512, lr=1e-4)``.

        UserError: an option is unknown, its value is invalid, or two options exclude each other.
        """
        return cls._from_values(read_options(options, run_names()), run_flags())

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **options: "Unpack[RunOptions]") -> Self:
        """Return the settings of a YAML file, as ``prefix-distill run --config`` reads it.

        Options override the file. UserError: as in `from_options`, or the file is not readable.
        """
        values, names, notes = read_settings_file(read_path("path", path))
        for text in notes:
            LOGGER.info("translated: %s", text)
        given = read_options(options, run_names())
        names |= {option: configuration.flag(option) for option in given}
        return cls._from_values(values | given, names)

    @classmethod
    def _from_values(cls, values: dict[str, object], names: Mapping[str, str]) -> Self:
        built = configuration.build(values, names)
        return cls(**{f.name: getattr(built, f.name) for f in dataclasses.fields(built)})

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Return all settings as nested plain values: ``{"train": {"steps": 100, …}, …}``."""
        return configuration.as_dict(self)

    def _repr_html_(self) -> str:
        defaults = flatten(configuration.Config())
        changed = []
        for path, value in flatten(self).items():
            if value != defaults[path]:
                changed.append((path, str(value)))
        return html.table("Settings that differ from the defaults", ("option", "value"), changed)


def flatten(config: configuration.Config) -> dict[str, object]:
    """Return ``section.key`` → value for all options of a config."""
    return {path: configuration.get(config, path) for path in configuration.options()}


def keyword(flag: str) -> str:
    """Return the keyword of a flag: "--batch-size" → "batch_size"."""
    return flag.removeprefix("--").replace("-", "_")


def run_flags() -> dict[str, str]:
    """Return option → flag of `run`; errors name options by it, those of the API too."""
    return {path: configuration.flag(path) for path in configuration.options()}


def eval_flags() -> dict[str, str]:
    """Return option → flag of `eval`."""
    return {path: flag or configuration.flag(path) for path, flag in EVAL_FLAGS.items()}


def run_names() -> dict[str, str]:
    """Return keyword → option for `run`, `check` and `plan`."""
    return {keyword(configuration.flag(path)): path for path in configuration.options()}


def eval_names() -> dict[str, str]:
    """Return keyword → option for `evaluate`."""
    return {keyword(flag): path for path, flag in eval_flags().items()}


def probe_names() -> dict[str, str]:
    """Return keyword → option for `probe`."""
    paths = configuration.options(*PROBE_OPTIONS)
    return {keyword(configuration.flag(path)): path for path in paths}


def export_names() -> dict[str, str]:
    """Return keyword → option for `export`."""
    return {keyword(configuration.flag(path)): path for path in EXPORT_OPTIONS}


def take_options(
    options: Mapping[str, object], defaults: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the options that ``defaults`` names, completed by them, and the others."""
    taken, others = dict(defaults), {}
    for name, value in options.items():
        if name in defaults:
            taken[name] = plain_value(value)
        else:
            others[name] = value
    return taken, others


def read_options(options: Mapping[str, object], names: dict[str, str]) -> dict[str, object]:
    """Return keyword options as ``{"section.key": value}``.

    ``names``: keyword → option. Paths and numbers of other packages become plain values, and
    numbers become text if the option is text. UserError names an unknown keyword and the nearest
    known one.
    """
    known = configuration.options()
    values = {}
    for given, value in options.items():
        name = _current_name(given, names)
        if name not in names:
            raise UserError(f"unknown option '{name[:80]}'; {_suggest(name, names)}")
        path = names[name]
        plain = plain_value(value)
        is_number = isinstance(plain, int | float) and not isinstance(plain, bool)
        if is_number and configuration.value_type(known[path].type) is str:
            plain = str(plain)
        values[path] = plain
    return values


def _current_name(name: str, names: Mapping[str, str]) -> str:
    """Return the present name of an option that was renamed, else the name itself."""
    target = keyword(FORMER.get(name, ""))
    if target not in names:
        return name
    LOGGER.info("%s is now called %s", name, target)
    return target


def _suggest(name: str, names: Mapping[str, str]) -> str:
    """Return advice for an unknown keyword."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if name in RENAMED and keyword(RENAMED[name]) in names:
        return f"did you mean {keyword(RENAMED[name])}?"
    near = nearest(name, names)
    if near is not None:
        return f"did you mean {near}?"
    return f"known are {', '.join(names)}"


def name_run_folder(config: configuration.Config) -> configuration.Config:
    """Return the config with a run folder; the default is named after the current time."""
    if config.checkpoint.out is not None:
        return config
    return configuration.replace(config, checkpoint={"out": default_out("run")})


def default_out(command: str) -> str:
    """Return where a command writes by default: a folder named after it and the current time."""
    return f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}"


def read_out(name: str, out: object, command: str) -> Path:
    """Return the folder ``out``, by default that of ``default_out``; ``name``: its name in errors.

    UserError: it is empty, or neither text nor a path.
    """
    if out is None:
        out = default_out(command)
    return read_folder(name, out)


def pin_paths(config: configuration.Config) -> configuration.Config:
    """Return the config with absolute paths of the run folder and of plugins.

    A function that the call runs may change the current folder.
    """
    changed: dict[str, dict[str, object]] = {}
    if config.checkpoint.out is not None:
        changed["checkpoint"] = {"out": str(Path(config.checkpoint.out).absolute())}
    if config.runtime.plugin is not None:
        names = map(_pin_plugin, config.runtime.plugin.split(","))
        changed["runtime"] = {"plugin": ",".join(names)}
    return configuration.replace(config, **changed)


def _pin_plugin(name: str) -> str:
    """Return the absolute path of a plugin's file; the name of an entry point unchanged."""
    name = name.strip()
    if name.endswith(".py") or Path(name).is_file():
        return str(Path(name).absolute())
    return name


def evaluation_config(values: dict[str, object], out: str | None) -> configuration.Config:
    """Return the config of an evaluation that writes the per-problem rows to ``out``.

    The default of ``out`` is named after the current time.
    """
    values = dict(values)
    if "#" in str(values.get("data.dataset", "")):
        values.setdefault("evaluate.problems", 0)  # N in name#N is the number of problems
    gpus = values.get("runtime.gpus")
    values["train.batch_size"] = max(1, gpus) if isinstance(gpus, int) else 1  # a prompt per rank
    if out is None:
        out = f"{default_out('eval')}.jsonl"
    values["checkpoint.out"] = out
    return configuration.build(values, eval_flags())


def probe_config(values: dict[str, object], out: str | None, problems: int) -> configuration.Config:
    """Return the config of a probe of ``problems`` training prompts.

    UserError: ``problems`` is below 1.
    """
    if problems < 1:
        raise UserError(
            f"--problems {problems}: expected at least 1 prompt; 50 to 100 give a useful accuracy"
        )
    if out is None:
        out = default_out("probe")
    fixed = {
        "train.steps": 1,
        "train.batch_size": problems,
        "evaluate.problems": 0,
        "evaluate.kl_prompts": 1,
        "checkpoint.out": out,
    }
    return configuration.build(values | fixed, run_flags())
