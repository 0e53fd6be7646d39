"""Compare ways to train a student in bfloat16: time and memory of an update, error of its gradient.

    python tests/benchmarks/working_copy.py [--quick] [--pairs 3] [--work FOLDER]

    autocast  float32 weights under autocast, which casts each of them for every micro-batch, and a
              copy in bfloat16 that samples: the way before engine/masters.py
    copy      the matrices of linear layers are those of the copy that samples: what runs do
    bfloat16  the copy that samples also trains, without autocast: its residual stream, norms and
              embeddings are in bfloat16, too

About 15 minutes on 2 cores. The pair is that of real_pair.py. An update has 8 rollouts in
micro-batches of at most 4: GSM8K questions in the chat template, each followed by the first 64
tokens of another question. Nothing is sampled. Seconds are those of the gradients of all
micro-batches, with the teacher's scoring, and those of AdamW's step with the refresh of the copy.
Peak memory is the highest resident set during them (``clear_refs``, then ``VmHWM``: Linux only).
Every arm has a process of its own, and the arms alternate; ratios are within a round.

The error of a gradient is the norm of its difference from float32's over the norm of float32's: of
the whole gradient, and the median over tensors. Ratios to autocast are geometric means over the
updates. The last printed line is JSON, also written to tests/benchmarks/results/working_copy.json.
``--quick`` runs one round with the built-in pair and writes nothing.
"""

import argparse
import dataclasses
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import measure

ARMS = ("autocast", "copy", "bfloat16")
RESPONSE = 64
PROMPTS = 8
UPDATES = 4
RATE = 1e-5


def prepare(folder: Path | None, dtype: str):
    """Return a Run on the pair in ``folder``, or on the built-in pair."""
    import real_pair

    from prefix_distill import config
    from prefix_distill.cli import quiet
    from prefix_distill.training import prepare as preflight

    quiet.quiet_libraries()
    options = {"models.student": "lab:choice/student", "models.teacher": "lab:choice/teacher"}
    options["data.dataset"] = "lab:choice"
    if folder is not None:
        options["models.student"] = str(folder / "student")
        options["models.teacher"] = str(folder / "teacher")
        options["data.dataset"] = str(real_pair.questions())
        options["data.prompt_column"] = "doc.question"
    shape = {
        "schedule.prefix": str(RESPONSE),
        "rollout.max_new_tokens": RESPONSE,
        "train.batch_size": PROMPTS,
        "train.micro_batch_size": 4,
        "train.steps": UPDATES,
        "evaluate.problems": 0,
        "evaluate.kl_prompts": 1,
        "runtime.device": "cpu",
        "runtime.dtype": dtype,
    }
    return preflight.prepare(config.build(options | shape))


def make_rollouts(run, step: int) -> list:
    """Return the rollouts of an update: a prompt, then the first tokens of the next prompt."""
    from prefix_distill.engine.rollout import rollout_of

    prompts = run.problems.train[step * PROMPTS : (step + 1) * PROMPTS]
    rollouts = []
    for slot, prompt in enumerate(prompts):
        following = prompts[(slot + 1) % len(prompts)].student_ids
        rollout = rollout_of(
            slot, prompt.student_ids, following[:RESPONSE], teacher_prompt=prompt.teacher_ids
        )
        rollouts.append(rollout)
    return rollouts


def open_state(run, arm: str):
    """Return the State of a run that trains in the way of an arm."""
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.state import State

    state = State(run, RunFolder("unused"), measure.Silent())
    masters = state.masters
    if arm == "autocast":
        masters.student = masters.model
    if arm == "bfloat16":
        masters.student = masters.sampler
    state.pair = dataclasses.replace(state.pair, student=masters.student)
    return state


def accumulate(state, step: int) -> None:
    """Leave the gradients of an update in the master weights."""
    from prefix_distill.training.update import Update

    update = Update(state, step, prompts=[], prefix=RESPONSE)
    update.backward(make_rollouts(state.run, step))
    for copied, master in state.masters.copies.items():
        # with a student in bfloat16: of embeddings and norms
        if copied.grad is not None:
            master.grad = copied.grad.float() if master.grad is None else master.grad + copied.grad
            copied.grad = None


def time_updates(run, arm: str) -> dict:
    """Return the median seconds of an update's two parts, and the peak memory."""
    from prefix_distill.training.optimizer import step_optimizer

    state = open_state(run, arm)
    gradients, steps = [], []
    for step in range(UPDATES):
        if step == 1:  # the first update creates AdamW's moments
            measure.reset_peak()
        start = time.perf_counter()
        accumulate(state, step)
        middle = time.perf_counter()
        step_optimizer(state.optimizer, state.masters.weights, rate=RATE, grad_clip=1.0)
        state.refresh_copies()
        gradients.append(middle - start)
        steps.append(time.perf_counter() - middle)
    return {
        "gradient_seconds": statistics.median(gradients[1:]),
        "step_seconds": statistics.median(steps[1:]),
        "peak_bytes": measure.memory("VmHWM"),
    }


