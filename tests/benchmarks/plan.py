"""Compare the forecast of `prefix-distill plan` with real runs: peak resident memory and FLOPs.

    python tests/benchmarks/plan.py [--keep] [--quick]

The networks have 58 to 93 M random parameters and run two steps each in separate processes. The
measured memory is VmHWM minus the resident memory after a tiny run of the same kind (interpreter,
libraries and their buffers). glibc keeps freed memory for reuse, so a process holds more than its
tensors. ``exact_malloc`` is the same run with MALLOC_MMAP_THRESHOLD_=65536, which makes glibc
return larger blocks at once.

``--quick`` makes one run with short answers and writes nothing.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

V, PROMPT = 32_000, 100
RUNS = {  # (networks, settings)
    "llama, prefix 64": (
        ("llama", "llama-wide"),
        {"schedule.prefix": "64", "train.micro_batch_size": 8},
    ),
    "llama, prefix 64, one micro-batch": (
        ("llama", "llama-wide"),
        {"schedule.prefix": "64", "train.micro_batch_size": 16},
    ),
    "llama, prefix 128, gradient checkpointing": (
        ("llama", "llama-wide"),
        {"schedule.prefix": "128", "train.gradient_checkpointing": True},
    ),
    "llama, prefix 64, LoRA of rank 16": (
        ("llama", "llama-wide"),
        {"schedule.prefix": "64", "adapter.rank": 16},
    ),
    "gemma, prefix 64": (
        ("gemma", "gemma"),
        {"schedule.prefix": "64", "train.micro_batch_size": 4},
    ),
}
QUICK_RUNS = {
    "llama, prefix 8": (
        ("llama", "llama"),
        {
            "schedule.prefix": "8",
            "rollout.max_new_tokens": 16,
            "evaluate.problems": 1,
            "evaluate.kl_prompts": 1,
        },
    )
}


def networks(folder: Path, wanted: set[str]) -> None:
    """Write the ``wanted`` networks with a tokenizer of V words, and prompts of PROMPT words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    common: dict[str, Any] = {
        "vocab_size": V,
        "eos_token_id": V - 1,
        "pad_token_id": V - 2,
        "bos_token_id": None,
        "max_position_embeddings": 4096,
    }
    for name, config in {
        "llama": LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            **common,
        ),
        "llama-wide": LlamaConfig(
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=10,
            num_attention_heads=10,
            num_key_value_heads=5,
            **common,
        ),
        "gemma": Gemma3TextConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=128,
            sliding_window=128,
            final_logit_softcapping=30.0,
            **common,
        ),
    }.items():
        if name not in wanted:
            continue
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config)
        net.save_pretrained(folder / name)
        words = Tokenizer(
            models.WordLevel(
                {**{f"w{i}": i for i in range(V - 2)}, "<p>": V - 2, "<e>": V - 1}, unk_token="w0"
            )
        )
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.add_special_tokens(["<p>", "<e>"])
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<p>", eos_token="<e>"
        ).save_pretrained(folder / name)
    draw = random.Random(0)
    rows = [
        {"question": " ".join(f"w{draw.randrange(V - 2)}" for _ in range(PROMPT)), "answer": "1"}
        for _ in range(30)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, name: str) -> dict:
    (student, teacher), own = (RUNS | QUICK_RUNS)[name]
    return {
        "models.student": str(folder / student),
        "models.teacher": str(folder / teacher),
        "data.dataset": str(folder / "prompts.jsonl"),
        "data.template": "plain",
        "train.steps": 2,
        "train.batch_size": 4,
        "train.micro_batch_size": 8,
        "rollout.max_new_tokens": 128,
        "evaluate.problems": 4,
        "evaluate.kl_prompts": 4,
        "evaluate.tail_every": 0,
        "checkpoint.save_every": 0,
        "runtime.dtype": "float32",
        "runtime.device": "cpu",
        **own,
    }


def run(folder: Path, name: str) -> dict:
    """Measure one run in this process.

    Return its peak resident bytes minus those before it, the total of its ledger, and the forecast.
    """
    import torch
    import transformers

    from prefix_distill import config as configuration
    from prefix_distill.planning import plan
    from prefix_distill.training import prepare as preflight
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.session import Session

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def done(values: dict) -> dict:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            made = RunFolder(Path(out) / "run")
            prepared = preflight.prepare(
                configuration.build(values | {"checkpoint.out": str(made.path)})
            )
            made.path.mkdir()
            made.create(configuration.as_dict(prepared.config), {})
            return Session(prepared, made, measure.Silent()).train()

    own = settings(folder, name)
    tiny = {
        "data.dataset": None,
        "models.student": None,
        "models.teacher": None,
        "rollout.max_new_tokens": 8,
        "schedule.prefix": "8",
    }
    done({k: v for k, v in (own | tiny).items() if v is not None})
    before = measure.reset_peak()
    result = done(own)
    peak = measure.memory("VmHWM") - before
    planned = plan.plan(configuration.build(own), prefixes=own["schedule.prefix"])["prefixes"][0]
    return {
        "resident": peak,
        "forecast": planned["memory"]["total"],
        "set_by": planned["memory"]["set_by"],
        "flops": result["flops"]["useful"],
        "flops_forecast": planned["flops_total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one small run; write nothing")
    parser.add_argument("--keep", action="store_true", help="write results/plan.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick and given.keep:
        parser.error("--quick writes nothing; drop --keep")
    if given.child:
        print(json.dumps(run(Path(given.child[0]), given.child[1])))
        return
    rows, runs = {}, QUICK_RUNS if given.quick else RUNS
    with tempfile.TemporaryDirectory() as text:
        networks(Path(text), {network for pair, _ in runs.values() for network in pair})
        for name in runs:
            rows[name] = measure.child(__file__, "--child", text, name)
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
            rows[name]["resident_exact_malloc"] = measure.child(__file__, "--child", text, name)[
                "resident"
            ]
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            row = rows[name]
            row |= {
                "error": row["forecast"] / row["resident"] - 1,
                "error_exact_malloc": row["forecast"] / row["resident_exact_malloc"] - 1,
                "flops_error": row["flops_forecast"] / row["flops"] - 1,
            }
            print(name, row, file=sys.stderr, flush=True)
    measure.record("plan", {"machine": measure.machine(), "runs": rows}, given.keep)


if __name__ == "__main__":
    main()
