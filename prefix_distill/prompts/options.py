"""Show the options of multiple-choice questions, and read which of them is right."""

import ast
import contextlib
import re
from string import ascii_uppercase
from typing import Any

from .readers import Row, parse_json

_LETTER = re.compile(r"\(?([A-Za-z])[).]?")
_MOST = len(ascii_uppercase)
# an option of a list that carries its own letter: "A) 40", "(b) 42"
_LETTERED = re.compile(r"\(?([A-Za-z])\s?[).:]\s*(.*)", re.DOTALL)
# the start of such an option in one text: "a ) 40 , b ) 42"
_START = re.compile(r"(?:^|[,;\n])\s*(?=\(?[A-Za-z]\s?[).:])")
# a column that holds one option: A, option_b, opc, choice1, ending0, answerA
_COLUMN = re.compile(r"(|option|opt|op|choice|answer|ending|candidate|sol)[ _]?([a-z]|[0-9])")
_WRONG = re.compile(r"(?:incorrect|wrong)[ _]?answer[ _]?[0-9]+|distractor[ _]?[0-9]+")


def find_option_columns(row: Row) -> tuple[str, ...]:
    """Return the columns that hold one option each, in order: A, B, C or choice1, choice2."""
    kinds: dict[str, dict[str, str]] = {}
    for name, value in row.items():
        match = _COLUMN.fullmatch(name.lower())
        if match is None or isinstance(value, bool) or not isinstance(value, str | int | float):
            continue
        if match[1] or match[2].isalpha():
            kinds.setdefault(match[1], {})[match[2]] = name
    for columns in kinds.values():
        suffixes = sorted(columns)
        is_gapless = suffixes == [chr(ord(suffixes[0]) + k) for k in range(len(suffixes))]
        if len(suffixes) > 1 and suffixes[0] in "a01" and is_gapless:
            return tuple(columns[suffix] for suffix in suffixes)
    return ()


def find_wrong_columns(row: Row) -> tuple[str, ...]:
    """Return the columns that hold one wrong option each, in order of their names."""
    names = []
    for name, value in row.items():
        if isinstance(value, str | int | float) and _WRONG.fullmatch(name.lower()):
            names.append(name)
    return tuple(sorted(names))


def gather_options(row: Row, columns: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of several columns by label: the last character of the column's name."""
    options = {}
    for column in columns:
        if row.get(column) not in (None, ""):
            options[column[-1].upper()] = row[column]
    return options


def read_options(value: Any) -> tuple[list[str], list[str]] | None:
    """Return (labels, texts) of the options, or None if ``value`` does not list 2 to 26 of them.

    The forms are a list of texts or numbers, {"text": [...], "label": [...]}, {"A": …, "B": …},
    a JSON list as text, and text such as "a) 40, b) 42". Letters in the texts become labels.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = _parse_list(value)
    elif isinstance(value, str):
        value = [part.strip(" ,;") for part in _START.split(value) if part.strip(" ,;")]
        if not _have_letters(value):
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
    if _have_letters(texts):
        texts = [_LETTERED.sub(r"\2", text) for text in texts]
    return [str(label) for label in labels[: len(texts)]], texts


def _parse_list(text: str) -> Any:
    """Return a list or an object in JSON or in Python's notation; None if it is neither."""
    try:
        return parse_json(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)  # as pandas writes a list to CSV
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def is_option(answer: Any, options: Any) -> bool:
    """Return whether an answer names one of the options, counted from 0 or from 1."""
    listed = read_options(options)
    if listed is None:
        return False
    for first in (0, 1):
        with contextlib.suppress(ValueError):
            return letter_of(answer, *listed, first=first) is not None
    return False


def _have_letters(texts: list[Any]) -> bool:
    """Return whether the texts start with A), B), C) and so on, each followed by text."""
    for letter, text in zip(ascii_uppercase, texts, strict=False):
        match = _LETTERED.fullmatch(str(text))
        if match is None or match[1].upper() != letter or not match[2]:
            return False
    return True


def count_from_one(answers: list[tuple[Any, int]]) -> bool:
    """Return whether answers are positions from 1: some equal the number of options, none is 0.

    ``answers`` are pairs of an answer and the number of its question's options.
    """
    reaches_last = False
    for answer, count in answers:
        if not re.fullmatch(r"[0-9]{1,2}(\.0)?", str(answer).strip()):
            return False
        position = int(float(answer))
        if not 1 <= position <= count:
            return False
        reaches_last = reaches_last or position == count
    return reaches_last


def show_options(problem: str, texts: list[str]) -> str:
    """Return a question followed by one line for each option, with its letter."""
    lines = [problem.strip(), ""]
    for letter, text in zip(ascii_uppercase, texts, strict=False):  # the alphabet is longer
        lines.append(f"{letter}. {text}")
    return "\n".join(lines)


def letter_of(answer: Any, labels: list[str], texts: list[str], first: int = 0) -> str | None:
    """Return the letter of the right option; None without an answer.

    ``answer`` is the option's letter, text or label, or its position, counted from ``first``.
    Raise ValueError if it is none of them.
    """
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    position = _position_of(answer, labels, texts, first=first)
    if position is None or not 0 <= position < len(texts):
        raise ValueError(
            f"has the answer {str(answer)[:40]!r}, expected one of its {len(texts)} options: the "
            f"text, a letter from A to {ascii_uppercase[len(texts) - 1]}, or a position from "
            f"{first} to {len(texts) - 1 + first}"
        )
    return ascii_uppercase[position]


def _position_of(answer: Any, labels: list[str], texts: list[str], first: int) -> int | None:
    if isinstance(answer, list) and len(answer) == 1:
        [answer] = answer
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer).strip()
    if isinstance(answer, int) and not isinstance(answer, bool):
        if answer - first not in range(len(texts)) and text in texts:
            return texts.index(text)
        return answer - first
    letter = _LETTER.fullmatch(text)
    if text in labels and letter is not None:
        return labels.index(text)
    for known in (texts, labels):
        if text in known:
            return known.index(text)
    if letter is not None:
        return ascii_uppercase.index(letter[1].upper())
    if re.fullmatch(r"[0-9]{1,2}(\.0)?", text):
        return int(float(text)) - first
    return None
