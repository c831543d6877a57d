"""Students of several calls: exact optima of both steppings, what an image depends on, and the disk.

Closed forms: a Gaussian N(m, s^2) on x_t = (1 - t) x_0 + t n has standard deviation sigma_t at t, sigma_t^2 =
(1 - t)^2 s^2 + t^2, and (x - (1 - t) m) s / sigma_t + m is distributed as the data where x is as x_t.
"""

import json
import math

import pytest
import torch
from torch import nn

from flowdistill.students import Generator, StudentInfo, given_times, load_student
from flowdistill.students.steps import STEPPINGS, Steps, noise_of, rollout, start_scale, teacher_times
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import MixtureVelocity
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES as PIPELINES
from tests.students.test_student import FAMILIES, SCHEDULERS

MEAN, STD = 0.3, 0.7
SHIFTED = (1.0, 0.9, 0.75, 0.5)
LISTS = (SHIFTED, (1.0, 0.5), (1.0, 0.75, 0.5, 0.25), (0.94, 0.8, 0.6, 0.41), (1.0,))


def affine(times, slopes, mean=MEAN, starts_at_mean=True):
    """The network whose estimate at step k is mean + slope_k (x - centre), the centre of its states."""

    def network(x, t, condition=None):
        k = times.index(t[0].item())
        centre = 0.0 if k == 0 else (1 - times[k]) * mean
        return (x - (mean + slopes[k] * (x - centre))) / times[k]

    return network


def spread(network, steps, k=None):
    """Mean and standard deviation of a rollout that is affine in its independent unit noises."""

    def at(*noises):
        rows = [torch.tensor([[value]], dtype=torch.float64) for value in noises]
        return rollout(network, rows[0], steps, None, lambda step: rows[step - 1], k).item()

    none = at(*[0.0] * len(steps))
    parts = [at(*[float(i == j) for j in range(len(steps))]) - none for i in range(len(steps))]
    return none, math.sqrt(sum(part**2 for part in parts))


def stochastic_slopes(times, std=STD):
    """s / sigma_t, and s / t_1 at first, where the state has noise only."""
    later = [std / math.hypot((1 - t) * std, t) for t in times[1:]]
    return [std / times[0], *later]


def deterministic_slopes(times, std=STD):
    """So that every estimate has the data's spread: the states are a multiple of the one noise."""
    slopes, size = [], times[0]
    for t, later in zip(times, (*times[1:], 0.0), strict=True):
        slopes.append(std / size)
        size = std + (size - std) / t * later  # x' = X + (t' / t) (x - X), about the centre
    return slopes


@pytest.mark.parametrize("times", LISTS)
def test_the_stochastic_optimum_reproduces_a_gaussian_at_every_step(times):
    """Whatever the list: each estimate is distributed as the data (1e-12)."""
    steps = Steps(times, "stochastic", times[0])
    for k in range(1, len(times) + 1):
        mean, std = spread(affine(times, stochastic_slopes(times)), steps, k)
        assert abs(mean - MEAN) < 1e-12 and abs(std - STD) < 1e-12


@pytest.mark.parametrize("times", LISTS)
def test_the_deterministic_optimum_reproduces_a_gaussian_at_every_step(times):
    steps = Steps(times, "deterministic", times[0])
    for k in range(1, len(times) + 1):
        mean, std = spread(affine(times, deterministic_slopes(times), mean=0.0), steps, k)
        assert abs(mean) < 1e-12 and abs(std - STD) < 1e-12


@pytest.mark.parametrize(
    ("times", "expected"),
    [(SHIFTED, (0.7, 1.0384, 0.4762, 0.7)), ((1.0, 0.5), (0.7, 0.9749, 0.5026, 0.7)),
     ((1.0, 0.75, 0.5, 0.25), (0.7, 1.159, 0.394, 0.7))],
)
def test_a_student_of_one_stepping_is_wrong_by_the_other(times, expected):
    """Standard deviation of trained / sampled: both stochastic, stochastic / deterministic, and so on."""
    found = [spread(affine(times, slopes(times), mean=0.0), Steps(times, stepping, times[0]))[1]
             for slopes in (stochastic_slopes, deterministic_slopes) for stepping in STEPPINGS]
    assert found == pytest.approx(expected, abs=5e-4)


