"""The training loop of on-policy prefix distillation (arXiv 2602.15260), one update a turn."""

import contextlib
import dataclasses
import inspect
import math

import torch
from torch.nn.parallel import DistributedDataParallel

from ..display import Reporter, flops_text
from ..engine import scoring
from ..engine.alignment import census, shares
from ..engine.device import Clock, Interrupt
from ..engine.models import Model, average, decoder, refresh
from ..engine.sampling import Request, Rollout, generate
from ..errors import Interrupted, Stopped, UserError
from ..maths import extrapolation, simct
from ..maths.divergence import Terms, weighted
from ..maths.flops import Ledger
from ..maths.schedule import learning_rate, warmup_steps
from ..maths.weights import choose, keep, scale, token_weights
from ..prompts import load as data
from . import teacher_text as off_policy
from .card import card
from .folder import RunFolder
from .monitor import Monitor, Progress, candidate_score, full_cost, merge
from .prepare import Run

HEAD_TOKENS = 64  # the training KL of the first tokens, comparable while a prefix grows


class StudentLoss(torch.nn.Module):
    """What DDP wraps: the student reads a micro-batch and its weighted divergence from the teacher comes out."""

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
        """``student_ND``: the rows, where they have been read already. ``rollouts`` None: nothing is taught, but every weight takes
        part, so that DDP adds up what the ranks have gathered."""
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
                simct.units(rollouts),
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


