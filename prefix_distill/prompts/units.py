"""Read the unit of an answer: two known units that differ make two answers different."""

import re

# spellings of a unit; no unit is converted into another
_SPELLINGS = (
    "mm millimeter millimeters millimetre millimetres",
    "cm centimeter centimeters centimetre centimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres",
    "in inch inches",
    "ft foot feet",
    "yd yds yard yards",
    "mi mile miles",
    "mg milligram milligrams",
    "g gram grams",
    "kg kilogram kilograms",
    "lb lbs pound pounds £",
    "oz ounce ounces",
    "ml milliliter milliliters millilitre millilitres",
    "l liter liters litre litres",
    "s sec secs second seconds",
    "min mins minute minutes",
    "h hr hrs hour hours",
    "day days",
    "week weeks",
    "month months",
    "year years",
    "am a.m",
    "pm p.m",
    "$ dollar dollars",
    "cent cents",
    "€ euro euros",
    "¥ yen",
    "₹ rupee rupees",
    "° degree degrees",
    "rad radian radians",
    "unit units",
    "km/h kph",
    "m/s",
    "mph",
)
_NAMES = {word: line.split()[0] for line in _SPELLINGS for word in line.split()}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "²": 2, "³": 3, "2": 2, "3": 3}
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|rm)\s*\{([^{}]*)\}")
_DEGREE = re.compile(r"\^(?:\{\s*\\(?:circ|degree)\s*\}|\s*\\(?:circ|degree))")
_SPACE = re.compile(r"\\[,;:!> ]|~|\s+")
_AFTER = re.compile(
    r"[\d)}\]]\s*(?:(?P<word>square|sq|cubic|cu)\.?\s+)?(?P<unit>[a-z./]+|[°€£¥₹])"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?|(?P<sign>[²³]))?"
)
_DOLLAR = "\0"  # stands for \\$ while borders of formulas are removed
_BEFORE = re.compile(r"[-+]?\s*([$€£¥₹])\s*[-+]?[\d.]")


def differ(answer: str, wanted: str) -> bool:
    """Return whether both answers end with a known unit, or start with one, and these differ."""
    ours, theirs = _read(answer), _read(wanted)
    return None not in (ours, theirs) and ours != theirs


def _read(text: str) -> tuple[str, int] | None:
    """Return the unit of an answer and its power, or None if there is no known unit."""
    text = _TEXT.sub(r" \1", _DEGREE.sub("°", text))
    text = _SPACE.sub(" ", text.replace("\\$", _DOLLAR)).strip(" *.")
    if text.count("$") % 2 == 0:  # pairs are the borders of a formula
        text = text.replace("$", "").strip(" .")
    text = text.replace(_DOLLAR, "$").casefold()
    before = _BEFORE.match(text)
    after = _last(text)
    if after is None:
        return None if before is None else (_NAMES[before[1]], 1)
    name = _NAMES.get(after["unit"].rstrip("."))
    if name is None:
        return None
    return name, _POWERS.get(after["word"] or after["power"] or after["sign"] or "", 1)


def _last(text: str) -> re.Match[str] | None:
    """Return the last word of a text that follows a number, or None."""
    for match in re.finditer(r"[\d)}\]]", text[-60:]):
        found = _AFTER.fullmatch(text[-60:], match.start())
        if found is not None:
            return found
    return None
