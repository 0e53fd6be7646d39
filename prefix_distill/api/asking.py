"""Ask the models of a run: the untrained student, the trained one and the teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import quiet


def ask(
    folder: Path, questions: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Any], UserError | None]:
    """Let the models of a run answer questions, each loaded and freed in turn.

    ``say`` receives headings and answers piece by piece. Return the document, and the error of the
    first model that could not answer; its answers are null. UserError: the folder holds no run or
    no trained student.
    """
    with quiet.guarded():
        from ..results import trying

        config = trying.read_config(folder)
        document: dict[str, Any] = {"run": str(folder), "questions": list(questions), "models": []}
        failure = None
        if config.data.few_shot:
            say("The few-shot examples of the run are left out.\n")
        for asked in trying.models_of(folder, config):
            say(f"{asked.role} ({asked.name}):\n")
            answers = None
            try:
                answers = trying.ask(config, asked, questions, say=say)
            except UserError as error:
                say("no answer\n")
                failure = failure or UserError(f"{asked.role}: {error}")
            document["models"].append({"role": asked.role, "model": asked.name, "answers": answers})
    return document, failure
