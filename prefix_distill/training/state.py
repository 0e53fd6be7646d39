"""State: everything that changes while a run trains, and its checkpoints."""

import dataclasses
import math
from typing import NoReturn

import torch

from ..display import SAVING, Reporter, phase
from ..engine.decoder import make_decoder
from ..engine.device import Clock
from ..engine.masters import Masters
from ..engine.meter import Meter
from ..engine.models import (
    Model,
    average_teacher,
    extrapolated_parameters,
)
from ..errors import Stopped, UserError
from ..maths import extrapolation
from ..maths.flops import Ledger
from .folder import RunFolder
from .loss import make_loss
from .optimizer import make_optimizer
from .run import Run

Tensors = dict[str, torch.Tensor]  # parameter name → tensor


@dataclasses.dataclass(kw_only=True)
class Progress:
    """The JSON values of a checkpoint.

    ``step``: completed steps; ``seconds``: wall time by phase; ``tokens``: taught tokens;
    ``prefix``: the state of the prefix schedule; ``taught_prefix``: the prefix of the last step,
    or at step 0 that of the first; ``decisions``: {step, reason} of every growth of the prefix;
    ``evaluations``, ``tail_probes``, ``extrapolations``: a row each; ``warnings``: {step, text};
    ``best``: the best student so far; ``fitted``: memory limits that were lowered.
    """

    step: int = 0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    seconds: dict = dataclasses.field(default_factory=dict)
    tokens: int = 0
    prefix: dict = dataclasses.field(default_factory=dict)
    taught_prefix: int = 0
    decisions: list = dataclasses.field(default_factory=list)
    evaluations: list = dataclasses.field(default_factory=list)
    tail_probes: list = dataclasses.field(default_factory=list)
    extrapolations: list = dataclasses.field(default_factory=list)
    warnings: list = dataclasses.field(default_factory=list)
    best: dict | None = None
    fitted: dict = dataclasses.field(default_factory=dict)

    def training_seconds(self) -> float:
        """Return the wall time without evaluations."""
        return math.fsum(v for phase, v in self.seconds.items() if phase != "evaluation")


