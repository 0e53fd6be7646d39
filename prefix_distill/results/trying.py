"""Ask the models of a run a question: untrained student, trained student and teacher."""

import dataclasses
import datetime
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .. import config as configuration
from ..config import SELF, Config
from ..engine import exactness, loading
from ..engine.decoder import make_decoder
from ..engine.free_memory import release_cache
from ..engine.models import Model
from ..engine.placement import Storage
from ..engine.processors import RowProcessor
from ..engine.ranks import join_ranks
from ..engine.sampling import Request, Sampler, generate
from ..engine.token_texts import TokenTexts
from ..engine.vocabulary import count_ids
from ..errors import UserError
from ..maths.seeds import seed_of
from ..prompts import templates
from ..prompts.prompt import Prompt
from ..prompts.rows import PromptBuilder
from ..prompts.sources import parse_source, split_sources
from ..training.commits import pin_commits
from ..training.folder import RunFolder
from ..training.prepare import choose_pad
from ..training.problems import LONGEST
from ..training.prompt_sets import row_format
from ..training.run import Notes, settled
from ..training.turn_end import add_turn_end
from .texts import state_of

UNTRAINED, TRAINED, TEACHER = "untrained student", "trained student", "teacher"

Say = Callable[[str], None]  # receives a piece of an answer as soon as it is sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A model to ask. ``name``: what ``load_model`` takes; ``quantize``: how its weights are."""

    role: str
    name: str
    quantize: str = "none"


def read_config(folder: Path) -> Config:
    """Return the config of a run, with the hub's commits that it began with.

    UserError: the folder holds no run.
    """
    state_of(folder)
    run = RunFolder(folder)
    run.check_format()
    config = configuration.assemble(configuration.read_yaml(str(folder / "config.yaml")))
    return pin_commits(config, run)[0]


def models_of(folder: Path, config: Config) -> list[Asked]:
    """Return the models of a run in the order in which they answer.

    The trained student is that of model/, or of best/ while the run has no model/. A teacher
    ``self`` is the untrained student and not asked again. UserError: the run has saved no model.
    """
    models = config.models
    student = settled(models.student, "--student")
    asked = [Asked(role=UNTRAINED, name=student, quantize=models.student_quantize)]
    asked.append(Asked(role=TRAINED, name=str(_trained_model(folder))))
    if models.teacher != SELF:
        teacher = settled(models.teacher, "--teacher")
        asked.append(Asked(role=TEACHER, name=teacher, quantize=models.teacher_quantize))
    return asked


def _trained_model(folder: Path) -> Path:
    for name in ("model", "best"):
        if (folder / name).is_dir():
            return folder / name
    raise UserError(
        f"{folder}: expected a trained student in model/ or best/, got none yet; finish the run "
        "with --resume, or write a checkpoint's student with prefix-distill export --which STEP"
    )


def build_prompt(config: Config, question: str) -> Prompt:
    """Return a question as a prompt of the run: with its template, instruction and system text."""
    (name, _), *_ = split_sources(settled(config.data.dataset, "--dataset"))
    form = dataclasses.replace(
        row_format(config), prompt_column="prompt", answer_column="answer", privileged_column=None
    )
    builder = PromptBuilder(source=parse_source(name), row_format=form, part=(0, 1))
    row = {"prompt": question, "answer": ""}
    return builder.detect_columns(row).build(0, row)


def ask(config: Config, asked: Asked, questions: Sequence[str], say: Say) -> list[dict[str, Any]]:
    """Load one model, answer all questions, and free it; return a record per question.

    Sampling is that of the run's evaluations. ``say`` receives the answers piece by piece.
    UserError: the model cannot be loaded, or has too few positions.
    """
    model = loading.load_model(
        asked.name,
        device=torch.device("cpu"),
        dtype=torch.float32,
        trust_remote_code=config.models.trust_remote_code,
        storage=Storage(quantize=asked.quantize),
    )
    place = join_ranks(config.runtime, model)
    if asked.quantize == "none":
        model.net.to(place.device, place.dtype)
    model.decoding = exactness.find_decoding(model)
    render = templates.student_renderer
    if asked.role == TEACHER:
        render = templates.teacher_renderer
    if config.data.template_date is None:
        date = datetime.date.today().isoformat()
        config = configuration.replace(config, data={"template_date": date})
    renderer = render(model, config)
    add_turn_end(renderer, model, Notes())
    begin = templates.encode_begin(model, config.rollout.begin)
    decoder = make_decoder(model, place.dtype)
    records = []
    for question in questions:
        ids = (*renderer.render(build_prompt(config, question)).ids, *begin)
        say(config.rollout.begin or "")
        records.append(_answer(config, decoder, ids, say=say))
        say("\n")
    del model, decoder
    gc.collect()
    release_cache(place.device)
    return records


def _answer(config: Config, model: Model, ids: tuple[int, ...], say: Say) -> dict[str, Any]:
    """Sample one answer, and return {text, tokens, finished, seconds}."""
    listener = Listener(model, len(ids), say)
    sampler = ListeningSampler(
        eos=model.eos,
        pad=choose_pad(model, model.eos),
        support=count_ids(model),
        seed=seed_of(config.runtime.seed, "try"),
        temperature=config.evaluate.temperature,
        listener=listener,
    )
    began = time.perf_counter()
    limit = config.rollout.max_new_tokens or LONGEST
    [response] = generate(model, [Request(ids=ids, key=("try",))], limit, sampler=sampler)
    listener.hear((*ids, *response.ids))
    if not response.finished:
        say(f" [cut off at {limit} tokens]")
    return {
        "text": listener.text,
        "tokens": len(response.ids),
        "finished": response.finished,
        "seconds": time.perf_counter() - began,
    }


class Listener(LogitsProcessor):
    """Passes the text of new ids on while ``generate`` runs. ``read``: ids that were passed on."""

    def __init__(self, model: Model, read: int, say: Say):
        self.texts = TokenTexts(model, special=False)
        self.read = read
        self.say = say
        self.text = ""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.hear(input_ids[0].tolist())
        return scores

    def hear(self, ids: Sequence[int]) -> None:
        """Pass on the ids that are new."""
        for token in ids[self.read :]:
            piece = self.texts.add(token)
            self.text += piece
            self.say(piece)
        self.read = len(ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListeningSampler(Sampler):
    """A sampler of one response whose ids a listener gets as soon as they are sampled."""

    listener: Listener

    def processors(self, race: RowProcessor | None) -> LogitsProcessorList:
        """Return the logits processors, the listener first."""
        steps = super().processors(race)
        steps.insert(0, self.listener)
        return steps
