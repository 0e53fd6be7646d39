"""Parse the options that set what chat templates write: their variables and their date."""

import datetime
import json
import re
from typing import Any

from ..errors import UserError

NEXT_VARIABLE = re.compile(r",(?=[A-Za-z_]\w*=)")  # a value may contain commas
PYTHON_VALUES = {"True": True, "False": False, "None": None}


def parse_template_args(text: str | None, flag: str) -> dict[str, Any]:
    """Parse ``enable_thinking=false,style=short`` → {"enable_thinking": False, "style": "short"}.

    A value is JSON, such as 3, true or "text"; anything else is text as it stands. UserError: a
    part has no name, or a name is set twice; ``flag`` is the option.
    """
    variables: dict[str, Any] = {}
    if text is None:
        return variables
    for part in NEXT_VARIABLE.split(text):
        name, equals, value = part.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(
                f"{flag} {part[:60]}: expected a variable and its value, such as "
                "enable_thinking=false; correct it"
            )
        if name in variables:
            raise UserError(f"{flag} {name}: it is set twice; give it once")
        variables[name] = _read_value(value)
    return variables


def _read_value(text: str) -> Any:
    """Return a JSON or Python value, or the text itself."""
    if text in PYTHON_VALUES:
        return PYTHON_VALUES[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_date(text: str | None) -> datetime.date | None:
    """Parse ``2026-05-31``; None stays None. UserError: the text is no date."""
    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--template-date {text[:40]}: expected a date such as 2026-05-31; correct it"
        ) from None


class TemplateSettings:
    """The values of the options for chat templates, which the section ``data`` declares."""

    template_args: str | None
    teacher_template_args: str | None
    template_date: str | None

    @property
    def variables(self) -> dict[str, Any]:
        """Return the variables of the student's chat template."""
        return parse_template_args(self.template_args, "--template-arg")

    @property
    def teacher_variables(self) -> dict[str, Any]:
        """Return the variables of the teacher's chat template."""
        return parse_template_args(self.teacher_template_args, "--teacher-template-arg")

    @property
    def date(self) -> datetime.date | None:
        """Return the date that chat templates write; None is the day on which the run starts."""
        return parse_date(self.template_date)
