"""State that a network keeps between calls, and windows that count from the end of the prompt."""

import model_configs
import pytest
import torch
import transformers
from helpers import make_model, random_net, text_config
from model_configs import ModelClass

from prefix_distill.engine import exactness
from prefix_distill.engine.decoding import FASTEST
from prefix_distill.engine.kept_state import find_blanks, forget_state
from prefix_distill.engine.models import Model
from prefix_distill.engine.sampling import Request, Sampler, generate
from prefix_distill.engine.sharing import check_sharing
from prefix_distill.errors import UserError


def make_tiny(name: str, model_type: str) -> Model:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model_class = ModelClass(name=name, model_type=model_type, multimodal=True)
    net, _ = model_configs.build(model_class, seed=1)
    return make_model(net.requires_grad_(False), blanks=find_blanks(net))


def test_rows_of_one_batch_do_not_depend_on_an_earlier_batch():
    """Qwen2-VL keeps the offset of every row's positions for the next call."""
    model = make_tiny("Qwen2VLForConditionalGeneration", "qwen2_vl")
    model.shares_prompts = check_sharing(model).is_exact
    model.decoding = exactness.find_decoding(model)
    assert model.shares_prompts and model.decoding == FASTEST
    sampler = Sampler(eos=frozenset({257}), pad=256, support=256, seed=3)
    requests = []
    for slot, length in enumerate((5, 5, 9)):
        for sample in range(2):
            requests.append(Request(ids=tuple(range(40, 40 + length)), key=(slot, sample)))
    together = generate(model, requests, 40, sampler)
    for request, response in zip(requests, together, strict=True):
        assert generate(model, [request], 40, sampler) == [response]


def test_only_tensors_in_attributes_that_were_none_are_dropped():
    class Keeping(torch.nn.Module):
        def __init__(self, weight=None):
            super().__init__()
            self.state = None
            self.constant = torch.ones(2)
            self.bias = None
            self.sinks = weight

    weight = torch.nn.Parameter(torch.ones(2))
    net = torch.nn.Sequential(Keeping(), Keeping(weight), torch.nn.Linear(2, 2, bias=False))
    blanks = find_blanks(net)
    assert {"state", "bias"} < blanks[Keeping] and "sinks" not in blanks[Keeping]
    net[0].state = torch.zeros(3)
    net[0].bias = "a text"
    forget_state(net, blanks)
    assert net[0].state is None and net[0].bias == "a text" and net[0].constant.sum() == 2
    assert net[1].sinks is weight


def test_a_window_that_counts_from_the_end_of_the_prompt_is_refused():
    """Unlimited-OCR attends to the whole prompt, and to the last 8 tokens of its response."""
    model = make_tiny("UnlimitedOcrForConditionalGeneration", "unlimited_ocr")
    with pytest.raises(UserError, match="beyond its window of 8 tokens, hidden states differ by"):
        exactness.check_window(model)


def test_a_window_that_moves_over_prompt_and_response_is_exact():
    net = random_net(text_config("mistral", sliding_window=16))
    model = make_model(net)
    assert exactness.find_decoding(model) == FASTEST
    exactness.check_window(model)
