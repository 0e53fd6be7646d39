r"""Decide whether two final answers are equal: as text, as plain numbers, else by math-verify.

A plain number is an integer, decimal, fraction, mixed number, percentage or power of ten, with
thousands separators, a currency sign or a unit around it. A unit may be missing on one side, but
two known units must be the same. As in MATH's grader, a percent sign does not count, but 50% is
also 0.5.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from . import expressions, units

LONGEST = 2000  # characters; longer answers are compared as text only
LARGEST_POWER = 400  # of ten; larger ones are left to math-verify and its time limit
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
BASES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
BASE_OF = {word: str(base) for base, word in enumerate((BASES + "fifteen sixteen").split())}

_LETTER = r"[\da-zA-Z]|\\(?:pi|alpha|beta|gamma|theta|lambda|phi)(?![a-zA-Z])"
_UPPER = re.compile(rf"\\([dt]?frac|[dt]?binom)(?![a-zA-Z]*\s*\{{)\s*({_LETTER})")
_LOWER = re.compile(rf"(\\(?:frac|binom)\{{[^{{}}]*\}})\s*({_LETTER})")
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:\^(?:\{\s*\\(?:circ|degree)\s*\}|\s*\\(?:circ|degree))|°)"
)
_FRAME = " \t\r\n*`"
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])|[\u00a0\u2000-\u200a\u202f]|\s+")
_NOTHING = re.compile(
    r"\\!|\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\^(?:\{\s*\\(?:circ|degree)\s*\}|\s*\\(?:circ|degree))|°"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_SIGNS = str.maketrans("\u2212\uff0c\uff05", "-,%")  # minus sign, full-width comma and percent
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|textit|mathbf|bf|rm)\s*\{([^{}]*)\}"
_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[\d,]+)\s*\}|(\d))\s*(?:\{\s*(\d[\d,]*)\s*\}|(\d))"
)
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+"
_TIMES = r"\s*(?:\\times|\\cdot|×|·|\*)\s*"
_POWER = rf"(?:[eE](?P<e>[+-]?\d+)\b|{_TIMES}10\s*\^\s*\{{?\s*(?P<ten>[+-]?\d+)\s*\}}?)?"
_BODY = (
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+)"
    rf"|(?P<top>{_DIGITS})\s*/\s*(?P<bottom>\d[\d,]*)"
    rf"|(?P<number>{_DIGITS}){_POWER})"
)
# a minus after a digit, letter or bracket is a subtraction or a range
_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}])-)?\$?{_BODY}%?")
_CURRENCY = r"(?:US\$|[$€£¥₹])?\s*"
_MATHS = "pi|sqrt|sin|cos|tan|cot|sec|csc|log|exp|mod|base|more|less|times|plus|minus|over|and|or"
_UNIT = (
    rf"\(?(?!(?:{_MATHS})(?![a-z]))(?:[A-Za-z]{{3,}}|[ckm]m|[km]g|m[liL]|ft|in|lb|oz|hr|yd|[ap]m|th"
    r"|st|nd|rd)(?:[ ./-]+[A-Za-z]+)*\)?(?:\s*\^\s*\{?[23]\}?)?"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*{_CURRENCY}(?P<sign2>[-+]?)\s*{_BODY}\s*(?P<percent>%|percent\b)?"
    rf"\s*[€£¥]?\s*(?P<unit>{_UNIT})?"
)
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_BASED = re.compile(r"([-+]?[0-9A-F][0-9A-F.,]*)\s*_\s*\{?\s*(?:base )?(\w+)\s*\}?")
_WORDS = re.compile(r"[^\W\d_]+(?:[ ,'’-]+[^\W\d_]+)*")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number as it is written: its value, and whether it has a decimal point or percent sign."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False

    def text(self) -> str:
        """Return the number for math-verify: a decimal with its point, else a fraction."""
        if self.is_decimal and _terminates(self.value):
            quotient = Decimal(self.value.numerator) / Decimal(self.value.denominator)
            return format(quotient, "f")
        return str(self.value)


def is_equal(answer: str, wanted: str) -> bool:
    """Return whether two final answers are equal."""
    if not answer or answer == wanted:
        return bool(answer)
    if answer.isascii() and answer.isdecimal() and wanted.isascii() and wanted.isdecimal():
        return answer.lstrip("0") == wanted.lstrip("0")
    if max(len(answer), len(wanted)) > LONGEST:
        return False
    if units.differ(answer, wanted):
        return False
    answer, wanted = tidy(answer), tidy(wanted)
    if answer == wanted:
        return bool(answer)
    if _BASED.fullmatch(answer) or _BASED.fullmatch(wanted):
        return _digits_and_base(answer) == _digits_and_base(wanted)
    given, gold = read_number(answer), read_number(wanted)
    if given is not None and gold is not None:
        return _are_equal_numbers(given, gold)
    if _is_word(answer) or _is_word(wanted):
        return answer.casefold() == wanted.casefold()
    if given is not None:
        answer = given.text()
    if gold is not None:
        wanted = gold.text()
    return _are_equal_expressions(answer, wanted)


def is_number(text: str) -> bool:
    """Return whether the whole text is a plain number, with or without a unit."""
    return len(text) <= LONGEST and read_number(tidy(text)) is not None


def last_number(text: str) -> str | None:
    """Return the last number of a text without separators, currency and percent sign."""
    matches = list(_IN_TEXT.finditer(_slashed(_plain(text))))
    if not matches:
        return None
    return re.sub(r"[,$%]", "", matches[-1][0])


def read_number(text: str) -> Number | None:
    """Return the plain number that a tidy text is, or None."""
    repeating = _REPEATING.fullmatch(text)
    if repeating is not None:
        return _repeating(*repeating.groups())
    match = _NUMBER.fullmatch(_slashed(text))
    if match is None:
        return None
    try:
        value = _value(match)
    except (ValueError, ZeroDivisionError):  # more than 4,300 digits, or a zero below a fraction
        return None
    if value is None:
        return None
    if "-" in (match["sign"], match["sign2"]):
        value = -value
    unit = (match["unit"] or "").split(" ")[0].casefold()
    digits = match["number"] or match["top"] or ""
    return Number(
        value=value * SCALES.get(unit, 1),
        is_decimal="." in digits,
        is_percent=match["percent"] is not None,
    )


def tidy(text: str) -> str:
    """Return an answer without the formatting that does not change its meaning."""
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = _braced(_plain(text)).strip(_FRAME)
    text = re.sub(r"(?<=[\d ])([ap])\.m\.?$", r"\1m", text)
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = _without_unit(text)
    text = re.sub(_TEXT, r" \1", text)
    text = re.sub(r"\s+(?:and|or)\s+", ", ", text)
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text.removeprefix(opening).removesuffix(closing).strip(_FRAME)
    text = text.rstrip(" .,;")
    text = re.sub(r"\s+", " ", text).strip(_FRAME)
    letter = re.fullmatch(r"\(([A-Za-z])\)", text)
    if letter is not None:
        return letter[1]
    return text


def _plain(text: str) -> str:
    """Return a text with ASCII digits and signs, and without separators of digit groups."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(_as_power, text)
        text = "".join(map(_ascii_digit, text))
        text = text.translate(_SIGNS)
    text = _NOTHING.sub("", text)
    text = _SPACE.sub(" ", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return _GROUPS.sub(_joined, text)


def _braced(text: str) -> str:
    r"""Return a text in which \frac \pi4 is \frac{\pi}{4}, and the same of binomials."""
    text = _UPPER.sub(r"\\\1{\2}", text)
    text = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text)
    return _LOWER.sub(r"\1{\2}", text)


