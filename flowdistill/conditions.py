"""What a sample is conditioned on: named tensors that share a batch dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    ``tensors`` maps a name (``class_labels``; later ``prompt_embeds``, ``pooled_embeds``, ...) to a tensor whose first
    dimension is the batch. Keeping names instead of one class per kind lets teachers, students and methods slice, join
    and move conditions without knowing what they are.
    """

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if not sizes:
            raise ValueError("a Condition needs at least one tensor; use None for an unconditional model")
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the tensors of a Condition differ in batch size: {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: slice) -> Condition:
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        names = conditions[0].tensors.keys()
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in names})
