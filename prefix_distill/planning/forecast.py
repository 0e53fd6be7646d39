"""How much memory a run will need, phase by phase, from its configs alone.

No weight is read or downloaded. The networks are built from their configs of ghosts (tensors
without numbers), the same code that trains reads the same rollouts with them, and every tensor it
keeps is counted while it lives. Whole numbers (ids, masks) are real, so that everything that
depends on them goes the way it will go. Layers repeat: deep networks are measured at two small
depths, and the rest is a straight line through them.

Counted: what tensors hold. Not counted: the CUDA context (some hundred MiB), what cuBLAS, cuDNN and
oneDNN work in, and what an allocator rounds up or keeps for later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch._meta_registrations  # shapes of what has no meta kernel in C++

from ..config import SELF, Adapter, Config, parse_divergence, parse_estimator
from ..engine import scoring
from ..engine.models import Model
from ..engine.rollout import Rollout
from ..engine.transformers_names import name_cache_argument
from ..errors import UserError
from ..maths.divergence import Head, Terms
from ..maths.fused import statistics, weighted
from .ghosts import Live, depths, ghost, sketch, storage_of


@dataclass(frozen=True)
class Case:
    """What sets the memory of one rank. ``prompts``: (student's, teacher's) lengths of the prompts
    of an update; ``prefix`` and ``limit``: longest rollout in training and in evaluation;
    ``problems``: answers of an evaluation; ``contexts``: its rollouts that both models read;
    ``own``: the teacher is the student's initial weights; ``averaged``: it follows the student, in
    float32; ``apart``: it has a device of its own; ``text``: it writes rollouts."""

    terms: Terms
    dtype: torch.dtype
    prompts: tuple[tuple[int, int], ...]
    samples: int
    prefix: int
    limit: int
    micro: int
    rows: int
    problems: int = 0
    contexts: int = 0
    adapter: Adapter | None = None
    recomputes: bool = False
    own: bool = False
    averaged: bool = False
    apart: bool = False
    text: bool = False
    support: int | None = None

    def rollouts(self, length: int, prompts=None, samples: int | None = None) -> list[Rollout]:
        """An update's rollouts, each of ``length`` tokens; prompts that differ in their ids."""
        response = (0,) * length
        return [
            Rollout(i, s, (i,) * p, (i,) * t, response, response, False)
            for i, (p, t) in enumerate(prompts or self.prompts)
            for s in range(samples or self.samples)
        ]


