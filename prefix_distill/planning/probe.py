"""Where is the signal? Before anything is trained: divergence by position, what a teacher's prefix
does for the student, what the student's does to the teacher, and from these a prefix length."""

import dataclasses
import math

from ..engine import evaluate
from ..engine.device import Clock
from ..engine.models import Model, decoder
from ..engine.rollout import Rollout
from ..engine.sampling import Request, generate
from ..maths import intervals
from ..maths.flops import Ledger
from ..maths.weights import quadrants
from ..prompts import answers
from ..training.run import Run

SHARES = (
    0.025,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
)  # prefix lengths tried, as shares of the teacher's mean length
RECOVERED = (
    0.8  # of the gap between student and teacher: what a prefix must close to be recommended
)
HELD = 0.8  # of the divergence: what it must hold where there are no answers to grade
BINS = 24


def probe(run: Run, say=lambda text: None) -> dict:
    """The document of `prefix-distill probe` for the run's training prompts.

    by_position          reverse KL(S‖T) and entropy of S (nats per token), in bins of the student's
                         own full rollouts
    kl_share             share of each rollout's KL in its first 10, 25 and 50 %, over all rollouts
    quadrants            entropy × divergence of the student's tokens, above or below their medians
                         (``weights.quadrants``)
    teacher_prefix_curve student's accuracy when the teacher writes the first N tokens   [after
                                                                                         arXiv
                                                                                         2602.15260]
    teacher_decay_curve  teacher's accuracy when the student writes the first N tokens
    recommended_prefix   tokens, "full", or None where there is nothing to recommend

    Where answers can be graded, the recommended prefix is the shortest of those tried, up to half
    of the teacher's mean length, with which a teacher-written prefix closes 80 % of the gap in
    accuracy. That tells a wrong start, which a prefix can mend, from a missing skill, which the
    rest of the answer keeps needing. Otherwise it is the shortest whose tokens hold 80 % of the KL.
    ``expected_saving`` is an update's useful FLOPs with full rollouts over those with the prefix.
    """
    prompts, cap = run.train_prompts, run.config.rollout.max_new_tokens
    ledger, clock = Ledger(), Clock(run.place.device)
    student, teacher = decoder(run.student, run.place.dtype), decoder(run.teacher, run.place.dtype)
    other = run.text_sampler  # the teacher's ids, where it has its own
    samplers = (
        run.eval_sampler,
        dataclasses.replace(run.eval_sampler, eos=other.eos, support=other.support, pad=other.pad),
    )
    sides = {
        "student": (student, run.student_shape, "student_ids", samplers[0]),
        "teacher": (teacher, run.teacher_shape, "teacher_ids", samplers[1]),
    }

    def write(side: str, given: list[tuple[int, ...]], key) -> list[tuple[tuple[int, ...], bool]]:
        """Full answers that ``side`` goes on to from the given starts; sharded over ranks."""
        model, shape, ids, sampler = sides[side]
        open_ends = [
            i
            for i, start in enumerate(given)
            if len(start) < cap and not sampler.eos.intersection(start)
        ]
        mine = open_ends[run.place.rank :: run.place.world]
        drawn: dict[int, tuple] = {}
        by_room: dict[int, list[int]] = {}
        for i in mine:
            by_room.setdefault(cap - len(given[i]), []).append(i)
        for room, rows in by_room.items():
            requests = [
                Request(getattr(prompts[i], ids) + given[i], ("probe", side, key, i)) for i in rows
            ]
            responses = generate(
                model,
                requests,
                room,
                sampler,
                lambda reads: ledger.generation(shape, reads, f"{side}_prefill", f"{side}_decode"),
            )
            drawn |= {i: (given[i] + r.ids, r.finished) for i, r in zip(rows, responses)}
        merged = {i: row for part in run.place.gather(drawn) for i, row in part.items()}
        return [
            merged.get(i, (start, bool(sampler.eos.intersection(start))))
            for i, start in enumerate(given)
        ]

    nothing = [()] * len(prompts)
    with clock.phase("probe"):
        say(f"{len(prompts)} prompts: both models answer in full")
        own, expert = write("student", nothing, 0), write("teacher", nothing, 0)
        expert_ids = [
            ids if run.alignment is None else run.alignment.to_student(ids, done)
            for ids, done in expert
        ]
        length = sum(map(len, expert_ids)) / len(expert)
        own_length = sum(len(ids) for ids, _ in own) / len(own)
        tried = sorted({max(1, round(share * length)) for share in SHARES})
        rollouts = [
            Rollout(i, 0, p.student_ids, p.teacher_ids, ids, ids, finished)
            for i, (p, (ids, finished)) in enumerate(zip(prompts, own))
        ]
        rollouts = run.aligned(rollouts)
        facts = _facts(run, rollouts, ledger)
        graded = all(p.prompt.answer is not None for p in prompts)
        lifted, decayed = (
            [_graded(run, own, 0, run.student)],
            [_graded(run, expert, 0, run.teacher)],
        )
        for n in tried if graded else ():
            say(f"the teacher writes {n} tokens, the student goes on; and the other way round")
            lifted.append(
                _graded(run, write("student", [ids[:n] for ids in expert_ids], n), n, run.student)
            )
            starts = [(ids[:n], done and len(ids) <= n) for ids, done in own]
            starts = [
                ids if run.alignment is None else run.alignment.align(ids, done)[0]
                for ids, done in starts
            ]
            decayed.append(_graded(run, write("teacher", starts, n), n, run.teacher))
    merged = Ledger()
    for part in run.place.gather(ledger):
        merged.merge(part)
    kl = [row["divergence"] for row in facts]
    held = {
        n: math.fsum(intervals.known([row[:n] for row in kl]))
        / max(1e-12, math.fsum(intervals.known(kl)))
        for n in tried
    }
    recommended, reason = recommend(lifted if graded else None, decayed[0], held, length)
    cost = lambda tokens: run.update_cost(prompts, tokens)
    chosen = length if not isinstance(recommended, int) else recommended
    lengths = [len(p.student_ids) for p in prompts]
    return {
        "recommended_prefix": recommended,
        "reason": reason,
        "expected_saving": cost(length) / cost(chosen),
        "prompts": len(prompts),
        "prompt_tokens": sum(lengths) / len(lengths),
        "student_tokens": own_length,
        "teacher_tokens": length,
        "kl": intervals.token_mean(kl),
        "kl_share": {
            f"first_{round(100 * share)}_percent": _share(kl, share) for share in (0.1, 0.25, 0.5)
        },
        "kl_share_by_tokens": {str(n): share for n, share in held.items()},
        "by_position": _bins(facts),
        "quadrants": quadrants(
            *(intervals.known([row[name] for row in facts]) for name in ("entropy", "divergence"))
        ),
        "teacher_prefix_curve": [_public(row) for row in lifted],
        "teacher_decay_curve": [_public(row) for row in decayed],
        "flops": merged.summary(),
        "seconds": clock.seconds["probe"],
    }


