"""Measure a step with prompts that run once per sample, and once for all samples.

    python tests/benchmarks/shared_prompts.py [--quick] [--pairs 3] [--dtypes float32 bfloat16]
        [--work FOLDER]

About 5 minutes on 2 cores. SmolLM2-135M-Instruct and its 20-layer student, 2 GSM8K questions with 4
rollouts of 32 tokens each, as `smollm2-g4` of update_vs_trl.py. *Before* runs every prompt once per
sample. *After* runs it where the run's own check allows. The two alternate in one process after a
warm-up step of each. There is no optimizer step, so all steps measure the same student. A ratio is
after over before within a pair; the median over pairs [lowest, highest] is shown, of the time and
of the CPU time, which other processes of the machine disturb less. ``--quick`` runs one pair of 16
tokens in bfloat16 and writes nothing. ``--work`` keeps the pair for the next call.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure
import scaling

from prefix_distill.cli import quiet

PROMPTS, SAMPLES, TOKENS = 2, 4, 32


def without_sharing(run):
    """Return the run with models that run a prompt once per sample."""
    pair = run.pair
    student = dataclasses.replace(pair.student, shares_prompts=False)
    teacher = dataclasses.replace(pair.teacher, shares_prompts=False)
    return dataclasses.replace(
        run, pair=dataclasses.replace(pair, student=student, teacher=teacher)
    )


def compare(folder: Path, dtype: str, tokens: int, pairs: int) -> dict:
    """Return the seconds of a step before and after, by phase, and their ratio."""
    run = scaling.prepare(folder, tokens, PROMPTS, samples=SAMPLES, dtype=dtype)
    arms = {"before": without_sharing(run), "after": run}
    for arm in arms.values():
        scaling.update(arm, 0)
    steps: dict[str, list[dict]] = {name: [] for name in arms}
    for turn in range(pairs):
        for name, arm in arms.items():
            start = time.process_time()
            step = scaling.update(arm, 1 + turn)
            steps[name].append(step | {"cpu_seconds": time.process_time() - start})
    ratios = []
    cpu_ratios = []
    for before, after in zip(steps["before"], steps["after"], strict=True):
        ratios.append(sum(after["seconds"].values()) / sum(before["seconds"].values()))
        cpu_ratios.append(after["cpu_seconds"] / before["cpu_seconds"])
    row = {
        "dtype": dtype,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratio_range": [min(cpu_ratios), max(cpu_ratios)],
        "shared_prompts": {found.role: found.facts for found in run.shared_prompts},
    }
    for name, measured in steps.items():
        totals = [sum(step["seconds"].values()) for step in measured]
        row[f"{name}_seconds"] = statistics.median(totals)
        row[f"{name}_by_phase"] = {
            phase: statistics.median(step["seconds"][phase] for step in measured)
            for phase in measured[0]["seconds"]
        }
        row[f"{name}_flops"] = sum(measured[0]["executed"].values())
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="one pair of 16 tokens in bfloat16; write nothing"
    )
    parser.add_argument("--pairs", type=int, help="steps of each arm (3; with --quick 1)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: both"
    )
    parser.add_argument("--work", type=Path, help="folder for the pair (default: a temporary one)")
    given = parser.parse_args()
    quiet.quiet_libraries()
    tokens, pairs, dtypes = TOKENS, 3, ["float32", "bfloat16"]
    if given.quick:
        tokens, pairs, dtypes = 16, 1, ["bfloat16"]
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = scaling.pair(given.work or Path(scratch))
        for dtype in given.dtypes or dtypes:
            row = compare(folder, dtype, tokens, given.pairs or pairs)
            table.append(row)
            low, high = row["ratio_range"]
            print(
                f"{dtype}: before {row['before_seconds']:.2f} s, after {row['after_seconds']:.2f} "
                f"s per step; ratio {row['ratio']:.2f} [{low:.2f}, {high:.2f}], of CPU time "
                f"{row['cpu_ratio']:.2f}",
                file=sys.stderr,
                flush=True,
            )
    measure.record("shared_prompts", {"table": table} | measure.machine(), not given.quick)


if __name__ == "__main__":
    quiet.calm_threads(os.environ)
    main()
