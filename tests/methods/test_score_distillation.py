"""Score distillation as a method: closed forms in float64, and every option on real backbones."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import nn

from flowdistill.config import OptimizerConfig
from flowdistill.export import export
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.methods.score_distillation import (
    DiffInstruct,
    DiffInstructConfig,
    Dmd2,
    Dmd2Config,
    HostConfig,
    ScoreDistillation,
    Sid,
    SidConfig,
    sample_gradient,
)
from flowdistill.networks.critic import Discriminator, make_critic
from flowdistill.students import load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

MEAN, STD = torch.tensor([0.4, -0.2], dtype=torch.float64), 0.5
WEIGHTINGS = ("diff_instruct", "dmd", "sid")


class DoubleDraw(Draw):
    def normal(self, shape, rows=None):
        return super().normal(shape, rows).double()

    def uniform(self, low=0.0, high=1.0, rows=None):
        return super().uniform(low, high, rows).double()


class AffineStudent(nn.Module):
    """The generator a + b n: at t = 1 the velocity is n - (a + b n)."""

    def __init__(self, mean, scale):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x, t, condition=None):
        return x - (self.mean + self.scale * x)


class Follows(nn.Module):
    """The exact critic of an affine student."""

    def __init__(self, student):
        super().__init__()
        self.student = [student]
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        student = self.student[0]
        return self.gain * GaussianVelocity(student.mean.detach(), student.scale.detach().abs())(x, t)


def toy(weighting, mean=(0.0, 0.0), scale=0.2, **settings):
    student = AffineStudent(torch.tensor(mean, dtype=torch.float64), scale)
    critic = Follows(student)
    teacher = exact_teacher(GaussianVelocity(MEAN, STD))
    method = ScoreDistillation(HostConfig(weighting=weighting, **settings), teacher, student, critic)
    return method, {"student": student, "critic": critic}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_generator_of_the_teachers_distribution_stays(weighting):
    method, networks = toy(weighting, MEAN.tolist(), STD)
    loss, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
    loss.backward()
    assert metrics["gradient_size"] < 1e-12
    assert networks["student"].mean.grad.abs().max() < 1e-12 and networks["student"].scale.grad.abs() < 1e-12
    assert networks["critic"].gain.grad is None  # no gradient reaches the critic, sid's neither


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_descent_finds_the_teachers_distribution(weighting):
    method, networks = toy(weighting)
    student = networks["student"]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.99))
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        method.loss("student", networks, DoubleDraw(0, step, rows=512))[0].backward()
        optimizer.step()
    assert torch.allclose(student.mean, MEAN, atol=0.03)
    assert student.scale.abs().item() == pytest.approx(STD, abs=0.03)


def test_sids_gradient_is_that_of_its_loss_at_the_sample():
    """Against differences of the loss in one coordinate of one sample."""
    method, networks = toy("sid", sid_alpha=1.2)
    sample = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradient = method.matching_gradient(sample, None, networks["critic"], DoubleDraw(0, 0, rows=4))
    from flowdistill.objectives import distribution_matching as dm

    def value(x):
        draw = DoubleDraw(0, 0, rows=4)
        time, noise = method.config.time.draw(method.teacher, draw), draw.normal((2,))
        state = dm.noised(x, noise, time)
        real, fake = method.teacher.velocity(state, time), networks["critic"](state, time)
        error = dm.sampling_error(real, x, noise)
        anchor = dm.sampling_error(method.teacher.velocity(dm.noised(sample, noise, time), time), sample, noise)
        size = error.abs().mean(dim=1) / anchor.abs().mean(dim=1)  # the normaliser is held where it was
        return 2 * (size * dm.sid_loss(dm.noising_residual(fake, real), error, time, 1.2)).sum()

    step = torch.zeros_like(sample)
    step[1, 0] = 1e-5
    slope = (value(sample + step) - value(sample - step)) / 2e-5
    assert gradient[1, 0].item() == pytest.approx(slope.item(), rel=1e-6)
    assert abs(gradient[1, 0]) > 1e-3


def test_sample_gradient_touches_no_weight():
    layer = nn.Linear(3, 1)
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():  # also from where gradients are off
        gradient = sample_gradient(lambda value: layer(value)[:, 0], x)
    assert torch.allclose(gradient, 3 * layer.weight.expand(4, 3))
    assert layer.weight.grad is None and x.grad is None


def test_critic_learns_the_students_samples():
    method, networks = toy("dmd")
    loss, _ = method.loss("critic", networks, DoubleDraw(0, 0, rows=8192))
    loss.backward()
    assert networks["student"].mean.grad is None
    assert networks["critic"].gain.grad.abs() < 0.02  # the exact velocity is the minimum
    networks["critic"].gain.grad = None
    networks["critic"].gain.data.fill_(1.2)
    loss, _ = method.loss("critic", networks, DoubleDraw(0, 0, rows=8192))
    loss.backward()
    assert networks["critic"].gain.grad > 0.05


def test_order_of_updates():
    method, _ = toy("dmd", critic_updates=3)
    assert method.schedule(0) == ("critic", "critic", "critic", "student")
    assert list(method.roles()) == ["student", "critic"]


# --- noise levels


def test_noise_levels():
    teacher = exact_teacher(GaussianVelocity(MEAN, STD))
    draw = Draw(0, 0, rows=20_000)
    uniform = NoiseLevels(low=0.2, high=0.6).draw(teacher, draw)
    assert uniform.min() >= 0.2 and uniform.max() <= 0.6 and uniform.mean() == pytest.approx(0.4, abs=0.01)
    sigma = NoiseLevels("logit_normal", low=0.0).draw(teacher, draw)
    log_sigma = torch.log(sigma / (1 - sigma))
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.03) and log_sigma.std() == pytest.approx(1.2, abs=0.03)
    ddpm = load_teacher(tiny_unet_pipeline(DDPMScheduler()))
    times = NoiseLevels("timestep", low=0.02, high=0.98).draw(ddpm, draw)
    steps = ddpm.path.coefficients(times).timestep
    assert steps.min() >= 19 and steps.max() <= 980 and steps.mean() == pytest.approx(499.5, abs=10)
    assert times.dtype == torch.float32
    with pytest.raises(UserError, match="low must be below high"):
        ScoreDistillation(HostConfig(time=NoiseLevels(low=0.5, high=0.4)), ddpm)


# --- real backbones


TEACHERS = {
    "flow": lambda: load_teacher(tiny_unet_pipeline(), null_label=3),
    "epsilon": lambda: load_teacher(tiny_unet_pipeline(DDPMScheduler()), null_label=3),
    "edm": lambda: load_teacher(tiny_unet_pipeline(EDMEulerScheduler(), num_class_embeds=None)),
    "dit": lambda: load_teacher(tiny_dit_pipeline()),
}


@pytest.mark.parametrize("path", TEACHERS)
@pytest.mark.parametrize("kind", [DiffInstruct, Dmd2, Sid])
def test_two_steps_on_a_real_backbone(kind, path, tmp_path):
    teacher = TEACHERS[path]()
    start = {"epsilon": (399.0, "timestep"), "edm": (2.5, "sigma")}.get(path, (None, "linear"))
    guided = 2.0 if teacher.null_label is not None else 1.0
    method = kind(kind.Config(start=start[0], start_unit=start[1], guidance_scale=guided), teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    frozen = {name: p.clone() for name, p in teacher.network.named_parameters()}
    initial = {name: p.clone() for name, p in networks["student"].named_parameters()}
    optimizers = {name: torch.optim.SGD(network.parameters(), lr=0.05) for name, network in networks.items()}
    for step in range(2):
        for update, role in enumerate(method.schedule(step)):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss, _ = method.loss(role, networks, Draw(0, step, update, rows=8))
            assert loss.isfinite() and loss.dtype == torch.float32
            loss.backward()
            others = {"student": "critic", "critic": "student"}[role]
            assert all(p.grad is None for p in networks[others].parameters())
            optimizers[role].step()
    assert all(torch.equal(frozen[name], p) for name, p in teacher.network.named_parameters())
    assert any(not torch.equal(initial[name], p) for name, p in networks["student"].named_parameters())
    method.student().save(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert again.info.method == kind.name and again.info.guidance_scale == guided
    assert torch.equal(again.generate(num_images=2), method.student().generate(num_images=2))
    export(again, tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_lora_critic_shares_the_teachers_weights():
    teacher = TEACHERS["flow"]()
    method = Dmd2(Dmd2Config(critic="lora", critic_lora_rank=2), teacher)
    critic = method.roles()["critic"].network
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    assert 0 < trained < 0.5 * sum(p.numel() for p in teacher.network.parameters())
    loss, _ = method.loss("critic", {"student": method.student().network, "critic": critic}, Draw(0, 0, rows=8))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in critic.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())


# --- the adversarial term


@pytest.mark.parametrize("path", ["flow", "dit"])
def test_discriminator_reads_the_middle_of_the_critic(path):
    teacher = TEACHERS[path]()
    bare = make_critic(teacher.network)
    network = Discriminator(bare)
    x, t, condition = torch.randn(3, *teacher.shape), torch.tensor([0.2, 0.5, 0.8]), teacher.encode([0, 1, 2])
    velocity, logits = network(x, t, condition, logits=True)
    assert torch.equal(velocity, teacher.velocity(x, t, condition)) and logits.shape == (3,)
    assert torch.equal(network(x, t, condition), velocity)
    gradients = torch.autograd.grad(logits.sum(), list(network.parameters()), allow_unused=True)
    used = {name for (name, _), g in zip(network.named_parameters(), gradients, strict=True) if g is not None}
    last = teacher.network.family.projections(bare.velocity.backbone)
    names = {id(p): name for name, p in network.named_parameters()}
    assert names[id(last[0].weight)] in used and names[id(last[1].weight)] not in used


def adversarial_method(weight=1.0, **settings):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10)
    method = Dmd2(Dmd2Config(adversarial_weight=weight, data="digits", **settings), teacher)
    return method, {name: role.network for name, role in method.roles().items()}


def test_critic_learns_to_tell_real_digits_from_samples():
    method, networks = adversarial_method(adversarial_critic_weight=1.0)
    optimizer = torch.optim.AdamW(networks["critic"].parameters(), lr=2e-3)
    told = []
    for step in range(60):
        optimizer.zero_grad()
        loss, metrics = method.loss("critic", networks, Draw(0, step, rows=32))
        loss.backward()
        optimizer.step()
        told.append(metrics["discriminator_accuracy"].item())
    assert sum(told[-10:]) / 10 > 0.8


def test_generator_moves_where_it_passes_for_real():
    method, networks = adversarial_method(weight=1e4)  # drowns the matching gradient
    noise, condition = method.draw_start(Draw(0, 0, rows=16))
    sample = method.generate(networks, noise, condition, Draw(0, 0, rows=16)).detach()
    gradient = method.adversarial_gradient(sample, condition, networks["critic"], Draw(1, 0, rows=16))
    draw = Draw(1, 0, rows=16)
    time, fresh = method.config.critic_time.draw(method.teacher, draw), draw.normal(method.teacher.shape)

    def logits(x):
        state = (1 - time).reshape(-1, 1, 1, 1) * x + time.reshape(-1, 1, 1, 1) * fresh
        return networks["critic"](state, time, condition, logits=True)[1]

    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert (logits(sample - step) > logits(sample + step)).all()
    loss, _ = method.loss("student", networks, Draw(0, 0, rows=16))
    loss.backward()
    assert all(p.grad is None for p in networks["critic"].parameters())
    without, plain = adversarial_method(weight=0.0)
    assert not isinstance(plain["critic"], Discriminator) and without.data is None


def test_data_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"'digits' has samples of shape \(1, 8, 8\)"):
        Dmd2(Dmd2Config(adversarial_weight=1.0, data="digits"), load_teacher(tiny_unet_pipeline(channels=2)))


# --- the regression term


def test_pairs_of_another_null_label_are_of_other_classes(tmp_path):
    """The network is the same one, and so was the file's name."""
    for null_label, classes in ((3, [0, 1, 2]), (None, [0, 1, 2, 3])):
        teacher = load_teacher(tiny_unet_pipeline(), null_label=null_label)
        assert teacher_pairs(teacher, 4, 1, folder=tmp_path).labels.unique().tolist() == classes


