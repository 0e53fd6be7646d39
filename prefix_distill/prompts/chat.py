"""Chat templates: turn messages into text, and find the text of each message in it.

A template may drop, change or reorder what it is given. It is therefore rendered twice: with the
messages, and with a mark in place of each message's text. The marks show where each text belongs,
and which text the template drops.
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes

from ..errors import UserError
from .prompt import Message

MARK = "\ue000{}\ue001"  # private-use characters, which no dataset's text contains
MARKS = re.compile("\ue000([0-9]+)\ue001")
# what transformers gives to every template
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
GIVEN |= {"raise_exception"}
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# the tag with which TRL and others mark the text that is trained on; jinja alone does not know it
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
END_OF_THINKING = "</think>"


class LostText(Exception):
    """A template drops or changes the text of a turn; the message says which one."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a prompt's text; ``is_given``: it is a message's text, not the template's."""

    text: str
    is_given: bool


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A prompt's text in pieces. ``pieces`` is None if the template rewrites a message's text, so
    that its place is unknown. ``as_parts``: the template needs content parts instead of text."""

    text: str
    pieces: tuple[Piece, ...] | None
    as_parts: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template with its variables and the date that it writes."""

    tokenizer: Any
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        generation_prompt: bool = True,
    ) -> str:
        """Return what the template writes. Raise any exception that the template raises."""
        given_tools = None
        if tools:
            given_tools = list(tools)
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tools=given_tools,
            chat_template=freeze_clock(read_template(self.tokenizer, given_tools), self.date),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **self.variables,
        )
        return text

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> Rendering:
        """Return the text of the messages with the generation prompt.

        Raise LostText if the template drops or changes a text, a tool call or the tools, and any
        exception that the template raises.
        """
        given = [_prepare(message) for message in messages]
        try:
            return self._render(given, tools, as_parts=False)
        except Exception as error:
            # templates of vision-language models may read lists of parts only
            try:
                return self._render(given, tools, as_parts=True)
            except Exception:
                raise error from None

    def _render(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] | None, as_parts: bool
    ) -> Rendering:
        given = messages
        marked = _mark(messages)
        if as_parts:
            given, marked = _as_parts(given), _as_parts(marked)
        text = self.write(given, tools)
        skeleton = self.write(marked, tools)
        pieces = _split(text, skeleton, messages)
        if pieces is None:
            _check_texts(text, skeleton, messages)
        self._check_tools(given, tools, text)
        if self.opening:
            text += self.opening
            if pieces is not None:
                pieces = (*pieces, Piece(text=self.opening, is_given=False))
        return Rendering(text=text, pieces=pieces, as_parts=as_parts)

    def _check_tools(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] | None, text: str
    ) -> None:
        """Raise LostText if the prompt's text is the same without a tool call or the tools."""
        if tools and self.write(messages) == text:
            raise LostText("drops the row's tools")
        for number, message in enumerate(messages, 1):
            if not message.get("tool_calls"):
                continue
            without = [*messages]
            without[number - 1] = {k: v for k, v in message.items() if k != "tool_calls"}
            if self.write(without, tools) == text:
                raise LostText(f"drops the tool call of turn {number}")

    @cached_property
    def ignores_generation_prompt(self) -> bool:
        """Return whether the text is the same with and without the generation prompt."""
        question = self._example()[:1]
        try:
            return self.write(question) == self.write(question, generation_prompt=False)
        except Exception:  # rendering the prompts reports what the template refuses
            return False

    @cached_property
    def opening(self) -> str:
        """Return what must follow the text of a template that ignores the generation prompt.

        This is what the template writes between a question and its answer. Space alone is left to
        the model, as in templates of Mistral.
        """
        if not self.ignores_generation_prompt:
            return ""
        question, answer = self._example()
        before = self.write([question])
        try:
            both = self.write([question, answer], generation_prompt=False)
        except Exception:
            return ""
        opening = both.partition(_text_of(answer))[0].removeprefix(before)
        if not both.startswith(before) or not opening.strip():
            return ""
        return opening

    @cached_property
    def ending(self) -> str:
        """Return what a prompt has after the user's text; empty if no prompt can be rendered."""
        question = self._example()[0]
        try:
            text = self.write([question])
        except Exception:  # rendering the prompts reports what the template refuses
            return ""
        return text.partition(_text_of(question))[2] + self.opening

    @cached_property
    def closing(self) -> str:
        """Return what the template writes after an answer; empty if it writes nothing."""
        question, answer = self._example()
        try:
            text = self.write([question, answer], generation_prompt=False)
        except Exception:  # the template may refuse answers, which is no fault of the prompts
            return ""
        return text.partition(_text_of(answer))[2].strip()

    def _example(self) -> list[Message]:
        """Return a question and an answer whose texts are marks, in the form that is rendered."""
        messages = _mark([{"role": r, "content": "text"} for r in ("user", "assistant")])
        try:
            if MARK.format(0) in self.write(messages):
                return messages
        except Exception:
            return _as_parts(messages)
        return _as_parts(messages)

    @cached_property
    def reads_clock(self) -> bool:
        """Return whether the template writes a date or time."""
        return "strftime_now(" in read_template(self.tokenizer)


