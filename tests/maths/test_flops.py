"""Test the FLOP ledger against torch's own count (eager attention) and against explicit sums."""

import dataclasses

import pytest
import torch
from helpers import (
    byte_tokenizer,
    counted,
    invoke,
    last_json,
    prepared,
    random_net,
    save_net,
    text_config,
    tiny_net,
    trained,
)

from prefix_distill import config as configuration
from prefix_distill.engine import scoring
from prefix_distill.engine.adapter import attach
from prefix_distill.engine.batching import reads
from prefix_distill.engine.device import Clock
from prefix_distill.engine.meter import Meter
from prefix_distill.engine.models import Model, with_checkpointing
from prefix_distill.engine.rollout import rollout_of, student_sides
from prefix_distill.engine.sampling import GenerationCost, Request, Sampler, generate
from prefix_distill.engine.shapes import read_shape
from prefix_distill.engine.targets import find_targets
from prefix_distill.engine.text_ids import make_row
from prefix_distill.engine.trunk import choose_trunk
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
    cost = cost_in(ledger, read_shape(model))
    real = counted(lambda: generate(model, requests, 40, sampler, cost))
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
    cost = cost_in(ledger, read_shape(model))
    real = counted(lambda: heard.extend(generate(model, requests, 80, sampler, cost)))
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


# architectures whose matrices a config alone does not tell: fused experts, latent keys and values
# that every decoding step expands again, sizes by layer
OTHERS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [64, 64, 32, 32],
        "vocab_size_per_layer_input": 260,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "modernbert-decoder": {
        "local_attention": 128,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 258,
        "sep_token_id": 258,
        "cls_token_id": 258,
    },
    "llama4_text": {"intermediate_size_mlp": 64, "num_local_experts": 2},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_matrices_are_counted_by_the_rows_that_they_get(kind):
    """A prefill and a decoding step after it, within 2% of torch's count."""
    net = random_net(text_config(kind, **OTHERS[kind]))
    net.config._attn_implementation = "eager"
    net.config._experts_implementation = "eager"  # torch does not count grouped products
    model = Model(
        name="m",
        net=net,
        tokenizer=byte_tokenizer(),
        generation_config=None,
        eos=frozenset({257}),
    )
    choose_trunk(model)
    shape = read_shape(model)
    ids, mask = torch.arange(20, 61)[None], torch.ones(1, 41, dtype=torch.long)
    with torch.no_grad():
        prefill = counted(lambda: model.trunk_cached(ids[:, :40], mask[:, :40]))
        _, cache = model.trunk_cached(ids[:, :40], mask[:, :40])
        step = counted(lambda: model.trunk_cached(ids[:, 40:], mask, cache))
    assert shape.linear(40) + shape.rectangle(40) == pytest.approx(prefill, rel=0.02)
    assert shape.linear(1) + shape.rectangle(1, 40) == pytest.approx(step, rel=0.02)


def test_fused_experts_under_an_adapter_are_counted():
    pytest.importorskip("peft")
    net = random_net(text_config("qwen3_moe", **OTHERS["qwen3_moe"]))
    model = Model(
        name="m",
        net=net,
        tokenizer=byte_tokenizer(),
        generation_config=None,
        eos=frozenset({257}),
    )
    before = read_shape(model)
    config = configuration.build({"adapter.rank": 2, "adapter.targets": "q_proj"}).adapter
    targets = find_targets(net, "q_proj", make_row(model, 8))
    model.adapter = attach(net, config, targets, seed=0, base="b")
    assert read_shape(model).frozen == before.trunk


def test_a_recurrent_state_is_written_and_read_once_per_token():
    """Falcon-H1: heads × head size × state size per layer, 2 FLOPs for each of both."""
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    net = random_net(text_config("falcon_h1", mamba_d_ssm=64, **sizes))
    model = Model(name="m", net=net, tokenizer=None, generation_config=None, eos=frozenset({257}))
    shape = read_shape(model)
    assert shape.recurrent == 2 * 8 * 8 * 8
    without = dataclasses.replace(shape, recurrent=0)
    assert shape.linear(5) - without.linear(5) == 5 * 4 * shape.recurrent


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("llama", ()),
        ("qwen3_moe", ()),
        ("mamba", ("Conv1d", "MambaMixer")),
        ("rwkv", ("RwkvFeedForward", "RwkvSelfAttention", "recurrent states")),
    ],
)
def test_a_shape_names_the_parts_that_are_not_counted(kind, parts):
    net = random_net(text_config(kind, **OTHERS.get(kind, {})))
    model = Model(name="m", net=net, tokenizer=None, generation_config=None, eos=frozenset({257}))
    assert read_shape(model).not_counted == parts
    with torch.device("meta"):
        sketch = type(net)(net.config)
    planned = read_shape(dataclasses.replace(model, net=sketch))
    missing = {"recurrent states"} if kind == "mamba" else set()
    assert set(planned.not_counted) == {*parts, *missing}  # without numbers no state is measured


def test_result_and_plan_name_what_is_not_counted(tmp_path, pair, questions):
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    teacher = save_net(
        tmp_path / "hybrid", random_net(text_config("falcon_h1", mamba_d_ssm=64, **sizes))
    )
    few = {"train__batch_size": 1, "evaluate__problems": 1, "evaluate__kl_prompts": 1}
    short = {"schedule__prefix": "4", "rollout__max_new_tokens": 4, "train__steps": 1}
    run = prepared((pair[0], teacher), questions, **few, **short)
    note = "the FLOP ledger does not count all of these parts: Conv1d"
    assert note in run.notes.lines
    assert trained(run, tmp_path / "run")["flops"]["not_counted"] == ["Conv1d"]
    code, out, err = invoke(
        *["plan", "--student", pair[0], "--teacher", teacher, "--steps", "1"],
        *["--prompt-tokens", "8", "--max-new-tokens", "8"],
    )
    assert code == 0, err
    assert f"{note}, recurrent states" in last_json(out)["notes"]
