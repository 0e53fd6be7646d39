"""Name the module that computes a network's logits, and the one that reads an encoder."""

import pytest
import torch
import transformers
from helpers import make_model, random_net, save_tiny, text_config, tiny_net

from prefix_distill.engine.classes import choose_class
from prefix_distill.engine.loading import load_model
from prefix_distill.engine.trace import describe_logits, join, name_difference, recording
from prefix_distill.errors import UserError


def test_a_network_that_names_no_output_layer_is_refused_with_the_module_of_its_logits(
    tmp_path, monkeypatch
):
    folder = save_tiny(tmp_path / "m")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match="its logits are the output of lm_head") as error:
        load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_logits_that_no_module_gives_and_logits_that_need_an_image_are_described():
    net = tiny_net("llama")
    net.lm_head.forward = lambda x: torch.nn.functional.linear(x, net.lm_head.weight) + 1
    assert describe_logits(net) == "its logits are the output of lm_head"
    plain = net.forward

    def forward(pixel_values=None, **named):
        output = plain(**named)
        output.logits = output.logits + 1
        return output

    net.forward = forward
    assert describe_logits(net) == "no module of it gives its logits"

    def refuse(pixel_values, **_):
        raise AssertionError

    net.forward = refuse
    text = describe_logits(net)
    assert text.startswith("token ids alone give no logits") and "'pixel_values'" in text


def test_recording_leaves_no_hook_and_copies_what_a_network_overwrites():
    net = random_net(text_config("llama"))
    ids = torch.arange(20, 26)[None]
    with torch.no_grad(), recording(net) as passes:
        net(input_ids=ids)
        net(input_ids=ids)
    assert len(passes) == 2 and passes[0].keys() == passes[1].keys()
    for key, values in passes[0].items():
        assert len(values) == 6
        torch.testing.assert_close(values, passes[1][key])
    assert ("model.layers.1.mlp", "output", 1) in passes[0]
    for module in net.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_tensor_with_one_number_per_token_is_compared_and_no_pass_is_no_difference():
    model = make_model(tiny_net("llama"))
    before = {("scores", "output", 1): torch.ones(4)}
    after = {("scores", "output", 1): torch.tensor([1.0, 1.0, 1.5, 1.0])}
    text = "the first tensor that differs is the output of scores, by 0.5 of its norm"
    assert name_difference(model, before, after, allowed=1e-3) == text
    assert name_difference(model, before, after, allowed=1e-3, tokens=slice(0, 2)) is None
    assert name_difference(model, before, join([]), allowed=1e-3) is None


def test_passes_over_the_parts_of_a_text_are_joined():
    whole = torch.arange(12.0).view(4, 3)
    key = ("layer", "input", 1)
    joined = join([{key: whole[:2], ("mask", "input", 1): torch.ones(2)}, {key: whole[2:]}])
    assert joined.keys() == {key} and torch.equal(joined[key], whole)


def test_the_module_that_reads_an_encoder_is_named():
    config = transformers.UdopConfig(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(
        UserError, match=r"decoder\.block\.0 needs the tensor encoder_hidden_states"
    ):
        choose_class("m", config)


def test_a_class_that_saves_the_config_of_another_is_refused_with_both():
    config = transformers.MusicgenConfig(
        text_encoder={"model_type": "t5"},
        audio_encoder={"model_type": "encodec"},
        decoder={"model_type": "musicgen_decoder"},
    )
    with pytest.raises(UserError, match="MusicgenForCausalLM saves the config class Musicgen"):
        choose_class("m", config)
