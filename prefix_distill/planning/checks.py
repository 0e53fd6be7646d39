"""Before a GPU-hour is spent: do student, teacher, prompts, sampling and device go together? What
only the models can answer.

``preflight.prepare`` has refused what is impossible by then; here both models are asked, in some
seconds.
"""

import math
import statistics
from dataclasses import replace

import torch

from ..engine import evaluate, loading, scoring
from ..engine.device import Clock, memory_free
from ..engine.models import decoder
from ..engine.rollout import Rollout
from ..engine.sampling import Request, generate
from ..engine.scoring import FIRST_TOKEN
from ..errors import UserError
from ..maths.divergence import Terms
from ..maths.seeds import seed_of
from ..training.pair import named
from ..training.run import Check, Run
from . import forecast
from .forecast import Pair

FEW = 4  # prompts that are looked at
LAST = 6  # ids of a prompt's end that are shown
ZERO = 1e-6  # nats: the most that a model may be away from itself
SECONDS = 15.0  # the most that sampled answers may take, where no number of them was asked for
SHAPING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "do_sample",
    "num_beams",
)


def examine(run: Run, samples: int, limit: float | None = SECONDS) -> list[Check]:
    """All checks, in the order of a token's way. ``samples``: held-out problems that both models
    answer (0: none), left out where that would take more than ``limit`` seconds. Every rank gets
    the same list."""
    found = [
        _vocabulary(run),
        _prompts(run),
        _templates(run),
        _ends(run),
        _padding(run),
        _head(run),
        _itself(run),
        _sampling(run),
        _context(run),
        _memory(run),
    ]
    if samples and run.config.evaluate.problems:
        found.append(_teacher(run, min(samples, len(run.kl_prompts)), limit))
    return found


def _sides(run: Run):
    return ("student", run.student), ("teacher", run.teacher)


def _vocabulary(run: Run) -> Check:
    return Check(
        "vocabulary",
        "ok",
        run.tokenizers,
        {
            role: {
                "ids": max(model.tokenizer.get_vocab().values()) + 1,
                "head_rows": len(model.net.get_output_embeddings().weight),
                "support": model.support,
            }
            for role, model in _sides(run)
        },
    )


