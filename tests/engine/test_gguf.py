"""Test training and evaluation of models in GGUF files."""

import json

import pytest
import torch
from helpers import TEMPLATE, byte_tokenizer, invoke, tiny_net

from prefix_distill.engine.loading import load_model
from prefix_distill.prompts.prompt import Prompt
from prefix_distill.prompts.rendering import Renderer, Style

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
pytest.importorskip("accelerate", reason="the gguf extra is not installed")

# the names of a Llama's weights in transformers and in a GGUF file
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
EXTRA = "<|endoftext|>"  # the token that transformers adds to a tokenizer of GPT-2's kind


def write_gguf(file, template: str | None = TEMPLATE) -> str:
    """Write a tiny Llama with a byte-level tokenizer, which has no <|endoftext|>, to a file."""
    net = tiny_net("llama", seed=4)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(net.config.max_position_embeddings)
    writer.add_embedding_length(net.config.hidden_size)
    writer.add_block_count(net.config.num_hidden_layers)
    writer.add_feed_forward_length(net.config.intermediate_size)
    writer.add_head_count(net.config.num_attention_heads)
    writer.add_head_count_kv(net.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(net.config.rms_norm_eps)
    writer.add_rope_dimension_count(net.config.head_dim)
    writer.add_vocab_size(net.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = byte_tokenizer().convert_ids_to_tokens(range(net.config.vocab_size))
    control = gguf.TokenType.CONTROL
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [control] * (len(tokens) - 256))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(256)
    if template is not None:
        writer.add_chat_template(template)
    weights = net.state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(net.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    for theirs, ours in names.items():
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_prompts_have_the_chat_template_of_the_file(tmp_path, template):
    model = load_model(
        write_gguf(tmp_path / "tiny.gguf", template=template),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    prompt = Prompt(index=0, messages=({"role": "user", "content": "hi"},), answer=None)
    wanted = "<u>hi<a>" if template else "hi"
    assert Renderer(model=model, style=Style()).render(prompt).text == wanted


@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_a_gguf_file_is_trained_and_its_extra_token_is_left_out(tmp_path, pair, questions, suffix):
    student = write_gguf(tmp_path / f"tiny.{suffix}")
    out = tmp_path / "run"
    code, _, err = invoke(
        *["run", "--student", student, "--teacher", pair[1], "--dataset", questions],
        *["--steps", "1", "--prefix", "8", "--max-new-tokens", "12", "--batch-size", "2"],
        *["--problems", "2", "--kl-prompts", "2", "--check-samples", "2", "--out", out],
    )
    assert code == 0, err
    assert f"not used: '{EXTRA}' (id 260)" in err
    assert json.loads((out / "run.json").read_text())["result"]["evaluations"]
    code, _, err = invoke(
        *["eval", "--model", out / "model", "--dataset", questions],
        *["--max-new-tokens", "8", "--problems", "2", "--out", tmp_path / "e.jsonl"],
    )
    assert code == 0, err


def test_a_template_with_the_extra_token_of_a_gguf_file_is_refused(tmp_path, questions):
    model = write_gguf(tmp_path / "tiny.gguf", template=TEMPLATE + EXTRA)
    code, _, err = invoke(
        *["eval", "--model", model, "--dataset", questions, "--out", tmp_path / "e.jsonl"]
    )
    assert code == 2
    assert f"prompt 0 contains the token '{EXTRA}' (id 260)" in err
