"""The loop: on-policy prefix distillation (arXiv 2602.15260), one update a turn. Loads nothing, parses nothing."""

import contextlib
import dataclasses
import math

import torch
from torch.nn.parallel import DistributedDataParallel

from . import data, evaluate, scoring
from .checkpoint import RunFolder
from .divergence import weighted
from .errors import Stopped
from .flops import Ledger
from .models import Model, decoder, refresh, save
from .preflight import Run
from .rollout import Request, Rollout, generate
from .runtime import Clock
from .schedule import learning_rate, warmup_steps
from .weights import token_weights

HEAD_TOKENS = 64  # the training KL of the first tokens, comparable while a prefix grows


class StudentLoss(torch.nn.Module):
    """What DDP wraps: the student reads a micro-batch and its weighted divergence from the teacher comes out."""

    def __init__(self, run: Run):
        super().__init__()
        self.net, self.run = run.student.net, run

    def forward(self, rollouts: list[Rollout], teacher_NE: torch.Tensor, weight_N: torch.Tensor):
        run = self.run
        with run.place.autocast(run.place.device):
            student_ND = scoring.hidden_rows(run.student, rollouts)
        return weighted(run.terms, student_ND, run.student.head(run.support), teacher_NE, run.teacher.head(run.support),
                        weight_N.to(student_ND.device))


@dataclasses.dataclass
class Progress:
    """What the checkpoint carries beside tensors; all of it plain numbers."""

    step: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    seconds: dict = dataclasses.field(default_factory=dict)
    tokens: int = 0
    evaluations: list = dataclasses.field(default_factory=list)  # a row per evaluation, the untrained student's first
    best: dict | None = None


def train(run: Run, folder: RunFolder, report, resume: bool) -> dict:
    """Runs every update that is left, evaluates before and after, saves the model; returns the result document.

    ``report`` shows progress: ``note(text)``, ``warn(text)``, ``evaluation(row)`` and ``row(metrics, useful FLOPs so far,
    useful FLOPs of as many updates with full rollouts)``.
    """
    config, place = run.config, run.place
    student = run.student.net.requires_grad_(True)
    optimizer = _optimizer(student, config)
    progress = Progress()
    resumed_from = None
    if resume and not folder.started:
        report.note("the run was interrupted before its first checkpoint: it starts from the beginning")
        resume = False
    if resume:
        resumed_from = _restore(run, folder, optimizer, progress, report)
    clock = Clock(place.device, progress.seconds)
    decoding = decoder(run.student, place.dtype)
    if not resume:
        before = _measure_before(run, decoding, progress, clock, folder)
    else:
        before = folder.read_json("before.json")
    fixed = [Rollout(**_tuples(r)) for r in before["rollouts"]]
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
        prefix = run.prefix.length(step)
        prompts = data.batch(run.train_prompts, step, config.train.batch_size, config.runtime.seed)
        rollouts = sample(run, decoding, prompts, step, prefix, ledger, clock)
        weights, share = token_weights(rollouts, config.divergence.reduction)
        divisor = place.total(share)
        values = _accumulate(run, loss_module, rollouts, weights, divisor, ledger, clock)
        facts = _facts(run, rollouts, values, weights, divisor)
        rate = learning_rate(
            step, peak=config.schedule.lr, schedule=config.schedule.lr_schedule, steps=config.train.steps,
            warmup=warmup_steps(config.schedule.warmup, config.train.steps),
        )
        with clock.phase("optimizer"):
            norm = _update(run, folder, optimizer, progress, rate, facts["loss"])
            refresh(decoding, run.student)
        progress.step += 1
        progress.tokens += int(facts["tokens"])
        _merge(run, progress, ledger)
        row = _row(run, progress, facts, prefix, rate, norm, clock, spent_before)
        full += full_cost(run, progress, range(step, step + 1))
        if place.first:
            folder.append_metrics(row)
            report.row(row, progress.ledger.total(), full)
        last = progress.step == config.train.steps
        if config.evaluate.every and progress.step % config.evaluate.every == 0 and not last:
            _evaluate_now(run, decoding, fixed, before, progress, clock, folder, report)
        if (config.checkpoint.save_every and progress.step % config.checkpoint.save_every == 0) or last:
            _save_checkpoint(run, folder, optimizer, progress)

    after = _evaluate_now(run, decoding, fixed, before, progress, clock, folder, report)
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
           clock: Clock) -> list[Rollout]:
    """This rank's rollouts of the update, prompt by prompt with its G samples; sampling stops at ``prefix`` or EOS."""
    slots = range(run.place.rank, len(prompts), run.place.world)
    places = [(slot, s) for slot in slots for s in range(run.config.rollout.samples)]
    responses = generate(
        decoding, [Request(prompts[slot].student_ids, (step, slot, s)) for slot, s in places], prefix, run.sampler,
        lambda reads: ledger.generation(run.student_shape, reads), clock,
    )
    return [
        Rollout(slot, s, prompts[slot].student_ids, prompts[slot].teacher_ids, r.ids, r.ids, r.finished)
        for (slot, s), r in zip(places, responses)
    ]


