"""Smaller networks of a teacher's family: a budget of parameters becomes a configuration that can be built.

Widths shrink and keep their ratios, every width a multiple of what norm groups and attention heads need; blocks are
left out only where no width alone comes near the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from flowdistill.utils.errors import UserError

NEAR = 0.9
"""A network with this share of its budget is near it."""

Config = dict[str, Any]


def smaller(backbone: nn.Module, share: float) -> Config:
    """What to change in ``backbone.config`` for the largest network with at most ``share`` of its parameters.

    Args:
        backbone: ``UNet2DModel``, ``UNet2DConditionModel`` or ``DiTTransformer2DModel``.
        share: in (0, 1); MSD's students have 0.58, 0.29 and 0.17 (42 %, 71 % and 83 % fewer).

    Raises:
        UserError: another family, or no network is that small.
    """
    name = type(backbone).__name__
    if name not in _FAMILIES:
        raise UserError(f"a smaller student can be made of {', '.join(_FAMILIES)}; the teacher is a {name}, so give "
                        "its settings in method.student_shape")
    widths, layers, resized = _FAMILIES[name](backbone.config)
    budget = share * parameters(backbone)
    best: tuple[int, Config] | None = None
    for depth in range(layers, 0, -1):

        def of_this_depth(width: int, depth: int = depth) -> Config:
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


def reshaped(backbone: Any, changes: Mapping[str, Any]) -> nn.Module:
    """A new, random network of the same class with ``changes`` in its configuration.

    Raises:
        UserError: a setting the class does not have, or values it cannot be built with.
    """
    kind = type(backbone)
    unknown = sorted(set(changes) - set(backbone.config))
    if unknown:
        raise UserError(f"method.student_shape has {unknown[0]}, which is no setting of a {kind.__name__}; see its "
                        "config.json")
    config = {**backbone.config, **changes}
    try:
        return kind.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no {kind.__name__} can be built with method.student_shape {dict(changes)}: "
                        f"{reason}") from error


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def _widest(
    backbone: nn.Module, widths: int, config: Callable[[int], Config], budget: float
) -> tuple[int, Config] | None:
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


# --- families: (number of widths, most layers, (width, layers) -> changes)

_Shape = tuple[int, int, Callable[[int, int], Config]]


def _unet(config: Any) -> _Shape:
    """Channels that norm groups and the size of a head divide: there the number of heads follows from the width."""
    groups, head = config["norm_num_groups"] or 1, config["attention_head_dim"] or 1
    return _convolutional(config, math.lcm(groups, config.get("attn_norm_num_groups") or 1, head), lambda channels: {})


def _conditional_unet(config: Any) -> _Shape:
    """There ``attention_head_dim`` is the number of heads (diffusers), one or one a block."""
    if config["num_attention_heads"] is not None or isinstance(config["layers_per_block"], (list, tuple)):
        raise UserError("the teacher's UNet2DConditionModel has num_attention_heads or a number of layers for each "
                        "block; give the student's settings in method.student_shape")
    channels, heads, groups = config["block_out_channels"], config["attention_head_dim"], config["norm_num_groups"] or 1
    if isinstance(heads, int):  # the same heads, thinner
        return _convolutional(config, math.lcm(groups, heads), lambda widths: {})
    sizes = {width // count for width, count in zip(channels, heads, strict=True)}
    size = math.lcm(*sizes)  # fewer heads, as wide as they were
    return _convolutional(config, math.lcm(groups, size),
                          lambda widths: {"attention_head_dim": [width // size for width in widths]})


def _convolutional(config: Any, unit: int, heads: Callable[[list[int]], Config]) -> _Shape:
    channels = list(config["block_out_channels"])
    steps = max(channels) // unit

    def resized(width: int, layers: int) -> Config:
        widths = [max(1, round(width * channel / max(channels))) * unit for channel in channels]
        return {"block_out_channels": widths, "layers_per_block": layers} | heads(widths)

    return steps, config["layers_per_block"], resized


def _dit(config: Any) -> _Shape:
    """Fewer heads of the same size, then fewer blocks. Positions are sines and cosines in two directions: 4 | width."""
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    unit = 4 // math.gcd(4, size)

    def resized(width: int, layers: int) -> Config:
        return {"num_attention_heads": width * unit, "num_layers": layers}

    return heads // unit, config["num_layers"], resized


_FAMILIES: dict[str, Callable[[Any], _Shape]] = {
    "DiTTransformer2DModel": _dit,
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _unet,
}
