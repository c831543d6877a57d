"""Exact teachers: data whose velocity is known in closed form. Every objective is tested against them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.velocity import per_sample
from flowdistill.paths.native_path import NativePath, flow_path
from flowdistill.teachers.codec import PixelCodec
from flowdistill.teachers.teacher import Teacher


class GaussianVelocity(nn.Module):
    """Velocity of data N(mean, std^2 I): v = -m + V'(t) / (2 V(t)) (x - (1 - t) m), V(t) = (1 - t)^2 s^2 + t^2."""

    mean: Tensor

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.std = std

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        t = per_sample(t, x)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        half_slope = t - (1 - t) * self.std**2
        return half_slope / variance * (x - (1 - t) * self.mean) - self.mean

    def flow_map(self, noise: Tensor, duration: Tensor) -> Tensor:
        """The ODE's state after ``duration`` (B,) from noise at t = 1: d m + sqrt(d^2 s^2 + (1 - d)^2) n."""
        d = per_sample(duration, noise)
        return d * self.mean + torch.sqrt(d**2 * self.std**2 + (1 - d) ** 2) * noise

    def average_velocity(self, noise: Tensor, duration: Tensor) -> Tensor:
        """(noise - flow_map) / duration, with the limit n - m at duration 0."""
        d = per_sample(duration, noise)
        # (1 - sqrt(d^2 s^2 + (1 - d)^2)) / d, rationalised so that d = 0 gives its limit 1.
        root = torch.sqrt(d**2 * self.std**2 + (1 - d) ** 2)
        return (2 - d * (1 + self.std**2)) / (1 + root) * noise - self.mean


class MixtureVelocity(nn.Module):
    """Velocity of a mixture of isotropic Gaussians: means (K, *shape), one std, weights (K,)."""

    means: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("means", means)
        weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.std = std

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        time = per_sample(t, x)
        variance = (1 - time) ** 2 * self.std**2 + time**2
        offset = x[:, None] - (1 - time)[:, None] * self.means[None]
        logits = self.log_weights - offset.flatten(2).square().sum(-1) / (2 * variance.reshape(-1, 1))
        shares = logits.softmax(dim=1).reshape(*logits.shape, *[1] * (x.ndim - 1))
        half_slope = (time - (1 - time) * self.std**2) / variance
        each = half_slope[:, None] * offset - self.means[None]
        return (shares * each).sum(dim=1)


def linear_path() -> NativePath:
    """The linear path itself: t from 0 to 1, nothing to convert."""
    return flow_path("exact", 1.0, 1)


def exact_teacher(network: GaussianVelocity | MixtureVelocity) -> Teacher:
    """An unconditional :class:`Teacher` around a closed-form velocity."""
    shape = network.mean.shape if isinstance(network, GaussianVelocity) else network.means.shape[1:]
    return Teacher(network, linear_path(), tuple(shape), PixelCodec(), source="exact")
