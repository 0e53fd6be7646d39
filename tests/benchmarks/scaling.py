"""Measure the cost of a step as the prefix and the number of samples per prompt grow.

    python tests/benchmarks/scaling.py [--quick] [--work FOLDER]

About 10 minutes on 2 cores. SmolLM2-135M-Instruct and its 20-layer student, float32, GSM8K
questions, full-vocabulary reverse KL, micro-batches of 8. The first runs have 2 prompts × 4 samples
and prefixes of 16 to 512 tokens. The others have 2 prompts × G samples and a prefix of 64; their
prompts are encoded once for all samples and, for the ratio, once for every sample. Each row is one
step after a small warm-up step. Seconds are by phase; FLOPs are those of the ledger. ``--quick``
has prefixes of 16 and 32, G = 1 and 4, and writes nothing. ``--work`` keeps the pair for the next
call.
"""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path

import measure
import real_pair

from prefix_distill.cli import quiet

UNWRITTEN = "<gh_stars>"  # as the EOS token: every rollout reaches the prefix length


def pair(work: Path) -> Path:
    """Create work/teacher and work/student unless they exist; return ``work``."""
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.saving import save_model

    if not ((work / "student").is_dir() and (work / "teacher").is_dir()):
        work.mkdir(parents=True, exist_ok=True)
        model = loading.load_model(
            str(real_pair.teacher()), device=torch.device("cpu"), dtype=torch.float32
        )
        model.tokenizer.eos_token = UNWRITTEN
        model.generation_config.eos_token_id = model.tokenizer.eos_token_id
        save_model(model, work / "teacher")
        real_pair.make_student(work / "student", work / "teacher")
    return work


def prepare(folder: Path, prefix: int, prompts: int, *, samples: int, dtype: str = "float32"):
    """Return a Run on the pair."""
    from prefix_distill import config
    from prefix_distill.training import prepare as preflight

    return preflight.prepare(
        config.build(
            {
                "models.student": str(folder / "student"),
                "models.teacher": str(folder / "teacher"),
                "data.dataset": str(real_pair.questions()),
                "data.prompt_column": "doc.question",
                "schedule.prefix": str(prefix),
                "rollout.max_new_tokens": prefix,
                "rollout.samples": samples,
                "train.batch_size": prompts,
                "train.steps": 8,
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 1,
                "runtime.device": "cpu",
                "runtime.dtype": dtype,
            }
        )
    )


def update(run, step: int) -> dict:
    """Time the rollouts and the gradient of one step by phase.

    There is no optimizer step, so every call measures the same student.
    """
    from prefix_distill.display import Reporter
    from prefix_distill.engine.batching import micro_batches, reads
    from prefix_distill.engine.rollout import student_sides
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.state import State
    from prefix_distill.training.update import Update

    report: Reporter = measure.Silent()
    state = State(run, RunFolder("unused"), report)
    work = Update(state, step)
    rollouts = work.sample()
    work.backward(rollouts)
    student = run.pair.student
    student.net.zero_grad(set_to_none=True)
    groups = micro_batches(rollouts, run.limits.micro_batch_size, student.encodes_prompt_once)
    return {
        "seconds": dict(state.clock.seconds),
        "flops": dict(work.meter.ledger.useful),
        "longest": max(len(r.ids) for r in rollouts),
        "executed": dict(work.meter.ledger.executed),
        "micro_batches": [
            reads(student_sides(group), student.encodes_prompt_once) for group in groups
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small prefixes; write nothing")
    parser.add_argument("--work", type=Path, help="folder for the pair (default: a temporary one)")
    given = parser.parse_args()
    from prefix_distill import config

    quiet.quiet_libraries()
    prefixes, samples, fixed = (
        ([16, 32], [1, 4], 16) if given.quick else ([16, 64, 128, 256, 512], [1, 2, 4, 8], 64)
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = prepare(pair(given.work or Path(scratch)), max(prefixes), 2, samples=1)
    table = []

    def one(prefix: int, count: int, shared: bool) -> float:
        from prefix_distill.maths.schedule import parse_prefix

        arm = dataclasses.replace(
            run,
            config=config.replace(run.config, rollout={"samples": count}),
            method=dataclasses.replace(run.method, prefix=parse_prefix(str(prefix), prefix)),
        )
        run.pair.student.shares_prompts = run.pair.teacher.shares_prompts = shared
        found = update(arm, 1)
        seconds = sum(found["seconds"].values())
        table.append(
            {
                "prefix": prefix,
                "samples": count,
                "shared": shared,
                "seconds": seconds,
                "over_repeated": None,
                "flops_useful": sum(found["flops"].values()),
                "by_phase": found["seconds"],
            }
        )
        print(
            f"prefix {prefix:3d}, 2 × {count} rollouts, prompts encoded "
            f"{'once      ' if shared else 'per sample'}: {seconds:6.2f} s, "
            f"{sum(found['flops'].values()) / 1e12:.3f} TFLOP useful "
            f"({', '.join(f'{k} {v:.2f} s' for k, v in found['seconds'].items())})",
            flush=True,
        )
        return seconds

    one(8, 1, True)
    table.clear()
    for prefix in prefixes:
        one(prefix, 4, True)
    for count in samples:
        repeated = one(fixed, count, False)
        ratio = one(fixed, count, True) / repeated
        table[-1]["over_repeated"] = ratio
    measure.record("scaling", {"table": table} | measure.machine(), not given.quick)


if __name__ == "__main__":
    quiet.calm_threads(os.environ)
    main()
