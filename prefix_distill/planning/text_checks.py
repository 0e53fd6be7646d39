"""Check what a run reads and writes as text: vocabularies, prompts, templates, EOS and lengths."""

import math
import re
import statistics
from dataclasses import replace

import torch

from ..engine import scoring
from ..engine.models import Model
from ..engine.rollout import Side
from ..engine.scoring import LOW_FIRST_TOKEN_PROBABILITY
from ..engine.vocabulary import count_ids
from ..prompts import templates
from ..prompts.chat import list_variables
from ..prompts.rendering import Renderer
from ..prompts.templates import describe_changes
from ..training.pair import describe_tokens
from ..training.run import Check, Run
from ..training.turn_end import describe_turn_end, find_unnamed_turn_end
from .case import Ids
from .outcomes import SAMPLE, both_models, passed, warned

# the tags of several families between which a model thinks
THINKING_TAGS = re.compile(
    r"</?(?:think|thinking|reasoning)>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>"
)
LAST = 6  # ids at the end of a prompt that are shown
COMPARE_PROMPTS = "check that both prompts ask for the same form of answer"


def check_vocabulary(run: Run) -> Check:
    """Return how the tokenizers compare, and how many ids each model has."""
    facts = {}
    for role, model in both_models(run):
        facts[role] = {
            "ids": count_ids(model),
            "head_rows": len(model.net.get_output_embeddings().weight),
            "support": model.support,
        }
    return passed("vocabulary", run.pair.tokenizers, facts)


def check_data(run: Run) -> Check:
    """Return how the rows of every dataset were read: each column, and the first row."""
    graded = sum(map(run.problems.grader.can_grade, (p for p, _ in run.problems.held_out)))
    text = f"{graded:,} of {len(run.problems.held_out):,} evaluated prompts can be graded"
    return passed("data", text, {"account": run.notes.account})


def check_prompts(run: Run) -> Check:
    """Return both renderings of a prompt, and whether the teacher expects the student's answer.

    The teacher's probability of the student's most likely first token is low if the prompts ask for
    different forms of answer.
    """
    first = run.problems.train[0]
    facts: dict[str, object] = {
        "student": _describe_prompt(run.pair.student, first.student_ids),
        "teacher": _describe_prompt(run.pair.teacher, first.teacher_ids),
    }
    chances = _first_token_probabilities(run)
    chance = None
    if chances:
        chance = math.fsum(chances) / len(chances)
    facts["first_token_probability"] = chance
    for role, model, ids in (
        ("student", run.pair.student, first.student_ids),
        ("teacher", run.pair.teacher, first.teacher_ids),
    ):
        if len(ids) > 1 and ids[0] == ids[1] == model.tokenizer.bos_token_id:
            text = (
                f"the {role}'s prompt begins with two {model.tokenizer.bos_token!r}, one from its "
                "chat template and one from its tokenizer; remove one of them"
            )
            return warned("prompts", text, facts)
    if chance is None:
        text = (
            "the student's most likely first tokens are not in the teacher's vocabulary; "
            f"{COMPARE_PROMPTS}"
        )
        return warned("prompts", text, facts)
    text = (
        "the teacher gives the student's most likely first token a mean probability of "
        f"{chance:.2g}"
    )
    if chance < LOW_FIRST_TOKEN_PROBABILITY:
        text += (
            f", below {LOW_FIRST_TOKEN_PROBABILITY}; {COMPARE_PROMPTS} (--template, "
            "--student-thinking, --teacher-thinking, --begin)"
        )
        return warned("prompts", text, facts)
    text += (
        f"; the first prompt has {len(first.student_ids)} tokens for the student and "
        f"{len(first.teacher_ids)} for the teacher"
    )
    return passed("prompts", text, facts)


def _describe_prompt(model: Model, ids: Ids) -> dict:
    """Return a prompt's text, its number of ids, and its last ids with their tokens."""
    last = []
    for i in ids[-LAST:]:
        last.append([i, model.tokenizer.convert_ids_to_tokens(i)])
    return {"text": model.tokenizer.decode(list(ids)), "ids": len(ids), "last": last}


