"""Teacher score matching, and smaller networks of a teacher's family (MSD, arXiv 2410.23274, Eq. 8)."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from flowdistill.config import OptimizerConfig, validate
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.methods.teacher_score_matching import (
    ScoreMatchingConfig,
    TeacherScoreMatching,
    matching_loss,
    student_velocity,
)
from flowdistill.networks.resizing import parameters, reshaped, smaller
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import linear_path
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import stable_diffusion
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

S, SIGMA = 0.7, 0.8


def grid():
    """x_0 = s z and n on a product of Gauss-Hermite points, with weights of sum 1: float64 (N, 1)."""
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(12)
    points, weights = torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
    z, n = torch.meshgrid(points, points, indexing="ij")
    return S * z.reshape(-1, 1), n.reshape(-1, 1), torch.outer(weights, weights).reshape(-1)


def test_matching_the_exact_teacher_is_training_on_the_data_with_less_variance():
    """E||f - x_0||^2 - E||f - mu||^2 = E Var(x_0 | x_t), whatever f is; so the gradients are the same."""
    x0, n, weight = grid()
    t = SIGMA / (1 + SIGMA)
    times = torch.full((len(x0),), t, dtype=torch.float64)
    state = (1 - t) * x0 + t * n
    native = state * (1 + SIGMA)
    mean = S**2 / (S**2 + SIGMA**2) * native
    goal = (state - mean) / t  # the exact teacher's velocity
    for slope, bias in ((0.3, 0.1), (1.0, -2.0)):
        theta = torch.tensor([slope, bias], dtype=torch.float64, requires_grad=True)
        velocity = (state - theta[0] * native - theta[1]) / t
        to_data = (weight * dm.flow_matching_loss(velocity, x0, n)).sum()
        to_teacher = (weight * matching_loss(velocity, goal, times, linear_path())).sum()
        # t^2 times a velocity's squared error is that of its denoised estimate.
        assert t**2 * float(to_data - to_teacher) == pytest.approx(0.2775221, abs=1e-6)
        first, second = (torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (to_data, to_teacher))
        assert torch.allclose(first, second, atol=1e-9)


def test_the_loss_is_in_the_units_of_the_networks_output():
    """For an epsilon network: the squared error of epsilon, whatever the time."""
    from diffusers import DDIMScheduler

    from flowdistill.paths.native_path import path_from_scheduler

    path = path_from_scheduler(DDIMScheduler())
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    c = path.coefficients(t)
    x, one, other = torch.randn(3, 2, 5, dtype=torch.float64)
    velocities = [c.state[:, None] * x + c.output[:, None] * epsilon for epsilon in (one, other)]
    expected = (one - other).square().mean(dim=1)
    assert torch.allclose(matching_loss(*velocities, t, path), expected, rtol=1e-10)


# --- the method


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(tiny_unet_pipeline())


def tsm(teacher, **settings):
    settings = {"student_shape": {"block_out_channels": (8, 8)}, "samples": 8, "sample_steps": 2} | settings
    torch.manual_seed(0)
    return TeacherScoreMatching(ScoreMatchingConfig(**settings, optimizer=OptimizerConfig(lr=3e-3)), teacher)


@pytest.mark.parametrize("data", [None, "digits"])
def test_a_smaller_student_comes_near_its_teacher(data):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=10))
    method = tsm(teacher, data=data)
    network = method.roles()["student"].network
    assert parameters(network) < 0.8 * parameters(teacher.network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    errors = []
    for step in range(60):
        loss, figures = method.loss("student", {"student": network}, Draw(0, step, rows=16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(figures["velocity_error"]))
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])


def test_without_data_it_learns_on_the_teachers_samples(teacher):
    method = tsm(teacher)
    assert method.data is None
    latents, condition = method.draw_samples(Draw(0, 0, rows=64))
    known = method.pairs.latents
    assert len(known) == 8 and all(any(torch.equal(row, one) for one in known) for row in latents)
    assert condition.tensors["class_labels"].unique().tolist() == [0, 1, 2, 3]


def test_a_student_of_another_shape_starts_another_method(teacher, tmp_path):
    tsm(teacher).student().save(tmp_path / "start" / "student")
    begun = load_teacher(tiny_unet_pipeline(), start=tmp_path / "start")
    method = Dmd2(Dmd2Config(), begun)
    network = method.roles()["student"].network
    assert network.velocity.backbone.config["block_out_channels"] == [8, 8]
    saved = load_student(tmp_path / "start").network.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert parameters(method.score) == parameters(teacher.network)  # the critic is the teacher's size
    loss, _ = method.loss("student", {"student": network, "critic": method.critic}, Draw(0, 0, rows=4))
    loss.backward()
    method.student().save(tmp_path / "small")
    assert load_student(tmp_path / "small").generate(num_images=2).shape == (2, 1, 8, 8)


def test_starts_that_do_not_fit_are_refused(teacher, tmp_path):
    from flowdistill.students import FlowMap, StudentInfo

    FlowMap.from_teacher(teacher, StudentInfo()).save(tmp_path / "map")
    with pytest.raises(UserError, match="teacher.start .*map is a flow_map with conditions of its own"):
        load_teacher(tiny_unet_pipeline(), start=tmp_path / "map")
    tsm(teacher).student().save(tmp_path / "start")
    with pytest.raises(UserError, match=r"for samples of \(1, 8, 8\) and 4 classes; the teacher is .* and 5"):
        load_teacher(tiny_unet_pipeline(num_class_embeds=5), start=tmp_path / "start")
    with pytest.raises(UserError, match="teacher.labels is .*takes no class labels"):
        load_teacher(tiny_unet_pipeline(num_class_embeds=None), labels=[0])


@pytest.mark.parametrize("settings", [{}, {"student_size": 0.5, "student_shape": {"layers_per_block": 1}}])
def test_the_students_network_is_given_in_one_way(settings):
    with pytest.raises(UserError, match="given by either method.student_size"):
        validate(ScoreMatchingConfig(**settings), prefix="method.")


# --- shapes

BACKBONES = {
    "unet": lambda: UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=8,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    "sd": lambda: UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=8),
    "sdxl": lambda: UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2, cross_attention_dim=16,
        attention_head_dim=(4, 8), transformer_layers_per_block=(1, 2), use_linear_projection=True, norm_num_groups=8),
    "dit": lambda: tiny_dit_pipeline().transformer.from_config(
        tiny_dit_pipeline().transformer.config | {"num_attention_heads": 16, "num_layers": 4}),
}


@pytest.mark.parametrize("share", [0.58, 0.29, 0.17])  # the paper's 42, 71 and 83 % fewer parameters
@pytest.mark.parametrize("name", BACKBONES)
def test_a_budget_becomes_a_network_that_can_be_built_and_called(name, share):
    backbone = BACKBONES[name]()
    changes = smaller(backbone, share)
    small = reshaped(backbone, changes)
    assert 0.6 * share < parameters(small) / parameters(backbone) <= share
    x, t = torch.randn(2, small.config["in_channels"], 8, 8), torch.tensor([1.0, 500.0])
    further = {"sd": {"encoder_hidden_states": torch.randn(2, 3, 16)}, "dit": {"class_labels": torch.tensor([0, 1])}}
    further["sdxl"] = further["sd"]
    out = small(x, t, **further.get(name, {}), return_dict=False)[0]
    assert out.shape[-2:] == x.shape[-2:] and out.isfinite().all()
    for width in changes.get("block_out_channels", []):
        assert width % 8 == 0
    if name == "sdxl":  # as many channels a head as before
        widths, heads = changes["block_out_channels"], changes["attention_head_dim"]
        assert [width // head for width, head in zip(widths, heads, strict=True)] == [16, 16]


def test_shapes_that_cannot_be():
    backbone = BACKBONES["unet"]()
    with pytest.raises(UserError, match="has at most 0% of the teacher's"):
        smaller(backbone, 0.001)
    with pytest.raises(UserError, match="has widths, which is no setting of a UNet2DModel"):
        reshaped(backbone, {"widths": 3})
    with pytest.raises(UserError, match="can be built with method.student_shape"):
        reshaped(backbone, {"block_out_channels": (6, 10, 10)})
    with pytest.raises(UserError, match="the backbone Linear is not supported"):
        smaller(torch.nn.Linear(1, 1), 0.5)
    teacher = load_teacher(tiny_unet_pipeline())
    with pytest.raises(UserError, match="makes samples of another shape"):
        student_velocity(teacher, shape={"sample_size": 16})


def test_a_prompt_teacher_matches_on_its_own_samples():
    teacher = load_teacher(stable_diffusion(), prompts=["a red cat", "two birds"])
    method = tsm(teacher, student_shape={"block_out_channels": (8, 8)}, samples=3)
    loss, _ = method.loss("student", {"student": method.roles()["student"].network}, Draw(0, 0, rows=2))
    assert loss.isfinite() and method.pairs.labels.tolist() == [0, 1, 0]
