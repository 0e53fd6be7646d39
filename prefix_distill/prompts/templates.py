"""Chat templates: turn a prompt's messages into token ids."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..errors import UserError
from .prompt import Message, Prompt, Rendered

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


class Reader(Protocol):
    """The part of a model that rendering uses: its name, tokenizer and number of ids."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def id_limit(self) -> int: ...


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

    ``template`` is chat, plain or auto (chat if the tokenizer has a template). ``thinking`` on or
    off sets the template's ``enable_thinking``; auto does not set it. Raise UserError if the
    tokenizer has no chat template, if the template has no such switch, if it rejects the messages,
    or if the model has no row for a token.
    """
    tokenizer = model.tokenizer
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"model {model.name}: its tokenizer has no chat template; use --template plain or auto"
        )
    chat_template = tokenizer.chat_template
    if template == "plain" or not chat_template:
        chat_template = ""
    if thinking != "auto" and "enable_thinking" not in chat_template:
        raise UserError(
            f"model {model.name}: its chat template has no thinking switch (enable_thinking); "
            "leave its thinking option at auto (--student-thinking, --teacher-thinking; eval: "
            "--thinking)"
        )
    if not chat_template:
        ids = tokenizer(_plain_text(prompt.messages, separator)).input_ids
        _check_ids(model, ids, f"prompt {prompt.index}")
        return ids
    switch = {}
    if thinking != "auto":
        switch["enable_thinking"] = thinking == "on"
    try:
        ids = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_dict=False, **switch
        )
    except Exception as error:  # jinja's TemplateError, or any exception that a template raises
        raise UserError(
            f"model {model.name}: its chat template rejects prompt {prompt.index} "
            f"({str(error)[:200] or type(error).__name__}); omit --system or use --template plain"
        ) from None
    _check_ids(model, ids, f"prompt {prompt.index}")
    return ids


def _check_ids(model: Reader, ids: Sequence[int], text: str) -> None:
    """Raise UserError if the model has no row for a token of ``text``."""
    last = max(ids, default=-1)
    if last >= model.id_limit:
        raise UserError(
            f"model {model.name}: {text} contains the token "
            f"{model.tokenizer.convert_ids_to_tokens(last)!r} (id {last}), but the model has only "
            f"{model.id_limit} ids; remove it from the text or the chat template"
        )


def _plain_text(messages: tuple[Message, ...], separator: str) -> str:
    text = messages[0]["content"]
    for message in messages[1:]:
        if message["role"] != "assistant":
            text += "\n\n"
        elif not text[-1:].isspace():
            text += separator
        text += message["content"]
    return text


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
    number of dropped ones. Raise UserError if none is kept.
    """
    settings = config.data
    privileged_template = settings.privileged_template or PRIVILEGED
    separator = answer_separator(settings)
    student_begin = encode_begin(student, config.rollout.begin)
    teacher_begin = encode_begin(teacher, config.rollout.begin)
    kept: list[Rendered] = []
    dropped = 0
    for prompt in prompts:
        if limit is not None and len(kept) == limit:
            break
        student_ids = render(
            student,
            prompt,
            settings.template,
            thinking=settings.student_thinking,
            separator=separator,
        )
        teacher_ids = render(
            teacher,
            replace(prompt, messages=teacher_messages(prompt, privileged_template)),
            settings.template,
            thinking=settings.teacher_thinking,
            separator=separator,
        )
        if max(len(student_ids), len(teacher_ids)) > settings.max_prompt_tokens:
            dropped += 1
            continue
        kept.append(
            Rendered(
                prompt=prompt,
                student_ids=(*student_ids, *student_begin),
                teacher_ids=(*teacher_ids, *teacher_begin),
            )
        )
    if kept:
        return kept, dropped
    if not dropped:
        raise UserError(
            "dataset: no rows are left for training or evaluation; add rows, or give --eval-dataset"
        )
    raise UserError(
        f"dataset: all {dropped} prompts are longer than --max-prompt-tokens "
        f"{settings.max_prompt_tokens}; raise --max-prompt-tokens"
    )


def encode_begin(model: Reader, text: str | None) -> tuple[int, ...]:
    """Return the token ids of a response's forced first text (empty for None)."""
    if not text:
        return ()
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    _check_ids(model, ids, "--begin")
    return tuple(ids)