def test_the_flow_map_of_a_mixture_is_an_optimum_of_stochastic_steps_only():
    """The end of the teacher's ODE from each state, at any list of times: the data's mean and variance."""
    teacher = MixtureVelocity(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.3,
                              torch.tensor([0.3, 0.7], dtype=torch.float64))

    def network(x, t, condition=None):
        start, state = t[0].item(), x
        grid = torch.linspace(start, 0, 25, dtype=torch.float64)
        for now, then in zip(grid[:-1], grid[1:], strict=True):  # Heun
            slope = teacher(state, now.expand(len(x)))
            guess = state + (then - now) * slope
            state = state + (then - now) / 2 * (slope + teacher(guess, then.clamp(min=1e-9).expand(len(x))))
        return (x - state) / start

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8_000, 1, generator=generator, dtype=torch.float64)
    times, variance = (1.0, 0.75, 0.5), 0.3**2 + 4 * 0.3 * 0.7
    made = {stepping: rollout(network, start, Steps(times, stepping, 1.0), None,
                              lambda k: torch.randn(8_000, 1, generator=generator, dtype=torch.float64))
            for stepping in STEPPINGS}
    assert made["stochastic"].mean().item() == pytest.approx(0.4, abs=0.04)
    assert made["stochastic"].var().item() == pytest.approx(variance, abs=0.04)
    assert made["deterministic"].var().item() > 1.2 * variance


