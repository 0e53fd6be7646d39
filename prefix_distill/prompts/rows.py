"""Turn a row of a data set into a prompt."""

import re
from dataclasses import dataclass, replace

from ..errors import UserError
from ..lab.task import LAB
from . import answers
from .presets import Preset
from .prompt import Prompt
from .sources import Source
from .stream import shuffled

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
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
}  # names of roles where turns are written {"from": …, "value": …}
HALF = re.compile("[\ud800-\udfff]")  # cannot be written as UTF-8
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # of a prompt template
BUFFER = 1_000  # rows of a streamed set among which the next one is drawn


@dataclass(frozen=True)
class RowFormat:
    """How a row of a data set becomes a prompt; what is None is the preset's, or found by
    ``columns``."""

    source: Source
    prompt_column: str | None
    answer_column: str | None
    system: str | None
    instruction: str | None
    privileged_column: str | None
    template: str | None
    seed: int
    worked: bool
    part: tuple[int, int]

    def columns(self, first: dict) -> "RowFormat":
        """The same with its columns, which ``first``, a row, must have."""
        name, preset = self.source.text, self.source.preset
        if self.source.place.startswith(LAB):
            return replace(self, prompt_column="prompt", answer_column="answer")
        prompt, answer, instruction = self.prompt_column, self.answer_column, self.instruction
        if preset is not None:
            prompt, answer, instruction = (
                chosen if given is None else given
                for given, chosen in (
                    (prompt, preset.prompt),
                    (answer, preset.answer),
                    (instruction, preset.instruction),
                )
            )
        prompt = _column(name, first, prompt, PROMPT_COLUMNS, "--prompt-column")
        if prompt is None:
            raise UserError(
                f"dataset {name}: no prompt column ({', '.join(PROMPT_COLUMNS)}) among "
                f"{', '.join(first)}; name it with --prompt-column"
            )
        usual = ANSWER_COLUMNS if preset is None else ()
        answer = _column(name, first, answer, usual, "--answer-column")
        _column(name, first, self.privileged_column, (), "--privileged-column")
        return replace(self, prompt_column=prompt, answer_column=answer, instruction=instruction)

    def prompt(self, index: int, row: dict) -> Prompt:
        """Row ``index`` as a prompt. UserError where it is none."""
        name, preset = self.source.text, self.source.preset
        value, answer = _reach(row, self.prompt_column), _reach(row, self.answer_column)
        if preset is not None and isinstance(value, str) and (preset.options or preset.wrong):
            value, answer = self._choice(preset, index, row, value)
        messages, closing = _messages(name, index, value)
        if preset is not None and preset.cut:
            messages[-1] = {
                **messages[-1],
                "content": re.sub(preset.cut, "", messages[-1]["content"]),
            }
        if self.answer_column is None:
            answer = (
                closing
                if preset is None or answers.extract(str(closing), "boxed") is not None
                else None
            )
        privileged = _reach(row, self.privileged_column)
        if self.privileged_column is not None and not (
            isinstance(privileged, str) and privileged.strip()
        ):
            raise UserError(
                f"dataset {name}: row {index} has no text in '{self.privileged_column}' (got "
                f"{str(privileged)[:60]!r}); remove or repair the row, or change "
                "--privileged-column"
            )
        answer = None if answer is None else str(answer)
        around = self._around(index, row)
        messages[-1] = {
            **messages[-1],
            "content": f"{around[0]}{messages[-1]['content']}{around[1]}",
        }
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        worked = self._solution(row, closing, answer) if self.worked else None
        for text in (
            *(m["content"] for m in messages),
            answer or "",
            privileged or "",
            worked or "",
        ):
            if HALF.search(text):
                raise UserError(
                    f"dataset {name}: row {index} has half of a surrogate pair in {text[:60]!r}; "
                    "repair the row"
                )
        return Prompt(
            index * self.part[1] + self.part[0], tuple(messages), answer, privileged, around, worked
        )

    def _choice(
        self, preset: Preset, index: int, row: dict, question: str
    ) -> tuple[str, str | None]:
        """The question with its options A, B, …, and the right one's letter. Where wrong ones are
        given, the order is drawn by the seed and the row."""
        answer = _reach(row, self.answer_column)
        if preset.wrong:
            options = shuffled(
                [answer, *(row.get(column) for column in preset.wrong)], self.seed, "options", index
            )
            answer = chr(ord("A") + options.index(answer))
        else:
            options = _reach(row, preset.options)
        if (
            not isinstance(options, list)
            or not 2 <= len(options) <= 26
            or not all(isinstance(o, str) and o.strip() for o in options)
        ):
            raise UserError(
                f"dataset {self.source.text}: row {index} has no options of text in "
                f"'{preset.options or ', '.join(preset.wrong)}' (got {str(options)[:60]!r}); "
                "repair the row"
            )
        return "\n".join(
            [
                question.strip(),
                "",
                *(f"{chr(ord('A') + i)}. {o.strip()}" for i, o in enumerate(options)),
            ]
        ), answer

    def _around(self, index: int, row: dict) -> tuple[str, str]:
        """What stands before and after the problem: the template with this row's fields, the
        instruction before its end."""
        closing = f"\n\n{self.instruction}" if self.instruction else ""
        if self.template is None:
            return "", closing

        def field_of(match) -> str:
            if not match[1]:
                return match[0][:1] if match[1] is None else "{}"
            value = _reach(row, match[1])
            if value is None:
                raise UserError(
                    f"dataset {self.source.text}: row {index} has no '{match[1]}' for "
                    f"--prompt-template; it has {', '.join(row)} (a brace itself is written twice)"
                )
            return str(value)

        before, after = (FIELD.sub(field_of, text) for text in self.template.split("{prompt}"))
        return before, closing + after

    def _solution(self, row: dict, closing: str | None, answer: str | None) -> str | None:
        """What this row shows as an example: its solution; under an instruction to box the
        answer, with the answer boxed."""
        preset, text = self.source.preset, None
        if preset is not None and preset.solution:
            text = _reach(row, preset.solution)
        elif self.answer_column not in ("solution", None) and isinstance(row.get("solution"), str):
            text = row["solution"]
        text = closing or answer if text is None else text
        if (
            text is None
            or (answer is None and self.answer_column is not None)
            or not (text := str(text)).strip()
        ):
            return None
        if (
            answer is not None
            and "\\boxed" in (self.instruction or "")
            and answers.extract(text, "boxed") is None
        ):
            final = answers.reference(answer)
            text = (
                re.sub(preset.solution_cut, "", text)
                if preset is not None and preset.solution_cut
                else text
            )
            text = (
                f"{'' if text.strip() == final else text.strip() + chr(10) * 2}\\boxed{{{final}}}"
            )
        return text

    def notes(self, split: str, there: int | None) -> tuple[str, ...]:
        """What was chosen; ``there``: rows of the set, None where it is streamed."""
        source, preset, notes = self.source, self.source.preset, []
        if preset is not None:
            where = source.place + (
                f" ({preset.config})" if preset.config and source.place == preset.hub else ""
            )
            where += "" if source.local else f", split {split}"
            notes.append(
                f"dataset {source.name}: {where}; prompt {self.prompt_column}, answer "
                f"{self.answer_column or 'boxed in the last turn'}, read as "
                f"{preset.answer_format}; instruction {self.instruction or 'none'!r}; license: "
                f"{preset.license}; {preset.note}"
            )
        if source.count is not None:
            notes.append(
                f"dataset {source.text}: {source.count:,} "
                f"{'rows' if there is None else f'of {there:,} rows'}, drawn by --seed {self.seed}"
            )
        if there is None:
            notes.append(
                f"dataset {source.text}: streamed, row by row as they are needed, drawn by --seed "
                f"{self.seed} from a buffer of {BUFFER:,} rows (evaluated ones: the first, in "
                "their order)"
                + (
                    "; its subjects stand one after another"
                    if preset is not None and preset.sorted
                    else ""
                )
            )
        return tuple(notes)


