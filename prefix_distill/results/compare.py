"""Arms × seeds from one file: which settings reach which accuracy, at what cost. Resumable; one run
at a time.

base: {models: {…}, train: {steps: 30}}        sections as in `run --config`, for every arm
seeds: [0, 1, 2]
arms:
  full: {schedule: {prefix: full}}              what differs from base
  warmed: {start: warm-up, schedule: {…}}       starts from what another arm ended with, at the same
                                                seed; its cost is added
reference: full                                 the arm whose accuracy the others have to reach
tune:                                           optional: each arm takes the best of these values,
                                                on one seed of its own
  schedule.lr: [2e-4, 4e-4]
  seed: 1000
  base: {evaluate: {split: validation}}         what differs from base while tuning
also:                                           optional: data sets that every final student
                                                answers, too
  longer: {data: {dataset: problems.jsonl}, evaluate: {problems: 500}}
"""

import dataclasses
import json
import reprlib
from collections.abc import Callable
from pathlib import Path

from .. import config as configuration
from ..errors import UserError
from ..training.folder import RunFolder

KEYS = ("base", "seeds", "arms", "reference", "tune", "also")
# in the comparison's folder: what was asked for, so that a resumed comparison cannot mix two
LONGEST_NAME = 100  # characters of an arm; the names of its files add some
FILE = "arms.json"
TrainIn = Callable[..., dict]  # training.session.train_in


@dataclasses.dataclass(frozen=True)
class Arms:
    """A checked arms file. Settings are ``{"section.key": value}``."""

    base: dict
    seeds: tuple[int, ...]
    arms: dict[str, dict]
    start: dict[str, str]
    reference: str | None
    tuned: str | None
    values: tuple
    tune_seed: int
    tune_base: dict
    also: dict[str, dict]

    def settings(self, arm: str, seed: int) -> dict:
        """Everything that arm sets, but for a tuned value and a start."""
        return self.base | self.arms[arm] | {"runtime.seed": seed}


def read(path: str) -> Arms:
    """An arms file. UserError on an unknown key, an arm that does not exist, or settings that no
    run would accept."""
    tree = configuration.read_tree(path)
    if unknown := [key for key in tree if key not in KEYS]:
        raise UserError(
            f"arms file {path}: unknown key '{unknown[0]}'; known are {', '.join(KEYS)}"
        )
    arms = _mapping(path, "arms", tree.get("arms"))
    if not arms:
        raise UserError(f"arms file {path}: it names no arm; give at least one under 'arms'")
    start = _starts(path, arms)
    for name in start:  # aliased arms are one object; copy it so that each arm keeps its start
        arms[name] = {key: value for key, value in arms[name].items() if key != "start"}
    seeds = _seeds(path, tree)
    tune, tune_seed, tune_base = _tuning(path, tree)
    reference = tree.get("reference")
    if reference is not None and (not isinstance(reference, str) or reference not in arms):
        raise UserError(
            f"arms file {path}: the reference '{reference}' is none of its arms "
            f"({', '.join(map(str, arms))})"
        )
    read_arms = Arms(
        base=configuration.flatten(path, _mapping(path, "base", tree.get("base") or {})),
        seeds=seeds,
        arms={
            name: configuration.flatten(path, _mapping(path, f"arm '{name}'", arm))
            for name, arm in arms.items()
        },
        start=start,
        reference=reference,
        tuned=next(iter(tune), None),
        values=tuple(next(iter(tune.values()), ())),
        tune_seed=tune_seed,
        tune_base=tune_base,
        also={
            name: configuration.flatten(path, _mapping(path, f"also '{name}'", also))
            for name, also in _mapping(path, "also", tree.get("also") or {}).items()
        },
    )
    _check(path, read_arms)
    return read_arms


def _starts(path: str, arms: dict) -> dict[str, str]:
    """Return arm → the arm that it starts from."""
    start = {
        name: arm["start"] for name, arm in arms.items() if isinstance(arm, dict) and "start" in arm
    }
    for name, from_arm in start.items():
        if not isinstance(from_arm, str) or from_arm not in arms or from_arm in start:
            raise UserError(
                f"arms file {path}: arm '{name}' starts from '{from_arm}'; name an arm of this "
                "file that has no start of its own"
            )
    return start


