"""Shared real models: tiny random networks made in seconds, and the SmolLM2 pair for tests
marked ``real``."""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: two busy processes must not spin at barriers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start

TEMPLATE = (
    "{% for m in messages %}<u>{{ m.content }}{% if m.role == 'assistant' %}<e>{% endif %}{% "
    "endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer(eos: str = "<e>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and the specials <p> <e> <u> <a>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<p>", "<e>", "<u>", "<a>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<p>", eos_token=eos, chat_template=TEMPLATE
    )


def tiny_config(kind: str, vocabulary: int = 260, width: int = 32, layers: int = 2):
    """A network small enough for a test, of a real architecture."""
    common = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,
    )
    if kind == "llama":
        return LlamaConfig(
            **common, intermediate_size=2 * width, num_key_value_heads=2, tie_word_embeddings=False
        )
    if kind == "qwen3":
        return Qwen3Config(
            **common,
            intermediate_size=2 * width,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    if kind == "gemma3":
        return Gemma3TextConfig(
            **common,
            intermediate_size=2 * width,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=20.0,
        )
    if kind == "neox":
        return GPTNeoXConfig(**common, intermediate_size=4 * width)
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=257,
        )
    raise ValueError(kind)


def tiny_net(kind: str, seed: int = 0, scale: float = 1.0, **shape):
    """A random network whose logits are spread enough for its distribution to be far from
    uniform."""
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(tiny_config(kind, **shape))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() >= 2:
                p.copy_(
                    torch.randn_like(p) * scale * (0.2 if "embed" in name or "wte" in name else 0.3)
                )
    return net.eval()


def save_tiny(folder, kind: str = "llama", seed: int = 0, eos: str = "<e>", **shape):
    """Writes a loadable tiny model folder and returns its path as text."""
    net = tiny_net(kind, seed, **shape)
    net.generation_config = GenerationConfig(
        eos_token_id=257, pad_token_id=256, temperature=0.3, top_k=7, do_sample=True
    )
    net.save_pretrained(folder)
    byte_tokenizer(eos).save_pretrained(folder)
    return str(folder)


def pytest_collection_modifyitems(items):
    """The longest tests first, so that two workers end together."""
    longest = (
        "test_commands_run_in_order",
        "test_four_updates",
        "test_two_ranks_are_one",
        "test_two_kills",
        "test_a_comparison_goes_on",
        "test_gpus_starts_three_ranks",
    )
    items.sort(key=lambda item: not item.name.startswith(longest))


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(student, teacher): paths of two tiny Llamas of different size with one tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1), save_tiny(
        root / "teacher", seed=2, width=48, layers=3
    )


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A small JSONL data set of sums with answers; prompts of different lengths."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "question": f"{'what is ' if i % 3 == 0 else ''}{i}+{i * i}?",
            "answer": f"#### {i + i * i}",
        }
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def command(*arguments, **options):
    """Runs `prefix-distill …` in a process of its own; CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, "-m", "prefix_distill", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )


def invoke(*arguments):
    """Runs `prefix-distill …` in this process, as main() would: (exit code, stdout, stderr).
    Quicker than a process.

    As under ``python -W``, the command leaves it to pytest which warnings are errors.
    """
    import contextlib
    import io
    from unittest import mock

    from prefix_distill.cli import main as cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["prefix-distill", *map(str, arguments)])
    with argv, mock.patch.object(sys, "warnoptions", ["default"]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def last_json(text: str) -> dict:
    """The JSON document on the last line of stdout."""
    return json.loads(text.strip().splitlines()[-1])
