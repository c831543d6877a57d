"""Flow maps between any two times against exact ones in float64, and every setting on real backbones."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from flowdistill.config import RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.correction import Correction
from flowdistill.methods.flow_map_matching import FlowMapMatching, FlowMapMatchingConfig
from flowdistill.networks.lora import LoraSettings
from flowdistill.objectives import distribution_matching as dm
from flowdistill.students import load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, MixtureVelocity, exact_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.methods.test_score_distillation import DoubleDraw
from tests.objectives.test_consistency import MEAN, MEANS, SHARES, STD, WIDTH, gaussian_map, mixture_map
from tests.students_of_steps import moved
from tests.tiny import tiny_unet_pipeline

WORLDS = {
    "gaussian": (GaussianVelocity(torch.tensor([MEAN], dtype=torch.float64), STD), gaussian_map),
    "mixture": (MixtureVelocity(MEANS[:, None], WIDTH, SHARES), mixture_map),
}
OBJECTIVES = ("lagrangian", "eulerian", "semigroup")


class Map(nn.Module):
    """The exact map between any two times, and an offset; the field's own velocity where they are one."""

    def __init__(self, field, jump, offset=0.0):
        super().__init__()
        self.field, self.map, self.calls = field, jump, []
        self.offset = nn.Parameter(torch.tensor(float(offset), dtype=torch.float64))

    def forward(self, x, t, condition=None, *, duration):
        self.calls.append((torch.is_grad_enabled(), len(x)))
        d = duration.double()
        there = torch.where(d > 1e-9, d, torch.full_like(d, 0.5) * t)
        average = (x - self.map(x, t, t - there)) / there.reshape(-1, 1)
        return torch.where(d.reshape(-1, 1) > 1e-9, average, self.field(x, t)) + self.offset


def made(world="gaussian", offset=0.0, wrong=False, **settings):
    """A method around the exact map; ``wrong``: around a student that gives the velocity, which is an Euler step."""
    field, jump = WORLDS[world]
    method = FlowMapMatching(FlowMapMatchingConfig(**{"damping": 0.0, **settings}), exact_teacher(field),
                             nn.Linear(1, 1), None, nn.Linear(1, 1))
    if wrong:
        def jump(x, t, r):
            return x - (t - r).reshape(-1, 1) * field(x, t)

    network = Map(field, jump, offset)
    method._student.network = network
    return method, {"student": network}


# --- exact


@pytest.mark.parametrize("times", [None, [1.0, 0.7, 0.4]])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("objective", "derivative", "limit"), [
    ("lagrangian", "jvp", 1e-24), ("lagrangian", "finite_difference", 1e-5), ("lagrangian", "discrete", 1e-4),
    ("eulerian", "jvp", 1e-24), ("eulerian", "finite_difference", 1e-5), ("eulerian", "discrete", 1e-4),
    ("semigroup", "finite_difference", 1e-20),
])
def test_the_exact_map_has_no_residual(world, objective, derivative, limit, times):
    """On its own states, whose passes it needs no data for; a student that gives the velocity has one."""
    if (derivative == "jvp" and world == "mixture") or (objective == "semigroup" and times):
        return  # a bisection has no derivative; the semigroup has no times of its own
    settings = {"objective": objective, "derivative": derivative}
    settings |= {} if objective == "semigroup" else {"finite_difference_step": 2e-3}
    settings |= {} if times is None else {"steps": 3, "step_times": times}
    method, networks = made(world, **settings)
    _, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=64))
    assert metrics["residual"] < limit and metrics["velocity_error"] < 1e-24
    method, networks = made(world, wrong=True, **settings)
    assert method.loss("student", networks, DoubleDraw(0, 0, rows=64))[1]["residual"] > 30 * limit + 1e-3


