"""Where is the signal? Before anything is trained: divergence by position, what a teacher's prefix
does for the student, what the student's does to the teacher, and from these a prefix length."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..engine import evaluate
from ..engine.device import Clock
from ..engine.meter import Meter
from ..engine.models import Model, decoder
from ..engine.rollout import Rollout
from ..engine.sampling import GenerationCost, Request, generate
from ..engine.scoring import Scorer
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

Written = tuple[tuple[int, ...], bool]  # ids of an answer, and whether it finished


def probe(run: Run, say: Callable[[str], None] = lambda text: None) -> dict:
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
    prompts, clock = run.problems.train, Clock(run.place.device)
    writer = Writer(run)
    nothing: list[tuple[int, ...]] = [()] * len(prompts)
    with clock.phase("probe"):
        say(f"{len(prompts)} prompts: both models answer in full")
        own, expert = writer.write("student", nothing, 0), writer.write("teacher", nothing, 0)
        length = sum(map(len, _as_students(run, expert))) / len(expert)
        tried = sorted({max(1, round(share * length)) for share in SHARES})
        facts = _facts(run, own, writer.ledger)
        lifted, decayed = _curves(writer, own, expert, tried, say)
    kl = [row["divergence"] for row in facts]
    held = {n: _share_of_first(kl, n) for n in tried}
    teacher = None if decayed is None else decayed[0]
    recommended, reason = recommend(lifted, teacher, held, length)
    chosen = recommended if isinstance(recommended, int) else length
    lengths = [len(p.student_ids) for p in prompts]
    return {
        "recommended_prefix": recommended,
        "reason": reason,
        "expected_saving": run.update_cost(prompts, length) / run.update_cost(prompts, chosen),
        "prompts": len(prompts),
        "prompt_tokens": sum(lengths) / len(lengths),
        "student_tokens": sum(len(ids) for ids, _ in own) / len(own),
        "teacher_tokens": length,
        "kl": intervals.token_mean(kl),
        "kl_share": {
            f"first_{round(100 * share)}_percent": _share(kl, share) for share in (0.1, 0.25, 0.5)
        },
        "kl_share_by_tokens": {str(n): share for n, share in held.items()},
        "by_position": _bins(facts),
        "quadrants": quadrants(
            intervals.known([row["entropy"] for row in facts]),
            intervals.known([row["divergence"] for row in facts]),
        ),
        "teacher_prefix_curve": _public(lifted),
        "teacher_decay_curve": _public(decayed),
        "flops": writer.flops().summary(),
        "seconds": clock.seconds["probe"],
    }


class Writer:
    """Samples full answers of both models to the run's training prompts; ``ledger`` counts their
    FLOPs."""

    def __init__(self, run: Run):
        self.run, self.ledger = run, Ledger()
        self.clock = Clock(run.place.device)
        sampler, text = run.method.eval_sampler, run.method.text_sampler  # text: the teacher's ids
        theirs = dataclasses.replace(sampler, eos=text.eos, support=text.support, pad=text.pad)
        student = decoder(run.pair.student, run.place.dtype)
        teacher = decoder(run.pair.teacher, run.place.dtype)
        self.sides = {
            "student": (student, run.pair.student_shape, "student_ids", sampler),
            "teacher": (teacher, run.pair.teacher_shape, "teacher_ids", theirs),
        }

    def write(self, side: str, given: Sequence[tuple[int, ...]], key: int) -> list[Written]:
        """Full answers that ``side`` goes on to from the given starts; sharded over ranks."""
        place, cap = self.run.place, self.run.method.prefix.limit
        sampler = self.sides[side][3]
        open_ends = [
            i
            for i, start in enumerate(given)
            if len(start) < cap and not sampler.eos.intersection(start)
        ]
        by_room: dict[int, list[int]] = {}
        for i in open_ends[place.rank :: place.world]:
            by_room.setdefault(cap - len(given[i]), []).append(i)
        drawn: dict[int, Written] = {}
        for room, rows in by_room.items():
            drawn |= self._go_on(side, given, rows, room, key)
        merged = {i: row for part in place.gather(drawn) for i, row in part.items()}
        return [
            merged.get(i, (start, bool(sampler.eos.intersection(start))))
            for i, start in enumerate(given)
        ]

    def _go_on(
        self, side: str, given: Sequence[tuple[int, ...]], rows: list[int], room: int, key: int
    ) -> dict[int, Written]:
        """Continue ``given`` on the ``rows`` with model ``side``, by up to ``room`` tokens → by
        row."""
        model, shape, ids, sampler = self.sides[side]
        prompts = self.run.problems.train
        requests = [
            Request(getattr(prompts[i], ids) + given[i], ("probe", side, key, i)) for i in rows
        ]
        responses = generate(
            model,
            requests,
            room,
            sampler,
            GenerationCost(
                meter=Meter(self.clock, self.ledger),
                shape=shape,
                prefill=f"{side}_prefill",
                decode=f"{side}_decode",
            ),
        )
        return {i: (given[i] + r.ids, r.finished) for i, r in zip(rows, responses, strict=True)}

    def flops(self) -> Ledger:
        """Return the merged ledgers of all ranks."""
        merged = Ledger()
        for part in self.run.place.gather(self.ledger):
            merged.merge(part)
        return merged


def _as_students(run: Run, written: list[Written]) -> list[tuple[int, ...]]:
    """Return the teacher's texts in the student's tokens."""
    if run.pair.alignment is None:
        return [ids for ids, _ in written]
    return [run.pair.alignment.to_student(ids, done) for ids, done in written]


def _as_teachers(run: Run, written: list[Written]) -> list[tuple[int, ...]]:
    """Return the student's texts in the teacher's tokens."""
    if run.pair.alignment is None:
        return [ids for ids, _ in written]
    return [run.pair.alignment.align(ids, done)[0] for ids, done in written]


def _curves(
    writer: Writer,
    own: list[Written],
    expert: list[Written],
    tried: list[int],
    say: Callable[[str], None],
) -> tuple[list[dict], list[dict]] | tuple[None, None]:
    """Return the student's accuracy after N teacher tokens, and the teacher's after N student
    tokens.

    N is 0 and every number ``tried``. Both are None if a prompt has no reference answer.
    """
    run = writer.run
    golds = [p.prompt.answer for p in run.problems.train if p.prompt.answer is not None]
    if len(golds) < len(run.problems.train):
        return None, None
    lifted = [_graded(run, own, 0, run.pair.student, golds)]
    decayed = [_graded(run, expert, 0, run.pair.teacher, golds)]
    expert_ids = _as_students(run, expert)
    for n in tried:
        say(f"the teacher writes {n} tokens, the student goes on; and the other way round")
        written = writer.write("student", [ids[:n] for ids in expert_ids], n)
        lifted.append(_graded(run, written, n, run.pair.student, golds))
        starts = _as_teachers(run, [(ids[:n], done and len(ids) <= n) for ids, done in own])
        written = writer.write("teacher", starts, n)
        decayed.append(_graded(run, written, n, run.pair.teacher, golds))
    return lifted, decayed


def recommend(
    lifted: list[dict] | None, teacher: dict | None, held: dict[int, float], length: float
) -> tuple[int | str | None, str]:
    """Return (recommended prefix, reason).

    ``lifted``: the student's accuracy after N teacher tokens; ``teacher``: the teacher's own
    accuracy; both None without answers. ``held``: N → share of the KL in the first N tokens.
    """
    half = length / 2
    if lifted is None or teacher is None:
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
    paired = intervals.interval(
        [t - s for t, s in zip(teacher["right"], own["right"], strict=True)]
    )
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


def _facts(run: Run, own: list[Written], ledger: Ledger) -> list[dict]:
    """Return ``evaluate.held_out_facts`` of the student's own answers."""
    rollouts = []
    for slot, (p, (ids, finished)) in enumerate(zip(run.problems.train, own, strict=True)):
        rollout = Rollout(
            slot=slot,
            sample=0,
            student_prompt=p.student_ids,
            teacher_prompt=p.teacher_ids,
            ids=ids,
            teacher_ids=ids,
            finished=finished,
        )
        rollouts.append(rollout)
    scorer = Scorer.reverse_kl(run.pair, run.place)
    meter = Meter(Clock(run.place.device), ledger)
    return evaluate.held_out_facts(scorer, run.pair.align(rollouts), run.limits, meter, "scoring")


