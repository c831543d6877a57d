"""Objectives and FreeFlow's losses against closed forms, float64 (arXiv 2511.19428, Eqs. 7 to 11)."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.objectives import distribution_matching as dm
from flowdistill.objectives import flow_map as fm
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.start_states import StartStates
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_unet_pipeline

MEAN, STD = torch.tensor([0.4, -0.2], dtype=torch.float64), 0.5
FIELD = GaussianVelocity(MEAN, STD)


def column(value, rows=32):
    return torch.full((rows,), value, dtype=torch.float64)


def noise(rows=32, seed=0):
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_derivative(n, duration):
    return torch.func.jvp(lambda d: FIELD.average_velocity(n, d), (duration,), (torch.ones_like(duration),))[1]


# --- flow map


@pytest.mark.parametrize("d", [0.0, 0.1, 0.5, 0.99])
def test_exact_map_has_no_generating_residual(d):
    n, duration = noise(), column(d)
    average = FIELD.average_velocity(n, duration)
    velocity = FIELD(fm.end_point(n, duration, average), 1 - duration)
    residual = fm.generating_residual(average, exact_derivative(n, duration), duration, velocity)
    assert residual.abs().max() < 1e-13
    reversed_time = FIELD(fm.end_point(n, duration, average), duration)
    if d not in (0.5,):  # the test can fail: time the other way round does not satisfy the identity
        assert fm.generating_residual(average, exact_derivative(n, duration), duration, reversed_time).abs().max() > 0.1


def test_boot_signal_is_noise_minus_average_velocity():
    n, duration = noise(), column(0.7)
    signal = MEAN + (torch.sqrt(duration**2 * STD**2 + (1 - duration) ** 2) - (1 - duration)).reshape(-1, 1) / (
        duration.reshape(-1, 1)) * n
    assert torch.allclose(signal, n - FIELD.average_velocity(n, duration), atol=1e-13)


def test_discrete_target_is_a_teacher_euler_step_and_second_order_a_step():
    n, duration = noise(), column(0.6)
    errors = []
    for h in (0.04, 0.02):
        before, step = duration - h, column(h)
        shorter = FIELD.average_velocity(n, before)
        state = fm.end_point(n, before, shorter)
        velocity = FIELD(state, 1 - before)
        target = fm.discrete_target(shorter, velocity, duration, step)
        assert torch.allclose(fm.end_point(n, duration, target), state - h * velocity, atol=1e-14)
        errors.append((fm.end_point(n, duration, target) - FIELD.flow_map(n, duration)).abs().max().item())
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_finite_differences_converge_to_the_jvp():
    n, duration = noise(), column(0.5)
    exact = fm.duration_derivative_jvp(lambda d: FIELD.average_velocity(n, d), duration)
    assert torch.allclose(exact, exact_derivative(n, duration), atol=1e-13)
    twice = torch.cat([n, n])
    errors = []
    for h in (0.1, 0.05):
        got = fm.duration_derivative(lambda d: FIELD.average_velocity(twice, d), duration, h, 1.0)
        errors.append((got - exact).abs().max().item())
    assert 3.3 < errors[0] / errors[1] < 4.7
    edge = fm.duration_derivative(lambda d: FIELD.average_velocity(twice, d), column(1.0), 1e-4, 1.0)  # one-sided
    assert torch.allclose(edge, exact_derivative(n, column(1.0)), atol=1e-3)


def test_matching_loss_has_half_the_gradient_of_the_squared_residual():
    n, duration = noise(), column(0.4)
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    velocity = n @ weight
    derivative, teacher = torch.randn_like(n), torch.randn_like(n)
    residual = fm.generating_residual(velocity, derivative, duration, teacher)
    (from_loss,) = torch.autograd.grad(fm.velocity_matching_loss(velocity, residual).mean(), weight, retain_graph=True)
    target = velocity.detach() - residual.detach()
    (from_square,) = torch.autograd.grad((velocity - target).square().mean(), weight)
    assert torch.allclose(2 * from_loss, from_square, atol=1e-14)


def test_damping():
    residual = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    assert torch.equal(fm.damp(residual, 0.0, 1e-3), residual)
    sizes = residual.square().mean(dim=1, keepdim=True)
    assert torch.allclose(fm.damp(residual, 1.0, 1e-3), residual / (sizes + 1e-3))
    assert torch.allclose(fm.damp(residual, 0.5, 1e-3), residual / (sizes + 1e-3).sqrt())


# --- distribution matching


def test_velocity_difference_is_the_score_difference():
    other = GaussianVelocity(MEAN + 0.3, 0.8)
    x, t = noise(), torch.linspace(0.05, 0.95, 32, dtype=torch.float64)
    fake, real = other(x, t), FIELD(x, t)
    scores = dm.score_from_velocity(fake, x, t) - dm.score_from_velocity(real, x, t)
    ratio = (t / (1 - t)).reshape(-1, 1)
    assert torch.allclose(dm.noising_residual(fake, real), -ratio * scores, atol=1e-12)
    variance = ((1 - t) ** 2 * STD**2 + t**2).reshape(-1, 1)
    score = -(x - (1 - t).reshape(-1, 1) * MEAN) / variance
    assert torch.allclose(dm.score_from_velocity(real, x, t), score, atol=1e-12)


def test_correction_gradient_is_the_kl_gradient():
    """A student f = m + s n: the correction weighted by (1 - r)^2 / r is the exact gradient of KL(q_r || p_r) in m."""
    shift, r = torch.tensor([0.5, 0.1], dtype=torch.float64), 0.4
    student = GaussianVelocity(MEAN + shift, STD)
    n = noise(4096)
    whole, time = column(1.0, 4096), column(r, 4096)
    sample = fm.end_point(n, whole, student.average_velocity(n, whole))
    state = dm.noised(sample, noise(4096, 1), time)
    residual = dm.noising_residual(student(state, time), FIELD(state, time))
    # d f / d m = 1 and V = n - f, so the loss <V, residual> has gradient -residual in m.
    got = -(1 - r) ** 2 / r * residual.mean(dim=0)
    expected = (1 - r) ** 2 * shift / ((1 - r) ** 2 * STD**2 + r**2)  # equal variances: residual is constant
    assert torch.allclose(got, expected, atol=1e-12)


def test_exact_student_has_no_correction_and_flow_matching_finds_its_velocity():
    x = MEAN + STD * noise(200_000)
    fresh, time = noise(200_000, 1), column(0.5, 200_000)
    state = dm.noised(x, fresh, time)
    assert dm.noising_residual(FIELD(state, time), FIELD(state, time)).abs().max() == 0
    best = dm.flow_matching_loss(FIELD(state, time), x, fresh).mean()
    for factor in (0.9, 1.1):
        assert dm.flow_matching_loss(factor * FIELD(state, time), x, fresh).mean() > best + 1e-3
    assert dm.balance(torch.tensor(3.0), torch.tensor(1.5), 0.5, 0.0) == 1.0


# --- FreeFlow's losses


class ExactStudent(nn.Module):
    """The exact average velocity, with one parameter so that it can train: V + offset."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = nn.Parameter(torch.full((2,), float(offset), dtype=torch.float64))

    def forward(self, x, t, condition=None, *, duration):
        return FIELD.average_velocity(x, duration.double()) + self.offset


