"""The linear path, and the exact way from a diffusers scheduler to it.

Convention (the one every teacher, student and objective uses)::

    x_t = (1 - t) x_0 + t n,   n ~ N(0, I),   t = 1 is the prior, t = 0 is data
    v(x, t) = E[n - x_0 | x_t = x]

A network trained on any Gaussian path ``x_nat = alpha x_0 + sigma n`` lives on this path after the change of
variables ``t = sigma / (alpha + sigma)``, ``x = x_nat / (alpha + sigma)``. With it, whatever the network predicts, the
velocity is affine in the network's output::

    v(x, t) = state(t) * x + output(t) * network(input_scale(t) * x + input_shift, timestep(t))

so a schedule and a prediction type are four scalar functions of t and nothing else (``input_shift`` is 0, but for one
old kind of network). They are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowdistill.utils.errors import UserError

VP_SCHEDULERS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")
VE_SCHEDULERS = ("KarrasVeScheduler",)
EDM_PREDICTIONS = ("epsilon", "v_prediction")
KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Coefficients:
    """The four functions of t that turn a network into a velocity; float64 tensors of shape (B,)."""

    input_scale: Tensor
    timestep: Tensor
    state: Tensor
    output: Tensor
    input_shift: float = 0.0


@dataclass(frozen=True)
class NativePath:
    """The path a network was trained on, seen from the linear path.

    Attributes:
        kind: ``"vp"``, ``"edm"``, ``"ve"`` or ``"flow"``.
        prediction: what the network predicts, in diffusers' words.
        t_min, t_max: where the network is defined, as linear times. Terminal SNR is rarely zero, so ``t_max < 1`` for
            VP and EDM teachers.
        scheduler_name: class name of the scheduler this was read from.
    """

    kind: str
    prediction: str
    t_min: float
    t_max: float
    scheduler_name: str
    _coefficients: Callable[[Tensor], Coefficients]
    _grid: Callable[[int, float, float], Tensor]
    _to_t: Callable[[Tensor], Tensor]

    def coefficients(self, t: Tensor) -> Coefficients:
        """Coefficients at linear times ``t`` (any shape), clamped to ``[t_min, t_max]``; float64 on ``t``'s device.

        Below ``t_min`` the network is asked at ``t_min``: the rest of the way to data is one Euler step, which is also
        what a DDIM step to ``alpha = 1`` does.
        """
        return self._coefficients(t.double().clamp(self.t_min, self.t_max))

    def time_grid(self, steps: int) -> Tensor:
        """The teacher's own sampling times: (steps + 1,) float64, from ``t_max`` down to 0.

        VP: native timesteps, evenly spaced from the last one ("trailing"); EDM, and VP with ``use_karras_sigmas``:
        Karras et al. 2022, Eq. 5 with rho 7; VE: evenly spaced in log sigma; flow: evenly spaced, then shifted.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}; a sampler needs at least 1 step")
        return torch.cat([self._grid(steps, self.t_min, self.t_max), torch.zeros(1, dtype=torch.float64)])

    def native_to_linear(self, timesteps: Tensor) -> Tensor:
        """Linear times of native network timesteps (VP: table index, EDM: 0.25 log sigma, VE: sigma / 2, flow: 1000 t).
        """
        return self._to_t(timesteps.double())

    def prediction_weight(self, t: Tensor) -> Tensor:
        """Of a squared error of velocities at ``t``, to make it one of what the network predicts; of a score, which
        has no size that goes for all times, one of the noise. Float64."""
        if self.prediction == "score":
            return (1 - t.double()) ** 2
        return self.coefficients(t).output.pow(-2)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Native ``(alpha, sigma)`` at linear times ``t``; float64."""
        t = t.double()
        if self.kind == "vp":
            norm = torch.sqrt((1 - t) ** 2 + t**2)
            return (1 - t) / norm, t / norm
        if self.kind in ("edm", "ve"):
            return torch.ones_like(t), t / (1 - t)
        return 1 - t, t

    def with_grid(self, own: Callable[[int], Tensor]) -> NativePath:
        """The same path with another :meth:`time_grid`: ``own(steps)`` gives ``steps`` falling times, the first 1."""
        return replace(self, _grid=lambda steps, t_min, t_max: own(steps).to(torch.float64) * t_max)

    def with_t_max(self, t_max: float) -> NativePath:
        """The same path started later, at ``t_max`` (for epsilon teachers whose last steps carry no signal)."""
        if not self.t_min < t_max <= self.t_max:
            raise UserError(f"teacher.t_max is {t_max}; this teacher allows values above {self.t_min:.4f} and up to "
                            f"{self.t_max:.4f}")
        return replace(self, t_max=t_max)


def path_from_scheduler(scheduler: Any) -> NativePath:
    """Read the path off a diffusers scheduler object.

    Raises:
        UserError: the scheduler or its prediction type is not supported; the message names it and what is.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if name in FLOW_SCHEDULERS:
        return flow_path(name, float(config.get("shift") or 1.0), config.get("num_train_timesteps", 1000))
    if name in EDM_SCHEDULERS:
        _check_prediction(name, prediction, EDM_PREDICTIONS)
        return _edm_path(name, prediction, config.sigma_min, config.sigma_max, config.sigma_data)
    if name in VE_SCHEDULERS:
        return _ve_path(name, config.sigma_min, config.sigma_max)
    if name in VP_SCHEDULERS:
        if config.get("use_flow_sigmas") or prediction == "flow_prediction":
            return flow_path(name, float(config.get("flow_shift") or 1.0), config.num_train_timesteps)
        _check_prediction(name, prediction, VP_PREDICTIONS)
        return _vp_path(name, prediction, scheduler.alphas_cumprod, bool(config.get("use_karras_sigmas")))
    supported = ", ".join((*FLOW_SCHEDULERS, *EDM_SCHEDULERS, *VE_SCHEDULERS, *VP_SCHEDULERS))
    raise UserError(f"the pipeline's scheduler {name} is not supported; supported are {supported}")


