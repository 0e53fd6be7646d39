"""Test the lean decoding loop against ``generate``'s own loop, in float32, bit for bit."""

import functools
from dataclasses import replace

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
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, GenerationMixin, LlamaConfig, LlamaForCausalLM

from prefix_distill.engine import decoding_loop, exactness, kv_buffer
from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.decoding import Decoding
from prefix_distill.engine.models import Model
from prefix_distill.engine.module_step import ModuleStep, crosses_window
from prefix_distill.engine.sampling import Request, Sampler, generate

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = LINEAR_ATTENTION | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
# model type → its own fields, and whether later steps can run module by module
FAMILIES = {
    "llama": ({}, True),
    "qwen3": ({}, True),
    "mixtral": (EXPERTS, True),
    "qwen3_next": (HYBRID, True),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        True,
    ),
    "gemma3_text": (WINDOW | {"sliding_window": 128}, True),  # wider than the texts
    "gemma2": (WINDOW | {"sliding_window": 128}, False),  # scales embeddings between modules
    "cohere": ({}, False),  # scales its logits after the output layer
    "falcon_h1": (
        MAMBA_HEADS | {"mamba_d_ssm": 64},
        False,  # prepares its own inputs
    ),
}


# An older transformers has the plain loop alone, which then is compared with itself.
pytestmark = pytest.mark.skipif(
    decoding_loop.find_obstacle(LlamaForCausalLM) is not None,
    reason="this transformers has no lean loop",
)


@pytest.fixture(autouse=True)
def buffers(monkeypatch):
    """Let the caches of tiny models use buffers."""
    monkeypatch.setattr(kv_buffer, "SMALL", 1)


def sampler(**changes) -> Sampler:
    given = {"eos": frozenset({257, *range(0, 260, 24)}), "pad": 256, "support": 260, "seed": 3}
    return Sampler(**given | {"record": True} | changes)


def requests() -> list[Request]:
    """Return prompts of several lengths, with two to four rows each."""
    rows = []
    for slot, (length, samples) in enumerate(((5, 2), (11, 4), (12, 2))):
        ids = tuple(range(slot, slot + length))
        rows += [Request(ids=ids, key=(slot, sample)) for sample in range(samples)]
    return rows


def with_plain_loop(model: Model) -> Model:
    return replace(model, decoding=replace(model.decoding, loop="plain"))


def count_calls(module: torch.nn.Module, model: Model) -> int:
    """Return how often sampling calls a module."""
    calls = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(model, requests(), 40, sampler())
    hook.remove()
    return len(calls)


@pytest.fixture
def module_steps(monkeypatch) -> list[int]:
    """Return a list that grows with every step that runs module by module."""
    steps = []
    run = ModuleStep.run

    def count(step, given):
        steps.append(1)
        return run(step, given)

    monkeypatch.setattr(ModuleStep, "run", count)
    return steps


@pytest.fixture(params=FAMILIES)
def family(request):
    """Return the model of a family, and whether its steps can run module by module."""
    shape, by_modules = FAMILIES[request.param]
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    net = random_net(text_config(request.param, **shape), seed=1)
    return make_model(net, shares_prompts=True), by_modules


def test_the_lean_loop_samples_what_the_plain_one_samples(family, module_steps):
    """Compare ids, ends and log-probabilities of both loops.

    Prompts have padding and are shared, rows leave the batch, and stretches continue; then prompts
    of one length have no padding. Decoding is random, greedy, and with warped logits.
    """
    model, by_modules = family
    plain = with_plain_loop(model)
    equal = [request for request in requests() if len(request.ids) == 11]
    for changes in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9}):
        for rows in (requests(), equal):
            drawn = generate(model, rows, 70, sampler(**changes))
            assert drawn == generate(plain, rows, 70, sampler(**changes))
    assert bool(module_steps) == by_modules == (not model.plain_because)


