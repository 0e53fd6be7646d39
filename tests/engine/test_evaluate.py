"""Test evaluation: intervals against theory, repetition, grading, and held-out KL."""

import math

import pytest
import torch
from helpers import tiny_net

from prefix_distill import config as configuration
from prefix_distill.engine import evaluate, memory
from prefix_distill.engine.device import Clock
from prefix_distill.engine.memory import MemoryLimits
from prefix_distill.engine.meter import Meter
from prefix_distill.engine.models import Model
from prefix_distill.engine.pair import Pair
from prefix_distill.engine.ranks import Place
from prefix_distill.engine.sampling import GenerationCost, Sampler
from prefix_distill.engine.scoring import Scorer
from prefix_distill.engine.shapes import read_shape
from prefix_distill.maths import intervals
from prefix_distill.prompts import grading
from prefix_distill.prompts.grading import Grader
from prefix_distill.prompts.prompt import Prompt

PLACE = Place(
    device=torch.device("cpu"),
    teacher_device=torch.device("cpu"),
    dtype=torch.float32,
    head_dtype=torch.float32,
    rank=0,
    world=1,
    reasons=(),
)


def limits(place=PLACE):
    return MemoryLimits(place, configuration.build({}))


def how(samples, tokens, answer_format="exact"):
    """Return the settings of an evaluation: ``samples`` answers of at most ``tokens`` tokens."""
    return evaluate.Evaluation(
        sampler=Sampler(eos=frozenset({257}), pad=256, support=260, seed=3),
        samples=samples,
        max_new_tokens=tokens,
        grader=Grader(answer_format=answer_format),
    )


def cost():
    """Return a cost that records no FLOPs."""
    return GenerationCost(meter=Meter(Clock(device=torch.device("cpu"))))


def test_interval_is_close_to_the_normal_one_for_many_problems():
    values = [1.0] * 300 + [0.0] * 700
    found = intervals.interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found["value"] == pytest.approx(0.3) and found["n"] == 1000
    assert found["low"] == pytest.approx(0.3 - half, abs=0.005) and found["high"] == pytest.approx(
        0.3 + half, abs=0.005
    )
    assert intervals.interval(values) == found


def test_interval_of_all_right_or_all_wrong_is_wilsons_interval():
    # Wilson's bounds at p = 1 and p = 0 are n/(n + z²) and z²/(n + z²)
    z2 = 1.96**2
    assert intervals.interval([1.0] * 50) == {
        "value": 1.0,
        "n": 50,
        "low": pytest.approx(50 / (50 + z2)),
        "high": 1.0,
    }
    assert intervals.interval([0.0] * 50) == {
        "value": 0.0,
        "n": 50,
        "low": 0.0,
        "high": pytest.approx(z2 / (50 + z2)),
    }


def test_token_mean_weights_tokens_and_resamples_rollouts():
    values = [[1.0] * 10, [3.0] * 30]
    found = intervals.token_mean(values)
    assert found["value"] == pytest.approx(2.5) and found["n"] == 40
    # residuals −15 and 15: the error is √(2/1 · 450)/40, times 12.706 of Student's t; a mean of
    # numbers that are not negative has no negative bound
    assert (found["low"], found["high"]) == pytest.approx((0, 2.5 + 9.5295))
    assert intervals.split_mean(values, 10) == (2.0, 3.0) and intervals.split_mean([[1.0]], 1) == (
        1.0,
        None,
    )


@pytest.fixture(scope="module")
def models():
    class Words:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    return [
        Model(
            name="m",
            net=tiny_net("llama", seed),
            tokenizer=Words(),
            generation_config=None,
            eos=frozenset({257}),
        )
        for seed in (1, 2)
    ]


