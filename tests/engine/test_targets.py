"""Test which weights of a network get a LoRA adapter, and that merged weights equal the adapter.

Adapter, merged weights, peft and our loader must give the same logits on every architecture.
"""

import functools
import json
import re
import shutil

import model_configs
import peft
import pytest
import torch
import transformers
from helpers import SIZES, assert_same, byte_tokenizer, invoke, prepared, trained, update_gradient
from model_configs import ModelClass
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from prefix_distill.config import Adapter
from prefix_distill.engine import adapter, adapter_check, loading, saving, targets
from prefix_distill.errors import UserError

IDS = torch.arange(20, 44)[None]
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 32}
DEEPSEEK = EXPERTS | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}
MAMBA = {
    "state_size": 16,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 1,
    "expand": 2,
    "chunk_size": 16,
}
ZAMBA = {
    "num_hidden_layers": 3,
    "hybrid_layer_ids": [1, 2],
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "mamba_d_state": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_expand": 2,
    "adapter_rank": 4,
    "num_mem_blocks": 1,
    "attention_head_dim": 16,
    "chunk_size": 16,
}
ALL, TIED = "all-linear", {"tie_word_embeddings": True}


def save_random(folder, kind="llama", **shape) -> str:
    """Save a random network with spread logits and a tokenizer, and return its path."""
    settings = {k: v for k, v in (SIZES | shape).items() if v is not None}
    torch.manual_seed(1)
    net = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() >= 2 and "conv" not in name:
                p.copy_(0.3 * torch.randn_like(p))
    net.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=256)
    net.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def load(path):
    return loading.load_model(str(path), device=torch.device("cpu"), dtype=torch.float32)


def adapted(path, wanted=ALL, rank=4):
    """Return a model with a random adapter, and its targets."""
    model, chosen = loading.add_adapter(load(path), Adapter(rank=rank, targets=wanted), 0)
    stir(model)
    return model, chosen


