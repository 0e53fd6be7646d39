"""Say how the rows of a dataset were read: columns, references, and one example."""

from . import answers
from .golds import BLANK, PROSE
from .names import list_names
from .presets import Preset
from .prompt import Prompt
from .rows import BUFFER, FIELD, PromptBuilder

MOST_NAMES = 8  # unused columns that the short account names
NOT_USED = "not used"
SHOWN = 300  # characters of a text that the account shows: most of its start, and its end
SHOWN_END = 80


def describe(
    builder: PromptBuilder, split: str, available: int | None, remarks: tuple[str, ...]
) -> tuple[str, ...]:
    """Return what the user should know of the choices made, the short account first.

    ``available`` is the number of rows in the dataset, or None if they are streamed.
    """
    source, seed = builder.source, builder.row_format.seed
    if source.is_embedded:
        lines = []
    elif source.preset is not None:
        lines = [_describe_preset(builder, source.preset, split)]
    else:
        lines = [_describe_columns(builder)]
    for remark in remarks:
        lines.append(f"dataset {source.text}: {remark}")
    for change, count in builder.changes.items():
        total = builder.readings.total()
        lines.append(f"dataset {source.text}: {change} in {count:,} of {total:,} rows")
    if source.count is not None and available is not None:
        lines.append(
            f"dataset {source.text}: {source.count:,} of {available:,} rows, sampled with "
            f"--seed {seed}"
        )
    elif source.count is not None:
        lines.append(f"dataset {source.text}: {source.count:,} rows, sampled with --seed {seed}")
    if available is None:
        line = (
            f"dataset {source.text}: streamed; a buffer of {BUFFER:,} rows is shuffled with "
            f"--seed {seed} (evaluation takes the first rows in order)"
        )
        if builder.row_format.system:
            line += "; --system replaces a row's own system turn"
        if source.preset is not None and source.preset.sorted:
            line += "; its rows are sorted by subject, so neighboring prompts share one"
        lines.append(line)
    return tuple(lines)


def describe_in_full(builder: PromptBuilder, first: Prompt | None) -> tuple[str, ...]:
    """Return a line for every column, and the first prompt with its reference answer."""
    if builder.source.is_embedded:
        return ()
    name = builder.source.text
    lines = []
    for column, use in uses_of_columns(builder).items():
        lines.append(f"dataset {name}: column {column}: {use}")
    if first is not None:
        turns = []
        for message in first.messages:
            turns.append(f"{message['role']}: {_shorten(message['content'] or '')}")
        reference = "none that can be graded"
        if first.answer is not None:
            reference = _shorten(answers.extract_reference(first.answer))
        lines.append(f"dataset {name}: first row: {'; '.join(turns)}; reference: {reference}")
    return tuple(lines)


def _shorten(text: str) -> str:
    """Return a text in quotes; of a long one, the start and the end."""
    if len(text) <= SHOWN:
        return repr(text)
    left_out = len(text) - SHOWN
    start, end = text[: SHOWN - SHOWN_END], text[-SHOWN_END:]
    return f"{start!r} … {left_out:,} characters … {end!r}"


def uses_of_columns(builder: PromptBuilder) -> dict[str, str]:
    """Return what became of each column."""
    row_format, companions = builder.row_format, builder.companions
    uses = dict.fromkeys(builder.columns, NOT_USED)
    for column in companions.media:
        uses[column] = f"{NOT_USED}: images, video or sound"
    where = "before" if companions.context_first else "after"
    preset = builder.source.preset
    taken: list[tuple[str | None, str]] = []
    if preset is not None:
        taken.append((preset.solution, "worked solution of few-shot examples"))
    taken += [(column, "a wrong option") for column in companions.wrong]
    taken += [(column, "options of the question") for column in companions.options]
    for column, expected in companions.unread:
        uses[column] = f"{NOT_USED}: not {expected}"
    if row_format.prompt_template is not None:
        for field in FIELD.findall(row_format.prompt_template):
            taken.append((field, "inserted by --prompt-template"))
    if row_format.keep_solutions:
        taken.append(("solution", "worked solution of few-shot examples"))
    system = "system message"
    if row_format.system:
        system = f"{NOT_USED}: --system replaces it"
    taken += [
        (companions.context, f"text {where} the prompt"),
        (companions.system, system),
        (companions.tools, "tools"),
        (row_format.privileged_column, "text for the teacher only"),
        (row_format.answer_column, "reference answer"),
        (row_format.prompt_column, "prompt"),
    ]
    for name, use in taken:
        if name is None:
            continue
        column = name if name in uses else name.split(".")[0]
        if column in uses:
            uses[column] = use
    return uses


