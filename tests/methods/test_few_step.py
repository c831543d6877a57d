"""Score distillation of students of several steps: exact gradients in float64, and every host on real backbones."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from flowdistill.config import OptimizerConfig, load_config
from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.score_distillation import (
    DiffInstruct,
    Dmd2,
    Dmd2Config,
    HostConfig,
    ScoreDistillation,
    Sid,
    steps_of,
)
from flowdistill.students import generated, load_student
from flowdistill.students.steps import STEPPINGS
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, MixtureVelocity, exact_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.measured_memory import real_peak
from tests.methods.test_score_distillation import DoubleDraw
from tests.students.test_steps import deterministic_slopes, stochastic_slopes
from tests.tiny import tiny_unet_pipeline

MEAN, STD = 0.0, 0.6
TIMES = (1.0, 0.9, 0.75, 0.5)
SLOPES = {"stochastic": stochastic_slopes, "deterministic": deterministic_slopes}
WEIGHTINGS = ("diff_instruct", "dmd", "sid")


class StepwiseStudent(nn.Module):
    """The estimate ``mean_k + slope_k x`` at step k."""

    def __init__(self, times, slopes, means=None):
        super().__init__()
        self.times = times
        self.slopes = nn.Parameter(torch.tensor(slopes, dtype=torch.float64))
        self.means = nn.Parameter(torch.zeros(len(times), dtype=torch.float64) if means is None else means)

    def forward(self, x, t, condition=None):
        k = self.times.index(t[0].item())
        return (x - (self.means[k] + self.slopes[k] * x)) / self.times[k]


class Fixed(nn.Module):
    """A critic that is given."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.gain = [velocity], nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        return self.gain * self.velocity[0](x, t)


def gaussian(mean, std=STD):
    return GaussianVelocity(torch.tensor([mean], dtype=torch.float64), std)


def method_of(student, critic, weighting="dmd", **settings):
    times = list(student.times)
    config = HostConfig(weighting=weighting, steps=len(times), step_times=times, **settings)
    method = ScoreDistillation(config, exact_teacher(gaussian(MEAN)), student, Fixed(critic))
    return method, {"student": student, "critic": method.critic}


def step_of(method, step):
    """The k of a training step's student update."""
    return method.draw_step(DoubleDraw(0, step, rows=64))