def _as_power(match: re.Match[str]) -> str:
    return f"^{{{match[0].translate(_SUPERSCRIPTS)}}}"


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(" ", "")


def _ascii_digit(letter: str) -> str:
    if letter.isdecimal():
        return str(int(letter))
    return letter


def _slashed(text: str) -> str:
    r"""Return a text in which \frac{1}{2} of numbers is 1/2, and 3\frac12 is 3 1/2."""
    return _FRACTION.sub(_slash, text).strip()


def _slash(match: re.Match[str]) -> str:
    fraction = f"{match[1] or match[2]}/{match[3] or match[4]}"
    if match.string[: match.start()].rstrip()[-1:].isdigit():
        return f" {fraction}"
    return fraction


def _without_unit(text: str) -> str:
    r"""Return a text without a unit in \text{…} at its end; words of number stay."""
    match = re.search(rf"(?<=[\d}}) ]){_TEXT}(?:\s*\^\s*\{{?[23]\}}?)?[ .]*\$?$", text)
    if match is None:
        return text
    unit = match[1].strip()
    if not unit[:1].isalpha() or unit.casefold() in ("percent", *SCALES):
        return text
    if text[: match.start()].rstrip().endswith("_{"):
        return text
    return text[: match.start()].rstrip()


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the number that ``_BODY`` matched, without its sign, if its power is not too large."""
    if match["whole"]:
        return int(match["whole"]) + Fraction(int(match["part"]), int(match["parts"]))
    if match["top"]:
        return _decimal(match["top"]) / _decimal(match["bottom"])
    power = int(match["e"] or match["ten"] or 0)
    if abs(power) > LARGEST_POWER:
        return None
    return _decimal(match["number"]) * Fraction(10) ** power


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _repeating(sign: str, whole: str, first: str, period: str) -> Number:
    r"""Return a repeating decimal such as 0.1\overline{6}."""
    nines = 10 ** len(period) - 1
    value = Fraction(int(whole + first or 0)) + Fraction(int(period), nines)
    value /= 10 ** len(first)
    if sign:
        value = -value
    return Number(value=value)


def _are_equal_numbers(a: Number, b: Number) -> bool:
    """Compare exactly, or with a tolerance if one is a decimal; 50% equals 50 and 0.5."""
    is_decimal = a.is_decimal or b.is_decimal
    if _are_close(a.value, b.value, is_decimal):
        return True
    if a.is_percent == b.is_percent:
        return False
    if a.is_percent:
        return _are_close(a.value / 100, b.value, is_decimal)
    return _are_close(a.value, b.value / 100, is_decimal)


def _are_close(a: Fraction, b: Fraction, is_decimal: bool) -> bool:
    if a == b or not is_decimal:
        return a == b
    tolerance = expressions.ROUNDED
    if _terminates(a) and _terminates(b):
        tolerance = expressions.WRITTEN
    return abs(a - b) <= Fraction(str(tolerance)) * max(abs(a), abs(b))


def _terminates(value: Fraction) -> bool:
    """Return whether a decimal with finitely many digits equals the number."""
    return expressions.terminates(value.denominator)


def _digits_and_base(text: str) -> tuple[str, str]:
    """Return the digits and the base of a number such as 5_{8}; the base is 10 by default."""
    match = _BASED.fullmatch(text)
    if match is None:
        return text.replace(",", ""), "10"
    return match[1].replace(",", ""), BASE_OF.get(match[2], match[2])


def _is_word(text: str) -> bool:
    """Return whether an answer is words; math-verify takes them for products of letters."""
    longest = max(map(len, re.split(r"[ ,'’-]+", text)))
    return longest > 3 and _WORDS.fullmatch(text) is not None


def _are_equal_expressions(answer: str, wanted: str) -> bool:
    """Compare by math-verify; a set is no tuple, and a bare list takes the other's brackets."""
    ours, theirs = _brackets(answer), _brackets(wanted)
    if ours and theirs and ("{" in ours) != ("{" in theirs):
        return False
    if theirs and not ours and "," in answer:
        answer = _wrapped(answer, theirs)
    elif ours and not theirs and "," in wanted:
        wanted = _wrapped(wanted, ours)
    return expressions.are_equal(_as_latex(answer), _as_latex(wanted))


def _as_latex(text: str) -> str:
    return text.replace("$", "").replace("%", "\\%")


def _wrapped(items: str, brackets: str) -> str:
    if "{" in brackets:
        return f"\\{{{items}\\}}"
    return f"{brackets[0]}{items}{brackets[1]}"


def _brackets(text: str) -> str:
    """Return the two brackets around a whole list, as in (1,2]; empty if there are none."""
    inside = text.replace("\\{", "{").replace("\\}", "}")
    if text[:1] == "{" or "," not in inside or inside[:1] not in set("([{"):
        return ""
    depth = 0
    for place, letter in enumerate(inside):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if depth == 0 and place < len(inside) - 1:
            return ""
    return inside[0] + inside[-1]