@pytest.mark.parametrize("derivative", ["finite_difference", "jvp", "discrete"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_offset_is_pulled_back(objective, derivative):
    """By the one call with a gradient; the passes before it have none."""
    if objective == "semigroup" and derivative != "finite_difference":
        return
    for sign in (1, -1):
        method, networks = made(offset=0.3 * sign, objective=objective, derivative=derivative, velocity_fraction=0.25)
        value, _ = method.loss("student", networks, DoubleDraw(0, 0, rows=64))
        value.backward()
        assert networks["student"].offset.grad * sign > 0.02
        calls = networks["student"].calls
        assert [rows for learns, rows in calls if learns] == [64]
        assert calls[0] == (False, 40)  # 16 rows with r = t and half of the other 48 are not at t_max
    assert method.calls_without_gradient("student") == 40 / 64


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_descent_finds_the_teachers_map(objective):
    """Of the maps of all Gaussians: from another spread to the teacher's, and so to samples with that, of any number
    of calls."""

    class Spread(Map):
        def forward(self, x, t, condition=None, *, duration):
            t, d, variance = t.reshape(-1, 1), duration.double().reshape(-1, 1), self.offset.square()

            def spread(time):
                return (1 - time) ** 2 * variance + time**2

            r, y = t - d, x - (1 - t) * MEAN
            # (1 - sqrt(V_r / V_t)) / d without the division by d: (V_t - V_r) / d is a polynomial.
            slope = (t + r) - (2 - t - r) * variance
            return -MEAN + y * slope / (spread(t) + torch.sqrt(spread(t) * spread(r)))

    field, _ = WORLDS["gaussian"]
    method = FlowMapMatching(FlowMapMatchingConfig(objective=objective), exact_teacher(field), nn.Linear(1, 1))
    network = Spread(None, None, 1.1)
    method._student.network = network
    optimizer = torch.optim.Adam([network.offset], lr=0.05)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 80)
        optimizer.zero_grad()
        method.loss("student", {"student": network}, DoubleDraw(0, step, rows=32))[0].backward()
        optimizer.step()
    assert network.offset.item() == pytest.approx(STD, abs=0.01)
    noise = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in (1, 2, 5, 8):
        sample = method.student()(noise, steps=count)
        assert torch.allclose(sample, MEAN + STD * noise, atol=0.05)


class Small(nn.Module):
    """A network that is told t and the duration."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x, t, condition=None, *, duration):
        return self.layers(torch.cat([x, t.double()[:, None], duration.double()[:, None]], 1))


@pytest.mark.parametrize(("settings", "stays"), [({}, True), ({"velocity_fraction": 0.25, "damping": 0.0}, True),
                                                 ({"velocity_fraction": 0.25}, False)], ids=str)
def test_a_semigroup_student_stays_with_its_teacher(settings, stays):
    """From its teacher's velocity on, for all durations. Three rows of four that ask no teacher, damped, lead it
    away: the pull back is bounded then, however large the error."""
    field, _ = WORLDS["mixture"]
    method = FlowMapMatching(FlowMapMatchingConfig(objective="semigroup", **settings), exact_teacher(field),
                             nn.Linear(1, 1))
    torch.manual_seed(0)
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(200):
        x, t = 1.5 * torch.randn(128, 1, dtype=torch.float64), torch.rand(128, dtype=torch.float64).clamp(min=0.01)
        optimizer.zero_grad()
        (network(x, t, duration=t * torch.rand(128)) - field(x, t)).square().mean().backward()
        optimizer.step()
    optimizer, errors = torch.optim.Adam(network.parameters(), lr=5e-3), []
    for step in range(150):
        optimizer.zero_grad()
        loss, figures = method.loss("student", {"student": network}, DoubleDraw(0, step, rows=64))
        loss.backward()
        optimizer.step()
        errors.append(figures["velocity_error"].item())
    assert (max(errors) < 1) == stays and (not stays or errors[-1] < errors[0])


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_a_students_own_times_are_what_it_learns(objective):
    """Lagrangian jumps begin there and end anywhere; Eulerian ones end there and begin anywhere."""
    method, networks = made(objective=objective, steps=3, step_times=[1.0, 0.7, 0.4])
    rows, still = method.draw_rows(networks["student"], DoubleDraw(0, 0, rows=400))
    t, r = rows.t[still:], rows.r[still:]
    assert (r < t).all() and (r >= 0).all() and torch.equal(rows.t[:still], rows.r[:still])
    if objective == "lagrangian":
        assert set(rows.t.tolist()) == {1.0, 0.7, 0.4} and {0.0, 0.4, 0.7} < set(r.tolist())
        assert len(set(r.tolist())) > 100
    else:
        assert set(r.tolist()) == {0.0, 0.4, 0.7} and len(set(t.tolist())) > 100


# --- the correction


class Critic(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field, self.scale = field, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, condition=None):
        return self.scale * self.field(x, t)


def corrected(offset=0.0, shift=0.0, **settings):
    """The exact map with an offset, and an exact critic of samples of the Gaussian whose mean is shifted."""
    method, networks = made(offset=offset, **{"correction_strength": 1.0, **settings})
    field = GaussianVelocity(torch.tensor([MEAN + shift], dtype=torch.float64), STD)
    return method, networks | {"critic": Critic(field)}


@pytest.mark.parametrize("stepping", ["deterministic", "stochastic"])
def test_the_correction_rests_at_the_teachers_law_and_else_leads_to_it(stepping, monkeypatch):
    """By whichever jump of the path is learnt; by 16 of 64 rows, in the one call with a gradient. Unscaled: beside the
    exact map's residual it would be nothing."""
    monkeypatch.setattr(dm, "balance", lambda *sizes: torch.ones(()))
    seen = set()
    for step in range(12):
        method, networks = corrected(stepping=stepping)
        _, metrics = method.loss("student", networks, DoubleDraw(0, step, rows=64))
        assert metrics["correction_residual"] == 0
        method, networks = corrected(shift=-0.2, derivative="jvp", stepping=stepping)
        value, metrics = method.loss("student", networks, DoubleDraw(0, step, rows=64))
        value.backward()
        # The map itself is exact, so that the gradient is the correction's alone: u must fall for samples to rise.
        assert networks["student"].offset.grad > 0 and networks["critic"].scale.grad is None
        assert [rows for learns, rows in networks["student"].calls if learns] == [64]
        seen.add(len(networks["student"].calls))
    assert len(seen) > 3  # paths of other lengths


@pytest.mark.parametrize("stepping", ["deterministic", "stochastic"])
def test_paths_are_the_students_own(stepping):
    """What is learnt begins where its sampling comes by, and the critic's samples are the student's."""
    method, networks = corrected(stepping=stepping)
    for step in range(6):
        velocity = method._along(networks["student"])
        before = method.correction.draw_path(velocity, DoubleDraw(0, step, rows=5), 5)
        path = method.correction.draw_path(velocity, DoubleDraw(0, step, rows=5), 5, learnt=0)
        draw = DoubleDraw(0, step, rows=5)
        chain = method.chains[draw.one(8)]
        k = 1 + draw.one(len(chain))
        noise = draw.normal((1,))
        assert before.chain == chain and before.k == k and path.k == len(path.chain) + 1
        assert (before.t == chain.times[k - 1]).all() and (before.r == chain.aims[k - 1]).all()
        if stepping == "deterministic":
            t = torch.full((5,), chain.times[k - 1]).double()
            assert torch.allclose(before.x, gaussian_map(noise, torch.ones(5).double(), t))
            draw = DoubleDraw(0, step, rows=5)
            draw.one(8)
            assert torch.allclose(path.x, MEAN + STD * draw.normal((1,)))


def test_the_correction_is_scaled_to_the_residual():
    def weight(**settings):
        method, networks = corrected(offset=0.3, shift=-0.3, derivative="jvp", **settings)
        metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=64))[1]
        return metrics["correction_weight"].item()

    usual = weight()
    assert weight(correction_strength=0.5) == pytest.approx(0.5 * usual, rel=1e-12)
    assert weight(balance_epsilon=5.0) < 0.5 * usual


