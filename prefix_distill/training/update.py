"""Update: the sampling, scoring and gradients of one step, on one rank."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from ..display import phase
from ..engine import scoring
from ..engine.batching import micro_batches, reads
from ..engine.meter import Meter
from ..engine.rollout import Rollout, student_sides, teacher_sides
from ..engine.sampling import GenerationCost, Request
from ..engine.scoring import ForwardPass, Scorer, TokenFacts
from ..errors import Stopped
from ..maths.divergence import Terms
from ..maths.flops import Passes
from ..maths.weights import Scale, batch_scale, keep_selection, keep_window, token_weights
from ..prompts import stream
from ..prompts.prompt import Rendered
from . import teacher_text
from .loss import PerToken, TokenLosses, choose_terms, without_all_reduce
from .state import State
from .teacher_text import TeacherTexts


class Update:
    """One step: ``sample``, then ``select``, then ``backward``. The optimizer runs afterwards.

    ``prompts``: the prompts of the global batch, by default those of ``step``; ``prefix``: the
    longest rollout in tokens, by default the schedule's; ``meter``: seconds and FLOPs of the step.
    """

    def __init__(
        self,
        state: State,
        step: int,
        texts: TeacherTexts | None = None,
        prompts: list[Rendered] | None = None,
        prefix: int | None = None,
    ):
        run = state.run
        self.state = state
        self.run = run
        self.step = step
        self.texts = texts or {}
        if prompts is None:
            config = run.config
            prompts = stream.prompts_of_step(
                run.problems.train, step, size=config.train.batch_size, seed=config.runtime.seed
            )
        self.prompts = prompts
        if prefix is None:
            prefix = run.method.prefix.length(step, state.progress.prefix)
        self.prefix = prefix
        self.seconds_before = dict(state.clock.seconds)
        self.meter = state.meter()
        # The forward pass of a ranked selection, which the loss reuses if it can.
        self.forward_pass: ForwardPass | None = None
        self.reused_forward_pass = False

    # Sampling

    @phase("sampling")
    def sample(self) -> list[Rollout]:
        """Return this rank's rollouts, prompt by prompt, with all samples of each prompt.

        The student samples until ``prefix`` tokens or EOS. With --off-policy some
        rollouts are texts of the teacher, cut at ``prefix``. Stopped: across tokenizers no rollout
        of any rank has a unit.
        """
        keys = self._keys()
        of_teacher = self._teacher_keys()
        sampled = self._sample_student([key for key in keys if key not in of_teacher])
        with self._alignment_phase():
            rollouts = {r.key: r for r in self.run.pair.align(sampled)}
            for slot, sample in of_teacher:
                prompt = self.prompts[slot]
                text = self.texts[prompt.prompt.index, sample]
                rollouts[slot, sample] = teacher_text.rollout(
                    self.run, (slot, sample), rendered=prompt, text=text, prefix=self.prefix
                )
        mine = [rollouts[key] for key in keys]
        self._refuse_nothing_taught(mine)
        return mine

    def _keys(self) -> list[tuple[int, int]]:
        """Return (slot, sample) of this rank's rollouts: every world-th prompt, all its samples."""
        place = self.run.place
        keys = []
        for slot in range(place.rank, len(self.prompts), place.world):
            for sample in range(self.run.config.rollout.samples):
                keys.append((slot, sample))
        return keys

    def _teacher_keys(self) -> set[tuple[int, int]]:
        """Return (slot, sample) of this rank's rollouts that are the teacher's texts."""
        config, off_policy = self.run.config, self.run.method.off_policy
        if off_policy is None:
            return set()
        samples = config.rollout.samples
        rows = off_policy.rows(self.step, len(self.prompts) * samples, config.runtime.seed)
        return {divmod(row, samples) for row in rows}.intersection(self._keys())

    def _sample_student(self, keys: list[tuple[int, int]]) -> list[Rollout]:
        if not keys:
            return []
        requests = []
        for slot, sample in keys:
            ids = self.prompts[slot].student_ids
            requests.append(Request(ids=ids, key=(self.step, slot, sample)))
        cost = GenerationCost(meter=self.meter, shape=self.run.pair.student_shape, timed=True)
        responses = self.run.limits.sample(
            self.state.decoding,
            requests,
            max_new_tokens=self.prefix,
            sampler=self.run.method.sampler,
            cost=cost,
        )
        rollouts = []
        for (slot, sample), response in zip(keys, responses, strict=True):
            prompt = self.prompts[slot]
            rollout = Rollout(
                slot=slot,
                sample=sample,
                student_prompt=prompt.student_ids,
                teacher_prompt=prompt.teacher_ids,
                ids=response.ids,
                teacher_ids=response.ids,
                finished=response.finished,
                sampler_logp=response.logp,
            )
            rollouts.append(rollout)
        return rollouts

    def _alignment_phase(self) -> contextlib.AbstractContextManager[None]:
        if self.run.pair.alignment is None:
            return contextlib.nullcontext()
        return self.meter.phase("alignment")

    def _refuse_nothing_taught(self, rollouts: list[Rollout]) -> None:
        run = self.run
        if run.pair.alignment is None:
            return
        if not run.place.sum(sum(len(r.taught) for r in rollouts)):
            raise Stopped(
                f"step {self.step + 1}: the two tokenizations of its rollouts have no unit of text "
                "in common, so there is no token to train on; lengthen --prefix"
            )

    # Selection

    @phase("selecting tokens")
    def select(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with the taught tokens marked: --window, then --select within it.

        A window or selection that ranks tokens needs a forward pass of both models over every
        rollout. If the rollouts of every rank are one micro-batch, the loss reuses it. Otherwise
        this forward pass is an extra one (ledger row ``selection``).
        """
        method = self.run.method
        key = (self.run.config.runtime.seed, self.step)
        if not method.ranks_window:
            rollouts = keep_window(method.window, rollouts, key)
            if not method.ranks_selection:
                return keep_selection(method.selection, rollouts, key)
        facts = self._measure_tokens(rollouts)
        if method.ranks_window:
            rollouts = keep_window(method.window, rollouts, key, statistics=facts)
        scale = None
        if method.ranks_selection:
            scale = self._batch_scale(rollouts, facts)
        return keep_selection(method.selection, rollouts, key, facts=facts, at=scale)

    def _measure_tokens(self, rollouts: list[Rollout]) -> TokenFacts:
        """Return the statistics that rank tokens; keep the forward pass if the loss can reuse it.

        It can if every rank has one micro-batch and the loss is the teacher's divergence.
        """
        run = self.run
        # The divergence that ranks tokens does not depend on the loss.
        terms = Terms(
            name="reverse-kl",
            dtype=run.place.head_dtype,
            memory_bytes=run.method.terms.memory_bytes,
        )
        scorer = Scorer(
            pair=self.state.pair,
            terms=terms,
            place=run.place,
            forward_kl=run.method.needs_forward_kl,
        )
        groups = self._micro_batches(rollouts)
        by_teacher = choose_terms(run, rollouts).taught_by == "teacher"
        if max(run.place.gather(len(groups) if by_teacher else 2)) == 1:
            measure = functools.partial(self._measure_once, scorer, groups[0])
            measured = run.limits.attempt(self.meter, measure)
            if measured is not None:
                facts, self.forward_pass = measured
                return facts
        with self.meter.phase("selection"):
            return run.limits.measure(scorer, rollouts, meter=self.meter, phase="selection")

    def _measure_once(
        self, scorer: Scorer, group: list[Rollout], meter: Meter
    ) -> tuple[TokenFacts, ForwardPass]:
        """Measure the tokens of one micro-batch, and keep the student's graph for the loss."""
        pair = self.run.pair
        with meter.phase("student_update"):
            student_ND = scorer.student_rows(group)
        with meter.phase("teacher_score"):
            teacher_NE = scorer.teacher_rows(group)
        forward_pass = ForwardPass(rollouts=group, student_ND=student_ND, teacher_NE=teacher_NE)
        with meter.phase("selection"):
            facts = scorer.statistics(forward_pass)
        # ``backward`` counts the forward passes; selection adds the heads.
        student_rows, teacher_rows = scoring.statistics_rows(pair, group)
        for flops in (
            pair.student_shape.output(student_rows),
            pair.teacher_shape.output(teacher_rows),
        ):
            meter.ledger.add("selection", flops, flops)
        return facts, forward_pass

    def _batch_scale(self, rollouts: list[Rollout], facts: TokenFacts) -> Scale | None:
        """Return the range of entropies and divergences over all ranks; None without any token."""
        entropies: list[float] = []
        divergences: list[float] = []
        for r in rollouts:
            for t in r.taught:
                entropies.append(facts[r.key]["entropy"][t])
                divergences.append(facts[r.key]["divergence"][t])
        parts = self.run.place.gather((entropies, divergences))
        all_entropies = [v for part, _ in parts for v in part]
        if not all_entropies:
            return None
        return batch_scale(all_entropies, [v for _, part in parts for v in part])

    def _micro_batches(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """Return this rank's micro-batches.

        Rollouts of the student and of the teacher have different losses and are never mixed.
        """
        limits, student = self.run.limits, self.run.pair.student
        groups = []
        for off_policy in (False, True):
            same = [r for r in rollouts if r.off_policy is off_policy]
            groups += micro_batches(same, limits.micro_batch_size, student.encodes_prompt_once)
        return groups

    # Gradients

    @phase("training")
    def backward(self, rollouts: list[Rollout]) -> TokenLosses:
        """Accumulate the gradients of the step, micro-batch by micro-batch.

        Every weight is divided by the step's divisor here, once. DDP averages gradients over
        ranks, so the weights are multiplied by the number of ranks first. Ranks may have different
        numbers of micro-batches, or none. Each rank accumulates locally, and the backward pass of
        a zero loss all-reduces. If any rank runs out of memory, all ranks start again with half
        the micro-batch.
        """
        run, loss = self.run, self.state.loss
        weights, share = token_weights(
            rollouts, run.config.divergence.reduction, run.method.position
        )
        divisor = run.place.sum(share)
        losses = None
        while losses is None:
            work = functools.partial(self._accumulate, rollouts, weights, divisor)
            losses = run.limits.attempt(self.meter, work)
            if losses is None:
                loss.zero_grad(set_to_none=True)
                self.forward_pass = None
        self.reused_forward_pass = self.forward_pass is not None
        self.forward_pass = None  # frees the hidden rows before the optimizer steps
        if run.place.world > 1:
            self._all_reduce()
        return losses

    def _accumulate(
        self, rollouts: list[Rollout], weights: PerToken, divisor: float, meter: Meter
    ) -> TokenLosses:
        """Accumulate the gradients of this rank; see ``backward``."""
        losses = TokenLosses(rollouts=rollouts, weights=weights, divisor=divisor)
        for group in self._groups(rollouts):
            weight_N = self._weight_tensor(group, losses)
            read = group
            student_ND, teacher_NE = None, None
            if self.forward_pass is not None:
                read = self.forward_pass.rollouts
                student_ND, teacher_NE = self.forward_pass.select(group)
            elif choose_terms(self.run, group).taught_by == "teacher":
                teacher_NE = self._read_teacher(group, meter)
            if teacher_NE is not None:
                self._count_teacher(group, read, meter)
            with meter.phase("student_update"), without_all_reduce(self.state.loss):
                total, value_N, clipped_N = self.state.loss(
                    group, teacher_NE=teacher_NE, weight_N=weight_N, student_ND=student_ND
                )
                total.backward()
            self._count_student(group, read, meter)
            losses.values.update(_by_rollout(group, value_N))
            if clipped_N is not None:
                losses.clipped.update(_by_rollout(group, clipped_N))
        return losses

    def _groups(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """Return the micro-batches of the loss: the selection's if its forward pass is reused."""
        if self.forward_pass is None:
            return self._micro_batches(rollouts)
        by_key = {r.key: r for r in rollouts}
        return [[by_key[r.key] for r in self.forward_pass.rollouts]]

    def _weight_tensor(self, group: list[Rollout], losses: TokenLosses) -> torch.Tensor:
        """Return the weights [N] of a micro-batch, divided by the divisor, in float32."""
        flat = [w for r in group for w in losses.weights[r.key]]
        weight_N = torch.tensor(flat, dtype=torch.float64)
        return (weight_N * (self.run.place.world / losses.divisor)).float()

    def _read_teacher(self, group: list[Rollout], meter: Meter) -> torch.Tensor:
        """Return the teacher's hidden rows [N, E] of the taught tokens."""
        run = self.run
        scorer = Scorer(pair=run.pair, terms=run.method.terms, place=run.place)
        with meter.phase("teacher_score"):
            return scorer.teacher_rows(group)

    def _count_teacher(self, group: list[Rollout], read: list[Rollout], meter: Meter) -> None:
        """Add the teacher's forward pass to the ledger."""
        pair = self.run.pair
        meter.ledger.forward(
            "teacher_score",
            pair.teacher_shape,
            reads(teacher_sides(read), pair.teacher.encodes_prompt_once),
            taught=scoring.teacher_head_rows(pair, group),
        )

    def _count_student(self, group: list[Rollout], read: list[Rollout], meter: Meter) -> None:
        """Add the student's training step to the ledger.

        ``read``: the same rollouts with the tokens that the forward pass covered.
        """
        pair = self.run.pair
        if group[0].units is None:
            taught: float = sum(len(r.taught) for r in group)
        else:
            taught = scoring.student_head_rows(pair, group)
        meter.ledger.forward(
            "student_update",
            pair.student_shape,
            reads(student_sides(read), pair.student.encodes_prompt_once),
            passes=Passes(count=3, recomputed=pair.student.recomputes),
            taught=taught,
        )
        if group[0].units is not None:  # tokens of spans are projected once more
            in_spans = sum(u.size for r in group for u in r.taught_units if not u.exact)
            again = pair.student_shape.output(in_spans)
            meter.ledger.add("student_update", again, again)

    def _all_reduce(self) -> None:
        """All-reduce the gradients of all ranks, by the backward pass of a zero loss."""
        with self.meter.phase("student_update"), self.run.place.collective():
            self.state.loss(None).backward()


def _by_rollout(
    group: list[Rollout], value_N: torch.Tensor
) -> Iterator[tuple[tuple[int, int], list[float]]]:
    """Yield (slot, sample) and the values of its taught tokens, in the order of the rows [N]."""
    parts = value_N.split([len(r.taught) for r in group])
    for r, part in zip(group, parts, strict=True):
        yield r.key, part.tolist()