def read_template(tokenizer: Any, tools: object = None) -> str:
    """Return the tokenizer's chat template, of several the one for prompts; empty if it has none.

    Raise UserError if none of several is the default.
    """
    template = tokenizer.chat_template
    if not template:
        return ""
    if isinstance(template, str):
        return template
    try:
        chosen: str = tokenizer.get_chat_template(tools=tools)
    except ValueError:
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(template)}, but none is the default; "
            "name one of them default, or use --template plain"
        ) from None
    return chosen


@lru_cache
def freeze_clock(template: str, date: datetime.date | None) -> str:
    """Return the template with the date and time of ``date``, at midnight, in place of the clock's.

    The time is midnight, because two runs on one day should get the same prompts. Raise UserError
    if the template computes the format of the date.
    """
    if "strftime_now(" not in template:
        return template
    day = date or datetime.date.today()
    midnight = datetime.datetime(day.year, day.month, day.day)

    def write_date(match: re.Match[str]) -> str:
        return json.dumps(midnight.strftime(match[2]), ensure_ascii=False)

    frozen = CLOCK.sub(write_date, template)
    if "strftime_now(" in frozen:
        raise UserError(
            "the chat template reads the clock with a format that it computes, so that a run "
            "cannot be repeated; write the date into the template, or use --template plain"
        )
    return frozen


@lru_cache
def list_variables(template: str) -> tuple[str, ...]:
    """Return the variables of a chat template that a user may set.

    Names that the template sets itself count only if it asks whether they are defined.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError:  # rendering reports it
        return ()
    names = meta.find_undeclared_variables(tree) - GIVEN - environment.globals.keys()
    set_inside = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tested = set()
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
            tested.add(test.node.name)
    names -= set_inside - tested
    return tuple(sorted(name for name in names if not name.endswith("_token")))


def _prepare(message: Message) -> Message:
    """Return the message as templates expect it: text content, and arguments as objects."""
    message = {**message, "content": message["content"] or ""}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        call = json.loads(json.dumps(call, default=str))  # a copy
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # the template gets other text as it is
                function["arguments"] = json.loads(arguments)
        calls.append(call)
    return {**message, "tool_calls": calls}


def _mark(messages: list[Message]) -> list[Message]:
    """Return the messages with a mark for each text that is not blank."""
    marked = []
    for number, message in enumerate(messages):
        if message["content"].strip():
            message = {**message, "content": MARK.format(number)}
        marked.append(message)
    return marked


def _as_parts(messages: list[Message]) -> list[Message]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    text: str = content[0]["text"]
    return text


def _forms(message: Message) -> Iterator[str]:
    """Yield the forms in which a template may write a message's text, the longest first."""
    text = message["content"]
    yield from (text, text.rstrip(), text.lstrip(), text.strip())
    if message["role"] == "assistant" and END_OF_THINKING in text:
        # templates of reasoning models leave out the thoughts of earlier turns
        answer = text.rpartition(END_OF_THINKING)[2]
        yield from (answer, answer.rstrip(), answer.lstrip(), answer.strip())
    if message["role"] == "tool":
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield json.dumps(text.strip(), ensure_ascii=False)[1:-1]


def _split(text: str, skeleton: str, messages: list[Message]) -> tuple[Piece, ...] | None:
    """Return ``text`` in pieces, split where ``skeleton`` has its marks.

    None: the two differ in more than the messages' texts, or a mark is missing.
    """
    first, *rest = MARKS.split(skeleton)
    wanted = {str(n) for n, message in enumerate(messages) if message["content"].strip()}
    if set(rest[::2]) != wanted or not text.startswith(first):
        return None
    pieces = [Piece(text=first, is_given=False)]
    position = len(first)
    for number, literal in zip(rest[::2], rest[1::2], strict=True):
        for form in _forms(messages[int(number)]):
            if text.startswith(form + literal, position):
                break
        else:
            return None
        pieces.append(Piece(text=form, is_given=True))
        pieces.append(Piece(text=literal, is_given=False))
        position += len(form) + len(literal)
    if position != len(text):
        return None
    return tuple(pieces)


def _check_texts(text: str, skeleton: str, messages: list[Message]) -> None:
    """Raise LostText if the template drops or changes a message's text."""
    for number, message in enumerate(messages):
        if not message["content"].strip():
            continue
        role = f"turn {number + 1} ({message['role']})"
        is_found = any(form.strip() and form.strip() in text for form in _forms(message))
        if MARK.format(number) not in skeleton:
            raise LostText(f"drops the text of {role}")
        if not is_found:
            raise LostText(f"changes the text of {role}")
