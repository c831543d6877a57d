"""BOOT (arXiv 2306.05544) against closed forms, float64."""

import os

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from flowdistill.methods.boot import Boot, BootConfig
from flowdistill.objectives import bootstrap as bs
from flowdistill.students import load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.start_states import StartStates
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

MEAN, STD = torch.full((1, 4, 4), 0.3, dtype=torch.float64), 0.5
FIELD = GaussianVelocity(MEAN, STD)


def column(value, rows=16):
    return torch.full((rows,), value, dtype=torch.float64)


def noise(rows=16, seed=0):
    return torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_signal(n, t):
    """m + (sqrt((1 - t)^2 s^2 + t^2) - t) / (1 - t) n"""
    t = t.reshape(-1, 1, 1, 1)
    return MEAN + (torch.sqrt((1 - t) ** 2 * STD**2 + t**2) - t) / (1 - t) * n


def denoised(x, t, field=FIELD):
    return x - t.reshape(-1, 1, 1, 1) * field(x, t)


# --- objectives


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_signal_ode_has_no_residual(t):
    n, time = noise(), column(t)
    signal, slope = torch.func.jvp(lambda value: exact_signal(n, value), (time,), (torch.ones_like(time),))
    rate = -1 / (time * (1 - time)).reshape(-1, 1, 1, 1)  # -lambda'
    state = bs.state_of(signal, n, time)
    assert (slope - rate * (denoised(state, time) - signal)).abs().max() < 1e-12
    assert (slope + rate * (denoised(state, time) - signal)).abs().max() > 0.1  # the other sign does not hold
    assert torch.allclose(bs.signal(state, n, time), signal, atol=1e-13)
    assert torch.allclose(signal, n - FIELD.average_velocity(n, 1 - time), atol=1e-13)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_signal_step_is_the_ddim_step(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x, n, output = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    t, s = 600, 550
    stepped = scheduler.step(output, t, x)
    (a, b), (c, d) = (
        (v.sqrt(), (1 - v).sqrt()) for v in (scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[s])
    )
    times = [sigma / (alpha + sigma) for alpha, sigma in ((a, b), (c, d))]
    rho = bs.step_share(*(value.expand(4) for value in times))
    assert torch.allclose(rho, 1 - a * d / (b * c), atol=1e-14)  # rho knows the signal-to-noise ratio only
    after = bs.signal_step((x - b * n) / a, stepped.pred_original_sample, rho)
    assert torch.allclose(c * after + d * n, stepped.prev_sample, atol=1e-12)


def test_step_share_is_a_share_and_whole_at_the_end():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    rho = bs.step_share(t, t - 0.05)
    assert ((rho > 0) & (rho <= 1 + 1e-15)).all() and rho[[0, -1]].sub(1).abs().max() < 1e-14
    weight = bs.step_weight(rho, 10.0)
    assert weight.max() == 10 and weight.min() == pytest.approx(1)


def test_unrolled_signal_steps_are_ddim_sampling():
    n, grid = noise(), torch.linspace(0.98, 0, 50, dtype=torch.float64)
    signal = denoised(n, column(1.0))
    state = bs.state_of(signal, n, column(0.98))
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        estimate = denoised(bs.state_of(signal, n, column(t)), column(t))
        signal = bs.signal_step(signal, estimate, bs.step_share(column(t), column(s)))
        state = state - (t - s) * FIELD(state, column(t))
    assert torch.allclose(signal, state, atol=1e-12)


def test_threshold():
    x = torch.tensor([[0.5, -0.2, 0.1, 0.0], [4.0, -2.0, 1.0, 0.0]], dtype=torch.float64)
    assert bs.threshold(x, "none") is x
    assert bs.threshold(x, "static").abs().max() == 1
    dynamic = bs.threshold(x, "dynamic", 1.0)
    assert torch.equal(dynamic[0], x[0])  # already in range
    assert torch.allclose(dynamic[1], x[1] / 4)


# --- the method


class ExactStudent(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset), dtype=torch.float64))
        self.calls = []

    def forward(self, x, t, condition=None, *, duration):
        self.calls.append(torch.is_grad_enabled())
        return FIELD.average_velocity(x, duration.double()) + self.offset


class DoubleDraw(Draw):
    def normal(self, shape, rows=None):
        return super().normal(shape, rows).double()

    def uniform(self, low=0.0, high=1.0, rows=None):
        return super().uniform(low, high, rows).double()


def toy(offset=0.0, field=FIELD, **settings):
    student = ExactStudent(offset)
    return Boot(BootConfig(**settings), exact_teacher(field), student), {"student": student}


@pytest.mark.parametrize("solver, order", [("euler", 2), ("heun", 3)])
def test_local_order_of_the_targets(solver, order):
    """Error of the state reached from the exact student by one step of the target: O(h^2) and O(h^3)."""
    errors = []
    for h in (0.02, 0.01):
        method, networks = toy(solver=solver)
        n, duration = noise(), column(0.6)
        with torch.no_grad():
            goal = method.bootstrap_target(networks["student"], StartStates(n, None), duration - h, duration)
        exact = FIELD.average_velocity(n, duration)
        errors.append((0.6 * (goal - exact)).abs().max().item())
    assert 2**order * 0.85 < errors[0] / errors[1] < 2**order * 1.15


