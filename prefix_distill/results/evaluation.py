"""Evaluate one model, as ``prefix-distill eval`` does."""

import contextlib
import os
import tempfile
from pathlib import Path

import torch

from .. import files
from ..config import Config
from ..engine import loading
from ..engine.device import Clock
from ..engine.evaluate import evaluate
from ..engine.models import Model, decoder
from ..engine.ranks import Place, place
from ..engine.sampling import Sampler
from ..errors import UserError
from ..lab.task import LAB
from ..maths.seeds import seed_of
from ..prompts import templates
from ..prompts.prompt import Prompt, PromptSet
from ..training.pair import TASK
from ..training.problems import load_eval_problems, settle_max_new_tokens
from ..training.run import settled


def evaluate_model(config: Config) -> tuple[Place, list[str], dict]:
    """Evaluate one model on one data set, and write the file of per-problem records.

    Return this process's place, the notes and the result document.
    """
    notes: list[str] = []
    name, dataset = _fill_in(config, notes)
    out = _examples_file(config.checkpoint.out)
    prompts = load_eval_problems(config, dataset, notes)
    model = loading.load_model(
        name,
        device=torch.device("cpu"),
        dtype=torch.float32,
        trust_remote_code=config.models.trust_remote_code,
    )
    loading.check_rows(model)
    where = place(config.runtime, lambda: model.parameters)
    notes.extend(where.reasons)
    model.net.to(where.device, where.dtype)
    problems = _render(config, model, prompts)
    config = settle_max_new_tokens(
        config, model, model, max(len(ids) for _, ids in problems), prompts.max_new_tokens, notes
    )
    answer_format: str = config.evaluate.answer_format
    if answer_format == "auto" and prompts.answer_format:
        answer_format = prompts.answer_format
    sampler = _sampler(config, model)
    clock = Clock(where.device)
    with clock.phase("evaluation"):
        score = evaluate(
            decoder(model, where.dtype),
            problems,
            sampler,
            samples=config.evaluate.rollouts,
            max_new_tokens=settled(config.rollout.max_new_tokens, "--max-new-tokens"),
            answer_format=answer_format,
            place=where,
        )
    if where.first:
        files.write_rows(out, score.records)
    document = {
        "model": name,
        "dataset": dataset,
        **score.summary(),
        "samples": config.evaluate.rollouts,
        "seconds": clock.seconds["evaluation"],
        "examples": str(out),
    }
    return where, notes, document


def _fill_in(config: Config, notes: list[str]) -> tuple[str, str]:
    """Return the names of the model and the data set; by default those of the laboratory."""
    name = config.models.student
    dataset = config.data.dataset
    if name is None:
        name = f"{LAB}{TASK}/student"
        notes.append(f"no model was given: using {name} from the built-in laboratory")
    if dataset is None:
        dataset = LAB + TASK
        notes.append(f"no data set was given: using {dataset} from the built-in laboratory")
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
    config: Config, model: Model, prompts: PromptSet
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Return each problem with the token ids of its prompt."""
    begin = templates.begin_ids(model, config.rollout.begin)
    glue = templates.glue(config.data)
    thinking = config.data.student_thinking
    problems = []
    for p in prompts.prompts:
        ids = templates.render(model, p.messages, config.data.template, thinking, p.index, glue)
        problems.append((p, tuple(ids) + begin))
    return problems


def _sampler(config: Config, model: Model) -> Sampler:
    pad = model.tokenizer.pad_token_id
    return Sampler(
        model.eos,
        min(model.eos) if pad is None else pad,
        max(model.tokenizer.get_vocab().values()) + 1,
        seed_of(config.runtime.seed, "evaluation"),
        config.evaluate.temperature,
        config.rollout.top_p,
        config.rollout.top_k,
        config.rollout.rows,
    )