class ExactCritic(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field, self.scale = field, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        return self.scale * self.field(x, t)


class DoubleDraw(Draw):
    def normal(self, shape, rows=None):
        return super().normal(shape, rows).double()

    def uniform(self, low=0.0, high=1.0, rows=None):
        return super().uniform(low, high, rows).double()


def toy(offset=0.0, critic=FIELD, **settings):
    student, critic = ExactStudent(offset), ExactCritic(critic)
    method = FreeFlow(FreeFlowConfig(**settings), exact_teacher(GaussianVelocity(MEAN, STD)), student, critic)
    return method, {"student": student, "critic": critic}


@pytest.mark.parametrize("derivative, tolerance", [("jvp", 1e-12), ("finite_difference", 1e-3), ("discrete", 1e-3)])
def test_freeflow_is_at_rest_at_the_exact_solution(derivative, tolerance):
    method, networks = toy(derivative=derivative, finite_difference_step=1e-3, damping=0.0)
    loss, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=64))
    loss.backward()
    assert metrics["prediction_residual"] < tolerance**2
    assert metrics["correction_residual"] == 0
    assert networks["student"].offset.grad.abs().max() < tolerance
    assert networks["critic"].scale.grad is None  # no gradient into the critic


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_each_objective_alone_pulls_an_offset_student_back(fraction):
    """f = exact - d * offset: the residual is positive in offset for both objectives, so descent shrinks it."""
    shifted = GaussianVelocity(MEAN - 0.3, STD)  # the offset student's own law at d = 1
    method, networks = toy(offset=0.3, critic=shifted, prediction_fraction=fraction, derivative="jvp", damping=0.0)
    loss, _ = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
    loss.backward()
    assert (networks["student"].offset.grad > 0.01).all()


