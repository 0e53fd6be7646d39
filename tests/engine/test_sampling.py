"""Test sampling: the distribution, the end of a response, and independence of the batch."""

import pytest
import torch
from helpers import tiny_net

from prefix_distill.engine import sampling as rollout
from prefix_distill.engine import scoring
from prefix_distill.engine.decoder import _ColumnsFirst, make_decoder
from prefix_distill.engine.device import Clock
from prefix_distill.engine.meter import Meter
from prefix_distill.engine.models import Model
from prefix_distill.engine.processors import choose_tokens
from prefix_distill.engine.rollout import rollout_of
from prefix_distill.engine.sampling import GenerationCost, Request, Response, Sampler, generate
from prefix_distill.maths.seeds import seed_of

EOS = frozenset({257})


def sampler(**changes):
    return Sampler(**{"eos": EOS, "pad": 256, "support": 260, "seed": 5} | changes)


def requests(count=7):
    return [Request(ids=tuple(range(10, 12 + 3 * i)), key=(0, i, 0)) for i in range(count)]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def model(request):
    return Model(
        name="m",
        net=tiny_net(request.param),
        tokenizer=None,
        generation_config=None,
        eos=EOS,
        shares_prompts=True,
    )


def test_samples_do_not_depend_on_the_batch(model):
    together = generate(model, requests(), 12, sampler())
    for rows in (1, 3):
        assert generate(model, requests(), 12, sampler(rows=rows)) == together
    backwards = generate(model, requests()[::-1], 12, sampler(rows=2))
    assert backwards[::-1] == together
    # a lower length limit only truncates
    assert generate(model, requests(), 5, sampler())[3].ids == together[3].ids[:5]
    assert generate(model, requests(), 12, sampler(seed=6)) != together


def test_duplicate_prompts_get_different_samples(model):
    drawn = generate(
        model,
        [Request(ids=(1, 2, 3), key=(0, slot, s)) for slot in range(2) for s in range(2)],
        12,
        sampler(),
    )
    assert len({r.ids for r in drawn}) == 4


def test_sampler_and_scorer_agree_on_every_log_probability(model):
    """Compare left-padded decoding with a KV cache with a right-padded forward pass, in float32.

    The sampling noise is also recomputed, and each sampled token is checked against it.
    """
    drawn = generate(model, requests(), 12, sampler())
    rows = [
        rollout_of(i, r.ids, d.ids).student
        for i, (r, d) in enumerate(zip(requests(), drawn, strict=True))
    ]
    with torch.no_grad():
        scored = model.head().logits(scoring.hidden_rows(model, rows)).log_softmax(-1)
    position = 0
    for request, response in zip(requests(), drawn, strict=True):
        generator = torch.Generator().manual_seed(seed_of(5, *request.key))
        ids = list(request.ids)
        for token in response.ids:
            own = model.net(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(scored[position], own, atol=2e-5, rtol=0)
            noise = (-torch.log1p(-torch.rand(260, generator=generator))).clamp(min=2.0**-25)
            assert (scored[position] - noise.log()).argmax() == token
            ids.append(token)
            position += 1


def test_frequencies_are_the_softmax():
    """Compare 20,000 sampled tokens with the softmax in a chi-square test.

    With 3 degrees of freedom, the 99.9 % point is 16.3.
    """
    logits, n = torch.tensor([1.0, 0.0, -1.0, -2.0]), 20_000
    fair = sampler(seed=0, support=4)
    race = fair.race([(0, i, 0) for i in range(n)], torch.device("cpu"))
    counts = torch.bincount(race(None, logits.repeat(n, 1)).argmax(-1), minlength=4).double()
    expected = logits.double().softmax(0) * n
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_greedy_rows_leave_the_batch_when_they_have_ended(model):
    """Check greedy decoding with rows of different lengths.

    At temperature 0, there is no sampling noise to keep for the remaining rows.
    """
    greedy = sampler(temperature=0.0, eos=frozenset({-1}))
    free = generate(model, requests(), 70, greedy)
    early = next(t for t in free[0].ids[:30] if any(t not in r.ids for r in free[1:]))
    heard = generate(model, requests(), 70, sampler(temperature=0.0, eos=frozenset({early})))
    assert len({len(r.ids) > 32 for r in heard}) == 2  # some rows end within 32 tokens
    for r, f in zip(heard, free, strict=True):
        assert r.ids == f.ids[: len(r.ids)]


def test_sampling_options_restrict_the_sampled_tokens():
    logits = torch.tensor([[2.0, 1.9, -3.0, -4.0]])
    for change, allowed in (
        ({"top_k": 1}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"temperature": 0.0}, {0}),
        ({"support": 2}, {0, 1}),
    ):
        chosen = set()
        for i in range(60):
            drawn = sampler(**{"support": 4} | change)
            scores = drawn.processors(drawn.race([(i,)], torch.device("cpu")))(None, logits.clone())
            chosen.add(scores.argmax(-1).item())
        assert chosen == allowed, change


def test_padding_rows_of_the_head_are_never_sampled(model):
    drawn = generate(model, requests(), 12, sampler(support=200, eos=frozenset({5})))
    assert all(token < 200 for r in drawn for token in r.ids)


def test_eos_ends_a_response_and_the_length_limit_does_not_finish_it():
    # the first EOS of several, EOS exactly at the length limit, no EOS
    ids_BT = torch.tensor([[4, 257, 256, 257], [4, 5, 6, 257], [4, 5, 6, 7]])
    assert rollout.find_ends(ids_BT, EOS) == ([2, 4, 4], [True, True, False])
    # padding and EOS have the same id: the first one is EOS
    ids_BT = torch.tensor([[4, 256, 256, 256]])
    assert rollout.find_ends(ids_BT, frozenset({256})) == ([2], [True])


