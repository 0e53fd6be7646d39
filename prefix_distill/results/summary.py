"""Run folders become a table: accuracy and cost, arm by arm."""

import base64
import csv
import dataclasses
import io
import math
from importlib.resources import files
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined

from ..display import flops_text
from ..engine.device import seed_of
from ..engine.evaluate import split_mean
from ..errors import UserError
from ..maths.weights import QUADRANTS
from ..training.folder import RunFolder, read_rows
from .compare import FILE as ARMS

RESAMPLES = 2_000
SHARES = (1.0, 0.95, 0.9, 0.5)  # of the reference's gain, for which the cost is given
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


@dataclasses.dataclass
class Finished:
    """One finished run. ``right``: update → share of right answers per problem; ``kl_before`` and ``kl_after``: reverse KL per token
    of the fixed contexts; ``offset``: what the run it started from had
    cost (useful, executed, seconds)."""

    arm: str
    seed: int
    path: Path
    config: dict
    result: dict
    right: dict[int, list[float]]
    kl_before: list[list[float]]
    kl_after: list[list[float]]
    also: dict[str, dict]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def evaluations(self) -> list[dict]:
        return self.result["evaluations"]

    def cost(self, row: dict) -> tuple[float, float, float]:
        """(useful FLOPs, executed FLOPs, seconds) of training up to an evaluation, with what the run started from."""
        return tuple(
            a + b
            for a, b in zip(
                self.offset, (row["flops_useful"], row["flops_executed"], row["seconds"])
            )
        )

    def spent(self, against: str) -> list[float]:
        """The x of every evaluation in a picture against one of AGAINST."""
        return [(*self.cost(row), row["step"])[AGAINST.index(against)] for row in self.evaluations]


def collect(paths: list[Path]) -> list[Finished]:
    """The finished runs in these folders: run folders, or folders of them (a comparison's; its tuning runs are left out).

    Where two folders have the same arm at the same seed, arms are named after their folder, too. UserError where a path holds
    no finished run.
    """
    found: dict[Path, Finished] = {}
    roots: dict[Path, Path] = {}
    for path in paths:
        inside = [path] if (path / "run.json").is_file() else _inside(path)
        runs = [run for folder in inside if (run := _finished(folder, path)) is not None]
        if not runs:
            raise UserError(
                f"{path}: no finished run in it (a folder with run.json and a result); run or resume one first"
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
    """Run folders below a folder; of a comparison, the final runs in the order of its arms and seeds."""
    if (path / ARMS).is_file():
        asked = RunFolder(path).read_json(ARMS)
        folders = [path / arm / f"seed-{seed}" for arm in asked["arms"] for seed in asked["seeds"]]
        return [folder for folder in folders if (folder / "run.json").is_file()]
    return sorted(p.parent for p in path.glob("**/run.json"))


def _origin(run: Finished, root: Path) -> Path:
    """The folder of the run that this one started from: as its comparison says (which may have been moved since), else where
    its student was read from."""
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
            arm,
            document["seed"],
            folder,
            config,
            document["result"],
            right,
            *(files.read_json(name)["kl_by_token"] for name in ("before.json", "after.json")),
            also,
        )
        (
            config["models"]["student"],
            found.evaluations[-1]["step"],
            found.cost(found.evaluations[-1]),
        )
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
            f"{folder}: its files are damaged ({type(error).__name__}: {str(error)[:100]}); leave it out, or run it again"
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
    """A row per run and evaluation, as in the CSV. ``kl_beyond``: reverse KL beyond the common tail, after the last update."""
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


