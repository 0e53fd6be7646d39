"""Extract final answers from text and grade them. Training, eval and demo use this grader."""

import re

from . import equality

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:(?!\\[)\]])[^\s$])+")  # up to a space or the end of the formula
_HASH = re.compile(r"(?<!#)####(?!#)\s*([^\n]+)")
_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?([A-Z])(?=$|[).:}])")
_CHOICE = re.compile(
    r"(?i:answer(?:\s+is)?)\s*:?[\s*$]*(?:(?i:option|choice)\s*)?[*$]*\(?([A-Z])(?!\w)"
)
_CHOICE_GOLD = re.compile(r"[\s*(]*([A-Z])(?=$|[).:*])|([a-z])$")


def extract_answer(text: str, answer_format: str = "auto") -> str | None:
    r"""Return the final answer of a response, or None if there is none.

    Reasoning up to ``</think>`` is not read, and a last box that never closes is no answer.
    ``answer_format`` is one of:

    - ``boxed``: the content of the last \boxed{…} or \fbox{…}
    - ``hash``: the text after the last ``####`` that holds a number, else after the last one
    - ``last-number``: the last number
    - ``auto``: the first of these three that occurs
    - ``choice``: the letter in the last box, else after the last "answer is" or "Answer:"
    - ``exact``: the whole text without surrounding whitespace
    """
    said = _after_thinking(text)
    if said is None:
        return None
    if answer_format == "exact":
        return said.strip()
    has_box = "\\boxed" in said or "\\fbox" in said
    boxed = _last_boxed(said)
    if has_box and boxed is None and answer_format != "hash":
        return None
    if answer_format == "choice":
        return _choice_letter(said, boxed)
    if answer_format in ("boxed", "auto") and boxed is not None:
        return boxed
    if answer_format in ("hash", "auto"):
        marked = _last_hash(said)
        if marked is not None:
            return marked
    if answer_format in ("last-number", "auto"):
        return equality.last_number(said)
    return None


def extract_reference(text: str, answer_format: str = "auto") -> str:
    """Return the final answer of a reference, read by the rules of ``extract_answer``.

    A reference without a box or ``####`` is itself the answer, except that ``choice`` reads the
    letter of ``(C)`` or ``C. text``, and ``last-number`` the last number of a sentence.
    """
    said = _after_thinking(text)
    if said is None:
        return text.strip()
    if answer_format == "choice":
        return _choice_of_reference(said)
    marked = _last_boxed(said)
    if marked is None:
        marked = _last_hash(said)
    if marked is not None:
        return marked
    whole = said.strip()
    if answer_format == "last-number" and not equality.is_number(whole):
        return equality.last_number(whole) or whole
    return whole


def is_correct(response: str, gold: str, answer_format: str = "auto") -> bool:
    """Return whether the final answers of a response and a reference are equal.

    They are equal as text, as numbers, or, by math-verify, as expressions. The formats ``exact``
    and ``choice`` compare text only. Any text gets an answer, in any thread.
    """
    answer = extract_answer(response, answer_format)
    if answer is None:
        return False
    wanted = extract_reference(gold, answer_format)
    if answer_format == "exact":
        return answer in (wanted, gold.strip())
    if answer_format == "choice":
        return answer == wanted
    return equality.is_equal(answer, wanted)


def _after_thinking(text: str) -> str | None:
    """Return the text after the reasoning; None if the reasoning does not end."""
    _, closed, said = text.rpartition("</think>")
    if "<think>" in said:
        return None
    return said if closed else text


def _last_hash(text: str) -> str | None:
    """Return the text after the last ``####`` that holds a number, else after the last one."""
    marked = [line.strip(" \t\r*`") for line in _HASH.findall(text)]
    for line in reversed(marked):
        if equality.is_number(line):
            return line
    for line in reversed(marked):
        if re.search(r"\d", line):
            return line
    return marked[-1] if marked else None


def _choice_letter(text: str, boxed: str | None) -> str | None:
    match = _LETTER.match(boxed or "")
    if match is not None:
        return match[1]
    letters = _CHOICE.findall(text)
    if not letters:
        return None
    return letters[-1]


def _choice_of_reference(text: str) -> str:
    letter = _choice_letter(text, _last_boxed(text))
    if letter is not None:
        return letter
    marked = equality.tidy(_last_hash(text) or text)
    match = _CHOICE_GOLD.match(marked)
    if match is None:
        return text.strip()
    return (match[1] or match[2]).upper()


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last box, also of \boxed 5; None if it does not close."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        content = _UNBRACED.match(text, start)
        if content is None:
            return None
        return content[0].rstrip(".,;:")
    depth = 0
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None