def test_point_mass_has_no_error_at_any_step():
    point = GaussianVelocity(MEAN, 0.0)

    class Exact(ExactStudent):
        def forward(self, x, t, condition=None, *, duration):
            return point.average_velocity(x, duration.double()) + self.offset

    method = Boot(BootConfig(step_size=0.3, solver="heun"), exact_teacher(point), Exact())
    loss, _ = method.loss("student", {"student": method.student().network}, DoubleDraw(0, 0, rows=64))
    assert loss < 1e-25


def test_velocity_and_signal_form_agree_where_the_range_is_whole():
    one, other = (
        toy(offset=0.2, form=form, weight="inverse_rho_squared", solver="heun") for form in ("velocity", "signal")
    )
    losses = [method.loss("student", networks, DoubleDraw(0, 0, rows=64))[0] for method, networks in (one, other)]
    assert torch.allclose(*losses, rtol=1e-10) and losses[0] > 0.01


def test_gradient_reaches_the_later_time_only_and_pulls_back():
    """V + c for all d moves V*(d) by (d - h) / d c (and what the teacher makes of the moved state), so c shrinks."""
    method, networks = toy(offset=0.3)
    loss, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
    loss.backward()
    student = networks["student"]
    assert student.calls == [False, True]  # at t without, at s and the boundary with gradients
    assert student.offset.grad > 0.01
    assert metrics["boundary_error"] == pytest.approx(0.09, rel=1e-6)
    without, networks = toy(offset=0.3, boundary_weight=0.0)
    _, metrics = without.loss("student", networks, DoubleDraw(0, 0, rows=16))
    assert "boundary_error" not in metrics


@pytest.mark.parametrize("pipeline", [
    tiny_unet_pipeline(),
    tiny_unet_pipeline(DDPMScheduler(clip_sample=False)),
    tiny_unet_pipeline(DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")),
    tiny_dit_pipeline(),
], ids=["flow", "epsilon", "cosine v", "DiT"])
def test_boundary_holds_before_training_on_every_path(pipeline):
    teacher = load_teacher(pipeline, null_label=3 if pipeline.__class__.__name__ == "DDPMPipeline" else None)
    method = Boot(BootConfig(guidance_scale=1.0), teacher)
    network = method.student().network
    _, metrics = method.loss("student", {"student": network}, Draw(0, 0, rows=8))
    assert metrics["boundary_error"] < 1e-7  # a mean square, in single precision: 3e-8 with one kind of kernels


@pytest.mark.parametrize("settings", [
    {"guidance_scale": 2.0}, {"threshold": "static"}, {"threshold": "dynamic", "threshold_percentile": 0.9},
    {"form": "signal"}, {"solver": "heun"}, {"weight": "inverse_rho_squared", "weight_cap": 5.0},
], ids=lambda value: "-".join(f"{key} {setting}" for key, setting in value.items()))
def test_each_setting_changes_the_loss_and_trains(settings):
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(clip_sample=False)), null_label=3, t_max=0.97)
    plain, method = Boot(BootConfig(), teacher), Boot(BootConfig(**settings), teacher)
    network = plain.student().network  # the same one, a little trained, so that it is not at a special point
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses = [m.loss("student", {"student": network}, Draw(0, 0, rows=8))[0] for m in (plain, method)]
    assert losses[1].isfinite() and losses[0] != losses[1]
    losses[1].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())


PATHS = {
    "flow": (FlowMatchEulerDiscreteScheduler(), None),
    "linear epsilon": (DDPMScheduler(clip_sample=False), 0.97),
    "scaled linear epsilon": (DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), None),
    "cosine epsilon": (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), 0.97),
    "cosine v": (DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"), None),
    "cosine sample": (DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), None),
    "edm": (EDMEulerScheduler(), None),
}