@pytest.mark.parametrize("stepping", STEPPINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_student_whose_every_step_has_the_teachers_distribution_stays(weighting, stepping):
    student = StepwiseStudent(TIMES, SLOPES[stepping](TIMES, STD))
    method, networks = method_of(student, gaussian(MEAN), weighting, stepping=stepping)
    seen = set()
    for step in range(20):
        loss, metrics = method.loss("student", networks, DoubleDraw(0, step, rows=64))
        loss.backward()
        k = step_of(method, step)
        seen.add(k)
        assert metrics["gradient_size"] < 1e-12 and f"gradient_size/{k}" in metrics
        assert metrics[f"sample_std/{k}"].item() == pytest.approx(STD, abs=0.25)
    assert seen == {1, 2, 3, 4} and student.slopes.grad.abs().max() < 1e-12


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_only_the_step_of_the_update_gets_a_gradient(stepping):
    student = StepwiseStudent(TIMES, SLOPES[stepping](TIMES, 0.4))
    method, networks = method_of(student, gaussian(MEAN, 0.4), stepping=stepping)
    for step in range(12):
        student.slopes.grad = None
        method.loss("student", networks, DoubleDraw(0, step, rows=64))[0].backward()
        assert student.slopes.grad.nonzero().flatten().tolist() == [step_of(method, step) - 1]
        assert networks["critic"].gain.grad is None


def test_a_critic_of_the_mixture_moves_a_step_that_is_right():
    """p_1 is off and p_2 is the data: the critic of both together has a gradient for step 2 too (and none by p_2's)."""
    slopes = stochastic_slopes((1.0, 0.5), STD)
    student = StepwiseStudent((1.0, 0.5), slopes, torch.tensor([2.0, 0.0], dtype=torch.float64))
    with torch.no_grad():  # its estimate is that of N(0, s^2) where the states come from N(2, s^2)
        student.means[1] = -slopes[1] * 0.5 * 2.0
    mixture = MixtureVelocity(torch.tensor([[2.0], [0.0]], dtype=torch.float64), STD)
    sizes = {}
    for name, critic in (("mixture", mixture), ("its own", gaussian(0.0))):
        method, networks = method_of(student, critic)
        step = next(step for step in range(20) if step_of(method, step) == 2)
        sizes[name] = method.loss("student", networks, DoubleDraw(0, step, rows=4096))[1]["gradient_size"].item()
    assert sizes["mixture"] > 0.1 and sizes["its own"] < 1e-12


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("stepping", STEPPINGS)
def test_descent_finds_every_steps_optimum_where_the_critic_is_the_steps_own(stepping, told):
    """From slopes that are far off. An exact critic of the mixture of both steps brings only the mixture's variance to
    the data's in the same time: one step too wide, the other too narrow."""
    times = (1.0, 0.6)
    student = StepwiseStudent(times, [0.2, 0.3])
    now = [1]

    def sizes():
        a, b = student.slopes.detach().abs()
        state = ((1 - times[1]) * a) ** 2 + times[1] ** 2
        if stepping == "deterministic":
            state = (a + (1 - a) * times[1]) ** 2
        return a, b * state.sqrt()

    def velocity(x, t):
        noise, deviations = t.reshape(-1, 1), sizes()
        if told:
            deviations = deviations[now[0] - 1 : now[0]]
        totals = [(1 - noise) ** 2 * size**2 + noise**2 for size in deviations]
        shares = torch.softmax(torch.stack([-(x**2) / (2 * total) - total.log() / 2 for total in totals]), dim=0)
        each = [(noise - (1 - noise) * size**2) / total * x for size, total in zip(deviations, totals, strict=True)]
        return sum(share * one for share, one in zip(shares, each, strict=True))

    method, networks = method_of(student, velocity, "diff_instruct", stepping=stepping)
    optimizer = torch.optim.Adam([student.slopes], lr=0.05)
    for step in range(200):
        now[0] = step_of(method, step)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        method.loss("student", networks, DoubleDraw(0, step, rows=64))[0].backward()
        optimizer.step()
    found = torch.stack(sizes())
    if told:
        assert found.tolist() == pytest.approx([STD, STD], abs=0.03)
        assert student.slopes.detach().abs().tolist() == pytest.approx(SLOPES[stepping](times, STD), abs=0.05)
    else:
        assert found.square().mean().sqrt().item() == pytest.approx(STD, abs=0.03)
        assert (found[0] - found[1]).abs() > 0.03


def test_one_step_draws_and_makes_what_it_always_did():
    """No number of the step is drawn, and the sample is the one call's: so K = 1 is what it was, bit for bit."""
    student = StepwiseStudent((1.0,), [0.3])
    method, networks = method_of(student, gaussian(MEAN, 0.3))
    draw, again = DoubleDraw(0, 0, rows=8), DoubleDraw(0, 0, rows=8)
    sample, _ = method.draw_sample(networks, draw, method.draw_step(draw))
    assert torch.equal(sample, generated(student, again.normal((1,)), 1.0))
    assert torch.equal(draw.normal((1,)), again.normal((1,)))
    assert set(method.loss("student", networks, draw)[1]) == {"gradient_size"}


def test_two_processes_make_the_rows_of_one():
    """The same step on both, and the halves' samples together are the whole's."""
    student = StepwiseStudent(TIMES, [0.5, 0.6, 0.7, 0.8])
    method, networks = method_of(student, gaussian(MEAN))
    for step in range(50):
        draws = [DoubleDraw(0, step, rows=8), *(DoubleDraw(0, step, rows=8, rank=rank, world=2) for rank in (0, 1))]
        numbers = [method.draw_step(draw) for draw in draws]
        assert len(set(numbers)) == 1
        whole, *halves = (method.draw_sample(networks, draw, numbers[0])[0] for draw in draws)
        assert torch.equal(torch.stack(halves, dim=1).reshape(8, 1), whole)


def test_it_costs_the_passes_that_are_said():
    """k - 1 calls without and one with a gradient for step k, for student and critic alike."""
    calls = []

    class Counted(StepwiseStudent):
        def forward(self, x, t, condition=None):
            calls.append(torch.is_grad_enabled())
            return super().forward(x, t)

    method, networks = method_of(Counted(TIMES, [0.5] * 4), gaussian(MEAN))
    for step in range(10):
        for role in ("student", "critic"):
            calls.clear()
            method.loss(role, networks, DoubleDraw(0, step, rows=4))
            k = step_of(method, step)
            assert calls == [False] * (k - 1) + [role == "student"]


# --- real backbones


def test_earlier_steps_take_no_memory(monkeypatch):
    """An update of step 4 has the peak of one of step 1; with a gradient through the states it would not."""
    method = Dmd2(Dmd2Config(steps=4, student="full"), load_teacher(tiny_unet_pipeline(), null_label=3))
    networks = {name: role.network for name, role in method.roles().items()}

    def peak(k):
        monkeypatch.setattr(method, "draw_step", lambda draw: k)
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        return real_peak(lambda: method.loss("student", networks, Draw(0, 0, rows=64))[0].backward())

    peak(1)  # what is made once
    one, sample = peak(1), method.draw_sample
    assert peak(4) == pytest.approx(one, rel=0.01)

    def with_gradient(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "no_grad", nullcontext)
            return sample(*args)

    monkeypatch.setattr(method, "draw_sample", with_gradient)
    assert peak(1) == pytest.approx(one, rel=0.01) and peak(4) > 2 * one


TEACHERS = {
    "flow": lambda: load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10),
    "epsilon": lambda: load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=11), null_label=10),
}