def take_gradient(state, step: int) -> dict:
    """Return the gradient of an update by name."""
    accumulate(state, step)
    gradient = {name: p.grad for name, p in state.masters.weights.items()}
    state.optimizer.zero_grad(set_to_none=True)
    return gradient


def read_errors(gradient: dict, reference: dict) -> tuple[float, float]:
    """Return the relative error of a whole gradient, and the median of its tensors'."""
    squares, norms = [], []
    for name, expected in reference.items():
        squares.append((gradient[name] - expected).square().sum().item())
        norms.append(expected.square().sum().item())
    ratios = [s / n for s, n in zip(squares, norms, strict=True) if n]
    return math.sqrt(sum(squares) / sum(norms)), math.sqrt(statistics.median(ratios))


def measure_errors(folder: Path | None) -> dict:
    """Return the errors of every arm's gradients, for each update."""
    exact = open_state(prepare(folder, "float32"), "copy")
    run = prepare(folder, "bfloat16")
    states = {arm: open_state(run, arm) for arm in ARMS}
    errors: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for step in range(UPDATES):
        reference = take_gradient(exact, step)
        for arm, state in states.items():
            errors[arm].append(read_errors(take_gradient(state, step), reference))
    return errors


def child(task: str, given) -> dict:
    """Run a task in a separate process and return its document."""
    flags = ["--quick"] * given.quick
    if given.work is not None:
        flags += ["--work", str(given.work)]
    return measure.child(__file__, "--child", task, *flags)


def run_child(task: str, given) -> dict:
    """Return the document of a task: an arm, or errors."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    folder = None if given.quick else given.work
    if task == "errors":
        return measure_errors(folder)
    return time_updates(prepare(folder, "bfloat16"), task) | {"machine": measure.machine()}


def summarize(rounds: list[dict[str, dict]], errors: dict) -> list[dict]:
    """Return a row for each arm: medians, and ratios to autocast [lowest, highest]."""
    table = []
    for arm in ARMS:
        row: dict = {"arm": arm}
        for key in ("gradient_seconds", "step_seconds", "peak_bytes"):
            ratios = [one[arm][key] / one["autocast"][key] for one in rounds]
            row[key] = statistics.median(one[arm][key] for one in rounds)
            row[f"{key}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        for i, key in enumerate(("error", "tensor_error")):
            pairs = zip(errors[arm], errors["autocast"], strict=True)
            row[key] = statistics.geometric_mean(error[i] for error in errors[arm])
            row[f"{key}_ratio"] = statistics.geometric_mean(ours[i] / its[i] for ours, its in pairs)
        table.append(row)
    return table


def bfloat16_instructions() -> list[str]:
    """Return the processor's instructions for bfloat16."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return sorted({flag for flag in flags if "bf16" in flag})


def show(table: list[dict]) -> None:
    for row in table:
        print(
            f"{row['arm']:<9} gradients {row['gradient_seconds']:.2f} s "
            f"({row['gradient_seconds_ratio'][0]:.2f}), step {row['step_seconds']:.2f} s "
            f"({row['step_seconds_ratio'][0]:.2f}), peak {row['peak_bytes'] / 2**30:.2f} GiB "
            f"({row['peak_bytes_ratio'][0]:.2f}), error {row['error']:.4f} "
            f"({row['error_ratio']:.2f}), of a tensor {row['tensor_error']:.4f} "
            f"({row['tensor_error_ratio']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of all arms")
    parser.add_argument("--work", type=Path, help="folder that keeps the pair")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measure.record("", run_child(given.child, given), keep=False)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if not given.quick:
            import scaling

            given.work = scaling.pair(given.work or Path(scratch))
        rounds = []
        for i in range(1 if given.quick else given.pairs):
            order = ARMS if i % 2 == 0 else ARMS[::-1]
            rounds.append({arm: child(arm, given) for arm in order})
        errors = child("errors", given)
    table = summarize(rounds, errors)
    show(table)
    document = {
        "table": table,
        "rounds": len(rounds),
        "updates": UPDATES,
        "bfloat16_instructions": bfloat16_instructions(),
        **rounds[0]["copy"]["machine"],
    }
    measure.record("working_copy", document, keep=not given.quick)


if __name__ == "__main__":
    main()
