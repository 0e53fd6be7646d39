"""Count how often `--stop-when collapse` ends a healthy run, and how early it ends a harmful one.

    python tests/benchmarks/collapse.py [--keep] [--quick]

Runs on the built-in tasks with a prefix of a quarter, 40 steps and an evaluation of 100 problems
every 5 steps, at the learning rate of the demo (healthy) and at 10 and 100 times that rate. Every
run is trained to the end as well, so that the table shows what the stop avoided. A run counts as
harmed if it ends below the untrained student's accuracy.

Hypotheses, written before the first run: no run at the demo's rate is stopped; every harmed run is
stopped before half of its steps.

``--quick`` trains one seed of one task for a few steps and writes nothing.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import measure

TASKS = ("choice", "shared", "tied")
RATES = (4e-4, 4e-3, 4e-2)
SEEDS = (0, 1, 2)
SETTINGS = {
    "prefix": "25%",
    "steps": 40,
    "batch_size": 4,
    "samples": 4,
    "eval_every": 5,
    "problems": 100,
    "kl_prompts": 8,
    "check_samples": 0,
    "eval_teacher": "off",
    "dtype": "float32",
}
QUICK = {"steps": 4, "eval_every": 2, "problems": 4, "kl_prompts": 2}


def train(out: Path, task: str, rate: float, more: dict[str, Any]) -> Any:
    """Return the result of one run on a built-in task."""
    import prefix_distill

    given = {
        **SETTINGS,
        **more,
        "student": f"lab:{task}/student",
        "teacher": f"lab:{task}/teacher",
        "dataset": f"lab:{task}",
        "lr": rate,
        "out": out,
    }
    run: Any = prefix_distill.run  # the options are plain values here
    return run(**given)


def measure_one(folder: Path, task: str, rate: float, more: dict[str, Any]) -> dict[str, Any]:
    """Train once to the end and once with the rule; return both ends."""
    seed = more["seed"]
    whole = train(folder / f"{task}-{rate}-{seed}-whole", task, rate, more)
    ruled = {**more, "stop_when": "collapse"}
    stopped = train(folder / f"{task}-{rate}-{seed}-stopped", task, rate, ruled)
    document = stopped.to_dict()
    before = whole.accuracy_before.value
    return {
        "task": task,
        "rate": rate,
        "seed": seed,
        "steps": whole.to_dict()["steps"],
        "accuracy_before": before,
        "accuracy_after": whole.accuracy_after.value,
        "is_harmed": whole.accuracy_after.value < before,
        "stopped_after": document["steps"] if document["stopped"] else None,
        "accuracy_at_stop": stopped.accuracy_after.value,
        "reason": (document["stopped"] or {}).get("reason"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one seed of one task; write nothing")
    parser.add_argument("--keep", action="store_true", help="write results/collapse.json")
    given = parser.parse_args()
    if given.quick and given.keep:
        parser.error("--quick writes nothing; drop --keep")
    grid = [(task, rate, seed) for task in TASKS for rate in RATES for seed in SEEDS]
    more: dict[str, Any] = {}
    if given.quick:
        grid = [(TASKS[0], RATES[0], 0), (TASKS[0], RATES[-1], 0)]
        more = QUICK
    rows = []
    with tempfile.TemporaryDirectory() as text:
        for task, rate, seed in grid:
            rows.append(measure_one(Path(text), task, rate, {**more, "seed": seed}))
    document = {"machine": measure.machine(), "settings": SETTINGS, "runs": rows}
    measure.record("collapse", document, given.keep)


if __name__ == "__main__":
    main()
