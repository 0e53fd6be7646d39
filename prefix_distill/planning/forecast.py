"""Forecast how much memory a run needs, phase by phase, from its configs alone.

No weight is read or downloaded. The networks are built from their configs as shape-only tensors
(``ghosts``). The training code runs on them, and every tensor is counted while it lives. Ids and
masks are real, so data-dependent control flow takes its real path. Deep networks whose layers
repeat are measured at two small depths and extrapolated linearly.

Counted: the bytes of tensors. Not counted: the CUDA context (some hundred MiB), the workspaces of
cuBLAS, cuDNN and oneDNN, and what an allocator rounds up or caches.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from ..engine.batching import micro_batches
from ..engine.masters import Masters
from ..engine.models import Model
from ..engine.rollout import Rollout, student_sides, teacher_sides
from ..engine.shapes import attention_widths, widest_matrix
from ..errors import UserError
from .case import Case, Network, make_rollouts
from .ghosts import choose_depths, sketch
from .measuring import Generation, MicroBatch, measure_comparison
from .parts import Bytes, Forward, Part, Sampling, Sizes, Training, Weights, describe_sizes

STUDENT = "student"
TEACHER = "teacher"


class Forecaster:
    """Forecasts the memory of a student and a teacher from their configs.

    ``names``: their names in error messages. Networks and measurements are cached.
    """

    def __init__(
        self,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig,
        names: tuple[str, str] = (STUDENT, TEACHER),
    ):
        self.configs = {STUDENT: student, TEACHER: teacher}
        self.names = {STUDENT: names[0], TEACHER: names[1]}
        self.networks: dict[tuple[str, Network, int | None], Masters] = {}
        self.measurements: dict[tuple[str, Network, Part], Bytes] = {}
        self.comparisons: dict[tuple[Network, Network, torch.dtype, Sizes], int] = {}
        self.forecasts: dict[Case, dict] = {}

    def forecast(self, case: Case) -> dict:
        """Return the memory of one rank in bytes.

        {total, set_by: the phase with the most memory, weights: {component: bytes}, gradients,
        phases: {phase: bytes beyond the weights}, teacher_device: bytes, or None if the teacher is
        on the student's device}. UserError: a network cannot be sketched.
        """
        if case not in self.forecasts:
            self.forecasts[case] = self._forecast(case)
        return self.forecasts[case]

    def _forecast(self, case: Case) -> dict:
        """Return the result of ``forecast``, computed anew."""
        weights, gradients = self._measure_weights(case)
        phases = self._training_phases(case, gradients) | self._evaluation_phases(case)
        if case.samples_text:
            prompts = [teacher for _, teacher in case.prompts]
            phases["teacher_text"] = self._generate(case, TEACHER, prompts, new_tokens=case.prefix)
        teacher_device = None
        # The teacher's bytes then count on its own device.
        if case.has_own_device:
            group, _ = _largest_micro_batch(case)
            scoring_peak = self._forward(case, TEACHER, group)["peak"]
            teacher_peak = max(scoring_peak, phases.pop("teacher_text", 0))
            teacher_device = round(weights.pop("teacher", 0) + teacher_peak)
            phases.pop("teacher_score")
        set_by = max(phases, key=lambda phase: phases[phase])
        return {
            "total": round(sum(weights.values()) + phases[set_by]),
            "set_by": set_by,
            "weights": _round(weights),
            "gradients": round(gradients),
            "phases": _round(phases),
            "teacher_device": teacher_device,
        }

    def _measure_weights(self, case: Case) -> tuple[Bytes, float]:
        """Return the bytes of every component that is held all the time, and of the gradients."""
        student = self._measure(STUDENT, case.student, Weights())
        teacher = self._measure(TEACHER, case.teacher, Weights())
        trainable = student["trainable"]
        all_train = case.adapter is None
        # Two moments of AdamW and the gradient, in float32.
        weights = {"student": student["all"], "AdamW's moments": 8 * trainable}
        if student["copy"]:
            weights["working copy"] = student["copy"]
        if case.packs_weights:
            weights["packed weights"] = student["copy"] or student["all"]
        # A LoRA student without its adapter is its own teacher and needs no second copy.
        if all_train or not case.starts_as_student:
            weights["teacher"] = teacher["all"]
        return weights, 4 * trainable

    def _training_phases(self, case: Case, gradients: float) -> Bytes:
        """Return the bytes beyond the weights of every phase of a step."""
        group, accumulates = _largest_micro_batch(case)
        teacher_forward = self._forward(case, TEACHER, group)
        # The loss needs the teacher's hidden rows and head, not its layers.
        teacher_head = self._shallow(case, TEACHER).head()
        work = MicroBatch(
            rollouts=group, terms=case.terms, accumulates=accumulates, autocast=case.autocast
        )
        training = Training(
            sizes=describe_sizes(group),
            support=case.support,
            work=work,
            teacher_head=teacher_head,
        )
        update = self._measure(STUDENT, case.training, training)
        # The micro-batches of a step run one after another; each finds the gradients of the
        # earlier ones.
        earlier = 0.0
        if accumulates:
            earlier = gradients
        prompts = [student for student, _ in case.prompts]
        return {
            "generation": self._generate(case, STUDENT, prompts, new_tokens=case.prefix),
            "teacher_score": earlier + teacher_forward["peak"],
            "student_update": earlier + teacher_forward["rows"] + max(update.values()),
            "optimizer": gradients,
        }

    def _evaluation_phases(self, case: Case) -> Bytes:
        """Return the bytes beyond the weights of every phase of an evaluation that the run has."""
        phases = {}
        longest = max(case.prompts)
        if case.answers:
            # The longest prompt stands for all prompts of an evaluation.
            single = replace(case, samples=1)
            prompts = [longest[0]] * case.answers
            phases["evaluation"] = self._generate(single, STUDENT, prompts, new_tokens=case.limit)
        if case.compared:
            prompts_together = [longest] * min(case.compared, case.micro_batch)
            group = make_rollouts(prompts_together, 1, case.limit)
            student = self._forward(case, STUDENT, group)
            teacher = self._forward(case, TEACHER, group)
            tables = self._compare(case, group)
            # Both models run one after another, and their hidden rows stay for the comparison.
            phases["evaluation, both models"] = max(
                student["peak"],
                student["rows"] + teacher["peak"],
                student["rows"] + teacher["rows"] + tables,
            )
        return phases

    def _compare(self, case: Case, group: list[Rollout]) -> int:
        """Return the bytes of the tables that compare both models on ``group``."""
        key = (case.student, case.teacher, case.terms.dtype, describe_sizes(group))
        if key not in self.comparisons:
            self.comparisons[key] = measure_comparison(
                self._shallow(case, STUDENT).head(),
                self._shallow(case, TEACHER).head(),
                dtype=case.terms.dtype,
                rollouts=group,
            )
        return self.comparisons[key]

    def _forward(self, case: Case, role: str, group: list[Rollout]) -> Bytes:
        """Return the bytes of a forward pass over ``group`` (``measuring.measure_forward``)."""
        sides = student_sides(group) if role == STUDENT else teacher_sides(group)
        part = Forward(sizes=describe_sizes(group), autocast=case.autocast, sides=sides)
        return self._measure(role, _settings(case, role), part)

    def _generate(self, case: Case, role: str, prompts: list[int], new_tokens: int) -> float:
        """Return the peak bytes while a model samples ``case.samples`` responses per prompt."""
        rows = min(case.rows, case.samples * len(prompts))
        # ``generate`` sorts by length, so the longest prompts meet in one call.
        longest = sorted(prompts, reverse=True)[: -(-rows // case.samples)]
        work = Generation(
            prompts=tuple(longest), samples=case.samples, rows=rows, new_tokens=new_tokens
        )
        peaks = self._measure(
            role, _settings(case, role), Sampling(support=case.support, work=work)
        )
        return max(peaks.values())

    def _shallow(self, case: Case, role: str) -> Model:
        """Return a network with few layers, of which only the head is used."""
        depth = choose_depths(self.configs[role])[0]
        network = self._sketch(role, _settings(case, role), depth)
        return replace(network.student, support=case.support)

    def _sketch(self, role: str, settings: Network, layers: int) -> Masters:
        """Return a network of ghosts; the student's weights train unless it has an adapter."""
        key = (role, settings, layers)
        if key not in self.networks:
            model = sketch(self.names[role], self.configs[role], settings, layers=layers)
            if role == STUDENT and settings.adapter is None:
                model.train_weights()
            self.networks[key] = Masters(model, settings.copied_in or torch.float32)
        return self.networks[key]

    def _measure(self, role: str, settings: Network, part: Part) -> Bytes:
        """Return the bytes of a part at the full depth, from the cache if they are known."""
        key = (role, settings, part)
        if key not in self.measurements:
            self.measurements[key] = self._extrapolate(role, settings, part)
        return self.measurements[key]

    def _extrapolate(self, role: str, settings: Network, part: Part) -> Bytes:
        """Return the bytes of a part at the full depth, from one or two measured depths."""
        config = self.configs[role]
        depths = choose_depths(config)
        try:
            values = [part.measure(self._sketch(role, settings, layers)) for layers in depths]
        # A network that computes with the numbers of its weights fails in any of these ways.
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"model {self.names[role]}: expected a network that runs on shape-only tensors, "
                f"got {type(error).__name__} ({' '.join(str(error).split())[:160]}); its memory "
                "cannot be forecast"
            ) from None
        if len(depths) == 1:
            return values[0]
        # Every further layer adds the same number of bytes.
        (low, high), (first, second) = depths, values
        unmeasured = config.get_text_config(decoder=True).num_hidden_layers - low
        total = {}
        for name, size in first.items():
            total[name] = size + (second[name] - size) / (high - low) * unmeasured
        return total


