"""Every option once, one frozen section per part of the program: default, help and limits."""

import dataclasses
import difflib
import itertools
import math
import re
import reprlib
import sys
import typing
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..maths.schedule import parse_off_policy, parse_prefix, warmup_steps
from ..maths.weights import parse_position_weight, parse_selection, parse_window

SELF = "self"  # --teacher self: the student's own initial weights
LARGEST = 1 << 16  # characters of a settings file, and nodes that its YAML expands to
MERGE = "tag:yaml.org,2002:merge"  # tag of the key <<
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
TRACKERS = ("tensorboard", "wandb", "trackio")


def option(default: object, flag: str, help: str, shown: str | None = None, **limits: float):
    """Declare a config field: its flag, its help (with the unit), its default in words, its limits.

    ``low`` and ``high`` are the smallest and the largest number; every number exceeds ``above``.
    A ``Literal`` type lists the only values of an option.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "shown": shown, **limits})


@dataclass(frozen=True)
class Models:
    student: str | None = option(
        None,
        "--student",
        "Student: hub id, folder, .gguf file or lab:TASK/student.",
        "the embedded student",
    )
    teacher: str | None = option(
        None,
        "--teacher",
        "Teacher: hub id, folder, .gguf file or lab:TASK/teacher; self: a frozen copy "
        "of the student, with --privileged-column.",
        "the embedded teacher",
    )
    teacher_ema: float | None = option(
        None,
        "--teacher-ema",
        "With --teacher self: after every update the teacher becomes "
        "α·teacher + (1−α)·student, 0 < α < 1.",
        "none: the teacher stays as it is",
        above=0,
        high=1,
    )
    cross_tokenizer: Literal["strict", "simct", "simct-released", "off"] = option(
        "strict",
        "--cross-tokenizer",
        "Where the tokenizers differ, units of text are compared: strict (units of "
        "one token on each side), simct (all), simct-released (as its authors' code), or off (refuse).",
    )
    student_quantize: Literal["none", "nf4", "int8"] = option(
        "none",
        "--student-quantize",
        "Student's frozen linear layers in 4 or 8 bits (bitsandbytes), with --lora: none, "
        "nf4 or int8.",
    )
    teacher_quantize: Literal["none", "nf4", "int8"] = option(
        "none", "--teacher-quantize", "Teacher's linear layers, likewise: none, nf4 or int8."
    )
    trust_remote_code: bool = option(
        False, "--trust-remote-code", "Run model code that comes with a hub repository."
    )


@dataclass(frozen=True)
class Adapter:
    rank: int | None = option(
        None,
        "--lora",
        "Rank of a LoRA adapter: it alone trains, the student's own weights stay as they are, in the "
        "compute dtype.",
        "none: all weights train",
        low=1,
        high=4096,
    )
    alpha: float | None = option(
        None, "--lora-alpha", "α: the adapter counts α/rank.", "twice the rank", above=0
    )
    targets: str = option(
        "all-linear",
        "--lora-targets",
        "Linear layers that get an adapter: all-linear (all but the output head), or names "
        "such as q_proj,v_proj.",
    )
    merge: bool = option(
        False,
        "--lora-merge",
        "Write model/ with the adapter added to the weights, and the adapter itself to adapter/.",
    )


@dataclass(frozen=True)
class Data:
    dataset: str | None = option(
        None,
        "--dataset",
        "Training prompts: .jsonl/.json/.csv/.parquet file, hub id, lab:TASK, a preset (gsm8k, math, …; "
        "gsm8k=FILE: a copy of its form); name#1000: so many of its rows, by --seed; several with weights: "
        "gsm8k:3,more.jsonl:1.",
        "the embedded task",
    )
    split: str | None = option(
        None, "--split", "Split of a hub or embedded data set.", "the preset's, else train"
    )
    prompt_column: str | None = option(
        None,
        "--prompt-column",
        "Column (a.b reaches into records) with the prompt.",
        "the preset's, else found by name",
    )
    answer_column: str | None = option(
        None,
        "--answer-column",
        "Column with the reference answer.",
        "the preset's, else found by name",
    )
    streaming: bool = option(
        False,
        "--streaming",
        "Read only the rows that the run needs, drawn from a buffer of 1,000 rows by --seed.",
    )
    privileged_column: str | None = option(
        None,
        "--privileged-column",
        "Column that the teacher's prompt shows and the student's "
        "does not, such as a reference solution.",
    )
    privileged_template: str | None = option(
        None,
        "--privileged-template",
        "Teacher's user turn with {problem} and {solution} in it; --instruction follows it.",
        "the embedded task's, else as in data.py",
    )
    student_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--student-thinking",
        "Thinking switch of the student's chat template: on, off, or auto "
        "(what the template does by itself).",
    )
    teacher_thinking: Literal["auto", "on", "off"] = option(
        "auto",
        "--teacher-thinking",
        "Thinking switch of the teacher's chat template: on, off or auto.",
    )
    system: str | None = option(None, "--system", "System message put before every prompt.")
    instruction: str | None = option(
        None, "--instruction", "Text appended to every prompt after a blank line.", "the preset's"
    )
    prompt_template: str | None = option(
        None,
        "--prompt-template",
        "User's turn with {prompt}, and {COLUMN}s of its row, in it ({{ is a brace), "
        "such as 'Question: {prompt} Answer:'.",
    )
    few_shot: int = option(
        0,
        "--few-shot",
        "Training rows with their solutions shown before every prompt, drawn by --seed and not taught.",
        low=0,
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto", "--template", "Prompt format: chat, plain, or auto (chat where a template exists)."
    )
    max_prompt_tokens: int = option(
        1024, "--max-prompt-tokens", "Longer prompts are dropped and counted (tokens).", low=1
    )


@dataclass(frozen=True)
class Schedule:
    prefix: str = option(
        "25%",
        "--prefix",
        "Response tokens sampled and taught: 512, 25% (of --max-new-tokens), full, "
        "linear:L0:d (L0 + d·k at update k), staircase:L0:dH:every, auto (grows when its newest tokens have no "
        "more to teach).",
    )
    lr: float = option(5e-5, "--lr", "Peak learning rate of AdamW.", above=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "linear", "--lr-schedule", "After warm-up: constant, linear or cosine, ending at 0."
    )
    warmup: str = option("5%", "--warmup", "Linear warm-up: updates (20) or a share of them (5%).")


@dataclass(frozen=True)
class Sampling:
    samples: int = option(4, "--samples", "Rollouts per prompt.", low=1)
    temperature: float = option(
        1.0, "--temperature", "Sampling temperature (0 is greedy); not the loss's.", low=0
    )
    top_p: float = option(
        1.0, "--top-p", "Nucleus mass kept when sampling (1 keeps all).", above=0, high=1
    )
    top_k: int = option(0, "--top-k", "Most likely tokens kept when sampling (0 keeps all).", low=0)
    max_new_tokens: int | None = option(
        None,
        "--max-new-tokens",
        "Longest full response (tokens).",
        "the embedded task's, else what the models' positions allow, at most 2048",
        low=1,
    )
    eos: Literal["student", "teacher", "union"] = option(
        "union",
        "--eos",
        "Whose end-of-sequence ids stop a rollout: student, teacher or union (of "
        "different tokenizers: the student's).",
    )
    begin: str | None = option(
        None, "--begin", "Text forced at the start of every response, not taught (a think tag)."
    )
    off_policy: str = option(
        "none",
        "--off-policy",
        "Rollouts the teacher writes in the student's place: none, sft "
        "(cross-entropy on them) or divergence (--divergence on them); :0.5 for that share of them.",
    )
    rows: int = option(64, "--generation-rows", "Rollouts per generate call, per rank.", low=1)


@dataclass(frozen=True)
class Divergence:
    name: str = option(
        "reverse-kl",
        "--divergence",
        "reverse-kl Σ S(log S − log T), forward-kl Σ T(log T − log S), "
        "jsd:β = β·KL(T‖m) + (1−β)·KL(S‖m), m = βT + (1−β)S; nats per token.",
    )
    estimator: str = option(
        "full",
        "--estimator",
        "full: the whole vocabulary; top-k:K: the teacher's K most likely tokens "
        "and one bucket with the rest of the mass; sampled: the sampled token alone (reverse-kl).",
    )
    temperature: float = option(
        1.0, "--kl-temperature", "Temperature of both distributions in the loss.", above=0
    )
    clip: float | None = option(
        None,
        "--clip",
        "κ: with forward-kl, Σ_v min(T(log T − log S), κ): the most that one vocabulary "
        "entry may add (nats).",
        above=0,
    )
    reduction: Literal["token", "sequence", "sum"] = option(
        "token",
        "--reduction",
        "token: mean over taught tokens; sequence: mean over rollouts of "
        "their token means; sum: sum over tokens, mean over rollouts.",
    )


@dataclass(frozen=True)
class Weights:
    window: str = option(
        "all",
        "--window",
        "Tokens of a rollout that are taught: all, or K of them: first:K, middle:K, last:K, "
        "random:K (in a row), scattered:K, highest-kl:K, highest-entropy:K.",
    )
    select: str = option(
        "all",
        "--select",
        "Tokens of those that are taught, by importance (TIP): all, soft-or, overconfident, "
        "entropy-sample, entropy, divergence, random or bottom.",
    )
    keep: float | None = option(
        None,
        "--keep",
        "Share of every rollout's tokens that --select keeps.",
        "0.5",
        above=0,
        high=1,
    )
    position: str = option(
        "uniform",
        "--position-weight",
        "Weight of a token by its place in the rollout: uniform, moderate (rises "
        "from 0.31 to 1), decreasing (its mirror image) or sigmoid:w,τ,s.",
    )


@dataclass(frozen=True)
class Train:
    steps: int = option(100, "--steps", "Updates.", low=0)
    batch_size: int = option(8, "--batch-size", "Prompts per update, over all ranks.", low=1)
    micro_batch_size: int = option(
        8, "--micro-batch-size", "Rollouts per forward pass, per rank.", low=1
    )
    gradient_checkpointing: bool = option(
        False,
        "--gradient-checkpointing",
        "Keep only each layer's input in training and run "
        "the layer again in backward: less memory, more time.",
    )
    weight_decay: float = option(
        0.0, "--weight-decay", "AdamW weight decay, on matrices only.", low=0
    )
    grad_clip: float = option(
        1.0, "--grad-clip", "Largest gradient norm (0 turns clipping off).", low=0
    )


@dataclass(frozen=True)
class Extrapolation:
    kind: Literal["none", "effopd", "always-1", "random"] = option(
        "none",
        "--extrapolate",
        "After updates 1, 2, 4, 8, …, try points further along the way since the last such "
        "update: none, effopd (go on while --extrapolate-score rises), always-1 or random (controls).",
    )
    score: Literal["accuracy", "heldout-kl"] = option(
        "accuracy",
        "--extrapolate-score",
        "accuracy (of one full answer a problem), or heldout-kl (minus the reverse KL "
        "on fresh rollouts of the current prefix).",
    )
    problems: int = option(
        50,
        "--extrapolate-problems",
        "Fixed training prompts that are scored, with the same seeds for every candidate.",
        low=1,
    )
    modules: Literal["attention-mlp", "all"] = option(
        "attention-mlp",
        "--extrapolate-modules",
        "What moves: attention-mlp (linear layers of the trunk) or all.",
    )
    reset: bool = option(False, "--extrapolate-reset", "Forget AdamW's moments of what moved.")
    diagnostics: bool = option(
        False,
        "--extrapolate-diagnostics",
        "Norm, effective rank and cosine with the final one of every "
        "displacement, module by module (keeps copies of the weights in the run folder until the end).",
    )


@dataclass(frozen=True)
class Evaluation:
    dataset: str | None = option(
        None,
        "--eval-dataset",
        "Held-out problems: as --dataset.",
        "the test split of the embedded task or preset, else rows held out of --dataset",
    )
    split: str | None = option(
        None,
        "--eval-split",
        "Split of a hub or embedded evaluation set.",
        "the preset's, else test",
    )
    problems: int = option(
        200,
        "--eval-samples",
        "Held-out problems evaluated before, during and after (0: none).",
        low=0,
    )
    rollouts: int = option(1, "--eval-rollouts", "Answers sampled per held-out problem.", low=1)
    every: int = option(
        0, "--eval-every", "Updates between evaluations (0: only before and after).", low=0
    )
    temperature: float = option(
        1.0, "--eval-temperature", "Sampling temperature of evaluation (0 is greedy).", low=0
    )
    kl_prompts: int = option(
        32, "--kl-prompts", "Held-out prompts whose full-length rollouts measure the KL.", low=1
    )
    tail_every: int = option(
        25,
        "--tail-every",
        "Updates between tail probes, small looks beyond the prefix (0: none).",
        low=0,
    )
    tail_prompts: int = option(8, "--tail-prompts", "Held-out prompts of a tail probe.", low=1)
    check_samples: int = option(
        8,
        "--check-samples",
        "Held-out problems that student and teacher answer before the run, where that takes less "
        "than some 15 seconds (0: none).",
        low=0,
    )
    answer_format: Literal["auto", "boxed", "hash", "last-number", "choice", "exact"] = option(
        "auto",
        "--answer-format",
        "Where an answer is read: auto (as the data set says, else boxed, hash or the last "
        "number), boxed, hash (#### 42), last-number, choice (a letter) or exact.",
    )


@dataclass(frozen=True)
class Runtime:
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "--dtype",
        "Compute: auto, float32 or bfloat16 (student master weights stay float32).",
    )
    head_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "--head-dtype", "Matmuls of the output head: auto (as --dtype), float32, bfloat16."
    )
    device: str = option("auto", "--device", "Student's device: auto, cpu, cuda, cuda:1, mps.")
    teacher_device: str | None = option(
        None,
        "--teacher-device",
        "Teacher's device; auto: its layers are spread over all GPUs and, as far as "
        "they do not fit, main memory and disk.",
        "the student's",
    )
    teacher_memory: float | None = option(
        None,
        "--teacher-memory",
        "With --teacher-device auto: how much of each GPU (without one: of main "
        "memory) the teacher may fill (GiB).",
        "half of what is free",
        low=0,
    )
    gpus: int | None = option(
        None,
        "--gpus",
        "Ranks that are started on this machine, each on a GPU of its own (with --device cpu: "
        "as processes).",
        "1, or what a launcher such as torchrun starts",
        low=1,
    )
    rank_timeout: int = option(
        1800,
        "--rank-timeout",
        "How long ranks wait for each other before the run stops (seconds).",
        low=1,
    )
    check_ranks_every: int = option(
        50,
        "--check-ranks-every",
        "Updates between comparisons of all ranks' weights (0: only before checkpoints).",
        low=0,
    )
    seed: int = option(0, "--seed", "Seed of prompts, rollouts and evaluation.")
    head_memory_mb: int = option(
        256, "--head-memory-mb", "Memory budget of the loss's vocabulary-sized chunk (MiB).", low=1
    )


@dataclass(frozen=True)
class Checkpoint:
    out: str | None = option(None, "--out", "Run folder.", "runs/<time>")
    save_every: int = option(
        25, "--save-every", "Updates between checkpoints (0: only at the end).", low=0
    )


@dataclass(frozen=True)
class Trackers:
    to: str = option(
        "none",
        "--report-to",
        "Where metrics and evaluations go beside metrics.jsonl: none, tensorboard, wandb, trackio; several "
        "with commas.",
    )
    name: str | None = option(
        None,
        "--run-name",
        "The run's name there, and the title of its model card.",
        "the run folder's; the models'",
    )


@dataclass(frozen=True)
class Export:
    push: str | None = option(
        None,
        "--push-to-hub",
        "Hub repository, USER/NAME, that gets model/ after the run; private if it is made here.",
        "none",
    )
    public: bool = option(
        False, "--hub-public", "A repository that is made for --push-to-hub is public."
    )


@dataclass(frozen=True)
class Config:
    models: Models = field(default_factory=Models)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    schedule: Schedule = field(default_factory=Schedule)
    rollout: Sampling = field(default_factory=Sampling)
    divergence: Divergence = field(default_factory=Divergence)
    weights: Weights = field(default_factory=Weights)
    train: Train = field(default_factory=Train)
    extrapolation: Extrapolation = field(default_factory=Extrapolation)
    evaluate: Evaluation = field(default_factory=Evaluation)
    runtime: Runtime = field(default_factory=Runtime)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    trackers: Trackers = field(default_factory=Trackers)
    export: Export = field(default_factory=Export)


def options(*sections: str) -> dict[str, dataclasses.Field]:
    """``section.key`` → field, for the named sections or single keys (all if none is named)."""
    return {
        f"{section.name}.{key.name}": key
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(section.type)
        if not sections or section.name in sections or f"{section.name}.{key.name}" in sections
    }


def as_dict(config: Config) -> dict:
    """The resolved config as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def build(values: dict[str, object]) -> Config:
    """``{"train.steps": 5, …}`` over the defaults → a checked Config. UserError names a bad key or value."""
    known = options()
    sections: dict[str, dict] = {section.name: {} for section in dataclasses.fields(Config)}
    for path, value in values.items():
        if path not in known:
            path = path[:80]
            near = difflib.get_close_matches(path, known, 1, 0.4)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; known sections: {', '.join(sections)}"
            )
            raise UserError(f"unknown setting '{path}'{hint}")
        section, key = path.split(".")
        sections[section][key] = _typed(path, value, known[path].type)
    config = Config(**{s.name: s.type(**sections[s.name]) for s in dataclasses.fields(Config)})
    check(config)
    return config


