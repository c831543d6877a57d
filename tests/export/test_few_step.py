"""Schedulers alone: their own loops beside the student's rule, with the exact velocity of a mixture; and the choice."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)

from flowdistill.export.few_step import (
    PIXEL_LOOPS,
    StockSteps,
    few_step_problem,
    rounded_times,
    stock_steps,
    takes_the_steps,
)
from flowdistill.export.pipelines import check_exportable, export_problem
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.students.steps import STEPPINGS, Steps, rollout, teacher_times
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import MixtureVelocity
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, stable_diffusion
from tests.students.test_student import FAMILIES as PIXELS
from tests.students.test_student import SCHEDULERS
from tests.students_of_steps import steps_of
from tests.tiny import VP, tiny_unet_pipeline

VELOCITY = MixtureVelocity(torch.tensor([[-1.0, 0.4], [1.0, 0.2], [0.1, -1.2]], dtype=torch.float64), 0.1)
ZERO_SNR = VP | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SHIFT = {count: [3 * u / (1 + 2 * u) for u in (1 - i / count for i in range(count))] for count in (1, 2, 4, 8)}


def drawn(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 2, dtype=torch.float64, generator=generator) for _ in range(count)]


def stock_sample(scheduler, path, noises, keeps_scaled=False, **setting):
    """The loop of diffusers' pipelines over a scheduler, the network an exact one at the native timestep it is told."""
    scheduler.set_timesteps(**setting)
    left, x = list(noises[1:]), noises[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))

    def randn(shape, **settings):
        return (left.pop(0) if left else torch.zeros(shape)).to(settings["dtype"])

    with pytest.MonkeyPatch.context() as patch:
        for name in ("lcm", "flow_match_euler_discrete", "flow_match_lcm"):
            patch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", randn)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            t = path.native_to_linear(timestep.double())
            c = path.coefficients(t)
            state = scaled.double() / c.input_scale
            output = (VELOCITY(state, t.expand(len(x))) - c.state * state) / c.output
            x = scheduler.step(output, timestep, scaled if keeps_scaled else x).prev_sample.double()
    return x


def apart(scheduler, path, times, stepping, start, **setting):
    """Largest difference of the scheduler's samples and the student's, where both have the size of the data."""
    noises = drawn(len(times))
    own = rollout(lambda x, t, condition: VELOCITY(x, t), noises[0], Steps(tuple(times), stepping, start), None,
                  lambda k: noises[k - 1])
    return (stock_sample(scheduler, path, noises, **setting) - own).abs().max().item()


def unit(t):
    return math.hypot(t, 1 - t)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("settings", [VP, VP | {"prediction_type": "v_prediction"}, ZERO_SNR,
                                      {"beta_end": 0.02, "beta_start": 1e-4, "beta_schedule": "linear"}])
def test_diffusion_schedulers(count, settings):
    """LCM's is the stochastic rule from unit native noise; DDIM's the deterministic one; Euler's that from sigma n."""
    path = path_from_scheduler(DDIMScheduler(**settings, clip_sample=False))
    times = teacher_times(path, count)
    close = 2e-5 if count == 1 else 1e-5  # one step divides by the table's last alpha, in float32
    lcm = LCMScheduler(**settings, original_inference_steps=count, timestep_scaling=1e6)
    assert apart(lcm, path, times, "stochastic", unit(times[0]), num_inference_steps=count) < close
    ddim = DDIMScheduler(**settings, clip_sample=False, timestep_spacing="trailing")
    assert apart(ddim, path, times, "deterministic", unit(times[0]), num_inference_steps=count) < close
    euler = EulerDiscreteScheduler(**settings, timestep_spacing="trailing")
    difference = apart(euler, path, times, "deterministic", times[0], num_inference_steps=count)
    assert difference > close if settings is ZERO_SNR else difference < close  # its last alpha is a small number, not 0


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_flow_matching_schedulers(count):
    path, times = path_from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)), SHIFT[count]
    even = [1 - i / count for i in range(count)]
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert apart(stochastic, path, times, "stochastic", 1.0, sigmas=times) < 1e-5
    assert apart(FlowMatchLCMScheduler(), path, times, "stochastic", 1.0, sigmas=times) < 1e-5
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    assert apart(shifted, path, times, "stochastic", 1.0, sigmas=even) < 1e-5
    assert apart(FlowMatchEulerDiscreteScheduler(), path, times, "deterministic", 1.0, sigmas=times) < 1e-5
    mapped = FlowMapEulerDiscreteScheduler(shift=3.0)
    assert apart(mapped, path, times, "deterministic", 1.0, num_inference_steps=count) < 1e-5


