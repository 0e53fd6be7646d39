"""Compare steps on two ranks with steps on one: one thread each, the same global batch.

    python tests/benchmarks/ranks.py [--quick] [--turns 2] [--work FOLDER]

About 8 minutes on 2 cores. The cases are the built-in pair (128 rollouts of 48 tokens per step) and
SmolLM2-135M-Instruct with its 20-layer student (16 rollouts of 32 tokens). The EOS token of the
latter is one that the student does not sample, so all runs do the same work. Wall time is measured
from the end of one step to the end of the next. The first step is excluded, and there is no
evaluation between steps. Ranks use gloo on CPUs; everything else is as in `prefix-distill run`. The
target is 1.6 times the throughput. ``--quick`` runs the built-in pair once and writes nothing. The
last printed line is JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import scaling

CASES = {
    "laboratory": {
        "train.batch_size": 32,
        "rollout.samples": 4,
        "train.micro_batch_size": 32,
        "schedule.prefix": "48",
        "train.steps": 8,
    },
    "SmolLM2": {
        "train.batch_size": 4,
        "rollout.samples": 4,
        "train.micro_batch_size": 4,
        "schedule.prefix": "32",
        "rollout.max_new_tokens": 48,
        "train.steps": 3,
    },
}


class Watch(measure.Silent):
    """A reporter that records when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def row(self, row: dict, useful: float, full: float) -> None:
        self.ends.append(time.perf_counter())


def rank(values: str) -> None:
    """Run one rank of one run; rank 0 prints the seconds of each step except the first."""
    import torch

    from prefix_distill import config
    from prefix_distill.cli import quiet
    from prefix_distill.training import prepare as preflight
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.session import Session

    torch.set_num_threads(1)
    quiet.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        run, watch = preflight.prepare(config.build(json.loads(values))), Watch()
        folder = RunFolder(run.place.gather(scratch)[0] + "/run")
        if run.place.is_first:
            folder.create({})
        run.place.barrier()
        result = Session(run, folder, watch).train()
        if run.place.is_first:
            seconds = [after - before for before, after in itertools.pairwise(watch.ends)]
            phases = {k: v / len(watch.ends) for k, v in result["seconds"]["by_phase"].items()}
            print(
                json.dumps(
                    {
                        "seconds": seconds,
                        "phases": phases,
                        "tokens": result["tokens"] // len(watch.ends),
                        "kl_after": result["kl_after"]["value"],
                    }
                )
            )
        run.place.barrier()


def timed(ranks: int, values: dict) -> dict:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            __file__,
            "--rank",
            json.dumps(values),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=None, help="folder that keeps the SmolLM2 pair"
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        return rank(given.rank)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, values in list(CASES.items())[: 1 if given.quick else None]:
            values = {
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 2,
                "runtime.device": "cpu",
                "runtime.dtype": "float32",
                "checkpoint.save_every": 0,
            } | values
            if name == "SmolLM2":
                pair = scaling.pair(given.work or Path(scratch))
                values |= {
                    "models.student": str(pair / "student"),
                    "models.teacher": str(pair / "teacher"),
                    "data.dataset": str(scaling.real_pair.questions()),
                    "data.prompt_column": "doc.question",
                }
            found: dict[int, list[dict]] = {1: [], 2: []}
            for _ in range(1 if given.quick else given.turns):
                for ranks in found:
                    found[ranks].append(timed(ranks, values))
                    print(name, ranks, found[ranks][-1], file=sys.stderr, flush=True)
            alone, both = (
                statistics.median(s for turn in found[ranks] for s in turn["seconds"])
                for ranks in (1, 2)
            )
            per_turn = [
                statistics.median(a["seconds"]) / statistics.median(b["seconds"])
                for a, b in zip(found[1], found[2], strict=True)
            ]
            table.append(
                {
                    "case": name,
                    "seconds_1_rank": alone,
                    "seconds_2_ranks": both,
                    "throughput": alone / both,
                    "throughput_low": min(per_turn),
                    "throughput_high": max(per_turn),
                    "tokens_an_update": found[1][0]["tokens"],
                    "updates": len(found[1][0]["seconds"]) * len(found[1]),
                    "phases": {str(ranks): found[ranks][-1]["phases"] for ranks in found},
                    "kl_gap": max(
                        abs(a["kl_after"] - b["kl_after"])
                        for a, b in zip(found[1], found[2], strict=True)
                    ),
                }
            )
    measure.record("ranks", {"table": table, "target": 1.6} | measure.machine(), not given.quick)


if __name__ == "__main__":
    main()