@torch.no_grad()
def _first_token_probabilities(run: Run) -> list[float]:
    """Return the teacher's probability of the student's most likely first token, for some prompts.

    Tokens that the teacher does not have are left out.
    """
    teacher_of = None
    if run.pair.shared_support is not None:
        student_ids, teacher_ids = (
            run.pair.shared_support.student.tolist(),
            run.pair.shared_support.teacher.tolist(),
        )
        # The EOS ids of each model follow the shared tokens, and their numbers may differ.
        teacher_of = dict(zip(student_ids, teacher_ids, strict=False))
    chances = []
    for prompt in run.problems.train[:SAMPLE]:
        student_V = _first_token_distribution(run, run.pair.student, prompt.student_ids)
        teacher_V = _first_token_distribution(run, run.pair.teacher, prompt.teacher_ids)
        token = int(student_V.argmax())
        if teacher_of is not None:
            if token not in teacher_of:
                continue
            token = teacher_of[token]
        chances.append(teacher_V[token].item())
    return chances


def _first_token_distribution(run: Run, model: Model, prompt: Ids) -> torch.Tensor:
    """Return a model's distribution [V] over the first token after ``prompt``, on the CPU."""
    # The hidden state that predicts a response's first token does not depend on that token.
    side = Side(prompt=prompt, ids=prompt[:1], rows=(0,))
    with run.place.autocast(model.device):
        hidden_ND = scoring.hidden_rows(model, [side])
    logits_ND = model.head().to(run.place.head_dtype).logits(hidden_ND)
    return logits_ND[0].softmax(-1).cpu()


def check_templates(run: Run) -> Check:
    """Return whether both models use the same kind of prompt and of thinking.

    The text says what rendering changed in the prompts, and lists the templates' variables.
    """
    check = _compare_templates(run)
    changes = describe_changes([r.changes for r in run.problems.train])
    texts = [check.text, *changes, *_list_variables(check.facts)]
    return replace(check, text="; ".join(texts), facts={**check.facts, "changes": changes})


def _list_variables(facts: dict) -> list[str]:
    """Return a clause for the variables of each template that has some."""
    clauses = []
    for role, flag in (("student", "--template-arg"), ("teacher", "--teacher-template-arg")):
        names = ", ".join(facts[role]["variables"])
        if names:
            clauses.append(f"variables of the {role}'s template, for {flag}: {names}")
    return clauses


def _compare_templates(run: Run) -> Check:
    data = run.config.data
    student_renderer = templates.student_renderer(run.pair.student, run.config)
    teacher_renderer = templates.teacher_renderer(run.pair.teacher, run.config)
    student = _describe_template(run, student_renderer, data.student_thinking)
    teacher = _describe_template(run, teacher_renderer, data.teacher_thinking)
    facts = {"student": student, "teacher": teacher}
    if student["form"] != teacher["form"]:
        text = (
            f"the student gets {student['form']} prompts, the teacher {teacher['form']} prompts; "
            "use --template plain for both"
        )
        return warned("templates", text, facts)
    text = f"thinking: student {student['thinking']}, teacher {teacher['thinking']}"
    if student["thinking_switch"] != teacher["thinking_switch"]:
        role = "student"
        if teacher["thinking_switch"]:
            role = "teacher"
        text += (
            f"; only the {role}'s chat template has a thinking switch; choose with "
            f"--{role}-thinking on or off"
        )
        return warned("templates", text, facts)
    if student["thinking"] != teacher["thinking"]:
        text += "; set --student-thinking and --teacher-thinking alike, unless you want this"
        return warned("templates", text, facts)
    text = f"both {student['form']}, thinking {student['thinking']}"
    if student["ending"] != teacher["ending"]:
        text += (
            f"; after the question, the student's prompt has {student['ending']!r} and the "
            f"teacher's {teacher['ending']!r}"
        )
    for role, side in (("student", student), ("teacher", teacher)):
        twice = [tag for tag in side["thinking_tags"] if side["thinking_tags"].count(tag) > 1]
        if twice:
            text += f"; the {role}'s prompt has {twice[0]} twice; omit it from --begin"
            return warned("templates", text, facts)
    if student["thinking_tags"] != teacher["thinking_tags"]:
        text += (
            "; only one of them has these thinking tags, or they differ; set --student-thinking "
            "and --teacher-thinking, --template-arg or --begin so that both end alike"
        )
        return warned("templates", text, facts)
    return passed("templates", text, facts)