@pytest.mark.parametrize("count", [2, 4, 8])
def test_edms_scheduler(count):
    """From a smaller sigma_max and a larger sigma_min its schedule is a part of the teacher's."""
    settings = {"sigma_max": 20.0, "sigma_min": 0.02, "prediction_type": "v_prediction"}
    path = path_from_scheduler(EDMEulerScheduler(**settings))
    times = teacher_times(path, count)
    last = times[-1] / (1 - times[-1])
    scheduler = EDMEulerScheduler(**settings | {"sigma_min": last})
    assert apart(scheduler, path, times, "deterministic", unit(times[0]), num_inference_steps=count) < 1e-5
    whole = apart(EDMEulerScheduler(**settings), path, times, "deterministic", unit(times[0]),
                  num_inference_steps=count)
    assert whole > 1e-3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_tcds_scheduler_is_ddims_but_for_its_end(count):
    """It stops at timestep 0 of the table, whose noise stays in the image; with a table that has none there it takes
    the deterministic rule's steps. So there is nothing that it would be exported for."""
    path = path_from_scheduler(DDPMScheduler(**VP))
    times = teacher_times(path, count)
    alphas = DDPMScheduler(**VP).alphas_cumprod.double()
    betas = [0.0, 1 - alphas[1].item(), *(1 - alphas[2:] / alphas[1:-1]).tolist()]
    differences = []
    for table in (VP, {"trained_betas": np.array(betas)}):
        scheduler = TCDScheduler(**table, original_inference_steps=count)
        scheduler.step = functools.partial(scheduler.step, eta=0.0)
        differences.append(apart(scheduler, path, times, "deterministic", unit(times[0]), num_inference_steps=count))
    assert differences[0] > 1e-2 and differences[1] < 2e-5