def test_pairs_are_made_once(tmp_path, monkeypatch):
    teacher = TEACHERS["flow"]()
    pairs = teacher_pairs(teacher, 7, 3, 1.5, seed=1, folder=tmp_path)
    expected = teacher.sample(pairs.noise, teacher.encode([0, 1, 2, 0, 1, 2, 0]), steps=3, guidance_scale=1.5)
    assert torch.allclose(pairs.latents, expected, atol=1e-6)
    (file,) = tmp_path.iterdir()
    calls = []
    monkeypatch.setattr(type(teacher), "sample", lambda *args, **kwargs: calls.append(1))
    again = teacher_pairs(teacher, 7, 3, 1.5, seed=1, folder=tmp_path)
    assert torch.equal(again.latents, pairs.latents) and torch.equal(again.noise, pairs.noise) and not calls
    monkeypatch.undo()
    teacher_pairs(teacher, 7, 4, 1.5, seed=1, folder=tmp_path)
    with torch.no_grad():
        next(teacher.network.parameters()).add_(0.1)
    teacher_pairs(teacher, 7, 3, 1.5, seed=1, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # other steps and another teacher are other pairs
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    repaired = teacher_pairs(TEACHERS["flow"](), 7, 3, 1.5, seed=1, folder=tmp_path)
    assert torch.allclose(repaired.latents, pairs.latents, atol=1e-6) and len(file.read_bytes()) == len(content)


def test_pairs_without_a_cache_are_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"are not cached: .*file/pairs.* cannot be written to \(Not a directory\)"):
        without = teacher_pairs(TEACHERS["flow"](), 2, 1, folder=tmp_path / "file" / "pairs")
    cached = teacher_pairs(TEACHERS["flow"](), 2, 1, folder=tmp_path / "pairs")
    assert torch.equal(without.latents, cached.latents)


