"""What a prepared run costs: FLOPs and least time of all its steps, and disk space."""

from typing import Any

from ..engine.shapes import widest_matrix
from ..prompts.stream import prompts_of_step
from ..training.run import Run
from .disk import estimate_disk
from .rate import Product

MOST = 200  # steps whose FLOPs are computed; those of a longer run are spread evenly


def describe_price(run: Run) -> dict[str, Any]:
    """Return the price of a run as JSON values.

    ``flops``: useful FLOPs of all steps, whose rollouts are all as long as the prefix;
    ``full_rollout_flops``: the same with full rollouts; ``least_seconds``: the time of these FLOPs
    at the speed of a large matrix product on this machine; ``not_in_flops``: flags whose extra work
    is not counted; ``disk``: bytes of the run folder (``disk.estimate_disk``).
    """
    config, method = run.config, run.method
    every = max(1, -(-config.train.steps // MOST))
    counted = range(0, config.train.steps, every)
    flops = full = 0.0
    for step in counted:
        prompts = prompts_of_step(
            run.problems.train, step, size=config.train.batch_size, seed=config.runtime.seed
        )
        flops += run.update_cost(prompts, method.prefix.length(step))
        full += run.update_cost(prompts, run.max_new_tokens)
    scale = config.train.steps / max(1, len(counted))
    extra_work = {
        "--select": method.selection,
        "--extrapolate": run.problems.extrapolation,
        "--off-policy": method.off_policy,
        "--tail-every": config.evaluate.tail_every,
    }
    student = run.pair.student
    return {
        "flops": flops * scale,
        "full_rollout_flops": full * scale,
        "least_seconds": flops * scale / (_measure_speed(run) * run.place.world),
        "not_in_flops": [flag for flag, is_on in extra_work.items() if is_on],
        "disk": estimate_disk(
            config,
            parameters=student.parameters,
            trained=sum(p.numel() for p in student.trainable.values()),
            base_bytes=run.place.dtype.itemsize,
        ),
    }


def _measure_speed(run: Run) -> float:
    """Return the FLOP/s of a micro-batch's matrix product on this rank's device."""
    student = run.pair.student
    product = Product(
        tokens=64 * run.limits.micro_batch_size,
        width=student.config.hidden_size,
        inner=widest_matrix(student),
    )
    return product.measure(run.place.device, run.place.dtype)
