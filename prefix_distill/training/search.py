"""EffOPD in a run: the search along the recent displacement, and its diagnostics."""

import dataclasses
import functools
import math

import torch

from ..display import flops_text, phase
from ..engine import evaluate
from ..engine.meter import Meter
from ..engine.sampling import GenerationCost
from ..maths import extrapolation, intervals
from ..maths.seeds import seed_of
from .monitor import measure_contexts
from .state import State


class Search:
    """Extrapolates the student's weights when a step is due.

    See ``maths.extrapolation``. A search has its own ledger row and clock phase.
    """

    def __init__(self, state: State):
        self.state = state
        self.settings = state.run.config.extrapolation

    @property
    def is_due(self) -> bool:
        """Return whether the step that was just completed is followed by a search."""
        return bool(self.state.moving) and extrapolation.due(self.state.step)

    @phase("extrapolating", at_stop="finishing this extrapolation, then saving")
    def run(self) -> None:
        """Search once, accept the best candidate and add a row to ``Progress.extrapolations``."""
        state, settings = self.state, self.settings
        meter = state.meter()
        flops_before = state.progress.ledger.useful.get("extrapolation", 0.0)
        seconds_before = state.clock.seconds.get("extrapolation", 0.0)
        self._keep_displacement()
        with meter.phase("extrapolation"):
            taken = extrapolation.extrapolate(
                state.moving,
                state.anchor,
                kind=settings.kind,
                score=functools.partial(self._score, meter),
                key=(state.run.config.runtime.seed, state.step),
            )
        state.count(meter)
        if settings.reset:
            for p in state.moving.values():
                state.optimizer.state.pop(p, None)
        flops = state.progress.ledger.useful.get("extrapolation", 0.0) - flops_before
        row = {"step": state.step, "k": taken.k, "scores": taken.scores, "flops": flops}
        state.progress.extrapolations.append(row)
        if settings.kind != "none":
            seconds = state.clock.seconds["extrapolation"] - seconds_before
            scores = ""
            if taken.scores:
                steps = " → ".join(f"{s:.4g}" for s in taken.scores)
                scores = f", {settings.score} {steps}"
            taken_text = f"accepted W + {2 * taken.k}Δ (k = {taken.k}"
            if taken.k == 0:
                taken_text = "accepted no extrapolation (k = 0"
            state.report.note(
                f"after step {state.step}: {taken_text}{scores}; {flops_text(flops)}, "
                f"{seconds:.1f} s)"
            )

    def _score(self, meter: Meter) -> float:
        """Return the score of the weights that the student holds now."""
        state = self.state
        state.masters.refresh()
        return candidate_score(state, meter)

    def _keep_displacement(self) -> None:
        """Write the displacement since the last search, if diagnostics are on."""
        state = self.state
        if not self.settings.diagnostics or not state.run.place.is_first:
            return
        displacement: dict[str, torch.Tensor] = {}
        for name, p in state.moving.items():
            displacement[name] = p.detach() - state.anchor[name].to(p.device)
        state.folder.write_tensors(f"displacements/step-{state.step:08d}.safetensors", displacement)

    def diagnose(self) -> None:
        """Write displacement.json from the kept displacements.

        A finished run has deleted them; then the file stays as it is.
        """
        state = self.state
        final = {}
        for name, p in state.moving.items():
            final[name] = p.detach().cpu() - state.initial[name]
        rows = []
        for file, tensors in state.folder.read_tensors("displacements"):
            step = int(file.stem.removeprefix("step-"))
            rows.append({"step": step, "modules": extrapolation.diagnose(tensors, final)})
        if rows or not (state.folder.path / "displacement.json").is_file():
            state.folder.write_json("displacement.json", rows)


def candidate_score(state: State, meter: Meter) -> float:
    """Return how good the student is on the extrapolation prompts; higher is better.

    The score is the share of correct full answers, or minus the mean reverse KL (nats per token) of
    new rollouts of the current prefix. The seeds are the same for every candidate and trigger.
    """
    run = state.run
    prompts = run.problems.extrapolation
    sampler = dataclasses.replace(
        run.method.eval_sampler, seed=seed_of(run.config.runtime.seed, "extrapolation")
    )
    how = dataclasses.replace(run.evaluation, sampler=sampler, samples=1)
    cost = GenerationCost.in_phase(meter, run.pair.student_shape, "extrapolation")
    if run.config.extrapolation.score == "accuracy":
        problems = [(p.prompt, p.student_ids) for p in prompts]
        right = evaluate.evaluate(
            state.decoding, problems, how, limits=run.limits, cost=cost
        ).right()
        return sum(right) / len(right)
    how = dataclasses.replace(how, max_new_tokens=state.progress.taught_prefix)
    rollouts = evaluate.fixed_rollouts(state.decoding, prompts, how, limits=run.limits, cost=cost)
    facts = measure_contexts(state, run.pair.align(rollouts), meter, phase="extrapolation")
    values = intervals.known([row["divergence"] for row in facts])
    return -math.fsum(values) / len(values)
