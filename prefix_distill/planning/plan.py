"""`prefix-distill plan`: forecast memory by phase, FLOPs and time from config files alone.

FLOPs are useful ones, as in the ledger of a run whose rollouts all reach the prefix. This is an
upper bound, because rollouts that end early cost less. Evaluations and tail probes are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PreTrainedConfig

from .. import config as configuration
from ..config import SELF, Config
from ..display import memory_text
from ..engine import folders
from ..engine.device import choose_device
from ..engine.free_memory import read_free_memory
from ..engine.hub import check_reachable, contacting
from ..engine.memory import read_batch_sizes
from ..engine.models import Model
from ..engine.shapes import read_shape
from ..errors import UserError, one_line
from ..maths import flops
from ..maths.flops import Ledger
from ..maths.schedule import PrefixSchedule, parse_prefix
from ..training.defaults import fill_in_planned
from ..training.problems import settle_max_new_tokens
from ..training.run import Notes, settled
from .case import (
    Case,
    Dtypes,
    Lengths,
    Network,
    build_case,
    choose_adapter,
    describe_adapter,
)
from .disk import describe_disk, estimate_disk
from .fitting import RULE, Planned, fit_all, list_flags, search
from .forecast import Forecaster
from .ghosts import sketch
from .gpus import Card, read_cards
from .prompt_lengths import assume_prompts, read_prompts
from .rate import RateSource, estimate_seconds
from .timing import ASSUMPTIONS, Workload, count_flops

USUAL_PREFIXES = "25%,50%,full"
NO_RATE = RateSource()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's name, the folder or hub id of its files, and its config."""

    name: str
    folder: str
    config: PreTrainedConfig


def plan(
    config: Config,
    prompt_tokens: int | None = None,
    prefixes: str = USUAL_PREFIXES,
    rate_source: RateSource = NO_RATE,
    card: str | None = None,
) -> dict:
    """Return the document of `prefix-distill plan`.

    ``prompt_tokens``: the length of every prompt, in place of a dataset's; ``prefixes``: schedules
    besides the config's own, comma-separated; ``card``: cards to fit (``gpus.read_cards``).
    UserError: an option is invalid, a file cannot be read, or the prompts and responses are longer
    than the models' positions.
    """
    rate_source.check()
    cards = read_cards(card, rate_source.tflops)
    notes = Notes()
    config = fill_in_planned(config, notes, has_prompts=prompt_tokens is not None)
    student, teacher = _read_sources(config)
    dtypes = _choose_dtypes(config, notes.lines)
    nets = _sketch_models(config, (student, teacher), dtypes)
    if config.data.dataset is not None and prompt_tokens is None:
        prompts = read_prompts(config, nets, (student.folder, teacher.folder), notes=notes)
    else:
        prompts = assume_prompts(config, prompt_tokens, nets, notes=notes)
    config = configuration.replace(config, train={"steps": prompts.steps})
    longest = max(max(lengths) for lengths in prompts.lengths)
    config = settle_max_new_tokens(
        config, nets, longest_prompt=longest, task_limit=prompts.task_limit, notes=notes
    )
    limit = settled(config.rollout.max_new_tokens, "--max-new-tokens")
    schedules = _parse_schedules(config, prefixes, limit)
    rate = rate_source.read(config, nets[0], dtypes.compute)
    forecaster = Forecaster(student.config, teacher.config, (student.name, teacher.name))
    lengths = Lengths(prompts.lengths, prefix=limit, limit=limit)
    longest_case = build_case(config, dtypes, lengths, support=prompts.support)
    shapes = [read_shape(net, prompts.support) for net in nets]
    work = Workload(
        config=config,
        student=student.config,
        shapes=shapes,
        prompts=prompts.lengths,
        schedule=next(iter(schedules.values())),
        limit=limit,
    )
    rows = _price_prefixes(work, forecaster, longest_case, schedules=schedules, rate=rate)
    case = replace(longest_case, prefix=rows[0]["tokens"][1])  # the config's own prefix
    disk = _estimate_disk(config, nets[0], dtypes, notes=notes)
    return {
        **_describe(config, nets, dtypes, support=prompts.support),
        "rate": rate,
        "prefixes": rows,
        "machine": _read_machine(forecaster, config, case, notes=notes),
        "cards": _fit_cards(work, forecaster, case, cards=cards, notes=notes.lines),
        "disk": disk,
        "rule": RULE,
        "assumptions": list(ASSUMPTIONS),
        "notes": [*notes.lines, *flops.describe_not_counted(shapes)],
        "warnings": notes.warnings,
    }


