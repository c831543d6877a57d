"""Consistency distillation against exact maps in float64, and every setting on real backbones."""

import copy
import re

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from flowdistill.config import OptimizerConfig, RunConfig, TeacherConfig, TrainConfig, load_config
from flowdistill.methods.consistency import Consistency, ConsistencyConfig, aims_of, grid_of, steps_of
from flowdistill.networks.lora import LoraSettings
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, MixtureVelocity, exact_teacher
from flowdistill.teachers.solvers import integrate
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from flowdistill.utils.shipped import find_config
from tests.export.test_few_step_pipelines import own_latents, stock_images, with_lora
from tests.families import FAMILIES, PROMPTS
from tests.methods.test_score_distillation import DoubleDraw
from tests.objectives.test_consistency import MEAN, MEANS, SHARES, STD, WIDTH, gaussian_map, mixture_map
from tests.students_of_steps import moved, noises
from tests.tiny import tiny_unet_pipeline

WORLDS = {
    "gaussian": (GaussianVelocity(torch.tensor([MEAN], dtype=torch.float64), STD), gaussian_map),
    "mixture": (MixtureVelocity(MEANS[:, None], WIDTH, SHARES), mixture_map),
}


class Map(nn.Module):
    """The exact map to the aim of each time, and an offset."""

    def __init__(self, jump, aims, offset=0.0):
        super().__init__()
        self.jump, self.aims, self.calls = jump, torch.tensor(aims, dtype=torch.float64), []
        self.offset = nn.Parameter(torch.tensor(float(offset), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        self.calls.append(torch.is_grad_enabled())
        t = t.double().clamp(min=1e-9)
        r = self.aims[torch.searchsorted(self.aims, t) - 1]
        return (x - self.jump(x, t, r)) / (t - r).reshape(-1, 1) + self.offset


class Solved(Map):
    """What the teacher's solver makes on the method's own grid: the fixed point of the discrete form."""

    def __init__(self, teacher, grid, aims, solver, offset=0.0):
        super().__init__(None, aims, offset)
        self.teacher, self.grid, self.solver = teacher, grid.tolist(), solver
        self.jump = self.solve

    def solve(self, x, t, r):
        ends = []
        for row, now, end in zip(x, t.tolist(), r.tolist(), strict=True):
            times = [time for time in self.grid if end <= time <= now]
            ends.append(integrate(lambda state, time: self.teacher.velocity(state, time), row[None], times, self.solver)
                        if len(times) > 1 else row[None])
        return torch.cat(ends)


def made(world="gaussian", student=None, offset=0.0, wrong=None, **settings):
    """A method around the exact map, or around ``student(teacher, method)``; states are noise, for they may be any."""
    settings = {"steps": 4, "states": "student", **settings}
    field, jump = WORLDS[world]
    teacher = exact_teacher(field)
    method = Consistency(ConsistencyConfig(**settings), teacher, nn.Linear(1, 1), None, nn.Linear(1, 1))
    network = Map(jump, wrong or method.aims.tolist(), offset)
    if student is not None:
        network = student(teacher, method)
    method._student.network = network
    return method, {"student": network}


def aims(phases):
    return [0.0, 1.0] if phases == 1 else [0.0, 0.25, 0.5, 0.75, 1.0]


# --- exact


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_teachers_own_steps_on_the_grid_are_the_optimum(phases, solver, loss):
    """No loss and no gradient, whatever the states; with the aims of the other kind, or an offset, there is."""
    settings = {"phases": phases, "solver": solver, "loss": loss, "points": 12}

    def solved(aim, offset=0.0):
        return lambda teacher, method: Solved(teacher, method.grid, aim, solver, offset)

    method, networks = made(student=solved(aims(phases)), **settings)
    value, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=24))
    assert value < 1e-14 and metrics["squared_error"] < 1e-26
    value.backward()
    assert networks["student"].offset.grad.abs() < 1e-8
    for other in (solved(aims(5 - phases)), solved(aims(phases), 0.3)):
        method, networks = made(student=other, **settings)
        assert method.loss("student", networks, DoubleDraw(0, 0, rows=24))[1]["squared_error"] > 1e-5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("phases", [1, 4])