class Square(nn.Module):
    """A network with one weight, so that a gradient through more than one call shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.calls = []

    def forward(self, x, t, condition=None):
        self.calls.append((t[0].item(), torch.is_grad_enabled()))
        return self.weight * x**2 + t.reshape(-1, 1)


@pytest.mark.parametrize("stepping", STEPPINGS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_gradient_is_that_of_the_last_call_alone(stepping, k):
    network, steps = Square(), Steps(SHIFTED, stepping, 1.0)
    noises = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rollout(network, noises[0], steps, None, lambda j: noises[j], k).sum().backward()
    assert network.calls == [(t, j == k - 1) for j, t in enumerate(SHIFTED[:k])]
    whole, network.weight.grad = network.weight.grad, None
    with torch.no_grad():
        state = steps.start(noises[0])
        for j in range(1, k):
            state = steps.after(j, state, network(state, torch.full((3,), SHIFTED[j - 1])), lambda i: noises[i])
    t = SHIFTED[k - 1]
    (state - t * network(state, torch.full((3,), t, dtype=torch.float64))).sum().backward()
    assert torch.allclose(whole, network.weight.grad, atol=1e-14)


def made(family="unet", scheduler="flow", stepping="stochastic", count=4):
    teacher = load_teacher(FAMILIES[family](SCHEDULERS[scheduler]()), null_label=3 if family == "unet" else None)
    times = teacher_times(teacher.path, count)
    steps = Steps(times, stepping, start_scale(teacher.path, times, stepping, False))
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", "tiny"), steps=steps)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return teacher, student


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_an_image_depends_on_its_noise_and_label_only(stepping):
    """Whatever the batch, and fewer calls give the estimates on the way: the prefix of the same rollout."""
    _, student = made(stepping=stepping)
    images = student.generate([0, 1, 2], 7, seed=5)
    assert images.shape[0] == 7
    for batch in (1, 3):
        assert torch.allclose(student.generate([0, 1, 2], 7, seed=5, batch_size=batch), images, atol=1e-5)
    assert not torch.allclose(student.generate([0, 1, 2], 7, seed=6), images, atol=1e-2)
    noise = torch.randn(3, *student.shape, generator=torch.Generator().manual_seed(2))
    condition = student.encode([0, 1, 2])
    with torch.no_grad():
        states, state, between = [], student.steps.start(noise), noise_of(noise)
        for k, t in enumerate(student.steps.times, start=1):
            velocity = student.network(state, torch.full((3,), t, dtype=torch.float64), condition)
            states.append(state - t * velocity)
            if k < 4:
                state = student.steps.after(k, state, velocity, between)
        for k, expected in enumerate(states, start=1):
            assert torch.equal(student(noise, condition, steps=k), expected)
            assert torch.equal(student.sampler(steps=k)(noise, condition), expected)
        assert torch.equal(student(noise, condition), states[-1])
        assert torch.allclose(student(noise[1:], condition[1:]), states[-1][1:], atol=1e-5)
    for wrong in (0, 5):
        with pytest.raises(UserError, match=f"steps is {wrong}.*4 calls, and takes 1 to 4"):
            student.generate([0], 1, steps=wrong)


def test_one_call_is_what_it_was_bit_for_bit():
    teacher, _ = made()
    student = Generator.from_teacher(teacher, StudentInfo(), 0.8)
    noise, condition = torch.randn(3, *student.shape), student.encode([0, 1, 2])
    state, time = 0.8 * noise, torch.full((3,), 0.8, dtype=torch.float64)
    with torch.no_grad():
        expected = state - 0.8 * student.network(state, time, condition)
        assert torch.equal(student(noise, condition), expected)
        assert torch.equal(student.sampler()(noise, condition), expected)
    with pytest.raises(UserError, match="steps is 2; this student was trained for 1 call"):
        student(noise, condition, steps=2)


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_disk(tmp_path, stepping):
    _, student = made(scheduler="epsilon", stepping=stepping)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert isinstance(again, Generator) and again.steps == student.steps and again.num_steps == 4
    assert torch.equal(again.generate([0, 1], 2), student.generate([0, 1], 2))
    assert torch.equal(student.with_network(student.network).generate([0], 1), student.generate([0], 1))
    file = tmp_path / "s" / "flowdistill.json"
    content = json.loads(file.read_text())
    assert content["format"] == 3  # which earlier versions refuse by its number
    times = content["steps"]["times"]
    for wrong, message in (
        (times[::-1], "there must be falling times above 0"),
        ([*times, *(times[-1] / k for k in range(2, 7))], "at most 8"),
        ([3.0, *times[1:]], "at most 8, from 0.9"),
        ([0.99 * times[0], *times[1:]], "first step is at 0.9.* t_start is"),
    ):
        content["steps"]["times"] = wrong
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"is damaged: .*{message}"):
            load_student(tmp_path / "s")
    single = Generator.from_teacher(load_teacher(FAMILIES["unet"](SCHEDULERS["flow"]()), null_label=3), StudentInfo())
    single.save(tmp_path / "one")
    content = json.loads((tmp_path / "one" / "flowdistill.json").read_text())
    assert content["format"] == 1 and "steps" not in content


def test_times_of_the_teachers_own_sampler():
    teachers = {name: load_teacher(FAMILIES["unet"](make()), null_label=3) for name, make in SCHEDULERS.items()}
    flow, ddpm, edm = teachers["flow"], teachers["epsilon"], teachers["edm"]
    assert teacher_times(flow.path, 4) == (1.0, 0.75, 0.5, 0.25)
    authors = (0.935958, 0.803217, 0.617281, 0.409404)  # timesteps 999, 749, 499, 249 of Stable Diffusion's schedule
    assert teacher_times(ddpm.path, 4) == pytest.approx(authors, abs=1e-6)
    assert given_times(ddpm, 4, None, "timestep", [999, 749, 499, 249]) == pytest.approx(authors, abs=1e-6)
    times = teacher_times(edm.path, 4)
    assert times == tuple(edm.path.time_grid(5)[:4].tolist()) and times[-1] > 10 * edm.t_min
    for teacher in teachers.values():
        assert teacher_times(teacher.path, 1) == pytest.approx((teacher.t_max,))
    assert given_times(flow, 2, 0.8, "linear", None) == pytest.approx((0.8, 0.4))
    moved = given_times(ddpm, 2, 399.0, "timestep", None)  # whole timesteps, as stock schedulers have them
    timesteps = ddpm.path.coefficients(torch.tensor(moved, dtype=torch.float64)).timestep
    assert timesteps.tolist() == pytest.approx([399, 190])
    with pytest.raises(UserError, match="start_unit is timestep, but these are linear times"):
        given_times(ddpm, 2, None, "timestep", [1.0, 0.5])
    for times, message in (
        ([1.0, 0.5], "has 2 times, and method.steps is 3"), ([0.5, 1.0, 0.2], "it must fall"),
        ([1.0, 0.5, 0.5], "it must fall"), ([1.0, 0.5, 0.0], "step_times is 0.0 .* allows"),
        ([2.0, 1.0, 0.5], "allows"),
    ):
        with pytest.raises(UserError, match=message):
            given_times(flow, 3, None, "linear", times)
    with pytest.raises(UserError, match="begins at 1.0 and method.start is 0.9"):
        given_times(flow, 2, 0.9, "linear", [1.0, 0.5])
    alpha = ddpm.scheduler.alphas_cumprod[-1].double().sqrt().item()
    unit = 1 / (alpha + math.sqrt(1 - alpha**2))
    times = teacher_times(ddpm.path, 4)
    assert start_scale(ddpm.path, times, "stochastic", True) == pytest.approx(unit, abs=1e-9)
    assert start_scale(ddpm.path, times, "deterministic", False) == pytest.approx(unit, abs=1e-9)
    assert start_scale(ddpm.path, times, "deterministic", True) == times[0]
    assert start_scale(ddpm.path, times[:1], "stochastic", False) == times[0]
    assert unit / times[0] == pytest.approx(1.002338, abs=1e-5)


@pytest.mark.parametrize("name", ["sd3", "qwen-image"])
def test_no_call_is_spent_on_an_image(name):
    """Where the pipeline's own last time is almost 0, whatever the number of steps."""
    teacher = load_teacher(PIPELINES[name].make(), image_size=PIPELINES[name].image_size)
    for count in range(2, 9):
        own, times = teacher.path.time_grid(count + 1).tolist(), teacher_times(teacher.path, count)
        assert times == tuple(own[:count]) and times[-1] > 0.2 and own[count] < 0.03
    if name == "sd3":  # the published times of four steps at shift 3 are 1, 0.9, 0.75 and 0.5
        assert teacher_times(teacher.path, 4) == pytest.approx((1.0, 0.9, 0.75, 0.5), abs=4e-3)


def test_a_bad_list_of_times_is_no_steps():
    for times, stepping, scale in (((), "stochastic", 1.0), ((0.5, 0.5), "stochastic", 1.0),
                                   ((0.5, 0.0), "stochastic", 1.0), ((1.0, 0.5), "other", 1.0),
                                   ((1.0, 0.5), "stochastic", math.nan)):
        with pytest.raises(ValueError, match="falling times"):
            Steps(times, stepping, scale)


def test_one_number_is_the_same_for_all_processes_and_every_value_comes():
    """Over 400 updates: each of two processes finds what one does, and the four values are equally likely (4 sigma)."""
    drawn = [Draw(3, step, rows=4).one(4) for step in range(400)]
    for rank in (0, 1):
        assert [Draw(3, step, rows=4, rank=rank, world=2).one(4) for step in range(400)] == drawn
    counts = [drawn.count(value) for value in range(4)]
    assert sum(counts) == 400 and max(abs(count - 100) for count in counts) < 4 * math.sqrt(75)
