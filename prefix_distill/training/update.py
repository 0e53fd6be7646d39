"""One update: sample, select, accumulate gradients, step."""

import contextlib
import functools
import math
from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..engine import scoring
from ..engine.device import Clock
from ..engine.models import Model
from ..engine.rollout import Rollout
from ..engine.sampling import Request, Response, generate
from ..engine.scoring import Reading
from ..errors import Stopped
from ..maths import simct
from ..maths.flops import Ledger, Passes
from ..maths.fused import weighted
from ..maths.weights import choose, keep, scale
from ..prompts.prompt import Rendered
from . import teacher_text
from .folder import RunFolder
from .run import Run
from .selection import choose_terms, measure_tokens, read_teacher, split_micro_batches
from .state import Progress, stop_run
from .teacher_text import TeacherText

# (prompt, sample) → one number per taught token
PerToken = dict[tuple[int, int], list[float]]


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
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss and its values; a zero loss that touches every parameter if ``rollouts``
        is None.

        ``student_ND``: hidden rows of an earlier forward pass. ``teacher_NE``: None if the loss
        needs no teacher.
        """
        run = self.run
        if rollouts is None or weight_N is None:
            return self._touch_parameters()
        if student_ND is None:
            with run.place.autocast(run.place.device):
                student_ND = scoring.hidden_rows(run.student, rollouts)
        terms, heads = choose_terms(run, rollouts), (run.student.head(), run.teacher.head())
        if run.shared is not None and teacher_NE is not None and rollouts[0].units is not None:
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
            _sampler_logp(rollouts),
        )

    def _touch_parameters(self) -> torch.Tensor:
        """Return a zero loss that touches every parameter, so that DDP all-reduces."""
        run = self.run
        with run.place.autocast(run.place.device):
            hidden_ND = run.student.trunk(
                torch.zeros(1, 1, dtype=torch.long, device=run.place.device)
            )[0]
        head = run.student.head()
        logits_NV = torch.nn.functional.linear(
            hidden_ND.to(head.weight_VD.dtype), head.weight_VD, head.bias_V
        )
        return 0 * logits_NV.sum()


def _sampler_logp(rollouts: list[Rollout]) -> torch.Tensor | None:
    """Return the log-probability of each taught token when it was sampled; None if not recorded."""
    logp: list[float] = []
    for r in rollouts:
        if r.sampler_logp is None:
            return None
        logp += [r.sampler_logp[t] for t in r.taught]
    return torch.tensor(logp)


def sample(  # noqa: PLR0913  becomes a method of `Update`, which will own these
    run: Run,
    decoding: Model,
    prompts: list[Rendered],
    step: int,
    prefix: int,
    ledger: Ledger,
    clock: Clock,
    texts: dict[tuple[int, int], TeacherText] | None = None,
) -> list[Rollout]:
    """This rank's rollouts of the update, prompt by prompt with its G samples; sampling stops at
    ``prefix`` or EOS.

    Rollouts that --off-policy gives to the teacher come from ``texts`` ((prompt index, sample) →
    its text), cut at ``prefix``. Across tokenizers they have units; Stopped where no rollout of any
    rank has one.
    """
    places, own = _assign_writers(run, step, len(prompts))
    requests = [Request(prompts[slot].student_ids, (step, slot, s)) for slot, s in own]

    def draw(spent: Ledger) -> list[Response]:
        count = functools.partial(spent.generation, run.student_shape)
        return generate(decoding, requests, prefix, run.sampler, count, clock)

    responses = run.fit("rows", ledger, draw) if own else []
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
        for (slot, s), r in zip(own, responses, strict=True)
    ]
    texts = texts or {}
    with clock.phase("alignment") if run.alignment is not None else contextlib.nullcontext():
        found = {(r.prompt, r.sample): r for r in run.aligned(drawn)}
        for slot, s in places:
            if (slot, s) not in found:
                prompt = prompts[slot]
                text = texts[prompt.prompt.index, s]
                found[slot, s] = teacher_text.rollout(run, (slot, s), prompt, text, prefix)
    rollouts = [found[place] for place in places]
    if run.alignment is not None and not run.place.total(sum(len(r.taught) for r in rollouts)):
        raise Stopped(
            f"update {step + 1}: no unit of text is common to both tokenizations of its rollouts, "
            "so there is nothing to teach; lengthen --prefix"
        )
    return rollouts


def _assign_writers(
    run: Run, step: int, prompts: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (slot, sample) of all rollouts of this rank, and of those that the student samples."""
    samples = run.config.rollout.samples
    slots = range(run.place.rank, prompts, run.place.world)
    teachers: frozenset[int] = frozenset()
    if run.off_policy:
        teachers = run.off_policy.rows(step, prompts * samples, run.config.runtime.seed)
    places = [(slot, s) for slot in slots for s in range(samples)]
    return places, [(slot, s) for slot, s in places if slot * samples + s not in teachers]


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
    facts, reading = measure_tokens(run, rollouts, ledger, clock)
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
        if any(part[0] for part in parts):
            entropies, divergences = ([v for part in parts for v in part[i]] for i in (0, 1))
            at = scale(entropies, divergences)
    return choose(selection, rollouts, key, facts, at), reading