class Resampled:
    """Two-level bootstrap, 2,000 seeded draws of seeds and of problems, the same draw for every arm: differences and ratios
    between arms are paired. Only problems are drawn where there is one seed. Arms must share problems and seeds to be paired."""

    def __init__(self, arms: dict[str, list[Finished]]):
        self.arms = arms
        generator = torch.Generator().manual_seed(seed_of("report"))
        counts = {
            len(run.right[step]) for runs in arms.values() for run in runs for step in run.right
        }
        seeds = {tuple(run.seed for run in runs) for runs in arms.values()}
        self.paired = len(counts) == 1 and len(seeds) == 1
        if not self.paired:
            return
        self.n, self.k = counts.pop(), len(seeds.pop())
        self.problems = (
            torch.stack(
                [
                    torch.randint(self.n, (self.n,), generator=generator).bincount(minlength=self.n)
                    for _ in range(RESAMPLES)
                ]
            ).double()
            / self.n
        )
        self.seeds = (
            torch.stack(
                [
                    torch.randint(self.k, (self.k,), generator=generator).bincount(minlength=self.k)
                    for _ in range(RESAMPLES)
                ]
            ).double()
            / self.k
        )

    def curve(
        self, arm: str
    ) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(updates E, mean accuracy [E], its draws [R, E], mean useful FLOPs [E], their draws [R, E])."""
        runs = self.arms[arm]
        steps = sorted(set.intersection(*(set(run.right) for run in runs)))
        right = torch.tensor(
            [[run.right[step] for step in steps] for run in runs], dtype=torch.float64
        )  # [K, E, P]
        cost = torch.tensor(
            [[run.cost(row)[0] for row in run.evaluations if row["step"] in steps] for run in runs],
            dtype=torch.float64,
        )  # [K, E]
        drawn = torch.einsum("rk,kep,rp->re", self.seeds, right, self.problems)
        return steps, right.mean((0, 2)), drawn, cost.mean(0), self.seeds @ cost


def interval(draws: torch.Tensor) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of draws."""
    ordered = draws.sort().values
    return ordered[int(0.025 * len(ordered))].item(), ordered[int(0.975 * len(ordered)) - 1].item()


