"""Distil the real pair and record its held-out KL: SmolLM2-135M-Instruct and its 20-layer student.

    python tests/benchmarks/real.py [--out FOLDER] [--quick]

About 40 minutes on 2 cores. GSM8K's questions: 40 steps of 8 rollouts of up to 64 tokens,
full-vocabulary reverse KL, AdamW with a learning rate that decays linearly from 1e-4. The held-out
set has 16 questions; the fixed contexts are 128-token rollouts of the untrained student. The script
writes tests/benchmarks/results/real.csv (one row per evaluation); its last printed line is JSON.
``--quick`` runs 4 steps of 4 rollouts of 16 tokens at 2e-4 and writes only the run folder. It loads
the teacher from a copy as a folder, which takes a second; the GGUF file takes a minute. For the
installation, see real_pair.py.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import real_pair

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", default=None, help="folder for the student and the run (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="a small run that records nothing")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        with tempfile.TemporaryDirectory() as scratch:
            measure_pair(arguments, Path(scratch))
    else:
        measure_pair(arguments, Path(arguments.out or tempfile.mkdtemp()))


def measure_pair(arguments: argparse.Namespace, out: Path) -> None:
    """Create the pair, distil it and print the evaluations."""
    steps, rollouts, prefix, longest, held_out, every = (
        (4, 4, 16, 20, 6, 0) if arguments.quick else (40, 8, 64, 128, 16, 10)
    )
    out.mkdir(parents=True, exist_ok=True)
    student, teacher = out / "student", real_pair.teacher()
    if arguments.quick:
        teacher = real_pair.copy_teacher(out / "teacher")
    if not student.is_dir():
        real_pair.make_student(student, teacher)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "prefix_distill",
            "run",
            "--student",
            student,
            "--teacher",
            teacher,
            "--dataset",
            real_pair.questions(),
            "--prompt-column",
            "doc.question",
            "--answer-column",
            "doc.answer",
            "--steps",
            str(steps),
            "--batch-size",
            str(rollouts),
            "--samples",
            "1",
            "--micro-batch-size",
            str(rollouts),
            "--prefix",
            str(prefix),
            "--max-new-tokens",
            str(longest),
            "--problems",
            "0",
            "--kl-prompts",
            str(held_out),
            "--eval-every",
            str(every),
            "--save-every",
            "20",
            "--lr",
            "2e-4" if arguments.quick else "1e-4",
            "--warmup",
            "0",
            "--seed",
            "0",
            "--out",
            out / "run",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    rows = [
        {
            "update": e["step"],
            "kl": e["kl"]["value"],
            "kl_low": e["kl"]["low"],
            "kl_high": e["kl"]["high"],
            "kl_prefix": e["kl_prefix"],
            "kl_tail": e["kl_tail"],
            "mean_tokens": e["mean_tokens"],
            "finish_rate": e["finish_rate"],
            "flops_useful": e["flops_useful"],
            "flops_executed": e["flops_executed"],
        }
        for e in result["evaluations"]
    ]
    if not arguments.quick:
        with open(HERE / "results" / "real.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
    for row in rows:
        print(
            f"step {row['update']:3d}: held-out reverse KL {row['kl']:.3f} [{row['kl_low']:.3f}, "
            f"{row['kl_high']:.3f}] nats, within the prefix {row['kl_prefix']:.3f}, beyond it "
            f"{row['kl_tail']:.3f}, {row['flops_useful'] / 1e12:.1f} TFLOP"
        )
    print(
        json.dumps(
            {
                k: result[k]
                for k in (
                    "steps",
                    "kl_before",
                    "kl_after",
                    "tokens",
                    "full_rollout_cost",
                    "seconds",
                )
            }
            | {
                "flops_useful": result["flops"]["useful"],
                "flops_executed": result["flops"]["executed"],
            }
        )
    )


if __name__ == "__main__":
    main()