def test_the_critic_and_its_turn():
    method, networks = corrected(prediction_only_steps=2, critic_updates=3, critic_fraction=0.5)
    assert method.schedule(0) == ("student", "critic", "critic", "critic")
    assert "correction_residual" not in method.loss("student", networks, DoubleDraw(0, 1, rows=16))[1]
    assert "correction_residual" in method.loss("student", networks, DoubleDraw(0, 2, rows=16))[1]
    value, _ = method.loss("critic", networks, DoubleDraw(0, 0, rows=16))
    value.backward()
    assert networks["critic"].scale.grad is not None and networks["student"].offset.grad is None
    assert made()[0].schedule(0) == ("student",) and Correction().correction_strength == 0


def test_shares_of_the_rows():
    method, networks = made(velocity_fraction=0.5, start_fraction=0.25, endpoint_fraction=0.5)
    rows, still = method.draw_rows(networks["student"], DoubleDraw(0, 0, rows=400))
    assert still == 200 and (rows.t[200:250] == 1).all() and (rows.t[250:] < 1).all()
    assert (rows.r[200:] == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    # The student's own states: where its map takes the noise that the batch began with.
    draw = DoubleDraw(0, 0, rows=400)
    draw.uniform(), draw.uniform(), draw.uniform()
    noise = draw.normal(method.teacher.shape)
    assert torch.allclose(rows.x[250:], gaussian_map(noise[250:], torch.ones(150).double(), rows.t[250:]))


# --- real backbones


def teacher_of(path, **settings):
    scheduler = {"flow": None, "epsilon": DDPMScheduler(clip_sample=False)}[path]
    return load_teacher(tiny_unet_pipeline(scheduler, num_class_embeds=11), null_label=10, **settings)


FORMS = {
    "lagrangian": {}, "jvp": {"derivative": "jvp"}, "discrete": {"derivative": "discrete", "stepping": "stochastic"},
    "eulerian": {"objective": "eulerian"}, "eulerian jvp": {"objective": "eulerian", "derivative": "jvp"},
    "semigroup": {"objective": "semigroup"}, "corrected": {"correction_strength": 1.0, "critic": "lora"},
    "times": {"steps": 2, "step_times": [1.0, 0.5]},
}
STATES = {"own": {}, "pairs": {"states": "pairs", "pairs": 11, "pairs_steps": 1},
          "data": {"states": "data", "data": "digits"}}


def run(folder, settings, teacher, steps, precision="fp32"):
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=steps, batch_size=4, log_every=1, checkpoint_every=2, trackers=[], device="cpu", precision=precision))
    torch.manual_seed(0)
    method = FlowMapMatching(FlowMapMatchingConfig(**settings), teacher)
    config.method = method.config
    trainer = Trainer(method, config, folder, make_accelerator(config.train, folder))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("form", "path", "kind", "states"), [
    ("lagrangian", "flow", "full", "own"), ("lagrangian", "epsilon", "lora", "pairs"), ("jvp", "flow", "lora", "own"),
    ("discrete", "epsilon", "full", "data"), ("eulerian", "flow", "full", "pairs"),
    ("corrected", "flow", "lora", "own"), ("eulerian jvp", "epsilon", "full", "own"),
    ("semigroup", "flow", "lora", "own"), ("times", "flow", "full", "own"),
])
def test_it_trains_resumes_bit_for_bit_and_comes_back_from_disk(tmp_path, form, path, kind, states):
    """Three steps of the loop, and two and one; guidance an input; two of the forms in half precision."""
    settings = {"guidance_min": 1.0, "guidance_max": 3.0, "student": kind, "lora": LoraSettings(rank=2),
                **FORMS[form], **STATES[states]}
    precision = "bf16" if form in ("discrete", "semigroup") else "fp32"
    teacher = teacher_of(path)
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
    assert loaded.info == student.info and loaded.info.guidance_range == (1.0, 3.0) and loaded.chains == student.chains
    untrained = FlowMapMatching(FlowMapMatchingConfig(**settings), teacher).student()
    noise, condition = torch.randn(2, *teacher.shape), teacher.encode([0, 1])
    with torch.no_grad():
        for count in (1, 2):
            latents = [one(noise, condition, 1.5, steps=count) for one in (loaded, student, untrained)]
            assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize("path", ["flow", "epsilon"])