@pytest.mark.parametrize("path", TEACHERS)
@pytest.mark.parametrize("inputs", ["simulated", "data"])
@pytest.mark.parametrize("kind", [DiffInstruct, Dmd2, Sid, DisBack])
def test_every_host_trains_and_its_student_comes_back(tmp_path, kind, inputs, path):
    teacher = TEACHERS[path]()
    settings = {"steps": 3, "stepping": "deterministic" if path == "flow" else "stochastic", "step_inputs": inputs,
                "data": "digits" if inputs == "data" else None, "guidance_scale": 1.5}
    sgd = OptimizerConfig()
    if kind is DisBack:
        config = DisBackConfig(degradation_steps=0, host=Dmd2Config(optimizer=sgd, **settings))
    else:
        config = kind.Config(optimizer=sgd, **settings)
    method = kind(config, teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    optimizers = {name: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
                  for name, network in networks.items()}
    initial = [p.clone() for p in networks["student"].parameters()]
    for step in range(2):
        method.begin_step(step, tmp_path)
        for update, role in enumerate(method.schedule(step)):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss, _ = method.loss(role, networks, Draw(0, step, update, rows=8))
            assert loss.isfinite()
            loss.backward()
            optimizers[role].step()
    assert any(not torch.equal(a, b) for a, b in zip(initial, networks["student"].parameters(), strict=True))
    method.student().save(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert again.num_steps == 3 and again.steps == method.student().steps
    assert torch.equal(again.generate(num_images=2, steps=2), method.student().generate(num_images=2, steps=2))


def test_states_from_data_are_noised_images():
    method = Dmd2(Dmd2Config(steps=4, step_inputs="data", data="digits"), TEACHERS["flow"]())
    seen = []

    def student(x, t, condition):
        seen.append((x, t, condition))
        return torch.zeros_like(x)

    method.draw_sample({"student": student}, Draw(0, 0, rows=64), 4)
    (state, time, condition), draw = seen[0], Draw(0, 0, rows=64)
    real, of_real = method.data.draw(draw)
    assert time.unique().tolist() == [0.25]
    assert torch.equal(condition.tensors["class_labels"], of_real.tensors["class_labels"])
    assert torch.equal(state, 0.75 * real + 0.25 * draw.normal(method.teacher.shape))
    method.draw_sample({"student": student}, Draw(0, 0, rows=64), 1)
    assert torch.equal(seen[1][0], Draw(0, 0, rows=64).normal(method.teacher.shape))  # the first step has noise alone
    assert len(seen) == 2


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_the_critic_can_be_told_the_step(adversarial):
    """It starts as the one that is not told, learns another velocity for each step, and its loss is that step's."""
    def method_of_critic(told):
        data = {"adversarial_weight": adversarial, "data": "digits"} if adversarial else {}
        method = Dmd2(Dmd2Config(steps=2, critic_told_step=told, **data), TEACHERS["flow"]())
        if adversarial:  # the head starts at random
            torch.manual_seed(0)
            for layer in method.critic.head:
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        return method, {name: role.network for name, role in method.roles().items()}

    (told, networks), (plain, others) = method_of_critic(True), method_of_critic(False)
    for role in ("student", "critic"):
        first = told.loss(role, networks, Draw(0, 0, rows=8))[0]
        assert torch.allclose(first, plain.loss(role, others, Draw(0, 0, rows=8))[0])
    optimizer = torch.optim.SGD(networks["critic"].parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        told.loss("critic", networks, Draw(0, step, rows=8))[0].backward()
        optimizer.step()
    x, t, condition = torch.randn(3, *told.teacher.shape), torch.full((3,), 0.5), told.teacher.encode([0, 1, 2])
    one, two = (told.told(networks["critic"], k)(x, t, condition) for k in (1, 2))
    assert not torch.allclose(one, two, atol=1e-5)
    with pytest.raises(UserError, match="the nodes are networks of the critic's kind"):
        DisBack(DisBackConfig(host=Dmd2Config(steps=2, critic_told_step=True)), told.teacher)


def test_times_are_the_teachers_or_those_given():
    flow, ddpm = TEACHERS["flow"](), TEACHERS["epsilon"]()
    assert steps_of(Dmd2Config(steps=4), flow).times == (1.0, 0.75, 0.5, 0.25)
    ours = steps_of(Dmd2Config(steps=4, stepping="deterministic"), ddpm)
    given = steps_of(Dmd2Config(steps=4, step_times=[999, 749, 499, 249], start_unit="timestep"), ddpm)
    assert ours.times == pytest.approx(given.times) and ours.start_scale > ours.times[0]
    assert steps_of(Dmd2Config(start=399.0, start_unit="timestep"), ddpm).start_scale < 0.7


def test_bad_settings():
    teacher = TEACHERS["flow"]()
    for settings, message in (
        ({"steps": 9}, "'method.steps' must be at least 1 and at most 8"),
        ({"steps": 0}, "'method.steps' must be at least 1 and at most 8, not 0"),
        ({"steps": 2, "step_times": [0.5, 1.0]}, "it must fall"),
        ({"steps": 2, "step_times": [1.0]}, "has 1 times, and method.steps is 2"),
        ({"steps": 2, "step_times": [2.0, 1.0]}, "this teacher allows"),
        ({"stepping": "both"}, "'method.stepping' must be one of"),
        ({"steps": 2, "step_inputs": "data"}, "method.data is null"),
        ({"critic_told_step": True}, "there is nothing to tell"),
        ({"steps": 2, "regression_weight": 1.0}, "pairs are noise and what one call must make of it"),
    ):
        with pytest.raises(UserError, match=message):
            Dmd2(Dmd2Config(**settings), teacher)


@pytest.mark.parametrize("config, setting, words", [
    ("digits/freeflow", "method.steps", "it is a setting of .*dmd2.*, not of freeflow"),
    ("digits/consistency", "method.stepping", "it is a setting of .*dmd2.*, not of consistency"),
    ("digits/msd", "method.host.phases", "it is a setting of .*consistency"),
    ("digits/freeflow", "method.dampin", "did you mean"),
])
def test_a_setting_of_other_methods_is_said_to_be_theirs(config, setting, words):
    with pytest.raises(UserError, match=f"unknown key '{setting}' .*{words}"):
        load_config(config, [f"{setting}=4"])
