"""Choose how many rollouts a run handles at once, and check that the run fits in memory."""

import dataclasses

import torch

from .. import config as configuration
from ..config import Config
from ..display import memory_text, phase, phase_text
from ..engine.decoder import packs_weights
from ..engine.free_memory import read_free_memory
from ..engine.memory import MemoryLimits, read_batch_sizes
from ..errors import UserError
from ..training.prepare import prepare
from ..training.run import Check, Run
from .case import Case, Dtypes, Lengths, build_case
from .fitting import fit_sizes, resize, smallest
from .forecast import Forecaster, bound_memory
from .outcomes import failed, passed, warned

# share of the free memory that batches may fill: the allocator rounds up, libraries need some
FILLED = 0.9
# option → field of a Case
SIZES = {"rollout.rows": "rows", "train.micro_batch_size": "micro_batch"}


def prepare_fitting(config: Config) -> Run:
    """Load everything that a run needs, and choose the sizes that are ``auto``.

    UserError: as ``prepare``.
    """
    run = prepare(config)
    automatic = [path for path in SIZES if configuration.get(config, path) is None]
    if not automatic:
        return run
    with phase("choosing batch sizes"):
        return _choose_sizes(run, automatic)


def _choose_sizes(run: Run, automatic: list[str]) -> Run:
    """Return the run with the largest sizes of ``automatic`` options that fit, and a note.

    Where memory cannot be forecast, the usual sizes are taken, which are halved when memory runs
    out.
    """
    case = describe_case(run)
    most = case
    if "train.micro_batch_size" in automatic:
        most = resize(case, "micro_batch", largest_micro_batch(run.place.device, case))
    free = _read_free(run)
    feature = _unsupported_feature(run)
    chosen = case
    reason = f"the free memory of {run.place.device} is not known"
    if free is not None:
        reason = f"{memory_text(free)} free on {run.place.device}"
    if feature is not None:
        reason = f"no forecast with {feature}"
    elif free is not None:
        try:
            chosen = _fit(run, most, automatic, free=free)
        except UserError as error:
            reason = f"no forecast: {error}"
    return _with_sizes(run, automatic, chosen, reason=reason)


def largest_micro_batch(device: torch.device, case: Case) -> int:
    """Return the largest micro-batch worth choosing: on a GPU all rollouts of a rank's step.

    On a CPU, more than the usual number of rollouts save no time.
    """
    if device.type == "cpu":
        return case.micro_batch
    return len(case.prompts) * case.samples


def _fit(run: Run, most: Case, automatic: list[str], free: int) -> Case:
    """Return the largest sizes that leave a part of the ``free`` bytes; 1 if not even 1 fits."""
    room = FILLED * free
    # A forecast takes seconds, and small models do not need it.
    if bound_memory(run.pair.student, run.pair.teacher, most) < room:
        return most
    forecaster = _forecaster(run)
    weights = forecaster.forecast(smallest(most))["weights"]
    room += _count_loaded(weights)
    fields = [SIZES[path] for path in automatic]
    return fit_sizes(forecaster, most, room, fields=fields) or smallest(most)


def _with_sizes(run: Run, automatic: list[str], chosen: Case, reason: str) -> Run:
    """Return the run with the chosen sizes; a note states them with the reason."""
    sections: dict[str, dict[str, int]] = {}
    texts = []
    for path in automatic:
        section, key = path.split(".")
        size = getattr(chosen, SIZES[path])
        sections[section] = {key: size}
        texts.append(f"{configuration.flag(path)} {size}")
    config = configuration.replace(run.config, **sections)
    text = f"chosen: {' '.join(texts)} ({reason})"
    usual = read_batch_sizes(run.config)
    if read_batch_sizes(config) == usual:
        run.notes.detail(text)
    else:
        run.notes.note(text)
    return dataclasses.replace(run, config=config, limits=MemoryLimits(run.place, config))


