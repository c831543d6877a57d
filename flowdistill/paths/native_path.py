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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowdistill.paths.clipping import Clipping, clipping_of
from flowdistill.paths.scheduler_protocol import Scheduler, SchedulerConfig
from flowdistill.utils.devices import OnDevices
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
MOST_AMPLIFIED = 200.0
"""Largest factor 1 / (1 - t), by which an epsilon teacher's denoised estimate multiplies an error of the network, at a
start that nobody set. DDPM's linear betas end at 158, where samplers work; its cosine betas end at 20,292."""
# How a scheduler may place its noise levels: by the formulas of these settings, else by its timesteps.
# Lu's lambdas are even in log sigma with the rho of 1 that diffusers has.
SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
            "use_lu_lambdas": "exponential"}


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
        start: a sentence about a ``t_max`` that :meth:`from_working_start` chose; else empty.
        clipping: what the scheduler does to each denoised estimate; None: nothing.
    """

    kind: str
    prediction: str
    t_min: float
    t_max: float
    scheduler_name: str
    _coefficients: Callable[[Tensor], Coefficients]
    _grid: Callable[[int, float, float], Tensor]
    _to_t: Callable[[Tensor], Tensor]
    start: str = ""
    clipping: Clipping | None = None

    def coefficients(self, t: Tensor) -> Coefficients:
        """Coefficients at linear times ``t`` (any shape), clamped to ``[t_min, t_max]``; float64 on ``t``'s device.

        Below ``t_min`` the network is asked at ``t_min``: the rest of the way to data is one Euler step, which is also
        what a DDIM step to ``alpha = 1`` does.
        """
        return self._coefficients(t.double().clamp(self.t_min, self.t_max))

    def time_grid(self, steps: int) -> Tensor:
        """The teacher's own sampling times: (steps + 1,) float64, from ``t_max`` down to 0.

        VP: native timesteps, evenly spaced from the last one ("trailing"), or noise levels as ``use_karras_sigmas``,
        ``use_exponential_sigmas``, ``use_beta_sigmas`` or ``use_lu_lambdas`` place them; EDM: Karras et al. 2022,
        Eq. 5, or its exponential schedule; VE: evenly spaced in log sigma; flow: evenly spaced, then shifted.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}; a sampler needs at least 1 step")
        return torch.cat([self._grid(steps, self.t_min, self.t_max), torch.zeros(1, dtype=torch.float64)])

    def native_to_linear(self, timesteps: Tensor) -> Tensor:
        """Linear times of native network timesteps (VP: table index, EDM: 0.25 log sigma, VE: sigma / 2, flow: 1000 t).
        """
        return self._to_t(timesteps.double())

    def prediction_weight(self, t: Tensor) -> Tensor:
        """Weight that makes a squared error of velocities at ``t`` one of what the network predicts; of a score, which
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
        if not self.t_min < t_max <= self.t_max + 5e-7:  # as it is printed
            raise UserError(f"teacher.t_max is {t_max}; this teacher allows values above {self.t_min:.4f} and up to "
                            f"{self.t_max:.6f}")
        return replace(self, t_max=min(t_max, self.t_max))

    def from_working_start(self) -> NativePath:
        """The same path, of an epsilon teacher from the last timestep at which its denoised estimate is at most
        ``MOST_AMPLIFIED`` times the network's error; :attr:`start` then says so."""
        limit = 1 - 1 / MOST_AMPLIFIED
        if self.kind != "vp" or self.prediction != "epsilon" or not self.t_min < limit < self.t_max:
            return self
        index = self.coefficients(torch.tensor(limit, dtype=torch.float64)).timestep.floor()
        t_max = self.native_to_linear(index).item()
        start = (f"t_max {t_max:.6f}, timestep {int(index)}, was chosen: at the last one, {self.t_max:.6f}, a denoised "
                 f"estimate has {1 / (1 - self.t_max):,.0f} times the network's error, and steps from there go astray; "
                 "teacher.t_max sets another")
        return replace(self.with_t_max(t_max), start=start)

    def karras_times(self, points: int) -> Tensor:
        """``points`` times (points,), float64 and rising from ``t_min`` to ``t_max``, on Karras et al. 2022, Eq. 5.

        Raises:
            UserError: a path whose last noise level is infinite.
        """
        if self.t_max == 1:
            raise UserError("Karras' noise levels end at the teacher's largest sigma, t / (1 - t), and this teacher "
                            "starts at t = 1, where it is infinite; set teacher.t_max below 1")
        return _karras_grid(points, self.t_min, self.t_max).flip(0)


