"""Check what a run reads and writes as text: vocabularies, prompts, templates, EOS and lengths."""

import math
import statistics

import torch

from ..engine import scoring
from ..engine.models import Model
from ..engine.rollout import Side
from ..engine.scoring import FIRST_TOKEN
from ..training.pair import describe_tokens
from ..training.run import Check, Run

FEW = 4  # prompts that are looked at
LAST = 6  # ids of a prompt's end that are shown


def sides(run: Run) -> tuple[tuple[str, Model], tuple[str, Model]]:
    """Return both models with their roles."""
    return ("student", run.pair.student), ("teacher", run.pair.teacher)


def examine_vocabulary(run: Run) -> Check:
    return Check(
        "vocabulary",
        "ok",
        run.pair.tokenizers,
        {
            role: {
                "ids": max(model.tokenizer.get_vocab().values()) + 1,
                "head_rows": len(model.net.get_output_embeddings().weight),
                "support": model.support,
            }
            for role, model in sides(run)
        },
    )


def examine_prompts(run: Run) -> Check:
    """Both renderings of a prompt, and P_T of the student's most likely first token."""
    first = run.problems.train[0]
    ids = {"student": first.student_ids, "teacher": first.teacher_ids}
    facts: dict[str, object] = {
        role: {
            "text": model.tokenizer.decode(list(ids[role])),
            "ids": len(ids[role]),
            "last": [[i, model.tokenizer.convert_ids_to_tokens(i)] for i in ids[role][-LAST:]],
        }
        for role, model in sides(run)
    }
    doubled = [
        role
        for role, model in sides(run)
        if len(ids[role]) > 1 and ids[role][0] == ids[role][1] == model.tokenizer.bos_token_id
    ]
    chances = _first_token_probabilities(run)
    chance = math.fsum(chances) / len(chances) if chances else None
    facts["first_token_probability"] = chance
    if doubled:
        return Check(
            "prompts",
            "warning",
            f"the {doubled[0]}'s prompt begins with two "
            f"{dict(sides(run))[doubled[0]].tokenizer.bos_token!r}: its chat template writes one, "
            "and its tokenizer adds one",
            facts,
        )
    if chance is None:
        return Check(
            "prompts",
            "warning",
            "the student's first tokens are none of the teacher's: do both prompts ask for the "
            "same form of answer?",
            facts,
        )
    text = (
        f"{len(ids['student'])} and {len(ids['teacher'])} ids of the first prompt; the teacher "
        f"gives the student's most likely first token a probability of {chance:.2g}"
    )
    if chance < FIRST_TOKEN:
        return Check(
            "prompts",
            "warning",
            text
            + "; do both prompts ask for the same form of answer (--template, --student-thinking, "
            "--teacher-thinking, --begin)?",
            facts,
        )
    return Check("prompts", "ok", text, facts)


@torch.no_grad()
def _first_token_probabilities(run: Run) -> list[float]:
    """Return the teacher's probability of the student's most likely first token, for some prompts.
    Tokens that the teacher lacks are left out."""
    shared = None
    if run.pair.shared_support is not None:
        student, teacher = (
            run.pair.shared_support.student.tolist(),
            run.pair.shared_support.teacher.tolist(),
        )
        # each side's EOS ids follow the shared tokens, and their numbers may differ
        shared = dict(zip(student, teacher, strict=False))
    chances = []
    for r in run.problems.train[:FEW]:
        student_V = _first_token_distribution(run, run.pair.student, r.student_ids)
        teacher_V = _first_token_distribution(run, run.pair.teacher, r.teacher_ids)
        token = int(student_V.argmax())
        counterpart = token if shared is None else shared.get(token)
        if counterpart is not None:
            chances.append(teacher_V[counterpart].item())
    return chances


def _first_token_distribution(run: Run, model: Model, prompt: tuple[int, ...]) -> torch.Tensor:
    """Return a model's distribution [V] over the first token after ``prompt``, on the CPU."""
    side = Side(prompt, prompt[:1], (0,))
    with run.place.autocast(model.device):
        hidden_ND = scoring.hidden_rows(model, [side])
    logits_ND = model.head().to(run.place.head_dtype).logits(hidden_ND)
    return logits_ND[0].softmax(-1).cpu()


def examine_templates(run: Run) -> Check:
    settings = run.config.data
    facts = {}
    modes = settings.student_thinking, settings.teacher_thinking
    for (role, model), thinking in zip(sides(run), modes, strict=True):
        template = None if settings.template == "plain" else model.tokenizer.chat_template
        facts[role] = {
            "form": "chat" if template else "plain",
            "thinking_switch": "enable_thinking" in (template or ""),
            "thinking": thinking,
        }
    ours, theirs = facts.values()
    if ours["form"] != theirs["form"]:
        return Check(
            "templates",
            "warning",
            f"the student reads {ours['form']} prompts, the teacher {theirs['form']} ones; "
            "--template plain makes them alike",
            facts,
        )
    if (
        ours["thinking_switch"] != theirs["thinking_switch"]
        or ours["thinking"] != theirs["thinking"]
    ):
        which, other = (
            ("teacher", "student") if theirs["thinking_switch"] else ("student", "teacher")
        )
        text = f"thinking: student {ours['thinking']}, teacher {theirs['thinking']}"
        if ours["thinking_switch"] != theirs["thinking_switch"]:
            text += (
                f"; the {which}'s template has a thinking switch, the {other}'s has none: "
                f"--{which}-thinking on or off settles what it writes first"
            )
        return Check("templates", "warning", text, facts)
    return Check("templates", "ok", f"both {ours['form']}, thinking {ours['thinking']}", facts)


def examine_ends(run: Run) -> Check:
    facts = {role: sorted(model.eos) for role, model in sides(run)} | {
        "rollouts_stop_at": sorted(run.method.sampler.eos)
    }
    text = (
        f"student {describe_tokens(run.pair.student, run.pair.student.eos)}; teacher "
        f"{describe_tokens(run.pair.teacher, run.pair.teacher.eos)}"
    )
    if run.pair.alignment is None and run.pair.student.eos != run.pair.teacher.eos:
        return Check(
            "end of text",
            "warning",
            f"{text}; rollouts stop at the {run.config.rollout.eos}'s: whose end the student "
            "should learn is --eos student, teacher or union",
            facts,
        )
    return Check("end of text", "ok", text, facts)


def examine_padding(run: Run) -> Check:
    facts = {role: model.tokenizer.pad_token_id for role, model in sides(run)}
    same = [role for role, model in sides(run) if facts[role] is None or facts[role] in model.eos]
    return Check(
        "padding",
        "ok",
        f"the {' and the '.join(same)} {'pads with an' if same else ''} end-of-text id or none: a "
        "response ends by position, so its end is taught all the same"
        if same
        else "an id of its own on both sides",
        facts,
    )


def examine_context(run: Run) -> Check:
    lengths = sorted(max(len(r.student_ids), len(r.teacher_ids)) for r in run.problems.train)
    positions = {role: model.positions for role, model in sides(run)}
    facts = {
        "prompts": len(lengths),
        "shortest": lengths[0],
        "median": statistics.median_low(lengths),
        "longest": lengths[-1],
        "positions": positions,
        "max_new_tokens": run.config.rollout.max_new_tokens,
    }
    room = min((p for p in positions.values() if p), default=None)
    return Check(
        "context",
        "ok",
        f"prompts of {lengths[0]} to {lengths[-1]} ids (median {facts['median']}) and up to "
        f"{facts['max_new_tokens']} of an answer, in {room or 'any number of'} positions",
        facts,
    )
