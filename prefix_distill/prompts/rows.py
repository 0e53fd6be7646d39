"""Turn the rows of a dataset into prompts."""

import re
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from ..errors import UserError
from . import answers
from .files import Row
from .presets import Preset
from .prompt import Message, Prompt
from .sources import Source
from .stream import shuffle

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "instruction", "query", "input")
ANSWER_COLUMNS = (
    "answer",
    "solution",
    "final_answer",
    "ground_truth",
    "target",
    "gold",
    "output",
    "response",
)
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT writes a turn as {"from": …, "value": …} and has its own role names
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
SURROGATE = re.compile("[\ud800-\udfff]")  # an unpaired one has no UTF-8 encoding
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # a field or an escaped brace of a prompt template
BUFFER = 1_000  # rows in the shuffle buffer of a streamed dataset


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows are read and become prompts.

    - ``prompt_column``, ``answer_column``, ``instruction``: None means the preset's; the columns
      are else detected by name. ``doc.question`` reads a nested record.
    - ``privileged_column``: the column with the text that only the teacher sees.
    - ``system``: the system message.
    - ``prompt_template``: the user's turn with {prompt} and {COLUMN} fields.
    - ``seed``: the seed of samples of rows, of the order of streamed rows and of options.
    - ``streaming``: whether rows are read on demand.
    - ``keep_solutions``: whether prompts keep their solution, to serve as few-shot examples.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    privileged_column: str | None = None
    system: str | None = None
    instruction: str | None = None
    prompt_template: str | None = None
    seed: int = 0
    streaming: bool = False
    keep_solutions: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptBuilder:
    """Builds the prompts of one dataset.

    ``part`` is (position of the dataset, number of datasets), for the prompts' indices.
    """

    source: Source
    row_format: RowFormat
    part: tuple[int, int]

    def detect_columns(self, row: Row) -> "PromptBuilder":
        """Return a builder whose columns are chosen from those of ``row``.

        Raise UserError if ``row`` has no prompt column or lacks a given column.
        """
        if self.source.is_embedded:
            row_format = replace(self.row_format, prompt_column="prompt", answer_column="answer")
            return replace(self, row_format=row_format)
        row_format = self.row_format
        usual_answers: tuple[str, ...] = ANSWER_COLUMNS
        if self.source.preset is not None:
            row_format = _apply_preset(row_format, self.source.preset)
            usual_answers = ()
        prompt = _choose_column(row_format.prompt_column, row, PROMPT_COLUMNS)
        if prompt is None:
            raise UserError(
                f"dataset {self.source.text}: no prompt column ({', '.join(PROMPT_COLUMNS)}) among "
                f"{', '.join(row)}; name it with --prompt-column"
            )
        answer = _choose_column(row_format.answer_column, row, usual_answers)
        self._check_column(prompt, row, "--prompt-column")
        self._check_column(answer, row, "--answer-column")
        self._check_column(row_format.privileged_column, row, "--privileged-column")
        row_format = replace(row_format, prompt_column=prompt, answer_column=answer)
        return replace(self, row_format=row_format)

    def _check_column(self, column: str | None, row: Row, flag: str) -> None:
        if column is None or column.split(".")[0] in row:
            return
        raise UserError(
            f"dataset {self.source.text}: no column '{column}'; it has {', '.join(row)}; change "
            f"{flag}"
        )

    def build(self, index: int, row: Row) -> Prompt:
        """Return row ``index`` as a prompt. Raise UserError if the row is unusable."""
        value, answer = self._problem_and_answer(index, row)
        messages, closing = self._read_messages(index, value)
        if self.row_format.answer_column is None:
            answer = self._answer_of_conversation(closing)
        if answer is not None:
            answer = str(answer)
        last = messages.pop()
        problem = last["content"]
        if self.source.preset is not None and self.source.preset.cut:
            problem = re.sub(self.source.preset.cut, "", problem)
        privileged = self._privileged_text(index, row)
        before, after = self._text_around(index, row)
        messages.append({"role": last["role"], "content": f"{before}{problem}{after}"})
        if self.row_format.system:
            messages.insert(0, {"role": "system", "content": self.row_format.system})
        worked = None
        if self.row_format.keep_solutions:
            worked = self._worked_solution(row, closing, answer)
        contents = [message["content"] for message in messages]
        for text in (*contents, answer, privileged, worked):
            if text is not None and SURROGATE.search(text):
                raise self._row_error(index, f"has an unpaired surrogate in {text[:60]!r}")
        position, parts = self.part
        return Prompt(
            index=index * parts + position,
            messages=tuple(messages),
            answer=answer,
            privileged=privileged,
            around=(before, after),
            worked_solution=worked,
        )

    def _problem_and_answer(self, index: int, row: Row) -> tuple[Any, Any]:
        """Return the values of the prompt and answer columns; with a preset of multiple-choice
        questions, the question with its options and the right letter."""
        problem = _reach(row, self.row_format.prompt_column)
        answer = _reach(row, self.row_format.answer_column)
        preset = self.source.preset
        if preset is None or not isinstance(problem, str):
            return problem, answer
        if preset.wrong:
            options = [answer]
            for column in preset.wrong:
                options.append(row.get(column))
            options = shuffle(options, self.row_format.seed, "options", index)
            answer = ascii_uppercase[options.index(answer)]
        elif preset.options:
            options = _reach(row, preset.options)
        else:
            return problem, answer
        if not _are_options(options):
            columns = preset.options or ", ".join(preset.wrong)
            raise self._row_error(
                index, f"needs 2 to 26 text options in '{columns}', got {str(options)[:60]!r}"
            )
        lines = [problem.strip(), ""]
        for number, option in enumerate(options):
            lines.append(f"{ascii_uppercase[number]}. {option.strip()}")
        return "\n".join(lines), answer

    def _read_messages(self, index: int, value: Any) -> tuple[list[Message], Any]:
        """Return the messages up to the user's last turn, and the assistant's turn after it.

        ``value`` is text or a list of chat messages. The assistant's turn is None if there is none.
        """
        messages, closing = _as_messages(value), None
        if messages and messages[-1]["role"] == "assistant":
            closing = messages.pop()["content"]
        if not _are_texts(messages):
            raise self._row_error(index, f"has no prompt text (got {str(value)[:60]!r})")
        roles = [message["role"] for message in messages]
        if not all(role in ROLES for role in roles) or roles[-1] not in ("user", "tool"):
            listed = ", ".join(str(role)[:20] for role in roles[:9])
            raise self._row_error(
                index,
                f"has the roles {listed} before its answer; expected roles among "
                f"{', '.join(ROLES)}, ending with user or tool",
            )
        return messages, closing

    def _answer_of_conversation(self, closing: Any) -> Any:
        """Return the assistant's last turn; with a preset, only if it has a boxed answer."""
        if self.source.preset is not None and answers.extract_answer(str(closing), "boxed") is None:
            return None
        return closing

    def _privileged_text(self, index: int, row: Row) -> str | None:
        column = self.row_format.privileged_column
        if column is None:
            return None
        text = _reach(row, column)
        if not isinstance(text, str) or not text.strip():
            raise self._row_error(
                index,
                f"has no text in '{column}', the --privileged-column (got {str(text)[:60]!r})",
            )
        return text

    def _text_around(self, index: int, row: Row) -> tuple[str, str]:
        """Return the text before and after the problem: the filled-in prompt template, with the
        instruction directly after the problem."""
        instruction = ""
        if self.row_format.instruction:
            instruction = f"\n\n{self.row_format.instruction}"
        if self.row_format.prompt_template is None:
            return "", instruction
        before, after = self.row_format.prompt_template.split("{prompt}")
        return self._fill(before, index, row), instruction + self._fill(after, index, row)

    def _fill(self, template: str, index: int, row: Row) -> str:
        """Replace every {COLUMN} of ``template`` by the value in ``row``."""

        def value_of(match: re.Match[str]) -> str:
            column = match[1]
            if column is None:
                return match[0][:1]  # an escaped brace
            if not column:
                return "{}"  # as in \boxed{}
            value = _reach(row, column)
            if value is None:
                raise UserError(
                    f"dataset {self.source.text}: row {index} has no '{column}' for "
                    f"--prompt-template; it has {', '.join(row)}; write a literal brace twice"
                )
            return str(value)

        return FIELD.sub(value_of, template)

    def _worked_solution(self, row: Row, closing: Any, answer: str | None) -> str | None:
        """Return the solution to show if the row is a few-shot example.

        If the instruction asks for a boxed answer, the solution ends with one.
        """
        solution = self._solution_column(row)
        if solution is None:
            solution = closing or answer
        if solution is None or not str(solution).strip():
            return None
        if answer is None and self.row_format.answer_column is not None:
            return None
        text = str(solution)
        asks_for_box = "\\boxed" in (self.row_format.instruction or "")
        if answer is None or not asks_for_box or answers.extract_answer(text, "boxed") is not None:
            return text
        if self.source.preset is not None and self.source.preset.solution_cut:
            text = re.sub(self.source.preset.solution_cut, "", text)
        text = text.strip()
        final = answers.extract_reference(answer)
        if text == final:
            return f"\\boxed{{{final}}}"
        return f"{text}\n\n\\boxed{{{final}}}"

    def _solution_column(self, row: Row) -> Any:
        """Return the preset's solution column, else a column named solution with text, or None."""
        if self.source.preset is not None and self.source.preset.solution:
            return _reach(row, self.source.preset.solution)
        if self.row_format.answer_column in ("solution", None):
            return None  # the solution is the answer
        solution = row.get("solution")
        if isinstance(solution, str):
            return solution
        return None

    def _row_error(self, index: int, text: str) -> UserError:
        return UserError(f"dataset {self.source.text}: row {index} {text}; repair or remove it")

    def notes(self, split: str, available: int | None) -> tuple[str, ...]:
        """Return what the user should know of the choices made.

        ``available`` is the number of rows in the dataset, or None if they are streamed.
        """
        source, seed = self.source, self.row_format.seed
        notes = []
        if source.preset is not None:
            notes.append(self._preset_note(source.preset, split))
        if source.count is not None and available is not None:
            notes.append(
                f"dataset {source.text}: {source.count:,} of {available:,} rows, sampled with "
                f"--seed {seed}"
            )
        elif source.count is not None:
            notes.append(
                f"dataset {source.text}: {source.count:,} rows, sampled with --seed {seed}"
            )
        if available is None:
            note = (
                f"dataset {source.text}: streamed; a buffer of {BUFFER:,} rows is shuffled with "
                f"--seed {seed} (evaluation takes the first rows in order)"
            )
            if source.preset is not None and source.preset.sorted:
                note += "; its rows are sorted by subject, so neighboring prompts share one"
            notes.append(note)
        return tuple(notes)

    def _preset_note(self, preset: Preset, split: str) -> str:
        source, row_format = self.source, self.row_format
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
            f"answer {answer}, answer format {preset.answer_format}; instruction "
            f"{row_format.instruction or 'none'!r}; license: {preset.license}; {preset.note}"
        )


