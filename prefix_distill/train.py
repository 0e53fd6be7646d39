"""The loop: on-policy prefix distillation (arXiv 2602.15260), one update a turn. Loads nothing, parses nothing."""

import contextlib
import dataclasses
import math

import torch
from torch.nn.parallel import DistributedDataParallel

from . import data, off_policy, scoring
from .checkpoint import RunFolder
from .divergence import Terms, weighted
from .errors import Stopped
from .flops import Ledger
from .models import Model, decoder, refresh, save
from .monitor import Monitor, Progress, full_cost, merge
from .preflight import Run
from .rollout import Request, Rollout, generate
from .runtime import Clock
from .schedule import learning_rate, warmup_steps
from .weights import keep, token_weights

HEAD_TOKENS = 64  # the training KL of the first tokens, comparable while a prefix grows


class StudentLoss(torch.nn.Module):
    """What DDP wraps: the student reads a micro-batch and its weighted divergence from the teacher comes out."""

    def __init__(self, run: Run):
        super().__init__()
        self.net, self.run = run.student.net, run

    def forward(self, rollouts: list[Rollout], teacher_NE: torch.Tensor | None, weight_N: torch.Tensor):
        run, drawn = self.run, None
        if rollouts[0].sampler_logp is not None:
            drawn = torch.tensor([r.sampler_logp[t] for r in rollouts for t in r.taught])
        with run.place.autocast(run.place.device):
            student_ND = scoring.hidden_rows(run.student, rollouts)
        return weighted(_terms(run, rollouts), student_ND, run.student.head(run.support), teacher_NE,
                        run.teacher.head(run.support), weight_N.to(student_ND.device), scoring.tokens(rollouts), drawn)


def _terms(run: Run, rollouts: list[Rollout]) -> Terms:
    """The loss of a micro-batch: all of its rollouts are the student's or all are the teacher's."""
    return run.text_terms if rollouts[0].off_policy else run.terms


def train(run: Run, folder: RunFolder, report, resume: bool) -> dict:
    """Runs every update that is left, evaluates before and after, saves the model; returns the result document.

    ``report`` shows progress on every rank: ``note(text)``, ``warn(text)``, ``evaluation(row)``, ``tail(row)`` and ``row(metrics,
    useful FLOPs so far, useful FLOPs of as many updates with full rollouts)``.
    """
    config, place = run.config, run.place
    student = run.student.net.requires_grad_(True)
    optimizer = _optimizer(student, config)
    progress = Progress(taught_prefix=run.prefix.length(0))
    resumed_from = None
    if resume and not folder.started:
        report.note("the run was interrupted before its first checkpoint: it starts from the beginning")
        resume = False
        if place.first:
            folder.rewind("scores.jsonl", -1)
    if resume:
        resumed_from = _restore(run, folder, optimizer, progress, report)
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
        loss_module = DistributedDataParallel(loss_module)
    if not resume:
        _save_checkpoint(run, folder, optimizer, progress)

    full = full_cost(run, progress, range(progress.step))
    while progress.step < config.train.steps:
        step = progress.step
        spent_before = dict(clock.seconds)
        ledger = Ledger()
        prefix = progress.taught_prefix = run.prefix.length(step, progress.prefix)
        prompts = data.batch(run.train_prompts, step, config.train.batch_size, config.runtime.seed)
        rollouts = sample(run, decoding, prompts, step, prefix, ledger, clock, texts)
        rollouts = select(run, rollouts, step, ledger, clock)
        weights, share = token_weights(rollouts, config.divergence.reduction)
        divisor = place.total(share)
        values = _accumulate(run, loss_module, rollouts, weights, divisor, ledger, clock)
        facts = _facts(run, rollouts, values, weights, divisor, run.prefix.window(progress.prefix))
        rate = learning_rate(
            step, peak=config.schedule.lr, schedule=config.schedule.lr_schedule, steps=config.train.steps,
            warmup=warmup_steps(config.schedule.warmup, config.train.steps),
        )
        with clock.phase("optimizer"):
            norm = _update(run, folder, optimizer, progress, rate, facts["loss"])
            refresh(decoding, run.student)
        progress.step += 1
        progress.tokens += int(facts["tokens"])
        merge(run, progress, ledger)
        if reason := run.prefix.observe(step, progress.prefix, facts["newest"], facts["filled"]):
            progress.decisions.append({"step": progress.step, "reason": reason})
            report.note(reason)
        row = _row(run, progress, facts, prefix, rate, norm, clock, spent_before)
        full += full_cost(run, progress, range(step, step + 1))
        if place.first:
            folder.append("metrics.jsonl", row)
        report.row(row, progress.ledger.total(), full)
        last = progress.step == config.train.steps
        if config.evaluate.every and progress.step % config.evaluate.every == 0 and not last:
            monitor.evaluate()
        elif monitor.probe_due() and not last:
            monitor.probe_tail()
        if (config.checkpoint.save_every and progress.step % config.checkpoint.save_every == 0) or last:
            _save_checkpoint(run, folder, optimizer, progress)

    after = monitor.evaluate()
    if place.first:
        folder.write_rows("examples-after.jsonl", after.pop("records"))
        folder.write_json("after.json", after)
        save(run.student, folder.model)
    result = _result(run, folder, progress, resumed_from, clock)
    if place.first:
        folder.write_json("run.json", {**folder.read_json("run.json"), "result": result})
    place.wait()
    return result


