"""A prompt, a set of prompts, and a prompt as token ids."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# {"role": …, "content": …}
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem as chat messages that end with the user's turn.

    - ``index``: row × (number of datasets) + (position of the dataset); in a streamed dataset
      the position in the stream replaces the row.
    - ``answer``: the reference answer, if the dataset has one.
    - ``privileged``: text that only the teacher's prompt shows.
    - ``around``: the text before and after the problem in the last turn (template, instruction).
    - ``worked_solution``: the solution to show when the prompt is a few-shot example.
    - ``tools``: the tools that the chat template describes, as JSON schemas.
    - ``row``: the columns of the dataset, for a user's grader; None without one.
    """

    index: int
    messages: tuple[Message, ...]
    answer: str | None
    privileged: str | None = None
    around: tuple[str, str] = ("", "")
    worked_solution: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    row: dict[str, Any] | None = None

    @property
    def problem(self) -> str:
        """Return the text of the last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in the order of the dataset, or an iterator over shuffled prompts if streamed.

    - ``answer_format``: how the task formats its answers, or None if it does not specify that.
    - ``max_new_tokens``: the longest response that the task needs (tokens), if known.
    - ``privileged_template``: the template that the task's own networks were trained with.
    - ``other_splits``: other splits by use ("test", "examples"), as (name, split) to load.
    - ``notes``: the choices made while loading, for the user; ``account``: all of them, with what
      became of each column and the first row.
    """

    name: str
    prompts: tuple[Prompt, ...] | Iterator[Prompt]
    answer_format: str | None = None
    max_new_tokens: int | None = None
    privileged_template: str | None = None
    other_splits: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    account: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        """Return whether the prompts are an iterator that reads rows on demand."""
        return not isinstance(self.prompts, tuple)

    def digest(self) -> str | None:
        """Return a digest of all prompts in order; None of a streamed set, whose end is unknown."""
        if not isinstance(self.prompts, tuple):
            return None
        running = hashlib.sha256()
        for prompt in self.prompts:
            row = [prompt.index, prompt.messages, prompt.answer, prompt.privileged]
            if prompt.tools:
                row.append(prompt.tools)
            running.update(json.dumps(row, default=str).encode())
        return running.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A prompt as token ids for both models, whose chat templates and lengths may differ.

    ``changes``: what rendering changed, in words.
    """

    prompt: Prompt
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    changes: frozenset[str] = frozenset()
