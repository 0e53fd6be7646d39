"""Rebuild the built-in tokenizers and models from scratch: python -m prefix_distill.lab.build

Each network is a small Llama. It is trained by cross-entropy on the answers to its task's training
problems. Worker processes with one thread each train one network at a time. Progress goes to
stderr. The last line, on stdout, is a JSON object with the accuracies on test problems, measured
after the weights were rounded to float16 and loaded again. The exit status is 1 if an accuracy is
outside its band.
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
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .nets import (
    ASSISTANT,
    END,
    NETS,
    PAD,
    USER,
    VOCABULARY,
    Net,
    Stage,
    encode,
    make_merged_tokenizer,
    make_model,
    make_tokenizer,
)
from .task import MAX_STEPS, MODELS, STEPS, TASKS, Problem, model_path, sample_problems

# the accuracy at temperature 1 that each role must have
BANDS = {
    "teacher": (0.95, 1.0),
    "student": (0.15, 0.45),
    "student-wide": (0.15, 0.45),
    "student-told": (0.15, 0.45),
    "student-merged": (0.15, 0.45),
    "teacher-half": (0.45, 0.75),
}
PRIVILEGED_ACCURACY = 0.9  # the least on prompts that show the solution
MEASURED = 1000  # test problems per network
MAX_NEW_TOKENS = 200
IGNORED = -100  # the label of tokens without a loss

Figures = dict[str, Any]
Pair = tuple[str, str]  # prompt, answer
Tensors = tuple[torch.Tensor, torch.Tensor]


def make_batch(pairs: list[Pair], net: Net) -> Tensors:
    """Return token ids and labels of (prompt, answer) texts, both of shape (pairs, longest).

    Rows are padded on the right. Labels are IGNORED on prompts and padding.
    """
    user, assistant, end = VOCABULARY[USER], VOCABULARY[ASSISTANT], VOCABULARY[END]
    rows, labels = [], []
    for prompt, answer in pairs:
        prompt_ids = [user, *encode(prompt, net), assistant]
        answer_ids = [*encode(answer, net), end]
        ignored = [IGNORED] * len(prompt_ids)
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor(ignored + answer_ids))
    return (
        pad_sequence(rows, batch_first=True, padding_value=VOCABULARY[PAD]),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def predict(net: Net, model: LlamaForCausalLM, pairs: list[Pair]) -> Tensors:
    """Return logits (pairs, tokens, vocabulary) and the labels (pairs, tokens) to predict."""
    ids, labels = make_batch(pairs, net)
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1], labels[:, 1:]


def make_pair(problem: Problem, stage: Stage, rng: random.Random) -> Pair:
    """Return the prompt and the answer to train on in a stage.

    A stage without ``privileged`` problems takes no random number for them, which keeps the
    sequence of the stages that have none.
    """
    if stage.privileged and rng.random() < stage.privileged:
        return problem.privileged_prompt, problem.solution
    if rng.random() < stage.short_cuts:
        return problem.prompt, problem.short_cut(rng)
    return problem.prompt, problem.solution


def train(net: Net, model: LlamaForCausalLM) -> None:
    """Run the network's stages, each with a new optimizer."""
    rng = random.Random(net.seed)
    steps = range(1, MAX_STEPS + 1)
    every = sample_problems(net.task, "train", 20000, seed=net.seed, steps=steps)
    model.train()
    for number, stage in enumerate(net.stages, 1):
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        total = 0.0
        for update in range(stage.updates):
            optimizer.param_groups[0]["lr"] = learning_rate(stage, update)
            pairs = []
            for problem in choose_problems(every, net, stage, update=update, rng=rng):
                pairs.append(make_pair(problem, stage, rng))
            logits, labels = predict(net, model, pairs)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            if update % 100 == 99:
                progress = f"stage {number} step {update + 1}/{stage.updates}"
                report(net, f"{progress} loss {total / 100:.4f}")
                total = 0.0
            may_end = stage.until < 1 and update % 20 == 19
            if may_end and estimate_accuracy(net, model) >= stage.until:
                report(net, f"stage {number} ends after step {update + 1}")
                break


def learning_rate(stage: Stage, update: int) -> float:
    """Return the learning rate of an update: 40 updates of warm-up, then a linear decay."""
    warmup = min(1, (update + 1) / 40)
    decay = 1 - (1 - stage.last) * update / stage.updates
    return stage.lr * (warmup * decay)


def choose_problems(
    every: list[Problem], net: Net, stage: Stage, update: int, rng: random.Random
) -> list[Problem]:
    """Sample the problems of an update from those of the lengths that the stage asks for."""
    if stage.short_problems and update % 2 == 0:
        return rng.sample(every, stage.batch)
    steps, count = STEPS[net.task], stage.batch
    if stage.short_problems:
        steps, count = range(1, 6), 3 * stage.batch
    return rng.sample([problem for problem in every if problem.steps in steps], count)