def test_the_exact_map_is_the_optimum_of_fine_grids(world, phases):
    """Its error is that of one step of the teacher, squared: O(N^-4) by Euler's."""
    errors = []
    for points in (40, 80):
        method, networks = made(world, phases=phases, points=points, loss="l2")
        errors.append(method.loss("student", networks, DoubleDraw(0, 0, rows=256))[0].item())
    assert errors[0] < 1e-4 and 10 < errors[0] / errors[1] < 26


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("world, derivative", [("gaussian", "finite_difference"), ("gaussian", "jvp"),
                                               ("mixture", "finite_difference")])
def test_the_exact_map_has_no_residual(world, derivative, phases):
    settings = {"phases": phases, "derivative": derivative, "finite_difference_step": 1e-3}
    method, networks = made(world, **settings)
    residual = method.loss("student", networks, DoubleDraw(0, 0, rows=64))[1]["residual"].item()
    assert residual < (1e-20 if derivative == "jvp" else 2e-4)
    method, networks = made(world, wrong=aims(5 - phases), **settings)
    assert method.loss("student", networks, DoubleDraw(0, 0, rows=64))[1]["residual"] > 20 * residual + 1e-3


@pytest.mark.parametrize("derivative", ["discrete", "finite_difference", "jvp"])
def test_an_offset_is_pulled_back(derivative):
    """By the one call with a gradient, the last of the passes."""
    for sign in (1, -1):
        method, networks = made(offset=0.3 * sign, derivative=derivative, points=20)
        value, _ = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
        value.backward()
        assert networks["student"].offset.grad * sign > 1e-3
        calls = networks["student"].calls
        assert calls.count(True) == 1 and calls[-1]
    assert method.calls_without_gradient("student") == 4


