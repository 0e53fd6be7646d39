"""`prefix-distill plan`: what a run would need, from config files alone. Memory by phase
(planning/forecast.py), FLOPs, time at a known rate.

FLOPs are useful ones, as in the ledger of a run whose rollouts all reach the prefix: an upper
bound, as rollouts that end early cost less. Evaluations and tail probes are outside of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from .. import config as configuration
from ..config import SELF, Config
from ..engine import loading
from ..engine.models import Model, shape
from ..errors import UserError
from ..maths import flops
from ..maths.flops import Batch, Ledger, Shape
from ..maths.schedule import PrefixSchedule, parse_prefix
from ..prompts import stream, templates
from ..prompts.load import load_prompts
from ..prompts.templates import PRIVILEGED
from ..training.pair import fill_in
from ..training.problems import LONGEST
from ..training.run import settled
from .cards import fit_cards
from .case import case
from .forecast import Pair
from .ghosts import sketch
from .rate import estimate_seconds, measure_rate, read_rate

USUAL = ("25%", "50%", "full")
PROMPTS = 256  # prompts of the data set that are rendered for their lengths


@dataclass(frozen=True)
class Reader:
    """A model reduced to its name and tokenizer."""

    name: str
    tokenizer: Any


def read_config(name: str, trust_remote_code: bool = False) -> tuple[str, PreTrainedConfig]:
    """A model's config, from a folder (config.json is enough), hub id or ``lab:TASK/ROLE``; no
    weight is touched. UserError else."""
    folder, extra = loading.locate(name)
    if extra:
        raise UserError(
            f"model {name}: a plan reads config.json, which an adapter or a .gguf file has not; "
            "name the base model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        loading.check_config(name, folder, config)
        return folder, config
    except UserError:
        raise
    except Exception as error:  # as in models.load
        raise UserError(
            f"model {name}: its config cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give a hub id or a folder with config.json"
        ) from None


def plan(  # noqa: PLR0913  each is an option of the command line
    config: Config,
    prompt_tokens: int | None = None,
    prefixes: str | None = None,
    tflops: float | None = None,
    measure: bool = False,
    from_run: str | None = None,
) -> dict:
    """The document of `prefix-distill plan`. ``prompt_tokens``: the prompts' length instead of a
    data set's; ``prefixes``: lengths beside the config's, by commas; ``tflops``, ``measure``,
    ``from_run``: where the rate comes from (none: no time is given)."""
    _check_above_zero("--prompt-tokens", prompt_tokens, "1 token")
    _check_rate(tflops, measure, from_run)
    given = config.data.dataset is not None or config.models.student is None
    config, notes = fill_in(config)
    names = _names(config)
    read = [read_config(name, config.models.trust_remote_code) for name in names]
    folders, configs = [folder for folder, _ in read], [found for _, found in read]
    dtype, head_dtype = _dtypes(config, notes)
    support = min(c.get_text_config(decoder=True).vocab_size for c in configs)
    if prompt_tokens is None and given:
        prompts, wanted, support = _prompts(config, folders, names, support)
        mean = sum(p for p, _ in prompts) / len(prompts)
        notes.append(
            f"prompts: {len(prompts)} of {config.data.dataset}, {mean:.0f} tokens on average"
        )
    else:
        length, wanted = prompt_tokens or 256, None
        prompts = [(length, length)]
        why = "" if prompt_tokens else " (assumed; set --prompt-tokens or --dataset)"
        notes.append(f"prompts: {length} tokens each{why}")
    limit = _longest_response(config, wanted, max(map(max, prompts)), configs)
    config = configuration.replace(config, rollout={"max_new_tokens": limit})
    schedules = _schedules(config, prefixes, limit)
    adapter = config.adapter if config.adapter.rank else None
    nets = (
        sketch(names[0], configs[0], torch.float32, None, adapter),
        sketch(names[1], configs[1], dtype),
    )
    rate = _choose_rate(config, nets[0], dtype, tflops, measure, from_run)
    pair = Pair(configs[0], configs[1], names)
    needs = case(config, dtype, head_dtype, prompts, limit, limit, support=support)
    shapes = [shape(net, support) for net in nets]
    rows = []
    for text, schedule in schedules.items():
        low, high = schedule.length(0), schedule.longest(config.train.steps or 1)
        cost = _cost(_whole(config, shapes, prompts, schedule), config.train.steps, rate)
        memory = pair.forecast(replace(needs, prefix=high))
        rows.append({"prefix": text, "tokens": [low, high], **cost, "memory": memory})
    first = replace(needs, prefix=rows[0]["tokens"][1])
    return {
        **_describe(config, nets, dtype, support),
        "rate": rate,
        "prefixes": rows,
        "cards": fit_cards(pair, config, first, notes),
        "notes": notes,
    }


def _describe(config: Config, nets: tuple[Model, Model], dtype: torch.dtype, support: int) -> dict:
    """Return the models, method and sizes of the planned run."""
    student, teacher = nets
    rank = config.adapter.rank
    return {
        "student": {"name": student.name, "parameters": student.parameters},
        "teacher": {"name": teacher.name, "parameters": teacher.parameters},
        "method": f"LoRA of rank {rank}" if rank else "all weights",
        "dtype": str(dtype)[6:],
        "support": support,
        "updates": config.train.steps,
        "rollouts_per_update": config.train.batch_size * config.rollout.samples,
        "micro_batch_size": config.train.micro_batch_size,
        "max_new_tokens": config.rollout.max_new_tokens,
    }


def _check_above_zero(flag: str, value: float | None, what: str) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError(f"{flag} {value}: expected at least {what}; change it")


def _check_rate(tflops: float | None, measure: bool, from_run: str | None) -> None:
    """Raise UserError if the rate is invalid or given twice."""
    _check_above_zero("--device-tflops", tflops, "a rate above 0, such as 100")
    if sum((tflops is not None, measure, from_run is not None)) > 1:
        raise UserError(
            "--device-tflops, --measure, --from-run: each gives the rate by itself; keep one"
        )


def _names(config: Config) -> tuple[str, str]:
    """Return the names of the student and the teacher."""
    student = settled(config.models.student, "--student")
    teacher = settled(config.models.teacher, "--teacher")
    return student, student if teacher == SELF else teacher


def _dtypes(config: Config, notes: list[str]) -> tuple[torch.dtype, torch.dtype]:
    """Return the compute dtype and the dtype of the heads."""
    runtime = config.runtime
    if runtime.dtype == "auto":
        dtype = torch.bfloat16
        notes.append("dtype bfloat16: what --dtype auto takes on a GPU")
    else:
        dtype = getattr(torch, runtime.dtype)
    return dtype, dtype if runtime.head_dtype == "auto" else getattr(torch, runtime.head_dtype)


def _longest_response(
    config: Config, wanted: int | None, longest: int, configs: Sequence[PreTrainedConfig]
) -> int:
    """Return the longest response in tokens: --max-new-tokens, else ``wanted``, else what fits
    after the ``longest`` prompt. UserError: the models' positions do not suffice."""
    texts = [c.get_text_config(decoder=True) for c in configs]
    positions = min(
        (p for t in texts if (p := getattr(t, "max_position_embeddings", None))), default=None
    )
    room = None if positions is None else positions - longest
    limit = config.rollout.max_new_tokens or wanted or min(LONGEST, room or LONGEST)
    if room is not None and limit > room:
        raise UserError(
            f"{limit} response tokens after a prompt of {longest}: the models have {positions} "
            f"positions; lower --max-new-tokens to {max(0, room)} or the prompts"
        )
    return limit