def _graded(run: Run, written: list[Written], tokens: int, model: Model, golds: list[str]) -> dict:
    """Return the accuracy of texts in ``model``'s tokens, with interval and per-prompt results;
    ``tokens``: the given tokens."""
    texts = [evaluate.decode(model, ids) for ids, _ in written]
    right = [
        float(answers.correct(text, gold, run.problems.answer_format))
        for text, gold in zip(texts, golds, strict=True)
    ]
    return {
        "tokens": tokens,
        **intervals.interval(right),
        "finish_rate": sum(f for _, f in written) / len(written),
        "right": right,
    }


def _public(curve: list[dict] | None) -> list[dict | None]:
    """Return a curve as the document shows it: without per-prompt results; [None] if it is None."""
    if curve is None:
        return [None]
    return [{k: v for k, v in row.items() if k != "right"} for row in curve]


def _share_of_first(values: list[list[float | None]], tokens: int) -> float:
    """Return the share of the total KL in the first ``tokens`` of every rollout."""
    first = math.fsum(intervals.known([row[:tokens] for row in values]))
    return first / max(1e-12, math.fsum(intervals.known(values)))


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
    curves = document["teacher_prefix_curve"], document["teacher_decay_curve"]
    for lifted, decayed in zip(*curves, strict=True):
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