def read_tree(path: str) -> dict:
    """Return the keys of a YAML file.

    UserError: the file is missing or damaged, gives a key twice, or has more than LARGEST
    characters or expanded nodes.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"config file {path}: cannot be read as UTF-8 text ({type(error).__name__}); check its path"
        ) from None
    if len(text) > LARGEST:
        raise UserError(
            f"config file {path}: it has more than {LARGEST:,} characters; settings fit in far fewer"
        )
    try:
        tree = _yaml(text)
    except ValueError as error:
        raise UserError(
            f"config file {path}: not valid YAML ({' '.join(str(error).split())[:300]}); repair it"
        ) from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"config file {path}: expected sections such as 'train: {{steps: 5}}', got {type(tree).__name__}"
        )
    return tree


def _yaml(text: str):
    """Return the plain values of a YAML text.

    ValueError: it is not YAML, names other types, gives a key twice, contains itself, or expands to
    more than LARGEST nodes.
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return None
        _expand(root, {})
        return yaml.constructor.SafeConstructor().construct_document(root)
    except (
        yaml.YAMLError,
        OverflowError,
        RecursionError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:
        raise ValueError(str(error)) from None


def _expand(node, sizes: dict) -> int:
    """Check the keys of a composed YAML node, resolve its merge keys, and return its expanded size.

    The size is a number of nodes. An alias or a merged mapping counts every time it is used: nine
    lines of aliases of aliases can expand to 10^9 nodes. ``sizes`` remembers finished nodes, so
    each is visited once. None in it marks a node whose children are being counted.
    """
    if node in sizes:
        if sizes[node] is None:
            raise ValueError(f"the anchor in line {node.start_mark.line + 1} contains itself")
        return sizes[node]
    sizes[node] = None
    children = [] if node.id == "scalar" else node.value
    if node.id == "mapping":
        children = itertools.chain.from_iterable(node.value)
    size = 1
    for child in children:
        size += _expand(child, sizes)
        if size > LARGEST:
            raise ValueError(f"its aliases and merge keys expand to more than {LARGEST:,} nodes")
    if node.id == "mapping":
        _check_keys(node)
        _merge(node)
    sizes[node] = size
    return size


def _check_keys(mapping) -> None:
    """Raise ValueError if a mapping node gives a key twice; several merge keys are allowed."""
    seen = set()
    for key, _ in mapping.value:
        if key.id != "scalar" or key.tag == MERGE:
            continue
        if key.value in seen:
            raise ValueError(
                f"the key {key.value[:80]!r} is there twice, again in line {key.start_mark.line + 1}"
            )
        seen.add(key.value)


def _merge(mapping) -> None:
    """Replace the merge keys of a mapping node by the pairs of the mappings that they name.

    The merge keys of those mappings must be resolved already. PyYAML is not left to do this: in a
    list of mappings the first must win, but in PyYAML 6.0.4 the last one can.
    """
    merged, own = [], []
    for key, value in mapping.value:
        if key.tag != MERGE:
            own.append((key, value))
            continue
        sources = value.value if value.id == "sequence" else [value]
        for source in reversed(sources):  # of equal keys the last pair counts
            if source.id != "mapping":
                line = key.start_mark.line + 1
                raise ValueError(
                    f"the merge key in line {line} needs a mapping or a list of mappings"
                )
            merged += source.value
    mapping.value = merged + own


def flatten(path: str, tree: dict) -> dict[str, object]:
    """Sections with keys → ``{"section.key": value}``. UserError on a wrong shape."""
    values = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise UserError(
                f"config file {path}: section {reprlib.repr(section)} must hold keys, got {reprlib.repr(keys)}"
            )
        values.update({f"{section}.{key}": value for key, value in keys.items()})
    return values


def read_yaml(path: str) -> dict[str, object]:
    """A YAML file of sections → ``{"section.key": value}``. UserError on a missing file or a wrong shape."""
    return flatten(path, read_tree(path))


def read_assignments(assignments: list[str]) -> dict[str, object]:
    """``["train.steps=5"]`` → ``{"train.steps": 5}``; the value is read as YAML."""
    values = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected section.key=value, such as train.steps=5")
        try:
            values[path.strip()] = _yaml(value)
        except ValueError:
            raise UserError(f"--set {text}: the value is not valid YAML; quote it") from None
    return values


def _typed(path: str, value: object, kind: object) -> object:
    """``value`` as the declared type; an int is a float, a number is text where text is due, nothing else is bent."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    base = value_type(kind)
    if base is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(
            f"{path}: expected a number below 2^63, got one of {value.bit_length()} bits; give a smaller one"
        )
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if base is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, bool):  # YAML 1.1 reads on and off as true and false
        word = "on" if value else "off"
        if word in choices(kind):
            value = word
    if type(value) is not base:
        raise UserError(
            f"{path}: expected {NAMES[base]}, got {reprlib.repr(value)}; change {flag(path)}"
        )
    return value


def choices(kind: object) -> tuple[str, ...]:
    """Return the values that the type of an option lists; empty when it is no ``Literal``."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def value_type(kind: object) -> type:
    """Return int, float, str or bool: the type of an option, without None."""
    if choices(kind):
        return str
    return kind if isinstance(kind, type) else typing.get_args(kind)[0]


def _check_value(path: str, value: object, declared: dataclasses.Field) -> None:
    """Raise UserError unless ``value`` is None, or what its option allows."""
    allowed = choices(declared.type)
    if allowed and value not in allowed:
        raise UserError(f"{path} '{value}': {flag(path)} must be one of {', '.join(allowed)}")
    if not isinstance(value, (int, float)):
        return
    limits = declared.metadata
    too_low = value < limits.get("low", -math.inf) or value <= limits.get("above", -math.inf)
    too_high = value > limits.get("high", math.inf)
    if too_low or too_high or not math.isfinite(value):
        words = {"low": "at least", "above": "above", "high": "at most"}
        bounds = " and ".join(f"{words[name]} {limits[name]}" for name in words if name in limits)
        raise UserError(f"{path} {value}: expected a finite number {bounds}; change {flag(path)}")


def check(config: Config) -> None:
    """Raise UserError where a value, or several together, break a rule."""
    for path, declared in options().items():
        _check_value(path, get(config, path), declared)
    if (config.runtime.gpus or 1) > config.train.batch_size:
        raise UserError(
            f"--batch-size {config.train.batch_size}: {config.runtime.gpus} ranks need at least one prompt each; raise it"
        )
    name, _ = parse_divergence(config.divergence.name)
    estimator, _ = parse_estimator(config.divergence.estimator)
    off_policy = parse_off_policy(config.rollout.off_policy)
    if estimator == "sampled":
        for wrong, got, instead in (
            (
                name != "reverse-kl",
                f"--divergence {config.divergence.name}",
                "the student's own tokens estimate the reverse KL only: use reverse-kl, or --estimator full",
            ),
            (
                config.divergence.temperature != 1,
                f"--kl-temperature {config.divergence.temperature:g}",
                "it teaches the student's distribution as it is: use 1, or --estimator full",
            ),
            (
                config.rollout.temperature == 0,
                "--temperature 0",
                "a greedy token is no sample of the student's distribution: use 1, or --estimator full",
            ),
            (
                off_policy is not None and off_policy.loss == "divergence",
                f"--off-policy {config.rollout.off_policy}",
                "the tokens must be the student's own: use --estimator full",
            ),
        ):
            if wrong:
                raise UserError(f"--estimator sampled with {got}: {instead}")
    if off_policy is not None and off_policy == parse_off_policy("sft"):
        for path in (
            "divergence.name",
            "divergence.estimator",
            "divergence.temperature",
            "divergence.clip",
        ):
            if get(config, path) != options()[path].default:
                raise UserError(
                    f"{flag(path)} {get(config, path)} with --off-policy sft: every rollout is the teacher's and has "
                    "the cross-entropy as its loss; leave it out, or use --off-policy divergence"
                )
    if config.divergence.clip is not None and (name != "forward-kl" or estimator != "full"):
        raise UserError(
            f"--clip {config.divergence.clip:g} with --divergence {config.divergence.name} --estimator "
            f"{config.divergence.estimator}: the entry-wise clip is of the forward KL over the whole vocabulary; "
            "use --divergence forward-kl --estimator full, or leave it out"
        )
    _check_teacher(config)
    if (
        config.data.prompt_template is not None
        and config.data.prompt_template.count("{prompt}") != 1
    ):
        raise UserError(
            f"--prompt-template {config.data.prompt_template[:60]!r}: expected {{prompt}} in it once; put it where the prompt belongs"
        )
    for path in (
        ("adapter.alpha", "adapter.targets", "adapter.merge") if config.adapter.rank is None else ()
    ):
        if get(config, path) != options()[path].default:
            raise UserError(f"{flag(path)}: it needs an adapter; add --lora 16, or leave it out")
    if config.models.student_quantize != "none" and (
        config.adapter.rank is None or config.adapter.merge
    ):
        raise UserError(
            f"--student-quantize {config.models.student_quantize}: weights of so few bits do not train and take no adapter in; "
            + (
                "leave --lora-merge out, and merge into the full weights later"
                if config.adapter.merge
                else "add --lora 16"
            )
        )
    if config.runtime.teacher_memory is not None and config.runtime.teacher_device != "auto":
        raise UserError(
            f"--teacher-memory {config.runtime.teacher_memory:g}: it limits --teacher-device auto; add that, or leave it out"
        )
    for wrong, got in (
        ((config.runtime.gpus or 1) > 1, "--gpus"),
        (config.models.teacher == SELF, "--teacher self"),
        (config.models.teacher_quantize != "none", "--teacher-quantize"),
    ):
        if wrong and config.runtime.teacher_device == "auto":
            raise UserError(
                f"--teacher-device auto with {got}: it spreads one teacher with weights of its own over all GPUs; leave one of them out"
            )
    if config.weights.keep is not None and config.weights.select == "all":
        raise UserError(
            f"--keep {config.weights.keep:g}: it is the share that --select keeps; add --select soft-or, or leave it out"
        )
    parse_selection(config.weights.select, selected(config))
    parse_position_weight(config.weights.position)
    if config.extrapolation.kind == "none":
        for path in ("extrapolation.score", "extrapolation.problems", "extrapolation.reset"):
            if get(config, path) != options()[path].default:
                raise UserError(
                    f"{flag(path)} {get(config, path)}: nothing is extrapolated; add --extrapolate effopd, or leave it out"
                )
    parse_window(config.weights.window)
    parse_trackers(config.trackers.to)
    check_repository(config.export.push, config.export.public)
    parse_prefix(config.schedule.prefix, config.rollout.max_new_tokens or sys.maxsize)
    warmup_steps(config.schedule.warmup, config.train.steps)


def _check_teacher(config: Config) -> None:
    models, data = config.models, config.data
    if models.teacher_ema is not None and (models.teacher != SELF or models.teacher_ema == 1):
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --teacher {models.teacher}: it averages the student into a copy of "
            "itself; use --teacher self and a number below 1, such as 0.999, or leave it out"
        )
    if models.teacher_ema is not None and models.teacher_quantize != "none":
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --teacher-quantize {models.teacher_quantize}: an average needs its weights in "
            "float32; leave one of them out"
        )
    if models.teacher_ema is not None and config.adapter.rank is not None:
        raise UserError(
            f"--teacher-ema {models.teacher_ema:g} with --lora: its teacher is the student without the adapter, which does not move; "
            "leave one of them out"
        )
    if (
        models.teacher == SELF
        and data.privileged_column is None
        and data.teacher_thinking == data.student_thinking
    ):
        raise UserError(
            "--teacher self: the student's own weights behind the same prompt have nothing to teach; name what the teacher "
            "alone sees with --privileged-column, such as solution"
        )
    if data.privileged_template is not None:
        if data.privileged_column is None:
            raise UserError(
                "--privileged-template: it needs what the teacher alone sees; name it with --privileged-column"
            )
        if missing := [
            name for name in ("{problem}", "{solution}") if name not in data.privileged_template
        ]:
            raise UserError(
                f"--privileged-template {data.privileged_template[:60]!r}: it has no {missing[0]}; put it where the "
                f"{missing[0][1:-1]} belongs"
            )


