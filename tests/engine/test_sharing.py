"""Test which models share a prompt between its responses: rounding is allowed, a fault is not."""

import contextlib
import functools

import pytest
import torch
from helpers import longrope_net, make_model, random_net, text_config, tiny_net

from prefix_distill.engine import scoring, sharing
from prefix_distill.engine.casting import cast
from prefix_distill.engine.models import Model, with_checkpointing
from prefix_distill.engine.sharing import check_shared_gradients, check_sharing, make_sides
from prefix_distill.engine.text_ids import text_ids
from prefix_distill.engine.trunk import choose_trunk

PRECISIONS = ("float32", "bfloat16", "autocast")
PROMPTS = [tuple(b"What is 12 + 30? Think first."), tuple(b"Tom has 5 apples, Anna has 7.")]


def in_precision(net, precision):
    """Return the model of a network in a precision, and the context in which it computes."""
    if precision == "bfloat16":
        cast(net, torch.bfloat16)
    if precision == "autocast":
        return make_model(net), functools.partial(torch.autocast, "cpu", torch.bfloat16)
    return make_model(net), contextlib.nullcontext


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "neox", "gpt2", "mixtral"])
def test_a_sound_model_shares_prompts(kind, precision):
    if kind == "mixtral":
        net = random_net(text_config(kind, num_local_experts=8))
    else:
        net = tiny_net(kind)
    model, context = in_precision(net, precision)
    for prompts in (None, PROMPTS, [PROMPTS[0]]):
        for check in (check_sharing, check_shared_gradients):
            with context():
                comparison = check(model, prompts)
            assert comparison.is_exact, comparison
            assert comparison.change <= comparison.allowed < 0.2


def test_a_decoder_that_get_decoder_does_not_name_shares_prompts():
    names = {"bos_token_id": 258, "sep_token_id": 258, "cls_token_id": 258}
    model = make_model(random_net(text_config("modernbert-decoder", **names)))
    choose_trunk(model)
    assert check_shared_gradients(model).is_exact


def drop(trunk, name):
    """Let a trunk run as if it was called without the argument ``name``."""
    plain = trunk.forward

    @functools.wraps(plain)
    def forward(**named):
        return plain(**named | {name: None})

    trunk.forward = forward


def ignore_positions(net):
    drop(net.transformer, "position_ids")


def show_padding(net):
    drop(net.model, "attention_mask")


def shift_positions(net):
    """Every token after a cached prompt gets the position after its own."""
    plain = net.model.forward

    @functools.wraps(plain)
    def forward(**named):
        mask = named.get("attention_mask")
        if mask is not None and mask.shape[1] > named["input_ids"].shape[1]:
            named["position_ids"] = named["position_ids"] + 1
        return plain(**named)

    net.model.forward = forward


class Carrying(torch.nn.Module):
    """A layer that adds the mean of its last call's outputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.state = 0.0

    def forward(self, x):
        output = self.inner(x) + self.state
        self.state = output.detach().mean((0, 1))
        return output


class Mixing(torch.nn.Module):
    """A layer that adds the mean over the rows of its batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        output = self.inner(x)
        return output + output.mean(0, keepdim=True)


def carry_state(net):
    net.model.layers[0].mlp = Carrying(net.model.layers[0].mlp)


def mix_rows(net):
    net.model.layers[0].mlp = Mixing(net.model.layers[0].mlp)


