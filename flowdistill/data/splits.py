"""Random splits that keep the class proportions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import generator_of


def balanced_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices in two parts with the same class proportions.

    Every class gives ``fraction`` of its rows to the first part, up to one row; what one class loses to rounding the
    next one makes up for, so that the size of the first part is ``fraction * N`` up to one row as well.

    Args:
        labels: int (N,).
        fraction: share of the first part, in (0, 1).
        seed: the split depends on labels, fraction and seed only.

    Returns:
        Two sorted int64 index tensors, disjoint, together all of 0..N-1.

    Raises:
        UserError: labels not one-dimensional, or fraction outside (0, 1).
    """
    if labels.ndim != 1:
        raise UserError(f"labels must have the shape (N,), not {tuple(labels.shape)}")
    if not 0.0 < fraction < 1.0:
        raise UserError(f"the fraction of a split must lie between 0 and 1, not {fraction}")
    generator = generator_of(seed)
    first: list[Tensor] = []
    second: list[Tensor] = []
    seen = taken = 0
    for label in labels.unique(sorted=True):
        rows = (labels == label).nonzero().squeeze(1).cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        seen += len(rows)
        # Always round halves up: round() would go to the even number and give one of two equal classes two rows more.
        count = math.floor(seen * fraction + 0.5) - taken
        taken += count
        first.append(rows[:count])
        second.append(rows[count:])
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *first]).sort().values, torch.cat([empty, *second]).sort().values


def split_halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random class-balanced halves of a data set, as two index tensors: their Fréchet distance is the floor of a FID.

    A class of odd size gives its extra row to either half; the halves differ by at most one row in total.
    """
    return balanced_split(labels, 0.5, seed)