def recommend(lifted: list[dict] | None, teacher: dict, held: dict[int, float], length: float):
    """(recommended prefix, reason). ``lifted``: the teacher-prefix curve, None without answers;
    ``teacher``: its own accuracy; ``held``: N → share of the KL in the first N tokens."""
    half = length / 2
    if lifted is None:
        for n, share in sorted(held.items()):
            if share >= HELD and n <= half:
                return n, (
                    f"the first {n} tokens hold {share:.0%} of the divergence of the student's "
                    "full answers (there are no reference answers, so accuracy was not probed)"
                )
        return "full", (
            "a prefix will not do: the divergence is spread over the whole answer; its first half "
            f"holds {max(held.values(), default=0):.0%} (there are no reference answers, so "
            "accuracy was not probed)"
        )
    own = lifted[0]
    gap = teacher["value"] - own["value"]
    paired = intervals.interval([t - s for t, s in zip(teacher["right"], own["right"])])
    if paired["low"] <= 0:
        return None, (
            f"the teacher is not better than the student on these problems: {teacher['value']:.1%} "
            f"against {own['value']:.1%} (difference {gap:+.1%} [{paired['low']:+.1%}, "
            f"{paired['high']:+.1%}]); there is nothing to recommend, take another teacher or "
            "other problems"
        )
    recovered = [(row["tokens"], (row["value"] - own["value"]) / gap) for row in lifted[1:]]
    for n, share in recovered:
        if share >= RECOVERED and n <= half + 0.5:
            return n, (
                f"when the teacher writes the first {n} of its {length:.0f} tokens, the student's "
                f"accuracy rises from {own['value']:.1%} by {share:.0%} of the gap to the "
                f"teacher's {teacher['value']:.1%}: what the student lacks is decided there"
            )
    n, share = recovered[-1]
    return "full", (
        f"a prefix will not do: even when the teacher writes the first {n} of its {length:.0f} "
        f"tokens, the student makes up only {share:.0%} of the gap between {own['value']:.1%} and "
        f"{teacher['value']:.1%}; what it lacks is needed all along the answer"
    )


