"""Read run folders."""

import csv
import dataclasses
from pathlib import Path

from ..errors import UserError
from ..files import read_rows
from ..maths.intervals import split_mean
from ..training.folder import RunFolder
from .compare import FILE as ARMS

COLUMNS = (
    "arm",
    "seed",
    "update",
    "accuracy",
    "low",
    "high",
    "n",
    "lr",
    "prefix",
    "kl",
    "kl_prefix",
    "kl_tail",
    "kl_beyond",
    "finish_rate",
    "mean_tokens",
    "flops_useful",
    "flops_executed",
    "seconds",
)
AGAINST = (
    "useful training FLOPs",
    "executed training FLOPs",
    "training time (s)",
    "updates",
)  # as in Finished.spent


@dataclasses.dataclass
class Finished:
    """One finished run. ``right``: update → share of right answers per problem; ``kl_before`` and
    ``kl_after``: reverse KL per token of the fixed contexts; ``offset``: what the run it started
    from had cost (useful, executed, seconds)."""

    arm: str
    seed: int
    path: Path
    config: dict
    result: dict
    right: dict[int, list[float]]
    kl_before: list[list[float | None]]
    kl_after: list[list[float | None]]
    also: dict[str, dict]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def evaluations(self) -> list[dict]:
        return self.result["evaluations"]

    def cost(self, row: dict) -> tuple[float, float, float]:
        """(useful FLOPs, executed FLOPs, seconds) of training up to an evaluation, with what the
        run started from."""
        useful, executed, seconds = self.offset
        return (
            useful + row["flops_useful"],
            executed + row["flops_executed"],
            seconds + row["seconds"],
        )

    def spent(self, against: str) -> list[float]:
        """The x of every evaluation in a picture against one of AGAINST."""
        return [(*self.cost(row), row["step"])[AGAINST.index(against)] for row in self.evaluations]


def collect(paths: list[Path]) -> list[Finished]:
    """The finished runs in these folders: run folders, or folders of them (a comparison's; its
    tuning runs are left out).

    Where two folders have the same arm at the same seed, arms are named after their folder, too.
    UserError where a path holds no finished run.
    """
    found: dict[Path, Finished] = {}
    roots: dict[Path, Path] = {}
    for path in paths:
        inside = [path] if (path / "run.json").is_file() else _inside(path)
        runs = [run for folder in inside if (run := _finished(folder, path)) is not None]
        if not runs:
            raise UserError(
                f"{path}: no finished run in it (a folder with run.json and a result); run or "
                "resume one first"
            )
        found |= {run.path.resolve(): run for run in runs}
        roots |= {run.path.resolve(): path for run in runs}
    for where, run in found.items():  # a run that started from another one has cost that one, too
        origin = found.get(_origin(run, roots[where]))
        if origin is not None:
            run.offset = origin.cost(origin.evaluations[-1])
    if len({(run.arm, run.seed) for run in found.values()}) < len(found):
        for where, run in found.items():
            run.arm = f"{roots[where].resolve().name}/{run.arm}"
    return list(found.values())


def _inside(path: Path) -> list[Path]:
    """Run folders below a folder; of a comparison, the final runs in the order of its arms and
    seeds."""
    if (path / ARMS).is_file():
        asked = RunFolder(path).read_json(ARMS)
        folders = [path / arm / f"seed-{seed}" for arm in asked["arms"] for seed in asked["seeds"]]
        return [folder for folder in folders if (folder / "run.json").is_file()]
    return sorted(p.parent for p in path.glob("**/run.json"))


def _origin(run: Finished, root: Path) -> Path:
    """The folder of the run that this one started from: as its comparison says (which may have been
    moved since), else where its student was read from."""
    start = (
        RunFolder(root).read_json(ARMS)["start"].get(run.arm) if (root / ARMS).is_file() else None
    )
    if start is not None:
        return (root / start / f"seed-{run.seed}").resolve()
    return Path(run.config["models"]["student"]).parent.resolve()


def _finished(folder: Path, root: Path) -> Finished | None:
    import yaml

    files = RunFolder(folder)
    document = files.read_json("run.json")
    if not isinstance(document, dict) or "result" not in document:
        return None
    arm = (
        folder.parent.name
        if folder.name.startswith("seed-")
        else (folder.name if folder == root else str(folder.relative_to(root)))
    )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        right = {row["step"]: row["right"] for row in read_rows(folder / "scores.jsonl")[0]}
        also = {
            p.stem.removeprefix("also-"): files.read_json(p.name)
            for p in sorted(folder.glob("also-*.json"))
        }
        found = Finished(
            arm=arm,
            seed=document["seed"],
            path=folder,
            config=config,
            result=document["result"],
            right=right,
            kl_before=files.read_json("before.json")["kl_by_token"],
            kl_after=files.read_json("after.json")["kl_by_token"],
            also=also,
        )
        # fail here if a field that the report needs is missing
        _ = config["models"]["student"], found.evaluations[-1]["step"]
        found.cost(found.evaluations[-1])
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise UserError(
            f"{folder}: its files are damaged ({type(error).__name__}: {str(error)[:100]}); leave "
            "it out, or run it again"
        ) from None
    return found


def by_arm(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Runs by arm in the order met, each arm's by seed."""
    arms: dict[str, list[Finished]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return {arm: sorted(found, key=lambda run: run.seed) for arm, found in arms.items()}


def common_tail(runs: list[Finished]) -> int:
    """The longest prefix of the arms that truncate: beyond it, no such arm was taught."""
    short = [
        run.result["prefix"]
        for run in runs
        if run.result["prefix"] < run.config["rollout"]["max_new_tokens"]
    ]
    return max(short, default=0)


def rows(runs: list[Finished]) -> list[dict]:
    """A row per run and evaluation, as in the CSV. ``kl_beyond``: reverse KL beyond the common
    tail, after the last update."""
    tail, found = common_tail(runs), []
    for run in runs:
        for row in run.evaluations:
            useful, executed, seconds = run.cost(row)
            last = row is run.evaluations[-1]
            accuracy = row["accuracy"] or {"value": None, "low": None, "high": None, "n": 0}
            found.append(
                {
                    "arm": run.arm,
                    "seed": run.seed,
                    "update": row["step"],
                    "accuracy": accuracy["value"],
                    "low": accuracy["low"],
                    "high": accuracy["high"],
                    "n": accuracy["n"],
                    "lr": run.config["schedule"]["lr"],
                    "prefix": run.result["prefix"] if last else None,
                    "kl": row["kl"]["value"],
                    "kl_prefix": row["kl_prefix"],
                    "kl_tail": row["kl_tail"],
                    "kl_beyond": split_mean(run.kl_after, tail)[1] if last else None,
                    "finish_rate": row["finish_rate"],
                    "mean_tokens": row["mean_tokens"],
                    "flops_useful": useful,
                    "flops_executed": executed,
                    "seconds": seconds,
                    **(
                        {
                            f"also_{name}": other["accuracy"]["value"]
                            for name, other in run.also.items()
                        }
                        if last
                        else {}
                    ),
                }
            )
    return found


def write_csv(runs: list[Finished], file: Path) -> None:
    """``rows`` as CSV, with a column of accuracies for every other data set."""
    also = sorted({f"also_{name}" for run in runs for name in run.also})
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*COLUMNS, *also], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            for row in rows(runs)
        )