def train(
    run: Run,
    folder: RunFolder,
    report: Reporter,
    resume: bool,
    interrupt: Interrupt = Interrupt(),
) -> dict:
    """Runs every update that is left, evaluates before and after, saves the model; returns the result document.

    Every rank calls its ``report``.
    Interrupted, with the state saved, after the update (or the evaluation) in which ``interrupt`` was asked to stop.
    """
    config, place = run.config, run.place
    run.say = report.own
    student = run.student.net
    if run.student.adapter is None:
        student.requires_grad_(True)
    optimizer = _optimizer(run.student.trained.values(), config)
    progress = Progress(taught_prefix=run.prefix.length(0))
    further = config.extrapolation
    moving = (
        extrapolation.moved(student, further.modules)
        if further.kind != "none" or further.diagnostics
        else {}
    )
    anchor, initial = (
        extrapolation.snapshot(moving),
        extrapolation.snapshot(moving if further.diagnostics else {}),
    )
    resumed_from, said, continued = None, False, resume
    if resume and not folder.started:
        report.note(
            "the run was interrupted before its first checkpoint: it starts from the beginning"
        )
        resume = False
        if place.first:
            folder.rewind("scores.jsonl", -1, report.warn)
    if resume:
        resumed_from = _restore(run, folder, optimizer, anchor, progress, report)
    if (
        continued and place.first
    ):  # what was given to lengthen or respread it holds for the next resume, too
        folder.write_config(dataclasses.asdict(config))
    clock = Clock(place.device, progress.seconds)
    decoding = decoder(run.student, place.dtype)
    monitor = Monitor(run, decoding, progress, clock, folder, report)
    if resume:
        monitor.resume()
    else:
        monitor.start()
    texts = _teacher_texts(run, folder, progress, clock)
    loss_module = StudentLoss(run)
    if place.world > 1:
        known = inspect.signature(DistributedDataParallel).parameters  # torch renamed it
        buffers = (
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        )  # they never change
        loss_module = DistributedDataParallel(
            loss_module, gradient_as_bucket_view=True, **{buffers: False}
        )
    if not resume:
        _save_checkpoint(run, folder, optimizer, anchor, progress)
    if resume and progress.step < config.train.steps:
        monitor.look()  # an evaluation that the interruption left out

    full = full_cost(run, progress, range(progress.step))
    while progress.step < config.train.steps:
        _stop_if_asked(run, folder, optimizer, anchor, progress, interrupt)
        step = progress.step
        spent_before = dict(clock.seconds)
        ledger = Ledger()
        prefix = progress.taught_prefix = run.prefix.length(step, progress.prefix)
        prompts = data.batch(run.train_prompts, step, config.train.batch_size, config.runtime.seed)
        rollouts = sample(run, decoding, prompts, step, prefix, ledger, clock, texts)
        rollouts, reading = select(run, rollouts, step, ledger, clock)
        weights, share = token_weights(rollouts, config.divergence.reduction, run.position)
        divisor = place.total(share)
        values, clipped = _accumulate(
            run, loss_module, rollouts, weights, divisor, ledger, clock, reading
        )
        _refuse_non_finite(run, folder, optimizer, anchor, progress, rollouts, values)
        facts = _facts(
            run, rollouts, values, clipped, weights, divisor, run.prefix.window(progress.prefix)
        )
        if reading is None and "selection" in ledger.useful and not said:
            report.note(
                "tokens are selected from a reading of their own, which the ledger counts as `selection`: the rollouts do not fit "
                "one micro-batch (--micro-batch-size, and at most a tenth of padding)"
            )
            said = True
        rate = learning_rate(
            step,
            peak=config.schedule.lr,
            schedule=config.schedule.lr_schedule,
            steps=config.train.steps,
            warmup=warmup_steps(config.schedule.warmup, config.train.steps),
        )
        with clock.phase("optimizer"):
            norm = _update(run, folder, optimizer, anchor, progress, rate)
        progress.step += 1
        progress.tokens += int(facts["tokens"])
        merge(run, progress, ledger)
        if moving and extrapolation.due(progress.step):
            _extrapolate(run, folder, decoding, optimizer, moving, anchor, progress, clock, report)
        with clock.phase("optimizer"):
            refresh(decoding, run.student)
            if config.models.teacher_ema is not None:
                average(run.teacher, run.student, config.models.teacher_ema)
        if reason := run.prefix.observe(step, progress.prefix, facts["newest"], facts["filled"]):
            progress.decisions.append({"step": progress.step, "reason": reason})
            report.note(reason)
        row = _row(run, progress, facts, prefix, rate, norm, clock, spent_before)
        full += full_cost(run, progress, range(step, step + 1))
        if place.first:
            folder.append("metrics.jsonl", row)
        report.row(row, progress.ledger.total(), full)
        if (
            config.runtime.check_ranks_every
            and progress.step % config.runtime.check_ranks_every == 0
        ):
            _compare_ranks(run, folder, progress)
        last = progress.step == config.train.steps
        if not last:
            _stop_if_asked(run, folder, optimizer, anchor, progress, interrupt)
            monitor.look()
        if (
            config.checkpoint.save_every and progress.step % config.checkpoint.save_every == 0
        ) or last:
            _save_checkpoint(run, folder, optimizer, anchor, progress)

    after = monitor.evaluate()
    if place.first:
        folder.write_rows("examples-after.jsonl", after.pop("records"))
        folder.write_json("after.json", after)
        told = card(
            run, progress, progress.evaluations[-1], full_cost(run, progress, range(progress.step))
        )
        folder.save_model("model", run.student, told, config.adapter.merge)
        if config.adapter.merge:
            folder.save_model("adapter", run.student, told)
        if further.diagnostics:
            _diagnose(folder, moving, initial)
    result = _result(run, folder, progress, resumed_from, clock)
    if place.first:
        folder.write_json("run.json", {**folder.read_json("run.json"), "result": result})
    place.wait()
    return {"out": str(folder.path), **result}


def sample(
    run: Run,
    decoding: Model,
    prompts: list[data.Rendered],
    step: int,
    prefix: int,
    ledger: Ledger,
    clock: Clock,
    texts: dict | None = None,
) -> list[Rollout]:
    """This rank's rollouts of the update, prompt by prompt with its G samples; sampling stops at ``prefix`` or EOS.

    Rollouts that --off-policy gives to the teacher come from ``texts`` ((prompt index, sample) → its text), cut at ``prefix``. Across
    tokenizers they have units; Stopped where no rollout of any rank has one.
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
            f"update {step + 1}: no unit of text is common to both tokenizations of its rollouts, so there is nothing to teach; "
            "lengthen --prefix"
        )
    return rollouts


def select(
    run: Run, rollouts: list[Rollout], step: int, ledger: Ledger, clock: Clock
) -> tuple[list[Rollout], scoring.Reading | None]:
    """Marks the tokens that are taught: --window, and --select among what it leaves.

    What ranks tokens has both models read every rollout first. Where every rank's rollouts are one micro-batch, the loss is
    taken from that very reading, which is returned; else both read once more what is taught (ledger row ``selection``).
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
) -> tuple[dict, scoring.Reading | None]:
    """``scoring.token_statistics`` of this rank's rollouts, and the reading they come from where it can be taught from."""
    groups = _micro_batches(run, rollouts)
    terms = Terms("reverse-kl", dtype=run.place.head_dtype, memory_bytes=run.terms.memory_bytes)
    forward = run.selection is not None and run.selection.kind == "overconfident"

    def read_once(ledger: Ledger) -> tuple[dict, scoring.Reading]:
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
        return scoring.positions(group, facts), scoring.Reading(group, student_ND, teacher_NE)

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


