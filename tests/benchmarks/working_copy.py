"""Compare ways to train a student in bfloat16: time and memory of an update, error of its gradient.

    python tests/benchmarks/working_copy.py [--quick] [--rounds 5] [--threads 2] [--work FOLDER]

    autocast  float32 weights under autocast, which casts each of them for every micro-batch, and a
              copy in bfloat16 that samples: the way before engine/masters.py
    copy      the matrices of linear layers are those of the copy that samples: what runs do
    bfloat16  the copy that samples also trains: its residual stream, norms and embeddings are in
              bfloat16, too, and autocast has nothing to cast

About 10 minutes on 2 cores. The pair is that of real_pair.py. An update has 8 rollouts in
micro-batches of at most 4: GSM8K questions in the chat template, each followed by the first 64
tokens of another question. Nothing is sampled. Seconds are CPU time, which other processes disturb
less: of the gradients of all micro-batches, with the teacher's scoring, and of AdamW's step with
the refresh of the copy. An update that is timed has 4 rollouts.
The arms alternate in one process; the first update of each is warm-up; ratios are within a round.
Peak memory is the highest resident set of an update, in a process for each arm (``clear_refs``,
then ``VmHWM``: Linux only).

The error of a gradient is the norm of its difference from float32's over the norm of float32's: of
the whole gradient, and the median over tensors. Ratios to autocast are geometric means over the
updates. The last printed line is JSON, also written to tests/benchmarks/results/working_copy.json.
``--quick`` runs three rounds with the built-in pair and writes nothing.
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
TIMED_PROMPTS = 4
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


def make_rollouts(run, step: int, count: int) -> list:
    """Return the rollouts of an update: a prompt, then the first tokens of the next prompt."""
    from prefix_distill.engine.rollout import rollout_of

    prompts = run.problems.train[step * count : (step + 1) * count]
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


def accumulate(state, step: int, count: int = PROMPTS) -> None:
    """Leave the gradients of an update in the master weights."""
    from prefix_distill.training.update import Update

    update = Update(state, step, prompts=[], prefix=RESPONSE)
    update.backward(make_rollouts(state.run, step, count))
    for copied, master in state.masters.copies.items():
        # with a student in bfloat16: of embeddings and norms
        if copied.grad is not None:
            master.grad = copied.grad.float() if master.grad is None else master.grad + copied.grad
            copied.grad = None


def time_update(state, step: int, count: int = PROMPTS) -> dict[str, float]:
    """Return the CPU seconds of an update's two parts."""
    from prefix_distill.training.optimizer import step_optimizer

    start = time.process_time()
    accumulate(state, step, count)
    middle = time.process_time()
    step_optimizer(state.optimizer, state.masters.weights, rate=RATE, grad_clip=1.0)
    state.refresh_copies()
    return {"gradients": middle - start, "step": time.process_time() - middle}


def time_arms(run, rounds: int) -> dict[str, list[dict]]:
    """Return the seconds of every arm's updates. All arms train the same master weights."""
    states = {arm: open_state(run, arm) for arm in ARMS}
    for state in states.values():
        time_update(state, 0, TIMED_PROMPTS)  # creates AdamW's moments
    seconds: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for i in range(rounds):
        order = ARMS if i % 2 == 0 else ARMS[::-1]
        for arm in order:
            seconds[arm].append(time_update(states[arm], i % UPDATES, TIMED_PROMPTS))
    return seconds


def measure_peak(run, arm: str) -> int:
    """Return the highest resident bytes of an arm's second update."""
    state = open_state(run, arm)
    time_update(state, 0)
    measure.reset_peak()
    time_update(state, 1)
    return measure.memory("VmHWM")


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
    return measure.child(
        __file__, "--child", task, "--rounds", given.rounds, "--threads", given.threads, *flags
    )


def run_child(task: str, given) -> dict:
    """Return the document of a task: times, errors, or the peak memory of an arm."""
    import torch

    torch.set_num_threads(given.threads)
    folder = None if given.quick else given.work
    if task == "errors":
        return measure_errors(folder)
    run = prepare(folder, "bfloat16")
    if task == "times":
        return {"seconds": time_arms(run, given.rounds), "machine": measure.machine()}
    return {"peak_bytes": measure_peak(run, task)}


def summarize(seconds: dict, peaks: dict[str, int], errors: dict) -> list[dict]:
    """Return a row for each arm: medians, and ratios to autocast [median, lowest, highest]."""
    table = []
    for arm in ARMS:
        row: dict = {"arm": arm}
        for part in ("gradients", "step"):
            values = [one[part] for one in seconds[arm]]
            others = [one[part] for one in seconds["autocast"]]
            ratios = [ours / its for ours, its in zip(values, others, strict=True)]
            row[f"{part}_seconds"] = statistics.median(values)
            row[f"{part}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        row["peak_bytes"] = peaks[arm]
        row["peak_ratio"] = peaks[arm] / peaks["autocast"]
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
            f"{row['arm']:<9} gradients {row['gradients_seconds']:.2f} s "
            f"({row['gradients_ratio'][0]:.2f}), step {row['step_seconds']:.2f} s "
            f"({row['step_ratio'][0]:.2f}), peak {row['peak_bytes'] / 2**30:.2f} GiB "
            f"({row['peak_ratio']:.2f}), error {row['error']:.4f} ({row['error_ratio']:.2f}), "
            f"of a tensor {row['tensor_error']:.4f} ({row['tensor_error_ratio']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="updates of every arm")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder that keeps the pair")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measure.record("", run_child(given.child, given), keep=False)
        return
    if given.quick:
        given.rounds = 3
    with tempfile.TemporaryDirectory() as scratch:
        if not given.quick:
            import scaling

            given.work = scaling.pair(given.work or Path(scratch))
        times = child("times", given)
        peaks = {arm: child(arm, given)["peak_bytes"] for arm in ARMS}
        errors = child("errors", given)
    table = summarize(times["seconds"], peaks, errors)
    show(table)
    document = {
        "table": table,
        "rounds": given.rounds,
        "updates": UPDATES,
        "bfloat16_instructions": bfloat16_instructions(),
        **times["machine"],
    }
    measure.record("working_copy", document, keep=not given.quick)


if __name__ == "__main__":
    main()