def _accumulate(run: Run, loss_module, rollouts, weights, divisor, ledger, clock) -> dict[tuple, list[float]]:
    """Gradients of the whole update, micro-batch by micro-batch → (prompt, sample) → per-token divergence, nats.

    The division happens here, once: every weight is divided by the update's divisor. DDP averages gradients over ranks,
    so the weights are multiplied by the number of ranks first. A rank with fewer micro-batches runs empty ones: every
    rank takes part in every reduction.
    """
    place = run.place
    once = run.student.reads_once
    groups = scoring.micro_batches(rollouts, run.config.train.micro_batch_size, once)
    count = max(place.gather(len(groups)))
    values = {}
    for turn in range(count):
        idle = turn >= len(groups)
        group = groups[0] if idle else groups[turn]
        lengths = [len(r.ids) for r in group]
        weight_N = torch.tensor([w for r in group for w in weights[r.prompt, r.sample]], dtype=torch.float64)
        weight_N = (weight_N * (0.0 if idle else place.world / divisor)).float()
        with clock.phase("teacher_score"), torch.no_grad(), place.autocast(place.teacher_device):
            teacher_NE = scoring.hidden_rows(run.teacher, group, teacher=True)
        ledger.forward("teacher_score", run.teacher_shape, scoring.reads(group, run.teacher.reads_once, teacher=True),
                       idle=idle)
        gradients_meet = place.world == 1 or turn == count - 1
        with clock.phase("student_update"), contextlib.nullcontext() if gradients_meet else loss_module.no_sync():
            loss, value_N = loss_module(group, teacher_NE, weight_N)
            loss.backward()
        ledger.forward("student_update", run.student_shape, scoring.reads(group, once), passes=3, idle=idle,
                       recomputed=run.student.recomputes)
        for rollout, part in zip(group, value_N.split(lengths)):
            values[rollout.prompt, rollout.sample] = part.tolist()
    return values


def _facts(run: Run, rollouts, values, weights, divisor) -> dict:
    """The update's numbers over all ranks, summed in (prompt, sample) order so that ranks cannot change them."""
    rows = sorted(
        row for part in run.place.gather([
            ((r.prompt, r.sample), math.fsum(values[r.prompt, r.sample]), len(r.ids),
             math.fsum(values[r.prompt, r.sample][:HEAD_TOKENS]), min(HEAD_TOKENS, len(r.ids)), r.finished,
             math.fsum(w * v for w, v in zip(weights[r.prompt, r.sample], values[r.prompt, r.sample])))
            for r in rollouts
        ]) for row in part
    )
    tokens = sum(row[2] for row in rows)
    return {
        "loss": math.fsum(row[6] for row in rows) / divisor,
        "divergence": math.fsum(row[1] for row in rows) / tokens,
        "head": math.fsum(row[3] for row in rows) / sum(row[4] for row in rows),
        "finished": sum(row[5] for row in rows) / len(rows),
        "tokens": tokens,
    }


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


