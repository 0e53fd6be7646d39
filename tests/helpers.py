"""Shared test helpers: tiny random models, commands, single updates, run folders.

Test modules do not import each other. Code that two of them need belongs here.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from prefix_distill import config as configuration
from prefix_distill.cli import main as cli
from prefix_distill.engine import sampling, scoring
from prefix_distill.engine.memory import MemoryLimits
from prefix_distill.engine.models import Model
from prefix_distill.engine.ranks import Place
from prefix_distill.engine.sampling import Sampler
from prefix_distill.maths.divergence import Terms, per_token
from prefix_distill.maths.schedule import parse_prefix
from prefix_distill.maths.weights import quadrants
from prefix_distill.planning.case import Case
from prefix_distill.prompts.grading import Grader
from prefix_distill.training import prepare as preflight
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.loss import TokenLosses
from prefix_distill.training.run import Method, Notes, Problems, Run
from prefix_distill.training.session import Session
from prefix_distill.training.state import State
from prefix_distill.training.update import Update

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BENCHMARKS = TESTS / "benchmarks"
PLUGINS = TESTS / "plugins"
# benchmarks that can be run as scripts
PROGRAMS = sorted(
    file.stem
    for file in BENCHMARKS.glob("*.py")
    if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
)

TEMPLATE = (
    "{% for m in messages %}<u>{{ m.content }}{% if m.role == 'assistant' %}<e>{% endif %}{% "
    "endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)

# exact divergences and their parameters
NAMES_AND_PARAMETERS: list[tuple[str, tuple[float, ...]]] = [
    ("reverse-kl", ()),
    ("forward-kl", ()),
    ("jsd", (0.5,)),
    ("jsd", (0.1,)),
]
# divergence name → TRL's beta
DIVERGENCES = {"reverse-kl": 1.0, "forward-kl": 0.0, "jsd:0.5": 0.5, "jsd:0.3": 0.3}

# self-distillation: the teacher's prompt contains the answer
SELF = {
    "models__teacher": "self",
    "data__privileged_column": "answer",
    "data__privileged_template": "{problem} Solution: {solution}",
}

# number of held-out problems in a run of `write_run`
PROBLEMS = 400


def byte_tokenizer(eos: str = "<e>") -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges, with the special tokens <p> <e> <u> <a>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<p>", "<e>", "<u>", "<a>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<p>", eos_token=eos, chat_template=TEMPLATE
    )


def tiny_config(kind: str, vocabulary: int = 260, width: int = 32, layers: int = 2):
    """Return a tiny config of a real architecture."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 256,
        "eos_token_id": 257,
        "bos_token_id": None,
    }
    if kind == "llama":
        return LlamaConfig(
            **common, intermediate_size=2 * width, num_key_value_heads=2, tie_word_embeddings=False
        )
    if kind == "qwen3":
        return Qwen3Config(
            **common,
            intermediate_size=2 * width,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    if kind == "gemma3":
        return Gemma3TextConfig(
            **common,
            intermediate_size=2 * width,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=20.0,
        )
    if kind == "neox":
        return GPTNeoXConfig(**common, intermediate_size=4 * width)
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=257,
        )
    raise ValueError(kind)


def tiny_net(kind: str, seed: int = 0, scale: float = 1.0, **shape):
    """Return a random network whose next-token distributions are far from uniform."""
    return random_net(tiny_config(kind, **shape), seed, scale)


def random_net(config, seed: int = 0, scale: float = 1.0, factory=AutoModelForCausalLM):
    """Return a random network of any config, as ``tiny_net`` does."""
    torch.manual_seed(seed)
    net = factory.from_config(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            # the decay rates of a recurrent state stay as they are
            if p.dim() >= 2 and "A_log" not in name:
                spread = 0.2 if "embed" in name or "wte" in name else 0.3
                p.copy_(torch.randn_like(p) * scale * spread)
    return net.eval()


def make_model(net, **changes: Any) -> Model:
    """Return a Model around a network with the byte-level tokenizer; 257 ends a response."""
    fields = {
        "name": "m",
        "net": net,
        "tokenizer": byte_tokenizer(),
        "generation_config": None,
        "eos": frozenset({257}),
    }
    return Model(**fields | changes)


# the fields of tiny configs with recurrent states
MAMBA_HEADS: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# the fields of a tiny config that most model types share
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "eos_token_id": 257,
    "bos_token_id": None,
}


