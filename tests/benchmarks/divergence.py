"""Compare the fused divergence with three other implementations: seconds and extra memory.

    python tests/benchmarks/divergence.py [--quick] [--rows 4096] [--other-rows 1024]
        [--vocabulary 151936] [--width 1024]

    ours          prefix_distill.maths.fused.weighted with chunks of 256 MiB
    naive         float32 logits of all rows, log-softmax, divergence, autograd
    checkpointed  torch.utils.checkpoint around head → log-softmax → divergence, in chunks of as
                  many rows as ours
    trl           ChunkedDivergenceFunction of TRL 1.16 (skipped if TRL is not installed)

About 15 minutes on 2 cores. Float32; both heads have the same width; gradients to the hidden rows
and the student's head. Each run has a separate process; the arms alternate, ``--pairs`` times. One
call is timed after a small warm-up call. Ratios are computed within a round, and their median is
shown. Extra memory is the peak resident set of the call minus the resident set before it and the
two returned gradients. Reverse KL has ``--rows`` rows in all arms. Forward KL and the JSD (β = 0.5)
have ``--other-rows`` rows in ours and naive, because the naive JSD needs more than 24 GB at 4,096
rows. ``--quick`` runs reverse KL once on 384 rows and writes nothing.
"""

import argparse
import json
import statistics
import time

import measure

DIVERGENCES = {"reverse-kl": 1.0, "forward-kl": 0.0, "jsd": 0.5}  # TRL's beta
PARAMETERS = {"reverse-kl": (), "forward-kl": (), "jsd": (0.5,)}


def naive(name, student, head, teacher, teacher_head, weight):  # noqa: PLR0913  the operands of the formula
    import torch.nn.functional as F

    from prefix_distill.maths.divergence import Terms, per_token

    sides = (
        F.log_softmax(rows @ matrix.T, -1)
        for rows, matrix in ((student, head), (teacher, teacher_head))
    )
    return (per_token(Terms(name=name, parameters=PARAMETERS[name]), *sides) * weight).sum()


def checkpointed(name, student, head, teacher, teacher_head, weight):  # noqa: PLR0913  the operands of the formula
    from torch.utils.checkpoint import checkpoint

    from prefix_distill.maths.divergence import Terms

    size = Terms(name=name, parameters=PARAMETERS[name]).rows_per_chunk(len(head))
    return sum(
        checkpoint(
            naive,
            name,
            student[i : i + size],
            head,
            teacher[i : i + size],
            teacher_head,
            weight[i : i + size],
            use_reentrant=False,
        )
        for i in range(0, len(student), size)
    )


def ours(name, student, head, teacher, teacher_head, weight):  # noqa: PLR0913  the operands of the formula
    from prefix_distill.maths.divergence import Head, Terms
    from prefix_distill.maths.fused import weighted

    terms = Terms(name=name, parameters=PARAMETERS[name])
    return weighted(
        terms,
        student_ND=student,
        student_head=Head(weight_VD=head),
        teacher_NE=teacher,
        teacher_head=Head(weight_VD=teacher_head),
        weight_N=weight,
    )[0]


def trl(name, student, head, teacher, teacher_head, weight):  # noqa: PLR0913  the operands of the formula
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(
        student, head, None, teacher, teacher_head, None, DIVERGENCES[name]
    )
    return (values * weight).sum()


def one(arm: str, name: str, rows: int, vocabulary: int, width: int) -> dict:
    """Run one forward and backward pass of an arm; return time, memory, loss and gradient norm."""
    import torch

    torch.manual_seed(0)
    work = {"ours": ours, "naive": naive, "checkpointed": checkpointed, "trl": trl}[arm]
    small = [
        torch.randn(2, width).requires_grad_(),
        torch.randn(64, width).requires_grad_(),
        torch.randn(2, width),
        torch.randn(64, width),
        torch.ones(2),
    ]
    work(name, *small).backward()  # warm-up: loads libraries, starts thread pools
    student, head = (
        (torch.randn(rows, width) * 0.5).requires_grad_(),
        (torch.randn(vocabulary, width) * 0.05).requires_grad_(),
    )
    teacher, teacher_head, weight = (
        torch.randn(rows, width) * 0.5,
        torch.randn(vocabulary, width) * 0.05,
        torch.full((rows,), 1 / rows),
    )
    before = measure.reset_peak()
    start = time.perf_counter()
    loss = work(name, student, head, teacher, teacher_head, weight)
    loss.backward()
    seconds = time.perf_counter() - start
    returned = 4 * (measure.gradient(student).numel() + measure.gradient(head).numel())
    return {
        "seconds": seconds,
        "extra_bytes": measure.memory("VmHWM") - before - returned,
        "loss": loss.item(),
        "gradient_norm": measure.gradient(head).norm().item(),
    }


def turn(arms: list[str], name: str, rows: int, given) -> dict:
    found = {
        arm: measure.child(
            __file__,
            "--child",
            arm,
            name,
            rows,
            "--vocabulary",
            given.vocabulary,
            "--width",
            given.width,
        )
        for arm in arms
    }
    for arm, row in found.items():
        assert abs(row["loss"] / found["ours"]["loss"] - 1) < 1e-4, (
            f"{arm}: expected the loss of ours"
        )
        assert abs(row["gradient_norm"] / found["ours"]["gradient_norm"] - 1) < 1e-4, (
            f"{arm}: expected the gradient norm of ours"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rows, one round; write nothing")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--other-rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=2, help="how often each arm runs (2)")
    parser.add_argument("--child", nargs=3, metavar=("ARM", "NAME", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        arm, name, rows = given.child
        print(json.dumps(one(arm, name, int(rows), given.vocabulary, given.width)))
        return
    import importlib.util

    if given.quick:
        given.rows, given.pairs = 384, 1
    cases = [
        (
            "reverse-kl",
            given.rows,
            ["ours", "naive", "checkpointed"] + ["trl"] * bool(importlib.util.find_spec("trl")),
        )
    ]
    if not given.quick:
        cases += [(name, given.other_rows, ["ours", "naive"]) for name in ("forward-kl", "jsd")]
    table, ratios = [], {}
    for name, rows, arms in cases:
        turns = [turn(arms, name, rows, given) for _ in range(given.pairs)]
        for arm in arms:
            seconds, extra = (
                statistics.median(t[arm][key] for t in turns) for key in ("seconds", "extra_bytes")
            )
            row = {
                "divergence": name,
                "rows": rows,
                "arm": arm,
                "seconds": seconds,
                "extra_bytes": extra,
            }
            for key, label in (("seconds", "time_ratio"), ("extra_bytes", "memory_ratio")):
                row[label] = statistics.median(t["ours"][key] / t[arm][key] for t in turns)
                if name == "reverse-kl" and arm != "ours":
                    ratios[f"{label}_{arm}"] = row[label]
            table.append(row)
            print(
                f"{name:10} N {rows:5d} {arm:13} {seconds:7.2f} s, {extra / 2**20:8.0f} MiB extra; "
                f"ours/{arm}: time {row['time_ratio']:.2f}, memory {row['memory_ratio']:.3f}",
                flush=True,
            )
    measure.record(
        "divergence",
        ratios
        | {
            "vocabulary": given.vocabulary,
            "width": given.width,
            "pairs": given.pairs,
            "table": table,
        }
        | measure.machine(),
        not given.quick,
    )


if __name__ == "__main__":
    main()
