"""What models.py does with one model class: the steps, their figures, and the outcome.

A step raises UserError if the tool refuses, WrongFigure if a comparison fails, and anything else if
the tool breaks.
"""

import contextlib
import json
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers
import model_configs
import torch
from model_configs import EOS, PAD, ModelClass
from transformers import GenerationConfig

from prefix_distill import config as configuration
from prefix_distill.cli import quiet
from prefix_distill.engine import loading, sampling, scoring
from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.models import Model
from prefix_distill.engine.rollout import Rollout, rollout_of, student_sides
from prefix_distill.engine.sampling import Request, Sampler
from prefix_distill.errors import Stopped, UserError, one_line
from prefix_distill.planning.checks import examine
from prefix_distill.training.loss import TokenLosses
from prefix_distill.training.prepare import prepare
from prefix_distill.training.rehearsal import rehearse
from prefix_distill.training.run import Run
from prefix_distill.training.update import Update

TOKENS = 40  # more than one stretch of decoding, and more than the tiny windows and chunks
TOLERANCE = 2e-4  # nats, or the share of a gradient's norm
TEXT = list(range(20, 44))
# texts of a refusal that name no mathematical obstacle
NO_OBSTACLE = re.compile(r"cannot be loaded \(|not support|unsupported|nrecognized|[a-z]Error\b")
SETTINGS: dict[str, object] = {
    "schedule.prefix": "12",
    "rollout.max_new_tokens": 16,
    "rollout.samples": 2,
    "train.batch_size": 3,
    "train.micro_batch_size": 4,
    "train.steps": 1,
    "schedule.lr": 1e-3,
    "evaluate.problems": 1,
    "evaluate.kl_prompts": 1,
    "evaluate.every": 0,
    "evaluate.tail_every": 0,
    "runtime.dtype": "float32",
    "runtime.device": "cpu",
}


class WrongFigure(Exception):
    """Two computations of the same values differ; the message has the figure."""