def text_config(kind: str, **shape):
    """Return a tiny config of any model type, with an untied head unless ``shape`` ties it."""
    return CONFIG_MAPPING[kind](**SIZES | {"tie_word_embeddings": False} | shape)


def longrope_net(switch: int, seed: int = 0):
    """Return a random network whose RoPE factors change beyond ``switch`` tokens."""
    return random_net(
        text_config(
            "phi3",
            original_max_position_embeddings=switch,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": switch,
                "partial_rotary_factor": 1.0,
            },
        ),
        seed,
    )


def save_tiny(folder, kind: str = "llama", seed: int = 0, eos: str = "<e>", **shape) -> str:
    """Save a tiny model and its tokenizer to a folder, and return its path."""
    return save_net(folder, tiny_net(kind, seed, **shape), eos)


def save_net(folder, net, eos: str = "<e>") -> str:
    """Save a network with a byte-level tokenizer to a folder, and return its path."""
    net.generation_config = GenerationConfig(
        eos_token_id=257, pad_token_id=256, temperature=0.3, top_k=7, do_sample=True
    )
    net.save_pretrained(folder)
    byte_tokenizer(eos).save_pretrained(folder)
    return str(folder)


def command(*arguments, **options) -> subprocess.CompletedProcess[str]:
    """Run `prefix-distill …` in another process."""
    return subprocess.run(
        [sys.executable, "-m", "prefix_distill", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )


def invoke(*arguments) -> tuple[int | str, str, str]:
    """Run `prefix-distill …` in this process and return (exit code, stdout, stderr).

    This is faster than a new process. ``sys.warnoptions`` is not empty, as under ``python -W``,
    so that pytest's warning filters stay active.
    """
    out, err = io.StringIO(), io.StringIO()
    code: int | str = 0
    argv = mock.patch.object(sys, "argv", ["prefix-distill", *map(str, arguments)])
    environment = mock.patch.dict(os.environ)  # switches such as --json set variables
    warning_options = mock.patch.object(sys, "warnoptions", ["default"])
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with argv, environment, warning_options, streams[0], streams[1]:
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def last_json(text: str) -> dict:
    """Return the JSON document on the last line of stdout."""
    return json.loads(text.strip().splitlines()[-1])


class Silent:
    """A reporter that keeps the warnings and prints nothing."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)

    warn_on_this_rank = warn

    def note(self, *_): ...
    def detail(self, *_): ...
    def row(self, *_): ...
    def tail(self, *_): ...
    def evaluation(self, *_): ...


def make_case(**more):
    """Return what a small run does with memory, for forecasts of it."""
    given: dict[str, Any] = {
        "prompts": ((9, 9), (14, 14)),
        "samples": 2,
        "prefix": 6,
        "limit": 12,
        "micro_batch": 4,
        "rows": 4,
        "answers": 4,
        "compared": 2,
    }
    terms = Terms(name="reverse-kl", memory_bytes=1 << 16)
    return Case(terms=terms, dtype=torch.float32, **given | more)


def prepared(pair, questions, **changes):
    """Return a prepared small run. ``changes`` are options, with __ in place of the dot."""
    values = {
        "models.student": pair[0],
        "models.teacher": pair[1],
        "data.dataset": questions,
        "schedule.prefix": "12",
        "rollout.max_new_tokens": 32,
        "rollout.samples": 2,
        "train.batch_size": 5,
        "train.micro_batch_size": 4,
        "train.steps": 4,
        "evaluate.problems": 4,
        "evaluate.kl_prompts": 4,
        "checkpoint.keep": 2,
        "runtime.dtype": "float32",
    }
    return preflight.prepare(
        configuration.build(values | {k.replace("__", "."): v for k, v in changes.items()})
    )


def trained(run, folder, resume=False) -> dict:
    """Train a prepared run and return its result document.

    Create the run folder, or use the existing one if ``resume``.
    """
    files = RunFolder(folder)
    if not resume:
        files.create({})
        files.write_json("run.json", {})
    return Session(run, files, Silent(), resume).train()


def bare_run(pair, terms, options=None) -> Run:
    """Return a run without prompts, with two given models and a loss, on the CPU in float32."""
    cpu = torch.device("cpu")
    place = Place(
        device=cpu,
        teacher_device=cpu,
        dtype=torch.float32,
        head_dtype=torch.float32,
        rank=0,
        world=1,
        reasons=(),
    )
    config = configuration.build(options or {})
    sampler = Sampler(eos=frozenset(), pad=0, support=1, seed=0)
    method = Method(
        prefix=parse_prefix("full", 1),
        window=None,
        selection=None,
        position=None,
        off_policy=None,
        terms=terms,
        text_terms=terms,
        sampler=sampler,
        text_sampler=sampler,
        eval_sampler=sampler,
    )
    return Run(
        config=config,
        place=place,
        pair=pair,
        problems=Problems(
            train=[], held_out=[], teacher_held_out=[], kl=[], extrapolation=[], grader=Grader()
        ),
        method=method,
        notes=Notes(),
        limits=MemoryLimits(place, config),
    )


def state_of(run, folder="unused") -> State:
    """Return the training state of a run that writes no files."""
    return State(run, RunFolder(folder), Silent())


@dataclass
class Done:
    """The rollouts, losses and gradient of one update; ``gradient`` is keyed by parameter name."""

    update: Update
    sampled: list
    rollouts: list
    losses: TokenLosses
    gradient: dict

    @property
    def values(self):
        return self.losses.values

    @property
    def ledger(self):
        return self.update.meter.ledger


def one_update(run, micro=None, change=None, **given) -> Done:
    """Run update 0 without the optimizer step.

    ``micro`` is the micro-batch size. ``change`` maps the sampled rollouts to the rollouts to use.
    ``given`` are keyword arguments of ``Update``: prompts, prefix or texts.
    """
    if micro is not None:
        run.limits.micro_batch_size = micro
    state = state_of(run)
    state.optimizer.zero_grad()
    update = Update(state, 0, **given)
    sampled = update.sample()
    if change is not None:
        sampled = change(sampled)
    rollouts = update.select(sampled)
    losses = update.backward(rollouts)
    gradient = {name: p.grad.clone() for name, p in run.pair.student.trainable.items()}
    return Done(update, sampled, rollouts, losses, gradient)


def update_gradient(run, micro=4):
    """Return the gradient, rollouts and per-token values of update 0."""
    done = one_update(run, micro)
    return done.gradient, done.rollouts, done.values


def assert_same(left, right, tolerance=1e-5) -> None:
    """Compare tensors by name; the tolerance is relative to the largest magnitude in each one."""
    for name in left:
        scale = right[name].abs().max().item()
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance * max(scale, 1e-6), msg=name
        )


def counted(work: Callable[[], object]) -> float:
    """Run ``work`` and return the FLOPs that torch counts."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def shortage(monkeypatch: pytest.MonkeyPatch, where: str, most: int) -> None:
    """Simulate running out of memory for more than ``most`` rollouts at once.

    ``where`` is "training" or "scoring", a forward pass with or without gradients, or
    "generation".
    """
    if where == "generation":
        decode_batch = sampling._Batch.decode

        def decode(batch, *rest):
            # the few short rows of the check of decoding fit
            if len(batch.requests) > most and type(batch.sampler) is Sampler:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode_batch(batch, *rest)

        monkeypatch.setattr(sampling._Batch, "decode", decode)
    else:
        compute_rows = scoring.hidden_rows

        def hidden_rows(model, sides):
            if len(sides) > most and torch.is_grad_enabled() is (where == "training"):
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                    "memory: you tried to"
                )
            return compute_rows(model, sides)

        monkeypatch.setattr(scoring, "hidden_rows", hidden_rows)


