"""A row's numbers do not depend on its neighbours where RoPE changes with the longest row."""

import pytest
import torch
from helpers import byte_tokenizer, longrope_net, prepared, save_net

from prefix_distill.engine import scoring
from prefix_distill.engine.models import Model
from prefix_distill.engine.rollout import rollout_of, student_sides
from prefix_distill.engine.sampling import Request, Sampler, generate

SWITCH = 16


@pytest.fixture(scope="module")
def model():
    return Model(
        name="m",
        net=longrope_net(SWITCH),
        tokenizer=byte_tokenizer(),
        generation_config=None,
        eos=frozenset({257}),
        shares_prompts=True,
    )


def test_hidden_rows_are_those_of_every_row_alone(model):
    """Rows on both sides of the switch, in any order, of shared and of single prompts."""
    prompts = [tuple(range(30, 30 + n)) for n in (6, 40, 12, 12, 6)]
    responses = [(5, 6, 7), (5, 6), tuple(range(60, 70)), (8, 9), (1, 2, 3, 4)]
    sides = student_sides(
        [rollout_of(i, p, r) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    )
    with torch.no_grad():
        together = scoring.hidden_rows(model, sides)
        alone = torch.cat([scoring.hidden_rows(model, [side]) for side in sides])
        plain = model.net.model(input_ids=torch.tensor([prompts[0] + responses[0][:-1]]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[:3], plain.last_hidden_state[0, 5:], rtol=1e-4, atol=1e-4)


def test_samples_are_those_of_every_request_alone(model):
    requests = [
        Request(ids=tuple(range(30, 30 + n)), key=(0, n, s)) for n in (4, 12, 20) for s in (0, 1)
    ]
    for temperature in (0.0, 1.0):
        sampler = Sampler(
            eos=frozenset({257}), pad=256, support=260, seed=0, temperature=temperature
        )
        together = generate(model, requests, 9, sampler)
        alone = [generate(model, [request], 9, sampler)[0] for request in requests]
        assert [r.ids for r in together] == [r.ids for r in alone]


def test_a_run_that_can_cross_the_switch_says_so(questions, tmp_path):
    crossing = save_net(tmp_path / "short", longrope_net(20))
    within = save_net(tmp_path / "long", longrope_net(200))
    warnings = prepared((crossing, within), questions).notes.warnings
    rope = [text for text in warnings if "RoPE" in text]
    assert len(rope) == 1 and "the student's RoPE factors change at 20 tokens" in rope[0]
