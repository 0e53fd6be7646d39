"""Where the trunk ends and the output head begins: head(trunk) must equal the network's logits."""

import pytest
import torch
from helpers import make_model, random_net, text_config

from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.models import with_checkpointing
from prefix_distill.engine.trunk import check_head, choose_trunk
from prefix_distill.errors import UserError

# get_decoder() of a Llama-4 text model is the whole network; of a ModernBERT decoder, its head.
# Falcon-H1 multiplies its logits by a number of its config.
CONFIGS = {
    "llama4_text": {"intermediate_size_mlp": 64, "num_local_experts": 2},
    "modernbert-decoder": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 258,
        "sep_token_id": 258,
        "cls_token_id": 258,
    },
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_d_ssm": 64,
        "lm_head_multiplier": 0.25,
    },
    "llama": {},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return make_model(random_net(text_config(request.param, **CONFIGS[request.param])))


def test_the_head_of_the_trunk_gives_the_logits(model):
    choose_trunk(model)
    assert check_head(model) < 1e-5
    assert model.whole_net == (model.net.config.model_type in ("llama4_text", "modernbert-decoder"))
    ids = torch.arange(20, 44)[None]
    ours = model.head().logits(model.trunk(ids)[0])
    theirs = model.net(input_ids=ids).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_cached_trunk_goes_on_where_the_first_pass_ended(model):
    choose_trunk(model)
    ids, mask = torch.arange(20, 32)[None], torch.ones(1, 12, dtype=torch.long)
    whole = model.trunk(ids)
    first, cache = model.trunk_cached(ids[:, :11], mask[:, :11])
    second, _ = model.trunk_cached(ids[:, 11:], mask, cache)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama4_text", "modernbert-decoder"])
def test_a_whole_network_as_trunk_computes_no_logits_and_can_be_recomputed(kind):
    model = make_model(random_net(text_config(kind, **CONFIGS[kind])).requires_grad_(True))
    choose_trunk(model)
    head = model.net.get_output_embeddings()
    forward = head.forward
    ids = torch.arange(20, 44)[None]
    norm = next(p for name, p in model.net.named_parameters() if "norm" in name)
    gradients = []
    for either in (model, with_checkpointing(model)):
        norm.grad = None
        either.trunk(ids).square().sum().backward()
        gradients.append(norm.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert head.forward == forward
    assert make_decoder(model, torch.bfloat16).whole_net


def test_a_network_that_needs_more_than_tokens_is_refused_with_its_reason():
    model = make_model(random_net(text_config("llama")))

    def forward(*_, **__):
        raise ValueError("You must specify pixel_values")

    model.net.forward = forward
    with pytest.raises(UserError, match=r"gives no logits \(.*: You must specify pixel_values\)"):
        choose_trunk(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_that_needs_more_than_tokens_is_named(dtype):
    model = make_model(random_net(text_config("llama")).to(dtype))

    def forward(*_, **__):
        raise ValueError("You must specify pixel_values")

    model.net.model.layers[1].mlp.forward = forward
    with pytest.raises(UserError) as error:
        choose_trunk(model)
    text = str(error.value)
    assert "(model.layers.1.mlp: You must specify pixel_values)" in text
    assert text.endswith("--dtype float32") == (dtype == torch.bfloat16)


def test_an_id_whose_logit_the_network_replaces_is_named():
    model = make_model(random_net(text_config("llama")))
    plain = model.net.forward

    def forward(**named):
        output = plain(**named)
        if output.logits.shape[-1] > 1:
            output.logits = output.logits.clone()
            output.logits[..., 7] = -1e9
        return output

    model.net.forward = forward
    with pytest.raises(UserError, match=r"lm_head is \S+ for id 7, where the logits have -1e\+09"):
        choose_trunk(model)


def test_the_module_that_draws_random_numbers_is_named():
    model = make_model(random_net(text_config("llama")))
    model.net.model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, out: out + torch.randn_like(out)
    )
    with pytest.raises(UserError, match=r"two passes .*the output of model\.layers\.1\.mlp, by"):
        choose_trunk(model)


def test_a_head_that_reads_another_shape_than_the_tokens_is_refused_with_the_shape():
    """Two streams of states, as of a network that predicts two tokens at once."""
    model = make_model(random_net(text_config("llama")))
    model.net.lm_head.register_forward_pre_hook(
        lambda module, inputs: (torch.stack([inputs[0].sin(), inputs[0]], 1),)
    )
    model.net.lm_head.register_forward_hook(lambda module, inputs, out: out[:, 0])
    with pytest.raises(UserError, match=r"lm_head: shape \[1, 2, 8, 32\], expected \[1, 8, D\]"):
        choose_trunk(model)


def test_logits_that_are_no_scale_of_the_head_are_refused_with_the_gap():
    model = make_model(random_net(text_config("llama")))
    model.net.lm_head.register_forward_hook(lambda module, inputs, out: out + out.sin())
    with pytest.raises(UserError) as error:
        choose_trunk(model)
    text = str(error.value)
    assert "\n" not in text
    assert "its decoder (LlamaModel): " in text and "the input of lm_head: " in text