def _forecaster(run: Run) -> Forecaster:
    return Forecaster(run.pair.student.net.config, run.pair.teacher.net.config)


def _count_loaded(weights: dict[str, int]) -> int:
    """Return the bytes of both models, which are in memory already and take none that is free."""
    return weights.get("student", 0) + weights.get("teacher", 0)


def _read_free(run: Run) -> int | None:
    """Return the least free memory of all ranks; None where it is not known."""
    free = run.place.gather(read_free_memory(run.place.device))
    return None if None in free else min(free)


def check_memory(run: Run) -> Check:
    """Compare what the run needs in addition to the loaded weights with the free memory."""
    free = _read_free(run)
    case = describe_case(run)
    bound = bound_memory(run.pair.student, run.pair.teacher, case)
    facts = {"free_bytes": free, "at_most_bytes": bound}
    needs = f"the run needs less than {memory_text(bound)} (an upper bound)"
    if free is None:
        text = f"{needs}; the free memory of {run.place.device} is not known"
        return passed("memory", text, facts)
    free_text = f"{memory_text(free)} free on {run.place.device}"
    # A forecast takes seconds, and small models do not need it.
    if bound < free:
        return passed("memory", f"{needs}; {free_text}", facts)
    feature = _unsupported_feature(run)
    if feature is not None:
        return passed("memory", f"no forecast with {feature}; {free_text}", facts)
    try:
        forecast = _forecaster(run).forecast(case)
    except UserError as error:
        return passed("memory", f"no forecast: {error}", facts)
    return _compare_memory(forecast, free, facts, free_text=free_text)


def describe_case(run: Run) -> Case:
    """Return the settings and lengths of the run that determine its memory."""
    prompts = [(len(r.student_ids), len(r.teacher_ids)) for r in run.problems.train]
    longest_prefix = run.method.prefix.longest(run.config.train.steps or 1)
    case = build_case(
        run.config,
        Dtypes(run.place.dtype, run.place.head_dtype),
        Lengths(prompts, prefix=longest_prefix, limit=run.method.prefix.limit),
        support=run.pair.student.support,
        ranks=run.place.world,
    )
    return dataclasses.replace(case, packs_weights=packs_weights(run.place.device, run.place.dtype))


def _unsupported_feature(run: Run) -> str | None:
    """Return a feature of this run that the forecast does not cover, or None."""
    models, runtime = run.config.models, run.config.runtime
    if models.student_quantize != "none":
        return "--student-quantize"
    if models.teacher_quantize != "none":
        return "--teacher-quantize"
    if runtime.teacher_device == "auto":
        return "--teacher-device auto"
    if run.pair.alignment is not None:
        return "different tokenizers"
    return None


def _compare_memory(forecast: dict, free: int, facts: dict, free_text: str) -> Check:
    """Compare a forecast (``Forecaster.forecast``) with ``free`` bytes."""
    weights = forecast["weights"]
    loaded = _count_loaded(weights)
    needed = forecast["total"] - loaded
    fixed = sum(weights.values()) - loaded + forecast["gradients"]
    facts = facts | {
        "needed_bytes": needed,
        "fixed_bytes": fixed,
        "set_by": forecast["set_by"],
        "phases": forecast["phases"],
    }
    text = (
        f"the run needs {memory_text(needed)} in addition to the loaded weights (peak in "
        f"{phase_text(forecast['set_by'])}); {free_text}"
    )
    if fixed > free:
        text += (
            f"; optimizer, gradients and copies alone take {memory_text(fixed)} at any batch size; "
            "use --lora 16, a smaller model, or --teacher-device for the teacher"
        )
        return failed("memory", text, facts)
    if needed > free:
        text += (
            "; batches will be halved until they fit; lower --micro-batch-size or "
            "--generation-rows, or use --gradient-checkpointing"
        )
        return warned("memory", text, facts)
    return passed("memory", text, facts)
