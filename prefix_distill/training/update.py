"""One update: sample, select, accumulate gradients, step."""

import contextlib
import math

import torch

from ..engine import scoring
from ..engine.device import Clock
from ..engine.models import Model
from ..engine.rollout import Rollout
from ..engine.sampling import Request, generate
from ..engine.scoring import Reading
from ..errors import Stopped
from ..maths import simct
from ..maths.divergence import Terms
from ..maths.flops import Ledger
from ..maths.fused import weighted
from ..maths.weights import choose, keep, scale
from ..prompts.prompt import Rendered
from . import teacher_text as off_policy
from .folder import RunFolder
from .run import Run
from .state import Progress, stop_run


class StudentLoss(torch.nn.Module):
    """What DDP wraps: the student reads a micro-batch and its weighted divergence from the
    teacher comes out."""

    def __init__(self, run: Run):
        super().__init__()
        self.net, self.run = run.student.net, run

    def forward(
        self,
        rollouts: list[Rollout] | None,
        teacher_NE: torch.Tensor | None = None,
        weight_N: torch.Tensor | None = None,
        student_ND: torch.Tensor | None = None,
    ):
        """``student_ND``: the rows, where they have been read already. ``rollouts`` None: nothing
        is taught, but every weight takes part, so that DDP adds up what the ranks have gathered."""
        run, drawn = self.run, None
        if rollouts is None:
            with run.place.autocast(run.place.device):
                hidden_ND = run.student.trunk(
                    torch.zeros(1, 1, dtype=torch.long, device=run.place.device)
                )[0]
            head = run.student.head()
            return (
                0
                * torch.nn.functional.linear(
                    hidden_ND.to(head.weight_VD.dtype), head.weight_VD, head.bias_V
                ).sum()
            )
        if rollouts[0].sampler_logp is not None:
            drawn = torch.tensor([r.sampler_logp[t] for r in rollouts for t in r.taught])
        if student_ND is None:
            with run.place.autocast(run.place.device):
                student_ND = scoring.hidden_rows(run.student, rollouts)
        terms, heads = _terms(run, rollouts), (run.student.head(), run.teacher.head())
        if rollouts[0].units is not None and terms.taught_by == "teacher":
            return simct.weighted(
                terms,
                run.shared,
                scoring.units_of(rollouts),
                student_ND,
                heads[0],
                teacher_NE,
                heads[1],
                weight_N,
            )
        return weighted(
            terms,
            student_ND,
            heads[0],
            teacher_NE,
            heads[1],
            weight_N.to(student_ND.device),
            scoring.tokens(rollouts),
            drawn,
        )


def _terms(run: Run, rollouts: list[Rollout]) -> Terms:
    """The loss of a micro-batch: all of its rollouts are the student's or all are the teacher's."""
    return run.text_terms if rollouts[0].off_policy else run.terms


def sample(
    run: Run,
    decoding: Model,
    prompts: list[Rendered],
    step: int,
    prefix: int,
    ledger: Ledger,
    clock: Clock,
    texts: dict | None = None,
) -> list[Rollout]:
    """This rank's rollouts of the update, prompt by prompt with its G samples; sampling stops at
    ``prefix`` or EOS.

    Rollouts that --off-policy gives to the teacher come from ``texts`` ((prompt index, sample) →
    its text), cut at ``prefix``. Across tokenizers they have units; Stopped where no rollout of any
    rank has one.
    """
    samples = run.config.rollout.samples
    slots = range(run.place.rank, len(prompts), run.place.world)
    teachers = (
        run.off_policy.rows(step, len(prompts) * samples, run.config.runtime.seed)
        if run.off_policy
        else ()
    )
    places = [(slot, s) for slot in slots for s in range(samples)]
    own = [(slot, s) for slot, s in places if slot * samples + s not in teachers]
    requests = [Request(prompts[slot].student_ids, (step, slot, s)) for slot, s in own]
    responses = (
        run.fit(
            "rows",
            ledger,
            lambda spent: generate(
                decoding,
                requests,
                prefix,
                run.sampler,
                lambda reads: spent.generation(run.student_shape, reads),
                clock,
            ),
        )
        if own
        else []
    )
    drawn = [
        Rollout(
            slot,
            s,
            prompts[slot].student_ids,
            prompts[slot].teacher_ids,
            r.ids,
            r.ids,
            r.finished,
            sampler_logp=r.logp,
        )
        for (slot, s), r in zip(own, responses)
    ]
    with clock.phase("alignment") if run.alignment is not None else contextlib.nullcontext():
        found = {(r.prompt, r.sample): r for r in run.aligned(drawn)}
        rollouts = [
            found.get((slot, s))
            or off_policy.rollout(
                slot,
                s,
                prompts[slot],
                texts[prompts[slot].prompt.index, s],
                prefix,
                run.alignment,
                run.text_terms.taught_by == "teacher",
            )
            for slot, s in places
        ]
    if run.alignment is not None and not run.place.total(sum(len(r.taught) for r in rollouts)):
        raise Stopped(
            f"update {step + 1}: no unit of text is common to both tokenizations of its rollouts, "
            "so there is nothing to teach; lengthen --prefix"
        )
    return rollouts