@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_both_derivatives_of_a_real_network_agree(objective, path, caplog):
    """Forwards it needs no finite differences in its place. In its own embedding the duration is smooth."""
    step = 5e-3 if objective == "lagrangian" else 2e-4
    methods = [FlowMapMatching(FlowMapMatchingConfig(objective=objective, derivative=derivative,
                                                     finite_difference_step=step), teacher_of(path))
               for derivative in ("jvp", "finite_difference")]
    student = moved(methods[0].student(), 0.1).network
    rows, still = methods[0].draw_rows(student, Draw(0, 3, rows=8))
    rows = rows.part(slice(still, None))._replace(t=torch.full((6,), 0.6, dtype=torch.float64))
    rows = rows._replace(r=0.5 * rows.t)
    if objective == "lagrangian":
        one, other = (method.duration_derivative(student, rows) for method in methods)
    else:
        slope = methods[0].teacher.velocity(rows.x, rows.t, rows.condition)
        one, other = (method.total_derivative(student, rows, slope) for method in methods)
    assert methods[0].forward_mode and "finite differences are used" not in caplog.text
    assert one.abs().max() > 1e-3 and (one - other).abs().max() < 0.05 * one.abs().max()


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_make_the_rows_of_one(states, form):
    method = FlowMapMatching(FlowMapMatchingConfig(guidance_max=2.0, **STATES[states] | FORMS[form]),
                             teacher_of("flow"))
    networks = {name: role.network for name, role in method.roles().items()}
    moved(method.student())
    if form == "corrected":  # whose balance is one over all processes, and they are not here: without it
        method.config.correction_strength = 0.0
        velocity = method._along(networks["student"])
        one, *others = (method.correction.draw_path(velocity, Draw(0, 1, rows=16, rank=rank, world=world), 8, 0).x
                        for rank, world in ((0, 1), (0, 2), (1, 2)))
        assert torch.allclose(one[::2], others[0], atol=1e-5) and torch.allclose(one[1::2], others[1], atol=1e-5)
    for role in networks:
        whole = method.loss(role, networks, Draw(0, 1, rows=16))[0]
        halves = [method.loss(role, networks, Draw(0, 1, rows=16, rank=rank, world=2))[0] for rank in (0, 1)]
        assert torch.allclose(sum(halves) / 2, whole, rtol=1e-4)


