"""Seeded randomness that depends neither on the number of processes nor on the batch size."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from flowdistill.utils.devices import sent
from flowdistill.utils.errors import UserError
from flowdistill.utils.seeds import check_seed

_SHORT = 2**32  # torch's CPU generator, a Mersenne twister, keeps so much of a seed: 2^32 would be 0 again
_WORDS = 624  # of its state


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


def row_digests(rows: Tensor, size: int = 8) -> list[int]:
    """A number of ``size`` bytes for each row (B, ...), a hash of the row's own values: the same in any batch."""
    values = rows.detach().cpu().contiguous().flatten(1).numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=size).digest() for row in values)
    return [int.from_bytes(digest, "little") for digest in digests]


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, of all devices, with a seed of 0 to 2^64 - 1; each has its own numbers."""
    torch.manual_seed(check_seed(seed))
    if seed >= _SHORT:  # a GPU's generator keeps all 64 bits
        torch.default_generator.set_state(_twister_state(seed))


def _twister_state(seed: int, *key: int) -> Tensor:
    """The state of a CPU generator as torch stores it: seed, words left, next word, 624 words, and the rest zero.

    The words are those of ``np.random.MT19937(np.random.SeedSequence(seed, spawn_key=key))``, in a third of the time.
    """
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(_WORDS)
    words[0] = 1 << 31
    state = _fresh_state().copy()
    state[0] = seed % 2**63
    state[3 : 3 + _WORDS] = words
    return torch.from_numpy(state.view(np.uint8))


@functools.cache
def _fresh_state() -> NDArray[np.int64]:
    state: NDArray[np.int64] = torch.Generator().manual_seed(0).get_state().numpy().view(np.int64)
    return state


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a hash of ``parts``: neighbouring steps and ranks get unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draw:
    """Random numbers for one micro-batch of one update, and the mean over the processes.

    Every number belongs to (seed, step, update, micro, number of the call, row), and a process makes those of its own
    rows only, rank, rank + world, rank + 2 * world, ..., on the CPU. So the rows of two processes together are the rows
    of one, on any device, at a cost that does not grow with the number of processes, and a resumed run draws what an
    uninterrupted one does. A method that treats the first share of its rows differently does so to the same rows for
    any number of processes that divides both shares. All processes must make the same calls in the same order.

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
        self._own_rows(rows)

    def normal(self, shape: Sequence[int], rows: int | None = None) -> Tensor:
        """Unit normal numbers, float32 (local rows, *shape); ``rows`` (over all processes) defaults to all."""
        if not shape:  # the inverse of the distribution function: one number is no work for a generator of its own
            return self.placed(torch.special.ndtri(self._shares(rows)).float())
        first, own = self._call_seed(), self._own_rows(rows)
        return self.placed(seeded_normal(tuple(shape), [first + row for row in own]))

    def uniform(self, low: float = 0.0, high: float = 1.0, rows: int | None = None) -> Tensor:
        """Numbers in [low, high), float32 (local rows,)."""
        # 24 bits, as float32 has them: rounding to it would make a 1 of the largest.
        share = (self._shares(rows) * _FLOAT32).floor().float() / _FLOAT32
        return self.placed(low + (high - low) * share)

    def logit_normal(self, mean: float, std: float, rows: int | None = None) -> Tensor:
        """sigmoid(mean + std * normal): numbers in (0, 1), float32 (local rows,)."""
        return torch.sigmoid(mean + std * self.normal((), rows))

    def integers(self, high: int, rows: int | None = None, on_cpu: bool = False) -> Tensor:
        """Integers in [0, high), int64 (local rows,); ``on_cpu`` keeps them there, to index what is there."""
        values = (self._shares(rows) * high).long().clamp(max=high - 1)
        return values if on_cpu else self.placed(values)

    def one(self, high: int) -> int:
        """An integer in [0, high), the same for all rows and on every process; on the host, without a wait."""
        share = hashed_uniform(self._call_seed(), np.zeros(1, dtype=np.uint64)).item()
        return min(int(share * high), high - 1)

    def choice(self, cumulative: Tensor, rows: int | None = None) -> Tensor:
        """Indices with probabilities given by their running sum (N,) to 1; int64 (local rows,), always on the CPU."""
        return torch.searchsorted(cumulative, self._shares(rows), right=True).clamp(max=len(cumulative) - 1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over its elements and over the processes (of equal rows): 0-d, detached, no host sync."""
        value = x.detach().mean()
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def _call_seed(self) -> int:
        self._calls += 1
        return mixed_seed("draw", self.seed, self.step, self.update, self.micro, self._calls)

    def _own_rows(self, rows: int | None) -> range:
        """The numbers of this process's rows."""
        rows = self.rows if rows is None else rows
        if rows % self.world:
            raise UserError(f"{rows} rows cannot be shared equally by {self.world} processes")
        return range(self.rank, rows, self.world)

    def _shares(self, rows: int | None) -> Tensor:
        """Numbers in (0, 1), float64 (local rows,), on the CPU."""
        first, own = self._call_seed(), self._own_rows(rows)
        return hashed_uniform(first, np.arange(own.start, own.stop, own.step, dtype=np.uint64))

    def placed(self, values: Tensor) -> Tensor:
        """What is made of numbers on the CPU, where the draws go; the host does not wait."""
        return sent(values, self.device)


_FLOAT32 = 2**24


def hashed_uniform(seed: int, rows: NDArray[np.uint64]) -> Tensor:
    """A number in (0, 1) for each row, float64 (N,), by SplitMix64 (Steele, Lea, Flood 2014): a function of both only.

    Args:
        seed: 0 to 2^64 - 1.
        rows: (N,).
    """
    z = np.uint64(seed) + (rows + np.uint64(1)) * np.uint64(_STRIDE)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


_STRIDE = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: consecutive seeds land far apart


def indexed_noise(shape: tuple[int, ...], seed: int, indices: Iterable[int]) -> Tensor:
    """Unit normal noise (N, *shape), float32 on the CPU; row i depends on ``seed`` and ``indices[i]`` only.

    Args:
        seed: 0 to 2^64 - 1; each gives other noise.
        indices: of at least 0.
    """
    seed, indices = check_seed(seed), list(indices)
    if seed >= _SHORT:
        return _filled(shape, [generator_of(seed, index) for index in indices])
    return seeded_normal(shape, [(seed + 1) * _STRIDE + index for index in indices])


def seeded_normal(shape: tuple[int, ...], seeds: Iterable[int]) -> Tensor:
    """Unit normal noise (N, *shape), float32 on the CPU, a row for each seed, of which the lowest 32 bits count.

    Seeds that follow each other are different ones; of unrelated calls two rows are the same once in 2^32.
    """
    return _filled(shape, (torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds))


def _filled(shape: tuple[int, ...], generators: Iterable[torch.Generator]) -> Tensor:
    rows = [torch.empty(shape).normal_(generator=generator) for generator in generators]
    return torch.stack(rows) if rows else torch.empty(0, *shape)
