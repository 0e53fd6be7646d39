"""How the rows of a dataset are read: the user's choices, completed by a preset's."""

from dataclasses import dataclass, replace

from .columns import match_name
from .presets import Preset
from .readers import Row


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows are read and become prompts.

    - ``prompt_column``, ``answer_column``, ``instruction``: None means the preset's; the columns
      are else detected by name. ``doc.question`` reads a nested record.
    - ``privileged_column``: the column with the text that only the teacher sees.
    - ``system``: the system message.
    - ``prompt_template``: the user's turn with {prompt} and {COLUMN} fields.
    - ``answer_format``: how final answers are read, which decides which references are readable.
    - ``seed``: the seed of samples of rows, of the order of streamed rows and of options.
    - ``streaming``: whether rows are read on demand.
    - ``keep_solutions``: whether prompts keep their solution, to serve as few-shot examples.
    - ``keep_rows``: whether prompts keep their row, for a user's grader.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    privileged_column: str | None = None
    system: str | None = None
    instruction: str | None = None
    prompt_template: str | None = None
    answer_format: str = "auto"
    seed: int = 0
    streaming: bool = False
    keep_solutions: bool = False
    keep_rows: bool = False


def apply_preset(row_format: RowFormat, preset: Preset, row: Row) -> RowFormat:
    """Return the format with the preset's columns and instruction, unless the user gave others."""
    if row_format.prompt_column is None:
        row_format = replace(row_format, prompt_column=match_name(row, preset.prompt))
    if row_format.answer_column is None and preset.answer is not None:
        row_format = replace(row_format, answer_column=match_name(row, preset.answer))
    if row_format.instruction is None:
        row_format = replace(row_format, instruction=preset.instruction)
    return row_format
