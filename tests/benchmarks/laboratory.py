"""Does a prefix do it? The gate of the embedded laboratory, and the controls where it should not.

    python tests/benchmarks/laboratory.py [--task choice] [--seeds 0 1 2] [--rates 1e-4 2e-4 4e-4] [--quick]

For one task, both arms (a 24-token prefix, at most 16 % of the trace, and full rollouts) make 30 updates of 16 rollouts.
Each arm's peak learning rate is chosen from --rates on validation problems at a seed of its own; then every seed in --seeds
runs at that rate and is evaluated on test problems every 10 updates. Writes tests/benchmarks/results/laboratory-TASK.csv (a
row per arm, seed and evaluation) and prints one JSON line last: per arm the rate, the accuracies, the useful FLOPs, and the
ratio of useful FLOPs at which the two arms reach the gain asked for (10 points). About 25 minutes a task on 2 cores.
``--quick``: two updates, one seed, nothing recorded.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from prefix_distill import cli, preflight
from prefix_distill import config as configuration
from prefix_distill.checkpoint import RunFolder

ARMS = {"prefix": "24", "full": "full"}
UPDATES, ROLLOUTS, PROBLEMS, TUNING_PROBLEMS, GAIN = 30, 16, 300, 200, 0.10


def distil(task: str, arm: str, rate: float, seed: int, split: str, problems: int, every: int, updates: int) -> list[dict]:
    """One run; its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        run = preflight.prepare(configuration.build({
            "models.student": f"lab:{task}/student", "models.teacher": f"lab:{task}/teacher", "data.dataset": f"lab:{task}",
            "schedule.prefix": ARMS[arm], "schedule.lr": rate, "schedule.warmup": "0", "train.steps": updates,
            "train.batch_size": ROLLOUTS, "train.micro_batch_size": ROLLOUTS, "rollout.samples": 1, "rollout.rows": 300,
            "evaluate.split": split, "evaluate.problems": problems, "evaluate.every": every, "checkpoint.save_every": 0,
            "runtime.seed": seed, "runtime.device": "cpu",
        }))
        result = cli.train_in(run, RunFolder(Path(folder) / "run"), label=f"{task} {arm} {rate:g} seed {seed}:")
    return result["evaluations"]


def reached(evaluations: list[dict], gain: float) -> float | None:
    """Useful FLOPs at which accuracy has risen by ``gain``, linear between evaluations; None if it never did."""
    wanted = evaluations[0]["accuracy"]["value"] + gain
    for left, right in zip(evaluations, evaluations[1:]):
        low, high = left["accuracy"]["value"], right["accuracy"]["value"]
        if high >= wanted:
            return left["flops_useful"] + (right["flops_useful"] - left["flops_useful"]) * (wanted - low) / (high - low)
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="choice")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--quick", action="store_true", help="two updates, one seed, nothing recorded")
    given = parser.parse_args()
    updates, problems, every = UPDATES, PROBLEMS, 10
    if given.quick:
        updates, problems, every, given.seeds, given.rates = 2, 20, 1, [0], [1e-4]
    cli.quiet_libraries()
    rows, summary = [], {}
    for arm in ARMS:
        tuned = {}
        for rate in given.rates if len(given.rates) > 1 else []:
            last = distil(given.task, arm, rate, 1000, "validation", TUNING_PROBLEMS, 0, updates)[-1]
            tuned[rate] = last["accuracy"]["value"]
        rate = max(tuned, key=tuned.get) if tuned else given.rates[0]
        finals = []
        for seed in given.seeds:
            evaluations = distil(given.task, arm, rate, seed, "test", problems, every, updates)
            finals.append({"seed": seed, "before": evaluations[0]["accuracy"], "after": evaluations[-1]["accuracy"],
                           "kl_tail": evaluations[-1]["kl_tail"], "flops_useful": evaluations[-1]["flops_useful"],
                           "flops_to_gain": reached(evaluations, GAIN)})
            for e in evaluations:
                rows.append({
                    "task": given.task, "arm": arm, "rate": rate, "seed": seed, "update": e["step"],
                    "accuracy": e["accuracy"]["value"], "low": e["accuracy"]["low"], "high": e["accuracy"]["high"],
                    "n": e["accuracy"]["n"], "kl_prefix": e["kl_prefix"], "kl_tail": e["kl_tail"],
                    "finish_rate": e["finish_rate"], "mean_tokens": e["mean_tokens"], "flops_useful": e["flops_useful"],
                    "flops_executed": e["flops_executed"],
                })
        summary[arm] = {"rate": rate, "tuning": tuned, "seeds": finals}
    if not given.quick:
        with open(Path(__file__).parent / "results" / f"laboratory-{given.task}.csv", "w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for arm, found in summary.items():
        for s in found["seeds"]:
            print(f"{given.task} {arm:6} lr {found['rate']:g} seed {s['seed']}: {s['before']['value']:.1%} → "
                  f"{s['after']['value']:.1%} [{s['after']['low']:.1%}, {s['after']['high']:.1%}], "
                  f"{s['flops_useful'] / 1e9:.1f} GFLOP useful, KL beyond the prefix {s['kl_tail']}")
    ratios = [f["flops_to_gain"] / p["flops_to_gain"] for p, f in zip(summary["prefix"]["seeds"], summary["full"]["seeds"])
              if p["flops_to_gain"] and f["flops_to_gain"]]
    print(json.dumps({"task": given.task, "arms": summary, "full_over_prefix_flops_to_gain": ratios}))


if __name__ == "__main__":
    sys.exit(main())
