"""Render the texts of a run for a terminal: side by side, stacked, or as plain lines."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..training.text_lines import MARK, one_line, visible
from .texts import Answer, Problem, ScoredText, Texts

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

PLAIN_MARK = "[the prefix ends here]"
NARROWEST = 34  # columns of an answer; narrower ones are stacked
COLUMNS_SHOWN = 4
# lower border of the KL in nats → style of the token
COLORS = (
    (1.0, "white on red3"),
    (0.3, "black on dark_orange"),
    (0.1, "black on yellow3"),
    (0.03, "black on light_goldenrod1"),
)
LOUD = 0.1  # nats; plain lines name the KL of tokens from here on


def verdict(answer: Answer) -> str:
    """Return whether an answer is right, how long it is, and whether it ended."""
    words = []
    if answer.correct is not None:
        words.append("right" if answer.correct else "wrong")
    words.append(f"{answer.tokens} tokens")
    if not answer.finished:
        words.append("cut off")
    return ", ".join(words)


def step_name(step: int, texts: Texts) -> str:
    """Return the name of an evaluation: before, step 40, after."""
    if step == 0:
        return "before"
    if step == texts.steps[-1] and texts.state == "finished":
        return f"after (step {step})"
    return f"step {step}"


# Plain lines


def plain_answers(texts: Texts, problems: list[Problem], steps: Sequence[int]) -> Iterator[str]:
    """Yield the lines of problems: prompt, reference, and an answer per line."""
    for problem in problems:
        yield f"problem {problem.number}: {one_line(problem.prompt)}"
        if problem.gold is not None:
            yield f"  reference: {one_line(problem.gold)}"
        for answer in _shown(problem, steps):
            name = step_name(answer.step, texts)
            yield f"  {name}, {verdict(answer)}: {marked(answer)}"


def marked(answer: Answer) -> str:
    """Return an answer on one line, with a mark where the prefix ends."""
    if answer.mark is None:
        return one_line(answer.text)
    head, tail = answer.text[: answer.mark], answer.text[answer.mark :]
    return f"{one_line(head)} {PLAIN_MARK} {one_line(tail)}"


def plain_tokens(texts: Texts, steps: Sequence[int], limit: int) -> Iterator[str]:
    """Yield the lines of fixed rollouts; tokens with a KL from LOUD on are followed by it."""
    for context in texts.contexts[: limit or None]:
        yield f"prompt: {one_line(context.prompt)}"
        for step in steps:
            if step not in context.kl:
                continue
            line = ""
            for token, value in zip(context.tokens, context.kl[step], strict=False):
                line += token
                if value is not None and value >= LOUD:
                    line += f"{{{value:.2g}}}"
            yield f"  KL in nats, {step_name(step, texts)}: {one_line(line)}"


def _shown(problem: Problem, steps: Sequence[int]) -> list[Answer]:
    """Return the answers at the chosen steps that the problem has."""
    return [problem.answers[step] for step in steps if step in problem.answers]


# Terminal


def render_answers(
    texts: Texts, problems: list[Problem], steps: Sequence[int], width: int
) -> Iterator["RenderableType"]:
    """Yield what rich prints: side by side if every answer gets NARROWEST columns, else stacked."""
    from rich.rule import Rule
    from rich.text import Text

    for problem in problems:
        title = f"problem {problem.number}"
        if problem.gold is not None:
            title += f" · reference {one_line(problem.gold)}"
        yield Rule(Text(title), align="left")
        yield Text(visible(problem.prompt).strip(), style="bold")
        answers = _shown(problem, steps)
        if width // max(1, len(answers)) >= NARROWEST:
            yield _side_by_side(texts, answers)
        else:
            for answer in answers:
                yield _heading(texts, answer)
                yield _body(answer)
    if any(answer.mark is not None for p in problems for answer in _shown(p, steps)):
        yield Text(f"{MARK} marks where the prefix ended", style="dim")


def _side_by_side(texts: Texts, answers: list[Answer]) -> "RenderableType":
    from rich.table import Table

    table = Table.grid(expand=True, padding=(0, 1))
    for _ in answers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(_heading(texts, answer) for answer in answers))
    table.add_row(*map(_body, answers))
    return table


def _heading(texts: Texts, answer: Answer) -> "Text":
    from rich.text import Text

    colors = {True: "green", False: "red", None: "cyan"}
    name = step_name(answer.step, texts)
    return Text(f"{name} · {verdict(answer)}", style=colors[answer.correct])


def _body(answer: Answer) -> "Text":
    from rich.text import Text

    if answer.mark is None:
        return Text(visible(answer.text).strip())
    head, tail = visible(answer.text[: answer.mark]), visible(answer.text[answer.mark :])
    return Text.assemble(head.lstrip(), (MARK, "bold magenta"), (tail.rstrip(), "dim"))


def render_tokens(texts: Texts, steps: Sequence[int], limit: int) -> Iterator["RenderableType"]:
    """Yield fixed rollouts for rich, each token colored by its KL."""
    from rich.rule import Rule
    from rich.text import Text

    for number, context in enumerate(texts.contexts[: limit or None]):
        yield Rule(Text(f"held-out rollout {number} of the untrained student"), align="left")
        yield Text(visible(context.prompt).strip(), style="bold")
        for step in steps:
            if step in context.kl:
                yield Text(f"KL, {step_name(step, texts)}", style="cyan")
                yield _colored(context, step)
    yield legend()


def _colored(context: ScoredText, step: int) -> "Text":
    from rich.text import Text

    text = Text()
    for token, value in zip(context.tokens, context.kl[step], strict=False):
        text.append(visible(token), style=color_of(value))
    return text


def color_of(value: float | None) -> str:
    """Return the style of a token with this KL (nats)."""
    for border, style in COLORS:
        if value is not None and value >= border:
            return style
    return ""


def legend() -> "Text":
    """Return what the colors mean."""
    from rich.text import Text

    text = Text("reverse KL of a token, from ")
    for border, style in reversed(COLORS):
        text.append(f" {border:g} ", style=style)
        text.append(" ")
    text.append("nats on")
    return text