@pytest.mark.parametrize("settings", [
    {"objective": "eulerian"}, {"objective": "semigroup"}, {"derivative": "jvp"}, {"derivative": "discrete"},
    {"finite_difference_step": 0.2}, {"start_fraction": 0.1}, {"velocity_fraction": 0.5}, {"endpoint_fraction": 0.9},
    {"damping": 1.0}, {"damping_epsilon": 0.5}, {"guidance_min": 2.0, "guidance_max": 2.0}, {"guidance_max": 2.0},
    {"guidance_min": 2.0, "guidance_max": 2.0, "guidance_interval": [0.0, 0.4]}, {"steps": 2, "step_times": [1.0, 0.5]},
    STATES["pairs"],
], ids=str)
def test_each_setting_changes_the_loss(settings):
    teacher = teacher_of("flow")
    plain, method = (FlowMapMatching(FlowMapMatchingConfig(**given), teacher) for given in ({}, settings))
    network = moved(method.student()).network
    called = network if method.guidance_input else lambda *args, guidance=None, **named: network(*args, **named)
    losses = [method.loss("student", {"student": called}, Draw(0, 5, rows=8))[0]]
    if method.guidance_input:
        network.embeddings.pop("guidance")
    losses.append(plain.loss("student", {"student": network}, Draw(0, 5, rows=8))[0])
    assert losses[0].isfinite() and losses[0] != losses[1]


def test_bad_settings():
    teacher = teacher_of("flow")
    unconditional = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    for model, settings, message in (
        (teacher, {"steps": 9}, "'method.steps' must be at least 1 and at most 8"),
        (teacher, {"guidance_min": 3.0}, "guidance_min is 3.0, above method.guidance_max 1.0"),
        (teacher, {"guidance_interval": [0.8, 0.2]}, "guidance_interval is .0.8, 0.2."),
        (teacher, {"states": "data"}, "method.states is data and method.data null"),
        (teacher, {"data": "digits"}, "method.states is own and method.data digits"),
        (teacher, {"critic": "lora"}, "method.critic is set, but method.correction_strength is 0"),
        (teacher, {"noising_mean": 0.0}, "method.noising_mean is set, but method.correction_strength is 0"),
        (teacher, {"correction_strength": 1.0, "correction_guidance_interval": [0.7, 0.7]}, "below the second"),
        (teacher, {"velocity_fraction": 1.0}, "no row has a jump to learn"),
        (teacher, {"objective": "semigroup", "velocity_fraction": 0.0}, "the teacher is in its rows only"),
        (teacher, {"objective": "semigroup", "derivative": "jvp"}, "method.derivative is jvp, but .*leave it out"),
        (teacher, {"objective": "semigroup", "finite_difference_step": 0.1}, "finite_difference_step is 0.1, but"),
        (teacher, {"objective": "semigroup", "steps": 2, "step_times": [1.0, 0.5]}, "step_times is .1.0, 0.5., but"),
        (teacher, {"steps": 2, "step_times": [0.9, 0.5]}, "begins at t = 0.9, .* begin at its t_max, 1"),
        (teacher, {"steps": 3, "step_times": [1.0, 0.5]}, "step_times has 2 times, and method.steps is 3"),
        (teacher, {"steps": 4, "step_times": [1.0, 0.9, 0.5, 0.2]}, "cannot be exported: .* nothing was trained"),
        (unconditional, {"guidance_max": 2.0}, "method.guidance_max is 2.0, but the teacher has no null label"),
    ):
        with pytest.raises(UserError, match=message):
            FlowMapMatching(FlowMapMatchingConfig(**settings), model)