def sample(run: Run, decoding: Model, prompts: list[data.Rendered], step: int, prefix: int, ledger: Ledger,
           clock: Clock, texts: dict | None = None) -> list[Rollout]:
    """This rank's rollouts of the update, prompt by prompt with its G samples; sampling stops at ``prefix`` or EOS.

    Rollouts that --off-policy gives to the teacher come from ``texts`` ((prompt index, sample) → its text), cut at ``prefix``.
    """
    samples = run.config.rollout.samples
    slots = range(run.place.rank, len(prompts), run.place.world)
    teachers = run.off_policy.rows(step, len(prompts) * samples, run.config.runtime.seed) if run.off_policy else ()
    places = [(slot, s) for slot in slots for s in range(samples)]
    own = [(slot, s) for slot, s in places if slot * samples + s not in teachers]
    responses = generate(
        decoding, [Request(prompts[slot].student_ids, (step, slot, s)) for slot, s in own], prefix, run.sampler,
        lambda reads: ledger.generation(run.student_shape, reads), clock,
    ) if own else []
    drawn = {
        (slot, s): Rollout(slot, s, prompts[slot].student_ids, prompts[slot].teacher_ids, r.ids, r.ids, r.finished,
                           sampler_logp=r.logp)
        for (slot, s), r in zip(own, responses)
    }
    return [drawn.get((slot, s)) or off_policy.rollout(slot, s, prompts[slot], texts[prompts[slot].prompt.index, s], prefix)
            for slot, s in places]


def select(run: Run, rollouts: list[Rollout], step: int, ledger: Ledger, clock: Clock) -> list[Rollout]:
    """Marks the tokens that are taught (--window); a window that ranks tokens has both models read every rollout first."""
    if run.window is None:
        return rollouts
    found = None
    if run.window.statistic:
        def spent(group):
            for model, shape, teacher in ((run.student, run.student_shape, False), (run.teacher, run.teacher_shape, True)):
                ledger.forward("selection", shape, scoring.reads(group, model.reads_once, teacher=teacher))

        with clock.phase("selection"):
            terms = Terms("reverse-kl", dtype=run.place.head_dtype)
            found = scoring.token_statistics(terms, run.student, run.teacher, run.support, rollouts, run.place,
                                             run.config.train.micro_batch_size, spent)
    return keep(run.window, rollouts, (run.config.runtime.seed, step), found)


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
            list(wanted.values()), run.prefix.longest(config.train.steps), decoder(run.teacher, run.place.dtype), run.teacher_shape,
            run.text_sampler, run.place, folder, progress.ledger)


