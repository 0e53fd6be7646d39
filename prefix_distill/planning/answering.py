"""Sample full answers of both models, from the start or behind tokens of the other model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..engine.models import Model, decoder
from ..engine.sampling import Request, Sampler, generate
from ..maths.flops import Ledger, Shape
from ..training.run import Run

Ids = tuple[int, ...]


class Answer(NamedTuple):
    """The ids of an answer, and whether it ended before the limit."""

    ids: Ids
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model that answers, with its prompts, and what its tokens cost."""

    role: str
    model: Model
    shape: Shape
    prompts: list[Ids]
    sampler: Sampler


class Answering:
    """Samples full answers of both models to the training prompts of a run.

    ``ledger``: the FLOPs of this rank.
    """

    def __init__(self, run: Run):
        self.run = run
        self.ledger = Ledger()
        self.student = Side(
            role="student",
            model=decoder(run.student, run.place.dtype),
            shape=run.student_shape,
            prompts=[r.student_ids for r in run.train_prompts],
            sampler=run.eval_sampler,
        )
        # The teacher samples as in an evaluation, but in its own ids.
        ids = run.text_sampler
        self.teacher = Side(
            role="teacher",
            model=decoder(run.teacher, run.place.dtype),
            shape=run.teacher_shape,
            prompts=[r.teacher_ids for r in run.train_prompts],
            sampler=replace(run.eval_sampler, eos=ids.eos, support=ids.support, pad=ids.pad),
        )

    def answer(self, side: Side) -> list[Answer]:
        """Return a full answer of one model to every prompt; ranks share the work."""
        return self.continue_from(side, [()] * len(side.prompts), 0)

    def continue_from(self, side: Side, starts: Sequence[Ids], key: int) -> list[Answer]:
        """Return full answers of one model that begin with ``starts``; ranks share the work.

        A start that has ended or has reached the limit is returned as it is. ``key`` seeds the
        samples together with the role and the prompt.
        """
        place, limit = self.run.place, self.run.prefix.limit
        eos = side.sampler.eos
        answers = []
        unfinished = []
        for i, start in enumerate(starts):
            ends = not eos.isdisjoint(start)
            answers.append(Answer(start, ends))
            if len(start) < limit and not ends:
                unfinished.append(i)
        by_room: dict[int, list[int]] = {}
        for i in unfinished[place.rank :: place.world]:
            by_room.setdefault(limit - len(starts[i]), []).append(i)
        sampled: dict[int, Answer] = {}
        for room, indices in by_room.items():
            starts_of_room = {i: starts[i] for i in indices}
            sampled |= self._sample(side, starts_of_room, room, key)
        for part in place.gather(sampled):
            for i, answer in part.items():
                answers[i] = answer
        return answers

    def _sample(self, side: Side, starts: dict[int, Ids], room: int, key: int) -> dict[int, Answer]:
        """Continue starts, by the number of their prompt, by up to ``room`` tokens."""
        requests = []
        for i, start in starts.items():
            requests.append(Request(side.prompts[i] + start, ("probe", side.role, key, i)))

        def count(reads: list[tuple[int, list[int]]]) -> None:
            prefill, decode = f"{side.role}_prefill", f"{side.role}_decode"
            self.ledger.generation(side.shape, reads, prefill, decode)

        responses = generate(side.model, requests, room, side.sampler, count)
        answers = {}
        for (i, start), response in zip(starts.items(), responses, strict=True):
            answers[i] = Answer(start + response.ids, response.finished)
        return answers

    def total_flops(self) -> Ledger:
        """Return the merged ledgers of all ranks."""
        merged = Ledger()
        for part in self.run.place.gather(self.ledger):
            merged.merge(part)
        return merged