def test_descent_finds_the_teachers_steps():
    """A slope for each time of the grid, from the teacher's one-step estimate on: each becomes that of Euler's rest of
    the way, and so the student of two calls has the data's spread up to the solver's error."""
    field = GaussianVelocity(torch.tensor([0.0], dtype=torch.float64), STD)

    class Slopes(nn.Module):
        def __init__(self, grid):
            super().__init__()
            self.grid = grid.flip(0)
            self.slopes = nn.Parameter(torch.zeros(len(grid), dtype=torch.float64))

        def forward(self, x, t, condition=None):
            return (x - self.slopes[torch.searchsorted(self.grid, t)][:, None] * x) / t.clamp(min=1e-9)[:, None]

    config = ConsistencyConfig(steps=2, states="student", points=8, loss="l2")
    method = Consistency(config, exact_teacher(field), nn.Linear(1, 1))
    network = Slopes(method.grid)
    optimizer = torch.optim.Adam([network.slopes], lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        method.loss("student", {"student": network}, DoubleDraw(0, step, rows=64))[0].backward()
        optimizer.step()
    for k, t in enumerate(method.grid[:-1].tolist()):
        solved = integrate(lambda x, time: field(x, torch.full((1,), time, dtype=torch.float64)),
                           torch.ones(1, 1, dtype=torch.float64), method.grid[k:].tolist(), "euler")
        assert network.slopes[len(method.grid) - 1 - k].item() == pytest.approx(solved.item(), abs=0.01), t


# --- the correction


class Critic(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field, self.scale, self.seen = field, nn.Parameter(torch.ones((), dtype=torch.float64)), []

    def forward(self, x, t, condition=None):
        self.seen.append((x, t))
        return self.scale * self.field(x, t)


def corrected(shift=0.0, **settings):
    """The exact map, and an exact critic of samples of the Gaussian whose mean is shifted."""
    method, networks = made(**{"correction_strength": 1.0, "derivative": "jvp", **settings})
    field = GaussianVelocity(torch.tensor([MEAN + shift], dtype=torch.float64), STD)
    paths, draw_path = [], method.correction.draw_path

    def noted(*given, **settings):
        paths.append(draw_path(*given, **settings))
        return paths[-1]

    method.correction.draw_path = noted
    return method, networks | {"critic": Critic(field)}, paths


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("derivative", ["discrete", "jvp"])
def test_the_correction_rests_at_the_teachers_law_and_else_leads_to_it(derivative, phases, monkeypatch):
    """By whichever jump of the path is learnt; by 16 of 64 rows, in the one call with a gradient. Unscaled: beside the
    loss of the exact map it would be nothing."""
    monkeypatch.setattr(dm, "balance", lambda *sizes: torch.ones(()))
    settings = {"phases": phases, "derivative": derivative, "solver": "heun", "points": 60}
    seen = set()
    for step in range(8):
        method, networks, _ = corrected(**settings)
        assert method.loss("student", networks, DoubleDraw(0, step, rows=64))[1]["correction_residual"] == 0
        method, networks, paths = corrected(shift=-0.2, **settings)
        method.loss("student", networks, DoubleDraw(0, step, rows=64))[0].backward()
        assert networks["student"].offset.grad > 1e-3 and networks["critic"].scale.grad is None  # samples must rise
        assert networks["student"].calls.count(True) == 1
        seen.add((len(paths[0].chain), paths[0].k))
    assert len(seen) > 2 and {length for length, _ in seen} == ({4} if phases == 4 else {1, 2, 3, 4})


@pytest.mark.parametrize("phases", [1, 4])
def test_the_correction_has_the_slope_of_the_distance_of_the_laws(phases, monkeypatch):
    """Of the divergence of the noised samples' law from the noised data's, in the offset of the last jump, times
    r / (1 - r)^2: with the factor t - aim, which differs from call to call, and the sign that goes with descent."""
    monkeypatch.setattr(dm, "balance", lambda *sizes: torch.ones(()))
    shift, noising, seen = 0.3, 0.4, set()
    for step in range(24):
        method, networks, paths = corrected(shift, phases=phases, noising_std=1e-9, noising_mean=noising)
        method.loss("student", networks, DoubleDraw(0, step, rows=64))[0].backward()
        (path,), r = paths, torch.sigmoid(torch.tensor(noising, dtype=torch.float64))
        if path.k < len(path.chain):
            continue  # what the jumps after it do is left out
        t = path.chain.times[-1]
        offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
        spread = torch.sqrt((1 - r) ** 2 * STD**2 + r**2)
        laws = [torch.distributions.Normal((1 - r) * mean, spread) for mean in (MEAN + shift - t * offset, MEAN)]
        torch.distributions.kl_divergence(*laws).backward()
        ours = networks["student"].offset.grad * 64 / 16 * (1 - r) ** 2 / r
        assert ours.item() == pytest.approx(offset.grad.item(), rel=1e-6) and ours < 0
        assert t == 1 or ours.item() / t != pytest.approx(offset.grad.item(), rel=0.2)  # as it were without the factor
        seen.add(t)
    assert seen == ({0.25} if phases == 4 else {1.0, 0.75, 0.5, 0.25})


@pytest.mark.parametrize("settings", [{"loss": "l2"}, {"loss": "huber", "huber_c": 0.1}, {"weight": "inverse_step"},
                                      {"derivative": "finite_difference"}], ids=str)
@pytest.mark.parametrize("phases", [1, 4])
def test_what_the_correction_is_scaled_to_is_the_gradient_of_the_rest(settings, phases):
    method, networks = made(phases=phases, points=10, **settings)
    form = method._discrete if method.config.derivative == "discrete" else method._continuous
    rows = form(networks, DoubleDraw(0, 0, rows=6), 6)
    own = networks["student"](*rows[:3]).detach().add(0.1).requires_grad_()
    losses, _, signal = rows.learnt(own)
    losses.sum().backward()
    assert torch.allclose(own.grad, signal(), rtol=1e-10) and signal().abs().min() > 0


@pytest.mark.parametrize("phases", [1, 4])
def test_paths_are_the_students_own_sampling(phases):
    """What is learnt begins where its sampling comes by; the critic learns from its samples."""
    method, networks, _ = corrected(phases=phases)
    for step in range(6):
        def along(path):
            return networks["student"](path.x, path.t, path.condition)

        before, after = (method.correction.draw_path(along, DoubleDraw(0, step, rows=5), 5, learnt)
                         for learnt in (None, 0))
        draw = DoubleDraw(0, step, rows=5)
        chain = method.correction.chains[draw.one(len(method.correction.chains))]
        k = 1 + draw.one(len(chain))
        assert (before.chain, before.k, after.k) == (chain, k, len(chain) + 1)
        assert (before.t == chain.times[k - 1]).all() and (before.r == chain.aims[k - 1]).all() and (after.t == 0).all()
        if phases == 4:
            for path in (before, after):
                draw = DoubleDraw(0, step, rows=5)
                draw.one(1)
                _ = draw.one(4) if path is before else None
                noise = draw.normal((1,))
                assert torch.allclose(path.x, gaussian_map(noise, torch.ones(5).double(), path.t))


def test_the_correction_is_scaled_and_the_critic_has_its_turn():
    def weight(**settings):
        method, networks, _ = corrected(0.3, derivative="discrete", points=8, solver="heun", **settings)
        return method.loss("student", networks, DoubleDraw(0, 0, rows=64))[1]["correction_weight"].item()

    assert weight(correction_strength=0.5) == pytest.approx(0.5 * weight(), rel=1e-12)
    assert weight(balance_epsilon=5.0) < 0.5 * weight()
    method, networks, _ = corrected(prediction_only_steps=2, critic_updates=3, critic_fraction=0.5)
    assert method.schedule(0) == ("student", "critic", "critic", "critic")
    assert "correction_residual" not in method.loss("student", networks, DoubleDraw(0, 1, rows=16))[1]
    assert "correction_residual" in method.loss("student", networks, DoubleDraw(0, 2, rows=16))[1]
    networks["student"].offset.grad = None
    method.loss("critic", networks, DoubleDraw(0, 0, rows=16))[0].backward()
    assert networks["critic"].scale.grad is not None and networks["student"].offset.grad is None
    assert len(networks["critic"].seen[-1][0]) == 8 and made()[0].schedule(0) == ("student",)
    # Calls before the one that is learnt: of 1 to 4 in a path, four for the states, and 2.5 for the critic's samples.
    assert method.calls_without_gradient("student") == 0.75 * 4 + 0.25 * 1.5
    assert method.calls_without_gradient("critic") == 0.5 * 2.5


# --- times


def test_the_grid_has_the_teachers_times_and_those_of_the_calls():
    flow, ddpm = load_teacher(tiny_unet_pipeline()), load_teacher(tiny_unet_pipeline(DDPMScheduler()))
    steps = steps_of(ConsistencyConfig(steps=4), flow)
    assert grid_of(flow, steps, 8).tolist() == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    assert grid_of(flow, steps, 5).tolist() == pytest.approx([1, 0.8, 0.75, 0.6, 0.5, 0.4, 0.25, 0.2, 0])
    steps = steps_of(ConsistencyConfig(steps=4), ddpm)
    timesteps = ddpm.path.coefficients(grid_of(ddpm, steps, 50)[:-1]).timestep
    own = {*range(19, 1000, 20), 999, 749, 499, 249}  # the authors' of LCM, who take times that are 20 apart
    assert sorted(timesteps.round().int().tolist()) == sorted(own)
    assert aims_of(steps, 4).tolist() == [0, *reversed(steps.times)] and aims_of(steps, 1).tolist() == [0, ddpm.t_max]


def test_a_time_of_a_call_aims_at_the_next_one():
    method, _ = made(phases=4)
    t = torch.tensor([1.0, 0.9, 0.75, 0.7501, 0.25, 1e-6], dtype=torch.float64)
    assert method.aim(t).tolist() == [0.75, 0.75, 0.5, 0.75, 0.0, 0.0]
    method, _ = made(phases=1)
    assert method.aim(t).unique().tolist() == [0.0]


@pytest.mark.parametrize("derivative", ["discrete", "finite_difference"])
def test_rows_at_the_times_of_the_calls(derivative):
    """All with call_fraction 1, and half with 0.5."""
    for fraction in (1.0, 0.5):
        method, networks = made(call_fraction=fraction, points=200, derivative=derivative)
        states, seen = method.draw_states, []

        def noted(networks, t, draw, states=states, seen=seen):
            seen.append(t)
            return states(networks, t, draw)

        method.draw_states = noted
        method.loss("student", networks, DoubleDraw(0, 0, rows=400))
        share = torch.isin(seen[0], torch.tensor(method.steps.times, dtype=torch.float64)).double().mean().item()
        assert share == pytest.approx(fraction, abs=0.1)


@pytest.mark.parametrize("phases", [1, 4])
def test_states_are_noised_samples_and_noise_alone_at_the_start(phases):
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler()))
    method = Consistency(ConsistencyConfig(steps=4, phases=phases, pairs=12, pairs_steps=2), teacher)
    t = torch.tensor([teacher.t_max, 0.6, 0.3, 0.1], dtype=torch.float64)
    states, condition = method.draw_states({}, t, Draw(0, 0, rows=4))
    draw = Draw(0, 0, rows=4)
    _, clean, labels = method.samples.rows(draw.integers(12, on_cpu=True), teacher)
    noise = draw.normal(teacher.shape)
    assert torch.equal(condition.tensors["class_labels"], labels.tensors["class_labels"])
    assert torch.allclose(states[0], method.steps.start(noise[0]))
    for i in (1, 2, 3):
        assert torch.allclose(states[i], (1 - t[i].float()) * clean[i] + t[i].float() * noise[i])


