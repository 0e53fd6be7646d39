"""Chat templates: turn a prompt's messages into token ids."""

import re
from typing import Any, Protocol

from ..errors import UserError
from .prompt import Prompt, Rendered

# the teacher's user turn where it is shown a reference solution, after arXiv 2601.18734; ours in
# wording
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
    """The part of a model that rendering uses: its name, for messages, and its tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...


def render(  # noqa: PLR0913  one rendering has six independent settings
    model: Reader,
    messages: tuple[dict, ...],
    template: str,
    thinking: str = "auto",
    index: int | None = None,
    glue: str = "\n\n",
) -> list[int]:
    """Prompt ids in the model's own chat template (with its generation prompt), or as plain text
    (with its BOS): the messages with an empty line between them, and ``glue`` before an answer.

    ``thinking``: on or off sets the template's enable_thinking, auto leaves it alone. UserError
    when ``template`` is 'chat' and the tokenizer has none, when the template has no such switch, or
    when it refuses the messages (of prompt ``index``).
    """
    tokenizer = model.tokenizer
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"model {model.name}: its tokenizer has no chat template; use --template plain or auto"
        )
    chat = template != "plain" and tokenizer.chat_template
    if thinking != "auto" and "enable_thinking" not in (chat or ""):
        raise UserError(
            f"model {model.name}: its chat template has no thinking switch (enable_thinking); "
            "leave --student-thinking and --teacher-thinking at auto for it"
        )
    if not chat:
        text = messages[0]["content"]
        for message in messages[1:]:
            text += (
                ("" if text[-1:].isspace() else glue) if message["role"] == "assistant" else "\n\n"
            ) + message["content"]
        return tokenizer(text).input_ids
    switch = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, **switch
        )
    except Exception as error:  # jinja's TemplateError, or what the template raises itself
        raise UserError(
            f"model {model.name}: its chat template refuses prompt {index} "
            f"({str(error)[:200] or type(error).__name__}); drop --system or use --template plain"
        ) from None


def glue(settings) -> str:
    """What stands between a question and its answer in plain text: a template such as "Question:
    {prompt}\\nAnswer:" ends with the answer's name."""
    return "\n\n" if settings.prompt_template is None else " "


def teacher_messages(prompt: Prompt, template: str) -> tuple[dict, ...]:
    """The messages that the teacher reads: with something privileged, the problem in its last turn
    is ``template`` with the problem and the solution put in."""
    if prompt.privileged is None:
        return prompt.messages
    last, (before, after) = prompt.messages[-1], prompt.around
    fields = {
        "{problem}": last["content"][len(before) : len(last["content"]) - len(after)],
        "{solution}": prompt.privileged,
    }
    content = re.sub(r"\{problem\}|\{solution\}", lambda match: fields[match[0]], template)
    return (*prompt.messages[:-1], {**last, "content": f"{before}{content}{after}"})


def render_all(
    prompts, student: Reader, teacher: Reader, config, limit: int | None = None
) -> tuple[list[Rendered], int]:
    """Renders for both models, with the forced ``--begin`` text at the end, until ``limit`` prompts
    are kept.

    Drops what exceeds ``max_prompt_tokens`` on either side. Returns the kept ones and how many were
    dropped. UserError when nothing is left.
    """
    begin = [begin_ids(model, config.rollout.begin) for model in (student, teacher)]
    settings = config.data
    kept: list[Rendered] = []
    dropped = 0
    for prompt in prompts:
        if limit is not None and len(kept) == limit:
            break
        shown = teacher_messages(prompt, settings.privileged_template or PRIVILEGED)
        ids = [
            tuple(
                render(model, messages, settings.template, thinking, prompt.index, glue(settings))
            )
            for model, messages, thinking in (
                (student, prompt.messages, settings.student_thinking),
                (teacher, shown, settings.teacher_thinking),
            )
        ]
        if max(map(len, ids)) > settings.max_prompt_tokens:
            dropped += 1
        else:
            kept.append(Rendered(prompt, ids[0] + begin[0], ids[1] + begin[1]))
    if not kept and not dropped:
        raise UserError(
            "dataset: no row is left to be taught or evaluated; give one with more rows, or "
            "--eval-dataset"
        )
    if not kept:
        raise UserError(
            f"dataset: all {dropped} prompts are longer than --max-prompt-tokens "
            f"{settings.max_prompt_tokens}; raise it"
        )
    return kept, dropped


def begin_ids(model: Reader, text: str | None) -> tuple[int, ...]:
    """Ids of the forced start of a response (empty for None)."""
    return tuple(model.tokenizer(text, add_special_tokens=False).input_ids) if text else ()
