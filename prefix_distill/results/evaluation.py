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
from ..engine.memory import EVAL_REMEDIES, MemoryLimits
from ..engine.meter import Meter
from ..engine.models import Model
from ..engine.ranks import Place, join_ranks
from ..engine.sampling import GenerationCost, Sampler
from ..engine.vocabulary import check_vocabulary, count_ids, describe_unused_tokens
from ..errors import UserError
from ..lab.task import LAB
from ..maths.seeds import seed_of
from ..prompts import templates
from ..prompts.grading import describe_timeouts, load_grader
from ..prompts.prompt import Prompt, PromptSet
from ..prompts.rendering import Renderer
from ..training.pair import TASK
from ..training.prepare import choose_pad
from ..training.problems import choose_grader, settle_max_new_tokens
from ..training.prompt_sets import load_eval_problems
from ..training.run import Notes, settled
from ..training.turn_end import add_turn_end


def evaluate_model(config: Config) -> tuple[Place, list[str], dict]:
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
        sampler=_sampler(config, model),
        samples=config.evaluate.rollouts,
        max_new_tokens=settled(config.rollout.max_new_tokens, "--max-new-tokens"),
        grader=choose_grader(config, prompts, own_grader),
    )
    limits = MemoryLimits(where, config)
    limits.report = notes.note
    limits.remedies = EVAL_REMEDIES
    clock = Clock(device=where.device)
    with clock.phase("evaluation"):
        score = evaluate(
            make_decoder(model, where.dtype),
            problems,
            how,
            limits=limits,
            cost=GenerationCost(meter=Meter(clock)),
        )
    if score.timeouts:
        notes.note(describe_timeouts(how.grader, score.timeouts))
    if where.is_first:
        files.write_rows(out, score.records)
    document = {
        "model": name,
        "dataset": dataset,
        "grader": config.evaluate.grader,
        **score.summary(),
        "samples": config.evaluate.rollouts,
        "seconds": clock.seconds["evaluation"],
        "examples": str(out),
    }
    return where, notes.lines, document


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
    """Return the names of the model and the dataset, by default the built-in ones."""
    name, dataset = config.models.student, config.data.dataset
    if name is None:
        name = f"{LAB}{TASK}/student"
        notes.note(f"no --model was given; using the built-in {name}")
    if dataset is None:
        dataset = LAB + TASK
        notes.note(f"no --dataset was given; using the built-in {dataset}")
    return name, dataset


def _examples_file(name: str | None) -> Path:
    """Return the file for the per-problem records. UserError: it exists or cannot be written."""
    if name is None:
        raise UserError("--out: expected a file for the per-problem JSONL; name one")
    out = Path(name)
    if os.path.exists(out):
        raise UserError(f"--out {out}: the file exists; name another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; create it first")
    try:
        with contextlib.suppress(FileNotFoundError):
            out.lstat()  # raises for a name that the system refuses
        tempfile.TemporaryFile(dir=out.absolute().parent).close()
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


def _sampler(config: Config, model: Model) -> Sampler:
    return Sampler(
        eos=model.eos,
        pad=choose_pad(model, model.eos),
        support=count_ids(model),
        seed=seed_of(config.runtime.seed, "evaluation"),
        temperature=config.evaluate.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        rows=config.rollout.rows,
    )