def test_only_pairs_of_the_teachers_own_labels_are_used():
    teacher = load_teacher(tiny_unet_pipeline(), labels=[1, 3])
    method = Consistency(ConsistencyConfig(pairs=12, pairs_steps=1), teacher)
    assert set(method.samples.labels.tolist()) == {1, 3}
    with pytest.raises(UserError, match="none of the 2 pairs has one of the labels.*raise method.pairs"):
        Consistency(ConsistencyConfig(pairs=2, pairs_steps=1), load_teacher(tiny_unet_pipeline(), labels=[3]))


# --- real backbones


def teacher_of(path, **settings):
    scheduler = {"flow": None, "epsilon": DDPMScheduler(clip_sample=False)}[path]
    return load_teacher(tiny_unet_pipeline(scheduler, num_class_embeds=11), null_label=10, **settings)


FORMS = {
    "discrete": {}, "ema": {"target": "ema"}, "heun": {"solver": "heun", "loss": "l2", "weight": "inverse_step"},
    "finite_difference": {"derivative": "finite_difference", "tangent_warmup": 10},
    "jvp": {"derivative": "jvp", "call_fraction": 0.5},
    "corrected": {"correction_strength": 1.0, "critic": "lora", "target": "ema"},
}
STATES = {"pairs": {"pairs": 11, "pairs_steps": 1}, "student": {"states": "student"},
          "data": {"states": "data", "data": "digits"}}