def _measure_before(run: Run, decoding: Model, progress: Progress, clock: Clock, folder: RunFolder) -> dict:
    """Draws the fixed held-out rollouts from the untrained student and measures it on them: the "before" of every later
    comparison, kept in before.json."""
    ledger = Ledger()
    with clock.phase("evaluation"):
        fixed = _full_rollouts(run, decoding, ledger)
    _merge(run, progress, ledger)
    found = _measure(run, decoding, fixed, fixed, progress, clock, folder)
    records = found.pop("records")
    before = {**found, "rollouts": [dataclasses.asdict(r) for r in fixed]}
    if run.place.first:
        folder.write_json("before.json", before)
        folder.write_rows("examples-before.jsonl", records)
    return before


def _evaluate_now(run: Run, decoding, fixed, before, progress, clock, folder, report) -> dict:
    """Measures the current student and says so when its tail is being hurt."""
    found = _measure(run, decoding, fixed, None, progress, clock, folder)
    if run.place.first:
        report.evaluation(progress.evaluations[-1])
        if text := tail_warning(before, found, run.prefix.length(max(0, progress.step - 1))):
            report.warn(text)
    return found


def _measure(run: Run, decoding: Model, fixed, full, progress: Progress, clock: Clock, folder: RunFolder) -> dict:
    """Accuracy on the held-out problems and reverse KL on the fixed contexts, now; keeps the best student.

    Where no problem is evaluated, the length and endings of full answers come from ``full``, drawn now if None.
    """
    ledger = Ledger()
    with clock.phase("evaluation"):
        values = evaluate.held_out_kl(run.student, run.teacher, run.support, fixed, run.place,
                                      run.config.train.micro_batch_size, _scoring_spent(run, ledger))
        gap = _sampler_gap(run, decoding, fixed, ledger)
        score = _accuracy(run, decoding, _evaluation_spent(run, ledger))
        if score is None:
            full = full or _full_rollouts(run, decoding, ledger)
            length, finish = sum(len(r.ids) for r in full) / len(full), sum(r.finished for r in full) / len(full)
        else:
            length, finish = score.mean_tokens, score.finish_rate
    _merge(run, progress, ledger)
    head, tail = evaluate.split_mean(values, run.prefix.length(max(0, progress.step - 1)))
    row = {
        "step": progress.step, "accuracy": score and score.accuracy, "kl": evaluate.token_mean(values), "kl_prefix": head,
        "kl_tail": tail, "sampler_kl": gap, "finish_rate": finish, "mean_tokens": length, "flops_useful": progress.ledger.total(),
        "flops_executed": progress.ledger.total("executed"),
    }
    if not progress.evaluations or progress.evaluations[-1]["step"] != progress.step:
        progress.evaluations.append(row)
    _keep_best(run, folder, progress, row)
    return {**row, "kl_by_token": values, "records": score.records if score else []}


def _sampler_gap(run: Run, decoding: Model, fixed, ledger: Ledger) -> float | None:
    """KL(sampler‖student) in nats per token on the fixed contexts, where rollouts come from a copy in another dtype: how far
    from on-policy that makes them. None where the student itself samples."""
    if decoding.net.dtype == run.student.net.dtype:
        return None
    own = [dataclasses.replace(r, teacher_prompt=r.student_prompt, teacher_ids=r.ids) for r in fixed]
    values = evaluate.held_out_kl(
        decoding, run.student, run.support, own, run.place, run.config.train.micro_batch_size,
        lambda group: ledger.forward("evaluation", run.student_shape, scoring.reads(group, run.student.reads_once), passes=2))
    return evaluate.token_mean(values)["value"]


def _full_rollouts(run: Run, decoding: Model, ledger: Ledger) -> list[Rollout]:
    return evaluate.fixed_rollouts(decoding, run.kl_prompts, run.eval_sampler, run.config.rollout.max_new_tokens, run.place,
                                   _evaluation_spent(run, ledger))


