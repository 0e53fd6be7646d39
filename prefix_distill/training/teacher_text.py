"""Text that the teacher wrote, in place of the student's own: what on-policy distillation is
compared with."""

from ..engine.models import Model
from ..engine.rollout import Rollout
from ..engine.sampling import Request, generate
from ..maths.flops import Ledger
from ..prompts.prompt import Rendered

FILE = "teacher-text.json"
PHASES = ("teacher_prefill", "teacher_decode")


def teacher_texts(
    run, wanted: list[tuple[Rendered, int]], cap: int, teacher: Model, folder, ledger: Ledger
) -> dict[tuple[int, int], dict]:
    """(prompt index, sample) → {"ids", "finished"}: what the teacher writes to each wanted prompt,
    up to ``cap`` tokens.

    Written once and kept in the run folder with its FLOPs (rows of their own in ``ledger``, inside
    the totals); read back from there by a resumed run. A draw depends on (seed, prompt, sample)
    alone. Sharded over ranks.
    """
    place = run.place
    kept = (
        folder.read_json(FILE)
        if (folder.path / FILE).is_file()
        else {"texts": [], "ledger": {"useful": {}, "executed": {}}}
    )
    place.wait()  # every rank has looked before the first one writes
    texts = {(row["prompt"], row["sample"]): row for row in kept["texts"]}
    missing = {}
    for rendered, sample in wanted:
        have = texts.get((rendered.prompt.index, sample))
        if have is None or not (have["finished"] or len(have["ids"]) >= cap):
            missing[rendered.prompt.index, sample] = rendered
    if missing:
        spent, prompts = Ledger(), sorted({index for index, _ in missing})
        whose = {
            index: i % place.world for i, index in enumerate(prompts)
        }  # a prompt is read on one rank for all its samples
        mine = [key for key in missing if whose[key[0]] == place.rank]
        requests = [Request(missing[key].teacher_ids, ("teacher-text", *key)) for key in mine]
        drawn = (
            run.fit(
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
            if mine
            else []
        )
        for part in place.gather([(*key, r.ids, r.finished) for key, r in zip(mine, drawn)]):
            for index, sample, ids, finished in part:
                texts[index, sample] = {
                    "prompt": index,
                    "sample": sample,
                    "ids": list(ids),
                    "finished": finished,
                    "text": teacher.tokenizer.decode(ids),
                }
        total = Ledger(**kept["ledger"])
        for other in place.gather(spent):
            total.merge(other)
        kept = {
            "texts": [texts[key] for key in sorted(texts)],
            "ledger": {"useful": total.useful, "executed": total.executed},
        }
        if place.first:
            folder.write_json(FILE, kept)
    for kind in (
        "useful",
        "executed",
    ):  # set, not added: the file holds what these texts cost, however often a run resumes
        getattr(ledger, kind).update(kept["ledger"][kind])
    return texts


def rollout(
    slot: int,
    sample: int,
    rendered: Rendered,
    text: dict,
    prefix: int,
    alignment=None,
    units: bool = False,
) -> Rollout:
    """The first ``prefix`` tokens of a teacher's text as a rollout. With an ``alignment``: the
    first student's tokens of it, as the student's tokenizer reads it, and with ``units`` aligned
    with the tokens that the teacher wrote."""
    written, finished = tuple(text["ids"]), text["finished"]
    whole = written if alignment is None else alignment.to_student(written, finished)
    ids = whole[:prefix]
    finished = (
        finished
        and len(whole) <= prefix
        and (alignment is None or (bool(whole) and whole[-1] in alignment.student_eos))
    )
    theirs, found = ids, None
    if alignment is not None and units:
        theirs, found = alignment.align(
            ids, finished, written[:-1] if text["finished"] else written
        )
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
