"""Kill runs with SIGKILL, resume them, and compare their files with those of an uninterrupted run.

    python tests/benchmarks/soak.py [--times 50] [--gpus 1] [--seed 0] [--out FOLDER] [--quick]

50 kills take about 8 minutes. The run has all state that a checkpoint must keep: an adaptive
prefix, TIP, EffOPD with its anchor, evaluations, a best model and tail evaluations. The kills
alternate among KINDS; one in three resumed runs is killed again.
The comparison with the uninterrupted run includes weights, optimizer moments, EffOPD's anchor,
training state, metrics rows, scores, texts, both saved models and the result. It also finds
unfinished files that a run left behind. Every run is a fork of a process that has only imported the
libraries; with --gpus 2 it is a new process, whose launcher is killed. The last printed line is
JSON; the exit code is 1 if anything differs. ``--quick`` makes two kills. Linux only.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prefix_distill.cli import main as cli
from prefix_distill.cli import quiet

KINDS = (
    "any moment",
    "inside a checkpoint's write",
    "before the first checkpoint",
    "any moment",
    "inside the best model's write",
)
FLAGS = [
    "--student",
    "lab:choice/student",
    "--teacher",
    "lab:choice/teacher",
    "--dataset",
    "lab:choice:1-3",
    "--steps",
    "12",
    "--prefix",
    "auto:6:3",
    "--max-new-tokens",
    "32",
    "--batch-size",
    "4",
    "--samples",
    "2",
    "--micro-batch-size",
    "3",
    "--problems",
    "8",
    "--kl-prompts",
    "4",
    "--eval-every",
    "3",
    "--tail-every",
    "2",
    "--tail-prompts",
    "2",
    "--save-every",
    "2",
    "--lr",
    "2e-4",
    "--warmup",
    "0",
    "--select",
    "soft-or",
    "--extrapolate",
    "effopd",
    "--extrapolate-score",
    "heldout-kl",
    "--extrapolate-problems",
    "4",
    "--check-samples",
    "0",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]
PATIENCE = 300  # seconds


class Process:
    """Run `prefix-distill run FLAGS` in a separate process.

    Its output goes to the .log file beside its run folder.
    """

    def __init__(self, gpus: int, *flags):
        self.gpus = gpus
        self.ended: int | None = None
        with open(Path(flags[-1]).with_suffix(".log"), "a") as log:
            if gpus > 1:
                command = [
                    sys.executable,
                    "-m",
                    "prefix_distill",
                    "run",
                    *flags,
                    "--gpus",
                    str(gpus),
                ]
                self.pid = subprocess.Popen(command, stdout=log, stderr=log).pid
                return
            self.pid = os.fork()
            if self.pid:
                return
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.argv = ["prefix-distill", "run", *flags]
                cli.main()
            except SystemExit as end:
                sys.stdout.flush()
                status = end.code or 0
                if isinstance(status, str):  # Python prints a str to stderr and exits with 1
                    print(status, file=sys.stderr, flush=True)
                    status = 1
                os._exit(status)
            finally:
                os._exit(70)

    def code(self, wait: bool = False) -> int | None:
        """Return the exit code (negative: a signal), or None while the process runs."""
        if self.ended is None:
            found, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            self.ended = os.waitstatus_to_exitcode(status) if found else None
        return self.ended

    def kill(self, out: Path, kind: str, rng: random.Random, whole: float) -> bool:
        """Kill the process at a moment of the given kind; return whether it was still running.

        ``whole``: seconds of an uninterrupted run.
        """
        begun, wanted, count = time.monotonic(), rng.uniform(0, whole), rng.randint(1, 4)
        watched = {
            "inside a checkpoint's write": "checkpoints/.partial",
            "inside the best model's write": ".best.partial",
        }.get(kind)
        seen, there = 0, False
        while self.code() is None and time.monotonic() - begun < PATIENCE:
            if kind == "any moment" and time.monotonic() - begun > wanted:
                break
            if kind == "before the first checkpoint" and (out / "config.yaml").exists():
                time.sleep(rng.uniform(0, 0.5))
                break
            if watched:
                now = (out / watched).exists()
                seen, there = seen + (now and not there), now
                if now and seen >= count:
                    break
            time.sleep(0.0005)
        if self.code() is not None:
            return False
        os.kill(self.pid, signal.SIGKILL)
        self.code(wait=True)
        if self.gpus > 1:
            time.sleep(1.5)  # time for the ranks to notice and exit
        return True


def contents(out: Path) -> dict[str, object]:
    """Return everything that must be equal, by file name.

    Times, paths and measurements of free memory are excluded.
    """
    found: dict[str, object] = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_dir() or name == ".lock":
            continue
        if file.suffix in (".json", ".jsonl") and file.parent.name not in ("model", "best"):
            found[name] = [
                timeless(json.loads(line))
                for line in (
                    [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
                )
            ]
        else:
            found[name] = file.read_bytes()
    return found


def timeless(tree):
    if isinstance(tree, dict):
        return {
            k: timeless(v)
            for k, v in tree.items()
            if not k.startswith("time/")
            and k not in ("seconds", "resumed_from", "sha256", "facts_sha256")
        }
    return (
        [timeless(x) for x in tree if not (isinstance(x, dict) and x.get("name") == "memory")]
        if isinstance(tree, list)
        else tree
    )


def soak(times: int, gpus: int, seed: int, folder: Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    rng, begun = random.Random(seed), time.monotonic()
    whole = folder / "whole"
    started = time.monotonic()
    if code := Process(gpus, *FLAGS, "--out", str(whole)).code(wait=True):
        raise SystemExit(
            f"expected exit code 0 of the uninterrupted run, got {code}: "
            f"{whole.with_suffix('.log').read_text()[-2000:]}"
        )
    seconds, wanted = time.monotonic() - started, contents(whole)
    kills, twice, late, differing, resumed_from = dict.fromkeys(KINDS, 0), 0, 0, [], []
    number = 0
    while sum(kills.values()) < times:
        kind, out = KINDS[number % len(KINDS)], folder / f"run-{number}"
        number += 1
        if not Process(gpus, *FLAGS, "--out", str(out)).kill(out, kind, rng, seconds):
            late += 1
        else:
            kills[kind] += 1
        again = (
            ["--resume", "--out", str(out)]
            if (out / "config.yaml").exists()
            else [*FLAGS, "--out", str(out)]
        )
        if (
            rng.random() < 1 / 3
            and "--resume" in again
            and Process(gpus, *again).kill(out, "any moment", rng, seconds / 2)
        ):
            kills["any moment"] += 1
            twice += 1
        code = Process(gpus, *again).code(wait=True)
        if code:
            differing.append(
                {
                    "run": number,
                    "kind": kind,
                    "exit": code,
                    "said": out.with_suffix(".log").read_text()[-300:],
                }
            )
        else:
            found = contents(out)
            if names := [
                name
                for name in sorted(wanted.keys() | found.keys())
                if found.get(name) != wanted.get(name)
            ]:
                differing.append({"run": number, "kind": kind, "files": names})
            resumed_from.append(
                json.loads((out / "run.json").read_text())["result"]["resumed_from"]
            )
        if not differing or differing[-1]["run"] != number:
            shutil.rmtree(out)
        print(
            f"{sum(kills.values())} of {times} kills, {len(differing)} runs differ, "
            f"{time.monotonic() - begun:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return {
        "kills": sum(kills.values()),
        "by_kind": kills,
        "killed_twice": twice,
        "ended_before_the_kill": late,
        "runs": number,
        "gpus": gpus,
        "seed": seed,
        "resumed_from": sorted(resumed_from, key=str),
        "differing": differing,
        "seconds_of_a_run": seconds,
        "files_compared": len(wanted),
        "seconds": time.monotonic() - begun,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--times", type=int, help="kills (50; with --quick 2)")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.times = given.times or (2 if given.quick else 50)
    quiet.calm_threads(os.environ)
    if given.gpus == 1:  # import once before forking, but start no threads
        quiet.quiet_libraries()
        for name in (
            "prefix_distill.training.session",
            "prefix_distill.display",
            "transformers.models.llama.modeling_llama",
        ):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        document = soak(given.times, given.gpus, given.seed, given.out or Path(scratch))
    print(json.dumps(document))
    sys.exit(bool(document["differing"]))