def _price_prefixes(
    work: Workload,
    forecaster: Forecaster,
    case: Case,
    *,
    schedules: dict[str, PrefixSchedule],
    rate: dict | None,
) -> list[dict]:
    """Return the FLOPs, seconds and memory of the run with each schedule."""
    config = work.config
    rows = []
    for text, schedule in schedules.items():
        tokens = [schedule.length(0), schedule.longest(config.train.steps or 1)]
        cost = _estimate_cost(
            count_flops(config, work.shapes, prompts=work.prompts, schedule=schedule), config, rate
        )
        memory = forecaster.forecast(replace(case, prefix=tokens[1]))
        rows.append({"prefix": text, "tokens": tokens, **cost, "memory": memory})
    return rows


def _fit_cards(
    work: Workload, forecaster: Forecaster, case: Case, *, cards: tuple[Card, ...], notes: list[str]
) -> list[dict]:
    """Return how the run fits each card, in float32 on cards without bfloat16."""
    older = build_case(
        work.config,
        _choose_older_dtypes(work.config, Dtypes(case.dtype, case.terms.dtype)),
        Lengths(work.prompts, prefix=case.prefix, limit=work.limit),
        support=case.support,
    )
    planned = Planned(work=work, forecaster=forecaster, cases=(case, older))
    return fit_all(planned, cards, notes)


