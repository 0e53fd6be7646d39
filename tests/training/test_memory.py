"""Test what the peak memory depends on, as the Linux kernel measures it in separate processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BENCHMARKS, TESTS

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)

UPDATES = """
import dataclasses, json, os, sys
import measure, torch
from helpers import tiny_net
from prefix_distill.engine.models import Model, read_shape
from prefix_distill.engine.pair import Pair
from prefix_distill.engine.rollout import rollout_of
from prefix_distill.maths.divergence import Terms
from prefix_distill.training.update import Update
from helpers import bare_run, state_of

def load(seed, vocabulary):
    net = tiny_net("llama", seed, vocabulary=vocabulary, width=64, layers=4)
    return Model(
        name="m",
        net=net,
        tokenizer=None,
        generation_config=None,
        eos=frozenset(),
        shares_prompts=True,
    )

def peak(samples=4, accumulated=1, vocabulary=300, chunk=4):
    torch.set_num_threads(1)
    student, teacher = load(1, vocabulary), load(2, vocabulary)
    pair = Pair(
        student=student,
        teacher=teacher,
        student_shape=read_shape(student),
        teacher_shape=read_shape(teacher),
    )
    terms = Terms(name="reverse-kl", memory_bytes=chunk << 20)
    state = state_of(bare_run(pair, terms, {"train.micro_batch_size": 4}))

    def step(prompts, samples):
        prompt = tuple(range(9, 69))
        rollouts = [
            dataclasses.replace(rollout_of(p, prompt, tuple(range(100 + s, 160 + s))), sample=s)
            for p in range(prompts)
            for s in range(samples)
        ]
        Update(state, 0, prompts=[]).backward(rollouts)

    step(1, 4)  # allocate gradients and load libraries first
    before = measure.reset_peak()
    step(accumulated, samples)
    return measure.memory("VmHWM") - before

for given in json.loads(sys.argv[1]):  # a fork for each: it has only imported
    if not os.fork():
        print(json.dumps(peak(**given)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def growths(*given: dict) -> list[float]:
    """Return the MiB that an update adds to the peak resident memory, for each of ``given``."""
    paths = [str(TESTS), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", UPDATES, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) / 2**20 for line in done.stdout.splitlines()]


def test_peak_does_not_grow_with_accumulation_samples_or_vocabulary_beyond_the_chunk():
    """Run updates with 240 response tokens per micro-batch.

    At V = 60,000, a table of tokens × vocabulary has 55 MiB. Only the gradients of the head, 15 MiB
    each, may grow with the vocabulary.
    """
    small, accumulated, samples, large, budget = growths(
        {},
        {"accumulated": 12},
        {"samples": 16},
        {"vocabulary": 60_000},
        {"vocabulary": 60_000, "chunk": 256},
    )
    assert accumulated < small + 12 and samples < small + 12
    assert large < small + 4 * 15 + 15
    assert budget > large + 100  # a larger chunk needs more memory


def test_the_fused_loss_needs_a_fraction_of_the_naive_ones_memory():
    """Compare both losses at 1,024 rows × 20,000 ids, where a table has 80 MiB.

    The README's figures are at 4,096 × 151,936.
    """

    def extra(arm):
        done = subprocess.run(
            [
                sys.executable,
                BENCHMARKS / "divergence.py",
                "--child",
                arm,
                "reverse-kl",
                "1024",
                "--vocabulary",
                "20000",
                "--width",
                "32",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    ours, naive = extra("ours"), extra("naive")
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(naive["gradient_norm"], rel=1e-5)
    assert naive["extra_bytes"] > 4 * 80 * 2**20 and ours["extra_bytes"] < 300 * 2**20