def _facts(run: Run, rollouts: list[Rollout], ledger: Ledger) -> list[dict]:
    return evaluate.held_out_facts(
        run.student,
        run.teacher,
        run.shared,
        rollouts,
        run.place,
        run.config.train.micro_batch_size,
        run.counts_both(ledger, "scoring"),
    )


def _graded(run: Run, written: list[tuple], tokens: int, model: Model) -> dict | None:
    """Accuracy of texts in ``model``'s tokens with its interval, the number of given tokens, and
    right or wrong per prompt; None without references."""
    golds = [p.prompt.answer for p in run.train_prompts]
    if None in golds:
        return None
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in written]
    right = [
        float(answers.correct(text, gold, run.answer_format)) for text, gold in zip(texts, golds)
    ]
    return {
        "tokens": tokens,
        **intervals.interval(right),
        "finish_rate": sum(f for _, f in written) / len(written),
        "right": right,
    }


def _public(row: dict | None) -> dict | None:
    return row and {k: v for k, v in row.items() if k != "right"}


def _share(values: list[list[float | None]], share: float) -> float:
    """Share of all KL that lies in the first ``share`` of every rollout."""
    first = math.fsum(intervals.known([row[: math.ceil(share * len(row))] for row in values]))
    return first / max(1e-12, math.fsum(intervals.known(values)))


def _bins(facts: list[dict]) -> list[dict]:
    """Means over bins of positions: {from, to (excluded), tokens, kl, entropy}."""
    longest = max(len(row["divergence"]) for row in facts)
    size = max(1, math.ceil(longest / BINS))
    found = []
    for start in range(0, longest, size):
        kl, entropy = (
            intervals.known([row[name][start : start + size] for row in facts])
            for name in ("divergence", "entropy")
        )
        if kl:
            found.append(
                {
                    "from": start,
                    "to": start + size,
                    "tokens": len(kl),
                    "kl": math.fsum(kl) / len(kl),
                    "entropy": math.fsum(entropy) / len(entropy),
                }
            )
    return found


def table(document: dict):
    """The curves as a rich table."""
    from rich.table import Table

    made = Table(title=f"recommended --prefix: {document['recommended_prefix']}")
    for heading in ("first tokens", "share of the KL", "student goes on", "teacher goes on"):
        made.add_column(heading, justify="right")
    for lifted, decayed in zip(document["teacher_prefix_curve"], document["teacher_decay_curve"]):
        if lifted is not None:
            n = lifted["tokens"]
            share = "–" if n == 0 else f"{document['kl_share_by_tokens'][str(n)]:.0%}"
            made.add_row(
                str(n),
                share,
                *(
                    f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
                    for row in (lifted, decayed)
                ),
            )
    if document["teacher_prefix_curve"][0] is None:
        for n, share in document["kl_share_by_tokens"].items():
            made.add_row(n, f"{share:.0%}", "–", "–")
    return made


def corner_table(document: dict):
    """The quadrants as a rich table."""
    from rich.table import Table

    found = document["quadrants"]
    made = Table(
        title=f"the student's tokens; high: entropy above {found['borders'][0]:.2g}, KL above "
        f"{found['borders'][1]:.2g} nats (medians)"
    )
    for heading in ("quadrant", "share of the tokens", "share of the KL"):
        made.add_column(heading, justify="left" if heading == "quadrant" else "right")
    for name, share in found["quadrants"].items():
        made.add_row(name, f"{share['tokens']:.0%}", f"{share['divergence']:.0%}")
    return made
