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
from dataclasses import replace

import torch

from ..engine.batching import micro_batches
from ..engine.models import Model
from ..engine.rollout import Rollout, student_sides, teacher_sides
from ..errors import UserError
from . import measuring
from .case import Case, Settings
from .ghosts import depths, sketch


class Pair:
    """Student and teacher as their configs describe them (the teacher's None: it is the
    student); what was built is kept."""

    def __init__(self, student, teacher=None, names: tuple[str, str] = ("student", "teacher")):
        self.configs, self.names = (student, teacher or student), names
        self.built: dict[tuple[int, Settings, int | None], Model] = {}
        self.found: dict[tuple[int, Settings, tuple], dict[str, float]] = {}

    def model(self, role: int, settings: Settings, layers: int | None = None) -> Model:
        """One of them, of ghosts."""
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
        self, role: int, settings: Settings, what: tuple, work: Callable[[Model], dict[str, float]]
    ) -> dict[str, float]:
        """What ``work`` finds in the model, from two depths where its layers repeat; ``what``
        names it, so that it is done once."""
        if (role, settings, what) not in self.found:
            self.found[role, settings, what] = self._measured(role, settings, work)
        return self.found[role, settings, what]

    def _measured(
        self, role: int, settings: Settings, work: Callable[[Model], dict[str, float]]
    ) -> dict[str, float]:
        at = depths(self.configs[role])
        try:
            found = [work(self.model(role, settings, k)) for k in at]
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
        kept, gradients = self._weigh(case)
        phases = self._training_phases(case, gradients) | self._evaluation_phases(case)
        if case.text:
            prompts = [t for _, t in case.prompts]
            phases["teacher_text"] = self._generate(case, 1, prompts, case.samples, case.prefix)
        there = None
        if case.apart:
            group, _ = _largest_group(case)
            score = self._read(case, 1, group)["peak"]
            there = kept.pop("teacher", 0) + max(score, phases.pop("teacher_text", 0))
            phases.pop("teacher_score")
        set_by = max(phases, key=lambda phase: phases[phase])
        return {
            "total": round(sum(kept.values()) + phases[set_by]),
            "set_by": set_by,
            "weights": _rounded(kept),
            "gradients": round(gradients),
            "phases": _rounded(phases),
            "teacher_device": None if there is None else round(there),
        }

    def _weigh(self, case: Case) -> tuple[dict[str, float], float]:
        """Return (component → bytes held all the time, bytes of the gradients)."""
        student = self.measured(0, case.student, ("weights",), measuring.weights)
        teacher = self.measured(1, case.teacher, ("weights",), measuring.weights)
        trainable, full = student["trainable"], case.adapter is None
        kept = {"student": student["all"], "AdamW's moments": 8 * trainable}
        if full and case.dtype != torch.float32:
            kept["decoding copy"] = trainable * case.dtype.itemsize
        if full or not case.own:
            kept["teacher"] = teacher["all"]
        return kept, 4 * trainable

    def _training_phases(self, case: Case, gradients: float) -> dict[str, float]:
        """Return phase of an update → bytes beyond the weights."""
        group, accumulated = _largest_group(case)
        score = self._read(case, 1, group)
        _, teacher = self._shallow(case)
        update = self.measured(
            0,
            case.training,
            ("update", _sizes(group), case.terms, case.support, accumulated, case.autocast),
            lambda m: measuring.updating(
                replace(m, support=case.support),
                group,
                case.terms,
                teacher.head(),
                case.autocast,
                accumulated,
            ),
        )
        before = gradients if accumulated else 0
        prompts = [p for p, _ in case.prompts]
        return {
            "generation": self._generate(case, 0, prompts, case.samples, case.prefix),
            "teacher_score": before + score["peak"],
            "student_update": before + score["rows"] + max(update.values()),
            "optimizer": gradients,
        }

    def _evaluation_phases(self, case: Case) -> dict[str, float]:
        """Return phase of an evaluation, if the run has it → bytes beyond the weights."""
        phases = {}
        longest = max(case.prompts)
        if case.problems:
            prompts = [longest[0]] * case.problems
            phases["evaluation"] = self._generate(case, 0, prompts, 1, case.limit)
        if case.contexts:
            group = case.rollouts(case.limit, [longest] * min(case.contexts, case.micro), 1)
            ours, other = self._read(case, 0, group), self._read(case, 1, group)
            tables = measuring.comparing(self._shallow(case), case.terms.dtype, group)
            phases["evaluation, both models"] = max(
                ours["peak"],
                ours["rows"] + other["peak"],
                ours["rows"] + other["rows"] + tables,
            )
        return phases

    def _shallow(self, case: Case) -> list[Model]:
        """Return student and teacher with few layers; only their heads are used."""
        return [
            replace(self.model(role, settings, depths(self.configs[role])[0]), support=case.support)
            for role, settings in ((0, case.student), (1, case.teacher))
        ]

    def _read(self, case: Case, role: int, group: list[Rollout]) -> dict[str, float]:
        """Return the bytes of a forward pass over ``group``, as ``measuring.reading`` does."""
        sides = teacher_sides(group) if role else student_sides(group)
        return self.measured(
            role,
            case.teacher if role else case.student,
            ("read", _sizes(group), case.autocast),
            lambda m: measuring.reading(m, sides, case.autocast),
        )

    def _generate(self, case: Case, role: int, prompts: list[int], samples: int, new: int) -> float:
        """Return the peak bytes while a model samples ``samples`` responses to each prompt."""
        rows = min(case.rows, samples * len(prompts))
        first = sorted(prompts, reverse=True)[: -(-rows // samples)]
        found = self.measured(
            role,
            case.teacher if role else case.decoding,
            ("generate", tuple(first), samples, rows, new, case.support),
            lambda m: measuring.generating(
                replace(m, support=case.support), first, samples, rows, new
            ),
        )
        return max(found.values())


def _largest_group(case: Case) -> tuple[list[Rollout], bool]:
    """Return (the micro-batch of an update with the most tokens, whether there are others)."""
    groups = micro_batches(case.rollouts(case.prefix), case.micro, not case.recomputes)
    largest = max(groups, key=lambda g: sum(len(r.student_prompt) + len(r.ids) for r in g))
    return largest, len(groups) > 1


def _rounded(tree: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in tree.items()}


def _sizes(group: list[Rollout]) -> tuple:
    return tuple((r.slot, len(r.student_prompt), len(r.teacher_prompt), len(r.ids)) for r in group)


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
