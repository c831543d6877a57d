"""Smaller networks of a teacher's family: a budget of parameters becomes a configuration that can be built.

Widths shrink and keep their ratios, every width a multiple of what norm groups and attention heads need; blocks are
left out only where no width alone comes near the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from flowdistill.networks.backbones import Backbone, family_of
from flowdistill.utils.errors import WORD, UserError, shown
from flowdistill.utils.quantized import parameter_count
from flowdistill.utils.text import JsonObject

NEAR = 0.9
"""A network with this share of its budget is near it."""


def smaller(backbone: Backbone, share: float) -> JsonObject:
    """What to change in ``backbone.config`` for the largest network with at most ``share`` of its parameters.

    Args:
        backbone: of a family that has ``sizes``.
        share: in (0, 1); MSD's students have 0.58, 0.29 and 0.17 (42 %, 71 % and 83 % fewer).

    Raises:
        UserError: another family, or no network is that small.
    """
    name = type(backbone).__name__
    widths, layers, resized = family_of(backbone).sizes(backbone.config)
    budget = share * parameters(backbone)
    best: tuple[int, JsonObject] | None = None
    for depth in range(layers, 0, -1):

        def of_this_depth(width: int, depth: int = depth) -> JsonObject:
            return resized(width, depth)

        found = _widest(backbone, widths, of_this_depth, budget)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
        if best is not None and best[0] >= NEAR * budget:
            break
    if best is None:
        raise UserError(f"no {name} of this family has at most {share:.0%} of the teacher's {parameters(backbone):,} "
                        "parameters; raise method.student_size")
    return best[1]


def reshaped(backbone: Backbone, changes: Mapping[str, object]) -> nn.Module:
    """A new, random network of the same class with ``changes`` in its configuration.

    Raises:
        UserError: a setting the class does not have, or values it cannot be built with.
    """
    kind = type(backbone)
    unknown = sorted(set(changes) - set(backbone.config))
    if unknown:
        raise UserError(f"method.student_shape has {shown(unknown[0], quoted=False)}, which is no setting of a "
                        f"{kind.__name__}; see its config.json")
    for key, value in changes.items():
        if isinstance(backbone.config[key], str) and not isinstance(value, (str, type(None))):
            raise UserError(f"method.student_shape has {key}: {shown(value)}; it must be a text such as the teacher's "
                            f"'{backbone.config[key]}' (in YAML, texts such as no and 1e3 need quotes there)")
    config = {**backbone.config, **changes}
    try:
        return kind.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no {kind.__name__} can be built with method.student_shape {shown(dict(changes), WORD)}: "
                        f"{reason}") from error


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return parameter_count(network)


def _widest(
    backbone: nn.Module, widths: int, config: Callable[[int], JsonObject], budget: float
) -> tuple[int, JsonObject] | None:
    """The largest of the widths 1 ... ``widths`` within the budget, by bisection, with its size."""
    low, high, best = 1, widths, None
    while low <= high:
        middle = (low + high) // 2
        changes = config(middle)
        with torch.device("meta"):
            size = parameters(reshaped(backbone, changes))
        if size <= budget:
            low, best = middle + 1, (size, changes)
        else:
            high = middle - 1
    return best
