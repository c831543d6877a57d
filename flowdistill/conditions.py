"""What a sample is conditioned on: named tensors that share a batch dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.errors import UserError


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


@dataclass(frozen=True)
class ClassLabels:
    """How class labels become a :class:`Condition`.

    Attributes:
        num_classes: real classes, labels ``0 .. num_classes - 1``.
        null_label: the label that means "no class" (classifier-free guidance); ``None`` when the network has none.
    """

    num_classes: int
    null_label: int | None

    def encode(self, labels: Sequence[int] | Tensor) -> Condition:
        """Labels (B,) as a condition; raises :class:`UserError` for a label out of range."""
        tensor = torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
        outside = tensor[(tensor < 0) | (tensor >= self.num_classes)]
        if len(outside):
            raise UserError(f"label {int(outside[0])} is out of range; this model has the classes 0 to "
                            f"{self.num_classes - 1}")
        return self.wrap(tensor)

    def wrap(self, labels: Tensor) -> Condition:
        """Labels (B,) int64 on any device as a condition, unchecked (no host synchronisation)."""
        return Condition({"class_labels": labels})

    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of ``condition``, for classifier-free guidance."""
        if self.null_label is None:
            raise UserError("classifier-free guidance needs a null label, and this teacher has none; use "
                            "guidance_scale 1, or set teacher.null_label when its network was trained with one")
        return self.wrap(torch.full_like(condition.tensors["class_labels"], self.null_label))