def _accumulate(run: Run, loss_module, rollouts, weights, divisor, ledger, clock) -> dict[tuple, list[float]]:
    """Gradients of the whole update, micro-batch by micro-batch → (prompt, sample) → per-token divergence, nats.

    The division happens here, once: every weight is divided by the update's divisor. DDP averages gradients over ranks,
    so the weights are multiplied by the number of ranks first. A rank with fewer micro-batches runs empty ones: every
    rank takes part in every reduction.
    """
    place = run.place
    once = run.student.reads_once
    groups = [group for side in (False, True)
              for group in scoring.micro_batches([r for r in rollouts if r.off_policy is side],
                                                 run.config.train.micro_batch_size, once)]
    count = max(place.gather(len(groups)))
    values = {}
    for turn in range(count):
        idle = turn >= len(groups)
        group = groups[0] if idle else groups[turn]
        lengths = [len(r.taught) for r in group]
        weight_N = torch.tensor([w for r in group for w in weights[r.prompt, r.sample]], dtype=torch.float64)
        weight_N = (weight_N * (0.0 if idle else place.world / divisor)).float()
        teacher_NE = None
        if _terms(run, group).taught_by == "teacher":
            with clock.phase("teacher_score"), torch.no_grad(), place.autocast(place.teacher_device):
                teacher_NE = scoring.hidden_rows(run.teacher, group, teacher=True)
            ledger.forward("teacher_score", run.teacher_shape, scoring.reads(group, run.teacher.reads_once, teacher=True),
                           idle=idle, taught=sum(lengths))
        gradients_meet = place.world == 1 or turn == count - 1
        with clock.phase("student_update"), contextlib.nullcontext() if gradients_meet else loss_module.no_sync():
            loss, value_N = loss_module(group, teacher_NE, weight_N)
            loss.backward()
        ledger.forward("student_update", run.student_shape, scoring.reads(group, once), passes=3, idle=idle,
                       recomputed=run.student.recomputes, taught=sum(lengths))
        for rollout, part in zip(group, value_N.split(lengths)):
            values[rollout.prompt, rollout.sample] = part.tolist()
    return values


def _facts(run: Run, rollouts, values, weights, divisor, newest: int) -> dict:
    """The update's numbers over all ranks, summed in (prompt, sample) order so that ranks cannot change them.

    Means of the loss's values per token (None where there is none): over all taught tokens (those of the teacher's text apart
    when their loss is another one), over the first tokens, over those from position ``newest`` on.
    """
    apart = run.text_terms is not run.terms

    def sums(r: Rollout) -> tuple:
        """A rollout's place, its weighted sum, then (sum, count) of each mean."""
        value, text = values[r.prompt, r.sample], apart and r.off_policy
        own = [] if text else list(zip(r.taught, value))
        parts = ([v for _, v in own], value if text else [], [v for t, v in own if t < HEAD_TOKENS], [v for t, v in own if t >= newest])
        return ((r.prompt, r.sample), math.fsum(w * v for w, v in zip(weights[r.prompt, r.sample], value)), r.finished,
                *((math.fsum(part), len(part)) for part in parts))

    rows = sorted(row for part in run.place.gather([sums(r) for r in rollouts]) for row in part)
    columns = list(zip(*rows))
    mean = {name: _mean(column) for name, column in zip(("divergence", "text", "head", "newest"), columns[3:])}
    finished = sum(columns[2]) / len(rows)
    return {**mean, "loss": math.fsum(columns[1]) / divisor, "finished": finished, "filled": 1 - finished,
            "tokens": sum(n for column in columns[3:5] for _, n in column)}


def _mean(column: tuple[tuple[float, int], ...]) -> float | None:
    count = sum(n for _, n in column)
    return math.fsum(total for total, _ in column) / count if count else None


