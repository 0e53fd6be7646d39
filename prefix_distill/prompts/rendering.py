"""Render one model's prompts: messages to token ids, in its chat template or as plain text."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from ..errors import UserError
from .chat import ChatTemplate, LostText, Piece, list_variables, read_template
from .encoding import encode, find_added_tokens, find_control_tokens
from .prompt import Message, Prompt

SYSTEM_ROLES = ("system", "developer")


class Reader(Protocol):
    """The part of a model that rendering uses: its name, tokenizer and number of ids."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def id_limit(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Style:
    """How prompts are rendered for one model.

    - ``template``: chat, plain or auto (chat if the tokenizer has a template).
    - ``thinking``: on or off sets the template's ``enable_thinking``; auto does not set it.
    - ``separator``: what plain text has before an assistant's message.
    - ``variables``: the template's own variables, set with the option ``flag``.
    - ``date``: the date that the template writes; None is today.
    - ``system``: the text of --system.
    """

    template: str = "auto"
    thinking: str = "auto"
    separator: str = "\n\n"
    variables: Mapping[str, Any] = field(default_factory=dict)
    flag: str = "--template-arg"
    date: datetime.date | None = None
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class RenderedText:
    """A prompt's token ids, its text, and what was changed in it, in words."""

    ids: list[int]
    text: str
    changes: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders prompts for one model, in one style."""

    model: Reader
    style: Style

    def __post_init__(self) -> None:
        """Raise UserError if the model's chat template cannot do what the style asks for."""
        if self.style.template == "chat" and not self.model.tokenizer.chat_template:
            raise UserError(
                f"model {self.model.name}: its tokenizer has no chat template; use --template "
                "plain or auto"
            )
        template = self.template
        if self.style.thinking != "auto" and "enable_thinking" not in template:
            raise UserError(
                f"model {self.model.name}: its chat template has no thinking switch "
                "(enable_thinking); leave its thinking option at auto (--student-thinking, "
                "--teacher-thinking; eval: --thinking)"
            )
        for name in self.style.variables:
            if name not in template:
                listed = ", ".join(list_variables(template)) or "none"
                raise UserError(
                    f"{self.style.flag} {name}: the chat template of {self.model.name} has no such "
                    f"variable; its variables: {listed}; correct the name, or omit it"
                )
        if self.style.thinking != "auto" and "enable_thinking" in self.style.variables:
            raise UserError(
                f"{self.style.flag} enable_thinking: the thinking option is "
                f"{self.style.thinking} already; give one of them"
            )

    @cached_property
    def template(self) -> str:
        """Return the chat template of the prompts; empty if they are plain text."""
        if self.style.template == "plain":
            return ""
        try:
            return read_template(self.model.tokenizer)
        except UserError as error:
            raise UserError(f"model {self.model.name}: {error}") from None

    @cached_property
    def chat(self) -> ChatTemplate:
        """Return the chat template with its variables."""
        variables = dict(self.style.variables)
        if self.style.thinking != "auto":
            variables["enable_thinking"] = self.style.thinking == "on"
        return ChatTemplate(
            tokenizer=self.model.tokenizer, variables=variables, date=self.style.date
        )

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        try:
            return find_added_tokens(self.model.tokenizer)
        except UserError as error:
            raise UserError(f"model {self.model.name}: {error}") from None

    def render(self, prompt: Prompt) -> RenderedText:
        """Return a prompt as token ids.

        Raise UserError if the template rejects the messages or loses some of their text, or if the
        model has no row for a token.
        """
        self._check_system(prompt)
        before: list[int] = []
        if self.template:
            pieces, changes = self._render_chat(prompt)
        else:
            pieces, changes = self._render_plain(prompt)
            before = self._added[0]
        kept = self._kept_tokens(prompt)
        given = "".join(piece.text for piece in pieces if piece.is_given)
        for token in sorted(find_control_tokens(self.model.tokenizer, given) - kept):
            changes.add(f"the control token {token!r} in a text is encoded as text")
        try:
            ids = [*before, *encode(self.model.tokenizer, pieces, kept)]
        except ValueError as error:
            raise UserError(
                f"model {self.model.name}: the text of prompt {prompt.index} has the control token "
                f"{error}, which its tokenizer cannot encode as text; remove it from the row"
            ) from None
        check_ids(self.model, ids, f"prompt {prompt.index}")
        text = "".join(piece.text for piece in pieces)
        return RenderedText(ids=ids, text=text, changes=frozenset(changes))

    def _check_system(self, prompt: Prompt) -> None:
        """Raise UserError if a row's own system turn follows that of --system."""
        first, *others = prompt.messages
        if first["role"] not in SYSTEM_ROLES or first["content"] != self.style.system:
            return
        if others[0]["role"] in SYSTEM_ROLES:
            raise UserError(
                f"--system: prompt {prompt.index} has a system turn of its own; omit --system, or "
                "remove the row's system turn"
            )

    def _kept_tokens(self, prompt: Prompt) -> set[str]:
        """Return the control tokens that --prompt-template or --instruction writes on purpose."""
        before, after = prompt.around
        kept = find_control_tokens(self.model.tokenizer, before + after)
        problem = prompt.problem[len(before) : len(prompt.problem) - len(after)]
        for token in kept & find_control_tokens(self.model.tokenizer, problem):
            raise UserError(
                f"model {self.model.name}: the control token {token!r} is in --prompt-template or "
                f"--instruction and in the text of prompt {prompt.index}; remove it from the row"
            )
        return kept

    def _render_plain(self, prompt: Prompt) -> tuple[tuple[Piece, ...], set[str]]:
        calls = any(message.get("tool_calls") for message in prompt.messages)
        if calls or prompt.tools:
            raise UserError(
                f"model {self.model.name}: prompt {prompt.index} has tools or tool calls, which "
                "plain text cannot show; use a model with a chat template, or remove the row"
            )
        changes = set()
        if self._added[1]:
            names = self.model.tokenizer.convert_ids_to_tokens(self._added[1])
            changes.add(f"{' '.join(names)}, which the tokenizer appends to plain text, is omitted")
        text = _plain_text(prompt.messages, self.style.separator)
        return (Piece(text=text, is_given=True),), changes

    def _render_chat(self, prompt: Prompt) -> tuple[tuple[Piece, ...], set[str]]:
        try:
            rendering = self.chat.render(prompt.messages, prompt.tools)
        except LostText as error:
            raise UserError(
                f"model {self.model.name}: its chat template {error} of prompt {prompt.index}; "
                "change the row, or use another chat template or --template plain"
            ) from None
        except UserError as error:
            raise UserError(f"model {self.model.name}: {error}") from None
        except Exception as error:  # jinja's TemplateError, or any that a template raises
            reason = str(error)[:200] or type(error).__name__
            raise UserError(
                f"model {self.model.name}: its chat template rejects prompt {prompt.index} "
                f"({reason}); {self._advise(prompt)}"
            ) from None
        changes = set()
        if rendering.as_parts:
            changes.add("each text is given as a list of parts, which the chat template needs")
        if self.chat.opening:
            changes.add(
                f"{self.chat.opening!r} is appended, because the chat template writes it before "
                "an answer but ignores the generation prompt"
            )
        elif self.chat.ignores_generation_prompt:
            changes.add("the chat template writes the same without the generation prompt")
        return self._place_texts(prompt, rendering.pieces, rendering.text), changes

    def _place_texts(
        self, prompt: Prompt, pieces: tuple[Piece, ...] | None, text: str
    ) -> tuple[Piece, ...]:
        """Return the pieces, or the whole text where the texts' places are unknown.

        Raise UserError if the places are unknown and a text has a control token.
        """
        if pieces is not None:
            return pieces
        contents = "".join(message["content"] or "" for message in prompt.messages)
        for token in find_control_tokens(self.model.tokenizer, contents):
            raise UserError(
                f"model {self.model.name}: the text of prompt {prompt.index} has the control token "
                f"{token!r}, and its chat template rewrites the text; remove the token from the row"
            )
        return (Piece(text=text, is_given=False),)

    def _advise(self, prompt: Prompt) -> str:
        """Return what a user can do about a prompt that the template rejects."""
        first = prompt.messages[0]
        if first["role"] not in SYSTEM_ROLES:
            return "repair the template, change the row, or use --template plain"
        if first["content"] == self.style.system:
            return "omit --system or use --template plain"
        return (
            "the row has a system turn of its own; put its text before the user's text, or use "
            "--template plain"
        )

    @property
    def reads_clock(self) -> bool:
        """Return whether the prompts contain a date or time."""
        return bool(self.template) and self.chat.reads_clock

    @cached_property
    def ending(self) -> str:
        """Return what a prompt has after the user's text; empty for plain text."""
        if not self.template:
            return ""
        return self.chat.ending

    @cached_property
    def turn_end(self) -> int | None:
        """Return the id of the control token that the chat template writes after an answer.

        None: prompts are plain text, or the template writes no such token.
        """
        if not self.template:
            return None
        tokenizer = self.model.tokenizer
        ids = tokenizer(self.chat.closing, add_special_tokens=False).input_ids
        if not ids or ids[0] not in tokenizer.added_tokens_decoder or ids[0] >= self.model.id_limit:
            return None
        first: int = ids[0]
        return first


def check_ids(model: Reader, ids: list[int], text: str) -> None:
    """Raise UserError if the model has no row for a token of ``text``."""
    last = max(ids, default=-1)
    if last >= model.id_limit:
        raise UserError(
            f"model {model.name}: {text} contains the token "
            f"{model.tokenizer.convert_ids_to_tokens(last)!r} (id {last}), but the model has only "
            f"{model.id_limit} ids; remove it from the text or the chat template"
        )


def _plain_text(messages: tuple[Message, ...], separator: str) -> str:
    text: str = messages[0]["content"]
    for message in messages[1:]:
        if message["role"] != "assistant":
            text += "\n\n"
        elif not text[-1:].isspace():
            text += separator
        text += message["content"]
    return text