def _schedules(config: Config, prefixes: str | None, limit: int) -> dict[str, PrefixSchedule]:
    """Return prefix option → schedule, the config's own prefix first."""
    others = USUAL if prefixes is None else [p.strip() for p in prefixes.split(",")]
    wanted = dict.fromkeys([config.schedule.prefix, *others])
    return {text: parse_prefix(text, limit) for text in wanted}


def _choose_rate(  # noqa: PLR0913  three options and the operands of --measure
    config: Config,
    student: Model,
    dtype: torch.dtype,
    tflops: float | None,
    measure: bool,
    from_run: str | None,
) -> dict | None:
    """{source, FLOP/s (all, or by phase)}; None where no rate is known."""
    if tflops is not None:
        return {"source": f"--device-tflops {tflops:g}", "flops_per_second": tflops * 1e12}
    if measure:
        return measure_rate(config, student, dtype)
    return None if from_run is None else read_rate(from_run)


def _cost(ledger: Ledger, updates: int, rate: dict | None) -> dict:
    """Return the FLOPs of a run with ``ledger``, and its seconds at ``rate``."""
    return {
        "flops": ledger.summary()["by_phase"],
        "flops_total": ledger.total(),
        "flops_per_update": ledger.total() / max(1, updates),
        "seconds": None if rate is None else estimate_seconds(ledger, rate),
    }


def _prompts(
    config: Config, folders: Sequence[str], names: Sequence[str], support: int
) -> tuple[list[tuple[int, int]], int | None, int]:
    """(student's, teacher's) prompt lengths of the data set, the task's longest answer, and the
    support that the tokenizers leave."""
    columns = {
        k: getattr(config.data, k)
        for k in ("prompt_column", "answer_column", "system", "instruction", "privileged_column")
    }
    dataset = settled(config.data.dataset, "--dataset")
    found = load_prompts(dataset, split=config.data.split, **columns)
    readers = []
    for folder, name in zip(folders, names, strict=True):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=config.models.trust_remote_code
            )
        except Exception as error:  # as in models.load
            raise UserError(
                f"model {name}: it has no readable tokenizer ({type(error).__name__}), so the "
                "prompts' lengths are unknown; give --prompt-tokens in place of --dataset"
            ) from None
        readers.append(Reader(name, tokenizer))
    if config.data.privileged_column is not None and config.data.privileged_template is None:
        config = configuration.replace(
            config, data={"privileged_template": found.privileged_template or PRIVILEGED}
        )
    wanted = min(PROMPTS, max(1, config.train.steps * config.train.batch_size))
    order = stream.shuffled(found.prompts, config.runtime.seed, "epoch", 0)
    student, teacher = readers
    kept, _ = templates.render_all(order, student, teacher, config, wanted)
    ids = [max(reader.tokenizer.get_vocab().values()) + 1 for reader in readers]
    return (
        [(len(r.student_ids), len(r.teacher_ids)) for r in kept],
        found.max_new_tokens,
        min(support, *ids) if ids[0] == ids[1] else support,
    )


def _whole(
    config: Config,
    shapes: Sequence[Shape],
    prompts: list[tuple[int, int]],
    schedule: PrefixSchedule,
) -> Ledger:
    """FLOPs of all updates; every rollout is as long as the prefix lets it be. The prompts come
    in turn."""
    size, samples = config.train.batch_size, config.rollout.samples
    micro = config.train.micro_batch_size
    behind = samples, micro, 1 if config.train.gradient_checkpointing else micro
    student, teacher = shapes
    ledger = Ledger()
    for step in range(config.train.steps):
        chosen = [prompts[(step * size + i) % len(prompts)] for i in range(size)]
        length = schedule.length(step)
        batch = Batch(prompts=chosen, samples=samples, response=length, behind=behind)
        ledger.merge(flops.update_ledger(student, teacher, batch))
    return ledger
