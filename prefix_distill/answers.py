"""Text → final answer → right or wrong. One grader for run, eval and demo."""

import logging
import re
from functools import lru_cache

_HASH = re.compile(r"####\s*([^\n]+)")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


def extract(text: str, form: str = "auto") -> str | None:
    r"""The final answer in a response, or None.

    ``boxed``: content of the last \boxed{…}; ``hash``: what follows the last ``####``; ``last-number``: the last number;
    ``exact``: the whole text, stripped; ``auto``: boxed, else hash, else last number.
    """
    if form == "exact":
        return text.strip()
    if form in ("boxed", "auto") and (answer := _last_boxed(text)) is not None:
        return answer
    if form in ("hash", "auto") and (found := _HASH.findall(text)):
        return found[-1].strip()
    if form in ("last-number", "auto") and (found := _NUMBER.findall(text)):
        return found[-1].replace(",", "").replace("$", "").rstrip("%")
    return None


def reference(text: str) -> str:
    """The final answer in a reference: boxed, else after ``####``, else the text itself (it may be words)."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    found = _HASH.findall(text)
    return (found[-1] if found else text).strip()


def correct(response: str, gold: str, form: str = "auto") -> bool:
    """Does the response's final answer equal the reference's? Text equality, else math-verify's symbolic equality."""
    answer = extract(response, form)
    if answer is None:
        return False
    wanted = reference(gold)
    if answer == wanted or form == "exact":
        return answer == wanted
    if re.fullmatch(r"\d+", answer) and re.fullmatch(r"\d+", wanted):
        return int(answer) == int(wanted)
    return _equal(answer, wanted)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


@lru_cache(maxsize=4096)
def _equal(answer: str, wanted: str) -> bool:
    """math-verify's equality; it limits its own time (seconds) and treats what it cannot parse as unequal."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return bool(verify(parse(f"${wanted}$"), parse(f"${answer}$")))
