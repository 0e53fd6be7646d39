"""Test which names of transformers are used for the KV cache and for activation checkpointing."""

import inspect
import logging
import warnings
from dataclasses import dataclass

import pytest
import torch
from helpers import tiny_net
from transformers import GenerationMixin

from prefix_distill.engine import transformers_names as names
from prefix_distill.engine.models import Model, with_checkpointing
from prefix_distill.engine.sampling import Request, Sampler, generate
from prefix_distill.maths.flops import STRETCH

KINDS = ("llama", "qwen3", "gemma3", "neox", "gpt2")


class Mute:
    """A network without layers that records the calls of its methods."""

    def __init__(self):
        self.calls = []

    def note(self, name, settings):
        self.calls.append((name, settings))


class OldNet(Mute):
    def gradient_checkpointing_enable(self, settings=None):
        self.note("gradient", settings)


class NewNet(Mute):
    def activation_checkpointing_enable(self, settings=None):
        self.note("activation", settings)


class BothNet(OldNet, NewNet):
    pass


@dataclass
class OldOutput:
    past_key_values: object = None


@dataclass
class NewOutput:
    cache: object = None


class BothOutput(NewOutput):
    @property
    def past_key_values(self):
        raise AssertionError("the old name was read")


def old_forward(input_ids, past_key_values=None, use_cache=None):
    """The signature of transformers 5.0."""


def new_forward(input_ids, cache=None, use_cache=None, **kwargs):
    """The signature of transformers 5.24."""


def both_forward(input_ids, past_key_values=None, cache=None):
    """A signature that still has the old name."""


def test_the_cache_argument_is_the_one_that_the_signature_lists():
    assert names.name_cache_argument(old_forward) == "past_key_values"
    assert names.name_cache_argument(new_forward) == "cache"
    assert names.name_cache_argument(both_forward) == "cache"


def test_a_forward_that_forwards_its_arguments_uses_the_name_of_generate():
    def pass_on(*args, **kwargs):
        return new_forward(*args, **kwargs)

    assert names.name_cache_argument(pass_on) == names.name_generate_cache_argument()


def test_the_cache_argument_of_generate_is_the_one_that_its_preparation_lists():
    assert names.name_generate_cache_argument(old_forward) == "past_key_values"
    assert names.name_generate_cache_argument(new_forward) == "cache"
    listed = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert names.name_generate_cache_argument() in listed


@pytest.mark.parametrize("output", [OldOutput, NewOutput, BothOutput])
def test_the_cache_of_an_output_is_read_by_the_name_it_has(output):
    cache = object()
    assert names.read_cache(output(cache)) is cache


def test_an_output_without_a_cache_field_is_named():
    with pytest.raises(AttributeError, match="object has none of cache, past_key_values"):
        names.read_cache(object())


@pytest.mark.parametrize(
    ("net", "method"), [(OldNet, "gradient"), (NewNet, "activation"), (BothNet, "activation")]
)
def test_checkpointing_is_enabled_by_the_newest_method(net, method):
    own = net()
    names.enable_checkpointing(own)
    assert own.calls == [(method, {"use_reentrant": False})]


@pytest.fixture
def silence():
    """Fail the test if Python or transformers' logger warns."""
    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, listener = logging.getLogger("transformers"), Listener(logging.WARNING)
    level = logger.level
    logging.Logger.warning_once.cache_clear()  # log again what an earlier test logged
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    logger.setLevel(level)
    logger.removeHandler(listener)
    assert said + [str(warning.message) for warning in caught] == []


@pytest.fixture(params=KINDS)
def model(request):
    """Return a tiny model of the installed transformers."""
    return Model(
        name=request.param,
        net=tiny_net(request.param),
        tokenizer=None,
        generation_config=None,
        eos=frozenset({257}),
    )


def test_the_installed_forward_continues_a_cache(model, silence):
    ids = torch.arange(12).view(2, 6) + 65
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model.trunk(ids)
        first, cache = model.trunk_cached(ids[:, :4], mask[:, :4])
        second, cache = model.trunk_cached(ids[:, 4:], mask, cache)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)


def test_the_installed_forward_with_a_head_takes_the_cache(model, silence):
    ids = torch.arange(6).view(1, 6) + 65
    name = names.name_cache_argument(model.net.forward)
    with torch.no_grad():
        whole = model.net(input_ids=ids).logits
        first = model.net(input_ids=ids[:, :4], use_cache=True)
        cache = names.read_cache(first)
        second = model.net(input_ids=ids[:, 4:], use_cache=True, **{name: cache})
    assert names.read_cache(second).get_seq_length() == 6
    torch.testing.assert_close(second.logits, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_the_installed_generate_takes_and_returns_the_cache(model, silence):
    """Call generate three times, each time with the cache of the previous call."""
    requests = [Request(ids=(65, 66, 67), key=(0, row)) for row in range(2)]
    sampler = Sampler(eos=frozenset({257}), pad=256, support=256, seed=1, temperature=0)
    first, second = generate(model, requests, 2 * STRETCH + 3, sampler)
    assert len(first.ids) == 2 * STRETCH + 3 and first == second


def test_the_installed_checkpointing_is_enabled(model, silence):
    recomputing = with_checkpointing(model)
    layers = [m for m in model.net.modules() if getattr(m, "gradient_checkpointing", False)]
    assert recomputing.recomputes and len(layers) >= model.config.num_hidden_layers