@torch.no_grad()
def _prompts(run: Run) -> Check:
    """Both renderings of a prompt, and P_T of the student's most likely first token."""
    rendered = run.train_prompts[:FEW]
    ids = {"student": rendered[0].student_ids, "teacher": rendered[0].teacher_ids}
    facts = {
        role: {
            "text": model.tokenizer.decode(ids[role]),
            "ids": len(ids[role]),
            "last": [[i, model.tokenizer.convert_ids_to_tokens(i)] for i in ids[role][-LAST:]],
        }
        for role, model in _sides(run)
    }
    doubled = [
        role
        for role, model in _sides(run)
        if len(ids[role]) > 1 and ids[role][0] == ids[role][1] == model.tokenizer.bos_token_id
    ]
    chances = []
    for r in rendered:
        tables = []
        for model, prompt in ((run.student, r.student_ids), (run.teacher, r.teacher_ids)):
            row = Rollout(0, 0, prompt, prompt, prompt[:1], prompt[:1], False)
            with run.place.autocast(model.device):
                hidden_ND = scoring.hidden_rows(model, [row])
            tables.append(
                model.head().to(run.place.head_dtype).logits(hidden_ND)[0].softmax(-1).cpu()
            )
        token = int(tables[0].argmax())
        if run.shared is not None:
            token = dict(zip(run.shared.student.tolist(), run.shared.teacher.tolist())).get(token)
        chances += [] if token is None else [tables[1][token].item()]
    facts["first_token_probability"] = chance = (
        math.fsum(chances) / len(chances) if chances else None
    )
    if doubled:
        return Check(
            "prompts",
            "warning",
            f"the {doubled[0]}'s prompt begins with two "
            f"{dict(_sides(run))[doubled[0]].tokenizer.bos_token!r}: its chat template writes one, "
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


def _templates(run: Run) -> Check:
    settings = run.config.data
    facts = {}
    for (role, model), thinking in zip(
        _sides(run), (settings.student_thinking, settings.teacher_thinking)
    ):
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


def _ends(run: Run) -> Check:
    facts = {role: sorted(model.eos) for role, model in _sides(run)} | {
        "rollouts_stop_at": sorted(run.sampler.eos)
    }
    text = (
        f"student {named(run.student, run.student.eos)}; teacher "
        f"{named(run.teacher, run.teacher.eos)}"
    )
    if run.alignment is None and run.student.eos != run.teacher.eos:
        return Check(
            "end of text",
            "warning",
            f"{text}; rollouts stop at the {run.config.rollout.eos}'s: whose end the student "
            "should learn is --eos student, teacher or union",
            facts,
        )
    return Check("end of text", "ok", text, facts)


def _padding(run: Run) -> Check:
    facts = {role: model.tokenizer.pad_token_id for role, model in _sides(run)}
    same = [role for role, model in _sides(run) if facts[role] is None or facts[role] in model.eos]
    return Check(
        "padding",
        "ok",
        f"the {' and the '.join(same)} {'pads with an' if same else ''} end-of-text id or none: a "
        "response ends by position, so its end is taught all the same"
        if same
        else "an id of its own on both sides",
        facts,
    )


def _head(run: Run) -> Check:
    gaps = {role: loading.check_head(model) for role, model in _sides(run)}
    return Check(
        "head",
        "ok",
        f"head(hidden) is the model's own logits, to {max(gaps.values()):.1g} nats",
        gaps,
    )


@torch.no_grad()
def _itself(run: Run) -> Check:
    """The loss of a model against itself, from two readings: 0, but for noise in its layers."""
    terms = (
        replace(run.terms, sampled=False)
        if run.terms.taught_by == "teacher"
        else Terms("reverse-kl", dtype=run.place.head_dtype)
    )
    facts = {}
    for role, model in _sides(run):
        prompts = [getattr(r, f"{role}_ids") for r in run.train_prompts[:FEW]]
        rows = [
            Rollout(i, 0, ids, ids, ids[-FEW:], ids[-FEW:], False) for i, ids in enumerate(prompts)
        ]
        values = scoring.token_statistics(
            terms, model, model, None, rows, run.place, run.config.train.micro_batch_size
        )
        facts[role] = max(abs(v) for row in values.values() for v in row["divergence"].values())
    worst = max(facts, key=facts.get)
    if facts[worst] > ZERO:
        return Check(
            "itself",
            "error",
            f"the {worst} read twice differs from itself by {facts[worst]:.2g} nats per token; "
            "expected 0: something in it is random (dropout, noise); use another copy, or --dtype "
            "float32",
            facts,
        )
    return Check(
        "itself",
        "ok",
        f"each model against itself: {max(facts.values()):.1g} nats per token",
        facts,
    )


def _sampling(run: Run) -> Check:
    sampler = run.sampler
    own = {
        role: {k: v for k, v in model.generation_config.to_diff_dict().items() if k in SHAPING}
        for role, model in _sides(run)
    }
    facts = {
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "begin": run.config.rollout.begin,
        "max_new_tokens": run.config.rollout.max_new_tokens,
        "eos": sorted(sampler.eos),
        "ignored": own,
    }
    text = (
        f"temperature {sampler.temperature:g}, top-p {sampler.top_p:g}, top-k "
        f"{sampler.top_k or 'off'}"
    )
    ignored = "; ".join(
        f"the {role}'s own {', '.join(f'{k} {v}' for k, v in found.items())}"
        for role, found in own.items()
        if found
    )
    text += f"; without effect: {ignored}" if ignored else ""
    if not sampler.on_policy:
        return Check("sampling", "warning", f"{text}: off-policy for the divergence", facts)
    return Check("sampling", "ok", text, facts)


def _context(run: Run) -> Check:
    lengths = sorted(max(len(r.student_ids), len(r.teacher_ids)) for r in run.train_prompts)
    positions = {role: model.positions for role, model in _sides(run)}
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


def _memory(run: Run) -> Check:
    """What the run will need beside the weights, which are loaded, against what is free."""
    place, config = run.place, run.config
    free = memory_free(place.device)
    case = forecast.case(
        config,
        place.dtype,
        place.head_dtype,
        [(len(r.student_ids), len(r.teacher_ids)) for r in run.train_prompts],
        run.prefix.longest(config.train.steps or 1),
        config.rollout.max_new_tokens,
        place.world,
        run.student.support,
    )
    gib = lambda n: f"{n / 2**30:.3g} GiB"
    bound = forecast.at_most(run.student, run.teacher, case)
    facts = {"free_bytes": free, "at_most_bytes": bound}
    if free is None:
        return Check(
            "memory",
            "ok",
            f"what is free on {place.device} is not known; the run needs less than {gib(bound)}",
            facts,
        )
    if bound < free:
        return Check(
            "memory",
            "ok",
            f"less than {gib(bound)} by plain arithmetic, {gib(free)} free on {place.device}",
            facts,
        )
    few = [
        flag
        for flag, on in (
            ("--student-quantize", config.models.student_quantize != "none"),
            ("--teacher-quantize", config.models.teacher_quantize != "none"),
            ("--teacher-device auto", config.runtime.teacher_device == "auto"),
            ("different tokenizers", run.alignment is not None),
        )
        if on
    ]
    if few:
        return Check(
            "memory", "ok", f"not forecast with {few[0]}; {gib(free)} free on {place.device}", facts
        )
    try:
        found = Pair(run.student.net.config, run.teacher.net.config).forecast(case)
    except UserError as error:
        return Check("memory", "ok", f"not forecast: {error}", facts)
    loaded = sum(found["weights"].get(role, 0) for role in ("student", "teacher"))
    needed, fixed = (
        found["total"] - loaded,
        sum(found["weights"].values()) - loaded + found["gradients"],
    )
    facts |= {
        "needed_bytes": needed,
        "fixed_bytes": fixed,
        "set_by": found["set_by"],
        "phases": found["phases"],
    }
    text = (
        f"{gib(needed)} beside the loaded weights, most in {found['set_by']}; {gib(free)} "
        f"free on {place.device}"
    )
    if fixed > free:
        return Check(
            "memory",
            "error",
            f"{text}: optimizer, gradients and copies alone take {gib(fixed)}, whatever the batch; "
            "use --lora 16, a smaller model, or --teacher-device for the teacher",
            facts,
        )
    if needed > free:
        return Check(
            "memory",
            "warning",
            f"{text}: batches will be halved until they fit; lower --micro-batch-size or "
            "--generation-rows, or use --gradient-checkpointing",
            facts,
        )
    return Check("memory", "ok", text, facts)


def _teacher(run: Run, count: int, limit: float | None) -> Check:
    """Full answers of both models to held-out problems, with the same seeds: who is right, and
    who can end a turn."""
    name, cap = "teacher", run.config.rollout.max_new_tokens
    rendered = run.kl_prompts[:count]
    sides = [
        ("student", run.student, "student_ids", run.sampler),
        ("teacher", run.teacher, "teacher_ids", run.text_sampler),
    ]
    sides = [
        (
            role,
            decoder(model, run.place.dtype),
            ids,
            replace(
                sampler,
                seed=seed_of(run.config.runtime.seed, "preflight"),
                temperature=run.config.evaluate.temperature,
                top_p=1.0,
                top_k=0,
                record=False,
            ),
        )
        for role, model, ids, sampler in sides
    ]
    if limit is not None:
        clock, short = Clock(run.place.device), min(8, cap)
        for role, model, ids, sampler in sides:
            with clock.phase("trial"):
                generate(
                    model,
                    [Request(getattr(r, ids), ("trial", i)) for i, r in enumerate(rendered)],
                    short,
                    replace(sampler, eos=frozenset()),
                )
        expected = max(run.place.gather(clock.seconds["trial"])) * cap / short
        if expected > limit:
            return Check(
                name,
                "ok",
                f"not sampled: {count} answers of up to {cap} tokens of each model may take "
                f"{expected:.0f} s; `prefix-distill check` does it, --check-samples sets how many",
                {"expected_seconds": expected},
            )
    facts, text = {}, []
    for role, model, ids, sampler in sides:
        score = evaluate.evaluate(
            model,
            [(r.prompt, getattr(r, ids)) for r in rendered],
            sampler,
            samples=1,
            max_new_tokens=cap,
            answer_format=run.answer_format,
            place=run.place,
        )
        right = None if score.accuracy is None else round(sum(score.right()))
        facts[role] = {
            "right": right,
            "answers": count,
            "finish_rate": score.finish_rate,
            "mean_tokens": score.mean_tokens,
        }
        text.append(
            f"{role} "
            + (f"{right} of {count} right, " if right is not None else "")
            + f"{score.finish_rate:.0%} end"
        )
    ours, theirs = facts["student"], facts["teacher"]
    text = "; ".join(text)
    if theirs["finish_rate"] == 0 < ours["finish_rate"]:
        return Check(
            name,
            "warning",
            f"{text}: the teacher never ends a turn within {cap} tokens, so the student will "
            "unlearn it; longer --max-new-tokens, or another --eos",
            facts,
        )
    if ours["right"] is not None and theirs["right"] <= ours["right"]:
        return Check(
            name,
            "warning",
            f"{text}: on this small sample the teacher is not better than the student; what should "
            "it teach?",
            facts,
        )
    return Check(name, "ok", text, facts)
