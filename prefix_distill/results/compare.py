"""Compare arms over seeds from one file: their accuracy and their cost.

One run trains at a time. The same call again continues an interrupted comparison.

base: {models: {…}, train: {steps: 30}}        sections as in `run --config`, for every arm
seeds: [0, 1, 2]
arms:
  full: {schedule: {prefix: full}}              the settings that differ from base
  warmed: {start: warm-up, schedule: {…}}       starts from the final student of another arm with
                                                the same seed; its cost is added
reference: full                                 the arm whose accuracy the others should reach
tune:                                           optional: each arm uses the best of these values,
                                                found with a separate seed
  schedule.lr: [2e-4, 4e-4]
  seed: 1000
  base: {evaluate: {split: validation}}         the settings that differ from base while tuning
also:                                           optional: datasets on which every final student is
                                                evaluated too
  longer: {data: {dataset: problems.jsonl}, evaluate: {problems: 500}}
"""

import dataclasses
import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config as configuration
from ..config import Config
from ..display import RUNS, Observer, Phase, phase
from ..errors import UserError, advising
from ..training.folder import RunFolder

if TYPE_CHECKING:
    from ..training.run import Run

KEYS = ("base", "seeds", "arms", "reference", "tune", "also")
LONGEST_NAME = 100  # characters of an arm's name; file names add some to it
AT_STOP = "the same command continues the comparison"
# the arms in the comparison's folder: a resumed comparison must have the same
ARMS_FILE = "arms.json"
# what the comparison itself sets
FIXED = {
    "runtime.seed": "every arm runs with the seeds of the file ('seeds', 'tune.seed')",
    "checkpoint.out": "its run folders are --out/ARM/seed-N",
}
Settings = dict[str, Any]  # "section.key" → value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arms:
    """A checked arms file."""

    base: Settings
    seeds: tuple[int, ...]
    arms: dict[str, Settings]
    start: dict[str, str]  # arm → the arm whose final student it starts from
    reference: str | None
    tuned: str | None  # the setting of which each arm uses the best value
    values: tuple
    tune_seed: int
    tune_base: Settings  # what differs from base while tuning
    also: dict[str, Settings]  # name of another dataset → the settings of its evaluation

    def settings(self, arm: str, seed: int) -> Settings:
        """Return an arm's settings, without its tuned value and its start."""
        settings = self.base | self.arms[arm]
        settings["runtime.seed"] = seed
        return settings


def read_arms(path: str) -> Arms:
    """Return the arms of a file.

    UserError: a key is unknown, a named arm does not exist, or no run accepts the settings.
    """
    tree = configuration.read_tree(path, "arms file")
    for key in tree:
        if key not in KEYS:
            shown = reprlib.repr(key)
            raise _error(path, f"unknown key {shown}; expected one of {', '.join(KEYS)}")
    arms = dict(_mapping(path, "arms", tree.get("arms")))
    if not arms:
        raise _error(path, "expected at least one arm under 'arms', got none")
    start = _starts(path, arms)
    for name in start:  # aliased arms are one object; copy it so that each arm keeps its start
        arms[name] = dict(arms[name])
        del arms[name]["start"]
    seeds = _seeds(path, tree)
    tune, tune_seed, tune_base = _tuning(path, tree)
    tuned = next(iter(tune), None)
    values = next(iter(tune.values()), [])
    reference = tree.get("reference")
    if reference is not None and (not isinstance(reference, str) or reference not in arms):
        names = ", ".join(map(str, arms))
        raise _error(path, f"reference '{reference}': expected one of its arms ({names})")
    for name, sections in arms.items():
        arms[name] = _settings(path, f"arm '{name}'", sections)
    also = dict(_mapping(path, "also", tree.get("also") or {}))
    for name, sections in also.items():
        also[name] = _settings(path, f"also '{name}'", sections)
    result = Arms(
        base=_settings(path, "base", tree.get("base") or {}),
        seeds=seeds,
        arms=arms,
        start=start,
        reference=reference,
        tuned=tuned,
        values=tuple(values),
        tune_seed=tune_seed,
        tune_base=tune_base,
        also=also,
    )
    _check(path, result)
    return result


def _error(path: str, text: str) -> UserError:
    return UserError(f"arms file {path}: {text}")


def _settings(path: str, what: str, sections: object) -> Settings:
    """Return the settings in a mapping of sections."""
    sections = _mapping(path, what, sections)
    return configuration.flatten(f"arms file {path}: {what}", sections)


def _starts(path: str, arms: dict) -> dict[str, str]:
    """Return arm → the arm that it starts from."""
    start = {}
    for name, arm in arms.items():
        if isinstance(arm, dict) and "start" in arm:
            start[name] = arm["start"]
    for name, from_arm in start.items():
        if not isinstance(from_arm, str) or from_arm not in arms or from_arm in start:
            raise _error(
                path,
                f"arm '{name}' starts from '{from_arm}'; expected another arm of "
                "this file, one without a start",
            )
    return start


