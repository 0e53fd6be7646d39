"""Show the options of multiple-choice questions, and read which of them is right."""

import re
from string import ascii_uppercase
from typing import Any

from .readers import parse_json

_LETTER = re.compile(r"\(?([A-Za-z])[).]?")
_MOST = len(ascii_uppercase)


def read_options(value: Any) -> tuple[list[str], list[str]] | None:
    """Return (labels, texts) of the options, or None if ``value`` does not list 2 to 26 of them.

    The forms are a list of texts or numbers, {"text": [...], "label": [...]}, {"A": …, "B": …},
    and a JSON list as text.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    labels: list[Any] = list(ascii_uppercase)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label") or labels
        value = value["text"]
    elif isinstance(value, dict):
        labels, value = list(value), list(value.values())
    if not isinstance(value, list) or not 2 <= len(value) <= _MOST:
        return None
    texts = []
    for option in value:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            return None
        text = str(option).strip()
        if not text:
            return None
        texts.append(text)
    return [str(label) for label in labels[: len(texts)]], texts


def show_options(problem: str, texts: list[str]) -> str:
    """Return a question followed by one line for each option, with its letter."""
    lines = [problem.strip(), ""]
    for letter, text in zip(ascii_uppercase, texts, strict=False):  # the alphabet is longer
        lines.append(f"{letter}. {text}")
    return "\n".join(lines)


def letter_of(answer: Any, labels: list[str], texts: list[str]) -> str | None:
    """Return the letter of the right option; None without an answer.

    ``answer`` is the option's text, its label or letter, or its position from 0. Raise ValueError
    if it is none of them.
    """
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    position = _position_of(answer, labels, texts)
    if position is None or not 0 <= position < len(texts):
        raise ValueError(
            f"has the answer {str(answer)[:40]!r}, expected one of its {len(texts)} options: the "
            f"text, a letter from A to {ascii_uppercase[len(texts) - 1]}, or a position from 0 to "
            f"{len(texts) - 1}"
        )
    return ascii_uppercase[position]


def _position_of(answer: Any, labels: list[str], texts: list[str]) -> int | None:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    text = str(answer).strip()
    for known in (texts, labels):
        if text in known:
            return known.index(text)
    letter = _LETTER.fullmatch(text)
    if letter is not None:
        return ascii_uppercase.index(letter[1].upper())
    if re.fullmatch("[0-9]{1,2}", text):
        return int(text)
    return None