def select(
    run: Run, rollouts: list[Rollout], step: int, ledger: Ledger, clock: Clock
) -> tuple[list[Rollout], Reading | None]:
    """Marks the tokens that are taught: --window, and --select among what it leaves.

    What ranks tokens has both models read every rollout first. Where every rank's rollouts are one
    micro-batch, the loss is taken from that very reading, which is returned; else both read once
    more what is taught (ledger row ``selection``).
    """
    window, selection = run.window, run.selection
    key, ranked = (
        (run.config.runtime.seed, step),
        window is not None and window.statistic is not None,
    )
    if not ranked:
        rollouts = keep(window, rollouts, key)
    if not ranked and (selection is None or not selection.ranks):
        return choose(selection, rollouts, key), None
    facts, reading = _token_facts(run, rollouts, ledger, clock)
    if ranked:
        rollouts = keep(window, rollouts, key, facts)
    at = None
    if selection is not None and selection.ranks:
        parts = run.place.gather(
            [
                [facts[r.prompt, r.sample][name][t] for r in rollouts for t in r.taught]
                for name in ("entropy", "divergence")
            ]
        )
        at = (
            scale(*([v for part in parts for v in part[i]] for i in (0, 1)))
            if any(part[0] for part in parts)
            else None
        )
    return choose(selection, rollouts, key, facts, at), reading


def _token_facts(
    run: Run, rollouts: list[Rollout], ledger: Ledger, clock: Clock
) -> tuple[dict, Reading | None]:
    """``scoring.token_statistics`` of this rank's rollouts, and the reading they come from where
    it can be taught from."""
    groups = _micro_batches(run, rollouts)
    terms = Terms("reverse-kl", dtype=run.place.head_dtype, memory_bytes=run.terms.memory_bytes)
    forward = run.selection is not None and run.selection.kind == "overconfident"

    def read_once(ledger: Ledger) -> tuple[dict, Reading]:
        [group] = groups
        with clock.phase("student_update"), run.place.autocast(run.place.device):
            student_ND = scoring.hidden_rows(run.student, group)
        with (
            clock.phase("teacher_score"),
            torch.no_grad(),
            run.place.autocast(run.place.teacher_device),
        ):
            teacher_NE = scoring.hidden_rows(run.teacher, group, teacher=True)
        with clock.phase("selection"):
            facts = scoring.row_statistics(
                terms,
                run.student,
                student_ND.detach(),
                run.teacher,
                teacher_NE,
                run.shared,
                group,
                forward,
            )
        for model, shape, teacher in (
            (run.student, run.student_shape, False),
            (run.teacher, run.teacher_shape, True),
        ):
            ledger.add(
                "selection",
                *[shape.output(scoring.head_rows(model, group, run.shared, teacher, whole=True))]
                * 2,
            )
        return scoring.positions(group, facts), Reading(group, student_ND, teacher_NE)

    once = (
        max(run.place.gather(len(groups) if _terms(run, rollouts).taught_by == "teacher" else 2))
        == 1
    )
    if once and (found := run.attempt(ledger, read_once)) is not None:
        return found
    with clock.phase("selection"):
        return run.fit(
            "micro_batch_size",
            ledger,
            lambda spent: scoring.token_statistics(
                terms,
                run.student,
                run.teacher,
                run.shared,
                rollouts,
                run.place,
                run.config.train.micro_batch_size,
                run.counts_both(spent, "selection"),
                forward,
            ),
        ), None


def _micro_batches(run: Run, rollouts: list[Rollout]) -> list[list[Rollout]]:
    """This rank's micro-batches; the student's own rollouts and the teacher's have different
    losses, so they do not mix."""
    return [
        group
        for side in (False, True)
        for group in scoring.micro_batches(
            [r for r in rollouts if r.off_policy is side],
            run.config.train.micro_batch_size,
            run.student.reads_once,
        )
    ]


def accumulate_gradients(
    run: Run,
    loss_module,
    rollouts,
    weights,
    divisor,
    ledger,
    clock,
    reading: Reading | None = None,
) -> tuple[dict[tuple, list[float]], dict[tuple, list[float]]]:
    """Gradients of the whole update, micro-batch by micro-batch → (prompt, sample) → per-token
    divergence, nats; and with --clip, → the teacher's mass on clipped entries.

    The division happens here, once: every weight is divided by the update's divisor. DDP averages
    gradients over ranks, so the weights are multiplied by the number of ranks first. Ranks may have
    any number of micro-batches, or none: each gathers its gradients by itself, and they meet once,
    in a turn that teaches nothing. With a ``reading``, nothing is read again. Where memory runs out
    on any rank, all start anew with half the micro-batch.
    """
    while True:
        found = run.attempt(
            ledger,
            lambda spent: _gather_gradients(
                run, loss_module, rollouts, weights, divisor, spent, clock, reading
            ),
        )
        if found is not None:
            break
        loss_module.zero_grad(set_to_none=True)
        reading = None
    if run.place.world > 1:
        with clock.phase("student_update"), run.place.meeting():
            loss_module(None).backward()
        ledger.forward(
            "student_update",
            run.student_shape,
            [(1, [1])],
            passes=3,
            idle=True,
            recomputed=run.student.recomputes,
            taught=1,
        )
    return found


