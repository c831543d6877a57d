"""Means of what a step reports, kept on the device until someone looks.

torchmetrics' aggregators synchronise when they are read, but have no state that a resumed run could go on from with the
very numbers of an uninterrupted one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Meters:
    """Means since the last reading, over finite values only; adding never waits for the device.

    A figure that only some updates have is the mean over these, and where none had it there is no such figure: neither
    0 nor null. Not even the processes need to have the same ones.

    Args:
        device: of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[tuple[str, ...], Tensor] = {}  # figures that come together: their sums, and their numbers

    def add(self, values: dict[str, Tensor]) -> None:
        """Add 0-d tensors by name."""
        names = tuple(values)
        row = torch.stack([value.detach().float() for value in values.values()])
        finite = torch.isfinite(row)
        entry = torch.stack([torch.where(finite, row, 0.0), finite.float()])
        if names in self._sums:
            self._sums[names] += entry
        else:
            self._sums[names] = entry

    def read(self, world: int = 1) -> dict[str, float | None]:
        """Means over the updates and processes since the last reading (this waits); None: no finite value."""
        sums = self._known_to_all(world)
        totals = {name: [0.0, 0.0] for names in sums for name in names}
        if sums:
            joined = torch.cat(list(sums.values()), dim=1)
            if world > 1:
                dist.all_reduce(joined)
            names = [name for names in sums for name in names]
            for name, total, count in zip(names, *joined.tolist(), strict=True):
                totals[name][0] += total
                totals[name][1] += count
        self._sums.clear()
        return {name: total / count if count else None for name, (total, count) in totals.items()}

    def state(self, world: int = 1) -> list[tuple[list[str], list[list[float]]]]:
        """JSON values to go on from after a resume, summed over the processes (this waits)."""
        totals = {names: entry.clone() for names, entry in self._known_to_all(world).items()}
        if world > 1:
            for entry in totals.values():
                dist.all_reduce(entry)
        return [(list(names), entry.tolist()) for names, entry in totals.items()]

    def load_state(self, state: list[tuple[list[str], list[list[float]]]], main: bool) -> None:
        """Go on from ``state``; one process gets the values, the others zeros, for they are sums already."""
        scale = 1.0 if main else 0.0
        self._sums = {tuple(names): scale * torch.tensor(entry, device=self.device) for names, entry in state}

    def _known_to_all(self, world: int) -> dict[tuple[str, ...], Tensor]:
        """The sums in an order that is the same on every process, with zeros for what this one does not have."""
        if world == 1:
            return self._sums
        each: list[list[tuple[str, ...]]] = [[] for _ in range(world)]
        dist.all_gather_object(each, list(self._sums))
        known = dict.fromkeys(names for some in each for names in some)
        return {names: self._sums.get(names, torch.zeros(2, len(names), device=self.device)) for names in known}