def tail_warning(before: dict, found: dict, prefix: int) -> str | None:
    """One line when training has hurt what lies beyond the prefix: its KL on the fixed contexts rose by more than two
    standard errors (paired by rollout), or answers end less often (by more than 5 points); else None."""
    gaps = [
        math.fsum(new[prefix:]) / len(new[prefix:]) - math.fsum(old[prefix:]) / len(old[prefix:])
        for new, old in zip(found["kl_by_token"], before["kl_by_token"]) if len(new) > prefix
    ]
    said = []
    if len(gaps) > 1:
        mean = math.fsum(gaps) / len(gaps)
        error = math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
        if mean > 2 * error and mean > 1e-3:
            said.append(f"the KL beyond the prefix rose by {mean:.3g} ± {error:.1g} nats per token")
    if found["finish_rate"] < before["finish_rate"] - 0.05:
        said.append(f"answers end less often ({before['finish_rate']:.0%} → {found['finish_rate']:.0%})")
    if not said:
        return None
    head_before, _ = evaluate.split_mean(before["kl_by_token"], prefix)
    head_after, _ = evaluate.split_mean(found["kl_by_token"], prefix)
    exhausted = f"; the prefix has little left to teach ({head_before:.2g} → {head_after:.2g} nats)" if (
        head_after < 0.1 * head_before) else ""
    return (f"after update {found['step']} the tail is being hurt: {' and '.join(said)}{exhausted}; "
            "lengthen --prefix, lower --lr or stop earlier")


def _accuracy(run: Run, decoding: Model, spent):
    if not run.problems:
        return None
    return evaluate.evaluate(
        decoding, run.problems, run.eval_sampler, samples=run.config.evaluate.rollouts,
        max_new_tokens=run.config.rollout.max_new_tokens, answer_format=run.answer_format, place=run.place, spent=spent,
    )


def _keep_best(run: Run, folder: RunFolder, progress: Progress, row: dict) -> None:
    """Keeps the best student seen so far in best/, by accuracy where there are answers, else by held-out KL."""
    if not run.config.evaluate.every:
        return
    merit = row["accuracy"]["value"] if row["accuracy"] else -row["kl"]["value"]
    if progress.best is None or merit > progress.best["merit"]:
        progress.best = {"step": progress.step, "merit": merit, "accuracy": row["accuracy"], "kl": row["kl"]}
        if run.place.first:
            save(run.student, folder.best)


def _merge(run: Run, progress: Progress, ledger: Ledger) -> None:
    """Adds every rank's ledger to the run's."""
    for other in run.place.gather(ledger):
        progress.ledger.merge(other)


def _evaluation_spent(run: Run, ledger: Ledger):
    return lambda reads: ledger.generation(run.student_shape, reads, "evaluation", "evaluation")


def _scoring_spent(run: Run, ledger: Ledger):
    def spent(group):
        ledger.forward("evaluation", run.student_shape, scoring.reads(group, run.student.reads_once))
        ledger.forward("evaluation", run.teacher_shape, scoring.reads(group, run.teacher.reads_once, teacher=True))

    return spent


def full_cost(run: Run, progress: Progress, steps: range) -> float:
    """Useful FLOPs the updates in ``steps`` would have cost with full rollouts of the then-current student.

    Its full length is measured at every evaluation and taken as linear in between; after the last, as constant.
    """
    config, total = run.config, 0.0
    for step in steps:
        prompts = data.batch(run.train_prompts, step, config.train.batch_size, config.runtime.seed)
        total += run.update_cost(prompts, _length_at(progress.evaluations, step))
    return total


def _length_at(evaluations: list[dict], step: int) -> float:
    points = [(row["step"], row["mean_tokens"]) for row in evaluations]
    for (left, low), (right, high) in zip(points, points[1:]):
        if left <= step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


def _row(run: Run, progress: Progress, facts, prefix, rate, norm, clock, spent_before) -> dict:
    seconds = {k: v - spent_before.get(k, 0.0) for k, v in clock.seconds.items() if k != "evaluation"}
    row = {
        "step": progress.step, f"loss/{run.terms.name.replace('-', '_')}_nats": facts["divergence"],
        f"loss/first_{HEAD_TOKENS}_tokens_nats": facts["head"], "loss/objective": facts["loss"],
        "rollout/prefix_tokens": prefix, "rollout/taught_tokens": facts["tokens"],
        "rollout/finished_share": facts["finished"], "optimizer/learning_rate": rate, "optimizer/gradient_norm": norm,
    }
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
        "kl_after": last["kl"], "sampler_kl": last["sampler_kl"], "tokens": progress.tokens, "flops": progress.ledger.summary(),
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
        folder.rewind_metrics(step)
    run.place.wait()
    report.note(f"resumed after update {step}")
    return step


def _tuples(row: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
