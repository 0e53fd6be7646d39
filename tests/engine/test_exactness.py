"""Test how a model decodes and shares prompts: hybrids, recurrent models and fixed caches."""

import dataclasses
import functools

import pytest
import torch
from helpers import (
    LINEAR_ATTENTION,
    MAMBA_HEADS,
    make_model,
    random_net,
    text_config,
    tiny_net,
)
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.utils import ModelOutput

from prefix_distill.engine import exactness
from prefix_distill.engine.casting import cast
from prefix_distill.engine.decoding import FASTEST, Decoding
from prefix_distill.engine.rollout import rollout_of, student_sides
from prefix_distill.engine.sampling import Request, Sampler, generate
from prefix_distill.engine.scoring import hidden_rows
from prefix_distill.engine.sharing import check_shared_gradients, check_sharing
from prefix_distill.engine.text_ids import text_ids
from prefix_distill.errors import UserError
from prefix_distill.maths.flops import Ledger, Shape

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MAMBA = {"state_size": 8, "expand": 2, "time_step_rank": 4}
# model type → its own fields, and how it decodes exactly
FAMILIES = {
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        FASTEST,
    ),
    "mamba": (MAMBA, Decoding(stretch=None)),
    "mamba2": (
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        Decoding(stretch=None),
    ),
    "bamba": (MAMBA_HEADS | {"attn_layer_indices": [1], "mamba_expand": 2}, FASTEST),
    "falcon_h1": (MAMBA_HEADS | {"mamba_d_ssm": 64}, FASTEST),
    "qwen3_next": (LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 32}, FASTEST),
    "qwen3_5_text": (LINEAR_ATTENTION, FASTEST),
    "gpt_oss": (
        EXPERTS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
        FASTEST,
    ),
    "gemma3_text": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
        FASTEST,
    ),
    "recurrent_gemma": (
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        Decoding(batch="equal", stretch=None),
    ),
    "minimax": (
        EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
        Decoding(batch="equal", stretch=None),
    ),
    "rwkv": (
        {"attention_hidden_size": 32, "context_length": 128},
        Decoding(batch="single", stretch=None),
    ),
}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
}
ENDS = frozenset({257, *range(0, 260, 9)})  # every response ends soon, at a length of its own


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Return the model of a family, how it should decode, and how the check says it does."""
    shape, expected = FAMILIES[request.param]
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    net = random_net(text_config(request.param, **shape), seed=1)
    model = make_model(net)
    model.shares_prompts = check_sharing(model).is_exact
    model.decoding = exactness.find_decoding(model)
    return model, expected


def sampler(**changes) -> Sampler:
    return Sampler(**{"eos": ENDS, "pad": 256, "support": 260, "seed": 3} | changes)


def requests() -> list[Request]:
    """Return prompts of three lengths, two rows each."""
    rows = []
    for slot, length in enumerate((5, 11, 11, 6)):
        ids = tuple(range(20 + slot, 20 + slot + length))
        rows += [Request(ids=ids, key=(slot, sample)) for sample in range(2)]
    return rows


def test_the_fastest_exact_way_is_found(family):
    model, expected = family
    exactness.check_window(model)
    assert model.decoding == expected


def test_rows_that_end_early_leave_the_samples_of_others_alone(family):
    """Compare a batch, in stretches of three tokens, with every row alone in one stretch."""
    model, _ = family
    small = model.decoding
    if small.stretch is not None:
        small = dataclasses.replace(small, stretch=3)
    together = generate(dataclasses.replace(model, decoding=small), requests(), 40, sampler())
    assert len({len(response.ids) for response in together}) > 3
    for request, response in zip(requests(), together, strict=True):
        [alone] = generate(
            dataclasses.replace(model, decoding=Decoding(batch="single", stretch=None)),
            [request],
            40,
            sampler=sampler(),
        )
        assert response == alone


def test_forty_greedy_tokens_equal_plain_generate(family):
    """The default stretch has 32 tokens, so the cache is continued once."""
    model, _ = family
    greedy = sampler(temperature=0, eos=frozenset({257}))
    for request, response in zip(
        requests()[::2], generate(model, requests()[::2], 40, greedy), strict=True
    ):
        ids = torch.tensor([request.ids])
        plain = model.net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=257,
            pad_token_id=256,
        )
        assert list(response.ids) == plain[0, len(request.ids) :].tolist()


def test_training_shares_prompts_only_if_gradients_allow_it(family):
    """Compare gradients of rollouts with a common prompt, run together and one by one."""
    model, _ = family
    shares = check_sharing(model).is_exact
    model = dataclasses.replace(
        model,
        shares_prompts=shares,
        trains_on_shared_prompts=shares and check_shared_gradients(model).is_exact,
    )
    prompt = tuple(range(30, 40))
    rollouts = []
    for sample, length in enumerate((4, 9, 6)):
        ids = tuple(range(50 + sample, 50 + sample + length))
        rollouts.append(dataclasses.replace(rollout_of(0, prompt, ids), sample=sample))
    weights = [p for p in model.net.parameters() if p.dim() == 1]
    direction = torch.linspace(-1, 1, 32)
    gradients = []
    for groups in ([rollouts], [[rollout] for rollout in rollouts]):
        for p in weights:
            p.requires_grad_(True)
        hidden = torch.cat([hidden_rows(model, student_sides(group)) for group in groups])
        gradients.append(
            torch.autograd.grad((hidden @ direction).sum(), weights, allow_unused=True)
        )
    for together, alone in zip(*gradients, strict=True):
        if alone is not None:
            scale = alone.abs().max().item()
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_changes_the_logits_is_refused(dtype):
    """Every cached forward pass adds a constant to the first logit."""
    net = tiny_net("llama").to(dtype)
    plain = net.forward

    def forward(*arguments, use_cache=None, **named):
        output = plain(*arguments, use_cache=use_cache, **named)
        if use_cache is not False and named["input_ids"].shape[1] == 1:
            output.logits[..., 0] += 5
        return output

    net.forward = forward
    with pytest.raises(UserError, match="does not give the logits of a forward pass") as error:
        exactness.find_decoding(make_model(net))
    assert "first tensor that differs is the output of LlamaForCausalLM, by" in str(error.value)
    assert "\n" not in str(error.value)


class OffWithCache(torch.nn.Module):
    """A layer that adds one to every value of a decoding step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *arguments, **named):
        return self.inner(x, *arguments, **named) + float(x.shape[1] == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_module_that_decodes_otherwise_is_named(layer, dtype):
    net = tiny_net("llama").to(dtype)
    net.model.layers[layer].mlp = OffWithCache(net.model.layers[layer].mlp)
    with pytest.raises(UserError) as error:
        exactness.find_decoding(make_model(net))
    assert f"the output of model.layers.{layer}.mlp, by" in str(error.value)


def test_a_module_without_a_fault_is_not_named_for_what_it_reads():
    """The states after the layer are wrong before the norm reads them."""
    net = tiny_net("llama")
    plain = net.model.layers[1].forward

    def forward(x, *arguments, **named):
        return plain(x, *arguments, **named) + float(x.shape[1] == 1)

    net.model.layers[1].forward = forward
    with pytest.raises(UserError, match=r"the output of model\.layers\.1, by"):
        exactness.find_decoding(make_model(net))


def test_the_module_that_fails_with_a_cache_is_named():
    net = tiny_net("llama")
    plain = net.model.layers[1].self_attn.forward

    def forward(hidden_states, **named):
        if hidden_states.shape[1] == 1:
            raise ValueError("no state of the step before")
        return plain(hidden_states, **named)

    net.model.layers[1].self_attn.forward = forward
    reason = r"\(model\.layers\.1\S*: no state of the step before\)"
    with pytest.raises(UserError, match=reason):
        exactness.find_decoding(make_model(net))


def half(kind, seed=0, scale=1.0, **shape):
    """Return a random model that is loaded in bfloat16."""
    net = random_net(text_config(kind, **shape), seed, scale)
    cast(net, torch.bfloat16)
    return make_model(net)


@torch.no_grad()
def largest_gap(model):
    """Return how far a token's hidden state moves, relative to its norm, if its text is cached."""
    ids = torch.tensor([text_ids(model, 40)])
    mask = torch.ones_like(ids)
    whole = model.trunk(ids)[0].float()
    _, cache = model.trunk_cached(ids[:, :8], mask[:, :8])
    gaps = []
    for t in range(8, ids.shape[1]):
        hidden, cache = model.trunk_cached(ids[:, t : t + 1], mask[:, : t + 1], cache)
        gaps.append((hidden[0, 0].float() - whole[t]).norm() / whole[t].norm())
    return max(gaps).item()


def test_rounding_that_changes_experts_is_no_fault():
    """Single tokens get other experts in bfloat16, and their logits differ by half their norm."""
    shape = DBRX | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
    largest = 0.0
    for seed in range(4):
        model = half("dbrx", seed, scale=0.3, **shape)
        assert exactness.find_decoding(model) == FASTEST
        largest = max(largest, largest_gap(model))
    assert largest > 0.2  # else these networks show nothing


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_mixtures_of_experts_decode_in_half_precision(kind):
    for seed in range(3):
        model = half(kind, seed, **EXPERTS | {"num_local_experts": 8, "num_experts": 8})
        assert exactness.find_decoding(model) == FASTEST


def test_half_precision_hides_no_wrong_position():
    """Every cached token gets the position after its own."""
    model = half("mixtral", num_local_experts=8, rope_theta=100.0)
    plain = model.net.forward

    @functools.wraps(plain)  # generate reads from the signature what it passes
    def forward(*arguments, **named):
        if named["input_ids"].shape[1] == 1:
            named["position_ids"] = named["position_ids"] + 1
        return plain(*arguments, **named)

    model.net.forward = forward
    with pytest.raises(UserError, match=r"the output of model\.rotary_emb, by"):
        exactness.find_decoding(model)


def test_half_precision_hides_no_padding():
    """A batch in which every row sees the padding decodes rows of equal length alone."""
    model = half("mixtral", num_local_experts=8)
    plain = model.net.forward

    def forward(*arguments, **named):
        named["attention_mask"] = torch.ones_like(named["attention_mask"])
        return plain(*arguments, **named)

    model.net.forward = forward
    found = exactness.find_decoding(model)
    assert found.batch == "equal"


def test_a_generate_method_of_its_own_is_refused():
    net = tiny_net("llama")

    for tokens, reason in ((1, "does not call logits processors"), (0, "at least one new token")):

        def generate(input_ids, tokens=tokens, **_):
            longer = torch.nn.functional.pad(input_ids, (0, tokens), value=65)
            return ModelOutput(sequences=longer, past_key_values=DynamicCache())

        net.generate = generate
        with pytest.raises(UserError, match=reason):
            exactness.find_decoding(make_model(net))


def test_rows_that_stay_cost_executed_flops():
    """One row has 2 tokens, one has 70. Head and trunk cost 2·(100 + 10) FLOPs a token."""
    executed = {}
    for stretch in (32, None):
        shape = Shape(trunk=100, head=10, attention=(), stretch=stretch)
        ledger = Ledger()
        ledger.generation(shape, [(4, [2]), (4, [70])])
        executed[stretch] = ledger.executed["student_decode"]
        assert ledger.useful["student_decode"] == 2 * 110 * (1 + 69)
    # 69 steps: with stretches the short row runs in the first 31, otherwise in all
    assert executed == {32: 2 * 110 * (69 + 31), None: 2 * 110 * (69 + 69)}


def test_restrictions_are_noted():
    assert FASTEST.restrictions("the student") == []
    [note] = Decoding(batch="single", stretch=None).restrictions("the student")
    assert note.startswith("the student decodes every row alone")
    assert len(Decoding(batch="equal", stretch=None).restrictions("the student")) == 2