def _check_prediction(name: str, prediction: str, supported: tuple[str, ...]) -> None:
    if prediction not in supported:
        raise UserError(f"{name} has prediction_type '{prediction}'; supported with it are {', '.join(supported)}")


def flow_path(name: str, shift: float, train_timesteps: int) -> NativePath:
    def coefficients(t: Tensor) -> Coefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return Coefficients(one, t * train_timesteps, zero, one)

    def grid(steps: int, t_min: float, t_max: float) -> Tensor:
        t = torch.linspace(t_max, 0, steps + 1, dtype=torch.float64)[:-1]
        return shift * t / (1 + (shift - 1) * t)

    return NativePath("flow", "flow_prediction", 0.0, 1.0, name, coefficients, grid, lambda s: s / train_timesteps)


def _vp_path(name: str, prediction: str, alphas_cumprod: Tensor, karras: bool) -> NativePath:
    alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    table = (sigma / (alpha + sigma)).cpu()

    def index_of(t: Tensor) -> Tensor:
        # The discrete table made continuous: exact on its entries, linear in t between them.
        times = table.to(t.device)
        upper = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        low, high = times[upper - 1], times[upper]
        return (upper - 1) + (t - low) / (high - low)

    def time_of(index: Tensor) -> Tensor:
        times = table.to(index.device)
        lower = index.floor().long().clamp(0, len(times) - 2)
        return times[lower] + (index - lower) * (times[lower + 1] - times[lower])

    def coefficients(t: Tensor) -> Coefficients:
        norm = torch.sqrt((1 - t) ** 2 + t**2)  # alpha = (1 - t) / norm, sigma = t / norm, alpha + sigma = 1 / norm
        if prediction == "epsilon":
            output = 1 / (1 - t)
            state = -output
        elif prediction == "sample":
            state = 1 / t
            output = -state
        else:  # v_prediction: no division by alpha or sigma
            output = 1 / norm
            state = (2 * t - 1) / norm**2
        return Coefficients(1 / norm, index_of(t), state, output)

    def grid(steps: int, t_min: float, t_max: float) -> Tensor:
        if karras:
            return _karras_grid(steps, t_min, t_max)
        last = index_of(torch.tensor(t_max, dtype=torch.float64)).item() + 1
        index = last * (1 - torch.arange(steps, dtype=torch.float64) / steps) - 1
        return time_of(index.clamp(min=0).round() if last == round(last) else index.clamp(min=0))

    t_min, t_max = float(table[0]), float(table[-1])
    if prediction == "epsilon" and t_max == 1.0:
        raise UserError(f"{name} has zero terminal SNR and predicts epsilon: at the last timestep that says nothing "
                        "about the image; such a teacher needs prediction_type v_prediction or sample")
    return NativePath("vp", prediction, t_min, t_max, name, coefficients, grid, time_of)


