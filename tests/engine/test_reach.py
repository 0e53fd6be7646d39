"""Parameters that no text token reaches are frozen; experts that few tokens reach are trained."""

import pytest
import torch
from helpers import (
    SIZES,
    byte_tokenizer,
    make_model,
    one_update,
    prepared,
    random_net,
    save_net,
    state_of,
    tiny_net,
)
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from prefix_distill.engine import loading
from prefix_distill.engine.models import Model
from prefix_distill.engine.output_layer import name_outside_decoder
from prefix_distill.engine.reach import find_unreached
from prefix_distill.errors import UserError
from prefix_distill.training.optimizer import step_optimizer

TEXT = SIZES | {"model_type": "mistral"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_config():
    return CONFIG_MAPPING["gemma3"](
        text_config={**TEXT, "model_type": "gemma3_text", "sliding_window": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=250,
        eoi_token_index=251,
        image_token_index=252,
    )


def mistral3_config():
    """A config that AutoModelForCausalLM has no class for."""
    return CONFIG_MAPPING["mistral3"](
        text_config=TEXT,
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=252,
        vision_feature_layer=-1,
    )


@pytest.fixture(scope="module", params=[gemma3_config, mistral3_config])
def multimodal(request, tmp_path_factory):
    """Return the folder of a tiny model with a vision tower."""
    net = random_net(request.param(), factory=AutoModelForImageTextToText)
    return save_net(tmp_path_factory.mktemp("multimodal"), net)


class Experts(torch.nn.Module):
    """A layer of experts of which every token takes one; a bias corrects the choice alone."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.gate = torch.nn.Linear(width, count, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Linear(width, width, bias=False) for _ in range(count)
        )
        # the last expert is never chosen
        self.correction = torch.nn.Parameter(torch.tensor([0.0] * (count - 1) + [-1e9]))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        chosen = (scores + self.correction).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out + (chosen == i)[..., None] * scores[..., i : i + 1] * expert(x)
        return out


def routed_model() -> Model:
    net = tiny_net("llama")
    net.model.layers[1].mlp = Experts(32, 4)
    net.model.layers[1].unused = torch.nn.Linear(32, 32)
    return make_model(net)


def test_experts_without_a_token_stay_trained_and_what_cannot_get_a_gradient_is_frozen():
    model = routed_model()
    assert find_unreached(model) == {
        "model.layers.1.mlp.correction",
        "model.layers.1.unused.weight",
        "model.layers.1.unused.bias",
    }


def test_layers_of_another_class_that_text_skips_are_frozen():
    """Llama-3.2's cross-attention layers stand in one list with those that text runs."""

    class CrossAttention(torch.nn.Linear):
        pass

    net = tiny_net("llama")
    net.model.layers.append(CrossAttention(32, 32))  # the config names two layers
    model = make_model(net)
    assert find_unreached(model) == {"model.layers.2.weight", "model.layers.2.bias"}


def test_a_parameter_of_the_head_beside_weight_and_bias_is_frozen():
    """The loss computes weight·h + bias, so that a factor of its own gets no gradient."""
    net = tiny_net("llama")
    net.lm_head.logit_scale = torch.nn.Parameter(torch.ones(260))
    model = make_model(net)
    assert find_unreached(model) == {"lm_head.logit_scale"}


def test_the_probe_leaves_the_network_as_it_was():
    model = routed_model()
    model.net.requires_grad_(False)
    model.net.model.norm.weight.requires_grad_(True)
    find_unreached(model)
    assert list(model.trainable) == ["model.norm.weight"]
    assert all(p.grad is None for p in model.net.parameters())
    assert not any(m._forward_pre_hooks for m in model.net.modules())


def test_an_expert_without_a_token_takes_a_step_without_a_gradient():
    trained = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2))}
    trained["a"].grad = torch.ones(2)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.0)
    step_optimizer(optimizer, trained, 0.1, grad_clip=1.0)
    assert (trained["a"] < 1).all() and (trained["b"] == 1).all()
    assert trained["b"] in optimizer.state


def test_a_multimodal_student_trains_on_text_without_its_vision_tower(
    multimodal, pair, questions, tmp_path
):
    run = prepared((multimodal, multimodal), questions)
    student = run.pair.student
    frozen = student.unreached
    assert frozen and all("vision" in n or "projector" in n for n in frozen)
    notes = [line for line in run.notes.lines if "no text token reaches" in line]
    count = sum(p.numel() for name, p in student.net.named_parameters() if name in frozen)
    assert len(notes) == 1 and f"{count:,} parameters" in notes[0]
    done = one_update(run)
    assert not frozen.intersection(done.gradient) and len(done.gradient) > 10
    moments = {id(p) for group in state_of(run).optimizer.param_groups for p in group["params"]}
    names = {name for name, p in student.net.named_parameters() if id(p) in moments}
    assert names == set(student.trainable)


def test_lora_leaves_out_what_no_text_token_reaches(multimodal, questions):
    pytest.importorskip("peft")
    run = prepared((multimodal, multimodal), questions, adapter__rank=2)
    adapted = set(run.pair.student.trainable)
    assert adapted and not any("vision" in n or "projector" in n for n in adapted)
    one_update(run)


def test_names_alone_tell_a_forecast_which_parameters_are_frozen(multimodal):
    model = loading.load_model(multimodal, device=torch.device("cpu"), dtype=torch.float32)
    assert name_outside_decoder(model.net) == find_unreached(model)


def test_parameters_are_counted_from_the_config_of_a_multimodal_model(multimodal):
    model = loading.load_model(multimodal, device=torch.device("cpu"), dtype=torch.float32)
    assert loading.count_parameters(multimodal) == model.parameters


def test_a_config_without_a_language_model_is_refused_in_one_line(tmp_path):
    config = CONFIG_MAPPING["vit"](hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for load in (
        lambda: loading.count_parameters(str(tmp_path)),
        lambda: loading.load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32),
    ):
        with pytest.raises(UserError, match="ViTConfig") as error:
            load()
        assert len(str(error.value)) < 300