def _describe_template(run: Run, renderer: Renderer, thinking: str) -> dict:
    """Return the kind of a model's prompts, how its thinking is set, and how its prompts end."""
    ending = renderer.ending + (run.config.rollout.begin or "")
    return {
        "form": "chat" if renderer.template else "plain",
        "thinking_switch": "enable_thinking" in renderer.template,
        "thinking": thinking,
        "ending": ending,
        "thinking_tags": THINKING_TAGS.findall(ending),
        "variables": list_variables(renderer.template),
    }


def check_eos(run: Run) -> Check:
    """Return whether both models end a response with the same ids."""
    facts = {
        "student": sorted(run.pair.student.eos),
        "teacher": sorted(run.pair.teacher.eos),
        "rollouts_stop_at": sorted(run.method.sampler.eos),
    }
    text = (
        f"student {describe_tokens(run.pair.student, run.pair.student.eos)}; teacher "
        f"{describe_tokens(run.pair.teacher, run.pair.teacher.eos)}"
    )
    unnamed = []
    for role, renderer, model in (
        ("student", templates.student_renderer(run.pair.student, run.config), run.pair.student),
        ("teacher", templates.teacher_renderer(run.pair.teacher, run.config), run.pair.teacher),
    ):
        end = find_unnamed_turn_end(renderer, model)
        if end is not None:
            unnamed.append(f"{role}: {describe_turn_end(model, end)}")
    if unnamed:
        return warned("end of text", "; ".join([text, *unnamed]), facts)
    # Ids of different tokenizers cannot be compared; each model ends a response with its own.
    if run.pair.alignment is None and run.pair.student.eos != run.pair.teacher.eos:
        text += (
            f"; rollouts stop at the EOS ids of --eos {run.config.rollout.eos}; choose with --eos "
            "student|teacher|union"
        )
        return warned("end of text", text, facts)
    return passed("end of text", text, facts)


def check_padding(run: Run) -> Check:
    """Return which models have no padding id that differs from their EOS ids."""
    facts = {}
    without = []
    for role, model in both_models(run):
        pad = model.tokenizer.pad_token_id
        facts[role] = pad
        if pad is None or pad in model.eos or pad >= model.id_limit:
            without.append(role)
    if not without:
        return passed("padding", "both models have a padding id that is not an EOS id", facts)
    text = (
        f"{' and '.join(without)}: no padding id other than an EOS id; the loss still covers EOS "
        "tokens, because a response ends by position"
    )
    return passed("padding", text, facts)


def check_context(run: Run) -> Check:
    """Return the lengths of prompts and responses beside the models' positions."""
    lengths = sorted(max(len(r.student_ids), len(r.teacher_ids)) for r in run.problems.train)
    median = statistics.median_low(lengths)
    limit = run.config.rollout.max_new_tokens
    positions = {role: model.positions for role, model in both_models(run)}
    facts = {
        "prompts": len(lengths),
        "shortest": lengths[0],
        "median": median,
        "longest": lengths[-1],
        "positions": positions,
        "max_new_tokens": limit,
    }
    limits = [p for p in positions.values() if p]
    room = "no limit on positions"
    if limits:
        room = f"{min(limits)} positions"
    text = (
        f"prompts of {lengths[0]} to {lengths[-1]} tokens (median {median}), rollouts of up to "
        f"{limit}; {room}"
    )
    return passed("context", text, facts)