def _edm_path(name: str, prediction: str, sigma_min: float, sigma_max: float, sigma_data: float) -> NativePath:
    """EDM preconditioning, Karras et al. 2022, Table 1: D = c_skip x_nat + c_out F(c_in x_nat, 0.25 log sigma)."""
    sign = 1.0 if prediction == "epsilon" else -1.0

    def coefficients(t: Tensor) -> Coefficients:
        sigma = t / (1 - t)
        root = torch.sqrt(sigma**2 + sigma_data**2)
        # v = (x - D) / t with x = x_nat / (1 + sigma); sigma cancels, so nothing blows up at either end.
        state = (1 + sigma) * (sigma - sigma_data**2) / root**2
        output = -sign * (1 + sigma) * sigma_data / root
        return Coefficients((1 + sigma) / root, 0.25 * sigma.log(), state, output)

    def to_t(timestep: Tensor) -> Tensor:
        sigma = torch.exp(4 * timestep)
        return sigma / (1 + sigma)

    t_min, t_max = sigma_min / (1 + sigma_min), sigma_max / (1 + sigma_max)
    return NativePath("edm", prediction, t_min, t_max, name, coefficients, _karras_grid, to_t)


def _ve_path(name: str, sigma_min: float, sigma_max: float) -> NativePath:
    """A score network of pixels in [0, 1], as KarrasVePipeline calls it (Karras et al. 2022, Eq. 213).

    Of images in [-1, 1] with noise sigma it sees (x_nat + 1) / 2 with noise sigma / 2, and from its score F the
    denoised image is D = x_nat + sigma^2 / 2 F. The scheduler's noise levels are the squares of its settings.
    """
    low, high = sigma_min**2, sigma_max**2

    def coefficients(t: Tensor) -> Coefficients:
        sigma = t / (1 - t)
        return Coefficients((1 + sigma) / 2, sigma / 2, -(1 + sigma), -(1 + sigma) * sigma / 2, input_shift=0.5)

    def grid(steps: int, t_min: float, t_max: float) -> Tensor:
        first, last = t_max / (1 - t_max), t_min / (1 - t_min)
        sigma = first * (last / first) ** torch.linspace(0, 1, steps, dtype=torch.float64)
        return sigma / (1 + sigma)

    def to_t(timestep: Tensor) -> Tensor:
        return 2 * timestep / (1 + 2 * timestep)

    return NativePath("ve", "score", low / (1 + low), high / (1 + high), name, coefficients, grid, to_t)


def _karras_grid(steps: int, t_min: float, t_max: float) -> Tensor:
    low, high = t_min / (1 - t_min), t_max / (1 - t_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low_root, high_root = low ** (1 / KARRAS_RHO), high ** (1 / KARRAS_RHO)
    sigma = (high_root + ramp * (low_root - high_root)) ** KARRAS_RHO
    return sigma / (1 + sigma)