def _teacher_texts(run: Run, folder: RunFolder, progress: Progress, clock: Clock) -> dict | None:
    """What the teacher writes for the updates that are left, if it writes at all."""
    if run.off_policy is None:
        return None
    config = run.config
    size, samples, seed = config.train.batch_size, config.rollout.samples, config.runtime.seed
    wanted = {}
    for step in range(config.train.steps):
        prompts = data.batch(run.train_prompts, step, size, seed)
        for row in sorted(run.off_policy.rows(step, size * samples, seed)):
            rendered, sample = prompts[row // samples], row % samples
            wanted[rendered.prompt.index, sample] = (rendered, sample)
    with clock.phase("teacher_text"):
        return off_policy.teacher_texts(
            run,
            list(wanted.values()),
            run.prefix.longest(config.train.steps),
            decoder(run.teacher, run.place.dtype),
            folder,
            progress.ledger,
        )


def _micro_batches(run: Run, rollouts: list[Rollout]) -> list[list[Rollout]]:
    """This rank's micro-batches; the student's own rollouts and the teacher's have different losses, so they do not mix."""
    return [
        group
        for side in (False, True)
        for group in scoring.micro_batches(
            [r for r in rollouts if r.off_policy is side],
            run.config.train.micro_batch_size,
            run.student.reads_once,
        )
    ]


def _accumulate(
    run: Run,
    loss_module,
    rollouts,
    weights,
    divisor,
    ledger,
    clock,
    reading: scoring.Reading | None = None,
) -> tuple[dict[tuple, list[float]], dict[tuple, list[float]]]:
    """Gradients of the whole update, micro-batch by micro-batch → (prompt, sample) → per-token divergence, nats; and with
    --clip, → the teacher's mass on clipped entries.

    The division happens here, once: every weight is divided by the update's divisor. DDP averages gradients over ranks,
    so the weights are multiplied by the number of ranks first. Ranks may have any number of micro-batches, or none: each
    gathers its gradients by itself, and they meet once, in a turn that teaches nothing. With a ``reading``, nothing is
    read again. Where memory runs out on any rank, all start anew with half the micro-batch.
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


def _facts(run: Run, rollouts, values, clipped, weights, divisor, newest: int) -> dict:
    """The update's numbers over all ranks, summed in (prompt, sample) order so that ranks cannot change them.

    Means of the loss's values per token (None where there is none): over all taught tokens (those of the teacher's text apart
    when their loss is another one), over the first tokens, over those from position ``newest`` on; and of the clipped mass.
    """
    apart = run.text_terms is not run.terms

    def sums(r: Rollout) -> tuple:
        """A rollout's place, its weighted sum, then (sum, count) of each mean."""
        value, text = values[r.prompt, r.sample], apart and r.off_policy
        own = [] if text else list(zip(r.taught, value))
        parts = (
            [v for _, v in own],
            value if text else [],
            [v for t, v in own if t < HEAD_TOKENS],
            [v for t, v in own if t >= newest],
            clipped.get((r.prompt, r.sample), []),
        )
        return (
            (r.prompt, r.sample),
            math.fsum(w * v for w, v in zip(weights[r.prompt, r.sample], value)),
            r.finished,
            len(r.rows()),
            *((math.fsum(part), len(part)) for part in parts),
        )

    rows = sorted(row for part in run.place.gather([sums(r) for r in rollouts]) for row in part)
    columns = list(zip(*rows))
    mean = {
        name: _mean(column)
        for name, column in zip(("divergence", "text", "head", "newest", "clipped"), columns[4:])
    }
    finished = sum(columns[2]) / len(rows)
    counts = run.place.gather(census(rollouts)) if run.alignment is not None else []
    return {
        **mean,
        "loss": math.fsum(columns[1]) / divisor,
        "finished": finished,
        "filled": 1 - finished,
        "tokens": sum(columns[3]),
        "alignment": shares(counts) if any(c["tokens"] for c in counts) else {},
    }


