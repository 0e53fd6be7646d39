"""Write the model card, model/README.md: models, method, results, cost and the command.

The card does not depend on when or where the run took place, except for hardware and versions. An
interrupted run therefore writes the same card as an uninterrupted one.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import config as configuration
from ..config import Config
from ..display import accuracy_text, count_text, flops_text
from ..engine.device import describe_machine
from ..lab.task import LAB
from ..prompts.presets import PRESETS
from ..prompts.sources import FORMATS, split_revision
from .pair import describe_tokens
from .run import Run, settled
from .state import Progress

TAGS = ["prefix-distill", "knowledge-distillation", "on-policy-distillation"]
# settings that the card lists if they differ from their defaults
METHODS = (
    "adapter.rank",
    "adapter.alpha",
    "adapter.targets",
    "models.student_quantize",
    "models.teacher_quantize",
    "models.teacher_ema",
    "models.cross_tokenizer",
    "rollout.off_policy",
    "rollout.begin",
    "divergence.clip",
    "divergence.temperature",
    "weights.window",
    "weights.select",
    "weights.keep",
    "weights.position",
    "extrapolation.kind",
)
# settings that do not change the model
ELSEWHERE = ("checkpoint.out", "checkpoint.allow_changed", "trackers", "export")


def hub_id(name: str | None) -> str | None:
    """Return the hub id of a model or dataset, without a row selection (#1000).

    None: ``name`` is a file, a folder, lab:… or self.
    """
    name, _ = split_revision((name or "").partition("#")[0])
    if name in PRESETS:
        return PRESETS[name].hub
    if (
        not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
        or name.startswith(LAB)
        or name.lower().endswith((".gguf", *FORMATS))
        or Path(name).exists()
    ):
        return None
    return name


def make_command(config: Config) -> str:
    """Return the `prefix-distill run` command with the settings that differ from their defaults.

    Each setting is on its own line and quoted for a shell.
    """
    words = ["prefix-distill run"]
    for path, field in configuration.options().items():
        value = configuration.get(config, path)
        if value == field.default or path.startswith(ELSEWHERE):
            continue
        flag = field.metadata["flag"]
        if value is True:
            words.append(flag)
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " \\\n  ".join(words)


def make_card(run: Run, progress: Progress, row: dict, full: float | None = None) -> str:
    """Return the model card of the student after ``row["step"]`` steps.

    ``row``: step, accuracy, KL and other measurements of this student; ``full``: useful FLOPs that
    as many steps with full rollouts would take.
    """
    config = run.config
    facts = describe_machine()
    parts = [
        *_top(config, row["step"]),
        _introduction(config, facts["prefix_distill"]),
        *_method(run, progress, row["step"]),
        *_results(config, progress.evaluations[0], row),
        *_cost(run, progress, facts, full=full),
        *_warnings(run, progress, row["step"]),
        "## How to reproduce",
        _fenced(make_command(config)),
    ]
    return "\n\n".join(parts) + "\n"


def make_checkpoint_card(config: Config, step: int) -> str:
    """Return the card of a student in the middle of its run."""
    parts = [
        *_top(config, step),
        f"This is the student after step {step} of {config.train.steps} of the following "
        "prefix-distill run:",
        _fenced(make_command(config)),
    ]
    return "\n\n".join(parts) + "\n"


def _top(config: Config, step: int) -> list[str]:
    """Return front matter and title.

    The teacher has its own key, because the hub shows several base models as a merge.
    """
    keys: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "teacher": hub_id(config.models.teacher),
        "tags": TAGS,
    }
    relation = "finetune"
    if config.adapter.rank is not None and not config.adapter.merge:
        keys["library_name"] = "peft"
        relation = "adapter"
    base = hub_id(config.models.student)
    if base is not None:
        keys["base_model"] = base
        keys["base_model_relation"] = relation
    data = hub_id(config.data.dataset)
    if data is not None:
        keys["datasets"] = [data]
    name = settled(config.models.student, "--student")
    if base is None and not name.startswith(LAB):  # a path, of which only the name is public
        name = Path(name).name.removesuffix(".gguf")
    title = (
        config.trackers.name or f"{name} after {count_text(step, 'step')} of on-policy distillation"
    )
    return [f"---\n{ModelCardData(**keys).to_yaml()}\n---", f"# {_line(title)}"]


def _introduction(config: Config, version: str) -> str:
    """Name the models, the data and the license."""
    models = config.models
    teacher = f"`{models.teacher}`"
    if models.teacher == configuration.SELF:
        teacher = "the same model with privileged text in its prompt"
    sentences = [
        f"The student is `{models.student}`, and the teacher is {teacher}.",
        f"The prompts are from `{config.data.dataset}`.",
        f"The student was trained with prefix-distill {version}.",
        "The license is that of the base model.",
    ]
    if hub_id(models.student) is None:
        sentences.append("The base model is local: see the command below.")
    return " ".join(sentences)


def _method(run: Run, progress: Progress, step: int) -> list[str]:
    """Describe who samples, who scores, the settings of the method, and how the prefix grew."""
    sampling = "The student samples the first tokens of its answers"
    if run.method.off_policy is not None:
        sampling = "The student or the teacher (see `--off-policy`) samples the start of an answer"
    parts = [
        "## Method",
        f"{sampling}. The teacher scores each of these tokens, and the loss covers only them "
        "(prefix distillation, [arXiv 2602.15260](https://arxiv.org/abs/2602.15260)).",
        _table(("setting", "value"), _settings(run, progress, step)),
    ]
    for decision in progress.decisions:
        if decision["step"] <= step:
            parts.append(f"- After step {decision['step']}: {_line(decision['reason'])}")
    return parts


def _settings(run: Run, progress: Progress, step: int) -> list[tuple[str, str]]:
    """List the settings of the method as (setting, value)."""
    config = run.config
    divergence, rollout, schedule = config.divergence, config.rollout, config.schedule
    rows = [
        ("steps", f"{step} of {config.train.steps}"),
        ("prompts × rollouts per step", f"{config.train.batch_size} × {rollout.samples}"),
        (
            "prefix",
            f"{_code(schedule.prefix)}: {run.method.prefix.length(0)} tokens (first step) to "
            f"{progress.taught_prefix} (last step); answers have at most {rollout.max_new_tokens}",
        ),
        (
            "divergence",
            f"{_code(divergence.name)}, estimator {_code(divergence.estimator)}, reduction "
            f"{_code(divergence.reduction)}",
        ),
        (
            "peak learning rate",
            f"{settled(schedule.lr, '--lr'):g}, {_code(schedule.lr_schedule)}, warm-up "
            f"{schedule.warmup}",
        ),
        (
            "sampling",
            f"temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k {rollout.top_k}",
        ),
    ]
    ends = describe_tokens(run.pair.student, run.method.sampler.eos)
    rows.append(("responses end with", f"{_code(ends)}, as `generation_config.json` says"))
    for path in METHODS:
        value = configuration.get(config, path)
        if value != configuration.options()[path].default:
            rows.append((_code(configuration.flag(path)), _code(str(value))))
    rows.append(("tokens in the loss", f"{progress.tokens:,}"))
    rows.append(("seed", str(config.runtime.seed)))
    return rows


def _results(config: Config, first: dict, row: dict) -> list[str]:
    """Describe the measurements before training (``first``) and now (``row``)."""
    if config.evaluate.dataset:
        problems = _code(config.evaluate.dataset)
    else:
        problems = f"held-out problems of {_code(settled(config.data.dataset, '--dataset'))}"
    rows = []
    if first["accuracy"]:
        name = "accuracy"
        if config.evaluate.grader is not None:
            name = f"mean score of {_code(Path(config.evaluate.grader).name)}"
        rows.append((name, accuracy_text(first["accuracy"]), accuracy_text(row["accuracy"])))
    rows.append(("reverse KL to the teacher, nats per token", _kl(first["kl"]), _kl(row["kl"])))
    if "finish_rate" in row:
        before, after = first["finish_rate"], row["finish_rate"]
        rows.append(("finished answers", f"{before:.1%}", f"{after:.1%}"))
        before, after = first["mean_tokens"], row["mean_tokens"]
        rows.append(("mean tokens per answer", f"{before:.0f}", f"{after:.0f}"))
    return [
        "## Results",
        f"Measured on {problems}, with 95% bootstrap intervals. The KL is measured on fixed "
        "answers of the untrained student; n is their number of tokens.",
        _table(("", "before", f"after {count_text(row['step'], 'step')}"), rows),
    ]


def _cost(run: Run, progress: Progress, facts: dict, full: float | None) -> list[str]:
    """List FLOPs, hardware and versions."""
    spent = progress.ledger.summary()
    rows = [
        ("useful", flops_text(spent["useful"])),
        ("executed (with padding and repeated work)", flops_text(spent["executed"])),
    ]
    if full is not None:
        rows.append(("useful, if every step used full rollouts", flops_text(full)))
    hardware = ", ".join(facts["gpus"]) or _describe_cpu(facts)
    dtype = str(run.place.dtype).removeprefix("torch.")
    return [
        "## Cost",
        _table(("training FLOPs", ""), rows),
        f"{hardware}; {count_text(run.place.world, 'rank')}, {dtype}; torch {facts['torch']}, "
        f"transformers {facts['transformers']}, Python {facts['python']}.",
    ]


def _describe_cpu(facts: dict) -> str:
    return f"{facts['machine']} CPU, {count_text(facts['threads'], 'thread')}"


def _warnings(run: Run, progress: Progress, step: int) -> list[str]:
    """List the warnings up to ``step``, each once."""
    texts = list(run.notes.warnings)
    for warning in progress.warnings:
        if warning["step"] <= step:
            texts.append(warning["text"])
    if not texts:
        return []
    lines = [f"- {_line(text)}" for text in dict.fromkeys(texts)]
    return ["## Warnings of the run", "\n".join(lines)]


def _kl(estimate: dict) -> str:
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.4f} [{low:.4f}, {high:.4f}], n = {estimate['n']}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    text = _line(text).replace("`", "'")
    return f"`{text}`"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = []
    for row in [heading, ("---",) * len(heading), *rows]:
        cells = " | ".join(cell.replace("|", r"\|") for cell in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def _fenced(text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
