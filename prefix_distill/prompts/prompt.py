"""A prompt, a set of prompts, and a prompt as token ids."""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    """One problem: chat messages ending with the user's turn, the reference answer if the data has
    one, and what only the teacher's prompt shows, if anything. ``around``: what stands before and
    after the problem in that turn (template, instruction). ``worked``: what it shows as an example.
    ``index``: row (of a streamed set: place in the stream) · number of sets + set, in the order in
    which they are named."""

    index: int
    messages: tuple[dict, ...]
    answer: str | None
    privileged: str | None = None
    around: tuple[str, str] = ("", "")
    worked: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the data's order; streamed, an iterator over them in a drawn order.
    ``answer_format``: how the task itself says its answers are written, or None.
    ``max_new_tokens``: the longest response the task needs (tokens), where it is known.
    ``privileged_template``: the form in which the task's own networks have met privileged prompts.
    ``elsewhere``: its other splits by use (test, examples), as (name, split) to load. ``notes``:
    what was chosen."""

    name: str
    prompts: tuple[Prompt, ...] | Iterator[Prompt]
    answer_format: str | None = None
    max_new_tokens: int | None = None
    privileged_template: str | None = None
    elsewhere: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        return not isinstance(self.prompts, tuple)

    @property
    def answered(self) -> bool:
        """Do all prompts carry a reference answer?"""
        return all(p.answer is not None for p in self.prompts)


@dataclass(frozen=True)
class Rendered:
    """A prompt as ids for both models; their templates and so their lengths may differ."""

    prompt: Prompt
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