def _gather_gradients(
    run: Run, loss_module, rollouts, weights, divisor, ledger, clock, reading
) -> tuple[dict[tuple, list[float]], dict[tuple, list[float]]]:
    """This rank's part of ``_accumulate``."""
    place, once = run.place, run.student.reads_once
    named = {(r.prompt, r.sample): r for r in rollouts}
    groups = (
        _micro_batches(run, rollouts)
        if reading is None
        else [[named[r.prompt, r.sample] for r in reading.rollouts]]
    )
    values, clipped = {}, {}
    for group in groups:
        lengths = [len(r.taught) for r in group]
        weight_N = torch.tensor(
            [w for r in group for w in weights[r.prompt, r.sample]], dtype=torch.float64
        )
        weight_N = (weight_N * (place.world / divisor)).float()
        read, student_ND, teacher_NE = group, None, None
        if reading is not None:
            read, (student_ND, teacher_NE) = reading.rollouts, reading.only(group)
        elif _terms(run, group).taught_by == "teacher":
            with (
                clock.phase("teacher_score"),
                torch.no_grad(),
                place.autocast(place.teacher_device),
            ):
                teacher_NE = scoring.hidden_rows(run.teacher, group, teacher=True)
        if teacher_NE is not None:
            ledger.forward(
                "teacher_score",
                run.teacher_shape,
                scoring.reads(read, run.teacher.reads_once, teacher=True),
                taught=scoring.head_rows(run.teacher, group, run.shared, teacher=True),
            )
        with (
            clock.phase("student_update"),
            contextlib.nullcontext() if place.world == 1 else loss_module.no_sync(),
        ):
            loss, value_N, clipped_N = loss_module(group, teacher_NE, weight_N, student_ND)
            loss.backward()
        shared = None if group[0].units is None else run.shared
        ledger.forward(
            "student_update",
            run.student_shape,
            scoring.reads(read, once),
            passes=3,
            recomputed=run.student.recomputes,
            taught=scoring.head_rows(run.student, group, shared, teacher=False),
        )
        if shared is not None:  # tokens of spans are projected once more
            again = run.student_shape.output(
                sum(u.size for r in group for u in r.taught_units if not u.exact)
            )
            ledger.add("student_update", again, again)
        for found, column in ((values, value_N), (clipped, clipped_N)):
            if column is not None:
                found |= {
                    (r.prompt, r.sample): part.tolist()
                    for r, part in zip(group, column.split(lengths))
                }
    return values, clipped


@torch.no_grad()
def find_non_finite(run: Run, rollout: Rollout) -> str:
    """Where in the two networks the first number that is not finite appears."""
    both = (("teacher", run.teacher, True), ("student", run.student, False))
    for role, model, _ in both:
        if name := next(
            (name for name, p in model.net.named_parameters() if not torch.isfinite(p).all()), None
        ):
            return f"the {role}'s weight {name} is"
    for role, model, teacher in both:
        with run.place.autocast(model.device):
            hidden_ND = scoring.hidden_rows(model, [rollout], teacher)
        if not torch.isfinite(hidden_ND).all():
            return f"the {role}'s hidden states there are"
        if not torch.isfinite(model.head().to(run.place.head_dtype).logits(hidden_ND)).all():
            return f"the {role}'s logits there are"
    return "it is"


def apply_update(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, rate: float
) -> float:
    """Clip, check, step. A gradient that is not finite stops the run before it reaches a weight."""
    named = list(run.student.trained.items())
    if progress.step == 0 and (missing := [name for name, p in named if p.grad is None]):
        raise Stopped(
            f"update 1: parameter {missing[0]} received no gradient; this architecture is not "
            "supported"
        )
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named]).item()
    if not math.isfinite(norm):
        bad = next(
            (f"gradient of {name}" for name, p in named if not torch.isfinite(p.grad).all()),
            "gradient's norm",
        )
        stop_run(run, folder, optimizer, anchor, progress, f"the {bad} is not finite")
    if run.config.train.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(
            [p for _, p in named], run.config.train.grad_clip, torch.tensor(norm)
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_optimizer(trained, config) -> torch.optim.AdamW:
    """AdamW in float32, fused: one pass over weight, gradient and moments, without temporaries.
    Weight decay on matrices, none on norms and biases."""
    parameters = list(trained)
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": config.train.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.schedule.lr, fused=True)