@torch.no_grad()
def stir(model):
    """Set the adapter to random numbers."""
    generator = torch.Generator().manual_seed(5)
    for p in model.trainable.values():
        p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def logits(net):
    with torch.no_grad():
        return net(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize(
    "kind, wanted, shape, counts",
    [
        ("qwen3_moe", ALL, EXPERTS, "8 linear layers, 4 expert tensors and 2 routers"),
        ("mixtral", ALL, EXPERTS, "8 linear layers, 4 expert tensors and 2 routers"),
        ("gpt_oss", ALL, EXPERTS, "8 linear layers, 4 expert tensors and 2 routers"),
        ("granitemoe", ALL, EXPERTS, "8 linear layers, 4 expert tensors and 2 routers"),
        ("jetmoe", ALL, EXPERTS | {"kv_channels": 8}, "6 linear layers and 8 expert tensors"),
        ("phimoe", ALL, EXPERTS, "10 linear layers and 4 expert tensors"),
        # the names of shared experts and dense layers are those of experts in peft's table
        ("qwen2_moe", ALL, SHARED, "16 linear layers, 4 expert tensors and 2 routers"),
        ("deepseek_v3", ALL, DEEPSEEK, "16 linear layers, 2 expert tensors and 1 router"),
        ("deepseek_v3", "shared_experts", DEEPSEEK, "3 linear layers"),
        ("qwen3_moe", "gate", EXPERTS, "2 routers"),
        ("qwen3_moe", "experts", EXPERTS, "4 expert tensors"),
        ("qwen3_moe", "experts.down_proj", EXPERTS, "2 expert tensors"),
        ("gpt_oss", "router,gate_up_proj_bias", EXPERTS, "2 routers and 2 other matrices"),
        ("gpt2", ALL, {}, "8 linear layers"),
        ("gpt2", "c_attn,wte,wpe", {}, "2 linear layers and 2 embeddings"),
        ("gemma3_text", "embed_tokens", TIED, "1 embedding"),
        ("llama", "q_proj,embed_tokens", TIED, "2 linear layers and 1 embedding"),
        ("llama", "all-linear,embed_tokens", {}, "14 linear layers and 1 embedding"),
        ("opt", "embed_tokens", TIED | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "1 embedding"),
        ("mamba2", ALL, MAMBA, "2 linear layers"),
        ("zamba2", ALL, ZAMBA, "8 linear layers"),
    ],
)
def test_adapter_and_merged_weights_are_equal(kind, wanted, shape, counts, tmp_path):
    base = save_random(tmp_path / "base", kind, **shape)
    model, chosen = adapted(base, wanted)
    assert chosen.describe() == counts
    expected = logits(model.net)
    assert (expected - logits(plain(base))).abs().max() > 0.1
    saving.save_model(model, tmp_path / "adapter")
    saving.save_merged_model(model, tmp_path / "merged")
    for net in (
        plain(tmp_path / "merged"),
        peft.PeftModel.from_pretrained(plain(base), tmp_path / "adapter").eval(),
        load(tmp_path / "adapter").net,
    ):
        torch.testing.assert_close(logits(net), expected, rtol=1e-4, atol=1e-3)
    with adapter.disable(model.net):
        torch.testing.assert_close(logits(model.net), logits(plain(base)))


def test_merged_weights_of_a_tied_embedding_leave_the_head_alone(tmp_path):
    base = save_random(tmp_path / "base", **TIED)
    model, _ = adapted(base, "embed_tokens")
    saving.save_model(model, tmp_path / "adapter")
    saving.save_merged_model(model, tmp_path / "merged")
    saving.save_model(load(tmp_path / "adapter"), tmp_path / "again")
    for name in ("merged", "again"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        weights = load_file(tmp_path / name / "model.safetensors")
        assert config["tie_word_embeddings"] is False
        head = plain(base).lm_head.weight
        assert torch.equal(weights["lm_head.weight"], head)
        assert not torch.equal(weights["model.embed_tokens.weight"], head)
    assert model.net.config.tie_word_embeddings  # only the files say otherwise


def test_a_router_and_experts_learn(tmp_path, questions):
    """Run a mixture of experts from start to end, with a merged model and the adapter."""
    student = save_random(tmp_path / "s", "qwen2_moe", **SHARED)
    run = prepared(
        (student, student), questions, adapter__rank=2, adapter__merge=True, schedule__lr=1e-2
    )
    before = {name: p.detach().clone() for name, p in run.pair.student.trainable.items()}
    trained(run, tmp_path / "run")
    assert before.keys() == run.pair.student.trainable.keys()
    expected = logits(run.pair.student.net)
    for net in (
        plain(tmp_path / "run/model"),
        peft.PeftModel.from_pretrained(plain(student), tmp_path / "run/adapter").eval(),
    ):
        torch.testing.assert_close(logits(net), expected, rtol=1e-4, atol=1e-4)


def test_recomputed_layers_give_the_same_gradient(tmp_path, questions):
    student = save_random(tmp_path / "s", "qwen3_moe", **EXPERTS)
    gradients = []
    for recomputes in (False, True):
        run = prepared(
            (student, student),
            questions,
            adapter__rank=2,
            divergence__name="forward-kl",
            rollout__temperature=0.7,
            train__gradient_checkpointing=recomputes,
        )
        stir(run.pair.student)
        gradients.append(update_gradient(run)[0])
    assert {name.split(".")[4] for name in gradients[0]} >= {"q_proj", "experts", "gate"}
    assert_same(gradients[1], gradients[0], 1e-5)


def test_packed_weights_are_not_merged(tmp_path, questions, monkeypatch):
    """A model whose files are quantized is refused with --lora-merge before anything runs."""
    student = save_random(tmp_path / "s")
    monkeypatch.setattr(adapter, "FULL_DTYPES", ())
    with pytest.raises(UserError, match="into the quantized weight model"):
        prepared((student, student), questions, adapter__rank=2, adapter__merge=True)


@pytest.mark.parametrize(
    "kind, wanted, shape, message",
    [
        ("llama", "lm_head", {}, "lm_head.weight gets no adapter, because the loss computes"),
        ("llama", "q_proj,lm_head", TIED, "--lora-targets lm_head: lm_head.weight gets no"),
        ("llama", "norm", {}, "no matrix of LlamaForCausalLM has this name; use all-linear, or"),
        ("llama", "q_proj,", {}, "--lora-targets q_proj,: expected names separated"),
        ("qwen3_moe", "gate_proj", EXPERTS, "or names such as q_proj, k_proj"),
        ("mamba2", "out_proj", MAMBA, "peft refuses layers called out_proj in a model of type"),
        ("mamba2", "conv1d", MAMBA, "or names such as in_proj"),
        ("zamba2", "self_attn", ZAMBA, "several layers share this tensor"),
        # its layer adds an offset to positions that it computes itself
        (
            "opt",
            "embed_positions",
            {"ffn_dim": 64, "word_embed_proj_dim": 32},
            "its layer does not run with an adapter",
        ),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(kind, wanted, shape, message, tmp_path):
    model = load(save_random(tmp_path / "base", kind, **shape))
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        loading.add_adapter(model, Adapter(rank=4, targets=wanted), 0)
    assert "\n" not in str(refusal.value)


class Shortcut(torch.nn.Module):
    """An MLP that reads a weight of its own layer without calling the layer."""

    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp
        self.extra = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.inner(x) + x @ self.inner.up_proj.weight.T[:, :32] + 0 * self.extra(x)


class Tower(torch.nn.Module):
    """Layers that no text token reaches."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(32, 320)


def test_all_linear_leaves_out_what_it_cannot_merge(tmp_path):
    """A weight that the network also reads directly, and layers that text does not reach."""
    model = load(save_random(tmp_path / "base"))
    for layer in model.net.model.layers:
        layer.mlp = Shortcut(layer.mlp)
    model.net.model.vision = Tower()
    model.net.eval()
    model, chosen = loading.add_adapter(model, Adapter(rank=4), 0)
    names = set(adapter.adapted_layers(model.net))
    assert not [name for name in names if "up_proj" in name or "vision" in name]
    assert "model.layers.1.mlp.inner.down_proj.weight" in names
    lines = chosen.describe_obstacles()
    assert len(lines) == 2
    assert "no adapter on model.vision.q_proj.weight: a forward pass over text" in lines[0]
    assert (
        "model.layers.*.mlp.inner.up_proj.weight: the network with the adapter differs"
        in (lines[1])
    )
    # layers that text does not reach do not count
    matrices = [p for name, p in model.net.named_parameters() if "base_layer" in name]
    covered = sum(p.numel() for p in matrices)
    assert chosen.covered == pytest.approx(covered / (covered + 2 * 64 * 32))


def test_all_linear_leaves_out_a_module_that_is_called_by_keyword(tmp_path):
    """peft replaces a tensor in a wrapper that expects the input as its first argument."""

    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrices = torch.nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, *, states):
            return states @ self.matrices[0]

    class ByKeyword(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stacked = Stacked()

        def forward(self, x):
            return self.stacked(states=x)

    model = load(save_random(tmp_path / "base"))
    model.net.model.layers[0].mlp = ByKeyword()
    model, chosen = loading.add_adapter(model, Adapter(rank=4), 0)
    [line] = chosen.describe_obstacles()
    assert "mlp.stacked.matrices: its layer does not run with an adapter" in line


def test_all_linear_leaves_out_a_layer_whose_adapter_peft_would_not_find_again(
    tmp_path, monkeypatch
):
    """Of some model types, peft renames the tensors of a file that it loads."""
    peft = pytest.importorskip("peft")
    plain = peft.set_peft_model_state_dict

    def renaming(model, state, **named):
        renamed = {}
        for key, value in state.items():
            renamed[key.replace("up_proj", "up_proj.weight")] = value
        return plain(model, renamed, **named)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", renaming)
    model, chosen = loading.add_adapter(load(save_random(tmp_path / "base")), Adapter(rank=4), 0)
    assert not [name for name in adapter.adapted_layers(model.net) if "up_proj" in name]
    [line] = chosen.describe_obstacles()
    assert "mlp.up_proj.weight: peft loads a saved adapter of it as" in line


def test_modules_of_experts_without_a_token_get_an_adapter():
    """Of a list of experts, a short text calls a few only."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.experts[1](x)

    net = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES))
    net.model.layers[0].mlp = Experts()
    chosen = targets.find_targets(net, "experts", IDS)
    assert len(chosen.sites) == 3 and not chosen.obstacles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_changes_nothing(tmp_path, dtype):
    model = loading.load_model(
        save_random(tmp_path / "base", "mixtral", **EXPERTS),
        device=torch.device("cpu"),
        dtype=dtype,
    )
    before = {name: p.clone() for name, p in model.net.state_dict().items()}
    model, chosen = loading.add_adapter(model, Adapter(rank=4), 0)
    after = adapter.merge_weights(model.net)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    assert (
        adapter_check.find_fault(model.net, chosen.sites, functools.partial(torch.ones, 1, 2, 3))
        is None
    )


def test_a_note_tells_what_has_an_adapter(tmp_path, questions):
    student = save_random(tmp_path / "s", "mamba2", **MAMBA)
    run = prepared((student, student), questions, adapter__rank=2)
    notes = "\n".join(run.notes.lines)
    assert "LoRA of rank 2 on all-linear: 2 linear layers, which hold" in notes
    assert "no adapter on backbone.layers.*.mixer.out_proj.weight: peft refuses" in notes


# Adapters as input


def peft_adapter(base, folder, **settings):
    """Write a random adapter as plain peft does, and return peft's logits."""
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    wrapper = peft.get_peft_model(plain(base), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in wrapper.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    wrapper.save_pretrained(folder)
    return logits(wrapper)


@pytest.mark.parametrize(
    "settings, tied",
    [
        ({"target_modules": ["q_proj"], "use_rslora": True}, False),
        ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, False),
        ({"target_modules": ["q_proj"], "bias": "all"}, False),
        ({"target_modules": ["q_proj"], "lora_bias": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 21]}, False),
    ],
)
def test_adapters_of_other_programs_are_merged_exactly(settings, tied, tmp_path):
    """Load an adapter, export it merged, and compare with peft."""
    base = save_random(tmp_path / "base", tie_word_embeddings=tied, attention_bias=True)
    expected = peft_adapter(base, tmp_path / "adapter", **settings)
    code, _, err = invoke("export", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code == 0, err
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-3)


def test_an_adapter_with_more_tokens_resizes_the_vocabulary(tmp_path):
    base = save_random(tmp_path / "base")
    net = plain(base)
    net.resize_token_embeddings(264)
    wrapper = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"], r=2))
    wrapper.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = load(tmp_path / "adapter").net
    assert len(loaded.lm_head.weight) == 264
    torch.testing.assert_close(logits(loaded), logits(net.eval()))
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "lm_head" not in k}
    save_file(weights, file)
    with pytest.raises(UserError, match="trained with more tokens, but holds only embedding or"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"num_hidden_layers": 1}, "has no place in the base model"),
        ({"num_hidden_layers": 3}, "is not in adapter_model.safetensors"),
        ({"hidden_size": 64}, "size mismatch"),
        ({"kind": "gpt2"}, "not found in the base model"),
    ],
)
def test_an_adapter_of_another_network_is_refused(shape, message, tmp_path):
    base = save_random(tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    shutil.rmtree(base)
    save_random(base, **shape)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "adapter")


