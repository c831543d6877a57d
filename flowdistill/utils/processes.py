"""The processes that share a piece of work (accelerate launch, torchrun), or the only one.

accelerate's ``PartialState`` has the ranks too, but no joining of rows whose number differs, and no error that every
process raises when the main one fails; and it makes a process group where there is none, which a function that a user's
script calls must not do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank and number of processes, with the few collectives an evaluation needs.

    Every method that communicates must be called by all processes, in the same order.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """The processes of torch.distributed as it stands; one process when it was not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def start(cls) -> Processes:
        """The same, after joining the process group that a launcher has announced in the environment, if any."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        return cls.current()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def span(self, total: int, unit: int = 1) -> range:
        """This process's contiguous part of ``range(total)``; sizes differ by at most one ``unit``, which no two
        processes share: so batches of a unit are the same ones for any number of processes."""
        units = -(-total // unit)
        first, end = (unit * (rank * units // self.world) for rank in (self.rank, self.rank + 1))
        return range(min(first, total), min(end, total))

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes, on the CPU."""
        total = tensor.detach().to(self._device(), copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total.cpu()

    def max(self, value: int) -> int:
        """Largest of the processes' integers."""
        largest = torch.tensor(value, device=self._device())
        if self.world > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def rows(self, tensor: Tensor) -> Tensor:
        """All processes' rows, joined in rank order, on the CPU; the number of rows may differ."""
        if self.world == 1:
            return tensor.detach().cpu()
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(tensor)
        counts = self.sum(counts)
        padded = torch.zeros(int(counts.max()), *tensor.shape[1:], dtype=tensor.dtype, device=self._device())
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts.tolist(), strict=True)])

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 only and give its result, or raise its error, on every process.

        Without passing the error on, the others would wait for a message that never comes.
        """
        if self.world == 1:
            return function()
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every process and give each its own result; an error of one is raised on all.

        ``function`` must not communicate: a process whose error ended it would be waited for.
        """
        if self.world == 1:
            return function()
        result: T | None = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as found:
            error = found
        errors: list[Exception | None] = [None] * self.world
        dist.all_gather_object(errors, error)
        for one in errors:
            if one is not None:
                raise one if error is None else error
        return cast(T, result)

    def _device(self) -> torch.device:
        """The device on which collectives want their tensors: nccl moves GPU memory only."""
        if self.world > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