def _describe_columns(builder: PromptBuilder) -> str:
    """Return the short account of a dataset without preset."""
    row_format, companions = builder.row_format, builder.companions
    text = f"dataset {builder.source.text}: prompt from {row_format.prompt_column}"
    if companions.context:
        where = "before" if companions.context_first else "after"
        text += f", with the text of {companions.context} {where} it"
    if companions.options:
        text += f", with the options in {', '.join(companions.options)}"
    if companions.wrong:
        text += (
            f", with the right option in {row_format.answer_column} and wrong ones in "
            f"{', '.join(companions.wrong)}, in an order set by --seed"
        )
    if companions.system and not row_format.system:
        text += f", system message from {companions.system}"
    text += f"; {_describe_answer(builder)}{_count_readings(builder)}"
    if builder.first_position == 1:
        text += "; the answers count the options from 1"
    return text + _list_unused(builder)


def _describe_answer(builder: PromptBuilder) -> str:
    if builder.row_format.answer_column is not None:
        return f"answer from {builder.row_format.answer_column}"
    if builder.readings and builder.readings[BLANK] == builder.readings.total():
        return "no answer column"
    return "answer from the last turn of the assistant"


def _list_unused(builder: PromptBuilder) -> str:
    names = []
    for column, use in uses_of_columns(builder).items():
        if use == NOT_USED:
            names.append(column)
        elif use.startswith(NOT_USED):
            names.append(f"{column} ({use.removeprefix(f'{NOT_USED}: ')})")
    if not names:
        return ""
    return f"; not used: {list_names(names, MOST_NAMES)}"


def _count_readings(builder: PromptBuilder) -> str:
    """Return how many references are readable and how they are read."""
    counts = builder.readings
    total = counts.total()
    if total == 0:  # streamed rows are read later
        return ""
    readable = total - counts[BLANK] - counts[PROSE]
    parts = [f"{count:,} {reading}" for reading, count in counts.most_common()]
    text = f": {readable:,} of {total:,} references can be graded ({', '.join(parts)})"
    if readable == 0:
        text += ", so accuracy does not apply"
    if counts[PROSE]:
        text += f"; {_describe_gradable_text(builder.answer_format)}"
    return text


def _describe_gradable_text(answer_format: str) -> str:
    """Return what a reference must be, and what grades the others."""
    form = "a short text, or have \\boxed{} or ####"
    if answer_format == "choice":
        form = "a letter or begin with one"
    return f"to be graded, a reference must be {form}; --grader grades the others"


def _describe_preset(builder: PromptBuilder, preset: Preset, split: str) -> str:
    source, row_format = builder.source, builder.row_format
    location = source.location
    if preset.config and location == preset.hub:
        location += f" ({preset.config})"
    if not source.is_file:
        location += f", split {split}"
    answer = "boxed in the last turn"
    if row_format.answer_column:
        answer = f"in column {row_format.answer_column}"
    return (
        f"dataset {source.name}: {location}; prompt in column {row_format.prompt_column}; "
        f"answer {answer}, answer format {preset.answer_format}{_count_readings(builder)}; "
        f"instruction {row_format.instruction or 'none'!r}; license: {preset.license}; "
        f"{preset.note}"
    )


def describe_gradable(name: str, answers_given: list[str | None]) -> str | None:
    """Return a note if some or all of the evaluated prompts cannot be graded, else None."""
    missing = answers_given.count(None)
    if missing == 0 or not answers_given:
        return None
    total = len(answers_given)
    if missing == total:
        return (
            f"accuracy does not apply: none of the {total:,} evaluated prompts of {name} has a "
            "reference answer that can be graded"
        )
    return (
        f"accuracy is measured on {total - missing:,} of the {total:,} evaluated prompts of "
        f"{name}; the other {missing:,} have no reference answer that can be graded"
    )
