"""model/README.md: what the model is made of, how, with what results at what cost, and the command
that makes it again.

Nothing in it depends on when or where the run took place but its hardware and versions: an
interrupted run writes the same card.
"""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData

from .. import config as configuration
from ..config import Config
from ..display import flops_text, share_text
from ..engine.device import description
from ..lab.task import LAB
from ..prompts.presets import PRESETS
from ..prompts.sources import FORMATS
from .run import Run, settled
from .state import Progress

TAGS = ["prefix-distill", "knowledge-distillation", "on-policy-distillation"]
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
)  # named where they differ from the default
ELSEWHERE = ("checkpoint.out", "trackers", "export")  # settings that change no model


def hub_id(name: str | None) -> str | None:
    """``name`` where it is a hub repository's or a preset's, without what selects rows of it;
    None for a file, a folder, lab:… and self."""
    name = (name or "").partition("#")[0]
    if name in PRESETS:
        return PRESETS[name].hub
    if (
        not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
        or name.startswith(LAB)
        or name.endswith((".gguf", *FORMATS))
        or Path(name).exists()
    ):
        return None
    return name


def command(config: Config) -> str:
    """`prefix-distill run` with every setting that differs from its default, quoted for a shell;
    a line for each."""
    words = []
    for path, field in configuration.options().items():
        value = configuration.get(config, path)
        if value == field.default or path.startswith(ELSEWHERE):
            continue
        flag = field.metadata["flag"]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " \\\n  ".join(["prefix-distill run", *words])