REGRESSED = {
    "dmd2": lambda **settings: Dmd2(Dmd2Config(**settings), TEACHERS["flow"]()),
    "freeflow": lambda **settings: FreeFlow(FreeFlowConfig(**settings), TEACHERS["flow"]()),
}


@pytest.mark.parametrize("name", REGRESSED)
def test_an_untrained_student_has_no_error_to_one_euler_step(name):
    """So that noise, time and condition of a pair are those of its latents."""
    method = REGRESSED[name](regression_weight=2.0, regression_pairs=12, regression_steps=1)
    networks = {name: role.network for name, role in method.roles().items()}
    _, metrics = method.loss("student", networks, Draw(0, 0, rows=12))
    assert metrics["regression_error"] < 1e-10
    finer = REGRESSED[name](regression_weight=2.0, regression_pairs=12, regression_steps=8)
    with_term, metrics = finer.loss("student", networks, Draw(0, 0, rows=12))
    finer.pairs = None
    without, _ = finer.loss("student", networks, Draw(0, 0, rows=12))
    assert metrics["regression_error"] > 1e-4
    assert (with_term - without).item() == pytest.approx(2 * metrics["regression_error"].item(), rel=1e-3)


@pytest.mark.parametrize("name", REGRESSED)
def test_regression_pulls_to_the_teachers_samples(name):
    method = REGRESSED[name](regression_weight=1e3, regression_pairs=12, regression_steps=4)
    networks = {name: role.network for name, role in method.roles().items()}
    optimizer = torch.optim.AdamW(networks["student"].parameters(), lr=1e-3)
    errors = []
    for step in range(30):
        optimizer.zero_grad()
        loss, metrics = method.loss("student", networks, Draw(0, step, rows=12))
        loss.backward()
        optimizer.step()
        errors.append(metrics["regression_error"].item())
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])