FAULTS = {
    "ignored positions": ("gpt2", ignore_positions),
    "shifted positions": ("llama", shift_positions),
    "padding": ("llama", show_padding),
    "carried state": ("llama", carry_state),
    "mixed rows": ("llama", mix_rows),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_model_with_a_fault_does_not_share_prompts(name, precision):
    """A fault that also changes padded batches is not excused by that noise."""
    kind, add_fault = FAULTS[name]
    net = tiny_net(kind)
    add_fault(net)
    model, context = in_precision(net, precision)
    for prompts in (None, PROMPTS):
        with context():
            comparison = check_sharing(model, prompts)
        assert not comparison.is_exact, comparison
        assert "of their norm, expected at most" in comparison.reason


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_of_another_prompt_is_not_shared(precision, monkeypatch):
    plain = scoring.select_rows
    model, context = in_precision(tiny_net("llama"), precision)
    with context():
        assert check_sharing(model, PROMPTS).is_exact
    monkeypatch.setattr(scoring, "select_rows", lambda cache, rows: plain(cache, 1 - rows))
    with context():
        assert not check_sharing(model, PROMPTS).is_exact


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prompt_without_gradient_is_not_shared_in_training(precision, monkeypatch):
    plain = Model.trunk_cached

    def trunk_cached(self, ids_BT, mask_BT, cache=None):
        with torch.set_grad_enabled(cache is not None and torch.is_grad_enabled()):
            return plain(self, ids_BT, mask_BT, cache)

    model, context = in_precision(tiny_net("llama"), precision)
    with context():
        assert check_shared_gradients(model, PROMPTS).is_exact
    monkeypatch.setattr(Model, "trunk_cached", trunk_cached)
    with context():
        assert check_sharing(model, PROMPTS).is_exact
    with context():
        assert not check_shared_gradients(model, PROMPTS).is_exact


def test_a_cache_that_cannot_be_shared_is_described():
    net = tiny_net("llama")
    plain = net.model.forward

    @functools.wraps(plain)
    def forward(**named):
        if named["use_cache"]:
            raise ValueError("no cache here")
        return plain(**named)

    net.model.forward = forward
    comparison = check_sharing(make_model(net))
    assert not comparison.is_exact and comparison.failure == "model: no cache here"
    assert comparison.reason.endswith(
        "after a shared prompt cannot be computed (model: no cache here)"
    )
    assert comparison.facts == {"exact": False, "failure": "model: no cache here"}


def test_a_model_that_recomputes_layers_is_checked_without_recomputation():
    """Its training does not share prompts, but its sampling does."""
    net = tiny_net("llama")
    model = with_checkpointing(make_model(net))
    assert check_sharing(model, PROMPTS).is_exact
    shift_positions(net)
    assert not check_sharing(model, PROMPTS).is_exact


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_that_are_not_finite_are_not_shared(precision, monkeypatch):
    plain = Model.trunk_cached

    def trunk_cached(self, ids_BT, mask_BT, cache=None):
        hidden_BTD, next_cache = plain(self, ids_BT, mask_BT, cache)
        if cache is not None:
            hidden_BTD = hidden_BTD * float("nan")
        return hidden_BTD, next_cache

    monkeypatch.setattr(Model, "trunk_cached", trunk_cached)
    model, context = in_precision(tiny_net("llama"), precision)
    with context():
        comparison = check_sharing(model, PROMPTS)
    assert not comparison.is_exact and "(they are not finite)" in comparison.reason


def test_noise_decides_between_floor_and_ceiling():
    """A change of 3e-5 is rounding beside noise of 2e-5, and is not beside less noise."""
    limits = sharing.Limits(floor=1e-5, ceiling=1e-3)
    assert limits.allow(0.0) == limits.allow(4e-6) == 1e-5
    assert limits.allow(2e-5) == pytest.approx(4e-5)
    assert limits.allow(0.19) == 1e-3


def test_the_rows_are_the_prompts_of_the_run_and_their_text():
    """Responses hold no special tokens; one of the two prompts is shorter than the other."""
    model = make_model(tiny_net("llama"))
    given = [(258, *PROMPTS[0], 259), (258, *PROMPTS[1], 259)]
    for prompts in (given, given[:1], [(258, 259)], None):
        first, second, third = make_sides(model, prompts)
        assert first.prompt == second.prompt and first.ids != second.ids
        assert len(third.prompt) > len(first.prompt) or prompts == [(258, 259)]
        for side in (first, second, third):
            if prompts is not None:
                assert any(side.prompt == p[: len(side.prompt)] for p in prompts)
            assert max(side.ids) < 256 and side.extent == len(side.ids)
    text = make_sides(model, given)[0].ids
    assert bytes(text) in bytes(PROMPTS[0])
    plain = make_sides(model, [(258, 259)])[0].ids
    assert plain == tuple(text_ids(model, len(plain)))


def test_rows_stay_below_the_limits_of_positions():
    model = make_model(random_net(text_config("llama", max_position_embeddings=24)))
    long = [tuple(range(32, 96))]
    assert max(len(side.prompt + side.ids) for side in make_sides(model, long)) <= 24
    assert check_sharing(model, long).is_exact


def test_rows_stay_within_the_first_factors_of_rope():
    """A row beyond the switch runs apart with a prompt of its own, so it would show nothing."""
    model = make_model(longrope_net(32))
    sides = make_sides(model, [tuple(range(32, 96))])
    assert max(len(side.prompt + side.ids) for side in sides) <= model.rope_switch == 32
    assert check_sharing(model, [tuple(range(32, 96))]).is_exact


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
JAMBA |= {"use_mamba_kernels": False}


@pytest.mark.parametrize("kind, more", [("jamba", JAMBA), ("falcon_h1", {})])
def test_a_recurrent_state_is_shared_in_float32_alone(kind, more):
    """Rounding to bfloat16 can be larger than what a lost state changes, as Jamba's is."""
    net = random_net(text_config(kind, **more), scale=0.3)
    assert check_sharing(make_model(net), PROMPTS).is_exact == (kind == "falcon_h1")
    model, _ = in_precision(net, "bfloat16")
    comparison = check_sharing(model, PROMPTS)
    assert not comparison.is_exact
    assert "rounding would hide a lost recurrent state" in comparison.reason


def test_gradients_that_some_lengths_cannot_have_are_not_shared():
    """Falcon-H1 changes a saved state in place if a single token follows the prompt."""
    model = make_model(random_net(text_config("falcon_h1")))
    assert check_sharing(model, PROMPTS).is_exact
    comparison = check_shared_gradients(model, PROMPTS)
    assert not comparison.is_exact and "inplace operation" in comparison.reason


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_cache_without_gradient_is_noticed_whatever_weight_comes_first(kind, monkeypatch):
    """OPT registers its last norm, whose gradient passes no attention, before its layers."""
    model = make_model(random_net(text_config(kind)))
    assert check_shared_gradients(model, PROMPTS).is_exact
    plain = scoring.select_rows

    def detached(cache, rows):
        plain(cache, rows)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(scoring, "select_rows", detached)
    assert not check_shared_gradients(model, PROMPTS).is_exact


def test_a_weight_without_influence_does_not_refuse_a_model():
    """Without rotary positions, the bias of the keys has a gradient of 0 but for rounding."""
    model = make_model(random_net(text_config("biogpt")))
    assert check_shared_gradients(model, PROMPTS).is_exact


def test_a_group_of_one_token_and_one_of_several_chunks_are_compared():
    model = make_model(tiny_net("llama"))
    lengths = [[len(side.ids) for side in sides] for sides in sharing.make_groups(model, PROMPTS)]
    assert lengths == [[*sharing.RESPONSES], [2, 2, 2], [67, 67, 67]]
    few = make_model(random_net(text_config("llama", max_position_embeddings=40)))
    groups = sharing.make_groups(few, PROMPTS)
    assert max(len(side.prompt + side.ids) for sides in groups for side in sides) <= 40