def flags(pair, questions, out) -> list[str]:
    """Return the command line of a run of six steps with evaluations and checkpoints."""
    return [
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--steps",
        "6",
        "--prefix",
        "12",
        "--max-new-tokens",
        "32",
        "--batch-size",
        "4",
        "--samples",
        "2",
        "--micro-batch-size",
        "3",
        "--problems",
        "4",
        "--eval-every",
        "2",
        "--save-every",
        "3",
        "--keep-checkpoints",
        "2",
        "--check-samples",
        "0",
        "--lr",
        "1e-3",
        "--out",
        str(out),
    ]


def rows(out: Path) -> list[dict]:
    """Return the metrics rows of a run folder without times, which differ between runs."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def write_run(folder, seed, curve, cost, prefix=4, student="s", seconds=3.0):  # noqa: PLR0913  tests of the report vary all of these
    """Write a run folder in the tool's format and return it.

    ``curve`` lists the accuracy at each evaluation; the first problems are the correct ones. Every
    evaluation adds ``cost`` FLOPs and ``seconds``.
    """
    folder.mkdir(parents=True)
    rights = [[1.0] * round(a * PROBLEMS) + [0.0] * (PROBLEMS - round(a * PROBLEMS)) for a in curve]
    evaluations = [
        {
            "step": 5 * i,
            "accuracy": {"value": sum(right) / PROBLEMS, "n": PROBLEMS, "low": 0.0, "high": 1.0},
            "kl": {"value": 1.0 - a / 2, "n": 9, "low": 0, "high": 1},
            "kl_prefix": 0.5,
            "kl_tail": 0.2,
            "finish_rate": 1.0,
            "mean_tokens": 50.0,
            "flops_useful": cost * i,
            "flops_executed": 2 * cost * i,
            "seconds": seconds * i,
            "quadrants": quadrants([0, 0, 1, 1], [0.0, 3.0, 0.0, 1.0 + i], (0.5, 0.5)),
        }
        for i, (a, right) in enumerate(zip(curve, rights, strict=True))
    ]
    result = {
        "evaluations": evaluations,
        "prefix": prefix,
        "full_rollout_cost": 9 * cost,
        "prefix_decisions": [],
        "extrapolations": [{"step": 8, "k": 2, "scores": [0.25, 0.5, 0.75, 0.75], "flops": 3e9}],
    }
    (folder / "run.json").write_text(json.dumps({"seed": seed, "result": result}))
    tree = configuration.as_dict(
        configuration.build(
            {
                "models.student": student,
                "schedule.lr": 5e-5,
                "rollout.max_new_tokens": 10,
                "runtime.seed": seed,
            }
        )
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "scores.jsonl").write_text(
        "".join(json.dumps({"step": 5 * i, "right": r}) + "\n" for i, r in enumerate(rights))
    )
    (folder / "before.json").write_text(
        json.dumps({"kl_by_token": [[1.0, 1.0, 1.0, 1.0, 0.8, 0.6], [1.0, 2.0]]})
    )
    (folder / "after.json").write_text(
        json.dumps({"kl_by_token": [[1.0, 1.0, 1.0, 1.0, 0.5, 0.1], [1.0, 2.0]]})
    )
    return folder


def head_logits(head, hidden):
    """Return the logits of a head, computed directly from the formula."""
    z = head.scale * (hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def by_the_book(  # noqa: PLR0913  operands of the formula
    terms, shared, rollouts, student_ND, student_head, teacher_ME, teacher_head, raw=False
):
    """Return the differentiable divergences [U] of all units in the loss, one unit at a time.

    ``raw`` scores with logits instead of log-probabilities, as ``simct-released`` does.
    """
    found, row, there = [], 0, 0
    for r in rollouts:
        for u in r.taught_units:
            scores = []
            for hidden, head, at, start, size, ids, common, ends in (
                (
                    student_ND,
                    student_head,
                    row,
                    u.start,
                    u.size,
                    r.ids,
                    shared.student,
                    shared.student_eos,
                ),
                (
                    teacher_ME,
                    teacher_head,
                    there,
                    u.teacher_start,
                    u.teacher_size,
                    r.teacher_ids,
                    shared.teacher,
                    shared.teacher_eos,
                ),
            ):
                z = head_logits(head, hidden[at : at + size]) / terms.temperature
                z = z if raw else z.log_softmax(-1)
                own = [z[0, list(common)], z[0, list(ends)].logsumexp(0, keepdim=True)]
                if not u.exact:
                    own.append(
                        torch.stack([z[i, ids[start + i]] for i in range(size)]).mean()[None]
                    )
                scores.append(torch.cat(own).log_softmax(-1)[None])
            found.append(per_token(terms, scores[0], scores[1].detach())[0])
            row, there = row + u.size, there + u.teacher_size
    return torch.stack(found)