class Pair:
    """Student and teacher as their configs describe them (the teacher's None: it is the
    student); what was built is kept."""

    def __init__(self, student, teacher=None, names=("student", "teacher")):
        self.configs, self.names = (student, teacher or student), names
        self.built, self.found = {}, {}

    def model(self, role: int, *settings, layers: int | None = None) -> Model:
        """One of them, of ghosts. ``settings``: dtype, adapter, recomputes."""
        key = (role, settings, layers)
        if key not in self.built:
            dtype, adapter, recomputes = settings
            self.built[key] = sketch(
                self.names[role], self.configs[role], dtype, layers, adapter, recomputes
            )
            if role == 0 and adapter is None and dtype == torch.float32:
                self.built[key].net.requires_grad_(True)
        return self.built[key]

    def measured(
        self, role: int, settings, what: tuple, work: Callable[[Model], dict[str, float]]
    ) -> dict[str, float]:
        """What ``work`` finds in the model, from two depths where its layers repeat; ``what``
        names it, so that it is done once."""
        if (role, settings, what) not in self.found:
            self.found[role, settings, what] = self._measured(role, settings, work)
        return self.found[role, settings, what]

    def _measured(
        self, role: int, settings, work: Callable[[Model], dict[str, float]]
    ) -> dict[str, float]:
        at = depths(self.configs[role])
        try:
            found = [work(self.model(role, *settings, layers=k)) for k in at]
        except (
            RuntimeError,
            NotImplementedError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
        ) as error:  # its way depends on numbers
            raise UserError(
                f"model {self.names[role]}: its memory cannot be forecast, as what it computes "
                f"depends on its weights ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]})"
            ) from None
        if len(at) == 1:
            return found[0]
        depth, (low, high) = self.configs[role].get_text_config(decoder=True).num_hidden_layers, at
        return {
            name: found[0][name] + (found[1][name] - found[0][name]) / (high - low) * (depth - low)
            for name in found[0]
        }

    def forecast(self, case: Case) -> dict:
        """{total, set_by, weights: {component: bytes}, phases: {phase: bytes beyond the
        weights}, teacher_device: bytes or None}."""
        full, size = case.adapter is None, case.dtype.itemsize
        held = (torch.float32 if full else case.dtype, case.adapter, False)
        trains = (held[0], case.adapter, case.recomputes)
        decodes = (case.dtype, case.adapter, False)
        theirs = (torch.float32 if case.averaged else case.dtype, None, False)
        student, teacher = (
            self.measured(0, held, ("weights",), weights),
            self.measured(1, theirs, ("weights",), weights),
        )
        trainable = student["trainable"]
        kept = {"student": student["all"], "AdamW's moments": 8 * trainable}
        if full and case.dtype != torch.float32:
            kept["decoding copy"] = trainable * size
        if full or not case.own:
            kept["teacher"] = teacher["all"]
        gradients = 4 * trainable
        autocast, support = case.dtype == torch.bfloat16, case.support

        def read(role, settings, group):
            return self.measured(
                role,
                settings,
                ("read", _sizes(group), autocast),
                lambda m: reading(m, group, role == 1, autocast),
            )

        def generate(role, settings, prompts, samples, new):
            rows = min(case.rows, samples * len(prompts))
            prompts = sorted(prompts, reverse=True)[: -(-rows // samples)]
            return max(
                self.measured(
                    role,
                    settings,
                    ("generate", tuple(prompts), samples, rows, new, support),
                    lambda m: generating(m, prompts, samples, rows, new, support),
                ).values()
            )

        groups = scoring.micro_batches(case.rollouts(case.prefix), case.micro, not case.recomputes)
        group = max(groups, key=lambda g: sum(len(r.student_prompt) + len(r.ids) for r in g))
        nets = [
            replace(
                self.model(role, *settings, layers=depths(self.configs[role])[0]), support=support
            )
            for role, settings in ((0, held), (1, theirs))
        ]
        score = read(1, theirs, group)
        update = self.measured(
            0,
            trains,
            ("update", _sizes(group), case.terms, support, len(groups) > 1, autocast),
            lambda m: updating(
                replace(m, support=support),
                group,
                case.terms,
                nets[1].head(),
                autocast,
                len(groups) > 1,
            ),
        )
        before = gradients if len(groups) > 1 else 0
        phases = {
            "generation": generate(
                0, decodes, [p for p, _ in case.prompts], case.samples, case.prefix
            ),
            "teacher_score": before + score["peak"],
            "student_update": before + score["rows"] + max(update.values()),
            "optimizer": gradients,
        }
        longest = max(case.prompts)
        if case.problems:
            phases["evaluation"] = generate(0, decodes, [longest[0]] * case.problems, 1, case.limit)
        if case.contexts:
            group = case.rollouts(case.limit, [longest] * min(case.contexts, case.micro), 1)
            ours, other = read(0, held, group), read(1, theirs, group)
            phases["evaluation, both models"] = max(
                ours["peak"],
                ours["rows"] + other["peak"],
                ours["rows"] + other["rows"] + comparing(nets, case.terms.dtype, group),
            )
        if case.text:
            phases["teacher_text"] = generate(
                1, theirs, [t for _, t in case.prompts], case.samples, case.prefix
            )
        there = (
            kept.pop("teacher", 0) + max(score["peak"], phases.pop("teacher_text", 0))
            if case.apart
            else None
        )
        if case.apart:
            phases.pop("teacher_score")
        set_by = max(phases, key=phases.get)
        whole = lambda tree: {name: round(value) for name, value in tree.items()}
        return {
            "total": round(sum(kept.values()) + phases[set_by]),
            "set_by": set_by,
            "weights": whole(kept),
            "gradients": round(gradients),
            "phases": whole(phases),
            "teacher_device": there and round(there),
        }


def _sizes(group: list[Rollout]) -> tuple:
    return tuple(
        (r.prompt, len(r.student_prompt), len(r.teacher_prompt), len(r.ids)) for r in group
    )


def weights(model: Model) -> dict[str, float]:
    """Bytes of a network's parameters and buffers, and how many numbers of them train with an
    adapter."""
    tensors = [*model.net.parameters(), *model.net.buffers()]
    return {
        "all": sum(storage_of(t).nbytes() for t in tensors),
        "trainable": sum(t.numel() for t in tensors if t.requires_grad),
    }


def _live(model: Model, *known: torch.Tensor) -> Live:
    return Live([*model.net.parameters(), *model.net.buffers(), *known])


def reading(
    model: Model, rollouts: list[Rollout], teacher: bool, autocast: bool
) -> dict[str, float]:
    """Bytes while a model reads rollouts without gradient (``peak``), and of the hidden rows
    that stay (``rows``)."""
    live = _live(model)
    with torch.no_grad(), live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rows = scoring.hidden_rows(model, rollouts, teacher)
        peak, kept = live.highest(), live.now
        del rows
    return {"peak": peak, "rows": kept}


def updating(
    model: Model,
    rollouts: list[Rollout],
    terms: Terms,
    teacher: Head,
    autocast: bool,
    accumulated: bool,
) -> dict[str, float]:
    """Bytes while the student reads a micro-batch (``read``), while the loss is taken (``loss``)
    and gradients flow (``backward``), and when they are there (``end``): each of them is a straight
    line in the depth, their maximum is not. ``accumulated``: they are there already, and not
    counted."""
    trained = list(model.trained.values())
    for p in trained:
        p.grad = ghost(p.shape) if accumulated else None
    live = _live(model, *(p.grad for p in trained if accumulated))
    count = sum(len(r.taught) for r in rollouts)
    teacher_NE = ghost((count, teacher.weight_VD.shape[1]))
    live.known |= {storage_of(t)._cdata for t in (teacher_NE, teacher.weight_VD)}
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            student_ND = scoring.hidden_rows(model, rollouts)
        read = live.highest()
        loss, value_N, _ = weighted(
            terms,
            student_ND,
            model.head(),
            teacher_NE,
            teacher,
            torch.ones(count),
            scoring.tokens(rollouts),
        )
        loss_peak = live.highest()
        loss.backward()
        backward, end = live.highest(), live.now
    for p in trained:
        p.grad = None
    return {"read": read, "loss": loss_peak, "backward": backward, "end": end}


@torch.no_grad()
def generating(
    model: Model, prompts: list[int], samples: int, rows: int, new: int, support: int | None
) -> dict[str, float]:
    """Bytes of one generate call of ``rows`` responses, the longest prompt first: the prefill,
    and the last of ``new`` tokens."""
    count, width = rows, prompts[0]
    shared = model.shares_prompts and samples > 1 and width > 1
    begin, end = _live(model), _live(model)
    mask = torch.tensor([[0] * (width - p) + [1] * p for p in prompts])
    with begin:
        if shared:
            hidden, cache = model.trunk_cached(torch.zeros_like(mask)[:, :-1], mask[:, :-1])
            del hidden
            cache.batch_select_indices(torch.arange(count) // samples)
            _draw(model, count, mask[torch.arange(count) // samples], 1, cache, support)
        else:
            _draw(model, count, mask[torch.arange(count) // samples], width, None, support)
        cache = None
    with end:
        ids = torch.zeros(1, max(1, width + new - 2), dtype=torch.long)
        hidden, cache = model.trunk_cached(ids, torch.ones_like(ids))
        del hidden
        cache.batch_select_indices(torch.zeros(count, dtype=torch.long))
        end.highest()
        _draw(
            model,
            count,
            torch.cat(
                [
                    mask[torch.arange(count) // samples],
                    torch.ones(count, ids.shape[1] + 1 - width, dtype=torch.long),
                ],
                1,
            ),
            1,
            cache,
            support,
        )
        last = end.highest()
        del cache
    return {"prefill": begin.peak, "last token": last}


def _draw(model: Model, rows: int, mask, width: int, cache, support: int | None) -> None:
    """A step of ``generate`` and the draw from its logits (rollout.py)."""
    cache_argument = {name_cache_argument(model.net.forward): cache}
    out = model.net(
        input_ids=torch.zeros(rows, width, dtype=torch.long),
        attention_mask=mask,
        use_cache=True,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0)[:, -width:],
        logits_to_keep=1,
        **cache_argument,
    )
    scores = out.logits[:, -1].to(copy=True, dtype=torch.float32)
    race = torch.empty(rows, support or scores.shape[1])
    scores[:, : race.shape[1]] -= race.neg_().log1p_()
    scores.argmax(-1)


@torch.no_grad()
def comparing(models: list[Model], dtype: torch.dtype, rollouts: list[Rollout]) -> int:
    """Bytes of the tables in which both models' hidden rows are compared, beside these rows."""
    heads = [m.head() for m in models]
    count = sum(len(r.taught) for r in rollouts)
    rows = [ghost((count, h.weight_VD.shape[1])) for h in heads]
    live = Live([*rows, *(h.weight_VD for h in heads)])
    with live:
        statistics(
            Terms("reverse-kl", dtype=dtype),
            rows[0],
            heads[0],
            rows[1],
            heads[1],
            scoring.tokens(rollouts),
        )
    return live.peak


def terms(config: Config, head_dtype: torch.dtype) -> Terms:
    """The loss that a config asks for."""
    (name, beta), (estimator, top_k), wanted = (
        parse_divergence(config.divergence.name),
        parse_estimator(config.divergence.estimator),
        config.divergence,
    )
    return Terms(
        name,
        beta,
        wanted.temperature,
        head_dtype,
        config.runtime.head_memory_mb << 20,
        top_k,
        estimator == "sampled",
        wanted.clip,
    )


def case(
    config: Config,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    prompts,
    prefix: int,
    limit: int,
    world: int = 1,
    support: int | None = None,
) -> Case:
    """The ``Case`` of a config. ``prompts``: (student's, teacher's) lengths, of which an update is
    made of the longest; ``prefix``: the longest of the run; ``world``: ranks that share the update.
    """
    share = -(-config.train.batch_size // world)
    longest = sorted(prompts, key=sum, reverse=True)[:share]
    return Case(
        terms(config, head_dtype),
        dtype,
        tuple(longest[i % len(longest)] for i in range(share)),
        config.rollout.samples,
        prefix,
        limit,
        config.train.micro_batch_size,
        config.rollout.rows,
        -(-config.evaluate.problems * config.evaluate.rollouts // world),
        -(-config.evaluate.kl_prompts // world),
        config.adapter if config.adapter.rank else None,
        config.train.gradient_checkpointing,
        config.models.teacher == SELF,
        config.models.teacher_ema is not None,
        config.runtime.teacher_device not in (None, config.runtime.device),
        config.rollout.off_policy != "none",
        support,
    )


def at_most(student: Model, teacher: Model, case: Case) -> int:
    """Bytes that a run surely stays below, by plain arithmetic: where that is free, a ``forecast``
    is not worth its seconds.

    Weights, gradients, moments and a copy of the student's, twice the teacher's; per token 40
    widths, 10 of the feed-forward's and three rows of an attention mask, in float32: of every layer
    for a micro-batch that trains, of one for what is generated or read, with the KV cache of all;
    the loss's chunk, four head-sized tables and the logits of every row."""
    tokens, total = (
        max(sum(p) for p in case.prompts) + max(case.prefix, case.limit),
        2 * case.terms.memory_bytes,
    )
    rows = max(case.micro, case.rows)
    for model, each in ((student, 24), (teacher, 8)):
        config = model.config
        layers, inner = (
            config.num_hidden_layers,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        )
        width = max(
            config.hidden_size,
            config.num_attention_heads * (getattr(config, "head_dim", None) or 0),
        )
        layer = 40 * width + 10 * inner + 3 * tokens
        total += each * model.parameters + 4 * tokens * (
            case.micro * layer * (layers if model is student else 1)
            + rows * (layer + 2 * layers * width)
        )
        total += 16 * config.vocab_size * (config.hidden_size + rows)
    return total