def accumulate_gradients(  # noqa: PLR0913  becomes a method of `Update`, which will own these
    run: Run,
    loss_module: torch.nn.Module,
    rollouts: list[Rollout],
    weights: PerToken,
    divisor: float,
    ledger: Ledger,
    clock: Clock,
    reading: Reading | None = None,
) -> tuple[PerToken, PerToken]:
    """Gradients of the whole update, micro-batch by micro-batch → (prompt, sample) → per-token
    divergence, nats; and with --clip, → the teacher's mass on clipped entries.

    The division happens here, once: every weight is divided by the update's divisor. DDP averages
    gradients over ranks, so the weights are multiplied by the number of ranks first. Ranks may have
    any number of micro-batches, or none: each gathers its gradients by itself, and they meet once,
    in a turn that teaches nothing. With a ``reading``, nothing is read again. Where memory runs out
    on any rank, all start anew with half the micro-batch.
    """
    gather = functools.partial(_gather_gradients, run, loss_module, rollouts, weights, divisor)
    found = run.attempt(ledger, functools.partial(gather, clock=clock, reading=reading))
    while found is None:
        loss_module.zero_grad(set_to_none=True)
        reading = None
        found = run.attempt(ledger, functools.partial(gather, clock=clock, reading=None))
    if run.place.world > 1:
        with clock.phase("student_update"), run.place.meeting():
            loss_module(None).backward()
        ledger.forward(
            "student_update",
            run.student_shape,
            [(1, [1])],
            taught=1,
            passes=Passes(count=3, idle=True, recomputed=run.student.recomputes),
        )
    return found


def _gather_gradients(  # noqa: PLR0913  becomes a method of `Update`, which will own these
    run: Run,
    loss_module: torch.nn.Module,
    rollouts: list[Rollout],
    weights: PerToken,
    divisor: float,
    ledger: Ledger,
    clock: Clock,
    reading: Reading | None,
) -> tuple[PerToken, PerToken]:
    """Accumulate the gradients of this rank; see ``accumulate_gradients``."""
    named = {(r.prompt, r.sample): r for r in rollouts}
    groups = (
        split_micro_batches(run, rollouts)
        if reading is None
        else [[named[r.prompt, r.sample] for r in reading.rollouts]]
    )
    values: PerToken = {}
    clipped: PerToken = {}
    for group in groups:
        lengths = [len(r.taught) for r in group]
        weight_N = torch.tensor(
            [w for r in group for w in weights[r.prompt, r.sample]], dtype=torch.float64
        )
        weight_N = (weight_N * (run.place.world / divisor)).float()
        read, student_ND, teacher_NE = group, None, None
        if reading is not None:
            read, (student_ND, teacher_NE) = reading.rollouts, reading.only(group)
        elif choose_terms(run, group).taught_by == "teacher":
            teacher_NE = read_teacher(run, group, clock)
        if teacher_NE is not None:
            ledger.forward(
                "teacher_score",
                run.teacher_shape,
                scoring.reads(read, run.teacher.reads_once, teacher=True),
                taught=scoring.head_rows(run.teacher, group, run.shared, teacher=True),
            )
        with clock.phase("student_update"), _without_all_reduce(loss_module):
            loss, value_N, clipped_N = loss_module(group, teacher_NE, weight_N, student_ND)
            loss.backward()
        _count_student_update(run, group, read, ledger)
        for found, column in ((values, value_N), (clipped, clipped_N)):
            if column is not None:
                found |= {
                    (r.prompt, r.sample): part.tolist()
                    for r, part in zip(group, column.split(lengths), strict=True)
                }
    return values, clipped


def _without_all_reduce(
    loss_module: torch.nn.Module,
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which DDP does not all-reduce the gradients."""
    if isinstance(loss_module, DistributedDataParallel):
        return loss_module.no_sync()
    return contextlib.nullcontext()


def _count_student_update(
    run: Run, group: list[Rollout], read: list[Rollout], ledger: Ledger
) -> None:
    """Add a micro-batch to the ledger. ``read``: the same rollouts with the tokens that were taught
    at the forward pass."""
    shared = None if group[0].units is None else run.shared
    ledger.forward(
        "student_update",
        run.student_shape,
        scoring.reads(read, run.student.reads_once),
        taught=scoring.head_rows(run.student, group, shared, teacher=False),
        passes=Passes(count=3, recomputed=run.student.recomputes),
    )
    if shared is not None:  # tokens of spans are projected once more
        again = run.student_shape.output(
            sum(u.size for r in group for u in r.taught_units if not u.exact)
        )
        ledger.add("student_update", again, again)


def apply_update(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: dict[str, torch.Tensor],
    progress: Progress,
    rate: float,
) -> float:
    """Clip, check, step. A gradient that is not finite stops the run before it reaches a weight."""
    trained = run.student.trained
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    if missing := [name for name in trained if name not in gradients]:
        raise Stopped(
            f"update {progress.step + 1}: parameter {missing[0]} received no gradient; this "
            "architecture is not supported"
        )
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    if not math.isfinite(norm):
        bad = next(
            (f"gradient of {name}" for name, g in gradients.items() if not torch.isfinite(g).all()),
            "gradient's norm",
        )
        stop_run(run, folder, optimizer, anchor, progress, f"the {bad} is not finite")
    if run.config.train.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(
            list(trained.values()), run.config.train.grad_clip, torch.tensor(norm)
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_optimizer(trained: Iterable[torch.nn.Parameter], config: Config) -> torch.optim.AdamW:
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