def _mean(column: tuple[tuple[float, int], ...]) -> float | None:
    count = sum(n for _, n in column)
    return math.fsum(total for total, _ in column) / count if count else None


def _refuse_non_finite(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, rollouts, values
) -> None:
    """Stopped, on every rank, where a token's divergence is NaN or infinite on any: with what is at fault, and the last good state."""
    wrong = next(
        (
            (r, t, v)
            for r in rollouts
            for t, v in zip(r.taught, values[r.prompt, r.sample])
            if not math.isfinite(v)
        ),
        None,
    )
    found = next(
        filter(
            None,
            run.place.gather(
                wrong
                and (
                    f"the divergence of prompt slot {wrong[0].prompt}, sample {wrong[0].sample}, token {wrong[1]} is {wrong[2]}: "
                    f"{_at_fault(run, wrong[0])} not finite"
                )
            ),
        ),
        None,
    )
    if found is not None:
        _stop(run, folder, optimizer, anchor, progress, found)


@torch.no_grad()
def _at_fault(run: Run, rollout: Rollout) -> str:
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


def _stop(run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, reason: str) -> None:
    """Ends the run before an update that would do harm, with the state so far saved if it is good."""
    optimizer.zero_grad(set_to_none=True)
    _save_checkpoint(run, folder, optimizer, anchor, progress)  # or Stopped, with the state that is
    raise Stopped(
        f"update {progress.step + 1}: {reason}; nothing was changed, the state after update {progress.step} is saved in "
        f"{folder.path}: lower --lr or use --dtype float32, then --resume"
    )