def _reach(row, column: str | None):
    """Return the value of ``column`` or None; ``doc.question`` reads a nested record."""
    if column is None:
        return None
    for key in column.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _column(
    name: str, row: dict, given: str | None, usual: tuple[str, ...], flag: str
) -> str | None:
    """Return ``given``, else the first of the ``usual`` columns in ``row``, else None. UserError:
    the row lacks the given column."""
    if given is not None:
        if _reach(row, given) is None and given.split(".")[0] not in row:
            raise UserError(
                f"dataset {name}: no column '{given}'; it has {', '.join(row)}; change {flag}"
            )
        return given
    for column in usual:
        if column in row:
            return column
    return None


def _messages(name: str, index: int, value) -> tuple[list[dict], str | None]:
    """Text or a list of chat messages → messages ending with the user's turn, and a closing
    assistant turn as answer."""
    answer = None
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict)
            and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys())
            for m in value
        )
    ):
        messages = [
            {"role": m["role"], "content": m["content"]}
            if "role" in m
            else {"role": SHAREGPT.get(str(m["from"]), m["from"]), "content": m["value"]}
            for m in value
        ]
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
    else:
        messages = []
    if (
        not messages
        or not all(isinstance(m["content"], str) for m in messages)
        or not messages[-1]["content"].strip()
    ):
        raise UserError(
            f"dataset {name}: row {index} has no prompt text (got {str(value)[:60]!r}); remove or "
            "repair the row"
        )
    if not all(m["role"] in ROLES for m in messages) or messages[-1]["role"] not in (
        "user",
        "tool",
    ):
        raise UserError(
            f"dataset {name}: row {index} has the roles "
            f"{', '.join(str(m['role'])[:20] for m in messages[:9])} before its answer; expected "
            f"some of {', '.join(ROLES)}, the user's last; repair the row"
        )
    return messages, answer
