"""Ranks, their collectives, and stop signals. Every sum over ranks goes through this file."""

import contextlib
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from .. import config as configuration
from ..errors import Stopped, UserError
from .device import best_dtype, choose_device


class Interrupt:
    """Ctrl-C, SIGTERM and a closed terminal as a wish: the first signal is noted in ``asked``, a
    second one acts at once, as without this. What was ignored before (nohup) stays ignored.

    Outside the main thread, where Python allows no signal handlers, only ``asked`` works."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)
        ]
        self.former = {
            n: signal.signal(n, self._note)
            for n in numbers
            if signal.getsignal(n) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()


@dataclass(frozen=True)
class Place:
    """Devices, dtypes and ranks of a command, with the reasons of automatic choices. ``store``:
    counts each rank's collectives; None for one rank."""

    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    head_dtype: torch.dtype
    rank: int
    world: int
    reasons: tuple[str, ...]
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Is this the rank that writes and prints?"""
        return self.rank == 0

    def autocast(self, device: torch.device) -> torch.autocast:
        """bfloat16 autocast on ``device`` when that is the compute dtype; nothing in float32."""
        return torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def total(self, value: float) -> float:
        """The sum of ``value`` over all ranks (float64; the same number on every rank)."""
        return sum(self.gather(value))

    def gather(self, value: object) -> list:
        """[value of rank 0, value of rank 1, …] on every rank; ``value`` is any plain object."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with self.meeting():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Every rank reaches this line before one goes on."""
        self.gather(None)

    def differing(self, tensors: dict[str, torch.Tensor]) -> tuple[int, str] | None:
        """(rank, name) of the first tensor whose bits are not rank 0's; None when all ranks hold
        the same. Compared: the sum of the bits of each tensor, read as whole numbers."""
        if self.world == 1:
            return None
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = torch.stack(
            [
                t.detach().view(words[t.element_size()]).sum(dtype=torch.int64)
                for t in tensors.values()
            ]
        ).tolist()
        first, *others = self.gather(sums)
        return next(
            (
                (rank, name)
                for rank, found in enumerate(others, 1)
                for name, own, other in zip(tensors, first, found, strict=True)
                if own != other
            ),
            None,
        )

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what all ranks do together. Stopped names the ranks that did not come, if this
        fails."""
        if self.store is None:
            yield
            return
        met = None
        try:
            met = self.store.add(_meetings(self.rank), 1)
            yield
        except (
            RuntimeError
        ) as error:  # a timeout, a closed connection; gloo's are plain RuntimeErrors
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise Stopped(
                f"rank {self.rank} of {self.world}: {self._absent(self.store, met)} "
                f"({(str(error).splitlines() or [''])[0][:160]}); --resume goes on from the newest "
                "checkpoint, --rank-timeout waits longer"
            ) from None

    def _absent(self, store: dist.Store, met: int | None) -> str:
        """Name the ranks that missed a collective; ``met``: this rank's collectives so far."""
        out_of_reach = "the launcher or the first machine was lost"
        if met is None:
            return out_of_reach
        try:
            late = [rank for rank in range(self.world) if store.add(_meetings(rank), 0) < met]
        except RuntimeError:
            return out_of_reach
        return (
            f"rank {', '.join(map(str, late))} did not come, or was lost"
            if late
            else "a rank was lost while all of them talked"
        )


def _meetings(rank: int) -> str:
    return f"prefix-distill/meetings/{rank}"


def place(runtime: configuration.Runtime, parameters: Callable[[], int]) -> Place:
    """Resolves the ``runtime`` section for a student of ``parameters()`` parameters. UserError on a
    missing device or on a launcher that started another number of ranks than ``gpus``."""
    reasons: list[str] = []
    world = _counted("WORLD_SIZE", 1, 1)
    rank, local, here = (
        _counted("RANK", 0, 0, world),
        _counted("LOCAL_RANK", 0, 0),
        _counted("LOCAL_WORLD_SIZE", world, 1),
    )
    if world > 1 and (
        missing := [
            name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)
        ]
    ):
        raise UserError(
            f"environment WORLD_SIZE={world}: {missing[0]} is not set; start the ranks with --gpus "
            "or torchrun, or unset WORLD_SIZE"
        )
    _counted("MASTER_PORT", 0, 0, 65536)
    if runtime.gpus is not None and runtime.gpus != here:
        raise UserError(
            f"--gpus {runtime.gpus}: {here} rank{'s run' if here > 1 else ' runs'} on this "
            "machine; leave it out under another launcher and in `compare`"
        )
    device = choose_device(runtime.device, local, here, reasons)
    teacher_device = (
        device
        if runtime.teacher_device in (None, "auto")
        else choose_device(runtime.teacher_device, local, 1, reasons)
    )
    store = None
    if world > 1:
        store = _join(rank, world, device.type == "cuda", timedelta(seconds=runtime.rank_timeout))
        reasons.append(
            f"{world} ranks, this machine's with {torch.get_num_threads()} CPU threads each, by "
            f"{'NCCL' if device.type == 'cuda' else 'gloo'}"
        )
    if runtime.dtype == "auto":
        dtype, reason = best_dtype(device, parameters)
        reasons.append(reason)
    else:
        dtype = getattr(torch, runtime.dtype)
    head_dtype = dtype if runtime.head_dtype == "auto" else getattr(torch, runtime.head_dtype)
    return Place(device, teacher_device, dtype, head_dtype, rank, world, tuple(reasons), store)


@functools.cache  # a second run in the same process finds the group there
def _join(rank: int, world: int, gpu: bool, timeout: timedelta) -> dist.Store:
    """Meets the other ranks. What they tell each other goes over gloo, gradients on GPUs over
    NCCL."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {world}: cannot meet the others "
            f"({(str(error).splitlines() or [''])[0][:160]}); start all ranks with one launcher "
            "(--gpus, torchrun, accelerate launch), the same --master-addr and --master-port"
        ) from None
    return dist.PrefixStore("prefix-distill", store)


def _counted(name: str, default: int, low: int, end: int = 1 << 31) -> int:
    """The whole number in the environment variable ``name``, from ``low`` to below ``end``."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) < end:
        raise UserError(
            f"environment {name}={text[:40]!r}: expected a whole number from {low} to {end - 1}; "
            f"start the ranks with torchrun, or unset {name}"
        )
    return int(text)
