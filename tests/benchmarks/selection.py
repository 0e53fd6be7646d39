"""Measure time and extra memory of the reverse KL at the output head on selected tokens.

    python tests/benchmarks/selection.py [--quick] [--rows 1024] [--vocabulary 151936]
        [--width 1024] [--pairs 3]

The inputs are fixed: float32, rollouts of 128 tokens, gradients to hidden rows and the student's
head. ``naive`` (full logits of all tokens, autograd) and ``all`` (our chunked loss) have no
selection. ``0.5``, ``0.2`` and ``0.1`` compute the statistics of all tokens in chunks without
gradient, apply soft-or, and compute our loss on the kept tokens.

Each run has a separate process; the arms alternate, ``--pairs`` times. One call is timed after a
small warm-up call. Ratios are computed within a round, and their median is shown. Extra memory is
the peak resident set of the call minus the resident set before it and the two returned gradients.
``--quick`` runs each arm once on 256 rows and writes nothing.
"""

import argparse
import json
import statistics
import time

import measure

ARMS = ("naive", "all", "0.5", "0.2", "0.1")
ROLLOUT = 128  # tokens


def work(arm: str, student, head, teacher, teacher_head):
    """Return the mean reverse KL over the kept tokens; the first two arms keep all."""
    import torch

    from prefix_distill.engine.rollout import rollout_of
    from prefix_distill.maths import fused, weights
    from prefix_distill.maths.divergence import Head, Terms
    from prefix_distill.maths.weights import Selection

    if arm == "naive":
        from divergence import naive

        return naive(
            "reverse-kl",
            student,
            head,
            teacher,
            teacher_head,
            torch.full((len(student),), 1 / len(student)),
        )
    terms, rows = Terms(name="reverse-kl"), torch.arange(len(student))
    if arm != "all":
        facts = fused.statistics(
            terms,
            student_ND=student.detach(),
            student_head=Head(weight_VD=head),
            teacher_NE=teacher,
            teacher_head=Head(weight_VD=teacher_head),
            token_N=torch.zeros_like(rows),
        )
        lists = {name: facts[name].tolist() for name in ("entropy", "divergence")}
        starts = range(0, len(student), ROLLOUT)
        ids = tuple(range(ROLLOUT))
        rollouts = [
            rollout_of(i, (0,), ids[: len(student) - start]) for i, start in enumerate(starts)
        ]
        at = {
            (i, 0): {
                name: dict(enumerate(values[start : start + ROLLOUT]))
                for name, values in lists.items()
            }
            for i, start in enumerate(starts)
        }
        kept = weights.keep_selection(
            Selection(kind="soft-or", share=float(arm)),
            rollouts,
            (0,),
            facts=at,
            at=weights.batch_scale(lists["entropy"], lists["divergence"]),
        )
        rows = torch.tensor(
            [start + t for start, r in zip(starts, kept, strict=True) for t in r.taught]
        )
    return fused.weighted(
        terms,
        student_ND=student[rows],
        student_head=Head(weight_VD=head),
        teacher_NE=teacher[rows],
        teacher_head=Head(weight_VD=teacher_head),
        weight_N=torch.full((len(rows),), 1 / len(rows)),
    )[0]


def one(arm: str, rows: int, vocabulary: int, width: int) -> dict:
    """Run one forward and backward pass of an arm; return seconds, extra bytes and loss."""
    import torch

    torch.manual_seed(0)
    made = torch.randn
    work(
        arm,
        made(2, width).requires_grad_(),
        made(64, width).requires_grad_(),
        made(2, width),
        made(64, width),
    ).backward()
    student, head = (
        (made(rows, width) * 0.5).requires_grad_(),
        (made(vocabulary, width) * 0.05).requires_grad_(),
    )
    teacher, teacher_head = made(rows, width) * 0.5, made(vocabulary, width) * 0.05
    before = measure.reset_peak()
    start = time.perf_counter()
    loss = work(arm, student, head, teacher, teacher_head)
    loss.backward()
    seconds = time.perf_counter() - start
    returned = 4 * (measure.gradient(student).numel() + measure.gradient(head).numel())
    return {
        "seconds": seconds,
        "extra_bytes": measure.memory("VmHWM") - before - returned,
        "loss": loss.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rows, one round; write nothing")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3, help="how often each arm runs (3)")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(one(given.child, given.rows, given.vocabulary, given.width)))
        return
    if given.quick:
        given.rows, given.pairs = 256, 1
    turns = [
        {
            arm: measure.child(
                __file__,
                "--child",
                arm,
                "--rows",
                given.rows,
                "--vocabulary",
                given.vocabulary,
                "--width",
                given.width,
            )
            for arm in ARMS
        }
        for _ in range(given.pairs)
    ]
    for turn in turns:
        assert abs(turn["all"]["loss"] / turn["naive"]["loss"] - 1) < 1e-4, (
            "expected the same loss from all and naive"
        )
    table = []
    for arm in ARMS:
        row = {"arm": arm} | {
            key: statistics.median(t[arm][key] for t in turns) for key in ("seconds", "extra_bytes")
        }
        for other in ("all", "naive"):
            for key, label in (("seconds", "time"), ("extra_bytes", "memory")):
                row[f"{label}_over_{other}"] = statistics.median(
                    t[arm][key] / t[other][key] for t in turns
                )
        table.append(row)
        print(
            f"{arm:6} {row['seconds']:6.1f} s, {row['extra_bytes'] / 2**20:6.0f} MiB extra; over "
            f"all tokens: time {row['time_over_all']:.2f}, memory {row['memory_over_all']:.2f}; "
            f"over naive: time {row['time_over_naive']:.2f}, memory {row['memory_over_naive']:.3f}",
            flush=True,
        )
    measure.record(
        "selection",
        {
            "rows": given.rows,
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
