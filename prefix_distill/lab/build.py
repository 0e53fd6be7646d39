"""Rebuilds the laboratory's tokenizer and models from nothing: python -m prefix_distill.lab.build

Every net is a small Llama trained on the final solution of the task's training problems by
cross-entropy on the answer's tokens; worker processes of one thread each train one net at a time.
Progress goes to stderr. The last line, on stdout, is one JSON object with the accuracies measured
on test problems after the weights were rounded to float16 and loaded again. The exit status is 1 if
one of them misses its band.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .task import MAX_STEPS, MODELS, STEPS, TASKS, Problem, model_path, problems

PAD, END, USER, ASSISTANT, UNKNOWN = SPECIALS = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|unknown|>",
)
VOCABULARY = {token: i for i, token in enumerate([*SPECIALS, "####", *"0123456789", " ", ":"])}
MERGED = [
    ":0",
    ":1",
    ":2",
    ":3",
    ":4",
    "20",
    "22",
    "24",
]  # what the second tokenizer merges, in this order
VOCABULARY_MERGED = {token: i for i, token in enumerate([*VOCABULARY, *MERGED])}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BANDS = {
    "teacher": (0.95, 1.0),
    "student": (0.15, 0.45),
    "student-wide": (0.15, 0.45),
    "student-told": (0.15, 0.45),
    "student-merged": (0.15, 0.45),
    "teacher-half": (0.45, 0.75),
}
TOLD_ACCURACY = 0.9
MEASURED = 1000
MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Stage:
    """`updates` AdamW steps on `batch` problems; lr falls linearly to `last` * lr; a share of them
    are short-cuts.

    The share `told` of the problems is given together with the worked solution, which is then the
    answer as well: the share of short-cuts is one of the other problems.

    With `few`, problems have any number of steps, and every other update takes three times as many
    of at most five, which teaches the first and the last step sooner than long problems do. Without
    it, they have as many steps as the task's test problems, so that the labels long problems begin
    with are met more often. The stage ends early once `solved` reaches `until`.
    """

    updates: int
    batch: int
    lr: float
    short_cuts: float = 0.0
    few: bool = True
    last: float = 0.05
    until: float = 1.0
    told: float = 0.0


@dataclass(frozen=True)
class Net:
    """One net of the laboratory and how it is trained. `merged`: its tokens are those of the
    second tokenizer."""

    task: str
    role: str
    layers: int
    width: int
    seed: int
    stages: tuple[Stage, ...]
    merged: bool = False


NETS = (
    Net(
        "choice",
        "teacher",
        3,
        96,
        0,
        (Stage(600, 12, 3e-3, 0.25), Stage(450, 16, 1.8e-3, last=0.02)),
    ),
    Net(
        "choice",
        "student",
        2,
        64,
        1,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
    ),
    Net(
        "choice",
        "student-wide",
        2,
        80,
        6,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
    ),
    Net(
        "choice",
        "student-told",
        2,
        64,
        1,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(400, 24, 2e-3, 0.72, few=False, last=0.02, told=0.6),
        ),
    ),
    Net(
        "choice",
        "teacher-half",
        3,
        96,
        0,
        (Stage(600, 12, 3e-3, 0.25), Stage(300, 16, 1.8e-3, 0.4, few=False, last=0.02, told=0.6)),
    ),
    Net(
        "choice",
        "student-merged",
        2,
        64,
        7,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
        merged=True,
    ),
    Net(
        "tied",
        "teacher",
        3,
        96,
        2,
        (Stage(600, 12, 3e-3), Stage(300, 16, 1.8e-3, few=False, last=0.02)),
    ),
    Net(
        "tied",
        "student",
        2,
        64,
        3,
        (Stage(400, 12, 5e-3, last=0.8), Stage(1600, 12, 2e-3, few=False, last=0.3, until=0.06)),
    ),
    Net("shared", "teacher", 3, 96, 4, (Stage(600, 12, 3e-3), Stage(300, 16, 1.8e-3, last=0.02))),
    Net("shared", "student", 2, 64, 5, (Stage(2000, 12, 2.5e-3, last=0.3, until=0.06),)),
)


def make_tokenizer(merged: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, except "####" and the special tokens; `merged`: a BPE
    that merges an operator with some digits, and some labels."""
    if merged:
        tokenizer = Tokenizer(
            models.BPE(
                VOCABULARY_MERGED,
                [tuple(pair) for pair in MERGED],
                unk_token=UNKNOWN,
                ignore_merges=True,
            )
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    words = r"####|[0-9:]+|[\s\S]" if merged else r"####|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(net: Net) -> LlamaForCausalLM:
    """The untrained net."""
    torch.manual_seed(net.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY_MERGED if net.merged else VOCABULARY),
            hidden_size=net.width,
            intermediate_size=net.width * 8 // 3 // 8 * 8,
            num_hidden_layers=net.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=VOCABULARY[PAD],
            eos_token_id=VOCABULARY[END],
            bos_token_id=None,
        )
    )