@pytest.mark.parametrize("data_std", [0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_scms_scheduler_takes_the_stochastic_steps(count, data_std):
    """In its angles and sizes, with what SanaSprintPipeline makes of a velocity. (That pipeline's own network is told a
    guidance scale, which Sana's is not.)"""
    angles = [1.5708 - 1.5708 * i / count for i in range(count)]
    times = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
    noises = drawn(count)
    steps = Steps(tuple(times), "stochastic", times[0])
    own = rollout(lambda x, t, condition: VELOCITY(x, t), noises[0], steps, None, lambda k: noises[k - 1])
    scheduler = SCMScheduler(sigma_data=data_std)
    scheduler.set_timesteps(count, timesteps=[*angles, 0.0], max_timesteps=None, intermediate_timesteps=None)
    left, x = list(noises[1:]) + [torch.zeros(64, 2, dtype=torch.float64)], data_std * noises[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_scm.randn_tensor", lambda shape, **settings: left.pop(0))
        for angle, t in zip(scheduler.timesteps[:-1], times, strict=True):
            size = math.hypot(t, 1 - t)
            state = x / data_std * size
            velocity = VELOCITY(state, torch.full((64,), t, dtype=torch.float64))
            output = data_std * ((1 - 2 * t) * state + (1 - 2 * t + 2 * t**2) * velocity) / size
            x, denoised = scheduler.step(output, angle, x, return_dict=False)
    assert (denoised / data_std - own).abs().max() < 1e-5


WRONG = {  # scheduler, its teacher's, times, stepping, start, arguments of set_timesteps
    "LCM's default of 50 original steps": lambda: (
        LCMScheduler(**VP, timestep_scaling=1e6), DDPMScheduler(**VP), 4, "stochastic", {"num_inference_steps": 4}),
    "flow matching without its list, shifted twice": lambda: (
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0), 4, "stochastic", {"num_inference_steps": 4}),
    "flow matching without its list": lambda: (
        FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), 4, "deterministic",
        {"num_inference_steps": 4}),
    "DDIM's of 3 steps, which go on from 666 to 333 and there ask at 332": lambda: (
        DDIMScheduler(**VP, clip_sample=False, timestep_spacing="trailing"), DDPMScheduler(**VP), 3, "deterministic",
        {"num_inference_steps": 3}),
    "DDIM's of 6 steps, which end at timestep 0": lambda: (
        DDIMScheduler(**VP, clip_sample=False, timestep_spacing="trailing"), DDPMScheduler(**VP), 6, "deterministic",
        {"num_inference_steps": 6}),
    "the other stepping": lambda: (
        FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), 4, "stochastic",
        {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    "leading timesteps": lambda: (
        EulerDiscreteScheduler(**VP, timestep_spacing="leading", steps_offset=1), DDPMScheduler(**VP), 4,
        "deterministic", {"num_inference_steps": 4}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_scheduler_makes_another_image_and_is_found_out(mistake):
    scheduler, native, count, stepping, setting = WRONG[mistake]()
    path = path_from_scheduler(native)
    times = teacher_times(path, count)
    start = times[0] if isinstance(scheduler, EulerDiscreteScheduler) or path.kind == "flow" else unit(times[0])
    least = 5e-4 if count == 3 else 1e-2
    assert apart(scheduler, path, times, stepping, start, **setting) > least
    settings = {name: value for name, value in scheduler.config.items()
                if not name.startswith("_") and value != type(scheduler)().config[name]}
    euler = isinstance(scheduler, EulerDiscreteScheduler)
    found = StockSteps(PIXEL_LOOPS["ConsistencyModelPipeline" if euler else "DDPMPipeline"], type(scheduler), settings,
                       setting)
    assert not takes_the_steps(found, path, Steps(times, stepping, start))


def choice(teacher, *steps):
    return stock_steps(teacher, teacher.network, steps_of(teacher, *steps))


def problem(teacher, *steps):
    return few_step_problem(teacher, teacher.network, steps_of(teacher, *steps))


def teacher_of(name):
    return load_teacher(FAMILIES[name].make(), image_size=FAMILIES[name].image_size,
                        null_label=FAMILIES[name].null_label)


SHIFTED = (1.0, 0.9, 0.75, 0.5)
UNEVEN = (1.0, 0.9, 0.4, 0.3)
CHOICES = [  # teacher, steps, class of the scheduler, arguments
    ("sd", (4, "stochastic"), "LCMScheduler", {"num_inference_steps": 4}),
    ("sd", (3, "stochastic"), "LCMScheduler", {"timesteps": [999, 666, 332]}),
    ("sd", (3, "deterministic"), "EulerDiscreteScheduler", {"num_inference_steps": 3}),
    ("ddim", (4, "deterministic"), "DDIMScheduler", {"num_inference_steps": 4}),
    ("ddim", (3, "deterministic"), "EulerDiscreteScheduler",
     {"num_inference_steps": None, "timesteps": [999, 666, 332]}),
    ("dit", (4, "stochastic"), "LCMScheduler", {"num_inference_steps": 4}),
    ("sit", (3, "deterministic"), "FlowMapEulerDiscreteScheduler", {"num_inference_steps": 3}),
    ("edm-class", (3, "deterministic"), "EDMEulerScheduler", {"num_inference_steps": 3}),
    ("sd3", (4, "stochastic", SHIFTED), "FlowMatchEulerDiscreteScheduler", {"num_inference_steps": 4}),
    ("sd3", (4, "stochastic", UNEVEN), "FlowMatchEulerDiscreteScheduler", {"sigmas": list(UNEVEN)}),
    ("flux-dev", (4, "stochastic", SHIFTED), "FlowMatchEulerDiscreteScheduler", {"num_inference_steps": 4}),
    ("flux-dev", (4, "deterministic", UNEVEN), "FlowMatchEulerDiscreteScheduler", {"sigmas": list(UNEVEN)}),
]


@pytest.mark.parametrize(("name", "steps", "kind", "arguments"), CHOICES)
def test_which_scheduler_and_which_call(name, steps, kind, arguments):
    found = choice(teacher_of(name), *steps)
    assert (found.kind.__name__, found.arguments) == (kind, arguments)


def test_zero_terminal_snr():
    """Euler's scheduler has a small last alpha in the place of 0; DDIM's starts where sigma n is the noise itself."""
    teacher = load_teacher(stable_diffusion(DDIMScheduler(**ZERO_SNR, clip_sample=False)))
    assert teacher.t_max == 1
    kinds = [choice(teacher, 4, stepping).kind for stepping in STEPPINGS]
    assert kinds == [LCMScheduler, DDIMScheduler]


def test_a_shifted_list_is_in_the_scheduler_where_the_call_takes_none():
    """Of a pipeline with even times of its own it is the shift; of another also what its list is stretched to."""
    flux, sd3 = choice(teacher_of("flux-dev"), 4, "stochastic", SHIFTED), choice(
        teacher_of("sd3"), 4, "stochastic", SHIFTED)
    assert flux.code == "FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0)"
    scheduler = sd3.scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([*SHIFTED, 0.0], abs=1e-7)
    teacher = load_teacher(tiny_unet_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), num_class_embeds=None))
    for count in range(2, 9):  # DDPMPipeline's call has a number of steps and nothing else
        scheduler = choice(teacher, count, "stochastic").scheduler()
        scheduler.set_timesteps(count)
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(teacher_times(teacher.path, count), abs=1e-7)


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_every_prediction_of_a_diffusion_teacher_and_a_later_start(stepping):
    """A table that ends at the first time: schedulers start where theirs ends."""
    for name in ("epsilon", "v", "sample"):
        for family in PIXELS:
            teacher = load_teacher(PIXELS[family](SCHEDULERS[name]()), null_label=3 if family == "unet" else None)
            for count in (2, 4, 5, 8):
                assert choice(teacher, count, stepping) is not None
            times = tuple(teacher.path.native_to_linear(torch.tensor([799.0, 599.0, 399.0, 199.0])).tolist())
            found = choice(teacher, 4, stepping, times)
            assert len(found.scheduler().alphas_cumprod) == 800 and found.code is None


def test_reasons():
    sd, dit, sit, flux = (teacher_of(name) for name in ("sd", "dit", "sit", "flux-dev"))
    assert problem(sd, 1, "stochastic") is None and problem(sd, 4, "stochastic") is None
    assert problem(sit, 4, "stochastic") == (
        "students of 4 stochastic steps from this teacher cannot be exported: no scheduler that a DiTPipeline can call "
        "adds noise between the steps of a flow-matching network; with deterministic steps they can be")
    assert "EDM networks" in problem(teacher_of("edm"), 4, "stochastic")
    assert problem(teacher_of("edm"), 4, "stochastic").endswith("with deterministic steps they can be")
    spaced = problem(teacher_of("edm"), 3, "deterministic", (0.9, 0.8, 0.2))
    assert "spaces the times between" in spaced and "with" not in spaced.partition("exported")[2]
    assert "moves a network's input" in problem(teacher_of("karras-ve"), 2, "stochastic")
    for stepping in STEPPINGS:
        assert ("no scheduler makes 999, 832, 666, 499, 332, 166 of 6 steps; of the teacher's own times, those of 2, "
                "4, 5, 8 steps can be") in problem(dit, 6, stepping)
        assert "starts at the noise itself, which is t = 1" in problem(flux, 2, stepping, (0.9, 0.5))
    assert "takes no list of times" in problem(sit, 4, "deterministic", UNEVEN)
    assert "is timestep 499.50" in problem(sd, 2, "stochastic", tuple(
        sd.path.native_to_linear(torch.tensor([999.0, 499.5])).tolist()))
    many = load_teacher(tiny_unet_pipeline(num_class_embeds=101))
    assert "101 classes are more than 100" in problem(many, 4, "stochastic")
    assert problem(load_teacher(tiny_unet_pipeline(num_class_embeds=101), labels=[3, 7]), 4, "stochastic") is None


def test_a_pipeline_that_is_not_known(monkeypatch):
    """Of a family in another package, or of a teacher made in memory."""
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    monkeypatch.setattr(type(teacher.network.family), "student_pipeline", "")
    assert "of a UNet2DModel cannot be exported: no stock pipeline" in problem(teacher, 2, "stochastic")
    monkeypatch.undo()
    teacher.scheduler = None
    assert "of a UNet2DModel without a scheduler cannot be exported" in problem(teacher, 2, "stochastic")


def test_they_are_said_before_the_training_and_at_the_export():
    teacher = teacher_of("sit")
    with pytest.raises(UserError, match="with deterministic steps they can be, so nothing was trained"):
        check_exportable(teacher, steps_of(teacher, 2, "stochastic"))
    check_exportable(teacher, steps_of(teacher, 2, "deterministic"))
    skipping = load_teacher(tiny_unet_pipeline(center_input_sample=True), null_label=3)
    assert "centres its input" in export_problem(skipping, skipping.network)
    assert export_problem(skipping, skipping.network, steps_of(skipping, 4, "stochastic")) is None  # nothing folds


def test_rounded_times():
    """Of Flux at shift e^1.15 (SenseFlow's list), as its pipeline tells them a network in bfloat16."""
    told = dict(rounded_times([1000.0, 904.5, 759.5, 512.8, 750.0, 500.0], torch.bfloat16))
    assert told == {904.5: 904.0, 759.5: 760.0, 512.8: 512.0, 750.0: 752.0}
