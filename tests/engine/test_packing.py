"""Test linear layers with packed weights against float64 and against torch's own layers."""

import copy

import pytest
import torch
from helpers import make_model, tiny_net

from prefix_distill.engine import packing
from prefix_distill.engine.decoder import describe_linears, make_decoder
from prefix_distill.engine.masters import Masters

BF16 = torch.bfloat16
needs_packing = pytest.mark.skipif(
    packing.find_obstacle(BF16) is not None, reason=f"{packing.find_obstacle(BF16)}"
)


def layer(inputs=384, outputs=640, bias=True):
    torch.manual_seed(0)
    return packing.PackedLinear(inputs, outputs, bias=bias, dtype=BF16)


def plain(linear, x):
    return torch.nn.functional.linear(x, linear.weight, linear.bias)


def error(linear, x, found):
    bias = None if linear.bias is None else linear.bias.double()
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), bias)
    return (found - exact).norm().item()


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 8, packing.FEW_ROWS])
@pytest.mark.parametrize("inputs, outputs", [(384, 640), (33, 65), (1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_as_exact_as_torchs_product(rows, inputs, outputs, bias):
    linear = layer(inputs, outputs, bias)
    x = torch.randn(rows, 1, inputs, dtype=BF16)
    with torch.inference_mode():
        found = linear(x)
    assert linear.packed is not None and found.shape == (rows, 1, outputs) and found.dtype == BF16
    assert error(linear, x, found) <= 1.5 * error(linear, x, plain(linear, x)) + 1e-6


@needs_packing
def test_weights_that_change_in_place_are_packed_again():
    linear, x = layer(bias=False), torch.randn(4, 384, dtype=BF16)
    with torch.inference_mode():
        before = linear(x)
    with torch.no_grad():
        torch._foreach_copy_([linear.weight], [2 * linear.weight])
    with torch.inference_mode():
        assert torch.equal(linear(x), 2 * before)  # a factor of 2 is exact
        packed = linear.packed
        assert torch.equal(linear(x), 2 * before) and linear.packed is packed


def test_many_rows_and_other_dtypes_take_torchs_path():
    linear = layer()
    for x in (torch.randn(packing.FEW_ROWS + 1, 384, dtype=BF16), torch.empty(0, 384, dtype=BF16)):
        assert torch.equal(linear(x), plain(linear, x))
    with torch.autocast("cpu", dtype=BF16):
        x = torch.randn(2, 384)
        assert torch.equal(linear(x), plain(linear, x))
    assert linear.packed is None


@needs_packing
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "neox"])
def test_a_decoder_in_bfloat16_is_as_exact_as_its_student(kind):
    """Compare logits with those of the network in float32, for rows of one token."""
    net = tiny_net(kind, width=256).eval()
    model = make_model(copy.deepcopy(net))
    sampler = Masters(model, BF16).sampler
    decoding = make_decoder(sampler, BF16)
    packed = [m for m in decoding.net.modules() if type(m) is packing.PackedLinear]
    ids = torch.arange(12)[:, None]
    with torch.inference_mode():
        exact = net(ids).logits
        expected = (sampler.net(ids).logits - exact).norm()
        found = (decoding.net(ids).logits - exact).norm()
    assert packed and all(m.packed is not None for m in packed)
    assert found <= 1.25 * expected
    assert {id(p) for p in decoding.net.parameters()} == {id(p) for p in sampler.net.parameters()}


def test_a_cpu_without_correct_packing_keeps_torchs_layers(monkeypatch):
    def too_large(x, packed, bias):
        return 1.1 * torch.nn.functional.linear(x, packed, bias)

    def missing(*_):
        raise AttributeError("no such operator")

    model = make_model(tiny_net("llama", width=256)).net.to(BF16)
    model = make_model(model)
    for name, replacement, words in (
        ("multiply", too_large, "packed weights have an error of"),
        ("multiply", missing, "this torch has no packed weights (AttributeError)"),
    ):
        monkeypatch.setattr(packing, "pack", lambda weight: weight.detach())
        monkeypatch.setattr(packing, name, replacement)
        packing.find_obstacle.cache_clear()
        reason = packing.find_obstacle(BF16)
        assert reason is not None and reason.startswith(words), reason
        assert make_decoder(model, BF16) is model
        [note] = describe_linears(model.device, BF16)
        assert note.endswith(reason)
    assert describe_linears(model.device, torch.float32) == []
    monkeypatch.undo()
    packing.find_obstacle.cache_clear()