def test_held_out_kl_equals_a_naive_loop_with_any_micro_batch(models):
    class Row:
        def __init__(self, ids):
            self.student_ids = self.teacher_ids = ids

    rendered = [Row(tuple(range(5, 8 + 4 * i))) for i in range(4)]
    fixed = evaluate.fixed_rollouts(models[0], rendered, how(1, 9), limits(), cost())
    assert [r.slot for r in fixed] == [0, 1, 2, 3]
    pair = Pair(
        student=models[0],
        teacher=models[1],
        student_shape=read_shape(models[0]),
        teacher_shape=read_shape(models[1]),
    )
    scorer = Scorer.reverse_kl(pair, PLACE)
    few = limits()
    few.micro_batch_size = 3
    meter = Meter(Clock(device=torch.device("cpu")))
    facts = evaluate.held_out_facts(scorer, fixed, few, meter, "evaluation")
    found = [row["divergence"] for row in facts]
    for rollout, values in zip(fixed, found, strict=True):
        ids = torch.tensor([rollout.student_prompt + rollout.ids])
        with torch.no_grad():
            s, t = (
                m.net(ids).logits[0, len(rollout.student_prompt) - 1 : -1].log_softmax(-1)
                for m in models
            )
        torch.testing.assert_close(
            torch.tensor(values), (s.exp() * (s - t)).sum(-1), rtol=1e-4, atol=1e-6
        )


def test_average_and_pass_at_k(models):
    """Grade answers against a reference that is itself one of the sampled answers."""

    def run(references):
        messages = ({"role": "user", "content": "x"},)
        problems = [
            (Prompt(index=i, messages=messages, answer=r), (4, 5, 6))
            for i, r in enumerate(references)
        ]
        return evaluate.evaluate(models[0], problems, how(3, 2), limits(), cost())

    texts = [[r["text"] for r in record["responses"]] for record in run(["none", "none"]).records]
    assert texts[0] != texts[1]  # equal prompts get different samples
    score = run([texts[0][0], "none"])
    right = texts[0].count(texts[0][0]) / 3
    assert score.accuracy["value"] == pytest.approx(right / 2) and score.pass_at_k["value"] == 0.5
    finished = [r for record in score.records for r in record["responses"] if r["finished"]]
    expected = sum(r["correct"] for r in finished) / len(finished) if finished else None
    assert score.finished_accuracy == score.summary()["finished_accuracy"] == expected
    assert run([None, None]).accuracy is None
    partial = run([texts[0][0], None])
    assert partial.accuracy["n"] == 1 and partial.accuracy["value"] == pytest.approx(right)
    assert partial.right() == [pytest.approx(right)]
    assert score.mean_tokens <= 2


def test_an_answer_is_graded_by_one_rank_only(monkeypatch):
    """Check that only the rank that sampled an answer grades it.

    Grading has a time limit, so two ranks could disagree.
    """
    from types import SimpleNamespace

    from prefix_distill.engine import evaluate as module
    from prefix_distill.engine.sampling import Response

    graded, problems = (
        [],
        [
            (SimpleNamespace(index=i, messages=[{"content": "?"}], answer=str(i)), (1, 2))
            for i in range(5)
        ],
    )
    monkeypatch.setattr(
        memory,
        "generate",
        lambda model, requests, **_: [Response(ids=(r.key[1],), finished=True) for r in requests],
    )
    monkeypatch.setattr(
        grading.answers, "is_correct", lambda text, gold, form: graded.append(gold) or text == gold
    )
    model, said = (
        SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: str(ids[0]))),
        [],
    )

    def scored(rank, gather):
        place = SimpleNamespace(rank=rank, world=2, gather=gather)
        return module.evaluate(model, problems, how(1, 4, "auto"), limits(place), cost())

    for rank, own in ((0, ["0", "2", "4"]), (1, ["1", "3"])):
        graded.clear()
        with pytest.raises(InterruptedError):  # stop when the ranks exchange results
            scored(rank, lambda rows: (said.append(rows), (_ for _ in ()).throw(InterruptedError)))
        assert graded == own
    graded.clear()
    assert scored(0, lambda rows: said).right() == [1.0] * 5 and graded == ["0", "2", "4"]