def path_from_scheduler(scheduler: Scheduler) -> NativePath:
    """Read the path off a diffusers scheduler object.

    Raises:
        UserError: the scheduler or its prediction type is not supported; the message names it and what is.
    """
    name = type(scheduler).__name__
    return replace(_unclipped_path(scheduler, name), clipping=clipping_of(name, scheduler.config))


def _unclipped_path(scheduler: Scheduler, name: str) -> NativePath:
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if name in FLOW_SCHEDULERS:
        if config.get("invert_sigmas"):
            raise UserError(f"{name} has invert_sigmas, of networks whose time runs from noise at 0 to data at 1; "
                            "supported are those whose time is that of the noise")
        return flow_path(name, float(config.get("shift") or 1.0), config.get("num_train_timesteps", 1000))
    if name in EDM_SCHEDULERS:
        _check_prediction(name, prediction, EDM_PREDICTIONS)
        return _edm_path(name, prediction, config)
    if name in VE_SCHEDULERS:
        return _ve_path(name, config.sigma_min, config.sigma_max)
    if name in VP_SCHEDULERS:
        if config.get("use_flow_sigmas") or prediction == "flow_prediction":
            return flow_path(name, float(config.get("flow_shift") or 1.0), config.num_train_timesteps)
        _check_prediction(name, prediction, VP_PREDICTIONS)
        if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
            raise UserError(f"{name} has timestep_type 'continuous', of networks that are told 0.25 log sigma; "
                            "supported with it is 'discrete' (EDMEulerScheduler is for such networks)")
        spacing = next((SPACINGS[key] for key in SPACINGS if config.get(key)), "trailing")
        levels, steps = scheduler.alphas_cumprod, config.get("num_train_timesteps", len(scheduler.alphas_cumprod))
        if len(levels) != steps or len(levels) < 2 or not bool(levels.isfinite().all()):
            raise UserError(f"{name} has {len(levels)} noise levels for {steps} timesteps; there must be a finite one "
                            "for each of at least 2 (num_train_timesteps, trained_betas, beta_start, beta_end)")
        return _vp_path(name, prediction, levels, spacing)
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


def _vp_path(name: str, prediction: str, alphas_cumprod: Tensor, spacing: str) -> NativePath:
    alpha, sigma = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    whole = (sigma / (alpha + sigma)).cpu()
    # The discrete table made continuous: exact on its entries, linear in t between them. Some schedulers replace a
    # last alpha of zero by one above its neighbour's; entries beyond a later one are left out, so that times rise.
    later = torch.cat([whole.flip(0).cummin(0).values.flip(0)[1:], whole.new_tensor([math.inf])])
    kept = whole < later
    table, entries = whole[kept], torch.arange(len(whole), dtype=torch.float64)[kept]
    knots = OnDevices(torch.stack([table, entries]))

    def index_of(t: Tensor) -> Tensor:
        times, places = knots.on(t.device)
        upper = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        low, high, first = times[upper - 1], times[upper], places[upper - 1]
        return first + (t - low) / (high - low) * (places[upper] - first)

    def time_of(index: Tensor) -> Tensor:
        times, places = knots.on(index.device)
        lower = (torch.searchsorted(places, index.contiguous(), right=True) - 1).clamp(0, len(times) - 2)
        first = places[lower]
        return times[lower] + (index - first) / (places[lower + 1] - first) * (times[lower + 1] - times[lower])

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
        if spacing != "trailing":
            return PLACED[spacing](steps, t_min, t_max)
        last = index_of(torch.tensor(t_max, dtype=torch.float64)).item() + 1
        index = last * (1 - torch.arange(steps, dtype=torch.float64) / steps) - 1
        return time_of(index.clamp(min=0).round() if last == round(last) else index.clamp(min=0))

    t_min, t_max = float(table[0]), float(table[-1])
    if prediction == "epsilon" and t_max == 1.0:
        raise UserError(f"{name} has zero terminal SNR and predicts epsilon: at the last timestep that says nothing "
                        "about the image; such a teacher needs prediction_type v_prediction or sample")
    return NativePath("vp", prediction, t_min, t_max, name, coefficients, grid, time_of)


