"""Texts that the teacher samples in place of the student: the off-policy control."""

import signal
from dataclasses import dataclass
from typing import TypedDict

from ..display import phase
from ..engine import stopping
from ..engine.models import Model
from ..engine.ranks import Place
from ..engine.rollout import Rollout
from ..engine.sampling import GenerationCost, Request, Response
from ..maths.flops import Ledger
from ..prompts import stream
from ..prompts.prompt import Rendered
from .folder import RunFolder
from .run import Run
from .state import State

FILE = "teacher-text.json"
AT_STOP = "keeping the texts so far, then saving"
BATCHES = 8  # after so many batches the texts are kept if a signal stops the run


class TeacherText(TypedDict):
    """A text that the teacher sampled for the prompt with index ``prompt``."""

    prompt: int
    sample: int
    ids: list[int]
    finished: bool
    text: str


# (prompt index, sample) → its text
TeacherTexts = dict[tuple[int, int], TeacherText]


class _Kept(TypedDict):
    """The content of FILE: the texts sampled so far, and their FLOPs."""

    texts: list[TeacherText]
    ledger: dict[str, dict[str, float]]


def wanted_texts(run: Run) -> dict[tuple[int, int], Rendered]:
    """Return (prompt index, sample) → prompt for every teacher text that the run needs."""
    off_policy = run.method.off_policy
    if off_policy is None:
        return {}
    config = run.config
    size, samples, seed = config.train.batch_size, config.rollout.samples, config.runtime.seed
    wanted = {}
    for step in range(config.train.steps):
        prompts = stream.prompts_of_step(run.problems.train, step, size=size, seed=seed)
        for row in sorted(off_policy.rows(step, size * samples, seed)):
            slot, sample = divmod(row, samples)
            rendered = prompts[slot]
            wanted[rendered.prompt.index, sample] = rendered
    return wanted


def load_or_sample(state: State, teacher: Model, max_new_tokens: int) -> TeacherTexts:
    """Return the teacher's text for each wanted prompt, up to ``max_new_tokens`` tokens.

    ``teacher``: the model that samples. The texts are sampled once, over all ranks, and kept in the
    run folder with their FLOPs; a resumed run reads them. The FLOPs are separate rows of the run's
    ledger, included in the totals. A sample depends on (seed, prompt, sample) alone.

    stopping.CutOff, on all ranks: a signal asked the run to stop; the texts so far are kept.
    """
    run, folder = state.run, state.folder
    place = run.place
    texts, total = _read(folder)
    place.barrier()  # every rank has looked before the first one writes
    missing = {}
    for key, rendered in wanted_texts(run).items():
        text = texts.get(key)
        if text is None or not (text["finished"] or len(text["ids"]) >= max_new_tokens):
            missing[key] = rendered
    cut_off = None
    if missing:
        with phase(
            "sampling the teacher's text",
            len(missing),
            unit="answers",
            at_stop=AT_STOP,
            ranks=place.world,
        ):
            part = _sample_missing(state, teacher, missing, max_new_tokens=max_new_tokens)
            parts = place.gather(part)
        for sampled in parts:
            texts |= sampled.texts
            total.merge(sampled.ledger)
            cut_off = cut_off or sampled.cut_off
        if place.is_first:
            kept: _Kept = {
                "texts": [texts[key] for key in sorted(texts)],
                "ledger": {"useful": total.useful, "executed": total.executed},
            }
            folder.write_json(FILE, kept)
    # Set, not added: the texts are sampled once, however often a run resumes.
    state.progress.ledger.useful.update(total.useful)
    state.progress.ledger.executed.update(total.executed)
    if cut_off is not None:
        raise stopping.CutOff(cut_off)
    return texts


def _read(folder: RunFolder) -> tuple[TeacherTexts, Ledger]:
    """Return the texts that a run folder holds, and their FLOPs."""
    if not (folder.path / FILE).is_file():
        return {}, Ledger()
    kept = folder.read_json(FILE)
    texts = {(row["prompt"], row["sample"]): row for row in kept["texts"]}
    return texts, Ledger(**kept["ledger"])