def card(run: Run, progress: Progress, row: dict, full: float | None = None) -> str:
    """Return the model card of the student after ``row["step"]`` updates.

    ``row``: step, accuracy, KL and other measurements of this student; ``full``: useful FLOPs that
    as many updates with full rollouts would take.
    """
    config = run.config
    facts = description()
    parts = [
        *_top(config, row["step"]),
        _introduction(config, facts["prefix_distill"]),
        *_method(run, progress, row["step"]),
        *_results(config, progress.evaluations[0], row),
        *_cost(run, progress, facts, full),
        *_warnings(run, progress, row["step"]),
        "## How to reproduce",
        _fenced(command(config)),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(config: Config, version: str) -> str:
    """Name the models, the data and the license."""
    models = config.models
    teacher = (
        "itself, behind a prompt that shows more"
        if models.teacher == configuration.SELF
        else f"`{models.teacher}`"
    )
    elsewhere = "" if hub_id(models.student) else ", whose name or folder the command below has"
    return (
        f"Student `{models.student}`, teacher {teacher}, prompts of `{config.data.dataset}`; made "
        f"with prefix-distill {version}. The license is the base model's{elsewhere}."
    )


def _method(run: Run, progress: Progress, step: int) -> list[str]:
    """Describe who samples, who scores, the settings of the method, and how the prefix grew."""
    config = run.config
    writer = (
        "student"
        if run.method.off_policy is None
        else "student (or the teacher, where `--off-policy` says so)"
    )
    settings = [
        ("updates", f"{step} of {config.train.steps}"),
        ("prompts × rollouts an update", f"{config.train.batch_size} × {config.rollout.samples}"),
        (
            "prefix",
            f"{_code(config.schedule.prefix)}: {run.method.prefix.length(0)} tokens at first, "
            f"{progress.taught_prefix} at last, of at most {config.rollout.max_new_tokens}",
        ),
        (
            "divergence",
            f"{_code(config.divergence.name)}, estimator "
            f"{_code(config.divergence.estimator)}, per "
            f"{_code(config.divergence.reduction)}",
        ),
        (
            "peak learning rate",
            f"{config.schedule.lr:g}, {_code(config.schedule.lr_schedule)}, warm-up "
            f"{config.schedule.warmup}",
        ),
        (
            "sampling",
            f"temperature {config.rollout.temperature:g}, top-p {config.rollout.top_p:g}, "
            f"top-k {config.rollout.top_k}",
        ),
        *(
            (_code(configuration.flag(path)), _code(str(configuration.get(config, path))))
            for path in METHODS
            if configuration.get(config, path) != configuration.options()[path].default
        ),
        ("tokens taught", f"{progress.tokens:,}"),
        ("seed", str(config.runtime.seed)),
    ]
    return [
        "## Method",
        f"The {writer} writes the first tokens of answers, the teacher scores each of them, and "
        "the loss is taken on them alone (prefix distillation, [arXiv "
        "2602.15260](https://arxiv.org/abs/2602.15260)).",
        _table(("setting", "value"), settings),
        *(
            f"- {_line(d['reason'])} (after update {d['step']})"
            for d in progress.decisions
            if d["step"] <= step
        ),
    ]


def _results(config: Config, first: dict, row: dict) -> list[str]:
    """Describe the measurements before training (``first``) and now (``row``)."""
    problems = (
        _code(config.evaluate.dataset)
        if config.evaluate.dataset
        else f"held-out problems of {_code(settled(config.data.dataset, '--dataset'))}"
    )
    rows = []
    if first["accuracy"]:
        rows.append(("accuracy", share_text(first["accuracy"]), share_text(row["accuracy"])))
    rows.append(("reverse KL to the teacher, nats per token", _kl(first["kl"]), _kl(row["kl"])))
    if "finish_rate" in row:
        rows += [
            ("answers that end", f"{first['finish_rate']:.1%}", f"{row['finish_rate']:.1%}"),
            (
                "mean tokens of an answer",
                f"{first['mean_tokens']:.0f}",
                f"{row['mean_tokens']:.0f}",
            ),
        ]
    return [
        "## Results",
        f"On {problems}; 95 % intervals by bootstrap; of the KL, n counts tokens of fixed answers "
        "of the untrained student.",
        _table(("", "before", f"after {row['step']} updates"), rows),
    ]


def _cost(run: Run, progress: Progress, facts: dict, full: float | None) -> list[str]:
    """List FLOPs, hardware and versions."""
    spent = progress.ledger.summary()
    cost = [
        ("useful", spent["useful"]),
        ("executed (with padding and repeated work)", spent["executed"]),
    ]
    if full is not None:
        cost.append(("useful, of as many updates with full rollouts", full))
    hardware = ", ".join(facts["gpus"]) or f"{facts['machine']} CPU, {facts['threads']} threads"
    return [
        "## Cost",
        _table(("training FLOPs", ""), [(name, flops_text(value)) for name, value in cost]),
        f"{hardware}; {run.place.world} rank{'s' * (run.place.world > 1)}, "
        f"{str(run.place.dtype)[6:]}; torch {facts['torch']}, transformers "
        f"{facts['transformers']}, Python {facts['python']}.",
    ]


def _warnings(run: Run, progress: Progress, step: int) -> list[str]:
    """List the warnings up to ``step``, each once."""
    warnings = [*run.notes.warnings, *(w["text"] for w in progress.warnings if w["step"] <= step)]
    if not warnings:
        return []
    lines = [f"- {_line(text)}" for text in dict.fromkeys(warnings)]
    return ["## Warnings of the run", "\n".join(lines)]


def of_checkpoint(config: Config, step: int) -> str:
    """The card of a student in the middle of its run."""
    return (
        "\n\n".join(
            [
                *_top(config, step),
                f"The state after update {step} of {config.train.steps} of this run, made with "
                "prefix-distill:",
                _fenced(command(config)),
            ]
        )
        + "\n"
    )


def _top(config: Config, step: int) -> list[str]:
    """Front matter and title. Several base models would say that they were merged, so the
    teacher has a key of its own."""
    base, data = hub_id(config.models.student), hub_id(config.data.dataset)
    adapted = config.adapter.rank is not None and not config.adapter.merge
    front = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapted else "finetune") if base else None,
        teacher=hub_id(config.models.teacher),
        datasets=[data] if data else None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    name = Path(settled(config.models.student, "--student")).name.removesuffix(".gguf")
    title = config.trackers.name or f"{name} after {step} updates of on-policy distillation"
    return [f"---\n{front.to_yaml()}\n---", f"# {_line(title)}"]


def _kl(found: dict) -> str:
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}], n = {found['n']}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _table(heading: tuple, rows: list[tuple]) -> str:
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in [heading, ["---"] * len(heading), *rows]
    )


def _fenced(text: str) -> str:
    """A code block, whatever is in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"
