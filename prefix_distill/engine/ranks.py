"""Join the ranks of a command and run their collectives.

Every sum over ranks goes through this module.
"""

import atexit
import contextlib
import functools
import gc
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import config as configuration
from ..errors import Stopped, UserError, first_line
from .device import HasParameters, choose_device, choose_dtype

# the integer type that reads a tensor's bits, by bytes of an element
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# set during a collective, and after one that did not complete
_in_collective = threading.Event()


@dataclass(frozen=True, kw_only=True)
class Place:
    """The devices, dtypes and ranks of a command, with the reasons of automatic choices.

    ``store`` counts each rank's collectives; None for one rank.
    """

    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    head_dtype: torch.dtype
    rank: int
    world: int
    reasons: tuple[str, ...]
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Return whether this is the rank that writes and prints."""
        return self.rank == 0

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return bfloat16 autocast on ``device``, disabled if the compute dtype is another."""
        return torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def sum(self, value: float) -> float:
        """Return the sum of ``value`` over all ranks (float64, equal on every rank)."""
        return sum(self.gather(value))

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in the order of the ranks; any plain object will do."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with self.collective():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.gather(None)

    def find_difference(self, tensors: dict[str, torch.Tensor]) -> tuple[int, str] | None:
        """Return rank and name of the first tensor that differs from rank 0's; else None.

        It compares the sum of each tensor's bits, which are read as integers.
        """
        if self.world == 1:
            return None
        sums = []
        for tensor in tensors.values():
            bits = tensor.detach().view(BITS[tensor.element_size()])
            sums.append(bits.sum(dtype=torch.int64))
        first, *others = self.gather(torch.stack(sums).tolist())
        for rank, other in enumerate(others, 1):
            for name, expected, actual in zip(tensors, first, other, strict=True):
                if expected != actual:
                    return rank, name
        return None

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Run a collective in the ``with`` block; if it fails, Stopped names the missing ranks."""
        if self.store is None:
            yield
            return
        count = None
        _in_collective.set()
        try:
            count = self.store.add(_collectives_key(self.rank), 1)
            yield
            _in_collective.clear()
        except RuntimeError as error:  # gloo raises plain RuntimeErrors for timeouts and lost peers
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise Stopped(
                f"rank {self.rank} of {self.world}: {self._describe_missing(self.store, count)} "
                f"({first_line(error, 160)}); continue from the newest checkpoint with --resume; "
                "--rank-timeout sets how long ranks wait"
            ) from None

    def _describe_missing(self, store: dist.Store, count: int | None) -> str:
        """Name the ranks that have run fewer collectives than ``count``, which is this rank's."""
        unreachable = "the launcher or the first machine cannot be reached"
        if count is None:
            return unreachable
        late = []
        try:
            for rank in range(self.world):
                if store.add(_collectives_key(rank), 0) < count:
                    late.append(str(rank))
        except RuntimeError:
            return unreachable
        if not late:
            return "a rank failed during a collective"
        return f"rank {', '.join(late)} failed or timed out"


def _collectives_key(rank: int) -> str:
    return f"prefix-distill/collectives/{rank}"


def join_ranks(runtime: configuration.Runtime, student: HasParameters) -> Place:
    """Join the other ranks and resolve the ``runtime`` section.

    The automatic dtype depends on the size of ``student``. UserError: a device is missing, or the
    launcher started another number of ranks than ``gpus``.
    """
    world = _read_integer("WORLD_SIZE", 1, 1)
    rank = _read_integer("RANK", 0, low=0, end=world)
    local_rank = _read_integer("LOCAL_RANK", 0, 0)
    local_world = _read_integer("LOCAL_WORLD_SIZE", world, 1)
    _check_launch(runtime.gpus, world, local_world)
    reasons: list[str] = []
    device = choose_device(runtime.device, local_rank, sharing=local_world, reasons=reasons)
    teacher_device = device
    if runtime.teacher_device not in (None, "auto"):
        teacher_device = choose_device(
            runtime.teacher_device, local_rank, sharing=1, reasons=reasons
        )
    store = None
    if world > 1:
        timeout = timedelta(seconds=runtime.rank_timeout)
        store = _join_group(rank=rank, world=world, device_type=device.type, timeout=timeout)
        backend = "gloo"
        if device.type == "cuda":
            backend = "NCCL"
        reasons.append(
            f"{world} ranks over {backend}; each rank on this machine uses "
            f"{torch.get_num_threads()} CPU threads"
        )
    if runtime.dtype == "auto":
        dtype, reason = choose_dtype(device, student)
        reasons.append(reason)
    else:
        dtype = getattr(torch, runtime.dtype)
    head_dtype = dtype
    if runtime.head_dtype != "auto":
        head_dtype = getattr(torch, runtime.head_dtype)
    return Place(
        device=device,
        teacher_device=teacher_device,
        dtype=dtype,
        head_dtype=head_dtype,
        rank=rank,
        world=world,
        reasons=tuple(reasons),
        store=store,
    )


def _check_launch(gpus: int | None, world: int, local_world: int) -> None:
    """Raise UserError if the launcher's environment is incomplete or contradicts ``--gpus``."""
    if world > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"environment WORLD_SIZE={world}: {name} is not set; start the ranks with "
                    "--gpus or torchrun, or unset WORLD_SIZE"
                )
    _read_integer("MASTER_PORT", 0, low=0, end=65536)
    if gpus is not None and gpus != local_world:
        ranks = "rank"
        if gpus > 1:
            ranks = "ranks"
        raise UserError(
            f"--gpus {gpus}: expected {gpus} {ranks} on this machine, got {local_world} from the "
            "launcher; omit --gpus under another launcher and in `compare`"
        )


@functools.cache  # a second run in the same process uses the same group
def _join_group(rank: int, world: int, device_type: str, timeout: timedelta) -> dist.Store:
    """Initialize the process group: gloo for objects, and NCCL for gradients on GPUs."""
    backends = "gloo"
    if device_type == "cuda":
        backends = "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        dist.init_process_group(
            backends,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {world}: cannot connect to the other ranks "
            f"({first_line(error, 160)}); start all ranks with one launcher (--gpus, torchrun, "
            "accelerate launch) and the same --master-addr and --master-port"
        ) from None
    atexit.register(_leave_group)
    return dist.PrefixStore("prefix-distill", store)


def _leave_group() -> None:
    """Destroy the process group before Python shuts down, unless a collective is unfinished.

    Without it, a thread of gloo may free a tensor while Python shuts down: SIGABRT. The thread of
    an unfinished collective would be waited for until its timeout.
    """
    if _in_collective.is_set() or not dist.is_initialized():
        return
    gc.collect()  # DDP modules in reference cycles would keep the group alive
    dist.destroy_process_group()


def _read_integer(name: str, default: int, low: int, end: int = 1 << 31) -> int:
    """Return the integer of an environment variable, from ``low`` to below ``end``."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) < end:
        raise UserError(
            f"environment {name}={text[:40]!r}: expected a whole number from {low} to {end - 1}; "
            f"start the ranks with torchrun, or unset {name}"
        )
    return int(text)