def _update(run: Run, folder: RunFolder, optimizer, progress: Progress, rate: float, loss: float) -> float:
    """Clip, check, step. Non-finite numbers stop the run before they reach a weight, with the last good state saved."""
    named = list(run.student.net.named_parameters())
    if progress.step == 0 and (missing := [name for name, p in named if p.grad is None]):
        raise Stopped(f"update 1: parameter {missing[0]} received no gradient; this architecture is not supported")
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named]).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = "loss" if not math.isfinite(loss) else next(
            (f"gradient of {name}" for name, p in named if not torch.isfinite(p.grad).all()), "gradient norm")
        optimizer.zero_grad(set_to_none=True)
        _save_checkpoint(run, folder, optimizer, progress)
        raise Stopped(f"update {progress.step + 1}: the {bad} is not finite; nothing was changed, the state after update "
                      f"{progress.step} is saved in {folder.path}: lower --lr or use --dtype float32, then --resume")
    if run.config.train.grad_clip:
        torch.nn.utils.clip_grads_with_norm_([p for _, p in named], run.config.train.grad_clip, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _optimizer(net, config) -> torch.optim.AdamW:
    """AdamW in float32, fused: one pass over weight, gradient and moments, without temporaries. Weight decay on matrices,
    none on norms and biases."""
    parameters = list(net.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.schedule.lr, fused=True)


def _row(run: Run, progress: Progress, facts, prefix, rate, norm, clock, spent_before) -> dict:
    seconds = {k: v - spent_before.get(k, 0.0) for k, v in clock.seconds.items() if k != "evaluation"}
    row = {
        "step": progress.step, f"loss/{run.terms.name.replace('-', '_')}_nats": facts["divergence"],
        f"loss/first_{HEAD_TOKENS}_tokens_nats": facts["head"], "loss/objective": facts["loss"],
        "rollout/prefix_tokens": prefix, "rollout/taught_tokens": facts["tokens"],
        "rollout/finished_share": facts["finished"], "optimizer/learning_rate": rate, "optimizer/gradient_norm": norm,
    }
    if facts["text"] is not None:
        row["loss/teacher_text_nats"] = facts["text"]
    row |= {f"flops/{phase}": value for phase, value in progress.ledger.useful.items() if phase != "evaluation"}
    row["flops/useful_total"], row["flops/executed_total"] = progress.ledger.total(), progress.ledger.total("executed")
    row |= {f"time/{phase}_s": value for phase, value in seconds.items()}
    row |= {f"time/{phase}_tokens_per_s": facts["tokens"] / value for phase, value in seconds.items() if value}
    return row


def _result(run: Run, folder: RunFolder, progress: Progress, resumed_from, clock) -> dict:
    first, last = progress.evaluations[0], progress.evaluations[-1]
    return {
        "out": str(folder.path), "steps": progress.step, "resumed_from": resumed_from,
        "accuracy_before": first["accuracy"], "accuracy_after": last["accuracy"], "kl_before": first["kl"],
        "kl_after": last["kl"], "prefix": progress.taught_prefix, "prefix_decisions": progress.decisions,
        "tail_probes": progress.tail_probes, "warnings": progress.warnings, "sampler_kl": last["sampler_kl"], "tokens": progress.tokens, "flops": progress.ledger.summary(),
        "full_rollout_cost": full_cost(run, progress, range(progress.step)),
        "seconds": {"total": math.fsum(clock.seconds.values()), "by_phase": clock.seconds},
        "evaluations": progress.evaluations, "best": progress.best and {
            k: v for k, v in progress.best.items() if k != "merit"},
    }


def _save_checkpoint(run: Run, folder: RunFolder, optimizer, progress: Progress) -> None:
    if run.place.first:
        names = {p: name for name, p in run.student.net.named_parameters()}
        moments = {f"{key}/{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}
        folder.save(progress.step, {"student": {name: p for p, name in names.items()}, "optimizer": moments},
                    dataclasses.asdict(progress))
    run.place.wait()


def _restore(run: Run, folder: RunFolder, optimizer, progress: Progress, report) -> int:
    """Weights, optimizer moments and progress of the newest checkpoint; metric rows are rewound to it."""
    step, tensors, facts = folder.latest(report.warn)
    with torch.no_grad():
        for name, p in run.student.net.named_parameters():
            p.copy_(tensors["student"][name])
            found = {key.split("/", 1)[0]: value for key, value in tensors["optimizer"].items()
                     if key.split("/", 1)[1] == name}
            if found:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
    for key, value in facts.items():
        setattr(progress, key, Ledger(**value) if key == "ledger" else value)
    if run.place.first:
        folder.rewind("metrics.jsonl", step)
        folder.rewind("scores.jsonl", progress.evaluations[-1]["step"])
    run.place.wait()
    report.note(f"resumed after update {step}")
    return step

