"""Evaluate one model, as ``prefix-distill eval`` does."""

import contextlib
import datetime
import os
import tempfile
from pathlib import Path

import torch

from .. import files
from ..config import Config
from ..display import phase
from ..engine import exactness, loading
from ..engine.decoder import make_decoder
from ..engine.device import Clock
from ..engine.evaluate import Evaluation, evaluate
from ..engine.memory import EVAL_REMEDIES, MemoryLimits, read_batch_sizes
from ..engine.meter import Meter
from ..engine.models import Model
from ..engine.ranks import Place, join_ranks
from ..engine.sampling import GenerationCost, Sampler
from ..engine.vocabulary import check_vocabulary, count_ids, describe_unused_tokens
from ..errors import UserError
from ..prompts import templates
from ..prompts.grading import describe_timeouts, load_grader
from ..prompts.prompt import Prompt, PromptSet
from ..prompts.rendering import Renderer
from ..training.defaults import DATASET, STUDENT, check_names
from ..training.folder import RunFolder
from ..training.prepare import choose_pad, eval_sampler
from ..training.problems import choose_grader, settle_max_new_tokens
from ..training.prompt_sets import load_eval_problems
from ..training.run import Notes, settled
from ..training.tails import advise_on_length
from ..training.turn_end import add_turn_end
from .export import is_run


def evaluate_model(config: Config) -> tuple[Place, Notes, dict]:
    """Evaluate one model on one dataset; return (place, notes, result document).

    It also writes the examples file.
    """
    notes = Notes()
    name, dataset = _fill_in(config, notes)
    out = _examples_file(config.checkpoint.out)
    own_grader = load_grader(config.evaluate.grader, config.evaluate.grader_timeout)
    with phase("reading data"):
        prompts = load_eval_problems(config, dataset, notes)
    model, where = _load(name, config, notes)
    renderer = templates.student_renderer(model, config)
    add_turn_end(renderer, model, notes)
    problems = _render(config, renderer, prompts, notes=notes)
    longest = max(len(ids) for _, ids in problems)
    config = settle_max_new_tokens(
        config, [model], longest_prompt=longest, task_limit=prompts.max_new_tokens, notes=notes
    )
    how = Evaluation(
        sampler=_sampler(config, model, notes),
        samples=config.evaluate.rollouts,
        max_new_tokens=settled(config.rollout.max_new_tokens, "--max-new-tokens"),
        grader=choose_grader(config, prompts, own_grader),
    )
    clock = Clock(device=where.device)
    with clock.phase("evaluation"):
        score = evaluate(
            make_decoder(model, where.dtype),
            problems,
            how,
            limits=_limits(config, where, notes),
            cost=GenerationCost(meter=Meter(clock)),
        )
    if score.timeouts:
        notes.warn(describe_timeouts(how.grader, score.timeouts))
    if where.is_first:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_rows(out, score.records)
    for advice in advise_on_length(score.finish_rate, how.max_new_tokens, "--thinking"):
        notes.warn(advice)
    document = {
        "model": name,
        "dataset": dataset,
        "grader": config.evaluate.grader,
        **score.summary(),
        "samples": config.evaluate.rollouts,
        "sampling": how.sampler.describe(),
        "seconds": clock.seconds["evaluation"],
        "examples": str(out),
        "warnings": notes.warnings,
    }
    return where, notes, document


def _load(name: str, config: Config, notes: Notes) -> tuple[Model, Place]:
    """Return the model on this rank's device, with the way its rows decode, and the rank."""
    with phase("loading the model"):
        model = loading.load_model(
            name,
            device=torch.device("cpu"),
            dtype=torch.float32,
            trust_remote_code=config.models.trust_remote_code,
        )
    check_vocabulary(model)
    notes.note(*describe_unused_tokens(model))
    if model.left_out is not None:
        notes.note(model.left_out)
    where = join_ranks(config.runtime, model)
    notes.note(*where.reasons)
    model.net.to(where.device, where.dtype)
    with phase("checking the model's forward pass"):
        model.decoding = exactness.find_decoding(model)
    notes.note(*model.decoding.restrictions("the model"))
    return model, where


def _fill_in(config: Config, notes: Notes) -> tuple[str, str]:
    """Return the names of the model and the dataset, by default the built-in ones.

    In a run folder, the model is the trained student. UserError: only one of them is named.
    """
    name, dataset = config.models.student, config.data.dataset
    check_names({"--model": name, "--dataset": dataset})
    if name is None or dataset is None:
        name, dataset = STUDENT, DATASET
        notes.note(f"neither --model nor --dataset was given; using the built-in {name}, {dataset}")
        return name, dataset
    return _find_student(name, notes), dataset


def _find_student(name: str, notes: Notes) -> str:
    """Return the trained student's folder if ``name`` is a run folder, else ``name``.

    It is model/ of a finished run, or best/ of a run that has none. UserError: it has neither.
    """
    folder = Path(os.path.expanduser(name))
    if not is_run(folder):
        return name
    run = RunFolder(folder)
    if run.model.is_dir():
        notes.note(f"--model {name}: it is a run folder; evaluating its trained student, model/")
        return str(run.model)
    if run.best.is_dir():
        notes.note(
            f"--model {name}: it is the folder of a run that has not finished; evaluating its best "
            f"student so far, best/ ({run.newest_checkpoint_text})"
        )
        return str(run.best)
    raise UserError(
        f"--model {name}: expected a finished run, got one without model/ and best/ "
        f"({run.newest_checkpoint_text}); finish it with run --resume --out {name}"
    )


def _examples_file(name: str | None) -> Path:
    """Return the file for the per-problem records. UserError: it exists or cannot be written."""
    if name is None:
        raise UserError("--out: expected a file for the per-problem JSONL; name one")
    out = Path(name)
    if os.path.exists(out):
        raise UserError(f"--out {out}: the file exists; name another")
    try:
        with contextlib.suppress(FileNotFoundError):
            out.lstat()  # raises for a name that the system refuses
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"--out {out}: cannot be written ({reason}); name another file") from None
    return out


def _render(
    config: Config, renderer: Renderer, prompts: PromptSet, notes: Notes
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Return each problem with the token ids of its prompt."""
    begin = templates.encode_begin(renderer.model, config.rollout.begin)
    if renderer.reads_clock:
        date = config.data.template_date or datetime.date.today().isoformat()
        notes.note(f"the chat template writes the date {date} (--template-date)")
    rendered = []
    changes = []
    for prompt in prompts.prompts:
        text = renderer.render(prompt)
        rendered.append((prompt, (*text.ids, *begin)))
        changes.append(text.changes)
    notes.note(*templates.describe_changes(changes))
    return rendered


def _limits(config: Config, where: Place, notes: Notes) -> MemoryLimits:
    limits = MemoryLimits(where, config)
    limits.report = notes.note
    limits.remedies = EVAL_REMEDIES
    return limits


def _sampler(config: Config, model: Model, notes: Notes) -> Sampler:
    sampler = Sampler(
        eos=model.eos,
        pad=choose_pad(model, model.eos),
        support=count_ids(model),
        seed=config.runtime.seed,
        rows=read_batch_sizes(config).rows,
    )
    return eval_sampler(config, sampler, model, notes=notes)
