"""Parse --stop-when: the rules by which a run ends before its last step."""

import dataclasses
import re

from ..errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopWhen:
    """When --stop-when ends a run.

    ``patience``: evaluations without a higher accuracy, None: any number; ``collapse``: whether the
    text of the student must not collapse.
    """

    patience: int | None = None
    collapse: bool = False


def parse_stop_when(text: str) -> StopWhen:
    """Parse ``none``, ``accuracy 3``, ``collapse``, or both with a comma. UserError: anything else.

    ``accuracy:3`` means the same as ``accuracy 3``.
    """
    rule = StopWhen()
    if text.strip() == "none":
        return rule
    for part in text.split(","):
        name, *numbers = part.replace(":", " ").split() or [""]
        if name == "collapse" and not numbers:
            rule = dataclasses.replace(rule, collapse=True)
        elif name == "accuracy" and len(numbers) == 1 and re.fullmatch(r"[1-9]\d{0,8}", numbers[0]):
            rule = dataclasses.replace(rule, patience=int(numbers[0]))
        else:
            raise UserError(
                f"--stop-when {text[:60]}: expected none, 'accuracy N' with N of at least 1, "
                "collapse, or both with a comma; correct it"
            )
    return rule
