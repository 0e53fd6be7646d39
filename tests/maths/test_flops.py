"""Test the FLOP ledger against torch's own count (eager attention) and against explicit sums."""

import dataclasses

import pytest
import torch
from helpers import counted, tiny_net

from prefix_distill.engine import scoring
from prefix_distill.engine.batching import reads
from prefix_distill.engine.device import Clock
from prefix_distill.engine.meter import Meter
from prefix_distill.engine.models import Model, read_shape, with_checkpointing
from prefix_distill.engine.rollout import rollout_of, student_sides
from prefix_distill.engine.sampling import GenerationCost, Request, Sampler, generate
from prefix_distill.maths.divergence import Terms
from prefix_distill.maths.flops import Batch, Ledger, Passes, Shape, update_ledger
from prefix_distill.maths.fused import weighted

KINDS = ["llama", "qwen3", "gemma3", "neox", "gpt2"]
DECODING = pytest.mark.parametrize(
    "model",
    [
        "qwen3",
        "gemma3",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("llama", "neox", "gpt2")),
    ],
    indirect=True,
)


@pytest.fixture(params=KINDS)
def model(request):
    net = tiny_net(request.param, width=64)
    net.config._attn_implementation = "eager"
    return Model(
        name="m",
        net=net,
        tokenizer=None,
        generation_config=None,
        eos=frozenset({257}),
        shares_prompts=True,
    )


def cost_in(ledger, shape):
    """Return a cost of generation that counts FLOPs in ``ledger``."""
    return GenerationCost(meter=Meter(Clock(device=torch.device("cpu")), ledger), shape=shape)


@DECODING
@pytest.mark.parametrize("samples", [1, 3])
def test_executed_flops_of_generation_match_torchs_count(model, samples):
    requests = [
        Request(ids=tuple(range(5, 5 + n)), key=(0, n, s))
        for n in (9, 14, 20)
        for s in range(samples)
    ]
    sampler = Sampler(eos=frozenset({257}), pad=256, support=260, seed=0)
    ledger = Ledger()
    real = counted(
        lambda: generate(model, requests, 40, sampler, cost_in(ledger, read_shape(model)))
    )
    assert ledger.total("executed") == pytest.approx(real, rel=0.02)
    assert ledger.useful["student_prefill"] < ledger.executed["student_prefill"]


@DECODING
def test_rows_that_have_ended_cost_no_more_flops(model):
    """Check that rows that have ended leave the batch and cost no more FLOPs.

    The EOS ids are tokens that other rows sample early and row 0 never samples.
    """
    requests = [Request(ids=tuple(range(5, 5 + n)), key=(0, n, 0)) for n in range(9, 17)]
    free = generate(
        model, requests, 80, Sampler(eos=frozenset({257}), pad=256, support=260, seed=3)
    )
    early = {token for r in free[1:] for token in r.ids[:20]} - set(free[0].ids)
    sampler = Sampler(eos=frozenset(early), pad=256, support=260, seed=3)
    ledger, heard = Ledger(), []
    real = counted(
        lambda: heard.extend(
            generate(model, requests, 80, sampler, cost_in(ledger, read_shape(model)))
        )
    )
    lengths = [len(r.ids) for r in heard]
    assert lengths[0] > 64 and sum(n <= 32 for n in lengths) >= 3
    # a row that leaves the batch does not change the samples of the others
    assert [r.ids for r in heard] == [f.ids[:n] for f, n in zip(free, lengths, strict=True)]
    assert ledger.total("executed") == pytest.approx(real, rel=0.02)


def rollouts(samples):
    made = []
    for i, (p, n) in enumerate([(9, 12), (14, 5), (20, 12)]):
        for s in range(samples):
            prompt, ids = tuple(range(5 + i, 5 + i + p)), tuple(range(30 + s, 30 + n))
            made.append(dataclasses.replace(rollout_of(i, prompt, ids), sample=s))
    return made


@pytest.mark.parametrize("samples", [1, 3])
def test_executed_flops_of_scoring_and_updates_match_torchs_count(model, samples):
    group, one = rollouts(samples), Ledger()
    read = reads(student_sides(group), True)

    def score():
        with torch.no_grad():
            rows = scoring.hidden_rows(model, student_sides(group))
            model.head().logits(rows)

    one.forward("score", read_shape(model), read)
    assert one.executed["score"] == pytest.approx(counted(score), rel=0.02)

    model.net.requires_grad_(True)

    def update():
        rows = scoring.hidden_rows(model, student_sides(group))
        teacher = torch.zeros(len(rows), 1)
        from prefix_distill.maths.divergence import Head

        loss, *_ = weighted(
            Terms(name="reverse-kl"),
            rows,
            model.head(),
            teacher,
            Head(weight_VD=torch.zeros(260, 1)),
            torch.ones(len(rows)),
        )
        loss.backward()

    one.forward("update", read_shape(model), read, passes=Passes(count=3))
    # the head of the substitute teacher has one column
    teacher_head = 2 * 260 * sum(len(r.ids) for r in group)
    assert one.executed["update"] == pytest.approx(counted(update) - teacher_head, rel=0.02)


