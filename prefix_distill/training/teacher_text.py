"""Text that the teacher wrote, in place of the student's own: what on-policy distillation is
compared with."""

from typing import TypedDict

from ..engine.models import Model
from ..engine.rollout import Rollout
from ..engine.sampling import Request, generate
from ..maths.flops import Ledger
from ..prompts.prompt import Rendered
from .folder import RunFolder
from .run import Run

FILE = "teacher-text.json"
PHASES = ("teacher_prefill", "teacher_decode")


class TeacherText(TypedDict):
    """A text that the teacher sampled for a prompt (its index), up to some number of tokens."""

    prompt: int
    sample: int
    ids: list[int]
    finished: bool
    text: str


def teacher_texts(  # noqa: PLR0913  becomes a method of `Session`, which will own these
    run: Run,
    wanted: list[tuple[Rendered, int]],
    cap: int,
    teacher: Model,
    folder: RunFolder,
    ledger: Ledger,
) -> dict[tuple[int, int], TeacherText]:
    """Return (prompt index, sample) → the teacher's text for each wanted prompt, up to ``cap``
    tokens.

    The texts are sampled once, over all ranks, and kept in the run folder with their FLOPs; a
    resumed run reads them. The FLOPs are separate rows of ``ledger``, included in the totals. A
    sample depends on (seed, prompt, sample) alone.
    """
    place = run.place
    kept: list[TeacherText] = []
    total = Ledger()
    if (folder.path / FILE).is_file():
        document = folder.read_json(FILE)
        kept, total = document["texts"], Ledger(**document["ledger"])
    place.wait()  # every rank has looked before the first one writes
    texts = {(row["prompt"], row["sample"]): row for row in kept}
    missing = {}
    for rendered, sample in wanted:
        have = texts.get((rendered.prompt.index, sample))
        if have is None or not (have["finished"] or len(have["ids"]) >= cap):
            missing[rendered.prompt.index, sample] = rendered
    if missing:
        written, spent = _write_texts(run, missing, cap, teacher)
        for part in place.gather(written):
            texts |= {(row["prompt"], row["sample"]): row for row in part}
        for other in place.gather(spent):
            total.merge(other)
        if place.first:
            folder.write_json(
                FILE,
                {
                    "texts": [texts[key] for key in sorted(texts)],
                    "ledger": {"useful": total.useful, "executed": total.executed},
                },
            )
    # set, not added: the file holds what these texts cost, however often a run resumes
    ledger.useful.update(total.useful)
    ledger.executed.update(total.executed)
    return texts


def _write_texts(
    run: Run, missing: dict[tuple[int, int], Rendered], cap: int, teacher: Model
) -> tuple[list[TeacherText], Ledger]:
    """Sample this rank's part of the ``missing`` texts; return them and their FLOPs."""
    prompts = sorted({index for index, _ in missing})
    # a prompt is read on one rank for all its samples
    whose = {index: i % run.place.world for i, index in enumerate(prompts)}
    mine = [key for key in missing if whose[key[0]] == run.place.rank]
    spent = Ledger()
    if not mine:
        return [], spent
    requests = [Request(missing[key].teacher_ids, ("teacher-text", *key)) for key in mine]
    drawn = run.fit(
        "rows",
        spent,
        lambda ledger: generate(
            teacher,
            requests,
            cap,
            run.text_sampler,
            lambda reads: ledger.generation(run.teacher_shape, reads, *PHASES),
        ),
    )
    written: list[TeacherText] = [
        {
            "prompt": index,
            "sample": sample,
            "ids": list(r.ids),
            "finished": r.finished,
            "text": _decode(teacher, r.ids),
        }
        for (index, sample), r in zip(mine, drawn, strict=True)
    ]
    return written, spent


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
    alignment = run.alignment
    written, finished = tuple(text["ids"]), text["finished"]
    whole = written if alignment is None else alignment.to_student(written, finished)
    ids = whole[:prefix]
    finished = (
        finished
        and len(whole) <= prefix
        and (alignment is None or (bool(whole) and whole[-1] in alignment.student_eos))
    )
    theirs, found = ids, None
    if alignment is not None and run.text_terms.taught_by == "teacher":
        theirs, found = alignment.align(
            ids, finished, written[:-1] if text["finished"] else written
        )
    slot, sample = key
    return Rollout(
        slot,
        sample,
        rendered.student_ids,
        rendered.teacher_ids,
        ids,
        theirs,
        finished,
        off_policy=True,
        units=found,
        spans=alignment is not None and alignment.mode != "strict",
    )