def _apply_preset(row_format: RowFormat, preset: Preset) -> RowFormat:
    """Return the format with the preset's columns and instruction, unless the user gave others."""
    if row_format.prompt_column is None:
        row_format = replace(row_format, prompt_column=preset.prompt)
    if row_format.answer_column is None:
        row_format = replace(row_format, answer_column=preset.answer)
    if row_format.instruction is None:
        row_format = replace(row_format, instruction=preset.instruction)
    return row_format


def _choose_column(given: str | None, row: Row, usual: tuple[str, ...]) -> str | None:
    """Return ``given``, else the first ``usual`` column that ``row`` has, else None."""
    if given is not None:
        return given
    for column in usual:
        if column in row:
            return column
    return None


def _reach(row: Any, column: str | None) -> Any:
    """Return the value of ``column`` or None; ``doc.question`` reads a nested record."""
    if column is None:
        return None
    for key in column.split("."):
        if not isinstance(row, dict):
            return None
        row = row.get(key)
    return row


def _are_options(options: object) -> bool:
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        return False
    return all(isinstance(option, str) and option.strip() for option in options)


def _as_messages(value: object) -> list[dict[str, Any]]:
    """Return text or a list of chat messages as messages; an empty list if it is neither."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return []
    messages = []
    for turn in value:
        if turn.keys() >= {"role", "content"}:
            messages.append({"role": turn["role"], "content": turn["content"]})
        elif turn.keys() >= {"from", "value"}:
            role = SHAREGPT_ROLES.get(str(turn["from"]), turn["from"])
            messages.append({"role": role, "content": turn["value"]})
        else:
            return []
    return messages


def _are_texts(messages: list[dict[str, Any]]) -> bool:
    """Return whether every message is text and the last one is not blank."""
    if not all(isinstance(message["content"], str) for message in messages):
        return False
    return bool(messages) and bool(messages[-1]["content"].strip())
