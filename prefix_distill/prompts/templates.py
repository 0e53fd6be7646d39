"""Chat templates: turn a prompt's messages into token ids."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..errors import UserError
from .prompt import Message, Prompt, Rendered
from .rendering import Reader, Renderer, Style, check_ids

# The teacher's user turn with a reference solution. The method is that of arXiv 2601.18734; the
# wording is not.
PRIVILEGED = (
    "{problem}\n"
    "\n"
    "A reference solution of this problem, between the two lines:\n"
    "-----\n"
    "{solution}\n"
    "-----\n"
    "\n"
    "Read it until you understand why it is right. Then solve the problem yourself, step by step "
    "and in your own words, without mentioning it."
)


class Settings(Protocol):
    """The sections of the configuration that rendering uses."""

    @property
    def data(self) -> Any: ...

    @property
    def rollout(self) -> Any: ...


def render(
    model: Reader,
    prompt: Prompt,
    template: str,
    *,
    thinking: str = "auto",
    separator: str = "\n\n",
) -> list[int]:
    """Return the prompt's token ids, in the model's chat template or as plain text.

    The chat template includes its generation prompt. Plain text starts with the tokenizer's BOS
    token and has an empty line between messages, but ``separator`` before an assistant's message.
    The arguments are those of ``Style``. UserError: that of ``Renderer``.
    """
    style = Style(template=template, thinking=thinking, separator=separator)
    return Renderer(model=model, style=style).render(prompt).ids


def student_renderer(model: Reader, settings: Settings) -> Renderer:
    """Return what renders the student's prompts, or those of an evaluated model."""
    data = settings.data
    style = replace(_shared_style(data), thinking=data.student_thinking, variables=data.variables)
    return Renderer(model=model, style=style)


def teacher_renderer(model: Reader, settings: Settings) -> Renderer:
    """Return what renders the teacher's prompts."""
    data = settings.data
    style = replace(
        _shared_style(data),
        thinking=data.teacher_thinking,
        variables=data.teacher_variables,
        flag="--teacher-template-arg",
    )
    return Renderer(model=model, style=style)


def _shared_style(data: Any) -> Style:
    """Return the part of the style that both models' prompts have."""
    return Style(
        template=data.template,
        separator=answer_separator(data),
        date=data.date,
        system=data.system,
    )


def answer_separator(settings: Any) -> str:
    """Return the separator between a question and its answer in plain text.

    ``settings`` is the configuration's section ``data``. With a prompt template the separator is a
    space, because such a template usually ends with "Answer:".
    """
    if settings.prompt_template is None:
        return "\n\n"
    return " "


def teacher_messages(prompt: Prompt, template: str) -> tuple[Message, ...]:
    """Return the teacher's messages.

    If the prompt has privileged text, ``template`` replaces the problem in the last turn, with
    {problem} and {solution} filled in.
    """
    if prompt.privileged is None:
        return prompt.messages
    before, after = prompt.around
    fields = {
        "{problem}": prompt.problem[len(before) : len(prompt.problem) - len(after)],
        "{solution}": prompt.privileged,
    }
    # one pass, so that a field's own text is never replaced
    parts = re.split(r"(\{problem\}|\{solution\})", template)
    content = "".join(fields.get(part, part) for part in parts)
    last = prompt.messages[-1] | {"content": f"{before}{content}{after}"}
    return (*prompt.messages[:-1], last)


def render_all(
    prompts: Iterable[Prompt],
    student: Reader,
    teacher: Reader,
    config: Settings,
    limit: int | None = None,
) -> tuple[list[Rendered], int]:
    """Render prompts for both models, followed by the text of ``--begin``, until ``limit`` are
    kept.

    Drop prompts that exceed ``max_prompt_tokens`` for either model. Return the kept prompts and the
    number of dropped ones.
    """
    settings = config.data
    privileged_template = settings.privileged_template or PRIVILEGED
    student_texts = student_renderer(student, config)
    teacher_texts = teacher_renderer(teacher, config)
    student_begin = encode_begin(student, config.rollout.begin)
    teacher_begin = encode_begin(teacher, config.rollout.begin)
    kept: list[Rendered] = []
    dropped = 0
    for prompt in prompts:
        if limit is not None and len(kept) == limit:
            break
        shown = replace(prompt, messages=teacher_messages(prompt, privileged_template))
        student_text = student_texts.render(prompt)
        teacher_text = teacher_texts.render(shown)
        if max(len(student_text.ids), len(teacher_text.ids)) > settings.max_prompt_tokens:
            dropped += 1
            continue
        kept.append(
            Rendered(
                prompt=prompt,
                student_ids=(*student_text.ids, *student_begin),
                teacher_ids=(*teacher_text.ids, *teacher_begin),
                changes=_name_changes(student_text.changes, teacher_text.changes),
            )
        )
    return kept, dropped


def check_kept(name: str, kept: Sequence[Rendered], dropped: int, config: Settings) -> None:
    """Raise UserError if ``render_all`` kept no prompt of the dataset ``name``."""
    if kept:
        return
    if not dropped:
        raise UserError(
            f"dataset {name}: no rows are left for training or evaluation; add rows, or give "
            "--eval-dataset"
        )
    limit = config.data.max_prompt_tokens
    raise UserError(
        f"dataset {name}: all {dropped} prompts are longer than --max-prompt-tokens {limit}; raise "
        "--max-prompt-tokens"
    )


def _name_changes(student: frozenset[str], teacher: frozenset[str]) -> frozenset[str]:
    """Return the changes of both prompts of a row, each with the prompt that it belongs to."""
    changes = set()
    for change in student | teacher:
        where = "both prompts"
        if change not in teacher:
            where = "the student's prompt"
        elif change not in student:
            where = "the teacher's prompt"
        changes.add(f"{where}: {change}")
    return frozenset(changes)


def describe_changes(changes: Sequence[frozenset[str]]) -> list[str]:
    """Return each change with the number of prompts that have it."""
    counts: Counter[str] = Counter()
    for of_prompt in changes:
        counts.update(of_prompt)
    return [f"{change} ({n} of {len(changes)} prompts)" for change, n in sorted(counts.items())]


def encode_begin(model: Reader, text: str | None) -> tuple[int, ...]:
    """Return the token ids of a response's forced first text (empty for None)."""
    if not text:
        return ()
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    check_ids(model, ids, "--begin")
    return tuple(ids)