def _seeds(path: str, tree: dict) -> tuple[int, ...]:
    seeds = tree.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or any(type(seed) is not int for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise UserError(
            f"arms file {path}: seeds {reprlib.repr(seeds)}; expected a list of different whole "
            "numbers, such as [0, 1, 2]"
        )
    return tuple(seeds)


def _tuning(path: str, tree: dict) -> tuple[dict[str, list], int, dict]:
    """Return the tuned option with its values, the seed, and the changes to base."""
    tune = dict(_mapping(path, "tune", tree.get("tune") or {}))
    seed = tune.pop("seed", 1000)
    base = configuration.flatten(path, _mapping(path, "tune.base", tune.pop("base", {})))
    if (
        len(tune) > 1
        or any(not isinstance(values, list) or not values for values in tune.values())
        or type(seed) is not int
    ):
        raise UserError(
            f"arms file {path}: tune must hold one setting with a list of values (schedule.lr: "
            "[1e-4, 2e-4]), and may hold seed and base"
        )
    return tune, seed, base


def _names_a_file(name: object) -> bool:
    """Return whether ``name`` can be a file's or a folder's name on any system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST_NAME
        and name == Path(name).name
        and not name.startswith(".")
        and configuration.is_text(name)
    )


def _check(path: str, arms: Arms) -> None:
    """Raise UserError unless every arm can name a folder and all of its settings are valid."""
    tuned = [{arms.tuned: value} for value in arms.values] or [{}]
    for name in arms.arms:
        if not _names_a_file(name):
            raise UserError(
                f"arms file {path}: {reprlib.repr(str(name))} cannot name a folder; call the "
                "arm otherwise"
            )
        for extra in tuned:
            configuration.build(arms.settings(name, 0) | extra)
            configuration.build(arms.settings(name, 0) | arms.tune_base | extra)
    for seed in (*arms.seeds, arms.tune_seed):
        configuration.build({"runtime.seed": seed})
    for name, also in arms.also.items():
        if not _names_a_file(name):
            raise UserError(
                f"arms file {path}: also {reprlib.repr(name)} cannot name a file; call it otherwise"
            )
        configuration.build(also)
    if any(
        key.startswith("export.")
        for keys in (arms.base, arms.tune_base, *arms.arms.values())
        for key in keys
    ):
        raise UserError(
            f"arms file {path}: a comparison pushes nothing to the hub; leave export out, and push "
            "the best with `prefix-distill export`"
        )


def _mapping(path: str, what: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"arms file {path}: {what} must hold keys, got {reprlib.repr(value)}")
    return value


def compare(arms: Arms, out: Path, train_in: TrainIn, say: Callable[[str], None]) -> list[Path]:
    """Runs what is not there yet → the folders of the final runs, arm by arm, seed by seed.

    ``out``/ARM/seed-N is an ordinary run folder; tuning runs are ``out``/ARM/tune-VALUE.
    ``train_in`` is the command's own way of running a prepared run; ``say`` prints a line. A
    finished run is taken as it is, an interrupted one goes on.
    """
    folder = RunFolder(out)
    asked = json.loads(json.dumps(dataclasses.asdict(arms)))
    if (out / FILE).is_file():
        if folder.read_json(FILE) != asked:
            raise UserError(
                f"--out {out}: it holds another comparison (see its {FILE}); go on with the arms "
                "file it was made from, or name another folder"
            )
    else:
        folder.refuse_if_used()
    with folder.alone():
        if not (out / FILE).is_file():
            folder.write_json(FILE, asked)
        jobs = _Jobs(arms, out, train_in, say)
        return [jobs.run(arm, seed) for arm in arms.arms for seed in arms.seeds]


class _Jobs:
    def __init__(self, arms: Arms, out: Path, train_in: TrainIn, say: Callable[[str], None]):
        self.arms, self.out, self.train_in, self.say = arms, out, train_in, say
        self.best: dict[str, object] = {}

    def run(self, arm: str, seed: int) -> Path:
        """The final run of an arm at a seed, with its tuned value."""
        arms, path = self.arms, self.out / arm / f"seed-{seed}"
        settings = arms.settings(arm, seed)
        if arms.tuned:
            settings[arms.tuned] = self._tuned(arm)
        self._one(path, arm, seed, settings)
        for name, also in arms.also.items():
            self._also(path, name, also, seed)
        return path

    def _tuned(self, arm: str) -> object:
        """The value with the highest accuracy on the tuning problems (held-out KL where there are
        no answers); the first of equals."""
        if arm not in self.best:
            arms, merits = self.arms, []
            for value in arms.values:
                settings = (
                    arms.settings(arm, arms.tune_seed)
                    | arms.tune_base
                    | {arms.tuned: value, "runtime.seed": arms.tune_seed}
                )
                result = self._one(self.out / arm / f"tune-{value}", arm, arms.tune_seed, settings)
                last = result["evaluations"][-1]
                merits.append(
                    last["accuracy"]["value"] if last["accuracy"] else -last["kl"]["value"]
                )
            self.best[arm] = (
                arms.values[merits.index(max(merits))] if len(arms.values) > 1 else arms.values[0]
            )
            self.say(
                f"{arm}: {arms.tuned} {self.best[arm]} of "
                + ", ".join(
                    f"{value} ({merit:.4g})"
                    for value, merit in zip(arms.values, merits, strict=True)
                )
            )
        return self.best[arm]

    def _one(self, path: Path, arm: str, seed: int, settings: dict) -> dict:
        from ..training.prepare import prepare

        folder = RunFolder(path)
        if (path / "run.json").is_file() and "result" in (done := folder.read_json("run.json")):
            return done["result"]
        start = self.arms.start.get(arm)
        if start is not None:
            settings = settings | {"models.student": str(self.run(start, seed) / "model")}
        settings = settings | {"checkpoint.out": str(path)}
        resume = (path / "config.yaml").is_file()
        self.say(f"{path}: {'goes on' if resume else 'starts'}")
        run = prepare(configuration.build(settings))
        return self.train_in(run, folder, resume, f"{arm} seed {seed}:")

    def _also(self, path: Path, name: str, settings: dict, seed: int) -> None:
        from .evaluation import evaluate_model

        file = path / f"also-{name}.json"
        if file.is_file():
            return
        rows = path / f"also-{name}.jsonl"
        rows.unlink(missing_ok=True)
        _, _, document = evaluate_model(
            configuration.build(
                settings
                | {
                    "models.student": str(path / "model"),
                    "runtime.seed": seed,
                    "checkpoint.out": str(rows),
                }
            )
        )
        RunFolder(path).write_json(file.name, document)
