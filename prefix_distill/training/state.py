"""Progress of a run: save, restore, stop."""

import dataclasses
import math
from typing import NoReturn

import torch

from ..display import Reporter
from ..engine import scoring
from ..engine.ranks import Interrupt
from ..engine.rollout import Rollout
from ..errors import Interrupted, Stopped, UserError
from ..maths.flops import Ledger
from .folder import RunFolder
from .run import Run

Tensors = dict[str, torch.Tensor]  # parameter name → tensor


@dataclasses.dataclass
class Progress:
    """What the checkpoint carries beside tensors; all of it plain numbers."""

    step: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    seconds: dict = dataclasses.field(default_factory=dict)
    tokens: int = 0
    prefix: dict = dataclasses.field(default_factory=dict)  # the state of the prefix schedule
    taught_prefix: int = 0  # prefix length of the last update (before any: of the first)
    decisions: list = dataclasses.field(
        default_factory=list
    )  # {step, reason} of every growth of the prefix
    evaluations: list = dataclasses.field(
        default_factory=list
    )  # a row per evaluation, the untrained student's first
    tail_probes: list = dataclasses.field(default_factory=list)
    extrapolations: list = dataclasses.field(default_factory=list)  # a row per trigger
    warnings: list = dataclasses.field(default_factory=list)  # {step, text}: the tail is being hurt
    best: dict | None = None
    fitted: dict = dataclasses.field(
        default_factory=dict
    )  # micro_batch_size and rows, where memory made them smaller

    def training_seconds(self) -> float:
        """Wall time but for evaluations."""
        return math.fsum(v for phase, v in self.seconds.items() if phase != "evaluation")


def stop_run(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    progress: Progress,
    reason: str,
) -> NoReturn:
    """Ends the run before an update that would do harm, with the state so far saved if it is
    good."""
    optimizer.zero_grad(set_to_none=True)
    save_checkpoint(run, folder, optimizer, anchor, progress)  # or Stopped, with the state that is
    raise Stopped(
        f"update {progress.step + 1}: {reason}; nothing was changed, the state after update "
        f"{progress.step} is saved in {folder.path}: lower --lr or use --dtype float32, then "
        "--resume"
    )


def stop_if_asked(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """A safe point: if any rank was asked to stop, all save and are Interrupted."""
    asked = next(filter(None, run.place.gather(interrupt.asked)), None)
    if asked is not None:
        save_checkpoint(run, folder, optimizer, anchor, progress)
        raise Interrupted(
            f"interrupted ({asked.name}) after update {progress.step}, with the state saved: "
            f"prefix-distill run --resume --out {folder.path} goes on from there",
            asked,
        )


def refuse_non_finite(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    progress: Progress,
    rollouts: list[Rollout],
    values: dict[tuple[int, int], list[float]],
) -> None:
    """Raise Stopped on all ranks if any rank has a non-finite token divergence; name the cause and
    the last intact state."""
    reasons = run.place.gather(_describe_non_finite(run, rollouts, values))
    reason = next(filter(None, reasons), None)
    if reason is not None:
        stop_run(run, folder, optimizer, anchor, progress, reason)


def _describe_non_finite(
    run: Run, rollouts: list[Rollout], values: dict[tuple[int, int], list[float]]
) -> str | None:
    """Describe this rank's first non-finite divergence; None if all are finite."""
    for r in rollouts:
        for token, value in zip(r.taught, values[r.prompt, r.sample], strict=True):
            if not math.isfinite(value):
                return (
                    f"the divergence of prompt slot {r.prompt}, sample {r.sample}, "
                    f"token {token} is {value}: {_find_non_finite(run, r)} not finite"
                )
    return None


@torch.no_grad()
def _find_non_finite(run: Run, rollout: Rollout) -> str:
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


def compare_ranks(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Stopped where the ranks' weights differ."""
    trained: Tensors = dict(run.student.trained)
    differing = run.place.differing(trained)
    if differing is not None:
        rank, name = differing
        raise Stopped(
            f"after update {progress.step} the weights of rank {rank} are not those of rank 0 (the "
            f"first: {name}); nothing of this is saved, {folder.newest}: check that machine, then "
            "--resume"
        )


def save_checkpoint(
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    progress: Progress,
) -> None:
    """Saves the state, if it is finite and the same on all ranks; else Stopped."""
    compare_ranks(run, folder, progress)
    names: dict[torch.Tensor, str] = {p: name for name, p in run.student.trained.items()}
    if bad := next((name for p, name in names.items() if not torch.isfinite(p).all()), None):
        raise Stopped(
            f"after update {progress.step} the student's weight {bad} is not finite; it is not "
            f"saved, {folder.newest}: lower --lr or use --dtype float32, then --resume"
        )
    if run.place.first:
        moments = {
            f"{key}/{names[p]}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        tensors: dict[str, Tensors] = {
            "student": {name: p for p, name in names.items()},
            "optimizer": moments,
        }
        if anchor:
            tensors["anchor"] = anchor
        if run.config.models.teacher_ema is not None:
            tensors["teacher"] = dict(run.teacher.net.named_parameters())
        folder.save(progress.step, tensors, dataclasses.asdict(progress) | {"fitted": run.fitted})
    run.place.wait()


def restore_checkpoint(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    folder: RunFolder,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    progress: Progress,
    report: Reporter,
) -> int:
    """Weights, optimizer moments, anchor, averaged teacher and progress of the newest
    checkpoint; metric rows are rewound to it."""
    place = run.place
    step, tensors, facts = folder.latest(report.warn if place.first else lambda text: None)
    shapes = [
        {name: p.shape for name, p in named}
        for named in (run.student.trained.items(), tensors.get("student", {}).items())
    ]
    if shapes[0] != shapes[1] or "optimizer" not in tensors:
        raise UserError(
            f"--resume {folder.path}: the weights of its checkpoint are not those of "
            f"{run.student.name}; put that model back, or start anew with another --out"
        )
    _restore_tensors(run, optimizer, anchor, tensors)
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
        text = (
            f"{was} rank{'s' * (was > 1)} before, {place.world} now: the same prompts, seeds and "
            "decisions; sums are rounded in another order"
        )
        if place.dtype == torch.float32:
            report.note(text)
        else:
            name = str(place.dtype)[6:]
            report.warn(f"{text}, and in {name} that can change which tokens are sampled")
    return step


@torch.no_grad()
def _restore_tensors(
    run: Run,
    optimizer: torch.optim.Optimizer,
    anchor: Tensors,
    tensors: dict[str, Tensors],
) -> None:
    """Copy a checkpoint's tensors into the run's networks, optimizer and anchor."""
    for name, p in run.student.trained.items():
        p.copy_(tensors["student"][name])
        found = {
            key.split("/", 1)[0]: value
            for key, value in tensors["optimizer"].items()
            if key.split("/", 1)[1] == name
        }
        if found:
            optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
    if "teacher" in tensors:
        for name, p in run.teacher.net.named_parameters():
            p.copy_(tensors["teacher"][name])
    for name, t in anchor.items():
        t.copy_(tensors["anchor"][name])