def _settings(case: Case, role: str) -> Network:
    """Return the settings of a model outside of training and generation."""
    if role == STUDENT:
        return case.student
    return case.teacher


def _largest_micro_batch(case: Case) -> tuple[list[Rollout], bool]:
    """Return the micro-batch of a step with the most tokens, and whether there are others."""
    groups = micro_batches(case.update(), case.micro_batch, not case.recomputes)
    return max(groups, key=_count_tokens), len(groups) > 1


def _count_tokens(group: list[Rollout]) -> int:
    return sum(len(r.student_prompt) + len(r.ids) for r in group)


def _round(sizes: Bytes) -> dict[str, int]:
    return {name: round(size) for name, size in sizes.items()}


def bound_memory(student: Model, teacher: Model, case: Case) -> int:
    """Return bytes that a run surely stays below, by arithmetic that takes no time.

    Weights, gradients, moments and a copy of the student's weights, and twice the teacher's. Per
    token 40 widths, 10 feed-forward widths and three rows of an attention mask in float32: of all
    layers for a micro-batch that trains, of one layer elsewhere, with the KV cache of all. The
    chunk of the loss twice, four tables of the head's size, and the logits of all rows.
    """
    tokens = max(sum(p) for p in case.prompts) + max(case.prefix, case.limit)
    rows = max(case.micro_batch, case.rows)
    total = 2 * case.terms.memory_bytes
    for model, bytes_per_weight in ((student, 24), (teacher, 8)):
        config = model.config
        layers = config.num_hidden_layers
        table, hidden = model.net.get_output_embeddings().weight.shape
        width = max(hidden, *(size for size, _ in attention_widths(config)))
        layer = 40 * width + 10 * widest_matrix(model) + 3 * tokens
        trained_layers = 1
        if model is student:
            trained_layers = layers
        in_training = case.micro_batch * layer * trained_layers
        in_generation = rows * (layer + 2 * layers * width)
        total += bytes_per_weight * model.parameters
        total += 4 * tokens * (in_training + in_generation)
        total += 16 * table * (hidden + rows)
    return total