@dataclass(kw_only=True)
class _Sampled:
    """What a rank has sampled, its FLOPs, and the signal that cut it off, if one did."""

    texts: TeacherTexts
    ledger: Ledger
    cut_off: signal.Signals | None = None


def _sample_missing(
    state: State, teacher: Model, missing: dict[tuple[int, int], Rendered], max_new_tokens: int
) -> _Sampled:
    """Sample this rank's part of the ``missing`` texts, some batches at a time."""
    run = state.run
    meter = state.meter()
    sampled = _Sampled(texts={}, ledger=meter.ledger)
    cost = GenerationCost(
        meter=meter,
        shape=run.pair.teacher_shape,
        prefill="teacher_prefill",
        decode="teacher_decode",
    )
    mine = _share_of_rank(list(missing), run.place)
    # as `generate` orders them, so that its batches stay the same
    mine.sort(key=lambda key: len(missing[key].teacher_ids))
    size = BATCHES * run.limits.rows
    for start in range(0, len(mine), size):
        chosen = mine[start : start + size]
        requests = []
        for key in chosen:
            requests.append(Request(ids=missing[key].teacher_ids, key=("teacher-text", *key)))
        try:
            responses = run.limits.sample(
                teacher,
                requests,
                max_new_tokens=max_new_tokens,
                sampler=run.method.text_sampler,
                cost=cost,
            )
        except stopping.CutOff as cut_off:
            sampled.cut_off = cut_off.number
            break
        for key, response in zip(chosen, responses, strict=True):
            sampled.texts[key] = _describe(teacher, key, response)
    return sampled


def _describe(teacher: Model, key: tuple[int, int], response: Response) -> TeacherText:
    index, sample = key
    return {
        "prompt": index,
        "sample": sample,
        "ids": list(response.ids),
        "finished": response.finished,
        "text": _decode(teacher, response.ids),
    }


def _share_of_rank(keys: list[tuple[int, int]], place: Place) -> list[tuple[int, int]]:
    """Return this rank's keys; all samples of a prompt stay on one rank, which runs it once."""
    prompts = sorted({index for index, _ in keys})
    rank_of = {index: i % place.world for i, index in enumerate(prompts)}
    return [key for key in keys if rank_of[key[0]] == place.rank]


def _decode(model: Model, ids: tuple[int, ...]) -> str:
    """Return the text of ``ids``, special tokens included."""
    text: str = model.tokenizer.decode(list(ids))  # type: ignore[assignment]  # a str for one sequence
    return text


def rollout(
    run: Run, key: tuple[int, int], rendered: Rendered, text: TeacherText, prefix: int
) -> Rollout:
    """Return a teacher's text, cut to ``prefix`` tokens, as the rollout of ``key``, (slot, sample).

    Across tokenizers the student's tokenizer encodes the text before the cut. If the loss is the
    teacher's divergence, the rollout is also aligned with the teacher's own tokens.
    """
    alignment = run.pair.alignment
    slot, sample = key
    sampled, ended = tuple(text["ids"]), text["finished"]
    whole = sampled
    finished = ended
    if alignment is not None:
        whole = alignment.to_student(sampled, ended)
        finished = ended and bool(whole) and whole[-1] in alignment.student_eos
    ids = whole[:prefix]
    finished = finished and len(whole) <= prefix
    teacher_ids, units = ids, None
    if alignment is not None and run.method.text_terms.taught_by == "teacher":
        without_eos = sampled[:-1] if ended else sampled
        teacher_ids, units = alignment.align(ids, finished, without_eos)
    return Rollout(
        slot=slot,
        sample=sample,
        student_prompt=rendered.student_ids,
        teacher_prompt=rendered.teacher_ids,
        ids=ids,
        teacher_ids=teacher_ids,
        finished=finished,
        off_policy=True,
        units=units,
        spans=alignment is not None and alignment.mode != "strict",
    )
