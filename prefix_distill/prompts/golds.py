"""Read reference answers: the value of a column becomes text, and text is readable or prose."""

import math
import re
from decimal import Decimal
from typing import Any

from . import answers
from .readers import parse_json

# how tables write that a cell is empty
MISSING = ("", "nan", "na", "n/a", "null", "<na>")
PROSE = "without a final answer"
BLANK = "missing"
# a word of two letters or more that is no LaTeX command
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_SENTENCE_WORDS = 8  # an answer with punctuation and so many words is a sentence
_LINE_WORDS = 3  # the same of an answer of several lines
_LONG_WORDS = 15  # the same without punctuation


def read_gold(value: Any, column: str) -> str | None:
    """Return a reference answer as text; None if the row has none.

    Items of a list are joined with ", ", and floats are written without an exponent. Raise
    ValueError, whose text continues "row 3 …", if no answer can equal the value.
    """
    if isinstance(value, list):
        return _read_list(value, column)
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"has {value} in '{column}', which no answer can equal (expected text, a number or "
            "null)"
        )
    if isinstance(value, float):
        return _write_number(value)
    if isinstance(value, dict):
        keys = ", ".join(map(str, value))[:100]
        raise ValueError(
            f"has an object with the fields {keys} in '{column}', expected text or a number (name "
            f"a field with --answer-column {column}.FIELD)"
        )
    if not isinstance(value, str | int | Decimal):
        raise ValueError(
            f"has a value of type {type(value).__name__} in '{column}', expected text or a number"
        )
    text = str(value)
    if text.strip().lower() in MISSING:
        return None
    if text.lstrip().startswith('["'):
        return _read_json_list(text, column)
    return text


def _read_json_list(text: str, column: str) -> str | None:
    """Return the items of a JSON list of texts; other text as it is."""
    try:
        values = parse_json(text)
    except ValueError:
        return text
    if not all(isinstance(value, str) for value in values):
        return text
    return _read_list(values, column)


def _write_number(value: float) -> str:
    """Return a float without an exponent: 1e-07 → 0.0000001."""
    text = repr(value)
    if "e" in text:
        text = format(Decimal(text), "f")
    return text


def _read_list(values: list[Any], column: str) -> str | None:
    """Return the items joined; of chat messages, the text of the last one."""
    if values and isinstance(values[-1], dict) and isinstance(values[-1].get("content"), str):
        return read_gold(values[-1]["content"], column)
    texts = []
    for value in values:
        text = read_gold(value, column)
        if text is not None:
            texts.append(text)
    return ", ".join(texts) or None


def describe_reading(text: str | None, answer_format: str) -> str:
    r"""Return how the final answer of a reference is read.

    That is ``boxed``, ``after ####``, ``as text``, or PROSE or BLANK if it cannot be graded.
    """
    if text is None:
        return BLANK
    if answer_format == "exact":
        return "as text"
    if answer_format == "choice":
        return _describe_letter(text)
    if answers.extract_answer(text, "boxed") is not None:
        return "boxed"
    if answers.extract_answer(text, "hash") is not None:
        return "after ####"
    if is_prose(text) or _is_record(text):
        return PROSE
    return "as text"


def _describe_letter(text: str) -> str:
    letter = answers.extract_reference(text)
    if answers.extract_answer(f"\\boxed{{{letter}}}", "choice") is None:
        return PROSE
    return "a letter"


def _is_record(text: str) -> bool:
    """Return whether the text is a JSON object, such as the test cases of a program."""
    if not text.lstrip().startswith('{"'):
        return False
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def is_prose(text: str) -> bool:
    """Return whether a text is one or more sentences, and so no final answer."""
    text = text.strip()
    words = len(_WORD.findall(text))
    if "\n" in text and words >= _LINE_WORDS:
        return True
    if "。" in text or words >= _LONG_WORDS:
        return True
    return words >= _SENTENCE_WORDS and re.search(r"[.,;:!?]", text) is not None