def encode(text: str, merged: bool = False) -> list[int]:
    """Token ids of plain task text."""
    if merged:
        return second_tokenizer().encode(text).ids
    return [VOCABULARY[token] for token in re.findall("####|.", text)]


@cache
def second_tokenizer() -> Tokenizer:
    """The second tokenizer's core."""
    return make_tokenizer(merged=True).backend_tokenizer


def make_batch(
    pairs: list[tuple[str, str]], merged: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 on prompts and padding) of (prompt, answer) texts, padded on
    the right."""
    prompts = [
        [VOCABULARY[USER], *encode(prompt, merged), VOCABULARY[ASSISTANT]] for prompt, _ in pairs
    ]
    answers = [[*encode(answer, merged), VOCABULARY[END]] for _, answer in pairs]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers))
    fill = [longest - len(p) - len(a) for p, a in zip(prompts, answers)]
    ids = [p + a + [VOCABULARY[PAD]] * n for p, a, n in zip(prompts, answers, fill)]
    labels = [[-100] * len(p) + a + [-100] * n for p, a, n in zip(prompts, answers, fill)]
    return torch.tensor(ids), torch.tensor(labels)


def make_pair(problem: Problem, stage: Stage, rng: random.Random) -> tuple[str, str]:
    """The prompt and the answer a problem is trained with in a stage; without `told` no number
    is drawn for it."""
    if stage.told and rng.random() < stage.told:
        return problem.told, problem.solution
    return problem.prompt, problem.short_cut(
        rng
    ) if rng.random() < stage.short_cuts else problem.solution


def train(net: Net, model: LlamaForCausalLM) -> None:
    """Runs the net's stages, each with a fresh optimizer."""
    rng = random.Random(net.seed)
    pool = problems(net.task, "train", 20000, net.seed, range(1, MAX_STEPS + 1))
    short = [problem for problem in pool if problem.steps <= 5]
    long = [problem for problem in pool if problem.steps in STEPS[net.task]]
    model.train()
    for number, stage in enumerate(net.stages, 1):
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        total = 0.0
        for update in range(stage.updates):
            rate = min(1, (update + 1) / 40) * (1 - (1 - stage.last) * update / stage.updates)
            optimizer.param_groups[0]["lr"] = stage.lr * rate
            if stage.few and update % 2:
                chosen = rng.sample(short, 3 * stage.batch)
            else:
                chosen = rng.sample(pool if stage.few else long, stage.batch)
            ids, labels = make_batch(
                [make_pair(problem, stage, rng) for problem in chosen], net.merged
            )
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            if update % 100 == 99:
                report(
                    net,
                    f"stage {number} update {update + 1}/{stage.updates} loss {total / 100:.4f}",
                )
                total = 0.0
            if stage.until < 1 and update % 20 == 19 and solved(net, model) >= stage.until:
                report(net, f"stage {number} ends after update {update + 1}")
                break


