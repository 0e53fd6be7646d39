"""Store texts for people: the answers of evaluations, and rollouts of training steps.

samples.jsonl has a row per evaluation: its numbers, the answers to the first problems, and the KL
per token of the first fixed contexts. The row of step 0 also has the tokens of these contexts.
rollouts.jsonl has a row per step whose rollouts were printed.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..engine.evaluate import count_characters, decode
from ..engine.rollout import Rollout
from ..engine.token_texts import split_text
from .state import State
from .tails import TokenValues
from .text_lines import EVALUATIONS, ROLLOUTS, rollout_line
from .update import Update

PROBLEMS = 16  # answers that an evaluation stores
CONTEXTS = 8  # fixed contexts whose KL per token it stores
CHARACTERS = 8_000  # stored of a text; the rest is left out
PRINTS = 200  # steps of a run whose rollouts are printed, about


def store_evaluation(
    state: State,
    row: dict[str, Any],
    records: list[dict],
    contexts: list[Rollout],
    values: TokenValues,
) -> None:
    """Append an evaluation to samples.jsonl.

    ``row``: its numbers; ``records``: its answers; ``values``: reverse KL per token of the
    ``contexts``.
    """
    stored: dict[str, Any] = {
        "step": row["step"],
        "prefix": state.progress.taught_prefix,
        "evaluation": row,
        "answers": [describe_record(record) for record in records[:PROBLEMS]],
        "kl": [_round(numbers) for numbers in values[:CONTEXTS]],
    }
    if row["step"] == 0:
        stored["contexts"] = describe_contexts(state, contexts[:CONTEXTS])
    state.folder.append(EVALUATIONS, stored)


def describe_record(record: dict) -> dict[str, Any]:
    """Return the first answer to a problem."""
    first = record["responses"][0]
    return {
        "problem": record["problem"],
        "prompt": record["prompt"][:CHARACTERS],
        "reference": record["reference"],
        **first,
        "text": first["text"][:CHARACTERS],
    }


def _round(numbers: Sequence[float | None]) -> list[float | None]:
    """Return numbers with three digits, which are short in JSON."""
    rounded: list[float | None] = []
    for number in numbers:
        if number is not None:
            number = float(f"{number:.3g}")
        rounded.append(number)
    return rounded


def describe_contexts(state: State, contexts: list[Rollout]) -> list[dict[str, Any]]:
    """Return the prompt and the text of each token of fixed contexts."""
    prompts = state.run.problems.kl
    described = []
    for context in contexts:
        prompt = prompts[context.slot].prompt.problem
        tokens = split_text(state.run.pair.student, context.ids)
        described.append({"prompt": prompt[:CHARACTERS], "tokens": tokens})
    return described


def is_printed(step: int, steps: int) -> bool:
    """Return whether ``step`` is one of about PRINTS steps whose rollouts are printed."""
    return step % max(1, steps // PRINTS) == 0


def describe_rollouts(update: Update, rollouts: list[Rollout], count: int) -> dict[str, Any]:
    """Return the row of a step for rollouts.jsonl: the first rollouts of ``count`` prompts."""
    model = update.run.pair.student
    firsts = [r for r in rollouts if r.sample == 0]
    answers = []
    for rollout in islice(firsts, count):
        prompt = update.prompts[rollout.slot].prompt
        answers.append(
            {
                "problem": prompt.index,
                "prompt": prompt.problem[:CHARACTERS],
                "reference": prompt.answer,
                "text": decode(model, rollout.ids)[:CHARACTERS],
                "prefix_characters": count_characters(model, rollout.ids[: update.prefix]),
                "tokens": len(rollout.ids),
                "finished": rollout.finished,
                "from_teacher": rollout.off_policy,
            }
        )
    return {"step": update.step + 1, "prefix": update.prefix, "answers": answers}


def print_rollouts(update: Update, rollouts: list[Rollout]) -> None:
    """Report and store rollouts of this step, as many as --print-rollouts says."""
    state = update.state
    config = state.run.config
    count = config.trackers.print_rollouts
    step = update.step + 1
    if not count or not state.run.place.is_first or not is_printed(step, config.train.steps):
        return
    row = describe_rollouts(update, rollouts, count)
    state.folder.append(ROLLOUTS, row)
    for answer in row["answers"]:
        state.report.note(rollout_line(row, answer))
