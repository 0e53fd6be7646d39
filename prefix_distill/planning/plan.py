"""`prefix-distill plan`: what a run would need, from config files alone. Memory by phase
(planning/forecast.py), FLOPs, time at a known rate.

FLOPs are useful ones, as in the ledger of a run whose rollouts all reach the prefix: an upper
bound, as rollouts that end early cost less. Evaluations and tail probes are outside of them.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from .. import config as configuration
from ..config import SELF, Adapter, Config
from ..display import flops_text
from ..engine import loading
from ..engine.models import Model, shape
from ..errors import UserError
from ..maths import flops
from ..maths.flops import Ledger
from ..maths.schedule import parse_prefix
from ..prompts import stream, templates
from ..prompts.load import load_prompts
from ..prompts.templates import PRIVILEGED
from ..training.pair import fill_in
from ..training.problems import LONGEST
from .forecast import Pair, case
from .ghosts import sketch

CARDS = (
    16,
    24,
    48,
    80,
)  # GB (10⁹ bytes, as cards are sold; their drivers leave about this many GiB less a few per cent)
# GB of a card that are not for tensors: CUDA context, libraries' workspaces, the allocator's
# rounding
RESERVED = 1.0
USUAL = ("25%", "50%", "full")
LORA = Adapter(rank=64)  # what the cards' LoRA columns stand for where the config has none
PROMPTS = 256  # prompts of the data set that are rendered for their lengths


def read_config(name: str, trust_remote_code: bool = False):
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


def plan(
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
    for value, flag, what in (
        (prompt_tokens, "--prompt-tokens", "1 token"),
        (tflops, "--device-tflops", "a rate above 0, such as 100"),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag} {value}: expected at least {what}; change it")
    if sum((tflops is not None, measure, from_run is not None)) > 1:
        raise UserError(
            "--device-tflops, --measure, --from-run: each gives the rate by itself; keep one"
        )
    given = config.data.dataset is not None or config.models.student is None
    config, notes = fill_in(config)
    own, trust = config.models.teacher == SELF, config.models.trust_remote_code
    names = config.models.student, config.models.student if own else config.models.teacher
    (folder, student), (teacher_folder, teacher) = (read_config(name, trust) for name in names)
    texts = [c.get_text_config(decoder=True) for c in (student, teacher)]
    dtype = (
        torch.bfloat16 if config.runtime.dtype == "auto" else getattr(torch, config.runtime.dtype)
    )
    if config.runtime.dtype == "auto":
        notes.append("dtype bfloat16: what --dtype auto takes on a GPU")
    head_dtype = (
        dtype if config.runtime.head_dtype == "auto" else getattr(torch, config.runtime.head_dtype)
    )
    support = min(t.vocab_size for t in texts)
    if prompt_tokens is None and given:
        prompts, limit, support = _prompts(config, (folder, teacher_folder), names, texts, support)
        notes.append(
            f"prompts: {len(prompts)} of {config.data.dataset}, "
            f"{sum(p for p, _ in prompts) / len(prompts):.0f} tokens on average"
        )
    else:
        prompts, limit = [(prompt_tokens or 256,) * 2], None
        notes.append(
            f"prompts: of {prompts[0][0]} tokens each"
            + ("" if prompt_tokens else ", as none were given (--prompt-tokens, --dataset)")
        )
    positions = min(
        (p for t in texts if (p := getattr(t, "max_position_embeddings", None))), default=None
    )
    longest = max(map(max, prompts))
    room = None if positions is None else positions - longest
    limit = config.rollout.max_new_tokens or limit or min(LONGEST, room or LONGEST)
    if room is not None and limit > room:
        raise UserError(
            f"{limit} response tokens after a prompt of {longest}: the models have {positions} "
            f"positions; lower --max-new-tokens to {max(0, room)} or the prompts"
        )
    config = configuration.replace(config, rollout={"max_new_tokens": limit})
    wanted = [
        config.schedule.prefix,
        *(USUAL if prefixes is None else [p.strip() for p in prefixes.split(",")]),
    ]
    schedules = {text: parse_prefix(text, limit) for text in dict.fromkeys(wanted)}

    pair = Pair(student, teacher, names)
    adapter = config.adapter if config.adapter.rank else None
    nets = sketch(names[0], student, torch.float32, None, adapter), sketch(names[1], teacher, dtype)
    shapes = [shape(net, support) for net in nets]
    rate = _rate(config, nets[0], dtype, tflops, measure, from_run)
    rows = []
    for text, schedule in schedules.items():
        ledger = _whole(config, shapes, prompts, schedule)
        tokens = schedule.longest(config.train.steps or 1)
        memory = pair.forecast(
            case(config, dtype, head_dtype, prompts, tokens, limit, support=support)
        )
        seconds = rate and _seconds(ledger, rate)
        rows.append(
            {
                "prefix": text,
                "tokens": [schedule.length(0), tokens],
                "flops": ledger.summary()["by_phase"],
                "flops_total": ledger.total(),
                "flops_per_update": ledger.total() / max(1, config.train.steps),
                "seconds": seconds,
                "memory": memory,
            }
        )
    return {
        "student": {"name": names[0], "parameters": nets[0].parameters},
        "teacher": {"name": names[1], "parameters": nets[1].parameters},
        "method": f"LoRA of rank {adapter.rank}" if adapter else "all weights",
        "dtype": str(dtype)[6:],
        "support": support,
        "updates": config.train.steps,
        "rollouts_per_update": config.train.batch_size * config.rollout.samples,
        "micro_batch_size": config.train.micro_batch_size,
        "max_new_tokens": limit,
        "rate": rate,
        "prefixes": rows,
        "cards": _cards(
            pair, config, dtype, head_dtype, prompts, rows[0]["tokens"][1], limit, support, notes
        ),
        "notes": notes,
    }


def _prompts(config: Config, folders, names, texts, support: int):
    """(student's, teacher's) prompt lengths of the data set, the task's longest answer, and the
    support that the tokenizers leave."""
    columns = {
        k: getattr(config.data, k)
        for k in ("prompt_column", "answer_column", "system", "instruction", "privileged_column")
    }
    found = load_prompts(config.data.dataset, split=config.data.split, **columns)
    nets = []
    for folder, name in zip(folders, names):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=config.models.trust_remote_code
            )
        except Exception as error:  # as in models.load
            raise UserError(
                f"model {name}: it has no readable tokenizer ({type(error).__name__}), so the "
                "prompts' lengths are unknown; give --prompt-tokens in place of --dataset"
            ) from None
        nets.append(Model(name, None, tokenizer, None, frozenset()))
    if config.data.privileged_column is not None and config.data.privileged_template is None:
        config = configuration.replace(
            config, data={"privileged_template": found.privileged_template or PRIVILEGED}
        )
    wanted = min(PROMPTS, max(1, config.train.steps * config.train.batch_size))
    kept, _ = templates.render_all(
        stream.shuffled(found.prompts, config.runtime.seed, "epoch", 0), *nets, config, wanted
    )
    ids = [max(n.tokenizer.get_vocab().values()) + 1 for n in nets]
    return (
        [(len(r.student_ids), len(r.teacher_ids)) for r in kept],
        found.max_new_tokens,
        min(support, *ids) if ids[0] == ids[1] else support,
    )


def _whole(config: Config, shapes, prompts, schedule) -> Ledger:
    """FLOPs of all updates; every rollout is as long as the prefix lets it be. The prompts come
    in turn."""
    size, samples, micro = (
        config.train.batch_size,
        config.rollout.samples,
        config.train.micro_batch_size,
    )
    behind, ledger = (samples, micro, 1 if config.train.gradient_checkpointing else micro), Ledger()
    for step in range(config.train.steps):
        chosen = [prompts[(step * size + i) % len(prompts)] for i in range(size)]
        ledger.merge(flops.update_ledger(*shapes, chosen, samples, schedule.length(step), behind))
    return ledger


def _rate(config: Config, student: Model, dtype, tflops, measure, from_run) -> dict | None:
    """{source, FLOP/s (all, or by phase)}; None where no rate is known."""
    if tflops is not None:
        return {"source": f"--device-tflops {tflops:g}", "flops_per_second": tflops * 1e12}
    if measure:
        return _measured(config, student, dtype)
    if from_run is None:
        return None
    try:
        rows = [
            json.loads(line)
            for line in (Path(from_run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        phases = [
            key[len("flops/") :]
            for key in rows[-1]
            if key.startswith("flops/") and not key.endswith("_total")
        ]
        found = {
            p: rows[-1][f"flops/{p}"] / seconds
            for p in phases
            if (seconds := sum(row.get(f"time/{p}_s", 0) for row in rows))
        }
        optimizer = sum(row["time/optimizer_s"] for row in rows) / len(rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"--from-run {from_run}: it has no metrics.jsonl with a row of an update; name the "
            "folder of a run that has trained"
        ) from None
    return {
        "source": f"measured in {from_run}",
        "flops_per_second": found,
        "optimizer_seconds": optimizer,
    }


def _measured(config: Config, student: Model, dtype) -> dict:
    """FLOP/s of the student's own matmuls on this machine: a micro-batch's tokens through one
    feed-forward matrix, forward. What a device does at best; decoding, which reads all weights for
    few rows, stays far below."""
    from ..engine.device import Clock
    from ..engine.ranks import place

    where = place(
        configuration.replace(config, runtime={"dtype": str(dtype)[6:], "gpus": None}).runtime,
        lambda: 0,
    )
    width = student.config.hidden_size
    inner = getattr(student.config, "intermediate_size", None) or 4 * width
    tokens, clock = 64 * config.train.micro_batch_size, Clock(where.device)
    x, w = (
        torch.randn(tokens, width, device=where.device, dtype=dtype),
        torch.randn(width, inner, device=where.device, dtype=dtype),
    )
    x @ w
    best, start = math.inf, clock.now()
    while (begun := clock.now()) - start < 1:
        x @ w
        best = min(best, clock.now() - begun)
    return {
        "source": f"one matmul of {tokens} × {width} × {inner} in {str(dtype)[6:]} on "
        f"{where.device}, the best of a second: times are lower bounds",
        "flops_per_second": 2.0 * tokens * width * inner / best,
    }


def _seconds(ledger: Ledger, rate: dict) -> float:
    speed = rate["flops_per_second"]
    if not isinstance(speed, dict):
        return ledger.total() / speed
    if missing := [p for p in ledger.useful if p not in speed]:
        raise UserError(
            f"--from-run: that run has no rate of {missing[0]}; name one that sampled and trained"
        )
    return sum(f / speed[p] for p, f in ledger.useful.items())


def _cards(
    pair: Pair,
    config: Config,
    dtype,
    head_dtype,
    prompts,
    prefix: int,
    limit: int,
    support: int,
    notes: list[str],
) -> list[dict]:
    """What fits on the known cards, for all weights or an adapter, with or without gradient
    checkpointing: ``fits`` with the config's micro-batch; ``micro_batch``: about the largest that
    does, by a straight line through two forecasts (None: not even one rollout); ``set_by``: the
    phase that takes the most."""
    rollouts, found = config.train.batch_size * config.rollout.samples, []
    adapters = [None, config.adapter if config.adapter.rank else LORA]
    for adapter in adapters:
        for recomputes in (False, True):
            settled = configuration.replace(
                config,
                adapter=dataclasses.asdict(adapter or Adapter()),
                train={"gradient_checkpointing": recomputes},
            )
            sizes = sorted({1, min(rollouts, config.train.micro_batch_size)})
            try:
                made = [
                    pair.forecast(
                        case(
                            configuration.replace(settled, train={"micro_batch_size": m}),
                            dtype,
                            head_dtype,
                            prompts,
                            prefix,
                            limit,
                            support=support,
                        )
                    )
                    for m in sizes
                ]
            except UserError as error:
                notes.append(
                    f"{'LoRA' if adapter else 'all weights'}{', gradient checkpointing' if recomputes else ''}: "
                    f"not forecast ({error})"
                )
                continue
            totals = [m["total"] for m in made]
            slope = (totals[-1] - totals[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
            for card in CARDS:
                free = (card - RESERVED) * 1e9
                most = (
                    rollouts
                    if not slope
                    else min(rollouts, math.floor(1 + (free - totals[0]) / slope))
                )
                found.append(
                    {
                        "card_gb": card,
                        "method": f"LoRA of rank {adapter.rank}" if adapter else "all weights",
                        "gradient_checkpointing": recomputes,
                        "fits": totals[-1] <= free,
                        "total": totals[-1],
                        "set_by": made[-1]["set_by"],
                        "micro_batch": most if totals[0] <= free else None,
                    }
                )
    return found


def tables(document: dict) -> list:
    """The plan as rich tables: prefixes, components, cards."""
    from rich.table import Table

    gib = lambda n: f"{n / 2**30:.3g}"
    first = Table(
        "prefix",
        "tokens",
        "FLOPs an update",
        "in all",
        "time",
        "memory, GiB",
        "set by",
        title=f"{document['method']}, {document['updates']} updates",
    )
    for row in document["prefixes"]:
        low, high = row["tokens"]
        seconds = row["seconds"]
        first.add_row(
            row["prefix"],
            str(low) if low == high else f"{low}–{high}",
            flops_text(row["flops_per_update"]),
            flops_text(row["flops_total"]),
            "–"
            if seconds is None
            else f"{seconds / 3600:.3g} h"
            if seconds >= 3600
            else f"{seconds:.3g} s",
            gib(row["memory"]["total"]),
            row["memory"]["set_by"],
        )
    memory = document["prefixes"][0]["memory"]
    second = Table(
        "component",
        "GiB",
        title=f"memory, --prefix {document['prefixes'][0]['prefix']}, micro-batches of "
        f"{document['micro_batch_size']}",
    )
    for name, size in memory["weights"].items():
        second.add_row(name, gib(size))
    for name, size in memory["phases"].items():
        second.add_row(f"while in {name}, beside these", gib(size))
    if memory["teacher_device"] is not None:
        second.add_row("the teacher's device", gib(memory["teacher_device"]))
    third = Table(
        "",
        "needs, GiB",
        *(f"{card} GB" for card in CARDS),
        title="largest micro-batch that fits (rollouts)",
    )
    methods = dict.fromkeys(
        (row["method"], row["gradient_checkpointing"]) for row in document["cards"]
    )
    for method, recomputes in methods:
        rows = [
            r
            for r in document["cards"]
            if (r["method"], r["gradient_checkpointing"]) == (method, recomputes)
        ]
        third.add_row(
            method + (", gradient checkpointing" if recomputes else ""),
            gib(rows[0]["total"]),
            *("does not fit" if r["micro_batch"] is None else str(r["micro_batch"]) for r in rows),
        )
    return [first, second, third]
