"""Compare a whole step with TRL's DistillationTrainer: seconds and peak memory.

    python tests/benchmarks/update_vs_trl.py [--quick] [--cases smollm2-g4] [--pairs 3]
        [--updates 2] [--dtype bfloat16]

About 12 minutes on 2 cores. Both arms train the same student with the same teacher on the same
prompt ids, which are compared. Number and length of the rollouts and the micro-batch size are
equal. Both sample at temperature 1, use full-vocabulary reverse KL and AdamW, and clip the gradient
norm to 1. Gradient checkpointing is off; TRL's default is on. The end-of-sequence token is one that
the student rarely samples (`embedded`: once in 10,000 tokens), so both arms sample up to the token
limit. The script prints the number of sampled tokens.

    smollm2-g1  SmolLM2-135M-Instruct and its 20-layer student; 8 GSM8K questions with 1 rollout of
                64 tokens each
    smollm2-g4  the same pair; 2 questions of at least 64 tokens with 4 rollouts of 32 tokens each
    users       SmolLM2-135M-Instruct and a random student of a quarter of its parameters; 2
                questions of 112 to 144 tokens with 4 rollouts of 100 tokens each
    embedded    the built-in pair of `choice` (0.3 M and 0.1 M parameters); 4 problems with 4
                rollouts of 24 tokens each

Every run has a separate process, and the two arms alternate. The first step is warm-up. Seconds are
measured from the end of one step to the end of the next; the median is reported. `embedded` runs
ten times as many steps. Peak memory is the highest resident set from the start of the first step to
the end of the last (``clear_refs``, then ``VmHWM``: Linux only). It includes interpreter, libraries
and weights, but not loading. A ratio is ours over TRL's within a pair of runs; the median over
pairs [lowest, highest] is shown. The seconds of each phase of our steps are printed as well.

The last printed line is JSON, also written to tests/benchmarks/results/update_vs_trl.json, in
bfloat16 to update_vs_trl-bfloat16.json.
``--quick`` runs one pair of two steps of `embedded` and of `smollm2-g4` with 16 tokens, and writes
nothing. It takes two to three minutes; loading the GGUF file takes one of them. ``--work FOLDER``
keeps the pairs for the next call. Requires pip install "torch==2.13.0" -e ".[bench]" and the
packages of real_pair.py.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure
import scaling

RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of a step: prompts × samples rollouts of ``tokens`` tokens.

    ``shortest``, ``longest``: fewest and most tokens of a prompt. ``counted``: how many steps to
    measure for each step that ``--updates`` asks for; short steps have more.
    """

    pair: str
    prompts: int
    samples: int
    tokens: int
    micro_batch: int
    shortest: int = 0
    longest: int = 10_000
    counted: int = 1


CASES = {
    "smollm2-g1": Case("smollm2", 8, 1, 64, 8),
    "smollm2-g4": Case("smollm2", 2, 4, 32, 8, shortest=64),
    "users": Case("quarter", 2, 4, 100, 8, shortest=112, longest=144),
    "embedded": Case("embedded", 4, 4, 24, 16, counted=10),
}


class Watch:
    """Record seconds and tokens of every step, and the peak resident set since ``start``."""

    def start(self) -> None:
        self.resident, self.peak = measure.reset_peak(), 0
        self.ends = [time.perf_counter()]
        self.tokens: list[int] = []

    def end(self, tokens: int) -> None:
        self.ends.append(time.perf_counter())
        self.tokens.append(tokens)
        self.peak = measure.memory("VmHWM")

    def document(self, prompts: list[list[list[int]]]) -> dict:
        """Return what an arm prints; ``prompts``: the ids of every step's prompts."""
        import torch

        seconds = [after - before for before, after in itertools.pairwise(self.ends)]
        return {
            "seconds": seconds[1:],
            "warm_up_seconds": seconds[0],
            "tokens": self.tokens[1:],
            "peak_bytes": self.peak,
            "resident_before_bytes": self.resident,
            "threads": torch.get_num_threads(),
            "prompts": prompts,
        }


