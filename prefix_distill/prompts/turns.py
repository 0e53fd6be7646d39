"""Read the turns of a conversation from the forms that datasets store them in."""

import re
from typing import Any

from .names import CONVERSATION_COLUMNS
from .prompt import Message
from .readers import parse_json
from .transcripts import SHAREGPT_ROLES, find_reply, split_pair, split_transcript

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {*ROLES, *SHAREGPT_ROLES, "prompter"}
KEPT = ("tool_calls", "tool_call_id", "name")  # what a chat template may render besides the text
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_TURN_KEY = re.compile(r"[\"'](role|from)[\"']\s*:")


def read_turns(value: object, column: str) -> list[Message]:
    """Return text or a list of turns as messages; an empty list if it is neither.

    A JSON list of turns stored as text is parsed. Raise ValueError, whose text continues
    "row 3 …", on text that should be a conversation and is none, and on a turn with images.
    """
    if isinstance(value, str):
        return _read_text(value, column.lower())
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return []
    messages = []
    for number, turn in enumerate(value, 1):
        if turn.keys() >= {"role", "content"}:
            role, content = turn["role"], turn["content"]
        elif turn.keys() >= {"from", "value"}:
            role, content = turn["from"], turn["value"]
        else:
            return []
        role = SHAREGPT_ROLES.get(str(role).lower(), role)
        if isinstance(role, str) and role.lower() in ROLES:
            role = role.lower()
        message = {"role": role, "content": _join_parts(content, number)}
        for key in KEPT:
            if turn.get(key) is not None:
                message[key] = turn[key]
        messages.append(message)
    return messages


def _read_text(text: str, column: str) -> list[Message]:
    """Return text as a user's turn, or as the turns that it spells out."""
    if _LIST_OF_OBJECTS.match(text) and _TURN_KEY.search(text):
        try:
            turns = parse_json(text)
        except ValueError:
            raise ValueError(
                f"has turns as text in '{column}' that are not JSON (got {text[:60]!r}); write "
                "them with json.dumps"
            ) from None
        return read_turns(turns, column)
    messages = split_transcript(text)
    if messages is None and column == "text":
        messages = split_pair(text)
    if messages is not None:
        return messages
    if column == "text":
        reply = find_reply(text)
        if reply is not None:
            raise ValueError(
                f"has an assistant's turn ({reply}) in its text, which does not start with a "
                "user's turn; store the turns in a column 'messages'"
            )
    if column == "chosen":
        raise ValueError(
            "has text in 'chosen', expected turns or a transcript (Human: … Assistant: …); name "
            "the column of the prompt with --prompt-column"
        )
    if column in CONVERSATION_COLUMNS and text.strip():
        raise ValueError(
            f"has the text {text[:60]!r} in '{column}', expected a list of turns such as "
            '[{"role": "user", "content": …}]'
        )
    return [{"role": "user", "content": text}]


def read_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Return a list of tools, or its JSON text; an empty tuple for none, None for anything else."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            return None
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return None
    return tuple(value)


def _join_parts(content: Any, number: int) -> Any:
    """Return a list of text parts as one text; other content as it is.

    Raise ValueError on a part that is no text, such as an image.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            return content
        if not isinstance(part.get("text"), str):
            kind = str(part.get("type", "unknown"))[:40]
            raise ValueError(
                f"has a part of type '{kind}' in turn {number}, expected text parts only; the "
                "models read text"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def are_texts(messages: list[Message]) -> bool:
    """Return whether every message is text and the last one is not blank."""
    if not all(isinstance(message["content"], str) for message in messages):
        return False
    return bool(messages) and bool(messages[-1]["content"].strip())


def find_silent_call(messages: list[Message]) -> int | None:
    """Return the number of the first turn that calls a tool and has no text, from 1, or None."""
    for number, message in enumerate(messages, 1):
        if message.get("tool_calls") and message["content"] is None:
            return number
    return None