def read_source(name: str, trust_remote_code: bool = False) -> Source:
    """Read a model's config from a folder, a hub id or ``lab:TASK/ROLE``, without its weights.

    Of a folder, config.json is enough. UserError: there is no config, or it is not supported.
    """
    folder, extra = folders.locate(name)
    if extra:
        raise UserError(
            f"model {name}: expected a config.json, which an adapter or a .gguf file does not "
            "have; name the base model"
        )
    try:
        with contacting(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        folders.check_config(name, folder, config)
    except UserError:
        raise
    except Exception as error:  # the hub, the disk or the model's own code fails in any way
        check_reachable(name, error)
        raise UserError(
            f"model {name}: its config cannot be read ({type(error).__name__}: {one_line(error)}); "
            "give a hub id or a folder with config.json"
        ) from None
    return Source(name=name, folder=folder, config=config)


def _read_sources(config: Config) -> tuple[Source, Source]:
    """Return the student and the teacher."""
    trust = config.models.trust_remote_code
    student = read_source(settled(config.models.student, "--student"), trust)
    teacher = settled(config.models.teacher, "--teacher")
    if teacher == SELF:
        return student, student
    return student, read_source(teacher, trust)


def _sketch_models(config: Config, sources: tuple[Source, Source], dtypes: Dtypes) -> list[Model]:
    """Return the student and the teacher without weights."""
    student, teacher = sources
    return [
        sketch(student.name, student.config, Network(torch.float32, choose_adapter(config))),
        sketch(teacher.name, teacher.config, Network(dtypes.compute)),
    ]


def _choose_dtypes(config: Config, notes: list[str]) -> Dtypes:
    """Return the dtype of the networks and of the heads."""
    runtime = config.runtime
    if runtime.dtype == "auto":
        compute = torch.bfloat16
        notes.append("dtype bfloat16: --dtype auto chooses it on a GPU")
    else:
        compute = getattr(torch, runtime.dtype)
    if runtime.head_dtype == "auto":
        return Dtypes(compute, compute)
    return Dtypes(compute, getattr(torch, runtime.head_dtype))


def _choose_older_dtypes(config: Config, dtypes: Dtypes) -> Dtypes:
    """Return the dtypes on a card without bfloat16: float32, where --dtype auto chooses."""
    runtime = config.runtime
    compute, head = dtypes
    if runtime.dtype == "auto":
        compute = torch.float32
        if runtime.head_dtype == "auto":
            head = torch.float32
    return Dtypes(compute, head)


def _parse_schedules(config: Config, prefixes: str, limit: int) -> dict[str, PrefixSchedule]:
    """Return the schedules by their text, the config's own first."""
    texts = [config.schedule.prefix, *prefixes.split(",")]
    schedules = {}
    for text in texts:
        schedules[text.strip()] = parse_prefix(text, limit)
    return schedules


def _estimate_disk(config: Config, student: Model, dtypes: Dtypes, notes: Notes) -> dict[str, int]:
    """Return the bytes of the run folder (``disk.estimate_disk``), and add a note."""
    trained = student.parameters
    if config.adapter.rank:
        trained = sum(p.numel() for p in student.trainable.values())
    disk = estimate_disk(
        config,
        parameters=student.parameters,
        trained=trained,
        base_bytes=dtypes.compute.itemsize,
    )
    notes.note(describe_disk(disk))
    return disk


def _read_machine(forecaster: Forecaster, config: Config, case: Case, notes: Notes) -> dict | None:
    """Return {device, free_bytes, fits, flags} of this machine, and add a note.

    ``flags``: those with which the run fits, if it does not without; None if there are none.
    None: the device is not in this machine, or its free memory is not known.
    """
    try:
        device = choose_device(config.runtime.device, 0, 1, reasons=[])
    except UserError:  # the run is planned for another machine
        return None
    free = read_free_memory(device)
    if free is None:
        return None
    needed = forecaster.forecast(case)["total"]
    verdict, flags = "fits", None
    if needed > free:
        verdict, flags = "does not fit", _find_flags(forecaster, config, case, free=free)
    notes.note(
        f"this machine has {memory_text(free)} free on {device}: the run, which needs "
        f"{memory_text(needed)}, {verdict}"
    )
    return {"device": str(device), "free_bytes": free, "fits": needed <= free, "flags": flags}


def _find_flags(
    forecaster: Forecaster, config: Config, case: Case, free: float
) -> list[str] | None:
    """Return the flags with which the run needs at most ``free`` bytes; None if there are none."""
    try:
        found = search(forecaster, case, free)
    except UserError:  # a method cannot be forecast
        return None
    if found is None:
        return None
    return list_flags(config, found)


def _describe(config: Config, nets: Sequence[Model], dtypes: Dtypes, support: int) -> dict:
    """Return the models, method and sizes of the planned run."""
    student, teacher = nets
    return {
        "student": {"name": student.name, "parameters": student.parameters},
        "teacher": {"name": teacher.name, "parameters": teacher.parameters},
        "method": describe_adapter(config.adapter),
        "dtype": str(dtypes.compute).removeprefix("torch."),
        "support": support,
        "updates": config.train.steps,
        "rollouts_per_update": config.train.batch_size * config.rollout.samples,
        "micro_batch_size": read_batch_sizes(config).micro_batch_size,
        "max_new_tokens": config.rollout.max_new_tokens,
    }


def _estimate_cost(ledger: Ledger, config: Config, rate: dict | None) -> dict:
    """Return the FLOPs of a run with ``ledger``, and its seconds at the speed ``rate``."""
    seconds = None
    if rate is not None:
        seconds = estimate_seconds(ledger, rate)
    return {
        "flops": ledger.summary()["by_phase"],
        "flops_total": ledger.total(),
        "flops_per_update": ledger.total() / max(1, config.train.steps),
        "seconds": seconds,
    }