def make_pair(name: str, folder: Path) -> None:
    """Save a pair as folder/teacher and folder/student."""
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.saving import save_model

    if name == "smollm2":
        scaling.pair(folder)
        return
    if name == "quarter":
        make_quarter(scaling.pair(folder.parent / "smollm2") / "teacher", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for role in ("teacher", "student"):
        model = loading.load_model(
            f"lab:choice/{role}", device=torch.device("cpu"), dtype=torch.float32
        )
        model.tokenizer.eos_token = "<|unknown|>"
        model.generation_config.eos_token_id = model.tokenizer.eos_token_id
        save_model(model, folder / role)


def make_quarter(teacher: Path, folder: Path) -> None:
    """Save a random student of a quarter of the teacher's parameters beside its teacher."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher").symlink_to(teacher, target_is_directory=True)
    config = AutoConfig.from_pretrained(teacher)
    config.update({"hidden_size": 288, "head_dim": 32, "intermediate_size": 768})
    config.num_hidden_layers = 20
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:20]
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    net.generation_config = GenerationConfig.from_pretrained(teacher)
    net.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder / "student")


def make_prompts(case: Case, given, folder: Path, file: Path) -> None:
    """Write the questions of all steps; none occurs twice."""
    import real_pair
    from transformers import AutoTokenizer

    from prefix_distill.prompts import stream
    from prefix_distill.prompts.load import load_prompts
    from prefix_distill.prompts.row_format import RowFormat

    if case.pair == "embedded":
        found = load_prompts("lab:choice", split="train")
    else:
        found = load_prompts(str(real_pair.questions()), RowFormat(prompt_column="doc.question"))
    tokenizer, rows = AutoTokenizer.from_pretrained(folder / "student"), []
    for prompt in stream.shuffle(found.prompts, given.seed, "benchmark"):
        ids = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_dict=False
        )
        if case.shortest <= len(ids) <= case.longest:
            rows.append(json.dumps({"messages": prompt.messages}))
        if len(rows) == given.updates * case.prompts:
            break
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def prepare(case: Case, given, folder: Path, file: Path) -> dict:
    if not (folder / "student").is_dir():
        make_pair(case.pair, folder)
    make_prompts(case, given, folder, file)
    return {}


def watched(run, tokens) -> tuple[Watch, list[dict]]:
    """Train a prepared run and return its Watch and the seconds of every step by phase.

    ``tokens(row)`` returns the number of sampled tokens of a step from its metrics row.
    """
    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.session import Session

    watch, phases = Watch(), []

    class Folder(RunFolder):
        def save_checkpoint(self, step, *state):
            super().save_checkpoint(step, *state)
            if step == 0:  # saved immediately before the first step
                watch.start()

    class Report(measure.Silent):
        def row(self, row: dict, useful: float, full: float) -> None:
            watch.end(tokens(row))
            phases.append(
                {
                    key[5:-2]: row[key]
                    for key in row
                    if key.startswith("time/") and key.endswith("_s") and not key.endswith("_per_s")
                }
            )

    with tempfile.TemporaryDirectory() as scratch:
        out = Folder(Path(scratch) / "run")
        out.create({})
        out.write_json("run.json", {})
        Session(run, out, Report()).train()
    return watch, phases


def ours(case: Case, given, folder: Path, file: Path) -> dict:
    """Run our steps."""
    from prefix_distill import config
    from prefix_distill.cli import quiet
    from prefix_distill.prompts import stream
    from prefix_distill.training import prepare as preflight

    quiet.quiet_libraries()
    run = preflight.prepare(
        config.build(
            {
                "models.student": str(folder / "student"),
                "models.teacher": str(folder / "teacher"),
                "data.dataset": str(file),
                "evaluate.dataset": str(file),
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 1,
                "schedule.prefix": str(case.tokens),
                "rollout.max_new_tokens": case.tokens,
                "rollout.samples": case.samples,
                "train.batch_size": case.prompts,
                "train.micro_batch_size": case.micro_batch,
                "train.steps": given.updates,
                "schedule.lr": RATE,
                "schedule.lr_schedule": "constant",
                "schedule.warmup": "0",
                "checkpoint.save_every": 0,
                "runtime.device": "cpu",
                "runtime.dtype": given.dtype,
                "runtime.seed": given.seed,
            }
        )
    )
    watch, phases = watched(run, lambda row: row["rollout/taught_tokens"])
    return watch.document(
        [
            [
                list(p.student_ids)
                for p in stream.prompts_of_step(
                    run.problems.train, step, size=case.prompts, seed=given.seed
                )
            ]
            for step in range(given.updates)
        ]
    ) | {
        "phases": {
            phase: statistics.median(row[phase] for row in phases[1:]) for phase in phases[0]
        }
    }


def trl(case: Case, given, folder: Path, file: Path) -> dict:
    """Run TRL's steps.

    TRL samples one rollout per row, so a prompt's row is repeated for each of its samples.
    """
    import datasets
    import transformers
    from trl import DistillationConfig, DistillationTrainer

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
            watch.end(state.num_input_tokens_seen)  # cumulative, prompts and responses

    prompts = stream.shuffle(
        load_prompts(str(file), split="train").prompts, given.seed, "epoch", 0
    )  # the order of training.prepare
    rows = [{"prompt": list(p.messages)} for p in prompts for _ in range(case.samples)]
    rollouts = case.prompts * case.samples
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DistillationTrainer(
            model=str(folder / "student"),
            teacher_model=str(folder / "teacher"),
            callbacks=[Callback()],
            train_dataset=datasets.Dataset.from_list(rows),
            args=DistillationConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=given.dtype == "bfloat16",
                **measure.without_checkpointing(DistillationConfig),
                teacher_model_init_kwargs={"dtype": given.dtype},
                disable_dropout=True,
                beta=1.0,
                temperature=1.0,
                max_completion_length=case.tokens,
                per_device_train_batch_size=case.micro_batch,
                gradient_accumulation_steps=rollouts // case.micro_batch,
                max_steps=given.updates,
                shuffle_dataset=False,
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
            ),
        )
        assert not measure.checkpoints(trainer.model)
        trainer.train()
    ids, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
    read = [
        sum(map(len, ids[step * rollouts : (step + 1) * rollouts])) for step in range(given.updates)
    ]
    watch.tokens = [
        seen - before - prompt
        for seen, before, prompt in zip(watch.tokens, [0, *watch.tokens[:-1]], read, strict=True)
    ]
    firsts = ids[:: case.samples]
    return watch.document(
        [firsts[step * case.prompts : (step + 1) * case.prompts] for step in range(given.updates)]
    )


def child(arm: str, name: str, given, work: Path) -> dict:
    """Run one arm in a separate process and return its document."""
    flags = [
        f
        for key in ("updates", "threads", "seed", "dtype")
        for f in (f"--{key}", getattr(given, key))
    ]
    return measure.child(
        __file__, "--child", arm, name, "--work", work, *flags, *["--quick"] * given.quick
    )


def compare(name: str, given, work: Path) -> dict:
    """Run all pairs of one case and return its row."""
    child("prepare", name, given, work)
    pairs = []
    for turn in range(given.pairs):
        left, right = pair = [child(arm, name, given, work) for arm in ("ours", "trl")]
        if left["prompts"] != right["prompts"]:
            sys.exit(f"{name}: expected the same prompt ids in both arms, got different ones")
        pairs.append(pair)
        lengths = [len(ids) for step in left["prompts"] for ids in step]
        print(
            f"{name}, pair {turn + 1}: ours {statistics.median(left['seconds']):.2f} s, "
            f"TRL {statistics.median(right['seconds']):.2f} s per step; prompts of "
            f"{min(lengths)} to {max(lengths)} tokens; our phases: "
            f"{', '.join(f'{phase} {s:.2f} s' for phase, s in left['phases'].items())}",
            file=sys.stderr,
            flush=True,
        )
    seconds = [[statistics.median(document["seconds"]) for document in pair] for pair in pairs]
    peaks = [[document["peak_bytes"] for document in pair] for pair in pairs]
    times, memories = ([a / b for a, b in rows] for rows in (seconds, peaks))
    row = {
        "name": name,
        "time_ratio": statistics.median(times),
        "memory_ratio": statistics.median(memories),
        "time_ratio_range": [min(times), max(times)],
        "memory_ratio_range": [min(memories), max(memories)],
    }
    for i, arm in enumerate(("ours", "trl")):
        row |= {
            f"{arm}_seconds": statistics.median(s[i] for s in seconds),
            f"{arm}_peak_bytes": statistics.median(p[i] for p in peaks),
            f"{arm}_resident_before_bytes": statistics.median(
                p[i]["resident_before_bytes"] for p in pairs
            ),
            f"{arm}_tokens": statistics.mean(t for p in pairs for t in p[i]["tokens"]),
        }
    return row | {"threads": pairs[0][0]["threads"], "prompt_tokens": [min(lengths), max(lengths)]}


def show(rows: list[dict]) -> None:
    print(
        f"{'case':12} {'ours s':>8} {'TRL s':>8} {'time ratio':>22} {'ours peak':>10} "
        f"{'TRL peak':>10} {'memory ratio':>13}  tokens"
    )
    for r in rows:
        ratio = (
            f"{r['time_ratio']:.3f} [{r['time_ratio_range'][0]:.3f}, "
            f"{r['time_ratio_range'][1]:.3f}]"
        )
        tokens = " / TRL ".join(dict.fromkeys(f"{r[f'{arm}_tokens']:g}" for arm in ("ours", "trl")))
        print(
            f"{r['name']:12} {r['ours_seconds']:8.3f} {r['trl_seconds']:8.3f} {ratio:>22} "
            f"{r['ours_peak_bytes'] / 2**30:6.2f} GiB {r['trl_peak_bytes'] / 2**30:6.2f} GiB "
            f"{r['memory_ratio']:13.3f}  {tokens}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="one pair of runs of two small steps; write nothing"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        help="default: all; with --quick: embedded and smollm2-g4",
    )
    parser.add_argument("--pairs", type=int, help="runs of each arm (3; with --quick 1)")
    parser.add_argument("--updates", type=int, help="steps per run; the first is not counted (2)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of each arm"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of both arms"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and rollouts")
    parser.add_argument(
        "--work", type=Path, help="folder for the pairs and prompts (default: a temporary one)"
    )
    parser.add_argument("--child", nargs=2, metavar=("ARM", "CASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    measure.require("trl", 'pip install "torch==2.13.0" -e ".[bench]"')
    given.pairs = given.pairs or (1 if given.quick else 3)
    given.updates = given.updates or 2
    if given.updates < 2:
        parser.error("--updates: expected at least 2, because the first is not counted")
    if given.child:
        arm, name = given.child
        case = CASES[name]
        if given.quick and case.pair != "embedded":
            case = dataclasses.replace(case, tokens=16)
        given.updates = 1 + case.counted * (given.updates - 1)
        import torch

        torch.set_num_threads(given.threads)
        arms = {"prepare": prepare, "ours": ours, "trl": trl}
        print(
            json.dumps(arms[arm](case, given, given.work / case.pair, given.work / f"{name}.jsonl"))
        )
        return
    names = given.cases or (["embedded", "smollm2-g4"] if given.quick else list(CASES))
    with tempfile.TemporaryDirectory() as scratch:
        rows = [compare(name, given, (given.work or Path(scratch)).resolve()) for name in names]
    show(rows)
    document = {
        "cases": rows,
        "pairs": given.pairs,
        "updates": given.updates,
        "dtype": given.dtype,
        "seed": given.seed,
        "trl": importlib.metadata.version("trl"),
    }
    name = "update_vs_trl"
    if given.dtype != "float32":
        name += f"-{given.dtype}"
    measure.record(
        name,
        measure.machine() | document | {"threads": rows[0]["threads"]},
        not given.quick,
    )


if __name__ == "__main__":
    main()
