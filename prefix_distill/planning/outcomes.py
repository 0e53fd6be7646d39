"""The outcomes of a check."""

from ..engine.models import Model
from ..training.run import Check, Run

SAMPLE = 4  # training prompts on which a check runs the models


def passed(name: str, text: str, facts: dict) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name=name, status="ok", text=text, facts=facts)


def warned(name: str, text: str, facts: dict) -> Check:
    """Return a check that found something that may go wrong."""
    return Check(name=name, status="warning", text=text, facts=facts)


def failed(name: str, text: str, facts: dict) -> Check:
    """Return a check that found something that makes the run impossible."""
    return Check(name=name, status="error", text=text, facts=facts)


def both_models(run: Run) -> tuple[tuple[str, Model], tuple[str, Model]]:
    """Return both models with their roles."""
    return ("student", run.pair.student), ("teacher", run.pair.teacher)