class State:
    """Everything that changes while a run trains, and where it is saved.

    ``run.pair.student`` has the master weights, which the optimizer steps. ``masters`` keeps the
    models that compute equal to them; ``pair``: the run's pair with the student that scores and
    trains; ``decoding``: the student that samples. ``moving``: the parameters that EffOPD
    extrapolates; ``anchor``: their values at the last extrapolation; ``initial``: their values
    before the first step, for diagnostics.
    """

    def __init__(self, run: Run, folder: RunFolder, report: Reporter):
        self.run = run
        self.folder = folder
        self.report = report
        run.limits.report = self.warn_on_this_rank
        student = run.pair.student
        if student.adapter is None:
            student.train_weights()
        self.optimizer = make_optimizer(student.trainable.values(), run.config)
        self.progress = Progress(taught_prefix=run.method.prefix.length(0))
        self.clock = Clock(device=run.place.device, seconds=self.progress.seconds)
        settings = run.config.extrapolation
        self.moving: dict[str, torch.nn.Parameter] = {}
        if settings.kind != "none" or settings.diagnostics:
            self.moving = extrapolated_parameters(student.net, settings.modules)
        self.anchor = extrapolation.snapshot(self.moving)
        self.initial: Tensors = {}
        if settings.diagnostics:
            self.initial = extrapolation.snapshot(self.moving)
        self.masters = Masters(student, run.place.dtype)
        self.pair = dataclasses.replace(run.pair, student=self.masters.student)
        self.decoding = make_decoder(self.masters.sampler, run.place.dtype)
        self.loss = make_loss(run, self.masters)

    @property
    def step(self) -> int:
        """Return the number of completed steps."""
        return self.progress.step

    def warn(self, text: str) -> None:
        """Report a warning and keep it for the result, each text once."""
        if self._keep_warning(text):
            self.report.warn(text)

    def warn_on_this_rank(self, text: str) -> None:
        """Report a warning of this rank alone and keep it, each text once."""
        if self._keep_warning(text):
            self.report.warn_on_this_rank(text)

    def _keep_warning(self, text: str) -> bool:
        """Add a warning to the progress; return whether it is new."""
        kept = self.progress.warnings
        if text in [warning["text"] for warning in kept]:
            return False
        kept.append({"step": self.step, "text": text})
        return True

    def meter(self) -> Meter:
        """Return the run's clock with an empty ledger, for one piece of work."""
        return Meter(self.clock)

    def count(self, meter: Meter) -> None:
        """Add the ledgers of all ranks to the run's."""
        for ledger in self.run.place.gather(meter.ledger):
            self.progress.ledger.merge(ledger)

    def refresh_copies(self) -> None:
        """Copy the student's new weights to the working copy, and average them into the teacher.

        The teacher changes only with --teacher-ema.
        """
        self.masters.refresh()
        share = self.run.config.models.teacher_ema
        if share is not None:
            average_teacher(self.run.pair.teacher, self.run.pair.student, share)

    def compare_ranks(self) -> None:
        """Raise Stopped on all ranks if their weights differ."""
        trained: Tensors = dict(self.run.pair.student.trainable)
        differing = self.run.place.find_difference(trained)
        if differing is not None:
            rank, name = differing
            raise Stopped(
                f"after step {self.step} the weights of rank {rank} differ from those of rank 0 "
                f"(first: {name}); this state is not saved, "
                f"{self.folder.newest_checkpoint_text}; check that machine, then --resume"
            )

    def stop(self, reason: str) -> NoReturn:
        """Save the state before a step that would damage it, and raise Stopped."""
        self.optimizer.zero_grad(set_to_none=True)
        self.save()
        raise Stopped(
            f"step {self.step + 1}: {reason}; no weight was changed, and the state after step "
            f"{self.step} is saved in {self.folder.path}; lower --lr or use --dtype float32, then "
            "--resume"
        )

    @phase(SAVING, at_stop="finishing this save")
    def save(self) -> None:
        """Write a checkpoint. Stopped: a weight is not finite, or the ranks differ."""
        run, progress = self.run, self.progress
        self.compare_ranks()
        trained = run.pair.student.trainable
        for name, p in trained.items():
            if not torch.isfinite(p).all():
                raise Stopped(
                    f"after step {self.step} the student's weight {name} is not finite; this "
                    f"state is not saved, {self.folder.newest_checkpoint_text}; lower --lr or use "
                    "--dtype float32, then --resume"
                )
        if run.place.is_first:
            facts = dataclasses.asdict(progress) | {"fitted": run.limits.lowered}
            self.folder.save_checkpoint(self.step, self._tensors(), facts)
        run.place.barrier()

    def _tensors(self) -> dict[str, Tensors]:
        """Return the tensors of a checkpoint by file."""
        trained = self.run.pair.student.trainable
        names: dict[torch.Tensor, str] = {p: name for name, p in trained.items()}
        moments: Tensors = {}
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                moments[f"{key}/{names[p]}"] = value
        tensors: dict[str, Tensors] = {"student": dict(trained), "optimizer": moments}
        if self.anchor:
            tensors["anchor"] = self.anchor
        if self.run.config.models.teacher_ema is not None:
            tensors["teacher"] = dict(self.run.pair.teacher.net.named_parameters())
        return tensors

    def restore(self) -> int:
        """Restore the newest intact checkpoint and rewind the metric rows to it; return its step.

        UserError: its weights belong to another model.
        """
        place, folder = self.run.place, self.folder
        damages: list[str] = []
        step, tensors, facts = folder.read_latest_checkpoint(damages.append)
        check_shapes(folder, self.run.pair.student, tensors)
        self._copy_tensors(tensors)
        for key, value in facts.items():
            setattr(self.progress, key, value)
        for text in damages:
            self.warn(text)
        self.progress.ledger = Ledger(**facts["ledger"])
        self.clock.seconds = self.progress.seconds
        self.run.limits.restore(self.progress.fitted)
        self.masters.refresh()
        ranks_before = folder.read_json("run.json").get("ranks", place.world)
        place.barrier()  # every rank has read before the first one writes
        if place.is_first:
            folder.prune(step)
            rows = folder.rewind("metrics.jsonl", step, self.warn)
            missing = set(range(1, step + 1)) - {row["step"] for row in rows}
            if missing:
                self.warn(
                    f"metrics.jsonl: the rows of {len(missing)} earlier steps are missing (the "
                    f"first: {min(missing)}); the run does not need them, but reports lack them"
                )
            evaluated = self.progress.evaluations[-1]["step"]
            folder.rewind("scores.jsonl", evaluated, self.warn)
            for name, last in (("samples.jsonl", evaluated), ("rollouts.jsonl", step)):
                if (folder.path / name).is_file():
                    folder.rewind(name, last, self.warn)
            folder.write_json("run.json", {**folder.read_json("run.json"), "ranks": place.world})
        place.barrier()
        self.report.note(f"resumed after step {step}")
        if ranks_before != place.world:
            self._report_rank_count(ranks_before)
        return step

    @torch.no_grad()
    def _copy_tensors(self, tensors: dict[str, Tensors]) -> None:
        """Copy a checkpoint's tensors into the networks, the optimizer and the anchor."""
        moments: dict[str, Tensors] = {}
        for key, value in tensors["optimizer"].items():
            kind, name = key.split("/", 1)
            moments.setdefault(name, {})[kind] = value
        for name, p in self.run.pair.student.trainable.items():
            p.copy_(tensors["student"][name])
            if name in moments:
                self.optimizer.state[p] = {k: v.to(p.device) for k, v in moments[name].items()}
        if "teacher" in tensors:
            for name, p in self.run.pair.teacher.net.named_parameters():
                p.copy_(tensors["teacher"][name])
        for name, t in self.anchor.items():
            t.copy_(tensors["anchor"][name])

    def _report_rank_count(self, before: int) -> None:
        place = self.run.place
        ranks = "rank" if before == 1 else "ranks"
        text = (
            f"{before} {ranks} before, {place.world} now: prompts, seeds and decisions are the "
            "same; only the order of floating-point sums differs"
        )
        if place.dtype == torch.float32:
            self.report.note(text)
        else:
            name = str(place.dtype)[6:]
            self.warn(f"{text}, and in {name} that can change which tokens are sampled")


def check_shapes(folder: RunFolder, student: Model, tensors: dict[str, Tensors]) -> None:
    """Raise UserError unless a checkpoint's weights fit the student."""
    expected = {name: p.shape for name, p in student.trainable.items()}
    got = {name: p.shape for name, p in tensors.get("student", {}).items()}
    if expected != got or "optimizer" not in tensors:
        raise UserError(
            f"--resume {folder.path}: the weights of its checkpoint are not those of "
            f"{student.name}; restore that model, or start again with another --out"
        )
