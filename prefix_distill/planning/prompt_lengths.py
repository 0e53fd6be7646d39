"""The lengths of the prompts that a planned run reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import AutoTokenizer

from ..config import Config
from ..engine.models import Model
from ..engine.vocabulary import count_ids
from ..errors import UserError
from ..training.epochs import settle_steps
from ..training.problems import render_training_prompts, settle_privileged_template
from ..training.prompt_sets import load_prompt_sets
from ..training.run import Notes
from .case import PromptLengths

SAMPLE = 256  # prompts of the data that are rendered for their lengths
ASSUMED = 256  # tokens of a prompt if neither a dataset nor a length is given
# the longest prompt that --prompt-tokens takes, in tokens; beyond it a forecast takes minutes
LONGEST_PROMPT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PlannedPrompts:
    """Lengths of prompts, the longest response of the task, and the ids that both models have.

    ``task_limit``: in tokens, None if the data does not say. ``steps``: of the run with this data.
    """

    lengths: list[PromptLengths]
    task_limit: int | None
    support: int
    steps: int


def assume_prompts(
    config: Config, length: int | None, models: Sequence[Model], notes: Notes
) -> PlannedPrompts:
    """Return one prompt of ``length`` tokens; None is an assumed length.

    UserError: the models have no position left for a response, or the steps depend on a dataset.
    """
    if config.train.epochs is not None:
        raise UserError(
            f"--epochs {config.train.epochs:g}: its number of steps follows from the rows of "
            "--dataset; add it, or use --steps"
        )
    planned = PlannedPrompts(
        lengths=[(ASSUMED, ASSUMED)],
        task_limit=None,
        support=_head_support(models),
        steps=config.train.steps,
    )
    if length is None:
        notes.note(f"prompts: {ASSUMED} tokens each (assumed; set --prompt-tokens or --dataset)")
        return planned
    if not 1 <= length <= LONGEST_PROMPT:
        raise UserError(
            f"--prompt-tokens {length}: expected at least 1 token and at most "
            f"{LONGEST_PROMPT:,}; change it"
        )
    for model in models:
        if model.positions is not None and length >= model.positions:
            raise UserError(
                f"--prompt-tokens {length}: expected at most {model.positions - 1}, because model "
                f"{model.name} has {model.positions} positions and a response needs one; lower it"
            )
    notes.note(f"prompts: {length} tokens each")
    return replace(planned, lengths=[(length, length)])


def read_prompts(
    config: Config, models: Sequence[Model], folders: Sequence[str], notes: Notes
) -> PlannedPrompts:
    """Return the first of the prompts that a run with this config trains on.

    They are loaded, held out, mixed and rendered as in a run. UserError: a model in ``folders`` has
    no tokenizer.
    """
    trust = config.models.trust_remote_code
    student = _with_tokenizer(models[0], folders[0], trust)
    teacher = _with_tokenizer(models[1], folders[1], trust)
    sets = load_prompt_sets(config, notes)
    config = settle_steps(config, sets.train, notes)
    config = settle_privileged_template(config, sets)
    needed = min(SAMPLE, max(1, config.train.steps * config.train.batch_size))
    prompts = render_training_prompts(config, sets, (student, teacher), count=needed)
    rendered = prompts.stream[:needed]
    student_lengths = [len(r.student_ids) for r in rendered]
    teacher_lengths = [len(r.teacher_ids) for r in rendered]
    mean = sum(student_lengths) / len(student_lengths)
    notes.note(f"prompts: {len(rendered)} of {config.data.dataset}, {mean:.0f} tokens on average")
    support = _head_support(models)
    # A head may have more rows than there are ids; ids that one model lacks are cut off as well.
    if count_ids(student) == count_ids(teacher):
        support = min(support, count_ids(student))
    lengths = list(zip(student_lengths, teacher_lengths, strict=True))
    return PlannedPrompts(
        lengths=lengths,
        task_limit=sets.held_out.max_new_tokens,
        support=support,
        steps=config.train.steps,
    )


def _head_support(models: Sequence[Model]) -> int:
    """Return the number of ids that both heads have."""
    student, teacher = models
    return min(student.config.vocab_size, teacher.config.vocab_size)


def _with_tokenizer(model: Model, folder: str, trust_remote_code: bool) -> Model:
    """Return a sketched model with its tokenizer. UserError: it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the disk or the tokenizer's own code fails in any way
        raise UserError(
            f"model {model.name}: its tokenizer cannot be read ({type(error).__name__}), but the "
            "prompts of --dataset are counted in tokens; use --prompt-tokens instead of --dataset"
        ) from None
    return replace(model, tokenizer=tokenizer)