def selected(config: Config) -> float:
    """The share of tokens that --select keeps."""
    return 0.5 if config.weights.keep is None else config.weights.keep


def parse_divergence(text: str) -> tuple[str, float | None]:
    """``reverse-kl`` | ``forward-kl`` | ``jsd:β`` → (name, β or None). UserError otherwise."""
    if text in ("reverse-kl", "forward-kl"):
        return text, None
    name, _, beta = text.partition(":")
    if name == "jsd" and beta:
        try:
            value = float(beta)
        except ValueError:
            value = math.nan
        if 0 < value < 1:
            return "jsd", value
        if value in (0, 1):
            instead = "forward-kl" if value == 0 else "reverse-kl"
            raise UserError(f"divergence '{text}': the JSD vanishes at β = {beta}; use {instead}")
    raise UserError(
        f"divergence '{text}': --divergence must be reverse-kl, forward-kl or jsd:β with 0 < β < 1"
    )


def parse_estimator(text: str) -> tuple[str, int | None]:
    """``full`` → ("full", None), ``sampled`` → ("sampled", None), ``top-k:64`` → ("top-k", 64). UserError otherwise."""
    name, _, size = text.partition(":")
    if text in ("full", "sampled"):
        return text, None
    if name == "top-k" and re.fullmatch(r"0*[1-9]\d{0,17}", size, re.ASCII):
        return name, int(size)
    raise UserError(
        f"estimator '{text}': --estimator must be full, sampled or top-k:K with K at least 1, such as top-k:64"
    )


def parse_trackers(text: str) -> tuple[str, ...]:
    """``none`` → (), ``tensorboard,wandb`` → both. UserError otherwise."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ("none",):
        return ()
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UserError(
            f"--report-to {text!r}: expected none, or some of {', '.join(TRACKERS)} with commas, got {unknown[0]!r}"
        )
    return names


def check_repository(name: str | None, public: bool) -> None:
    """UserError unless ``name`` can be a hub repository's, or is None and nothing is to be public."""
    if name is None and public:
        raise UserError(
            "--hub-public: nothing is pushed; add --push-to-hub USER/NAME, or leave it out"
        )
    if name is not None and not re.fullmatch(
        r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII
    ):
        raise UserError(
            f"--push-to-hub {name[:80]!r}: expected USER/NAME of letters, digits, '-', '_' and '.', such as me/my-student"
        )


def get(config: Config, path: str):
    """``get(config, "train.steps")``."""
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def flag(path: str) -> str:
    """The command-line flag of ``section.key``."""
    return options()[path].metadata["flag"]


def replace(config: Config, **sections: dict) -> Config:
    """A copy with some keys of some sections changed: ``replace(config, rollout={"max_new_tokens": 64})``."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **keys)
            for name, keys in sections.items()
        },
    )