def _seeds(path: str, tree: dict) -> tuple[int, ...]:
    """Return the seeds of the final runs."""
    seeds = tree.get("seeds", [0])
    # bool is a kind of int, so isinstance would accept true
    integers = isinstance(seeds, list) and set(map(type, seeds)) == {int}
    if not integers or len(set(seeds)) < len(seeds):
        raise _error(
            path,
            f"seeds {reprlib.repr(seeds)}; expected a list of different whole "
            "numbers, such as [0, 1, 2]",
        )
    return tuple(seeds)


def _tuning(path: str, tree: dict) -> tuple[dict[str, list], int, Settings]:
    """Return the tuned setting with its values, the seed of tuning, and the changes to base."""
    tune = dict(_mapping(path, "tune", tree.get("tune") or {}))
    seed = tune.pop("seed", 1000)
    base = _settings(path, "tune.base", tune.pop("base", {}))
    valid = len(tune) <= 1 and type(seed) is int
    for values in tune.values():
        if not isinstance(values, list) or not values:
            valid = False
    if not valid:
        raise _error(
            path,
            "expected tune to contain one setting with a list of values "
            "(schedule.lr: [1e-4, 2e-4]), and optionally seed and base",
        )
    return tune, seed, base


def _names_a_file(name: object) -> bool:
    """Return whether a file or folder on any system can have the name ``name``."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST_NAME
        and name == Path(name).name
        and not name.startswith(".")
        and configuration.is_text(name)
    )


def _check(path: str, arms: Arms) -> None:
    """Raise UserError unless every arm's name can be a folder's and all settings are valid."""
    tuned: list[Settings] = [{}]
    if arms.tuned is not None:
        tuned = [{arms.tuned: value} for value in arms.values]
    for name in arms.arms:
        if not _names_a_file(name):
            shown = reprlib.repr(str(name))
            raise _error(path, f"a folder cannot have the name {shown}; rename the arm")
        for extra in tuned:
            _check_settings(path, arms.settings(name, 0) | extra)
            _check_settings(path, arms.settings(name, 0) | arms.tune_base | extra)
    for seed in (*arms.seeds, arms.tune_seed):
        _check_settings(path, {"runtime.seed": seed})
    for name, also in arms.also.items():
        if not _names_a_file(name):
            shown = reprlib.repr(name)
            raise _error(path, f"also: a file cannot have the name {shown}; rename the dataset")
        _check_settings(path, also)
    for settings in (arms.tune_base, *arms.arms.values()):
        for key, advice in FIXED.items():
            if key in settings:
                raise _error(path, f"{key}: an arm cannot set it, because {advice}; remove it")
    for settings in (arms.base, arms.tune_base, *arms.arms.values()):
        if any(key.startswith("export.") for key in settings):
            raise _error(
                path,
                "a comparison cannot push to the hub; remove the section "
                "export, and push one student with `prefix-distill export`",
            )


def _check_settings(path: str, settings: Settings) -> None:
    """Raise UserError, with the name of the file, unless a run accepts the settings."""
    try:
        configuration.build(settings)
    except UserError as error:
        raise _error(path, str(error)) from None


def _mapping(path: str, what: str, value: object) -> dict:
    """Return ``value``; raise UserError unless it is a mapping."""
    if not isinstance(value, dict):
        raise _error(path, f"expected {what} to contain keys, got {reprlib.repr(value)}")
    return value


def compare(
    arms: Arms, out: Path, observer: Observer, prepare: Callable[[Config], "Run"]
) -> list[Path]:
    """Train the runs that are missing; return the folders of the final runs, by arm and seed.

    ``out``/ARM/seed-N is an ordinary run folder; tuning runs are ``out``/ARM/tune-VALUE.
    ``observer`` watches the runs. Finished runs are kept, and interrupted ones resumed.
    ``prepare``: `training.prepare.prepare`, or a function that also chooses batch sizes.
    """
    folder = RunFolder(out)
    asked = json.loads(json.dumps(dataclasses.asdict(arms)))
    if (out / ARMS_FILE).is_file():
        if folder.read_json(ARMS_FILE) != asked:
            raise UserError(
                f"--out {out}: it contains another comparison (see its {ARMS_FILE}); use the arms "
                "of that comparison, or name another folder"
            )
    else:
        folder.check_unused()
    with folder.lock():
        if not (out / ARMS_FILE).is_file():
            folder.write_json(ARMS_FILE, asked)
        with phase("comparing", len(list_runs(arms)), RUNS) as progress, advising(AT_STOP):
            jobs = _Jobs(arms=arms, out=out, observer=observer, progress=progress, prepare=prepare)
            return [jobs.run(arm, seed) for arm in arms.arms for seed in arms.seeds]


def list_runs(arms: Arms) -> set[tuple[str, object]]:
    """Return (arm, seed) of every final run that a comparison trains, (arm, "VALUE") of tuning."""
    runs: set[tuple[str, object]] = set()
    for arm in arms.arms:
        for seed in arms.seeds:
            _add_run(arms, arm, seed, runs=runs)
    return runs


def _add_run(arms: Arms, arm: str, seed: int, *, runs: set[tuple[str, object]]) -> None:
    """Add a final run, with what must be trained before it: tuning runs and the run it starts from.

    A tuning run also starts from a final run, of the seed of tuning.
    """
    runs.add((arm, seed))
    start = arms.start.get(arm)
    if start is not None:
        _add_run(arms, start, seed, runs=runs)
    if arms.tuned is None:
        return
    for value in arms.values:
        runs.add((arm, f"{value}"))
    if start is not None:
        _add_run(arms, start, arms.tune_seed, runs=runs)


@dataclasses.dataclass(kw_only=True)
class _Jobs:
    """Trains the runs of one comparison, each when it is needed."""

    arms: Arms
    out: Path
    observer: Observer
    progress: Phase
    prepare: Callable[[Config], "Run"]
    counted: set[Path] = dataclasses.field(default_factory=set)
    best: dict[str, object] = dataclasses.field(default_factory=dict)  # arm → its tuned value

    def run(self, arm: str, seed: int) -> Path:
        """Train the final run of an arm with a seed and its tuned value; return its folder."""
        path = self.out / arm / f"seed-{seed}"
        settings = self.arms.settings(arm, seed)
        if self.arms.tuned:
            settings[self.arms.tuned] = self._tuned(arm)
        self._one(path, arm=arm, seed=seed, settings=settings)
        for name, also in self.arms.also.items():
            self._also(path, name, settings=also, seed=seed)
        return path

    def _tuned(self, arm: str) -> object:
        """Return the value with the highest accuracy on the tuning problems, the first of equals.

        Without graded answers the lowest held-out KL decides.
        """
        if arm not in self.best:
            values = self.arms.values
            merits = [self._merit(arm, value) for value in values]
            best = values[merits.index(max(merits))]
            self.best[arm] = best
            text = f"{arm}: {self.arms.tuned} {best} is the best of"
            for value, merit in zip(values, merits, strict=True):
                text += f" {value} ({merit:.4g})"
            self.observer.note(text)
        return self.best[arm]

    def _merit(self, arm: str, value: object) -> float:
        """Train a tuning run, and return its accuracy, or minus its held-out KL."""
        seed = self.arms.tune_seed
        settings = self.arms.settings(arm, seed) | self.arms.tune_base
        settings[str(self.arms.tuned)] = value
        settings["runtime.seed"] = seed
        path = self.out / arm / f"tune-{value}"
        result = self._one(path, arm=arm, seed=seed, settings=settings)
        last = result["evaluations"][-1]
        if last["accuracy"]:
            return last["accuracy"]["value"]
        return -last["kl"]["value"]

    def _one(self, path: Path, arm: str, seed: int, settings: Settings) -> dict:
        """Train or resume one run, unless it has finished; return its result document."""
        from ..training.defaults import fill_in
        from ..training.opening import train_in
        from ..training.resumed import prepare_resumed
        from ..training.run import Notes

        folder = RunFolder(path)
        if (path / "run.json").is_file():
            document = folder.read_json("run.json")
            if "result" in document:
                self._count(path, self.progress.skip)
                return document["result"]
        start = self.arms.start.get(arm)
        settings = dict(settings)
        settings["checkpoint.out"] = str(path)
        settings.setdefault("evaluate.teacher", "off")  # it is the same in every arm
        config = configuration.build(settings)
        if start is not None:
            # the other models and the data are those that the arm has without its start
            config = fill_in(config, Notes())
            student = str(self.run(start, seed) / "model")
            config = configuration.replace(config, models={"student": student})
        resume = (path / "config.yaml").is_file()
        if resume:
            self.observer.note(f"{path}: resuming")
            run = prepare_resumed(config, folder)
        else:
            self.observer.note(f"{path}: starting")
            run = self.prepare(config)
        label = f"{arm} seed {seed}:"
        result = train_in(run, folder, self.observer, resume=resume, label=label)
        self._count(path, self.progress.advance)
        return result

    def _count(self, path: Path, count: Callable[[], None]) -> None:
        """Count a finished run, once."""
        if path not in self.counted:
            self.counted.add(path)
            count()

    def _also(self, path: Path, name: str, settings: Settings, seed: int) -> None:
        """Evaluate the final student in ``path`` on another dataset, unless that is done."""
        from ..training.defaults import DATASET
        from .evaluation import evaluate_model

        file = path / f"also-{name}.json"
        if file.is_file():
            return
        records = path / f"also-{name}.jsonl"
        records.unlink(missing_ok=True)
        evaluated: Settings = {"data.dataset": DATASET} | settings
        evaluated |= {
            "models.student": str(path / "model"),
            "runtime.seed": seed,
            "checkpoint.out": str(records),
        }
        _, _, document = evaluate_model(configuration.build(evaluated))
        RunFolder(path).write_json(file.name, document)