def _update(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, rate: float
) -> float:
    """Clip, check, step. A gradient that is not finite stops the run before it reaches a weight."""
    named = list(run.student.trained.items())
    if progress.step == 0 and (missing := [name for name, p in named if p.grad is None]):
        raise Stopped(
            f"update 1: parameter {missing[0]} received no gradient; this architecture is not supported"
        )
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named]).item()
    if not math.isfinite(norm):
        bad = next(
            (f"gradient of {name}" for name, p in named if not torch.isfinite(p.grad).all()),
            "gradient's norm",
        )
        _stop(run, folder, optimizer, anchor, progress, f"the {bad} is not finite")
    if run.config.train.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(
            [p for _, p in named], run.config.train.grad_clip, torch.tensor(norm)
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _optimizer(trained, config) -> torch.optim.AdamW:
    """AdamW in float32, fused: one pass over weight, gradient and moments, without temporaries. Weight decay on matrices,
    none on norms and biases."""
    parameters = list(trained)
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": config.train.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.schedule.lr, fused=True)


def _row(run: Run, progress: Progress, facts, prefix, rate, norm, clock, spent_before) -> dict:
    seconds = {
        k: v - spent_before.get(k, 0.0) for k, v in clock.seconds.items() if k != "evaluation"
    }
    row = {
        "step": progress.step,
        f"loss/{run.terms.name.replace('-', '_')}_nats": facts["divergence"],
        f"loss/first_{HEAD_TOKENS}_tokens_nats": facts["head"],
        "loss/objective": facts["loss"],
        "rollout/prefix_tokens": prefix,
        "rollout/taught_tokens": facts["tokens"],
        "rollout/finished_share": facts["finished"],
        "optimizer/learning_rate": rate,
        "optimizer/gradient_norm": norm,
    }
    if facts["text"] is not None:
        row["loss/teacher_text_nats"] = facts["text"]
    row |= {f"alignment/{name}": value for name, value in facts["alignment"].items()}
    if facts["clipped"] is not None:
        row["loss/clipped_share"] = facts["clipped"]
    if found := [x for x in progress.extrapolations if x["step"] == progress.step]:
        row |= {"extrapolation/accepted_k": found[0]["k"], "extrapolation/flops": found[0]["flops"]}
    row |= {
        f"flops/{phase}": value
        for phase, value in progress.ledger.useful.items()
        if phase != "evaluation"
    }
    row["flops/useful_total"], row["flops/executed_total"] = (
        progress.ledger.total(),
        progress.ledger.total("executed"),
    )
    row |= {f"time/{phase}_s": value for phase, value in seconds.items()}
    row |= {
        f"time/{phase}_tokens_per_s": facts["tokens"] / value
        for phase, value in seconds.items()
        if value
    }
    return row


def _result(run: Run, folder: RunFolder, progress: Progress, resumed_from, clock) -> dict:
    first, last = progress.evaluations[0], progress.evaluations[-1]
    return {
        "steps": progress.step,
        "resumed_from": resumed_from,
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "kl_before": first["kl"],
        "kl_after": last["kl"],
        "prefix": progress.taught_prefix,
        "prefix_decisions": progress.decisions,
        "tail_probes": progress.tail_probes,
        "extrapolations": progress.extrapolations,
        "warnings": progress.warnings,
        "sampler_kl": last["sampler_kl"],
        "tokens": progress.tokens,
        "flops": progress.ledger.summary(),
        "full_rollout_cost": full_cost(run, progress, range(progress.step)),
        "seconds": {"total": math.fsum(clock.seconds.values()), "by_phase": clock.seconds},
        "evaluations": progress.evaluations,
        "best": progress.best and {k: v for k, v in progress.best.items() if k != "merit"},
    }


def _extrapolate(
    run: Run,
    folder: RunFolder,
    decoding: Model,
    optimizer,
    moving,
    anchor,
    progress: Progress,
    clock: Clock,
    report: Reporter,
) -> None:
    """The search after an update at which one is due; a row in ``progress.extrapolations``, a ledger row of its own."""
    settings, ledger = run.config.extrapolation, Ledger()
    before, seconds = (
        progress.ledger.useful.get("extrapolation", 0.0),
        clock.seconds.get("extrapolation", 0.0),
    )
    if settings.diagnostics and run.place.first:
        folder.write_tensors(
            f"displacements/step-{progress.step:08d}.safetensors",
            {name: p.detach() - anchor[name].to(p.device) for name, p in moving.items()},
        )

    def score() -> float:
        refresh(decoding, run.student)
        return candidate_score(run, decoding, progress.taught_prefix, ledger)

    with clock.phase("extrapolation"):
        found = extrapolation.extrapolate(
            moving, anchor, settings.kind, score, (run.config.runtime.seed, progress.step)
        )
    merge(run, progress, ledger)
    if settings.reset:
        for p in moving.values():
            optimizer.state.pop(p, None)
    row = {
        "step": progress.step,
        "k": found.k,
        "scores": found.scores,
        "flops": progress.ledger.useful.get("extrapolation", 0.0) - before,
    }
    progress.extrapolations.append(row)
    if settings.kind != "none":
        scores = (
            f", {settings.score} " + " → ".join(f"{s:.4g}" for s in found.scores)
            if found.scores
            else ""
        )
        report.note(
            f"after update {progress.step}: W + {2 * found.k}Δ is taken (k = {found.k}{scores}; {flops_text(row['flops'])}, "
            f"{clock.seconds['extrapolation'] - seconds:.1f} s)"
        )


def _diagnose(folder: RunFolder, moving, initial) -> None:
    """displacement.json from the displacements that were kept; they go."""
    final = {name: p.detach().cpu() - initial[name] for name, p in moving.items()}
    rows = [
        {
            "step": int(file.stem.removeprefix("step-")),
            "modules": extrapolation.diagnose(tensors, final),
        }
        for file, tensors in folder.read_tensors("displacements")
    ]
    folder.write_json("displacement.json", rows)
    folder.remove("displacements")


def _stop_if_asked(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, interrupt: Interrupt
) -> None:
    """A safe point: if any rank was asked to stop, all save and are Interrupted."""
    asked = next(filter(None, run.place.gather(interrupt.asked)), None)
    if asked is not None:
        _save_checkpoint(run, folder, optimizer, anchor, progress)
        raise Interrupted(
            f"interrupted ({asked.name}) after update {progress.step}, with the state saved: prefix-distill run --resume "
            f"--out {folder.path} goes on from there",
            asked,
        )


def _compare_ranks(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Stopped where the ranks' weights differ."""
    differing = run.place.differing(run.student.trained)
    if differing is not None:
        rank, name = differing
        raise Stopped(
            f"after update {progress.step} the weights of rank {rank} are not those of rank 0 (the first: {name}); nothing of this "
            f"is saved, {folder.newest}: check that machine, then --resume"
        )


def _save_checkpoint(run: Run, folder: RunFolder, optimizer, anchor, progress: Progress) -> None:
    """Saves the state, if it is finite and the same on all ranks; else Stopped."""
    _compare_ranks(run, folder, progress)
    names = {p: name for name, p in run.student.trained.items()}
    if bad := next((name for p, name in names.items() if not torch.isfinite(p).all()), None):
        raise Stopped(
            f"after update {progress.step} the student's weight {bad} is not finite; it is not saved, {folder.newest}: lower --lr "
            "or use --dtype float32, then --resume"
        )
    if run.place.first:
        moments = {
            f"{key}/{names[p]}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        tensors = {"student": {name: p for p, name in names.items()}, "optimizer": moments}
        if anchor:
            tensors["anchor"] = anchor
        if run.config.models.teacher_ema is not None:
            tensors["teacher"] = dict(run.teacher.net.named_parameters())
        folder.save(progress.step, tensors, dataclasses.asdict(progress) | {"fitted": run.fitted})
    run.place.wait()


def _restore(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, report: Reporter
) -> int:
    """Weights, optimizer moments, anchor, averaged teacher and progress of the newest checkpoint; metric rows are rewound to it."""
    place = run.place
    step, tensors, facts = folder.latest(report.warn if place.first else lambda text: None)
    shapes = [
        {name: p.shape for name, p in named}
        for named in (run.student.trained.items(), tensors.get("student", {}).items())
    ]
    if shapes[0] != shapes[1] or "optimizer" not in tensors:
        raise UserError(
            f"--resume {folder.path}: the weights of its checkpoint are not those of {run.student.name}; put that model back, or "
            "start anew with another --out"
        )
    with torch.no_grad():
        for name, p in run.student.trained.items():
            p.copy_(tensors["student"][name])
            found = {
                key.split("/", 1)[0]: value
                for key, value in tensors["optimizer"].items()
                if key.split("/", 1)[1] == name
            }
            if found:
                optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
        for name, p in run.teacher.net.named_parameters() if "teacher" in tensors else ():
            p.copy_(tensors["teacher"][name])
        for name, t in anchor.items():
            t.copy_(tensors["anchor"][name])
    for key, value in facts.items():
        setattr(progress, key, Ledger(**value) if key == "ledger" else value)
    run.use(
        **{
            what: min(
                size, getattr(run.config.rollout if what == "rows" else run.config.train, what)
            )
            for what, size in progress.fitted.items()
        }
    )
    was = folder.read_json("run.json").get("ranks", place.world)
    place.wait()  # every rank has read before the first one writes
    if place.first:
        folder.rewind("metrics.jsonl", step, report.warn, whole=True)
        folder.rewind("scores.jsonl", progress.evaluations[-1]["step"], report.warn)
        folder.write_json("run.json", {**folder.read_json("run.json"), "ranks": place.world})
    place.wait()
    report.note(f"resumed after update {step}")
    if was != place.world:
        (report.note if place.dtype == torch.float32 else report.warn)(
            f"{was} rank{'s' * (was > 1)} before, {place.world} now: the same prompts, seeds and decisions; sums are rounded in another order"
            + (
                ""
                if place.dtype == torch.float32
                else f", and in {str(place.dtype)[6:]} that can change which tokens are sampled"
            )
        )
    return step
