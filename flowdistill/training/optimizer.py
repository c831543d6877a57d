"""The learning rate, and one update that skips itself when a gradient is not finite.

The learning rate is a function of the step instead of a scheduler object: nothing of it has to be saved to resume, and
a scheduler that accelerate prepares steps once a process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flowdistill.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at ``step`` (from 0) of ``steps``, whatever the number of processes.

    It grows linearly to ``lr``, which step ``warmup_steps`` is the first to have, then stays, or falls along half a
    cosine or a line to ``final_lr_fraction * lr``, which it would reach at step ``steps``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * fall)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make ``rate`` the learning rate of all groups; in place where it is a tensor, which compiled steps read."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate; of a tensor to the seven digits that a float32 has."""
    rate = optimizer.param_groups[0]["lr"]
    return float(f"{rate.item():.7g}") if isinstance(rate, Tensor) else rate


def rate_changes(configs: Mapping[str, OptimizerConfig], step: int, planned: int, steps: int) -> str:
    """The rates at ``step`` that a run of ``planned`` steps had and one of ``steps`` has, in words, by role; an empty
    text where they are equal, as they are without a schedule and before the end of a warm-up."""
    words = []
    for name, config in configs.items():
        old, new = (learning_rate(config, step, total) for total in (planned, steps))
        if old != new:
            words.append(f"{name} ({config.schedule}) from {old:.3g} to {new:.3g}")
    return ", ".join(words)


def backward(loss: Tensor, scaler: torch.amp.GradScaler, accumulation: int = 1) -> None:
    """Back-propagate one micro-batch's share of the loss; a loss that is not finite makes all gradients NaN.

    Infinity may have a finite gradient. NaN spreads to every process with the gradients' mean, so all skip together.
    """
    mark = torch.where(torch.isfinite(loss.detach()), 1.0 / accumulation, math.nan)
    scaler.scale(loss * mark).backward()


@torch.no_grad()
def apply_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Unscale, clip and step. With a fused kernel all is on the device: nothing is read on the host.

    Such a kernel leaves weights, moments and step count alone where ``found_inf`` is 1: GradScaler's own contract with
    it (``Optimizer._step_supports_amp_scaling``), used here in float32 and bfloat16 as well. Of other optimisers a step
    is left out whole, for which the host has to read whether it is.

    Args:
        max_norm: norm to clip to; 0: do not clip.

    Returns:
        The gradient's norm before clipping, and 1.0 when the step was skipped else 0.0; both 0-d.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skipped = (~torch.isfinite(norm)).float()
    fused: Any = optimizer  # its class does not declare what its kernel reads
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused.grad_scale, fused.found_inf = None, skipped
        optimizer.step()
    elif not skipped:
        optimizer.step()
    scaler.update()
    return norm, skipped
