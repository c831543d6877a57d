"""What a sample is conditioned on: named tensors that share a batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowdistill.utils.devices import sent
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.randomness import Draw


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    ``tensors`` maps a name (``class_labels``, ``prompt_embeds``, ``pooled_embeds``, ...) to a tensor whose first
    dimension is the batch. Keeping names instead of one class per kind lets teachers, students and methods slice, join
    and move conditions without knowing what they are. ``negative`` has the same rows for the other side of guidance,
    where each sample has its own; None: the teacher's one null condition.
    """

    tensors: dict[str, Tensor]
    negative: Condition | None = None

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if not sizes:
            raise ValueError("a Condition needs at least one tensor; use None for an unconditional model")
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the tensors of a Condition differ in batch size: {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Condition:
        return self._each(lambda tensor: sent(tensor, device))

    def expand(self, rows: int) -> Condition:
        """One row, repeated without a copy."""
        return self._each(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def replace(self, **tensors: Tensor) -> Condition:
        """The same with these tensors set."""
        return Condition(self.tensors | tensors, self.negative)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Rows below each other; negatives stay when all have them.

        Sequences (B, L, ...) of different lengths are padded with zeros, and so are their masks (B, L).
        """
        names = conditions[0].tensors.keys()
        negatives = [c.negative for c in conditions if c.negative is not None]
        negative = Condition.cat(negatives) if len(negatives) == len(conditions) else None
        return Condition({name: _joined([c.tensors[name] for c in conditions]) for name in names}, negative)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        negative = None if self.negative is None else self.negative._each(change)
        return Condition({name: change(tensor) for name, tensor in self.tensors.items()}, negative)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]))
                 if part.shape[1] < longest else part for part in parts]
    return torch.cat(list(parts))


@dataclass(frozen=True)
class ClassLabels:
    """How class labels become a :class:`Condition`.

    Attributes:
        num_classes: real classes, labels ``0 .. num_classes - 1``.
        null_label: the label that means "no class" (classifier-free guidance); ``None`` when the network has none.
        own: the labels that are drawn and shown, where these are not all.
    """

    num_classes: int
    null_label: int | None
    own: tuple[int, ...] | None = None

    @property
    def shown(self) -> Sequence[int]:
        """The labels that are drawn in training and gone through in samples."""
        return range(self.num_classes) if self.own is None else self.own

    def restricted(self, labels: Sequence[int]) -> ClassLabels:
        """The same with only these ``own`` labels.

        Raises:
            UserError: no label, one out of range, or one that is there twice.
        """
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"teacher.labels is {shown(list(labels))}; it must be a list of different class labels")
        self.encode(labels)
        return replace(self, own=tuple(labels))

    def draw(self, draw: Draw, rows: int | None = None) -> Condition:
        """Uniform over the labels ``shown``; see :meth:`flowdistill.teachers.Teacher.draw_condition`."""
        if self.own is None:
            return self.wrap(draw.integers(self.num_classes, rows=rows))
        index = draw.integers(len(self.own), rows=rows, on_cpu=True)
        return self.wrap(draw.placed(torch.tensor(self.own)[index]))

    def examples(self, indices: Sequence[int]) -> Condition:
        """The labels ``shown`` in turn."""
        return self.encode([self.shown[i % len(self.shown)] for i in indices])

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