def _edm_path(name: str, prediction: str, config: SchedulerConfig) -> NativePath:
    """EDM preconditioning, Karras et al. 2022, Table 1: D = c_skip x_nat + c_out F(c_in x_nat, 0.25 log sigma)."""
    sign = 1.0 if prediction == "epsilon" else -1.0
    sigma_min, sigma_max, sigma_data = config.sigma_min, config.sigma_max, config.sigma_data
    exponential, rho = config.get("sigma_schedule") == "exponential", float(config.get("rho", KARRAS_RHO))

    def grid(steps: int, t_min: float, t_max: float) -> Tensor:
        return _exponential_grid(steps, t_min, t_max) if exponential else _karras_grid(steps, t_min, t_max, rho)

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
    return NativePath("edm", prediction, t_min, t_max, name, coefficients, grid, to_t)


def _ve_path(name: str, sigma_min: float, sigma_max: float) -> NativePath:
    """A score network of pixels in [0, 1], as KarrasVePipeline calls it (Karras et al. 2022, Eq. 213).

    Of images in [-1, 1] with noise sigma it sees (x_nat + 1) / 2 with noise sigma / 2, and from its score F the
    denoised image is D = x_nat + sigma^2 / 2 F. The scheduler's noise levels are the squares of its settings.
    """
    low, high = sigma_min**2, sigma_max**2

    def coefficients(t: Tensor) -> Coefficients:
        sigma = t / (1 - t)
        return Coefficients((1 + sigma) / 2, sigma / 2, -(1 + sigma), -(1 + sigma) * sigma / 2, input_shift=0.5)

    def to_t(timestep: Tensor) -> Tensor:
        return 2 * timestep / (1 + 2 * timestep)

    t_min, t_max = low / (1 + low), high / (1 + high)
    return NativePath("ve", "score", t_min, t_max, name, coefficients, _exponential_grid, to_t)


# --- noise levels of a sampler: (steps,) falling linear times, the first t_max, the last of several t_min


def _karras_grid(steps: int, t_min: float, t_max: float, rho: float = KARRAS_RHO) -> Tensor:
    low, high = _finite_sigmas(t_min, t_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low_root, high_root = low ** (1 / rho), high ** (1 / rho)
    sigma = (high_root + ramp * (low_root - high_root)) ** rho
    return sigma / (1 + sigma)


def _exponential_grid(steps: int, t_min: float, t_max: float) -> Tensor:
    last, first = _finite_sigmas(t_min, t_max)
    sigma = first * (last / first) ** torch.linspace(0, 1, steps, dtype=torch.float64)
    return sigma / (1 + sigma)


def _beta_grid(steps: int, t_min: float, t_max: float) -> Tensor:
    """Quantiles of a beta distribution with both parameters 0.6 (Lee et al., arXiv 2407.12173), as diffusers'."""
    from scipy.stats import beta

    low, high = _finite_sigmas(t_min, t_max)
    shares = beta.ppf(1 - torch.linspace(0, 1, steps, dtype=torch.float64).numpy(), 0.6, 0.6)
    sigma = low + torch.from_numpy(shares) * (high - low)
    return sigma / (1 + sigma)


def _finite_sigmas(t_min: float, t_max: float) -> tuple[float, float]:
    if t_max == 1:
        raise UserError("the scheduler places its noise levels by sigma, which is infinite at zero terminal SNR; set "
                        "teacher.t_max below 1")
    return t_min / (1 - t_min), t_max / (1 - t_max)


PLACED: Mapping[str, Callable[[int, float, float], Tensor]] = {
    "karras": _karras_grid, "exponential": _exponential_grid, "beta": _beta_grid,
}
