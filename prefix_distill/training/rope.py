"""Say that the rows of a run may be longer than the length at which RoPE changes."""

from ..config import Config
from ..engine.models import Model
from ..engine.pair import Pair
from .run import Method, Problems


def check_rope(config: Config, pair: Pair, problems: Problems, method: Method) -> list[str]:
    """Return a warning for each model whose RoPE changes within the run's lengths."""
    response = max(method.prefix.longest(config.train.steps or 1), method.prefix.limit)
    warnings = []
    for role, model, longest in (
        ("student", pair.student, max(len(p.student_ids) for p in problems.train)),
        ("teacher", pair.teacher, max(len(p.teacher_ids) for p in problems.train)),
    ):
        text = _describe_switch(role, model, longest, response=response)
        if text is not None:
            warnings.append(text)
    return warnings


def _describe_switch(role: str, model: Model, longest: int, response: int) -> str | None:
    switch = model.rope_switch
    if switch is None or longest + response <= switch:
        return None
    return (
        f"the {role}'s RoPE factors change at {switch:,} tokens, and its prompts (up to "
        f"{longest:,}) and responses (up to {response:,}) can be longer together; such rows are "
        "sampled one at a time, and a token sampled before the change is scored with the factors "
        "after it; use a lower --max-new-tokens and --prefix, or a lower --max-prompt-tokens"
    )
