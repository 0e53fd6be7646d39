"""A network that is cast equals one that is loaded in that dtype."""

import pytest
import torch
from helpers import byte_tokenizer, invoke, make_model, random_net, text_config
from transformers import AutoModelForCausalLM

from prefix_distill.config import Adapter
from prefix_distill.engine import loading
from prefix_distill.engine.casting import cast
from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.masters import Masters

EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
CONFIGS = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": EXPERTS,
    "mamba2": MAMBA,
    "gpt2": {},
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    net = random_net(text_config(request.param, **CONFIGS[request.param]), seed=1)
    net.generation_config.eos_token_id = 257
    net.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_network_has_the_tensors_of_a_loaded_one(folder, dtype):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cast(net, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = dict(net.named_parameters()) | dict(net.named_buffers())
    theirs = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_an_exported_model_has_the_tensors_of_a_loaded_one(folder, tmp_path):
    code, _, err = invoke("export", folder, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert code == 0, err
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, tensor in loaded.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("rank", [None, 4])
def test_a_student_samples_in_bfloat16_like_a_loaded_model(pair, rank):
    """Positions far from the start differ most; a new adapter changes nothing."""
    student = loading.load_model(pair[0], device=torch.device("cpu"), dtype=torch.float32)
    if rank is not None:
        student, _ = loading.add_adapter(student, Adapter(rank=rank), 0)
    decoding = make_decoder(student, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16)
    ids = torch.arange(240)[None]
    with torch.no_grad():
        assert torch.equal(decoding.net(ids).logits, loaded(ids).logits)
        rounded = student.net.to(torch.bfloat16)
        assert not torch.equal(rounded(ids).logits, loaded(ids).logits)


def test_a_first_parameter_that_stays_in_float32_hides_neither_dtype_nor_copy(monkeypatch):
    """A tower that the architecture keeps in float32 may come before the embedding."""
    net = random_net(text_config("llama"))
    monkeypatch.setattr(type(net), "_keep_in_fp32_modules_strict", {"embed_tokens"})
    student = make_model(net)
    masters = Masters(student, torch.bfloat16)
    sampler = masters.sampler
    assert next(sampler.net.parameters()).dtype == torch.float32
    with torch.no_grad():
        net.lm_head.weight.mul_(2)
    masters.refresh()
    assert torch.equal(sampler.net.lm_head.weight, net.lm_head.weight.bfloat16())
