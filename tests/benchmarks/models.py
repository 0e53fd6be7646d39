"""Every model class of the installed transformers: does the tool train it right, or refuse it in
one line before anything is spent? About an hour on 2 cores.

    python tests/benchmarks/models.py [--quick] [--only NAME,…] [--again] [--jobs 1] [--timeout 120]

The classes are those of transformers' causal mapping, and those of its image-text-to-text mapping
with a text model inside. Each one is built at random with a tiny config (model_configs.py), saved
with a byte-level tokenizer and put through the tool's own functions in a process of its own
(model_steps.py): loading, the checks of `prefix-distill check`, scoring of padded rows against
single ones, 40 decoding steps against plain ``generate``, a batch in which a row ends early, the
gradient of one prefix update against full logits, gradient checkpointing, bfloat16, one trained
step saved and reloaded, and the same with LoRA.

A class *works* if every comparison holds (``figures`` has the largest differences); ``limits``
names options that it refuses. It is *refused* if loading or a check ends in one line that names the
obstacle. Anything else is *neither*. A whole run writes results/models.json and the help page
model-classes; ``--again`` repeats the recorded classes that are neither, or those of ``--only``,
and updates them. ``--quick``: eight classes, nothing written. The last line is a JSON document.
Some classes need the packages timm or scipy to be built.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import measure
import model_configs
import model_page
from model_configs import ModelClass

RECORD = measure.HERE / "results" / "models.json"
QUICK = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "Lfm2ForCausalLM",
    "Qwen3NextForCausalLM",
    "MambaForCausalLM",
    "Gemma3ForConditionalGeneration",
)


def examine(model_class: ModelClass, folder: str, pipe: Connection) -> None:
    """Examine one class and send its progress; runs in a process of its own."""
    import model_steps

    for message in model_steps.run_steps(model_class, Path(folder)):
        pipe.send(message)


@dataclass(kw_only=True)
class Worker:
    """A process that examines a class. ``last``: its latest message."""

    model_class: ModelClass
    process: BaseProcess
    pipe: Connection
    scratch: tempfile.TemporaryDirectory
    started: float
    last: dict

    @classmethod
    def start(cls, model_class: ModelClass, context: ForkServerContext | SpawnContext) -> "Worker":
        """Start a process for a class."""
        scratch = tempfile.TemporaryDirectory(prefix="prefix-distill-")
        pipe, child = context.Pipe(duplex=False)
        process = context.Process(target=examine, args=(model_class, scratch.name, child))
        process.start()
        child.close()
        return cls(
            model_class=model_class,
            process=process,
            pipe=pipe,
            scratch=scratch,
            started=time.perf_counter(),
            last={"step": "start"},
        )

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.started

    def read(self) -> bool:
        """Read messages; return whether the process has ended."""
        try:
            while self.pipe.poll():
                self.last = self.pipe.recv()
        except EOFError:
            return True
        return "outcome" in self.last

    def finish(self, reason: str) -> dict:
        """End the process and return the row of its class; ``reason``: why it ended early."""
        if "outcome" in self.last:
            self.process.join(timeout=10)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.scratch.cleanup()
        row = {"class": self.model_class.name, "model_type": self.model_class.model_type}
        found = dict(self.last)
        step = found.pop("step", None)
        if step is not None:
            found["faults"] = found.get("faults", {}) | {step: reason}
            found["outcome"] = "neither"
        row |= {key: value for key, value in found.items() if value}
        return row | {"seconds": round(self.seconds, 1)}


def examine_all(classes: list[ModelClass], jobs: int, timeout: float) -> list[dict]:
    """Return the rows of all classes, in their order."""
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["model_steps"])  # torch is imported once
    waiting = list(reversed(classes))
    workers: list[Worker] = []
    rows: dict[str, dict] = {}
    while waiting or workers:
        while waiting and len(workers) < jobs:
            workers.append(Worker.start(waiting.pop(), context))
        wait([worker.pipe for worker in workers], timeout=1)
        for worker in list(workers):
            row = None
            if worker.read():
                row = worker.finish(f"the process ended with code {worker.process.exitcode}")
            elif worker.seconds > timeout:
                row = worker.finish(f"not finished after {timeout:.0f} s")
            if row is not None:
                workers.remove(worker)
                rows[worker.model_class.name] = row
                print(f"{len(rows)}/{len(classes)}  {describe(row)}", flush=True)
    return [rows[model_class.name] for model_class in classes]


def describe(row: dict) -> str:
    """Return one line about a class."""
    text = f"{row['class']}: {row['outcome']} ({row['seconds']:.0f} s)"
    if "refusal" in row:
        text += f" {row['refusal']}"
    if row["outcome"] == "works":
        worst = max(row["figures"], key=row["figures"].get)
        text += f" largest difference {row['figures'][worst]:.1g} ({worst})"
    for step, reason in (row.get("faults", {}) | row.get("limits", {})).items():
        text += f"; {step}: {reason}"
    return text


def choose(given: argparse.Namespace) -> list[ModelClass]:
    """Return the classes to examine."""
    classes = model_configs.list_classes()
    names = {model_class.name for model_class in classes}
    if given.quick:
        return [model_class for model_class in classes if model_class.name in QUICK]
    if given.again and given.only is None:
        neither = {row["class"] for row in read_record()["classes"] if row["outcome"] == "neither"}
        return [model_class for model_class in classes if model_class.name in neither]
    if given.only is None:
        return classes
    wanted = given.only.split(",")
    unknown = sorted(set(wanted) - names)
    if unknown:
        sys.exit(f"--only: {unknown[0]} is not a class of the mappings of transformers")
    return [model_class for model_class in classes if model_class.name in wanted]


def read_record() -> dict:
    """Return the document of the recorded whole run."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def replace_rows(rows: list[dict], versions: dict) -> tuple[list[dict], dict]:
    """Return the recorded rows with ``rows`` in place of theirs, and the recorded machine.

    A row that other ``versions`` of the packages gave keeps them.
    """
    recorded = read_record()
    repeated = {}
    for row in rows:
        repeated[row["class"]] = row
        if versions != recorded["versions"]:
            repeated[row["class"]] = row | {"versions": versions}
    merged = [repeated.get(row["class"], row) for row in recorded["classes"]]
    return merged, {name: recorded[name] for name in ("cpu", "threads", "versions")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="eight classes, nothing written")
    parser.add_argument("--only", help="names of classes, separated by commas")
    parser.add_argument(
        "--again",
        action="store_true",
        help="update the recorded classes that are neither, or those of --only",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one class")
    given = parser.parse_args()
    rows = examine_all(choose(given), given.jobs, given.timeout)
    machine = measure.machine()
    if given.again:
        rows, machine = replace_rows(rows, machine["versions"])
    names: dict[str, list[str]] = {"works": [], "refused": [], "neither": []}
    for row in rows:
        names[row["outcome"]].append(row["class"])
    document = {outcome: len(classes) for outcome, classes in names.items()}
    document |= {"classes": rows} | machine
    complete = not given.quick and (given.again or given.only is None)
    measure.record("models", document, complete)
    if complete:
        model_page.PAGE.write_text(model_page.render(document), encoding="utf-8")


if __name__ == "__main__":
    from prefix_distill.cli import quiet

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet.calm_threads(os.environ)
    sys.path.append(str(measure.HERE.parent))  # tests/helpers.py
    main()