@pytest.mark.parametrize("support", [18, 260, 5_000])
def test_noise_depends_on_seed_key_and_position_alone(support):
    """Compare the noise of several positions with one uniform number per id and position.

    A row that leaves the batch between two positions changes nothing for the others.
    """
    keys = [(0, i) for i in range(5)]
    race = sampler(support=support).race(keys, torch.device("cpu"))
    generators = [torch.Generator().manual_seed(seed_of(5, *key)) for key in keys]
    for position in range(70):
        if position in (3, 40):
            kept = list(range(len(generators)))[::2]
            race.keep(kept)
            generators = [generators[row] for row in kept]
        scores = race(None, torch.zeros(len(generators), support + 1))
        for row, generator in zip(scores, generators, strict=True):
            noise = (-torch.log1p(-torch.rand(support, generator=generator))).clamp(min=2.0**-25)
            assert torch.equal(row[:-1], -noise.log())
            assert row[-1] == -torch.inf


def test_the_first_of_equal_scores_is_chosen():
    scores = torch.tensor([[1.0, 3.0, 3.0], [-torch.inf, -torch.inf, 0.0], [2.0, 2.0, 2.0]])
    assert choose_tokens(scores).tolist() == scores.argmax(-1).tolist() == [1, 2, 0]


def test_generation_stops_rows_at_their_own_eos(model):
    """Check that a row ends at its first EOS and includes it.

    All ids but one are EOS, so most rows end at once.
    """
    drawn = generate(model, requests(), 12, sampler(eos=frozenset(range(260)) - {7}))
    assert all(r.finished and r.ids[-1] != 7 and set(r.ids[:-1]) <= {7} for r in drawn)


def test_the_models_generation_config_is_ignored_and_the_cache_is_used(model):
    before = generate(model, requests(), 8, sampler())
    calls = []
    handle = model.net.register_forward_pre_hook(
        lambda m, a, k: calls.append((k["input_ids"].shape[1], k.get("use_cache"))),
        with_kwargs=True,
    )
    assert generate(model, requests(), 8, sampler()) == before
    handle.remove()
    assert [width for width, _ in calls[1:]] == [1] * (len(calls) - 1) and len(calls) > 1
    assert all(used for _, used in calls)


def test_the_ledger_counts_the_lengths_that_were_run(model):
    heard = []

    class Cost(GenerationCost):
        def count(self, reads):
            heard.append(reads)

    cost = Cost(meter=Meter(Clock(device=torch.device("cpu"))))
    drawn = generate(model, requests(), 12, sampler(rows=3), cost)
    assert sorted(p for reads in heard for p, _ in reads) == sorted(len(r.ids) for r in requests())
    assert sorted(n for reads in heard for _, lengths in reads for n in lengths) == sorted(
        len(r.ids) for r in drawn
    )
    assert len(heard) == 3
    heard.clear()
    drawn = generate(model, [*requests(2), *requests(2)], 12, sampler(), cost)
    assert heard == [
        [(2, [len(drawn[0].ids), len(drawn[2].ids)]), (5, [len(drawn[1].ids), len(drawn[3].ids)])]
    ]


def test_the_decoding_network_shares_the_students_weights():
    """Check that the decoding network uses the student's parameters in other matmuls.

    Log-probabilities and samples are the same, also after the weights have changed.
    """
    student = Model(
        name="m",
        net=tiny_net("llama", width=256).requires_grad_(True),
        tokenizer=None,
        generation_config=None,
        eos=EOS,
        shares_prompts=True,
    )
    decoding = make_decoder(student, torch.float32)
    assert decoding.net is not student.net and any(
        type(m) is _ColumnsFirst for m in decoding.net.modules()
    )
    assert all(
        a is b for a, b in zip(student.net.parameters(), decoding.net.parameters(), strict=True)
    )
    for _ in range(2):
        ids = torch.randint(0, 250, (5, 1))
        with torch.no_grad():
            torch.testing.assert_close(
                decoding.net(ids).logits, student.net(ids).logits, rtol=1e-4, atol=1e-4
            )
        assert generate(decoding, requests(), 12, sampler()) == generate(
            student, requests(), 12, sampler()
        )
        with torch.no_grad():
            for p in student.net.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}]
)
def test_recorded_log_probabilities_are_those_of_the_sampled_tokens(model, shape):
    """Compare with one forward pass per token and logits that are warped by hand.

    Rows that end early leave the batch.
    """
    drawn = generate(
        model, requests(), 40, sampler(record=True, eos=frozenset(range(0, 260, 9)), **shape)
    )
    assert generate(model, requests(), 40, sampler(eos=frozenset(range(0, 260, 9)), **shape)) == [
        Response(ids=r.ids, finished=r.finished) for r in drawn
    ]
    assert len({len(r.ids) for r in drawn}) > 2
    for request, response in zip(requests(), drawn, strict=True):
        assert len(response.logp) == len(response.ids)
        ids = list(request.ids)
        for token, found in zip(response.ids, response.logp, strict=True):
            logits = model.net(torch.tensor([ids]), use_cache=False).logits[
                0, -1
            ].detach() / shape.get("temperature", 1.0)
            if "top_k" in shape:
                logits[logits < logits.topk(5).values[-1]] = -torch.inf
            if "top_p" in shape:
                order = logits.argsort(descending=True)
                below = logits.softmax(-1)[order].cumsum(-1) - logits.softmax(-1)[order]
                logits[order[below >= shape["top_p"]]] = -torch.inf
            assert found == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
            ids.append(token)