@pytest.mark.parametrize("wiring", ["separate", "reuse"])
@pytest.mark.parametrize("kind", ["unconditional", "classes", "guided", "guided DiT"])
@pytest.mark.parametrize("path", PATHS)
def test_one_step_and_the_disk_on_every_path(tmp_path, path, kind, wiring):
    scheduler, t_max = PATHS[path]
    if kind == "guided DiT":
        teacher = load_teacher(tiny_dit_pipeline(scheduler), t_max=t_max)
    else:
        pipeline = tiny_unet_pipeline(scheduler, num_class_embeds=None if kind == "unconditional" else 4)
        teacher = load_teacher(pipeline, null_label=3 if kind == "guided" else None, t_max=t_max)
    scale = 2.0 if kind.startswith("guided") else 1.0
    method = Boot(BootConfig(solver="heun", guidance_scale=scale, target_time=wiring), teacher)
    student = method.student()
    labels = None if kind == "unconditional" else [0, 1, 2]
    before = student.generate(labels, num_images=3)
    optimizer = torch.optim.AdamW(student.network.parameters(), lr=1e-4)
    loss, metrics = method.loss("student", {"student": student.network}, Draw(0, 0, rows=8))
    loss.backward()
    assert all(value.isfinite() for value in (loss, *metrics.values())) and loss > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.network.parameters())
    optimizer.step()
    after = student.generate(labels, num_images=3)
    assert after.isfinite().all() and not torch.equal(before, after)
    student.save(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert torch.equal(again.generate(labels, num_images=3), after)
    assert again.info.guidance_scale == scale and again.network.target_time == wiring


def blurred():
    pool = nn.AvgPool2d(2)
    return lambda one, other: (pool(one) - pool(other)).square()


def test_any_module_is_a_metric_and_sees_signals():
    method, networks = toy(offset=0.2, metric="tests.methods.test_boot:blurred", boundary_weight=0.0)
    plain, _ = toy(offset=0.2, boundary_weight=0.0)
    one, other = (m.loss("student", networks, DoubleDraw(0, 0, rows=16))[0] for m in (method, plain))
    assert 0 < one < other
    with pytest.raises(UserError, match=r"method.metric is 'lpips'; it must be l2 or"):
        toy(metric="lpips")
    mean, networks = toy(metric="torch.nn:MSELoss")
    with pytest.raises(UserError, match=r"returned the shape \(\) for 16 samples; it must return one figure a sample"):
        mean.loss("student", networks, DoubleDraw(0, 0, rows=16))


class Perceptual(nn.Module):
    """A distance of features, one figure a sample, and a layer that behaves otherwise in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3))

    def forward(self, one, other):
        return (self.layers(one) - self.layers(other)).square().flatten(1).mean(dim=1)


def perceptual():
    module = Perceptual()
    module.load_state_dict(load_file(os.environ["PERCEPTUAL_WEIGHTS"]))
    return module


def test_a_perceptual_module_with_weights_of_its_own(tmp_path, monkeypatch):
    torch.manual_seed(0)
    own = Perceptual()
    save_file(own.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setenv("PERCEPTUAL_WEIGHTS", str(tmp_path / "weights.safetensors"))
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(clip_sample=False)), t_max=0.97)
    named = Boot(BootConfig(metric="tests.methods.test_boot:perceptual", boundary_weight=0.0), teacher)
    given = Boot(BootConfig(boundary_weight=0.0), teacher, metric=own)
    network = named.student().network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses = [method.loss("student", {"student": network}, Draw(0, 0, rows=8))[0] for method in (named, given)]
    assert torch.equal(*losses) and losses[0] > 0  # frozen and in evaluation mode: no dropout
    losses[0].backward()
    assert network.velocity.backbone.conv_out.weight.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in named.metric.parameters())
    named.to("meta")
    assert next(named.metric.parameters()).is_meta
    monkeypatch.setenv("PERCEPTUAL_WEIGHTS", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="method.metric.*(it must be l2 or|cannot be imported|could not be made)"):
        Boot(BootConfig(metric="tests.methods.test_boot:perceptual"), teacher)


def test_a_metric_of_squares_is_the_signal_form():
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(clip_sample=False)), t_max=0.97)
    signal = Boot(BootConfig(form="signal"), teacher)
    squares = Boot(BootConfig(), teacher, metric=lambda one, other: (one - other).square())
    network = signal.student().network
    losses = [method.loss("student", {"student": network}, Draw(0, 0, rows=8))[0] for method in (signal, squares)]
    assert torch.equal(*losses) and losses[0] > 0


def test_the_dynamic_threshold_keeps_the_denoised_estimate_in_range():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    method = Boot(BootConfig(threshold="dynamic", threshold_percentile=0.9, guidance_scale=4.0), teacher)
    plain = Boot(BootConfig(guidance_scale=4.0), teacher)
    x = 3 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    time, prior = torch.full((6,), 0.4, dtype=torch.float64), StartStates(x, teacher.encode([0, 1, 2, 0, 1, 2]))
    free, kept = ((x - 0.4 * one.teacher_velocity(prior, x, time)).flatten(1) for one in (plain, method))
    level = free.abs().quantile(0.9, dim=1, keepdim=True).clamp(min=1)
    assert (level > 1.2).all()
    assert torch.allclose(kept, (torch.clamp(free / level, -1, 1)), atol=1e-5)


def test_settings_the_teacher_cannot_serve_are_refused():
    with pytest.raises(UserError, match="guidance_scale is 2.0, but the teacher has no null label"):
        toy(guidance_scale=2.0)
    with pytest.raises(UserError, match="the teacher's samples are latents"):
        Boot(BootConfig(threshold="static"), load_teacher(tiny_dit_pipeline()))
    with pytest.raises(UserError, match="target_time is 'reuse', but the student's network was given"):
        toy(target_time="reuse")