def test_an_adapter_of_virtual_tokens_is_refused(tmp_path):
    base = save_random(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(plain(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="PROMPT_TUNING is a prefix of vectors"):
        load(tmp_path / "adapter")


def test_the_tokens_that_end_a_turn_are_those_of_the_adapter(tmp_path):
    base = save_random(tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    byte_tokenizer("<u>").save_pretrained(tmp_path / "adapter")
    GenerationConfig(eos_token_id=258).save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter").eos == {258}
    assert load(base).eos == {257}


def test_an_adapter_beside_the_weights_of_a_model_is_left_out(questions, tmp_path):
    """Merging leaves it behind, and transformers would add it to the merged weights once more."""
    base = save_random(tmp_path / "base")
    plain = logits(load(base).net)
    expected = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert not torch.allclose(plain, expected, atol=1e-2)  # else nothing could be added wrongly
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, base)
    torch.testing.assert_close(logits(load(base).net), plain, rtol=0, atol=0)
    said = "the weights in model.safetensors are used as they are, and the adapter (adapter_config"
    code, _, err = invoke("export", base, "--out", tmp_path / "out")
    assert code == 0 and said in err
    assert not (tmp_path / "out/adapter_config.json").exists()
    torch.testing.assert_close(logits(load(tmp_path / "out").net), plain, rtol=0, atol=0)
    teacher = save_random(tmp_path / "teacher", seed=5)
    arguments = ["run", "--student", base, "--teacher", teacher, "--dataset", questions]
    arguments += ["--prefix", 4, "--steps", 1, "--batch-size", 2, "--max-new-tokens", 8]
    arguments += ["--problems", 2, "--kl-prompts", 2, "--check-samples", 0, "--save-every", 1]
    code, _, err = invoke(*arguments, "--out", tmp_path / "run")
    assert code == 0 and f"warning: model {base}: {said}" in err
    assert (tmp_path / "run/model/model.safetensors").is_file()
    code, _, err = invoke("run", "--resume", "--out", tmp_path / "run", "--steps", 2)
    assert code == 0, err


def test_a_config_without_weights_makes_no_model_of_an_adapter(tmp_path):
    base = save_random(tmp_path / "base")
    expected = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copy(f"{base}/config.json", tmp_path / "adapter")
    torch.testing.assert_close(
        logits(load(tmp_path / "adapter").net), expected, rtol=1e-4, atol=1e-4
    )


def test_extrapolation_refuses_an_adapter(tmp_path):
    """The point W + 2k·Δ of the merged weights has no factors of the same rank."""
    for flag in (["--extrapolate", "effopd"], ["--extrapolate-diagnostics"]):
        code, _, err = invoke("run", "--lora", 4, *flag, "--out", tmp_path / "run")
        assert code == 2 and "of rank up to 2·4, which no factors" in err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_a_merged_model_is_saved_where_transformers_asks_for_shapes(tmp_path):
    """On saving, Qwen3-VL-MoE stacks the experts by the shapes of the network's parameters."""
    model_class = ModelClass(
        name="Qwen3VLMoeForConditionalGeneration", model_type="qwen3_vl_moe", multimodal=True
    )
    if not hasattr(transformers, model_class.name):
        pytest.skip(f"this transformers has no {model_class.name}")
    net, config = model_configs.build(model_class, seed=1)
    net.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=256)
    net.save_pretrained(tmp_path / "base")
    config.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = adapted(tmp_path / "base")
    before = logits(model.net)
    saving.save_merged_model(model, tmp_path / "merged")
    torch.testing.assert_close(logits(model.net), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(load(tmp_path / "merged").net), before, rtol=0, atol=1e-4)