def solved(net: Net, model: LlamaForCausalLM) -> float:
    """Mean probability of the worked solution over 100 validation problems: about the accuracy
    at temperature 1."""
    ids, labels = make_batch(
        [(p.prompt, p.solution) for p in problems(net.task, "validation", 100)], net.merged
    )
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.sum(1).neg().exp().mean().item()


def report(net: Net, text: str) -> None:
    """One line of progress on stderr."""
    print(f"{net.task} {net.role}: {text}", file=sys.stderr, flush=True)


def save(model: LlamaForCausalLM, folder: Path, merged: bool = False) -> None:
    """Writes the model with float16 weights that load as float32, and the tokenizer beside it."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    make_tokenizer(merged).save_pretrained(folder)


def sample(folder: Path, prompts: list[str], seed: int) -> list[str]:
    """One sampled answer (temperature 1, no truncation) to every prompt, special tokens left
    out."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    given = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    torch.manual_seed(seed)
    texts = []
    for ids, mask in zip(given["input_ids"].split(250), given["attention_mask"].split(250)):
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def wilson(right: int, n: int) -> tuple[float, float]:
    """The Wilson 95% interval of a share."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)


def final(answer: str) -> str | None:
    """The two digits of an answer that ends in the final form."""
    found = re.search(r"####(\d\d)$", answer)
    return found.group(1) if found else None


def measure(
    task: str, folder: Path, split: str = "test", n: int = MEASURED, told: bool = False
) -> dict:
    """Accuracy at temperature 1, with its interval, and the share of answers that end in the final
    form.

    With `told`, the accuracy on the same problems given with their solutions as well.
    """
    chosen = problems(task, split, n)
    answers = sample(folder, [problem.prompt for problem in chosen], 0)
    finals = [final(answer) for answer in answers]
    right = sum(answer == problem.answer for answer, problem in zip(finals, chosen))
    figures = {
        "accuracy": round(right / n, 4),
        "interval": wilson(right, n),
        "n": n,
        "format": round(sum(answer is not None for answer in finals) / n, 4),
        "characters": round(sum(map(len, answers)) / n, 1),
    }
    if told:
        answers = sample(folder, [problem.told for problem in chosen], 0)
        right = sum(final(answer) == problem.answer for answer, problem in zip(answers, chosen))
        figures["told_accuracy"] = round(right / n, 4)
    return figures


def build(net: Net, folder: Path) -> dict:
    """Trains, saves and measures one net; returns its figures."""
    start = time.monotonic()
    model = make_model(net)
    train(net, model)
    save(model, folder, net.merged)
    figures = {
        "parameters": model.num_parameters(),
        **measure(net.task, folder, told=any(stage.told for stage in net.stages)),
    }
    figures["seconds"] = round(time.monotonic() - start)
    report(net, json.dumps(figures))
    return figures


def main() -> int:
    """The command line: see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m prefix_distill.lab.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=MODELS, help="folder to write to (default: the package's own)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="nets trained at the same time (default: 2)"
    )
    parser.add_argument("--only", choices=TASKS, help="build one task's models")
    options = parser.parse_args()
    start = time.monotonic()
    nets = [net for net in NETS if options.only in (None, net.task)]
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.workers, spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as workers:
        folders = [options.out / model_path(net.task, net.role).relative_to(MODELS) for net in nets]
        figures = list(workers.map(build, nets, folders))
    result: dict = {}
    for net, figure in zip(nets, figures):
        low, high = BANDS[net.role]
        figure["in_band"] = (
            low <= figure["accuracy"] <= high and figure.get("told_accuracy", 1) >= TOLD_ACCURACY
        )
        result.setdefault(net.task, {})[net.role] = figure
    for task, roles in result.items():
        counts = Counter(problem.answer for problem in problems(task, "test", MEASURED))
        roles["most_common_answer"] = max(counts.values()) / MEASURED
    result["seconds"] = round(time.monotonic() - start)
    print(json.dumps(result))
    return 0 if all(figure["in_band"] for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
