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
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, LlamaForCausalLM

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
    make_model,
    make_tokenizer,
)
from .task import MAX_STEPS, MODELS, STEPS, TASKS, Problem, model_path, problems

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


def make_batch(
    pairs: list[tuple[str, str]], merged: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 on prompts and padding) of (prompt, answer) texts, padded on
    the right."""
    prompts = [
        [VOCABULARY[USER], *encode(prompt, merged), VOCABULARY[ASSISTANT]] for prompt, _ in pairs
    ]
    answers = [[*encode(answer, merged), VOCABULARY[END]] for _, answer in pairs]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    fill = [longest - len(p) - len(a) for p, a in zip(prompts, answers, strict=True)]
    ids = [p + a + [VOCABULARY[PAD]] * n for p, a, n in zip(prompts, answers, fill, strict=True)]
    labels = [
        [-100] * len(p) + a + [-100] * n for p, a, n in zip(prompts, answers, fill, strict=True)
    ]
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
    given: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]  # return_dict=True sets the type
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    torch.manual_seed(seed)
    texts = []
    parts = given["input_ids"].split(250), given["attention_mask"].split(250)
    for ids, mask in zip(*parts, strict=True):
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
    right = sum(answer == problem.answer for answer, problem in zip(finals, chosen, strict=True))
    figures = {
        "accuracy": round(right / n, 4),
        "interval": wilson(right, n),
        "n": n,
        "format": round(sum(answer is not None for answer in finals) / n, 4),
        "characters": round(sum(map(len, answers)) / n, 1),
    }
    if told:
        answers = sample(folder, [problem.told for problem in chosen], 0)
        right = sum(
            final(answer) == problem.answer for answer, problem in zip(answers, chosen, strict=True)
        )
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
    for net, figure in zip(nets, figures, strict=True):
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
