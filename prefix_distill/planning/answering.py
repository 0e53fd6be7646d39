"""Sample full answers of both models, from the start or after tokens of the other model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..display import phase
from ..engine.decoder import make_decoder
from ..engine.device import Clock
from ..engine.meter import Meter
from ..engine.models import Model
from ..engine.sampling import GenerationCost, Request, Sampler
from ..maths.flops import Ledger, Shape
from ..training.run import Run
from .case import Ids


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The ids of one answer per prompt, and whether each ended before the limit."""

    ids: list[Ids]
    finished: list[bool]


@dataclass(frozen=True, kw_only=True)
class AnsweringModel:
    """A model that answers, its prompts, what its tokens cost, and how it is sampled."""

    role: str
    model: Model
    shape: Shape
    prompts: list[Ids]
    sampler: Sampler


class Answering:
    """Samples full answers of both models to the training prompts of a run.

    ``meter``: the FLOPs of this rank.
    """

    def __init__(self, run: Run):
        self.run = run
        self.meter = Meter(Clock(device=run.place.device))
        self.student = AnsweringModel(
            role="student",
            model=make_decoder(run.pair.student, run.place.dtype),
            shape=run.pair.student_shape,
            prompts=[r.student_ids for r in run.problems.train],
            sampler=run.method.eval_sampler,
        )
        self.teacher = AnsweringModel(
            role="teacher",
            model=make_decoder(run.pair.teacher, run.place.dtype),
            shape=run.pair.teacher_shape,
            prompts=[r.teacher_ids for r in run.problems.train],
            sampler=run.method.teacher_eval_sampler,
        )

    def answer(self, answerer: AnsweringModel) -> Answers:
        """Return a full answer of one model to every prompt; ranks share the work."""
        return self.continue_from(answerer, [()] * len(answerer.prompts), 0)

    def continue_from(self, answerer: AnsweringModel, starts: Sequence[Ids], key: int) -> Answers:
        """Return full answers of one model that begin with ``starts``; ranks share the work.

        A start that has ended or has reached the limit is returned as it is. ``key`` seeds the
        samples together with the role and the prompt.
        """
        place, limit = self.run.place, self.run.method.prefix.limit
        answers = Answers(ids=list(starts), finished=[])
        unfinished = []
        for i, start in enumerate(starts):
            ends = not answerer.sampler.eos.isdisjoint(start)
            answers.finished.append(ends)
            if len(start) < limit and not ends:
                unfinished.append(i)
        # A call of ``generate`` has one limit of new tokens, so starts are grouped by length.
        by_room: dict[int, dict[int, Ids]] = {}
        for i in unfinished[place.rank :: place.world]:
            by_room.setdefault(limit - len(starts[i]), {})[i] = starts[i]
        sampled: dict[int, tuple[Ids, bool]] = {}
        name = f"probing: the {answerer.role} answers"
        with phase(name, len(unfinished), "answers", ranks=place.world):
            for room, group in by_room.items():
                sampled |= self._sample(answerer, group, room=room, key=key)
            parts = place.gather(sampled)
        for part in parts:
            for i, (ids, finished) in part.items():
                answers.ids[i] = ids
                answers.finished[i] = finished
        return answers

    def _sample(
        self, answerer: AnsweringModel, starts: dict[int, Ids], room: int, key: int
    ) -> dict[int, tuple[Ids, bool]]:
        """Continue ``starts``, given by the number of their prompt, by up to ``room`` tokens."""
        requests = []
        for i, start in starts.items():
            requests.append(
                Request(ids=answerer.prompts[i] + start, key=("probe", answerer.role, key, i))
            )

        cost = GenerationCost(
            meter=self.meter,
            shape=answerer.shape,
            prefill=f"{answerer.role}_prefill",
            decode=f"{answerer.role}_decode",
        )
        responses = self.run.limits.sample(
            answerer.model, requests, max_new_tokens=room, sampler=answerer.sampler, cost=cost
        )
        answers = {}
        for (i, start), response in zip(starts.items(), responses, strict=True):
            answers[i] = (start + response.ids, response.finished)
        return answers

    def total_flops(self) -> Ledger:
        """Return the merged ledgers of all ranks."""
        merged = Ledger()
        for part in self.run.place.gather(self.meter.ledger):
            merged.merge(part)
        return merged
