"""Gradient checkpointing changes no gradient: no layer has dropout when it is recomputed."""

import pytest
import torch
from helpers import byte_tokenizer, random_net, text_config, tiny_net

from prefix_distill.engine.dropout import turn_off_dropout
from prefix_distill.engine.models import Model, with_checkpointing
from prefix_distill.engine.recomputation import check_recomputation
from prefix_distill.errors import UserError

OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3}
XGLM = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "dropout": 0.3}


def model_of(net) -> Model:
    return Model(
        name="m", net=net, tokenizer=byte_tokenizer(), generation_config=None, eos=frozenset({257})
    )


@pytest.mark.parametrize(
    "config", [text_config("opt", **OPT), text_config("xglm", **XGLM)], ids=["opt", "xglm"]
)
def test_dropout_of_layers_that_call_it_as_a_function_is_off_while_they_are_recomputed(config):
    net = random_net(config)
    model = with_checkpointing(model_of(net))
    with pytest.raises(UserError, match="recomputed"):
        check_recomputation(model)
    turn_off_dropout(net)
    check_recomputation(model)


def test_every_kind_of_dropout_is_set_to_zero_and_the_config_stays():
    net = random_net(text_config("opt", **OPT, layerdrop=0.2, attention_dropout=0.1))
    net.extra = torch.nn.Dropout(0.5)
    turn_off_dropout(net)
    assert (net.config.dropout, net.config.layerdrop) == (0.3, 0.2)
    for module in net.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or key == "p"):
                assert value == 0.0, f"{type(module).__name__}.{key}"


def test_a_layer_that_is_not_itself_when_recomputed_is_refused():
    net = tiny_net("llama")
    net.model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, out: out + 0.1 * torch.randn_like(out)
    )
    with pytest.raises(UserError, match="--gradient-checkpointing") as error:
        check_recomputation(with_checkpointing(model_of(net)))
    assert "\n" not in str(error.value)


def test_the_layer_that_cannot_run_twice_is_named():
    net = tiny_net("llama")
    calls = []

    def fail_the_second_time(*_):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("its state is gone")

    net.model.layers[1].input_layernorm.register_forward_hook(fail_the_second_time)
    with pytest.raises(UserError, match=r"\(model\.layers\.1\S*: its state is gone\)"):
        check_recomputation(with_checkpointing(model_of(net)))


def test_the_layers_of_a_network_without_checkpointing_are_named():
    config = text_config("openai-gpt", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(UserError, match=r"transformer\.h\.0 \(Block\) keeps"):
        with_checkpointing(model_of(random_net(config)))


def test_the_check_leaves_the_flags_as_they_were():
    model = with_checkpointing(model_of(tiny_net("qwen3").requires_grad_(False)))
    check_recomputation(model)
    assert not model.trainable and not any(m.training for m in model.net.modules())
    assert all(p.grad is None for p in model.net.parameters())