def run(folder, settings, teacher, steps, precision="fp32"):
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=steps, batch_size=4, log_every=1, checkpoint_every=2, trackers=[], device="cpu", precision=precision))
    torch.manual_seed(0)
    method = Consistency(ConsistencyConfig(**settings), teacher)
    config.method = method.config
    trainer = Trainer(method, config, folder, make_accelerator(config.train, folder))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind, path", [("full", "flow"), ("lora", "epsilon")])
@pytest.mark.parametrize("form", FORMS)
def test_it_trains_resumes_bit_for_bit_and_comes_back_from_disk(tmp_path, form, path, kind):
    """Three steps of the loop, and two and one; guided, with a range of scales, one form in half precision, and each
    kind of states."""
    phases, states = 3 if path == "flow" else 1, {"ema": "student", "heun": "data"}.get(form, "pairs")
    settings = {"steps": 3, "phases": phases, "guidance_min": 1.0, "guidance_max": 3.0, "student": kind,
                "lora": LoraSettings(rank=2), **STATES[states], **FORMS[form]}
    teacher, precision = teacher_of(path), "bf16" if form == "heun" else "fp32"
    before = copy.deepcopy(teacher.network.state_dict())
    whole = run(tmp_path / "a", settings, teacher, 3, precision)
    run(tmp_path / "b", settings, teacher_of(path), 2, precision)
    again = run(tmp_path / "b", settings, teacher_of(path), 3, precision)
    assert again.step == 3 and whole.roles.keys() == again.roles.keys()
    for role in whole.roles:
        one, other = (trainer.roles[role].network.state_dict() for trainer in (whole, again))
        assert all(torch.equal(value, other[name]) for name, value in one.items()), role
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    student = whole.student()
    student.save(tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    assert loaded.info.method == "consistency" and loaded.info.guidance_scale == 2.0 and loaded.steps == student.steps
    untrained = Consistency(ConsistencyConfig(**settings), teacher).student()
    noise, condition = torch.randn(2, *teacher.shape), teacher.encode([0, 1])
    with torch.no_grad():
        latents = [one(noise, condition) for one in (loaded, student, untrained)]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_the_target_follows_the_student():
    method = Consistency(ConsistencyConfig(target="ema", target_decay=0.75, **STATES["pairs"]), teacher_of("flow"))
    student, target = (method.roles()[name].network for name in ("student", "target"))
    start = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    method.after_update("student")
    for p, first in zip(target.parameters(), start, strict=True):
        assert torch.allclose(p, first + 0.25, atol=1e-6)
    assert method.schedule(0) == ("student",)
    networks = {"student": student, "target": lambda x, t, condition: torch.zeros_like(x)}
    online = Consistency(ConsistencyConfig(**STATES["pairs"]), teacher_of("flow"))
    losses = [one.loss("student", networks, Draw(0, 0, rows=8))[0] for one in (method, online)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("path", ["flow", "epsilon"])
def test_both_derivatives_of_a_real_network_agree(path, caplog):
    """Within their phases; forwards it needs no finite differences in its place."""
    methods = [Consistency(ConsistencyConfig(steps=3, phases=3, derivative=derivative, finite_difference_step=2e-4,
                                             **STATES["pairs"]), teacher_of(path))
               for derivative in ("jvp", "finite_difference")]
    t = torch.tensor([0.75, 0.5, 0.31, 0.2], dtype=torch.float64)
    state, condition = methods[0].draw_states({}, t, Draw(0, 0, rows=4))
    slope = methods[0].teacher.velocity(state, t, condition)
    one, other = (method.derivative(method.student().network, state, t, condition, slope) for method in methods)
    assert methods[0].forward_mode and "finite differences are used" not in caplog.text
    assert (one - other).abs().max() < 0.03 * one.abs().max()


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_make_the_rows_of_one(states, form):
    config = ConsistencyConfig(steps=2, guidance_max=2.0, **STATES[states] | FORMS[form])
    method = Consistency(config, teacher_of("flow"))
    networks = {name: role.network for name, role in method.roles().items()}
    if form == "corrected":  # whose balance is one over all processes, and they are not here
        method.config.correction_strength = 0.0
    for role in method.schedule(0):
        whole = method.loss(role, networks, Draw(0, 1, rows=4))[0]
        halves = [method.loss(role, networks, Draw(0, 1, rows=4, rank=rank, world=2))[0] for rank in (0, 1)]
        assert torch.allclose(sum(halves) / 2, whole, rtol=1e-4)


@pytest.mark.parametrize("settings", [
    {"solver": "heun"}, {"loss": "l2"}, {"huber_c": 1.0}, {"points": 10}, {"call_fraction": 0.5}, {"phases": 4},
    {"guidance_min": 2.0, "guidance_max": 2.0}, {"guidance_max": 2.0}, {"step_times": [1.0, 0.9, 0.75, 0.5]},
    {"derivative": "finite_difference"}, {"target": "ema"}, {"states": "student"},
], ids=str)
def test_each_setting_changes_the_loss(settings):
    teacher = teacher_of("flow")
    plain, method = (Consistency(ConsistencyConfig(steps=4, **STATES["pairs"] | given), teacher)
                     for given in ({}, settings))
    network = plain.student().network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    networks = {"student": network, "target": method.target}
    losses = [one.loss("student", networks, Draw(0, 5, rows=8))[0] for one in (plain, method)]
    assert losses[1].isfinite() and losses[0] != losses[1]


@pytest.mark.parametrize("changed", [{"tangent_warmup": 10}, {"tangent_constant": 5.0}, {"data_std": 0.5},
                                     {"finite_difference_step": 0.1}, {"derivative": "jvp"}], ids=str)
def test_each_setting_of_the_continuous_form_changes_the_loss(changed):
    base = {"derivative": "finite_difference", "states": "student"}
    (plain, networks), (method, others) = made(offset=0.2, **base), made(offset=0.2, **base | changed)
    losses = [one.loss("student", called, DoubleDraw(0, 5, rows=64))[0]
              for one, called in ((plain, networks), (method, others))]
    assert losses[1].isfinite() and losses[0] != losses[1]


def test_inverse_step_weighs_short_steps_more():
    teacher, errors = teacher_of("flow"), {}
    for weight in ("one", "inverse_step"):
        method = Consistency(ConsistencyConfig(weight=weight, loss="l2", **STATES["pairs"]), teacher)
        method.grid = torch.tensor([0.8, 0.75, 0.0], dtype=torch.float64)  # steps of 0.05 and 0.75, and 0.4 in the mean
        for time in (0, 1):
            draw = Draw(0, 0, rows=1)
            draw.integers = lambda *given, time=time, **settings: torch.tensor([time])
            network = {"student": lambda x, t, condition: torch.ones_like(x)}
            errors[weight, time] = method.loss("student", network, draw)[0].item()
    assert errors["inverse_step", 0] / errors["one", 0] == pytest.approx(0.4 / 0.05, rel=1e-4)
    assert errors["inverse_step", 1] / errors["one", 1] == pytest.approx(0.4 / 0.75, rel=1e-4)


@pytest.mark.parametrize("phases", [1, 4])
def test_the_teachers_pipeline_takes_the_lora_file(tmp_path, phases):
    """At the published times of LCM-LoRA, with the call that its card says; and as a phased one."""
    pipeline = FAMILIES["sd"].make()
    pipeline.save_pretrained(tmp_path / "base")
    teacher = load_teacher(pipeline, prompts=PROMPTS)
    config = ConsistencyConfig(steps=4, phases=phases, step_times=[999, 759, 499, 259], start_unit="timestep",
                               states="student", student="lora", lora=LoraSettings(2, 3.0), guidance_max=4.0)
    method = Consistency(config, teacher)
    method.loss("student", {"student": method.student().network}, Draw(0, 0, rows=2))[0].backward()
    student = moved(method.student())
    drawn = noises(student)
    expected = own_latents("sd", student, drawn)
    pipe, call, _ = with_lora(student, tmp_path, pipe=FAMILIES["sd"].make())
    assert call["timesteps"] == [999, 759, 499, 259]
    latents = stock_images(pipe, "sd", student, call, drawn, "latent")
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bad_settings():
    teacher = teacher_of("flow")
    unconditional = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    for model, settings, message in (
        (teacher, {"steps": 4, "phases": 2}, "phases is 2 and method.steps 4"),
        (teacher, {"steps": 9}, "'method.steps' must be at least 1 and at most 8"),
        (teacher, {"guidance_min": 3.0}, "guidance_min is 3.0, above method.guidance_max 1.0"),
        (teacher, {"target": "ema", "derivative": "jvp"}, "there is no target network"),
        (teacher, {"states": "data"}, "method.states is data and method.data null"),
        (teacher, {"data": "digits"}, "method.states is pairs and method.data digits"),
        (teacher, {"steps": 2, "step_times": [0.9, 0.5]}, "begins at t = 0.9, .* begin at its t_max, 1"),
        (teacher, {"target": "ema", "target_decay": 1.0}, "'method.target_decay' must be"),
        (teacher, {"target_decay": 0.5}, "method.target_decay is 0.5, but method.target is online"),
        (teacher, {"critic_updates": 2}, "method.critic_updates is set, but method.correction_strength is 0, so"),
        (teacher, {"correction_strength": 1.0, "correction_guidance_interval": [0.7, 0.7]}, "below the second"),
        (teacher, {"steps": 1, "points": 1}, "no time between those of the calls.*there is nothing to learn"),
        (teacher, {"steps": 4, "phases": 4, "points": 4}, "there is nothing to learn"),
        (unconditional, {"guidance_max": 2.0}, "method.guidance_max is 2.0, but the teacher has no null label"),
        (teacher, {"steps": 4, "step_times": [1.0, 0.9, 0.5, 0.2]},
         "cannot be exported: .* nothing was trained; method.phases=1 makes stochastic steps, phases=4 deterministic"),
    ):
        with pytest.raises(UserError, match=message):
            Consistency(ConsistencyConfig(**{"pairs": 4, "pairs_steps": 1, **settings}), model)


def test_the_optimiser_is_that_of_the_settings():
    config = ConsistencyConfig(optimizer=OptimizerConfig(lr=0.5), target="ema", **STATES["pairs"])
    method = Consistency(config, teacher_of("flow"))
    assert method.roles()["student"].optimizer.lr == 0.5 and not method.roles()["target"].ema


@pytest.mark.parametrize("phases", [1, 4])
def test_a_student_of_phases_has_an_image_after_all_of_its_calls_only(tmp_path, phases):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=10))
    student = Consistency(ConsistencyConfig(steps=4, phases=phases, states="student"), teacher)._student
    student.save(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert list(again.step_counts) == ([1, 2, 3, 4] if phases == 1 else [4])
    assert torch.equal(again.generate(num_images=2, steps=4), again.generate(num_images=2))
    if phases == 1:
        assert again.generate(num_images=2, steps=3).isfinite().all()
    else:
        with pytest.raises(UserError, match="steps is 3; this student has an image only after all of its 4 calls"):
            again.generate(num_images=2, steps=3)


def test_a_setting_of_the_correction_is_named_with_its_place():
    file = find_config("digits/freeflow")
    with pytest.raises(UserError, match=re.escape(f"method.critic_optimizer is set (in {file}), but")):
        load_config(file, ["method.name=consistency"])
    with pytest.raises(UserError, match=re.escape("is set (in the override 'method.critic_updates=2'), but")):
        load_config(find_config("digits/consistency"), ["method.critic_updates=2"])
