"""The linear path: every scheduler's coefficients against closed forms and against diffusers' own steps."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)

from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.utils.errors import UserError

BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
MEAN, STD = 0.3, 0.7


def gaussian_denoiser(x_native, alpha, sigma):
    """E[x_0 | x_nat] for data N(MEAN, STD^2)."""
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_native - alpha * MEAN)


def network_output(prediction, x_native, alpha, sigma):
    """What a perfect network of this prediction type returns."""
    clean = gaussian_denoiser(x_native, alpha, sigma)
    noise = (x_native - alpha * clean) / sigma
    return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[prediction]


def exact_velocity(x, t):
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def double(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_vp_velocity_is_the_gaussian_one(betas, prediction):
    path = path_from_scheduler(double(DDIMScheduler(beta_schedule=betas, prediction_type=prediction)))
    t = torch.linspace(path.t_min, path.t_max, 41, dtype=torch.float64)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    c = path.coefficients(t)
    alpha, sigma = path.alpha_sigma(t)
    native = c.input_scale * x
    assert torch.allclose(native, x * (alpha + sigma), atol=1e-12)
    v = c.state * x + c.output * network_output(prediction, native, alpha, sigma)
    assert torch.allclose(v, exact_velocity(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_step_is_an_euler_step(betas, prediction):
    scheduler = double(DDIMScheduler(beta_schedule=betas, prediction_type=prediction, clip_sample=False,
                                     timestep_spacing="trailing"))
    scheduler.set_timesteps(10)
    path = path_from_scheduler(scheduler)
    grid = path.time_grid(10)
    native_times = path.native_to_linear(scheduler.timesteps)
    assert torch.allclose(grid[:-1], native_times, atol=1e-15)
    assert torch.allclose(path.coefficients(native_times).timestep, scheduler.timesteps.double(), atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    for now, after, timestep in zip(grid[:-1], grid[1:], scheduler.timesteps, strict=True):
        alpha, sigma = path.alpha_sigma(now)
        native = torch.randn(64, generator=generator, dtype=torch.float64)
        output = torch.randn(64, generator=generator, dtype=torch.float64)
        expected = scheduler.step(output, int(timestep), native, eta=0.0).prev_sample
        c = path.coefficients(now)
        x = native / (alpha + sigma)
        x = x + (after - now) * (c.state * x + c.output * output)
        alpha, sigma = path.alpha_sigma(after)
        # Relative, and with the last digits that 1 - t loses where alpha is tiny (cosine betas: 5e-5).
        scale = max(1.0, expected.abs().max().item()) * max(1.0, 1e-3 / (1 - now).item())
        assert (x * (alpha + sigma) - expected).abs().max().item() < 1e-12 * scale


def test_karras_ve_velocity_is_the_gaussian_one():
    """The network's own terms: pixels (x + 1) / 2 with noise sigma / 2, whose score it returns."""
    path = path_from_scheduler(KarrasVeScheduler(sigma_min=0.1, sigma_max=5.0))
    assert math.isclose(path.t_min, 0.01 / 1.01) and math.isclose(path.t_max, 25 / 26)
    t = torch.linspace(path.t_min, path.t_max, 41, dtype=torch.float64)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    c, (alpha, sigma) = path.coefficients(t), path.alpha_sigma(t)
    pixels = c.input_scale * x + c.input_shift
    assert torch.allclose(pixels, (x * (alpha + sigma) + 1) / 2, atol=1e-12)
    assert torch.allclose(c.timestep, sigma / 2, atol=1e-12)
    assert torch.allclose(path.native_to_linear(c.timestep), t, atol=1e-12)
    score = -(pixels - (MEAN + 1) / 2) / ((STD / 2) ** 2 + c.timestep**2)
    assert torch.allclose(c.state * x + c.output * score, exact_velocity(x, t), rtol=1e-9, atol=1e-9)
    # A score counts as the noise that it estimates: -sigma / 2 times it, 1 + sigma times which is in the velocity.
    assert torch.allclose(path.prediction_weight(t) * (c.output / (sigma / 2)) ** 2, torch.ones_like(t), atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_step_is_an_euler_step(prediction):
    scheduler = EDMEulerScheduler(prediction_type=prediction)
    scheduler.set_timesteps(8)
    path = path_from_scheduler(scheduler)
    sigmas = scheduler.sigmas.double()
    assert torch.allclose(path.time_grid(8), sigmas / (1 + sigmas), atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma, t = sigmas[i], sigmas[i] / (1 + sigmas[i])
        native = sigma * torch.randn(64, generator=generator, dtype=torch.float64)
        output = torch.randn(64, generator=generator, dtype=torch.float64)
        c = path.coefficients(t)
        scaled = scheduler.scale_model_input(native, timestep)
        x = native / (1 + sigma)
        assert torch.allclose(c.input_scale * x, scaled.double(), rtol=1e-5)
        assert math.isclose(c.timestep.item(), timestep.item(), rel_tol=1e-5, abs_tol=1e-6)
        expected = scheduler.step(output, timestep, native).prev_sample
        after = sigmas[i + 1] / (1 + sigmas[i + 1])
        x = x + (after - t) * (c.state * x + c.output * output)
        assert torch.allclose(x * (1 + sigmas[i + 1]), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_step_is_an_euler_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    path = path_from_scheduler(scheduler)
    grid = path.time_grid(5)
    assert grid[0] == 1 and grid[-1] == 0
    middle = torch.tensor(0.8, dtype=torch.float64)
    assert math.isclose(grid[1].item(), (shift * middle / (1 + (shift - 1) * middle)).item())
    scheduler.set_timesteps(sigmas=[0.9, 0.4])
    x, output = torch.randn(16), torch.randn(16)
    c = path.coefficients(scheduler.sigmas[0])
    assert math.isclose(c.timestep.item(), scheduler.timesteps[0].item(), rel_tol=1e-6)
    expected = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    step = scheduler.sigmas[1] - scheduler.sigmas[0]
    assert torch.allclose(x + step * (c.state * x + c.output * output).float(), expected, atol=1e-6)


def test_terminal_snr_and_karras_times():
    path = path_from_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    assert abs(path.t_max - 0.936) < 1e-3  # Stable Diffusion: alpha_T = 0.0683
    karras = path_from_scheduler(EulerDiscreteScheduler(use_karras_sigmas=True)).time_grid(6)
    ratio = (karras / (1 - karras))[:-1] ** (1 / 7)
    assert torch.allclose(ratio.diff(), ratio.diff()[0].expand(5), atol=1e-9)
    assert path.with_t_max(0.5).time_grid(4)[0] == pytest.approx(0.5, abs=1e-9)


def test_flow_through_multistep_schedulers():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    path = path_from_scheduler(scheduler)
    assert path.kind == "flow" and path.time_grid(2)[1] == pytest.approx(2 / 3)


def test_half_precision_never_touches_coefficients():
    path = path_from_scheduler(DDPMScheduler())
    c = path.coefficients(torch.tensor([path.t_max], dtype=torch.float16))
    assert all(value.dtype == torch.float64 for value in (c.input_scale, c.timestep, c.state, c.output))


def test_unsupported_names_are_named():
    with pytest.raises(UserError, match="ScoreSdeVeScheduler.*DDIMScheduler"):
        path_from_scheduler(ScoreSdeVeScheduler())
    scheduler = DPMSolverMultistepScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(UserError, match="DPMSolverMultistepScheduler has prediction_type 'score'.*epsilon"):
        path_from_scheduler(scheduler)
    with pytest.raises(UserError, match="zero terminal SNR"):
        path_from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon"))
    with pytest.raises(UserError, match="t_max is 0.999"):
        path_from_scheduler(DDPMScheduler()).with_t_max(0.999)
    with pytest.raises(UserError, match="steps is 0"):
        path_from_scheduler(DDPMScheduler()).time_grid(0)
