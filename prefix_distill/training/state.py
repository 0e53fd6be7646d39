"""Progress of a run: save, restore, stop."""

import dataclasses
import math

import torch

from ..display import Reporter
from ..engine.ranks import Interrupt
from ..errors import Interrupted, Stopped, UserError
from ..maths.flops import Ledger
from .folder import RunFolder
from .run import Run


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


def stop_run(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, reason: str
) -> None:
    """Ends the run before an update that would do harm, with the state so far saved if it is
    good."""
    optimizer.zero_grad(set_to_none=True)
    save_checkpoint(run, folder, optimizer, anchor, progress)  # or Stopped, with the state that is
    raise Stopped(
        f"update {progress.step + 1}: {reason}; nothing was changed, the state after update "
        f"{progress.step} is saved in {folder.path}: lower --lr or use --dtype float32, then "
        "--resume"
    )


def stop_if_asked(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, interrupt: Interrupt
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


def compare_ranks(run: Run, folder: RunFolder, progress: Progress) -> None:
    """Stopped where the ranks' weights differ."""
    differing = run.place.differing(run.student.trained)
    if differing is not None:
        rank, name = differing
        raise Stopped(
            f"after update {progress.step} the weights of rank {rank} are not those of rank 0 (the "
            f"first: {name}); nothing of this is saved, {folder.newest}: check that machine, then "
            "--resume"
        )


def save_checkpoint(run: Run, folder: RunFolder, optimizer, anchor, progress: Progress) -> None:
    """Saves the state, if it is finite and the same on all ranks; else Stopped."""
    compare_ranks(run, folder, progress)
    names = {p: name for name, p in run.student.trained.items()}
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
        tensors = {"student": {name: p for p, name in names.items()}, "optimizer": moments}
        if anchor:
            tensors["anchor"] = anchor
        if run.config.models.teacher_ema is not None:
            tensors["teacher"] = dict(run.teacher.net.named_parameters())
        folder.save(progress.step, tensors, dataclasses.asdict(progress) | {"fitted": run.fitted})
    run.place.wait()


def restore_checkpoint(
    run: Run, folder: RunFolder, optimizer, anchor, progress: Progress, report: Reporter
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
            f"{was} rank{'s' * (was > 1)} before, {place.world} now: the same prompts, seeds and "
            "decisions; sums are rounded in another order"
            + (
                ""
                if place.dtype == torch.float32
                else f", and in {str(place.dtype)[6:]} that can change which tokens are sampled"
            )
        )
    return step