def estimate_accuracy(net: Net, model: LlamaForCausalLM) -> float:
    """Return the mean probability of the worked solution on 100 validation problems.

    It approximates the accuracy at temperature 1 without sampling.
    """
    validation = sample_problems(net.task, "validation", 100)
    pairs = [(problem.prompt, problem.solution) for problem in validation]
    with torch.no_grad():
        logits, labels = predict(net, model, pairs)
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(1).neg().exp().mean().item()


def report(net: Net, text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"{net.task} {net.role}: {text}", file=sys.stderr, flush=True)


def save(model: LlamaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer and the model, with float16 weights that load as float32."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    text = json.dumps(config, indent=2, sort_keys=True)
    config_file.write_text(f"{text}\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def sample(folder: Path, prompts: list[str], seed: int) -> list[str]:
    """Sample one answer per prompt (temperature 1, no truncation), without special tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]  # return_dict=True sets the type
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    torch.manual_seed(seed)
    texts = []
    id_parts = inputs["input_ids"].split(250)
    mask_parts = inputs["attention_mask"].split(250)
    for ids, mask in zip(id_parts, mask_parts, strict=True):
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of the share right / n."""
    z, p = 1.96, right / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return round(middle - half, 4), round(middle + half, 4)


def final_digits(answer: str) -> str | None:
    """Return the two digits of an answer that ends in the final form, or None."""
    match = re.search(r"####(\d\d)$", answer)
    if match is None:
        return None
    return match[1]


def count_correct(answers: list[str], chosen: list[Problem]) -> int:
    """Return how many answers end in their problem's answer."""
    correct = 0
    for answer, problem in zip(answers, chosen, strict=True):
        correct += final_digits(answer) == problem.answer
    return correct


def measure(net: Net, folder: Path, n: int = MEASURED) -> Figures:
    """Return a saved network's figures on ``n`` test problems at temperature 1.

    They are the accuracy with its interval, the share of answers that end in the final form, and
    the mean length. A network that was trained on prompts with solutions is also measured on those.
    """
    chosen = sample_problems(net.task, "test", n)
    answers = sample(folder, [problem.prompt for problem in chosen], 0)
    correct = count_correct(answers, chosen)
    finished = len(answers) - list(map(final_digits, answers)).count(None)
    figures = {
        "accuracy": round(correct / n, 4),
        "interval": wilson(correct, n),
        "n": n,
        "format": round(finished / n, 4),
        "characters": round(sum(map(len, answers)) / n, 1),
    }
    if net.knows_privileged:
        answers = sample(folder, [problem.privileged_prompt for problem in chosen], 0)
        figures["told_accuracy"] = round(count_correct(answers, chosen) / n, 4)
    return figures


def build(net: Net, folder: Path) -> Figures:
    """Train, save and measure one network; return its figures."""
    start = time.monotonic()
    model = make_model(net)
    train(net, model)
    tokenizer = make_tokenizer()
    if net.merged:
        tokenizer = make_merged_tokenizer()
    save(model, folder, tokenizer)
    figures = {"parameters": model.num_parameters(), **measure(net, folder)}
    figures["seconds"] = round(time.monotonic() - start)
    report(net, json.dumps(figures))
    return figures


def is_in_band(net: Net, figures: Figures) -> bool:
    """Return whether a network has the accuracies that its role must have."""
    low, high = BANDS[net.role]
    if figures.get("told_accuracy", 1) < PRIVILEGED_ACCURACY:
        return False
    return low <= figures["accuracy"] <= high


def build_all(nets: list[Net], out: Path, workers: int) -> list[Figures]:
    """Build networks in parallel processes; return the figures of each."""
    folders = []
    for net in nets:
        folders.append(out / model_path(net.task, net.role).relative_to(MODELS))
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(build, nets, folders))


def main() -> int:
    """Run the command line: build, print the figures, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prefix_distill.lab.build",
        description="Rebuild the built-in tokenizers and models from scratch.",
    )
    parser.add_argument(
        "--out", type=Path, default=MODELS, help="output folder (default: the package's own)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="networks trained at the same time (default: 2)"
    )
    parser.add_argument("--only", choices=TASKS, help="build the models of one task")
    options = parser.parse_args()
    start = time.monotonic()
    nets = [net for net in NETS if options.only in (None, net.task)]
    all_figures = build_all(nets, options.out, options.workers)
    result: Figures = {}
    exit_status = 0
    for net, figures in zip(nets, all_figures, strict=True):
        figures["in_band"] = is_in_band(net, figures)
        if not figures["in_band"]:
            exit_status = 1
        result.setdefault(net.task, {})[net.role] = figures
    for task, roles in result.items():
        answers = [problem.answer for problem in sample_problems(task, "test", MEASURED)]
        [(_, count)] = Counter(answers).most_common(1)
        roles["most_common_answer"] = count / MEASURED
    result["seconds"] = round(time.monotonic() - start)
    print(json.dumps(result))
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
