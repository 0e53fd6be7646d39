"""Turn the rows of a dataset into prompts."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from ..errors import UserError
from . import answers
from .columns import (
    Companions,
    choose_column,
    choose_filled,
    clean_names,
    describe_single_message,
    find_companions,
    preset_companions,
    reach,
    text_of,
    usual_answers,
)
from .golds import BLANK, PROSE, describe_reading, read_gold
from .names import PROMPT_COLUMNS, list_names
from .options import count_from_one, gather_options, letter_of, read_options, show_options
from .prompt import Message, Prompt
from .readers import Row
from .row_format import RowFormat, apply_preset
from .solutions import end_with_box, find_solution
from .sources import Source
from .stream import shuffle
from .turns import ROLES, are_texts, find_silent_call, read_tools, read_turns

SURROGATE = re.compile("[\ud800-\udfff]")  # an unpaired one has no UTF-8 encoding
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # a field or an escaped brace of a prompt template
LONG = 40  # characters; the prompt should not contain a reference of this length
BUFFER = 1_000  # rows in the shuffle buffer of a streamed dataset


@dataclass(frozen=True, kw_only=True)
class PromptBuilder:
    """Builds the prompts of one dataset.

    - ``part``: (position of the dataset, number of datasets), for the prompts' indices.
    - ``columns``: the names of all columns; ``companions``: those that belong to the prompt.
    - ``first_position``: the position that answers give the first option, 0 or 1.
    - ``refuses_media``: whether a row with an image is an error, because the column of the prompt
      was detected and not given.
    - ``readings``: how many references were read in which way so far.
    - ``changes``: how many rows were changed in which way so far.
    """

    source: Source
    row_format: RowFormat
    part: tuple[int, int]
    columns: tuple[str, ...] = ()
    companions: Companions = field(default_factory=Companions)
    first_position: int = 0
    refuses_media: bool = False
    readings: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)

    @property
    def answer_format(self) -> str:
        """Return how final answers are read: the given format, the preset's, or a letter."""
        if self.row_format.answer_format != "auto":
            return self.row_format.answer_format
        return self.own_answer_format

    @property
    def own_answer_format(self) -> str:
        """Return how the dataset's answers are read unless another format is given."""
        if self.source.preset is not None:
            return self.source.preset.answer_format
        if self.companions.options or self.companions.wrong:
            return "choice"
        return "auto"

    def detect_columns(self, row: Row) -> "PromptBuilder":
        """Return a builder whose columns are chosen from those of ``row``.

        Raise UserError if ``row`` has no prompt column or lacks a given column.
        """
        if self.source.is_embedded:
            row_format = replace(self.row_format, prompt_column="prompt", answer_column="answer")
            return replace(self, row_format=row_format)
        try:
            row = clean_names(row)
        except ValueError as error:
            raise self._row_error(0, str(error)) from None
        row_format, preset = self.row_format, self.source.preset
        if preset is not None:
            row_format = apply_preset(row_format, preset, row)
        companions = preset_companions(row, preset)
        prompt = row_format.prompt_column
        is_detected = prompt is None
        if prompt is None:
            prompt = choose_column(row, PROMPT_COLUMNS)
            if prompt is None:
                raise UserError(
                    f"dataset {self.source.text}: no prompt column ({', '.join(PROMPT_COLUMNS)}) "
                    f"among {list_names(row)}; name it with --prompt-column"
                )
            message = describe_single_message(row, prompt)
            if message is not None:
                raise UserError(f"dataset {self.source.text}: {message}")
            companions = find_companions(row, prompt, row_format.prompt_template)
        answer = row_format.answer_column
        if answer is None and preset is None:
            answer = choose_filled(row, usual_answers(companions))
        self._check_column(prompt, row, "--prompt-column")
        self._check_column(answer, row, "--answer-column")
        self._check_column(row_format.privileged_column, row, "--privileged-column")
        return replace(
            self,
            row_format=replace(row_format, prompt_column=prompt, answer_column=answer),
            columns=tuple(row),
            companions=companions,
            refuses_media=is_detected,
        )

    def _check_column(self, column: str | None, row: Row, flag: str) -> None:
        if column is None or column in row or column.split(".")[0] in row:
            return
        raise UserError(
            f"dataset {self.source.text}: no column '{column}'; it has {list_names(row)}; change "
            f"{flag}"
        )

    def build(self, index: int, row: Row) -> Prompt:
        """Return row ``index`` as a prompt. Raise UserError if the row is unusable."""
        try:
            return self._build(index, clean_names(row))
        except ValueError as error:
            raise self._row_error(index, str(error)) from None

    def _build(self, index: int, row: Row) -> Prompt:
        self._check_media(row)
        value, answer = self._problem_and_answer(index, row)
        messages, closing = self._read_messages(value)
        column = self.row_format.answer_column or f"{self.row_format.prompt_column}"
        if self.row_format.answer_column is None:
            answer = self._answer_of_conversation(closing)
        reference = read_gold(answer, column)
        has_several = isinstance(answer, list) and not any(isinstance(a, dict) for a in answer)
        if has_several and ", " in (reference or ""):
            self.changes["several references are joined, an answer must have all of them"] += 1
        reading = describe_reading(reference, self.answer_format)
        self.readings[reading] += 1
        gold = None if reading in (BLANK, PROSE) else reference
        last = messages.pop()
        problem = self._with_context(last["content"], row)
        if len(reference or "") >= LONG and f"{reference}".strip() in problem:
            self.changes["the prompt shows its reference answer"] += 1
        if self.source.preset is not None and self.source.preset.cut:
            problem = re.sub(self.source.preset.cut, "", problem)
        privileged = self._privileged_text(row)
        before, after = self._text_around(index, row)
        messages.append(last | {"content": f"{before}{problem}{after}"})
        self._add_system(messages, row)
        worked = None
        if self.row_format.keep_solutions:
            worked = self._worked_solution(row, closing, (reference, gold))
        contents = [message["content"] for message in messages]
        for text in (*contents, reference, privileged, worked):
            if text is not None and SURROGATE.search(text):
                raise ValueError(f"has an unpaired surrogate in {text[:60]!r}")
        position, parts = self.part
        return Prompt(
            index=index * parts + position,
            messages=tuple(messages),
            answer=gold,
            privileged=privileged,
            around=(before, after),
            worked_solution=worked,
            tools=self._read_tools(row),
            row={"prompt": problem} | row if self.row_format.keep_rows else None,
        )

    def _check_media(self, row: Row) -> None:
        if not self.refuses_media:
            return
        for column in self.companions.media:
            if row.get(column) not in (None, "", []):
                raise ValueError(
                    f"has an image, video or sound in '{column}', but the models read text only "
                    "(name the column of the text with --prompt-column to leave it out)"
                )

    def _problem_and_answer(self, index: int, row: Row) -> tuple[Any, Any]:
        """Return the values of the prompt and answer columns; of a multiple-choice question, the
        question with its options and the right letter."""
        problem = reach(row, self.row_format.prompt_column)
        answer = reach(row, self.row_format.answer_column)
        columns = self.companions.wrong or self.companions.options
        if not columns or not isinstance(problem, str):
            return problem, answer
        if self.companions.wrong:
            options: Any = [answer]
            for name in columns:
                options.append(row.get(name))
            options = shuffle(options, self.row_format.seed, "options", index)
            answer = ascii_uppercase[options.index(answer)]
        else:
            options = self._options_of(row)
        listed = read_options(options)
        if listed is None:
            raise ValueError(
                f"needs 2 to 26 text options in '{', '.join(columns)}', got {str(options)[:60]!r}"
            )
        labels, texts = listed
        if not self.companions.wrong:
            answer = letter_of(answer, labels, texts, first=self.first_position)
        return show_options(problem, texts), answer

    def _options_of(self, row: Row) -> Any:
        columns = self.companions.options
        if len(columns) == 1:
            return reach(row, columns[0])
        return gather_options(row, columns)

    def count_positions(self, rows: Iterable[Row]) -> "PromptBuilder":
        """Return a builder that knows whether the answers count the options from 0 or from 1."""
        if not self.companions.options:
            return self
        answered = []
        for row in rows:
            row = clean_names(row)
            answer = reach(row, self.row_format.answer_column)
            listed = read_options(self._options_of(row))
            if listed is None or answer in listed[0]:
                return self
            if answer not in (None, ""):
                answered.append((answer, len(listed[1])))
        return replace(self, first_position=int(count_from_one(answered)))

    def _read_messages(self, value: Any) -> tuple[list[Message], Any]:
        """Return the messages up to the user's last turn, and the assistant's turn after it.

        ``value`` is text or a list of chat messages. The assistant's turn is None if there is none.
        """
        messages, closing = read_turns(value, f"{self.row_format.prompt_column}"), None
        if isinstance(value, str) and messages != [{"role": "user", "content": value}]:
            self.changes["text split into turns"] += 1
        if messages and messages[-1]["role"] == "assistant":
            closing = messages.pop()["content"]
        if not are_texts(messages):
            call = find_silent_call(messages)
            if call is not None:
                raise ValueError(f"has a tool call without text in turn {call}")
            raise ValueError(f"has no prompt text (got {str(value)[:60]!r})")
        roles = [message["role"] for message in messages]
        if not all(role in ROLES for role in roles) or roles[-1] not in ("user", "tool"):
            listed = ", ".join(str(role)[:20] for role in roles[:9])
            raise ValueError(
                f"has the roles {listed} before its answer; expected roles among "
                f"{', '.join(ROLES)}, ending with user or tool"
            )
        return messages, closing

    def _with_context(self, problem: str, row: Row) -> str:
        """Return the problem with the text of the column that belongs to it."""
        column = self.companions.context
        value = reach(row, column)
        text = text_of(value)
        if value is not None and text is None:
            raise ValueError(f"has no text in '{column}', which belongs to the prompt")
        if text is None or not text.strip():
            return problem
        if self.companions.context_first:
            return f"{text}\n\n{problem}"
        return f"{problem}\n\n{text}"

    def _add_system(self, messages: list[Message], row: Row) -> None:
        """Insert the system message: the given one, else that of the row's own column."""
        text = self.row_format.system or reach(row, self.companions.system)
        has_own = messages[0]["role"] == "system"
        if has_own and self.row_format.system:
            self.changes["--system replaces the system turn"] += 1
            del messages[0]
        elif has_own and text:
            self.changes["the conversation's system turn replaces the column's"] += 1
        if self.row_format.system or (text and not has_own):
            messages.insert(0, {"role": "system", "content": text})

    def _read_tools(self, row: Row) -> tuple[dict[str, Any], ...]:
        column = self.companions.tools
        value = reach(row, column)
        tools = read_tools(value)
        if tools is None:
            raise ValueError(f"has no list of tools in '{column}' (got {str(value)[:60]!r})")
        return tools

    def _answer_of_conversation(self, closing: Any) -> Any:
        """Return the assistant's last turn; with a preset, only if it has a boxed answer."""
        if self.source.preset is not None and answers.extract_answer(str(closing), "boxed") is None:
            return None
        return closing

    def _privileged_text(self, row: Row) -> str | None:
        column = self.row_format.privileged_column
        if column is None:
            return None
        text = reach(row, column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"has no text in '{column}', the --privileged-column (got {str(text)[:60]!r})"
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
            value = reach(row, column)
            if value is None:
                raise UserError(
                    f"dataset {self.source.text}: row {index} has no '{column}' for "
                    f"--prompt-template; it has {list_names(row)}; write a literal brace twice"
                )
            return str(value)

        return FIELD.sub(value_of, template)

    def _worked_solution(
        self, row: Row, closing: Any, answer: tuple[str | None, str | None]
    ) -> str | None:
        """Return the solution to show if the row is a few-shot example.

        ``answer`` is (the reference as text, the same or None if it cannot be graded).
        """
        reference, gold = answer
        preset = self.source.preset
        solution = find_solution(row, self.row_format.answer_column, preset)
        if solution is None:
            solution = closing or reference
        if solution is None or not str(solution).strip():
            return None
        if reference is None and self.row_format.answer_column is not None:
            return None
        if gold is None or "\\boxed" not in (self.row_format.instruction or ""):
            return str(solution)
        return end_with_box(str(solution), gold, preset)

    def _row_error(self, index: int, text: str) -> UserError:
        return UserError(f"dataset {self.source.text}: row {index} {text}; repair or remove it")