def test_pairs_have_one_guidance_scale_at_all_times():
    teacher = TEACHERS["flow"]()
    with pytest.raises(UserError, match="pairs have one guidance scale and the student learns a range"):
        FreeFlow(FreeFlowConfig(regression_weight=1.0, guidance_max=2.0), teacher)
    one = {"regression_weight": 1.0, "guidance_min": 2.0, "guidance_max": 2.0, "regression_pairs": 4}
    with pytest.raises(UserError, match=r"method.guidance_interval is \[0.0, 0.8\]; set it to \[0, 1\]"):
        FreeFlow(FreeFlowConfig(guidance_interval=[0.0, 0.8], **one), teacher)
    pairs = FreeFlow(FreeFlowConfig(regression_steps=2, **one), teacher).pairs
    expected = teacher.sample(pairs.noise, teacher.encode(pairs.labels), steps=2, guidance_scale=2.0)
    assert torch.allclose(pairs.latents, expected, atol=1e-6)


def test_bad_settings():
    teacher = load_teacher(tiny_unet_pipeline())
    with pytest.raises(UserError, match="guidance_scale is 2.0, but the teacher has no null label"):
        Dmd2(Dmd2Config(guidance_scale=2.0), teacher)
    with pytest.raises(UserError, match="method.start is 2.0"):
        Dmd2(Dmd2Config(start=2.0), teacher)
    with pytest.raises(UserError, match="'method.weighting' must be one of"):
        Dmd2(Dmd2Config(weighting="kl"), teacher)
    with pytest.raises(UserError, match="'method.critic_updates' must be at least 1"):
        Dmd2(Dmd2Config(critic_updates=0), teacher)
    assert isinstance(DiffInstructConfig().optimizer, OptimizerConfig) and SidConfig().weighting == "sid"