def test_the_correction_is_scaled_to_the_prediction():
    """lambda = alpha G / (N + epsilon), G before or after the damping."""
    def weight(**settings):
        method, networks = toy(offset=0.3, critic=GaussianVelocity(MEAN - 0.3, STD), derivative="jvp", **settings)
        metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=256))[1]
        return metrics["correction_weight"].item(), metrics["correction_residual"].item()

    usual, residual = weight()
    assert weight(correction_strength=0.5)[0] == pytest.approx(0.5 * usual, rel=1e-12)
    sizes = [epsilon / (usual / weight(balance_epsilon=epsilon)[0] - 1) for epsilon in (0.5, 4.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)  # N, from either
    assert 0.5 * (2 * residual) ** 0.5 < sizes[0] <= (2 * residual) ** 0.5  # a mean of norms in two dimensions
    assert weight(damping=0.0)[0] == pytest.approx(weight(balance_after_damping=False)[0], rel=1e-12)
    assert usual != pytest.approx(weight(damping=0.0)[0], rel=0.1)


def test_the_prediction_may_go_first_alone():
    shifted = GaussianVelocity(MEAN - 0.3, STD)
    runs, cases = {}, {"late": {"prediction_only_steps": 2}, "both": {}, "alone": {"prediction_fraction": 1.0}}
    for name, settings in cases.items():
        method, networks = toy(offset=0.3, critic=shifted, derivative="jvp", **settings)
        runs[name] = [method.loss("student", networks, DoubleDraw(0, step, rows=64))[0].item() for step in (1, 2)]
        assert method.schedule(0) == (("student",) if name == "alone" else ("student", "critic"))
    assert runs["late"] == [runs["alone"][0], runs["both"][1]] and runs["alone"][1] != runs["both"][1]


def test_critic_loss_trains_the_critic_only():
    method, networks = toy()
    loss, _ = method.loss("critic", networks, DoubleDraw(0, 0, rows=64))
    loss.backward()
    assert networks["student"].offset.grad is None
    assert networks["critic"].scale.grad is not None
    assert method.schedule(0) == ("student", "critic")


def test_critic_of_an_epsilon_teacher_learns_by_the_epsilon_loss():
    """v - (n - x) = (epsilon - n) / (1 - t), so the weight (1 - t)^2 leaves the plain DDPM loss."""
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler()), null_label=3)
    method = FreeFlow(FreeFlowConfig(), teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    seen = {}
    backbone = networks["critic"].velocity.backbone
    backbone.register_forward_hook(lambda module, args, output: seen.update(epsilon=output[0]))
    loss, _ = method.loss("critic", networks, Draw(0, 0, rows=16))
    draw = Draw(0, 0, rows=16)
    draw.normal(teacher.shape), draw.integers(3), draw.uniform()
    noise = draw.normal(teacher.shape)
    assert torch.allclose(loss, (seen["epsilon"] - noise).square().mean(), rtol=1e-3)


def test_two_halves_of_the_batch_are_the_whole():
    """Rows split over two processes: same draws, and the same gradient when the means are shared."""
    method, networks = toy(offset=0.2, critic=GaussianVelocity(MEAN, 0.8), derivative="jvp", prediction_fraction=1.0)
    whole = method.loss("student", networks, DoubleDraw(0, 0, rows=64))[0]
    parts = [method.loss("student", networks, DoubleDraw(0, 0, rows=64, rank=r, world=2))[0] for r in (0, 1)]
    assert torch.allclose(sum(parts) / 2, whole, atol=1e-12)


def test_freeflow_on_a_real_backbone_with_guidance_and_lora():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    config = FreeFlowConfig(guidance_min=1.0, guidance_max=2.0, critic="lora", critic_lora_rank=2)
    method = FreeFlow(config, teacher)
    roles = method.roles()
    networks = {name: role.network for name, role in roles.items()}
    before = {name: p.clone() for name, p in teacher.network.named_parameters()}
    optimizers = {
        name: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        for name, network in networks.items()
    }
    critic_size = sum(p.numel() for p in networks["critic"].parameters() if p.requires_grad)
    assert critic_size < 0.5 * sum(p.numel() for p in networks["student"].parameters())
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    condition, one = teacher.encode([0, 1, 2]), torch.ones(3)
    assert torch.equal(networks["critic"](x, t, condition, guidance=one), teacher.velocity(x, t, condition))
    for step in range(2):
        for update, role in enumerate(method.schedule(step)):
            optimizers[role].zero_grad()
            loss, metrics = method.loss(role, networks, Draw(0, step, update, rows=8))
            assert loss.isfinite()
            loss.backward()
            optimizers[role].step()
    assert {"prediction_residual", "correction_residual", "correction_weight"} <= method.loss(
        "student", networks, Draw(0, 9, rows=8))[1].keys()
    assert all(torch.equal(before[name], p) for name, p in teacher.network.named_parameters())
    assert not torch.equal(networks["critic"](x, t, condition, guidance=one), teacher.velocity(x, t, condition))
    assert method.student().info.guidance_range == (1.0, 2.0)


def test_jvp_runs_on_a_real_backbone_and_agrees_with_differences():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    method = FreeFlow(FreeFlowConfig(), teacher)
    student = method.roles()["student"].network
    with torch.no_grad():
        for p in student.embeddings.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    n, condition = torch.randn(4, 1, 8, 8), teacher.encode([0, 1, 2, 0])
    duration = torch.tensor([0.2, 0.4, 0.6, 0.8])
    results = {}
    for kind in ("jvp", "finite_difference"):
        method.config.derivative = kind
        results[kind] = method.derivative(student, StartStates(n, condition, None), duration)
    assert results["jvp"].abs().max() > 1e-2
    assert torch.allclose(results["jvp"], results["finite_difference"], rtol=0.05, atol=2e-3)


def test_bad_settings():
    from flowdistill.utils.errors import UserError

    teacher = load_teacher(tiny_unet_pipeline())
    with pytest.raises(UserError, match="no null label"):
        FreeFlow(FreeFlowConfig(guidance_max=2.0), teacher)
    for settings in ({"derivative": "exact"}, {"prediction_fraction": 1.5}, {"guidance_min": 2.0},
                     {"guidance_interval": [0.8, 0.2]}, {"critic_updates": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            FreeFlow(FreeFlowConfig(**settings), teacher)
