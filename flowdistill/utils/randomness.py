"""Seeded randomness that depends neither on the number of processes nor on the batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.seeds import check_seed

_SHORT = 2**32  # torch's CPU generator, a Mersenne twister, keeps so much of a seed: 2^32 would be 0 again


def generator_of(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for a seed of any size, and one of many such for further numbers; each has its own numbers.

    A seed below 2^32 alone gives what ``torch.Generator().manual_seed`` does. Else numpy's ``SeedSequence`` (after
    M. E. O'Neill, "Developing a seed_seq alternative", 2015) spreads all bits over the 624 words of the twister.

    Args:
        seed: at least 0.
        key: numbers of at least 0.
    """
    generator = torch.Generator()
    if seed < _SHORT and not key:
        return generator.manual_seed(seed)
    generator.set_state(_twister_state(seed, *key))
    return generator


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, of all devices, with a seed of 0 to 2^64 - 1; each has its own numbers."""
    torch.manual_seed(check_seed(seed))
    if seed >= _SHORT:  # a GPU's generator keeps all 64 bits
        torch.default_generator.set_state(_twister_state(seed))


def _twister_state(seed: int, *key: int) -> Tensor:
    """The state of a CPU generator as torch stores it: seed, words left, next word, 624 words, and the rest zero."""
    words: Any = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=key)).state["state"]
    words = words["key"]
    state = torch.Generator().manual_seed(0).get_state().view(torch.int64).clone()
    state[0] = seed % 2**63
    state[3 : 3 + len(words)] = torch.from_numpy(words.astype(np.int64))
    return state.view(torch.uint8)


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a hash of ``parts``: neighbouring steps and ranks get unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draw:
    """Random numbers for one micro-batch of one update, and the mean over the processes.

    Every draw is made for all ``rows`` on the CPU, from a generator seeded by (seed, step, update, micro, number of
    the call), and this process gets the rows rank, rank + world, rank + 2 * world, ... So the rows of two processes
    together are the rows of one, on any device, and a resumed run draws what an uninterrupted one does. A method that
    treats the first share of its rows differently does so to the same rows for any number of processes that divides
    both shares. All processes must make the same calls in the same order.

    Args:
        seed: of the run.
        step: training step.
        update: position of the update within the step's schedule.
        micro: number of the micro-batch within the update.
        rows: rows of this micro-batch over all processes.
        rank, world: this process and the number of processes.
        device: where the draws go.

    Raises:
        UserError: ``rows`` is not a multiple of ``world``.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        update: int = 0,
        micro: int = 0,
        rows: int = 1,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.step, self.update, self.micro = seed, step, update, micro
        self.rows, self.rank, self.world = rows, rank, world
        self.device = torch.device(device)
        self._calls = 0
        self._check(rows)

    def normal(self, shape: Sequence[int], rows: int | None = None) -> Tensor:
        """Unit normal numbers, float32 (local rows, *shape); ``rows`` (over all processes) defaults to all."""
        count = self.rows if rows is None else rows
        return self._mine(torch.randn((count, *shape), generator=self._generator()))

    def uniform(self, low: float = 0.0, high: float = 1.0, rows: int | None = None) -> Tensor:
        """Numbers in [low, high), float32 (local rows,)."""
        count = self.rows if rows is None else rows
        return self._mine(low + (high - low) * torch.rand(count, generator=self._generator()))

    def logit_normal(self, mean: float, std: float, rows: int | None = None) -> Tensor:
        """sigmoid(mean + std * normal): numbers in (0, 1), float32 (local rows,)."""
        return torch.sigmoid(mean + std * self.normal((), rows))

    def integers(self, high: int, rows: int | None = None, on_cpu: bool = False) -> Tensor:
        """Integers in [0, high), int64 (local rows,); ``on_cpu`` keeps them there, to index what is there."""
        count = self.rows if rows is None else rows
        values = torch.randint(high, (count,), generator=self._generator())
        return self._local(values) if on_cpu else self._mine(values)

    def choice(self, cumulative: Tensor, rows: int | None = None) -> Tensor:
        """Indices with probabilities given by their running sum (N,) to 1; int64 (local rows,), always on the CPU."""
        count = self.rows if rows is None else rows
        values = self._local(torch.rand(count, generator=self._generator(), dtype=torch.float64))
        return torch.searchsorted(cumulative, values, right=True).clamp(max=len(cumulative) - 1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over its elements and over the processes (of equal rows): 0-d, detached, no host sync."""
        value = x.detach().mean()
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def _generator(self) -> torch.Generator:
        self._calls += 1
        seed = mixed_seed("draw", self.seed, self.step, self.update, self.micro, self._calls)
        return torch.Generator().manual_seed(seed)

    def _check(self, rows: int) -> None:
        if rows % self.world:
            raise UserError(f"{rows} rows cannot be shared equally by {self.world} processes")

    def _local(self, values: Tensor) -> Tensor:
        self._check(len(values))
        return values[self.rank :: self.world].contiguous()

    def _mine(self, values: Tensor) -> Tensor:
        values = self._local(values)
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


_STRIDE = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: consecutive seeds land far apart


def indexed_noise(shape: tuple[int, ...], seed: int, indices: Iterable[int]) -> Tensor:
    """Unit normal noise (N, *shape), float32 on the CPU; row i depends on ``seed`` and ``indices[i]`` only.

    Args:
        seed: 0 to 2^64 - 1; each gives other noise.
        indices: of at least 0.
    """
    seed, indices = check_seed(seed), list(indices)
    noise = torch.empty(len(indices), *shape)
    for index, row in zip(indices, noise.unbind(), strict=True):
        row.normal_(generator=_generator_at(seed, index))
    return noise


def _generator_at(seed: int, index: int) -> torch.Generator:
    if seed < _SHORT:
        return torch.Generator().manual_seed(((seed + 1) * _STRIDE + index) & 0x7FFFFFFFFFFFFFFF)
    return generator_of(seed, index)