def test_flops_of_gradient_checkpointing_match_torchs_count(model):
    """Compare gradient checkpointing with torch's count.

    The ledger counts at least what was run, and at most one more matmul per layer.
    """
    group, one, plain = rollouts(1), Ledger(), Ledger()
    model = with_checkpointing(model)
    model.net.requires_grad_(True)
    read = reads(student_sides(group), model.encodes_prompt_once)
    one.forward("update", read_shape(model), read, passes=Passes(count=3, recomputed=True))
    plain.forward("update", read_shape(model), read, passes=Passes(count=3))
    head = 3 * read_shape(model).output(sum(n for _, lengths in read for n in lengths))
    real = counted(lambda: scoring.hidden_rows(model, student_sides(group)).sum().backward())
    assert 0.999 < (one.executed["update"] - head) / real < 1.1
    assert real > 1.15 * (plain.executed["update"] - head)
    assert one.useful == plain.useful


def test_useful_counts_real_tokens_and_causal_pairs():
    cost, ledger = Shape(trunk=1000, head=50, attention=((8, None), (8, 4))), Ledger()
    ledger.generation(cost, [(3, [4]), (5, [1])])

    def full(n):
        return n * (n + 1) // 2

    def sliding(n):
        return sum(min(i, 4) for i in range(1, n + 1))

    assert ledger.useful["student_prefill"] == 2 * (2000 * 4 + 100) + 32 * (
        full(3) + sliding(3) + full(5) + sliding(5)
    )
    # row 1 decodes 3 more tokens at positions 4, 5, 6; row 2 decodes none
    assert ledger.useful["student_decode"] == 3 * 2100 + 32 * ((4 + 5 + 6) + (4 + 4 + 4))
    assert ledger.executed["student_decode"] == 2 * (3 * 2100 + 32 * ((6 + 7 + 8) + (4 + 4 + 4)))


def test_a_shared_prompt_is_counted_once():
    cost, shared, repeated = (
        Shape(trunk=1000, head=50, attention=((8, 16), (8, None))),
        Ledger(),
        Ledger(),
    )
    shared.forward("score", cost, [(40, [8, 8, 5])])
    repeated.forward("score", cost, [(40, [8]), (40, [8]), (40, [5])])
    again = 2 * (cost.linear(40) + cost.causal(0, 40))
    assert shared.total() == pytest.approx(repeated.total() - again)
    shared.generation(cost, [(40, [8, 8, 5])])
    repeated.generation(cost, [(40, [8]), (40, [8]), (40, [5])])
    # every row runs the last token of the prompt itself
    again = 2 * (cost.linear(39) + cost.causal(0, 39))
    assert shared.useful["student_prefill"] == pytest.approx(
        repeated.useful["student_prefill"] - again
    )
    assert shared.useful["student_decode"] == repeated.useful["student_decode"]


def test_cost_of_a_batch_is_the_sum_of_its_rows_and_totals_exclude_evaluation():
    cost = Shape(trunk=1000, head=50, attention=((8, 16), (8, None)))
    rows, whole = Ledger(), Ledger()
    for read in [(3, [5]), (9, [1]), (40, [8])]:
        rows.generation(cost, [read])
        rows.forward("score", cost, [read])
    whole.generation(cost, [(3, [5]), (9, [1]), (40, [8])])
    whole.forward("score", cost, [(3, [5]), (9, [1]), (40, [8])])
    assert rows.total() == pytest.approx(whole.total()) and rows.total("executed") < whole.total(
        "executed"
    )
    before = whole.total()
    whole.add("evaluation", 1e9, 1e9)
    assert whole.total() == before and whole.summary()["by_phase"]["evaluation"]["useful"] == 1e9


def test_predicted_cost_of_an_update_equals_the_ledger():
    student, teacher = (
        Shape(trunk=1000, head=50, attention=((8, None),)),
        Shape(trunk=3000, head=60, attention=((16, None),) * 2),
    )
    ledger = Ledger()
    ledger.generation(student, [(4, [7] * 3), (6, [7] * 3)])
    ledger.forward("t", teacher, [(5, [7])] * 3 + [(7, [7])] * 3)
    ledger.forward(
        "s", student, [(4, [7] * 2), (4, [7]), (6, [7] * 2), (6, [7])], passes=Passes(count=3)
    )
    batch = Batch(prompts=[(4, 5), (6, 7)], samples=3, response=7.2, behind=(9, 1, 2))
    update = update_ledger(student, teacher, batch)
    assert update.total() == pytest.approx(ledger.total())
