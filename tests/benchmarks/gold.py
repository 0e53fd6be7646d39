"""Compare a step across tokenizers with TRL's GOLDTrainer: seconds and peak memory.

    python tests/benchmarks/gold.py [--pairs 3] [--updates 3] [--work FOLDER] [--quick]

About 15 minutes on 2 cores. SmolLM2-135M-Instruct is trained with Gemma-3-270M as the teacher (see
cross_tokenizer.py) on GSM8K's questions as plain text. A step has 4 prompts with 1 rollout of 32
tokens each, sampled at temperature 1. Training uses float32 and AdamW without gradient
checkpointing. The arms are ours with --cross-tokenizer strict and simct, and GOLD with its hybrid
loss. That loss is a JSD at β = 1, which is GOLD's reverse KL, on tokens of the same name, and
sorted L1 on the rest. GOLD's option "bayesian" uses the logits that predict a token. GOLD's
alignment accepts byte-level tokenizers only. With Gemma's tokenizer it therefore compares the n-th
tokens of both sides.

Each run has a separate process, and the arms alternate. The first step is warm-up. Peak memory is
the highest resident set from the start of the first step to the end of the last. The student's
embeddings of special tokens are set to zero, so it samples none and all arms reach the token limit.
The script prints the number of sampled tokens. A ratio is ours over GOLD's, median [lowest,
highest]. The last printed line is JSON, also recorded as results/gold.json. ``--quick`` runs simct
and GOLD once, two steps of 2 prompts and 8 tokens, and records nothing.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import measure
import real_pair
from cross_tokenizer import gemma
from update_vs_trl import RATE, Watch, watched

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ARMS = ("strict", "simct", "gold")
QUICK_ARMS = ("simct", "gold")


def prepare(given, work: Path) -> dict:
    """Save both models and the questions; no question occurs twice."""
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.saving import save_model
    from prefix_distill.prompts import stream
    from prefix_distill.prompts.load import load_prompts
    from prefix_distill.prompts.row_format import RowFormat

    gemma(work / "gemma")
    if not (work / "smollm2").is_dir():
        model = loading.load_model(
            str(real_pair.teacher()), device=torch.device("cpu"), dtype=torch.float32
        )
        model.tokenizer.chat_template = PLAIN
        embeddings = model.net.get_input_embeddings().get_parameter("weight")
        embeddings[model.tokenizer.all_special_ids] = 0.0  # tied, so also rows of the output head
        save_model(model, work / "smollm2")
    found = load_prompts(
        str(real_pair.questions()), RowFormat(prompt_column="doc.question")
    ).prompts
    rows = [
        p.messages
        for p in stream.shuffle(found, given.seed, "benchmark")[: given.updates * given.prompts]
    ]
    (work / "questions.jsonl").write_text(
        "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    )
    return {}


def ours(mode: str, given, work: Path) -> dict:
    from prefix_distill import config
    from prefix_distill.cli import quiet
    from prefix_distill.training import prepare as preflight

    quiet.quiet_libraries()
    run = preflight.prepare(
        config.build(
            {
                "models.student": str(work / "smollm2"),
                "models.teacher": str(work / "gemma"),
                "models.cross_tokenizer": mode,
                "data.dataset": str(work / "questions.jsonl"),
                "evaluate.dataset": str(work / "questions.jsonl"),
                "data.template": "plain",
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 1,
                "schedule.prefix": str(given.tokens),
                "rollout.max_new_tokens": given.tokens,
                "rollout.samples": 1,
                "train.batch_size": given.prompts,
                "train.micro_batch_size": given.prompts,
                "train.steps": given.updates,
                "schedule.lr": RATE,
                "schedule.lr_schedule": "constant",
                "schedule.warmup": "0",
                "checkpoint.save_every": 0,
                "runtime.device": "cpu",
                "runtime.dtype": "float32",
                "runtime.seed": given.seed,
            }
        )
    )

    def sampled(row) -> int:
        share = row["alignment/exact_share"] + (
            row["alignment/span_share"] if mode != "strict" else 0
        )
        return round(row["rollout/taught_tokens"] / share)

    watch, phases = watched(run, sampled)
    return watch.document([]) | {
        "phases": {
            phase: statistics.median(row[phase] for row in phases[1:]) for phase in phases[0]
        }
    }


def gold(given, work: Path) -> dict:
    import datasets
    import transformers
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    from prefix_distill.prompts import stream
    from prefix_distill.prompts.load import load_prompts

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    watch = Watch()

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                watch.start()

        def on_step_end(self, args, state, control, **_):
            # TRL declares the attribute as None and assigns it before the step
            buffered: list[dict] = vars(trainer)["_buffered_inputs"]
            watch.end(sum((inputs["labels"] != -100).sum().item() for inputs in buffered))

    prompts = stream.shuffle(
        load_prompts(str(work / "questions.jsonl"), split="train").prompts, given.seed, "epoch", 0
    )  # the order of training.prepare
    rows = [{"messages": [*p.messages, {"role": "assistant", "content": "."}]} for p in prompts]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GOLDTrainer(
            model=str(work / "smollm2"),
            teacher_model=str(work / "gemma"),
            callbacks=[Callback()],
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(work / "smollm2"),
            args=GOLDConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                **measure.without_checkpointing(GOLDConfig),
                use_uld_loss=True,
                uld_use_hybrid_loss=True,
                use_extended_uld=False,
                uld_token_merge_strategy="bayesian",
                beta=1.0,
                lmbda=1.0,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_length=None,
                max_completion_length=given.tokens,
                per_device_train_batch_size=given.prompts,
                gradient_accumulation_steps=1,
                max_steps=given.updates,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                weight_decay=0.0,
                optim="adamw_torch_fused",
                seed=given.seed,
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                dataloader_pin_memory=False,
                teacher_model_init_kwargs={"dtype": "float32"},
            ),
        )
        assert not measure.checkpoints(trainer.model)
        trainer.train()
    return watch.document([])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="simct and GOLD once, two small steps; record nothing"
    )
    parser.add_argument("--pairs", type=int, help="runs of each arm (3; with --quick 1)")
    parser.add_argument(
        "--updates", type=int, help="steps per run; the first is not counted (3; with --quick 2)"
    )
    parser.add_argument("--prompts", type=int, help="prompts per step (4; with --quick 2)")
    parser.add_argument("--tokens", type=int, help="tokens per rollout (32; with --quick 8)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of each arm"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and rollouts")
    parser.add_argument(
        "--work", type=Path, help="folder for models and prompts (default: a temporary one)"
    )
    parser.add_argument("--child", choices=("prepare", *ARMS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    measure.require("trl", 'pip install "torch==2.13.0" -e ".[bench]"')
    given.pairs, given.updates = (
        given.pairs or (1 if given.quick else 3),
        given.updates or (2 if given.quick else 3),
    )
    given.prompts = given.prompts or (2 if given.quick else 4)
    given.tokens = given.tokens or (8 if given.quick else 32)
    if given.child:
        import torch

        torch.set_num_threads(given.threads)
        made = {"prepare": prepare, "gold": gold}.get(given.child)
        print(json.dumps(made(given, given.work) if made else ours(given.child, given, given.work)))
        return
    arms = QUICK_ARMS if given.quick else ARMS
    with tempfile.TemporaryDirectory() as scratch:
        work = (given.work or Path(scratch)).resolve()
        flags = [
            "--work",
            work,
            *[
                f
                for key in ("updates", "prompts", "tokens", "threads", "seed")
                for f in (f"--{key}", getattr(given, key))
            ],
        ]
        measure.child(__file__, "--child", "prepare", *flags)
        turns = [
            {arm: measure.child(__file__, "--child", arm, *flags) for arm in arms}
            for _ in range(given.pairs)
        ]
    document = {
        "pairs": given.pairs,
        "updates": given.updates,
        "prompts": given.prompts,
        "tokens": given.tokens,
        "seed": given.seed,
        "trl": importlib.metadata.version("trl"),
        "arms": {},
    }
    for arm in arms:
        seconds = [statistics.median(turn[arm]["seconds"]) for turn in turns]
        row = {
            "seconds": statistics.median(seconds),
            "peak_bytes": statistics.median(turn[arm]["peak_bytes"] for turn in turns),
            "tokens": statistics.mean(t for turn in turns for t in turn[arm]["tokens"]),
        }
        if arm != "gold":
            for name, ratios in (
                (
                    "time",
                    [
                        s / statistics.median(turn["gold"]["seconds"])
                        for s, turn in zip(seconds, turns, strict=True)
                    ],
                ),
                (
                    "memory",
                    [turn[arm]["peak_bytes"] / turn["gold"]["peak_bytes"] for turn in turns],
                ),
            ):
                row |= {
                    f"{name}_ratio": statistics.median(ratios),
                    f"{name}_ratio_range": [min(ratios), max(ratios)],
                }
            row["phases"] = turns[-1][arm]["phases"]
        document["arms"][arm] = row
        print(
            f"{arm}: {row['seconds']:.2f} s per step, peak {row['peak_bytes'] / 2**30:.2f} GiB, "
            f"{row['tokens']:g} tokens",
            file=sys.stderr,
        )
    measure.record(
        "gold", measure.machine() | document | {"threads": given.threads}, not given.quick
    )


if __name__ == "__main__":
    main()