@dataclass(kw_only=True)
class Case:
    """One class while it is examined. ``figures``: largest difference of every comparison."""

    model_class: ModelClass
    folder: Path
    figures: dict[str, float] = field(default_factory=dict)
    expected: torch.Tensor | None = None
    run: Run | None = None
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    sampled: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def prepared(self) -> Run:
        """Return the run of the step ``prepare``."""
        if self.run is None:
            raise ValueError("run is None: expected the step prepare before this one")
        return self.run

    def settings(self, **changes: object) -> configuration.Config:
        """Return the config of a small run; ``changes`` have __ in place of the dot."""
        values = SETTINGS | {
            "models.student": str(self.folder / "student"),
            "models.teacher": str(self.folder / "teacher"),
            "data.dataset": str(self.folder / "sums.jsonl"),
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return configuration.build(values)

    def compare(self, name: str, difference: float) -> None:
        """Record a difference; WrongFigure: it is too large."""
        self.figures[name] = max(difference, self.figures.get(name, 0.0))
        if not difference <= TOLERANCE:
            raise WrongFigure(f"{name} differ by {difference:.2g}, expected at most {TOLERANCE:g}")


def build(case: Case) -> None:
    """Save a random student and teacher of the class, their tokenizer, and six prompts."""
    for seed, role in enumerate(("teacher", "student")):
        net, config = model_configs.build(case.model_class, seed)
        net.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
        net.save_pretrained(case.folder / role)
        config.save_pretrained(case.folder / role)  # net.config may be a part of it
        helpers.byte_tokenizer().save_pretrained(case.folder / role)
    with contextlib.suppress(Exception):  # some classes need an image; then nothing is compared
        expected = read_log_probabilities(net, TEXT)
        if torch.equal(expected, read_log_probabilities(net, TEXT)):
            case.expected = expected  # a diffusion model starts from random tokens
    rows = []
    for i in range(6):
        question = f"{'what is ' if i % 3 == 0 else ''}{i}+{i * i}?"
        rows.append(json.dumps({"question": question, "answer": f"#### {i + i * i}"}))
    (case.folder / "sums.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


@torch.no_grad()
def read_log_probabilities(net: Any, ids: list[int], support: int = 260) -> torch.Tensor:
    """Return log-probabilities [T, support] of plain transformers, without a cache."""
    return log_probabilities(net, ids, support)


def log_probabilities(net: Any, ids: list[int], support: int = 260) -> torch.Tensor:
    """Return the same with a graph."""
    logits_BTV = net(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits_BTV[0, :, :support].float().log_softmax(-1)


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference of two tensors."""
    return (left - right).abs().max().item()


def load(case: Case) -> None:
    """Load the student and compare it with the network that was saved."""
    model = load_folder(case.folder / "student")
    if case.expected is not None:
        case.compare("load", largest(read_log_probabilities(model.net, TEXT), case.expected))


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """Load a model as the tool does, on the CPU."""
    return loading.load_model(str(folder), device=torch.device("cpu"), dtype=dtype)


def prepare_run(case: Case) -> None:
    """Prepare a run, make the checks of `prefix-distill check`, and rehearse the first step."""
    case.run = prepare(case.settings())
    for check in examine(case.run, samples=0):
        if check.status == "error":
            raise UserError(f"{check.name}: {check.text}")
    rehearse(helpers.state_of(case.run))


@torch.no_grad()
def score(case: Case) -> None:
    """Compare padded rows with single ones, and with plain transformers."""
    run = case.prepared
    student = run.pair.student
    rollouts = []
    for slot, length in ((0, 9), (1, 30), (0, 1), (2, 17)):
        prompt = run.problems.train[slot].student_ids
        rollouts.append(rollout_of(slot, prompt, tuple(TEXT * 2)[:length]))
    sides = student_sides(rollouts)
    head = student.head()
    together_NV = head.logits(scoring.hidden_rows(student, sides)).log_softmax(-1)
    singles = [scoring.hidden_rows(student, [side]) for side in sides]
    single_NV = head.logits(torch.cat(singles)).log_softmax(-1)
    case.compare("padded rows", largest(together_NV, single_NV))
    plain = []
    for r in rollouts:
        log_p_TV = log_probabilities(student.net, [*r.student_prompt, *r.ids], student.vocabulary)
        plain.append(log_p_TV[len(r.student_prompt) - 1 : -1])
    case.compare("plain forward", largest(single_NV, torch.cat(plain)))


def requests_of(case: Case) -> list[Request]:
    """Return four requests, two of them with the same prompt."""
    prompts = case.prepared.problems.train
    requests = []
    for key, slot in enumerate((0, 0, 1, 2)):
        requests.append(Request(ids=prompts[slot].student_ids, key=(0, slot, key)))
    return requests


def endless(run: Run) -> Sampler:
    """Return a sampler without EOS ids that records log-probabilities."""
    support = run.pair.student.support or model_configs.VOCABULARY
    return Sampler(eos=frozenset(), pad=PAD, support=support, seed=5, record=True)


def decode(case: Case) -> None:
    """Compare 40 decoding steps of a batch with one plain ``generate`` for each row."""
    run = case.prepared
    student, sampler = run.pair.student, endless(run)
    requests = requests_of(case)
    decoder = make_decoder(student, torch.float32)
    responses = sampling.generate(decoder, requests, max_new_tokens=TOKENS, sampler=sampler)
    case.sampled = [response.ids for response in responses]
    for request, response in zip(requests[1:], responses[1:], strict=True):
        race = sampler.race([request.key], student.device)
        prompt_BT = torch.tensor([request.ids])
        plain_BT = student.net.generate(
            input_ids=prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            generation_config=sampler.settings(TOKENS),
            logits_processor=sampler.processors(race),
        ).sequences
        recorded = torch.tensor(response.logp)
        ids = tuple(plain_BT[0, prompt_BT.shape[1] :].tolist())
        assert race is not None  # the sampler is not greedy
        plain = torch.tensor(race.take_recorded()[0])
        case.compare("decoding", largest_until_different(recorded, plain, response.ids, ids))
        log_p_TV = read_log_probabilities(
            student.net, [*request.ids, *response.ids], student.vocabulary
        )
        scored = log_p_TV[len(request.ids) - 1 : -1].gather(1, torch.tensor([response.ids]).T)
        case.compare("decoding against scoring", largest(recorded, scored[:, 0]))


def largest_until_different(
    left: torch.Tensor, right: torch.Tensor, left_ids: tuple[int, ...], right_ids: tuple[int, ...]
) -> float:
    """Return the largest difference of log-probabilities; 1 or more if the ids differ."""
    if left_ids == right_ids:
        return largest(left, right)
    same = 0
    while left_ids[same] == right_ids[same]:
        same += 1
    difference = 0.0
    if same:
        difference = largest(left[:same], right[:same])
    return 1.0 + difference


def end_early(case: Case) -> None:
    """Decode the same rows with an EOS id that one row samples early."""
    run = case.prepared
    eos = choose_eos(case.sampled)
    sampler = Sampler(
        eos=frozenset([eos]), pad=PAD, support=endless(run).support, seed=5, record=True
    )
    decoder = make_decoder(run.pair.student, torch.float32)
    responses = sampling.generate(
        decoder, requests_of(case), max_new_tokens=TOKENS, sampler=sampler
    )
    wrong = 0
    for response, ids in zip(responses, case.sampled, strict=True):
        expected = ids
        if eos in ids:
            expected = ids[: ids.index(eos) + 1]
        wrong += response.ids != expected
    case.compare("rows after an early end", float(wrong))


def choose_eos(rows: list[tuple[int, ...]]) -> int:
    """Return an id that ends some row, while another row goes on to the end."""
    ids = [token for row in rows for token in row[2:20]]
    for token in ids:
        going = [row for row in rows if token not in row]
        if going and len(going) < len(rows):
            return token
    return ids[0]


def update(case: Case) -> None:
    """Compare the gradient of one prefix update with plain transformers, row by row."""
    run = case.prepared
    done = take_update(run)
    case.gradient = done.gradient
    trained = run.pair.student.trainable
    expected = torch.autograd.grad(
        plain_loss(run, done), list(trained.values()), allow_unused=True, materialize_grads=True
    )
    named = dict(zip(trained, expected, strict=True))
    case.compare("gradient", share_of_norm(done.gradient, named))


@dataclass(frozen=True, kw_only=True)
class Done:
    """The rollouts, losses and gradient of one update; ``gradient`` is keyed by parameter name."""

    rollouts: list[Rollout]
    losses: TokenLosses
    gradient: dict[str, torch.Tensor]


def take_update(run: Run) -> Done:
    """Run update 0 without the optimizer step.

    What these texts do not reach, such as an expert or a block of long texts, has gradient zero.
    """
    state = helpers.state_of(run)
    state.optimizer.zero_grad()
    one = Update(state, 0)
    rollouts = one.select(one.sample())
    losses = one.backward(rollouts)
    gradient = {}
    for name, p in run.pair.student.trainable.items():
        gradient[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return Done(rollouts=rollouts, losses=losses, gradient=gradient)


def plain_loss(run: Run, done: Done) -> torch.Tensor:
    """Return the weighted reverse KL of an update's rollouts from full logits."""
    total = torch.zeros(())
    support = run.pair.student.vocabulary
    for r in done.rollouts:
        ids = [*r.student_prompt, *r.ids]
        start = len(r.student_prompt) - 1
        student_TV = log_probabilities(run.pair.student.net, ids, support)[start:-1]
        with torch.no_grad():
            teacher_TV = log_probabilities(run.pair.teacher.net, ids, support)[start:-1]
        kl_T = (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)
        weights_T = torch.tensor(done.losses.weights[r.key]) / done.losses.divisor
        total = total + (kl_T[list(r.taught)] * weights_T).sum()
    return total


def share_of_norm(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two gradients over the norm of the second."""
    difference = sum((left[name] - right[name]).square().sum().item() for name in right)
    norm = sum(gradient.square().sum().item() for gradient in right.values())
    return (difference / norm) ** 0.5


def recompute(case: Case) -> None:
    """Compare the gradient under gradient checkpointing with the one without."""
    run = prepare(case.settings(train__gradient_checkpointing=True))
    case.compare("checkpointing", share_of_norm(take_update(run).gradient, case.gradient))


def autocast(case: Case) -> None:
    """Take one update in bfloat16; its gradient must be finite.

    The network that samples must be the one that transformers loads in bfloat16.
    """
    run = prepare(case.settings(runtime__dtype="bfloat16"))
    rehearse(helpers.state_of(run))
    decoder = make_decoder(run.pair.student, torch.bfloat16)
    loaded = load_folder(case.folder / "student", torch.bfloat16)
    ours = read_log_probabilities(decoder.net, TEXT)
    case.compare("cast to bfloat16", largest(ours, read_log_probabilities(loaded.net, TEXT)))
    for name, gradient in take_update(run).gradient.items():
        if not torch.isfinite(gradient).all():
            raise WrongFigure(f"in bfloat16 the gradient of {name} is not finite")


def save(case: Case) -> None:
    """Train one step, save, reload and compare."""
    run = prepare(case.settings())
    helpers.trained(run, case.folder / "run")
    compare_saved(case, run, "model")


def adapt(case: Case) -> None:
    """Train one step with LoRA on all linear layers; merge, reload and compare."""
    run = prepare(case.settings(adapter__rank=4, adapter__merge=True))
    helpers.trained(run, case.folder / "run-lora")
    compare_saved(case, run, "lora")


def compare_saved(case: Case, run: Run, name: str) -> None:
    """Compare the trained network with its saved folder."""
    folders = {"model": {"save": "run/model"}}
    folders["lora"] = {"LoRA merged": "run-lora/model", "LoRA adapter": "run-lora/adapter"}
    trained = read_log_probabilities(run.pair.student.net, TEXT)
    if case.expected is not None and largest(trained, case.expected) == 0:
        raise WrongFigure(f"{name}: the step changed no log-probability")
    for label, folder in folders[name].items():
        saved = load_folder(case.folder / folder)
        case.compare(label, largest(read_log_probabilities(saved.net, TEXT), trained))


# A refusal in one of the first steps is one before anything was spent.
FIRST: dict[str, Callable[[Case], None]] = {"load": load, "prepare": prepare_run}
STEPS: dict[str, Callable[[Case], None]] = {
    "score": score,
    "decode": decode,
    "end early": end_early,
    "update": update,
    "checkpointing": recompute,
    "bfloat16": autocast,
    "save": save,
    "lora": adapt,
}
OPTIONAL = ("checkpointing", "bfloat16", "lora")  # the user can leave these options out


def run_steps(model_class: ModelClass, folder: Path) -> Iterator[dict]:
    """Yield the name of each step before it starts, and at the end the outcome."""
    quiet.quiet_libraries()
    torch.set_num_threads(1)
    case = Case(model_class=model_class, folder=folder)
    faults: dict[str, str] = {}
    limits: dict[str, str] = {}
    for name, step in ({"build": build} | FIRST | STEPS).items():
        yield {"step": name, "figures": case.figures, "faults": faults, "limits": limits}
        try:
            step(case)
        except (UserError, Stopped) as error:
            if name in FIRST:
                yield outcome_of_refusal(name, str(error))
                return
            if name in OPTIONAL and names_obstacle(str(error)):
                limits[name] = str(error)
            else:
                faults[name] = f"{type(error).__name__}: {error}"
        except WrongFigure as error:
            faults[name] = f"{type(error).__name__}: {error}"
        except Exception as error:
            faults[name] = describe(error)
        if faults and (name == "build" or name in FIRST):
            break
    outcome = "neither" if faults else "works"
    yield {"outcome": outcome, "figures": case.figures, "faults": faults, "limits": limits}


def names_obstacle(text: str) -> bool:
    """Return whether a refusal is one line, and more than "not supported"."""
    return "\n" not in text and not NO_OBSTACLE.search(text)


def outcome_of_refusal(step: str, text: str) -> dict:
    """Return the outcome of a class that the tool refuses before anything was spent."""
    if names_obstacle(text):
        return {"outcome": "refused", "refusal": text}
    return {"outcome": "neither", "faults": {step: f"refused without an obstacle: {text}"}}


def describe(error: Exception) -> str:
    """Return an exception in one line, with the last line of our code and of all code."""
    frames = traceback.extract_tb(error.__traceback__)
    places = []
    for part in ("/prefix_distill/", ""):
        inside = [frame for frame in frames if part in frame.filename]
        if inside:
            path = "/".join(Path(inside[-1].filename).parts[-2:])
            places.append(f"{path}:{inside[-1].lineno}")
    return f"{type(error).__name__}: {one_line(error)} ({' → '.join(places)})"