@pytest.mark.parametrize("window", [8, 30])
def test_the_lean_loop_crosses_windows_of_attention(window):
    shape = WINDOW | {"sliding_window": window}
    model = make_model(random_net(text_config("gemma3_text", **shape), seed=1))
    ends = sampler(eos=frozenset({257}))
    lean = generate(model, requests(), 70, ends)
    assert lean == generate(with_plain_loop(model), requests(), 70, ends)
    assert max(len(response.ids) for response in lean) > window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_loop_runs_adapters_and_decoders(dtype):
    wrapped = get_peft_model(tiny_net("llama"), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    net = wrapped.get_base_model().eval()
    model = make_decoder(make_model(net, adapter=wrapped, shares_prompts=True), dtype)
    lean = generate(model, requests(), 40, sampler())
    assert lean == generate(with_plain_loop(model), requests(), 40, sampler())
    assert not model.plain_because
    without = make_model(tiny_net("llama"), shares_prompts=True)
    assert lean != generate(make_decoder(without, dtype), requests(), 40, sampler())


def test_hooks_of_all_modules_see_every_step():
    model = make_model(tiny_net("llama"))
    plain = with_plain_loop(model)
    for name in ("", "model", "model.layers.1", "model.layers.0.mlp", "lm_head"):
        module = model.net.get_submodule(name)
        assert count_calls(module, model) == count_calls(module, plain) >= 40
    assert model.plain_because == {"LlamaForCausalLM has a hook", "LlamaModel has a hook"}


def test_later_steps_call_modules_and_not_the_network(monkeypatch):
    model = make_model(tiny_net("llama"))
    passes = []
    run = type(model.net).forward

    @functools.wraps(run)
    def forward(net, *args, **named):
        passes.append(1)
        return run(net, *args, **named)

    monkeypatch.setattr(type(model.net), "forward", forward)
    drawn = generate(model, requests(), 40, sampler(eos=frozenset({257})))
    assert max(len(response.ids) for response in drawn) == 40
    assert len(passes) == 4  # two stretches: the prefill, and the step that is recorded


def test_a_tensor_changed_between_two_modules_is_noticed(monkeypatch):
    """A network that changes hidden states in place needs its own step."""

    def double(module, given, output):
        output.mul_(2)

    net = tiny_net("llama")
    decoder = type(net.model)
    run = decoder.forward

    @functools.wraps(run)
    def forward(self, *args, **named):
        scale = self.layers[0].register_forward_hook(double)
        try:
            return run(self, *args, **named)
        finally:
            scale.remove()

    monkeypatch.setattr(decoder, "forward", forward)
    model = make_model(net)
    drawn = generate(model, requests(), 40, sampler())
    assert drawn == generate(with_plain_loop(model), requests(), 40, sampler())
    assert model.plain_because == {"LlamaDecoderLayer gets a tensor changed in place"}
    assert decoding_loop.describe_steps("the student", model) == [
        "the student samples every token with its network's own step: LlamaDecoderLayer gets a "
        "tensor changed in place"
    ]


def test_an_older_transformers_has_the_plain_loop_alone(monkeypatch):
    model = make_model(tiny_net("llama"))
    drawn = generate(model, requests(), 40, sampler())
    own = GenerationMixin.generate

    def older(self, input_ids=None, generation_config=None, logits_processor=None, **named):
        assert "custom_generate" not in named
        return own(
            self,
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            **named,
        )

    monkeypatch.setattr(GenerationMixin, "generate", older)
    decoding_loop.find_obstacle.cache_clear()
    try:
        assert generate(model, requests(), 40, sampler()) == drawn
    finally:
        decoding_loop.find_obstacle.cache_clear()
    assert model.plain_because == {"older of this transformers has no argument custom_generate"}


def test_a_wrong_lean_loop_gives_way_to_the_plain_one(monkeypatch):
    run = ModuleStep.run
    monkeypatch.setattr(ModuleStep, "run", lambda step, given: 2 * run(step, given))
    way = exactness.find_decoding(make_model(tiny_net("llama")))
    assert way == Decoding(loop="plain")
    assert way.restrictions("the student") == [
        "the student decodes with generate's own loop: the lean one changes its logits"
    ]


@pytest.mark.parametrize(
    ("name", "size", "crosses"),
    [
        ("sliding_window", 512, True),
        ("attention_chunk_size", 500, True),
        ("sliding_window", 4096, False),
        ("sliding_window", None, False),
        ("max_window_layers", 28, False),
        ("num_local_experts", 8, False),
    ],
)
def test_a_stretch_with_the_end_of_a_window_is_known(name, size, crosses):
    config = LlamaConfig(**{name: size})
    assert crosses_window(config, 490, 520) == crosses


@pytest.mark.parametrize("loop", ["lean", "plain"])
def test_the_output_layer_gets_contiguous_rows(loop):
    """Otherwise torch copies its weights once for every row of the prefill."""
    model = make_model(tiny_net("llama", vocabulary=4096))
    model = replace(model, decoding=replace(model.decoding, loop=loop))
    layer = model.net.lm_head
    run = layer.forward
    gaps = []

    def forward(hidden_BTD):
        gaps.append(not hidden_BTD.is_contiguous())
        return run(hidden_BTD)

    layer.forward = forward
    generate(model, requests(), 4, sampler())
    assert len(gaps) == 4 and not any(gaps)