def first_cost(cost: list[float], accuracy: list[float], wanted: float) -> float:
    """Cost at which accuracy first reaches ``wanted``, linear between evaluations; inf where it never does."""
    wanted -= 1e-12  # a curve reaches its own end, however that was rounded
    if accuracy[0] >= wanted:
        return cost[0]
    for i in range(1, len(cost)):
        if accuracy[i] >= wanted:
            share = (wanted - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return cost[i - 1] + share * (cost[i] - cost[i - 1])
    return math.inf


def summary(runs: list[Finished], reference: str | None) -> list[dict]:
    """A row per arm: means over its seeds; accuracy with an interval over problems and seeds (over problems, where arms do not
    share both and an arm has one seed; None otherwise); and, for shares of the reference's
    gain, reference's useful FLOPs ÷ the arm's to reach it: the ratio, its paired interval, and the share of draws that reach it
    (a draw that does not counts as a ratio of 0)."""
    arms, tail = by_arm(runs), common_tail(runs)
    drawn = Resampled(arms) if all(run.right for run in runs) else None
    curves = {arm: drawn.curve(arm) for arm in arms} if drawn and drawn.paired else {}
    found = []
    for arm, group in arms.items():
        last = [run.evaluations[-1] for run in group]
        costs = [run.cost(row) for run, row in zip(group, last)]
        mean = lambda values: (
            math.fsum(values) / len(values) if None not in (values := list(values)) else None
        )
        row = {
            "arm": arm,
            "seeds": len(group),
            "updates": last[0]["step"],
            "prefix": mean(run.result["prefix"] for run in group),
            "accuracy": mean(e["accuracy"] and e["accuracy"]["value"] for e in last),
            "low": None,
            "high": None,
            "answers": sum(e["accuracy"]["n"] for e in last) if last[0]["accuracy"] else 0,
            "before": mean(
                run.evaluations[0]["accuracy"] and run.evaluations[0]["accuracy"]["value"]
                for run in group
            ),
            "kl": mean(e["kl"]["value"] for e in last),
            "kl_tail_before": mean(
                split_mean(run.kl_before, run.result["prefix"])[1] for run in group
            ),
            "kl_tail": mean(split_mean(run.kl_after, run.result["prefix"])[1] for run in group),
            "kl_beyond": mean(split_mean(run.kl_after, tail)[1] for run in group),
            "finish_rate": mean(e["finish_rate"] for e in last),
            "mean_tokens": mean(e["mean_tokens"] for e in last),
            "flops_useful": mean(c[0] for c in costs),
            "flops_executed": mean(c[1] for c in costs),
            "seconds": mean(c[2] for c in costs),
            "full_rollout_cost": mean(run.result["full_rollout_cost"] for run in group),
            "also": {
                name: mean(run.also[name]["accuracy"]["value"] for run in group)
                for name in group[0].also
            },
            "cost_ratios": {},
        }
        if arm not in curves and len(group) == 1 and last[0]["accuracy"]:
            row["low"], row["high"] = (last[0]["accuracy"][end] for end in ("low", "high"))
        if arm in curves:
            row["low"], row["high"] = interval(curves[arm][2][:, -1])
            if reference is not None:
                row["cost_ratios"] = {
                    share: _ratio(curves[reference], curves[arm], share) for share in SHARES
                }
                row["difference"] = row["accuracy"] - curves[reference][1][-1].item()
                row["difference_low"], row["difference_high"] = interval(
                    curves[arm][2][:, -1] - curves[reference][2][:, -1]
                )
        found.append(row)
    return found


def _ratio(reference, arm, share: float) -> dict:
    def one(ref_accuracy, ref_cost, accuracy, cost):
        wanted = ref_accuracy[0] + share * (ref_accuracy[-1] - ref_accuracy[0])
        own = first_cost(cost, accuracy, wanted)
        return first_cost(ref_cost, ref_accuracy, wanted) / own if 0 < own < math.inf else 0.0

    _, ref, ref_draws, ref_cost, ref_cost_draws = reference
    _, own, own_draws, own_cost, own_cost_draws = arm
    draws = torch.tensor(
        [
            one(*lists)
            for lists in zip(
                ref_draws.tolist(),
                ref_cost_draws.tolist(),
                own_draws.tolist(),
                own_cost_draws.tolist(),
            )
        ]
    )
    low, high = interval(draws)
    return {
        "value": one(ref.tolist(), ref_cost.tolist(), own.tolist(), own_cost.tolist()) or None,
        "low": low,
        "high": high,
        "reached": (draws > 0).double().mean().item(),
    }


HEADINGS = (
    "arm",
    "accuracy [95 %]",
    "useful FLOPs",
    "executed",
    "training time",
    "KL beyond its prefix, before → after",
    "end",
    "tokens",
    "useful FLOPs of the reference ÷ its own to reach half of the reference's gain",
    "90 % of it",
    "all of it",
)


def cells(row: dict) -> list[str]:
    """A summary row as text, under HEADINGS."""
    accuracy = (
        "–"
        if row["accuracy"] is None
        else f"{row['accuracy']:.1%}"
        + (f" [{row['low']:.1%}, {row['high']:.1%}]" if row["low"] is not None else "")
        + f" of {row['answers']:,}"
    )
    tail = (
        "–"
        if row["kl_tail"] is None or row["kl_tail_before"] is None
        else f"{row['kl_tail_before']:.3g} → {row['kl_tail']:.3g}"
    )
    return [
        row["arm"],
        accuracy,
        flops_text(row["flops_useful"]),
        flops_text(row["flops_executed"]),
        f"{row['seconds']:.0f} s",
        tail,
        f"{row['finish_rate']:.0%}",
        f"{row['mean_tokens']:.0f}",
        *(ratio_text(row["cost_ratios"].get(share)) for share in (0.5, 0.9, 1.0)),
    ]


def ratio_text(ratio: dict | None) -> str:
    """A cost ratio with its interval; what share of the draws reaches the accuracy at all where not every one does."""
    if ratio is None:
        return "–"
    reached = "" if ratio["reached"] == 1 else f", reached in {ratio['reached']:.0%} of draws"
    if ratio["value"] is None:
        return f"not reached ({ratio['reached']:.0%} of draws)"
    return f"{ratio['value']:.1f} × [{ratio['low']:.1f}, {ratio['high']:.1f}]{reached}"


def markdown(summary_rows: list[dict]) -> str:
    """The summary as a Markdown table."""
    clean = lambda text: text.replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
    return (
        "\n".join(
            lines + ["| " + " | ".join(map(clean, cells(row))) + " |" for row in summary_rows]
        )
        + "\n"
    )


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


AGAINST = (
    "useful training FLOPs",
    "executed training FLOPs",
    "training time (s)",
    "updates",
)  # as in Finished.spent
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito's, distinct to every eye


def draw(
    runs: list[Finished], title: str = "", only: list[str] | None = None, against: str = AGAINST[0]
):
    """Accuracy (or, without answers, held-out KL) against a cost: a matplotlib figure, a line an arm, means over seeds with 95 %
    intervals where they can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = {arm: group for arm, group in by_arm(runs).items() if only is None or arm in only}
    graded = all(run.right for group in arms.values() for run in group)
    drawn = Resampled(arms) if graded else None
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    for i, (arm, group) in enumerate(arms.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": "os^vD<>ph*X"[i % 11],
            "linestyle": ("-", "--", "-.", ":")[i % 4],
            "markersize": 4,
            "linewidth": 1.3,
        }
        x = [
            math.fsum(column) / len(column)
            for column in zip(*(run.spent(against) for run in group))
        ]
        if graded and drawn.paired:
            _, mean, draws, _, _ = drawn.curve(arm)
            ends = [interval(draws[:, e]) for e in range(draws.shape[1])]
            axes.fill_between(
                x,
                [100 * low for low, _ in ends],
                [100 * high for _, high in ends],
                color=style["color"],
                alpha=0.12,
                linewidth=0,
            )
            axes.plot(x, 100 * mean, label=arm, **style)
            continue
        pick = (lambda e: 100 * e["accuracy"]["value"]) if graded else (lambda e: e["kl"]["value"])
        y = [[pick(e) for e in run.evaluations] for run in group]
        axes.plot(x, [math.fsum(column) / len(column) for column in zip(*y)], label=arm, **style)
    axes.set_xlabel(against)
    axes.set_ylabel(
        "accuracy on held-out problems (%)" if graded else "held-out reverse KL (nats per token)"
    )
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncol=2)
    figure.tight_layout()
    return figure


def png(figure) -> bytes:
    """A figure as PNG; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def page(runs: list[Finished], summary_rows: list[dict], reference: str | None, title: str) -> str:
    """Return one self-contained HTML page: no script, no network, every text escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")

    def facts(key: str) -> list[tuple[Finished, dict]]:
        return [(run, fact) for run in runs for fact in run.result.get(key, [])]

    def picture(against: str) -> str:
        return base64.b64encode(png(draw(runs, title, against=against))).decode()

    def has_quadrants(group: list[Finished]) -> bool:
        return all("quadrants" in row for run in group for row in run.evaluations)

    return environment.from_string(template).render(
        title=title,
        runs=runs,
        summary=summary_rows,
        reference=reference,
        headings=HEADINGS,
        cells=cells,
        pictures={against: picture(against) for against in AGAINST},
        also=sorted({name for row in summary_rows for name in row["also"]}),
        quadrants={arm: group for arm, group in by_arm(runs).items() if has_quadrants(group)},
        quadrant_names=QUADRANTS,
        quadrant_cells=quadrant_cells,
        extrapolations=facts("extrapolations"),
        growth=facts("prefix_decisions"),
        warnings=facts("warnings"),
        flops_text=flops_text,
        settings=_settings,
    )


def quadrant_cells(group: list[Finished]) -> list[str]:
    """The quadrants of an arm's fixed contexts before and after, means over seeds, under QUADRANTS."""

    def mean(place: int, name: str, key: str) -> float:
        return math.fsum(
            run.evaluations[place]["quadrants"]["quadrants"][name][key] for run in group
        ) / len(group)

    return [
        " → ".join(
            f"{mean(place, name, 'tokens'):.0%} / {mean(place, name, 'divergence'):.0%}"
            for place in (0, -1)
        )
        for name in QUADRANTS
    ]


def _settings(run: Finished) -> str:
    """What differs from the defaults."""
    from ..config import sections as configuration

    defaults = configuration.as_dict(configuration.Config())
    return ", ".join(
        f"{section}.{key}={value}"
        for section, keys in run.config.items()
        for key, value in keys.items()
        if value != defaults.get(section, {}).get(key) and key != "out"
    )
