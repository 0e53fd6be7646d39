"""A model is refused if a token's hidden state depends on what follows it."""

import pytest
import torch
from helpers import byte_tokenizer, invoke, random_net, save_net, text_config, tiny_net
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefix_distill.engine.causality import check_causality
from prefix_distill.engine.models import Model
from prefix_distill.errors import UserError


def model_of(net) -> Model:
    return Model(
        name="m", net=net, tokenizer=byte_tokenizer(), generation_config=None, eos=frozenset({257})
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_causal_model_passes(kind, dtype):
    check_causality(model_of(tiny_net(kind).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        text_config("llama", is_causal=False),
        text_config("gemma3_text", sliding_window=8, use_bidirectional_attention=True),
    ],
    ids=["is_causal false", "bidirectional"],
)
def test_a_model_that_sees_later_tokens_is_refused_with_the_change(config, dtype):
    with pytest.raises(
        UserError, match=r"changes by \d\S* of its norm when a later token"
    ) as error:
        check_causality(model_of(random_net(config).to(dtype)))
    text = str(error.value)
    assert "\n" not in text
    assert "the first tensor that differs is the input of model.layers.0.self_attn.o_proj" in text


class NextToken(torch.nn.Module):
    """A layer that adds a share of the following token's state."""

    def forward(self, x, *_, **__):
        return x + 0.1 * x.roll(-1, 1)


def test_one_position_of_look_ahead_is_found():
    net = tiny_net("llama")
    net.model.layers[1].mlp = NextToken()
    with pytest.raises(UserError, match=r"later token.*the output of model\.layers\.1\.mlp, by"):
        check_causality(model_of(net))


class Prefixed(torch.nn.Module):
    """A decoder with states of its own before the text, which every layer carries along."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids, **_):
        states_BTD = self.decoder.embed_tokens(input_ids)
        states_BTD = torch.nn.functional.pad(states_BTD, (0, 0, 3, 0), value=1.0)
        for layer in self.decoder.layers:
            states_BTD = states_BTD + layer.mlp(states_BTD)
        return BaseModelOutputWithPast(last_hidden_state=states_BTD[:, 3:])


def test_a_layer_that_carries_more_states_than_tokens_is_named():
    net = tiny_net("llama")
    net.model.layers[1].mlp = NextToken()
    net.prefixed = Prefixed(net.model)
    net.get_decoder = lambda: net.prefixed
    with pytest.raises(UserError, match=r"the output of model\.layers\.1\.mlp, by"):
        check_causality(model_of(net))


class NeighbouringRows(torch.nn.Module):
    """A layer whose output depends on the other rows of the batch."""

    def forward(self, x, *_, **__):
        return x - 0.5 * x.mean(0, keepdim=True)


def test_a_row_that_depends_on_its_neighbours_is_refused():
    net = tiny_net("llama")
    net.model.layers[1].mlp = NeighbouringRows()
    with pytest.raises(
        UserError, match=r"changes by \d\S* of its norm beside another row"
    ) as error:
        check_causality(model_of(net))
    assert "the output of model.layers.1.mlp, by" in str(error.value)


def test_check_and_run_refuse_an_embedding_model_before_they_write(pair, questions, tmp_path):
    student = save_net(tmp_path / "s", random_net(text_config("llama", is_causal=False)))
    for command in (["check"], ["run", "--out", tmp_path / "run"]):
        code, out, err = invoke(
            *command, "--student", student, "--teacher", pair[1], "--dataset", questions
        )
        assert (code, out) == (3, "") and "later token" in err
    assert not (tmp_path / "run").exists()
