"""Every supported scheduler class, with each of its boolean options turned round, at 1, 2 and 3 steps: what the teacher
makes of it against the scheduler's own steps. What cannot be equal is refused, or said by ``describe_call``."""

import copy
import functools
import inspect
import itertools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import nn

from flowdistill.objectives import distribution_matching as dm
from flowdistill.paths import native_path
from flowdistill.paths.clipping import OPTIONS, Clipping
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.teachers import Teacher
from flowdistill.teachers.loading import load_teacher
from flowdistill.teachers.pipeline_call import describe_call
from flowdistill.utils.errors import UserError
from tests.tiny import tiny_unet_pipeline

NAMES = (*native_path.VP_SCHEDULERS, *native_path.EDM_SCHEDULERS, *native_path.FLOW_SCHEDULERS)
# Its module needs torchsde; its settings are those of its neighbours.
NAMES = tuple(name for name in NAMES if name != "DPMSolverSDEScheduler")
SHAPE = (1, 4, 4)
# Limits that cut into the toy's estimates, each in its own place.
LIMITS = {"clip_sample_range": 0.7, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
FIRST_ORDER = {"solver_order": 1, "disable_corrector": [0, 1, 2]}
DOUBLE = ("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "LCMScheduler",
          "PNDMScheduler", "TCDScheduler")
"""Steps in the sample's own precision, with coefficients from a table that can be made float64."""
NOISY = ("DDPMParallelScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler",
         "KDPM2AncestralDiscreteScheduler", "LCMScheduler")
SECOND_ORDER = ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler")


def options_of(name):
    """Boolean options of a class and their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: p.default for key, p in parameters.items() if isinstance(p.default, bool)}


def make(name, option=None, **settings):
    """A scheduler of class ``name`` with one boolean option turned round."""
    return copy.deepcopy(made(name, option, **settings))


@functools.cache
def made(name, option=None, **settings):
    """Once: some work out all their thousand levels in Python."""
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    given = LIMITS | FIRST_ORDER | settings
    if option is not None:
        given[option] = not options_of(name)[option]
    if option == "rescale_betas_zero_snr":
        given["prediction_type"] = "v_prediction"
    if option == "use_flow_sigmas":
        given["prediction_type"] = "flow_prediction"
    if option == "predict_x0":
        given["final_sigmas_type"] = "sigma_min"  # its own steps to sigma = 0 are NaN
    scheduler = getattr(diffusers, name)(**{key: value for key, value in given.items() if key in accepted})
    if name in DOUBLE:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if hasattr(scheduler, "final_alpha_cumprod"):
            last = scheduler.config.set_alpha_to_one
            scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if last else scheduler.alphas_cumprod[0]
    return scheduler


def backbone(native):
    """What the toy network says, whatever the time: large enough for most of its estimates to leave [-1, 1]."""
    return 1.5 * torch.tanh(2 * native) + 0.3 * native.roll(1, -1)


class Toy(nn.Module):
    """The toy as a velocity field; ``asked`` are the timesteps that a backbone would be told."""

    def __init__(self, path):
        super().__init__()
        self.path, self.asked = path, []

    def forward(self, x, t, condition=None):
        c = self.path.coefficients(t)
        self.asked.append(c.timestep[0].item())
        state, output, scale = (v.reshape(-1, 1, 1, 1) for v in (c.state, c.output, c.input_scale))
        return state * x + output * backbone(scale * x)


def toy_teacher(scheduler):
    path = path_from_scheduler(scheduler)
    return Teacher(Toy(path), path, SHAPE, scheduler=scheduler, source="toy")


def noise(seed=0):
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance_exploding(name):
    """Whether a scheduler's samples are x_0 + sigma n, and not alpha x_0 + sigma n or (1 - t) x_0 + t n."""
    return name.startswith("EDM") or "FlowMatch" not in name and any(
        word in name for word in ("Euler", "Heun", "KDPM2", "LMS"))


def norm_of(name, path, t):
    """Native over linear state at a linear time."""
    alpha, sigma = path.alpha_sigma(t)
    return 1 / (1 - t) if variance_exploding(name) else alpha + sigma


def linear_times(scheduler, path):
    """The linear times of a scheduler's own steps, the last included, as it has been set; (steps + 1,) float64."""
    name = type(scheduler).__name__
    if name not in DOUBLE:
        sigma = torch.unique_consecutive(scheduler.sigmas.double())
        return sigma if path.kind == "flow" else sigma / (1 + sigma)
    alphas = [scheduler.alphas_cumprod[int(t)] for t in timesteps_of(scheduler)]
    one = torch.ones((), dtype=torch.float64)
    last = getattr(scheduler, "final_alpha_cumprod", one)
    # TCD's last step goes to timestep 0, LCM's to its denoised estimate.
    last = {"TCDScheduler": scheduler.alphas_cumprod[0], "LCMScheduler": one}.get(name, last)
    alphas = torch.stack([*alphas, last])
    alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    return sigma / (alpha + sigma)


def timesteps_of(scheduler):
    """PNDM's own list has the evaluations of a Runge-Kutta method in it, and none for fewer than four steps."""
    if type(scheduler).__name__ != "PNDMScheduler":
        return scheduler.timesteps
    steps = scheduler.num_inference_steps
    return torch.arange(999, -1, -(1000 // steps))[:steps]


def steps_of(scheduler, steps, start):
    """What the scheduler makes of linear states (B, *SHAPE), by itself.

    Returns:
        its linear times, the native sample at each of them, and its denoised estimates, where it tells them.
    """
    name, path = type(scheduler).__name__, path_from_scheduler(scheduler)
    if name == "PNDMScheduler":
        scheduler.num_inference_steps = steps
    else:
        scheduler.set_timesteps(steps)
    times = linear_times(scheduler, path)
    samples, estimates = [start * times[0] * norm_of(name, path, times[0])], []
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"eta": 0.0} if "eta" in accepted else {"order": 1} if "order" in accepted else {}
    for t in timesteps_of(scheduler):
        x = samples[-1]
        native = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if name == "PNDMScheduler":  # the transfer that its methods are made of, in diffusers' own words only
            samples.append(scheduler._get_prev_sample(x, t, t - 1000 // steps, backbone(native)))
            continue
        out = scheduler.step(backbone(native), t, x, **extra)
        estimates.append(out.get("pred_original_sample", out.get("denoised")))
        samples.append(out.prev_sample)
    return times, samples, estimates


def cases():
    for name in NAMES:
        for option in (None, *options_of(name)):
            for steps in (1, 2, 3):
                yield pytest.param(name, option, steps, id=f"{name}-{option or 'default'}-{steps}")


NEEDS_MU = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler")
"""Where ``use_dynamic_shifting`` needs what only a pipeline knows: see tests/teachers/test_families.py."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "option", "steps"), list(cases()))
def test_steps_are_the_schedulers_own(name, option, steps):
    """The same result from the same start by the same times, in float64; of schedulers that add noise or take second
    evaluations, one step, and the denoised estimates of all steps."""
    scheduler = make(name, option)
    if option == "invert_sigmas":
        with pytest.raises(UserError, match="has invert_sigmas, of networks whose time runs from noise at 0"):
            path_from_scheduler(scheduler)
        return
    if option == "use_dynamic_shifting" and name in NEEDS_MU:
        with pytest.raises(ValueError, match="mu"):
            scheduler.set_timesteps(steps)
        return
    teacher = toy_teacher(scheduler)
    times, samples, estimates = steps_of(scheduler, steps, noise())
    tolerance = 1e-10 if name in DOUBLE else 2e-5
    if option == "rescale_betas_zero_snr" and name not in DOUBLE:
        tolerance = 2e-3  # at sigma = 4,096, in float32
    elif name == "DEISMultistepScheduler":
        tolerance = 2e-4  # exp(h) - 1, in float32
    elif name == "LCMScheduler":
        tolerance = 1e-5  # its estimates have a share of x in them: (1 + 400 t^2)^-1, t its timestep
    if steps == 1 or not (name in (*NOISY, *SECOND_ORDER) or option == "stochastic_sampling"):
        ours = teacher.sample(noise(), times=times.tolist())
        theirs = samples[-1] / norm_of(name, teacher.path, times[-1])
        assert (ours - theirs).abs().max() < tolerance * max(1, theirs.abs().max())
    checked = len(estimates) if len(estimates) == len(times) - 1 else min(1, len(estimates))
    for x, t, estimate in itertools.islice(zip(samples, times, estimates, strict=False), checked):
        if estimate is not None:
            ours = teacher.denoise(x / norm_of(name, teacher.path, t), t.expand(5))
            assert (ours - estimate).abs().max() < tolerance * max(1, estimate.abs().max())


# --- where the steps are


PLACED = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"}


def grids():
    for name in (*NAMES, "KarrasVeScheduler"):
        accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
        if "timestep_spacing" in accepted and name not in ("LCMScheduler", "PNDMScheduler", "TCDScheduler"):
            yield from ((name, option) for option in (None, *options_of(name)))
        elif name not in native_path.VP_SCHEDULERS:
            yield name, None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "option"), list(grids()))
def test_grids_of_few_steps_are_the_schedulers_own(name, option):
    """With trailing timesteps, or the noise levels that an option places; flow matching: evenly, then shifted."""
    scheduler = make(name, option, timestep_spacing="trailing")
    if option == "use_dynamic_shifting":
        assert "depends on the image size" in describe_call(pixel_teacher(scheduler))
        return
    path = path_from_scheduler(scheduler)
    for steps in (1, 2, 3):
        if option in PLACED and steps > 1:  # from the last to the first timestep; of one step the first is the last
            scheduler = make(name, option, timestep_spacing="linspace")
        if name == "FlowMatchHeunDiscreteScheduler":  # takes no times; its own end at 1 / 1000
            own = torch.linspace(1, 0, steps + 1)
        elif name == "KarrasVeScheduler":
            scheduler.set_timesteps(max(steps, 2))  # its own single level is 0 / 0
            sigma = torch.stack([scheduler.schedule[int(t)] for t in scheduler.timesteps])[:steps]
            own = torch.cat([sigma / (1 + sigma), torch.zeros(1)])
        else:
            even = {"sigmas": [1 - i / steps for i in range(steps)]} if path.scheduler_name in (
                native_path.FLOW_SCHEDULERS) else {"num_inference_steps": steps}
            scheduler.set_timesteps(**even)
            own = linear_times(scheduler, path)
        if len(own) == steps:  # DEIS repeats the last level that an option has placed: a last step of no length
            assert name == "DEISMultistepScheduler"
            own = torch.cat([own, own[-1:]])
        ours = path.time_grid(steps)
        assert ours.isfinite().all() and (ours.diff() < 0).all() and ours[-1] == 0
        # Flow sigmas of VP classes start a training step below 1.
        close = 1.1e-3 if option == "use_flow_sigmas" else 1e-6
        assert len(own) == steps + 1 and (ours[:-1] - own[:-1]).abs().max() < close, (ours, own)
    ends = option in ("set_alpha_to_one", "predict_x0") or name == "DEISMultistepScheduler"
    assert ends == (own[-1] != 0)
    if not (option == "use_flow_sigmas" or path.kind == "ve"):
        assert ends == ("its last step ends at t = " in describe_call(pixel_teacher(scheduler)))


def pixel_teacher(scheduler, **unet):
    return load_teacher(tiny_unet_pipeline(scheduler, num_class_embeds=None, **unet))


def test_what_is_not_the_pipelines_own_is_said():
    """One line in ``inspect`` for each setting that ``teacher.sample`` does not follow."""
    said = {
        (DDIMScheduler, ("set_alpha_to_one", False)): "its last step ends at t = 0.0099 (here at 0)",
        (diffusers.EulerDiscreteScheduler, ("final_sigmas_type", "sigma_min")): "its last step ends at t = 0.0099",
        (EDMEulerScheduler, ("final_sigmas_type", "sigma_min")): "its last step ends at t = 0.0020",
        (diffusers.EulerDiscreteScheduler, ("use_karras_sigmas", True)): "EulerDiscreteScheduler;",
        (diffusers.LMSDiscreteScheduler, ("use_beta_sigmas", True)): "LMSDiscreteScheduler;",
        (DDIMScheduler, ("timestep_spacing", "leading")): "its timesteps are 'leading' (here 'trailing')",
        (DDPMScheduler, ("timestep_spacing", "trailing")): "adds noise at its steps",
        (diffusers.DPMSolverMultistepScheduler, ("algorithm_type", "sde-dpmsolver++")): "adds noise at its steps",
        (diffusers.FlowMatchEulerDiscreteScheduler, ("stochastic_sampling", True)): "adds noise at its steps",
        (diffusers.FlowMatchEulerDiscreteScheduler, ("use_dynamic_shifting", True)): "depends on the image size",
    }
    for (kind, (key, value)), text in said.items():
        teacher = pixel_teacher(kind(**{key: value}))
        assert text in f"{describe_call(teacher)};" and f"samples by {describe_call(teacher)};" in teacher.describe()
    placed = pixel_teacher(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="leading"))
    assert "its noise levels end at that of its last 'leading' timestep (here at the smallest)" in describe_call(placed)
    plain = pixel_teacher(DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    assert describe_call(plain) == "DDIMScheduler" and not plain.remarks()
    with pytest.raises(UserError, match="timestep_type 'continuous', of networks that are told 0.25 log sigma"):
        pixel_teacher(diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"))


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal"])
def test_times_that_a_flow_scheduler_places(option):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=2.0, **{option: 0.1 if option == "shift_terminal" else True})
    teacher = pixel_teacher(scheduler)
    for steps in (1, 2, 3):
        ours = teacher.path.time_grid(steps)
        if (option, steps) != ("shift_terminal", 1):  # there its own is 0 / 0
            scheduler.set_timesteps(steps)
            assert torch.equal(ours, scheduler.sigmas.double())
        assert ours[0] == 1 and ours[-1] == 0 and (ours.diff() < 0).all()


# --- clipping and thresholding


CLIPPED = {"clip": {}, "narrow": {"clip_sample_range": 0.4},
           "threshold": {"thresholding": True, "sample_max_value": 3.0},
           "both": {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 2.0}}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("settings", CLIPPED.values(), ids=CLIPPED)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_clipped_steps_in_float64(kind, settings, prediction):
    """1e-10 of the stock DDIM loop over many steps: as the scheduler goes on by itself (DDIM, with the noise of the
    estimate before clipping), and with the noise that the clipped one leaves over (DDPM's posterior mean; Glide)."""
    scheduler = make(kind.__name__, prediction_type=prediction, **settings)
    teacher = toy_teacher(scheduler)
    ours = {solver: teacher.sample(noise(), steps=20, solver=solver) for solver in ("euler", "heun")}
    stock = make("DDIMScheduler", prediction_type=prediction, timestep_spacing="trailing", **settings)
    stock.set_timesteps(20)
    results = {}
    for again in (False, True):
        x = noise() * teacher.path.alpha_sigma(torch.tensor(teacher.t_max, dtype=torch.float64))[1]
        for t in stock.timesteps:
            x = stock.step(backbone(x), int(t), x, eta=0.0, use_clipped_model_output=again).prev_sample
        results[again] = x
    own = kind is DDPMScheduler
    assert (ours["euler"] - results[own]).abs().max() < 1e-10
    assert prediction == "sample" or (ours["euler"] - results[not own]).abs().max() > 1e-2
    # Heun integrates the clipped velocity, whose Euler steps are the second kind.
    euler = teacher.path.time_grid(20).tolist()
    x = noise() * euler[0]
    for now, after in itertools.pairwise(euler):
        x = x + (after - now) * teacher.velocity(x, now)
    assert (x - results[True]).abs().max() < 1e-10
    assert prediction == "sample" or (ours["heun"] - x).abs().max() > 1e-3  # there all is at the limit
    bare = make(kind.__name__, prediction_type=prediction, clip_sample=False)
    assert (toy_teacher(bare).sample(noise(), steps=20) - ours["euler"]).abs().max() > 0.01


def test_velocity_and_denoise_belong_together_and_times_may_differ():
    teacher = toy_teacher(make("DDPMScheduler"))
    x, t = 2 * noise(), torch.tensor([0.01, 0.1, 0.4, 0.8, 0.99], dtype=torch.float64)
    clean = teacher.denoise(x, t)
    assert (clean - (x - t.reshape(-1, 1, 1, 1) * teacher.velocity(x, t))).abs().max() < 1e-12
    assert clean.abs().max() == 0.7 and (clean.abs() == 0.7).float().mean() > 0.2
    for row in range(5):
        one = slice(row, row + 1)
        assert (teacher.velocity(x[one], t[row].item()) - teacher.velocity(x, t)[one]).abs().max() < 1e-10
    assert teacher.velocity(x, torch.zeros(5)).isfinite().all() and teacher.velocity(x, 0.0).isfinite().all()


def test_guidance_comes_before_clipping():
    """As in the pipelines: of two estimates beyond the limit, the guided one may be within it."""
    scheduler = DDPMScheduler(clip_sample_range=0.5, prediction_type="sample")
    teacher = load_teacher(tiny_unet_pipeline(scheduler), null_label=3)
    bare = load_teacher(tiny_unet_pipeline(DDPMScheduler(clip_sample=False, prediction_type="sample")), null_label=3)
    x = 2 * noise()[:4, :, :1, :1].expand(4, *teacher.shape).float() + torch.randn(4, *teacher.shape)
    condition, t = teacher.encode([0, 1, 2, 0]), torch.full((4,), 0.7)
    guided = bare.denoise(x, t, condition, 4.0)
    assert guided.abs().max() > 0.5
    assert (teacher.denoise(x, t, condition, 4.0) - guided.clamp(-0.5, 0.5)).abs().max() < 1e-6
    half = load_teacher(tiny_unet_pipeline(scheduler), null_label=3, dtype="float16")
    assert (half.velocity(x, t, condition, 4.0) - teacher.velocity(x, t, condition, 4.0)).abs().max() < 0.02


@pytest.mark.parametrize("settings", [{}, {"thresholding": True}], ids=["clip", "threshold"])
def test_the_gradient_through_a_clipped_teacher_is_that_of_its_loss(settings):
    """SiD goes through the teacher: autograd against finite differences, in float64."""
    teacher = toy_teacher(make("DDPMScheduler", **settings))
    critic = toy_teacher(make("DDPMScheduler", clip_sample=False))
    t, n, x = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.6], dtype=torch.float64), noise(1), noise(2)

    def loss(sample):
        state = dm.noised(sample, n, t)
        real = teacher.velocity(state, t)
        residual = dm.noising_residual(critic.velocity(state, t), real)
        # The normaliser is held fixed, so it is here, too.
        return (dm.sid_loss(residual, dm.sampling_error(real, sample, n), t, 1.2) * size).sum()

    state = dm.noised(x, n, t)
    size = dm.sampling_error(teacher.velocity(state, t), x, n).flatten(1).abs().mean(dim=1)
    clipped = (teacher.denoise(state, t) - critic.denoise(state, t)).abs() > 1e-9
    assert 0.05 < clipped.double().mean() < 0.95

    def fixed(sample):
        value = dm.noised(sample, n, t)
        real = teacher.velocity(value, t)
        residual = dm.noising_residual(critic.velocity(value, t), real)
        error = dm.sampling_error(real, sample, n)
        return -(t * (residual * (error + 1.2 * residual)).flatten(1).mean(dim=1)).sum()

    variable = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    for place in ((0, 0, 1, 2), (3, 0, 0, 0), (4, 0, 3, 1), (2, 0, 2, 2)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        assert gradient[place].item() == pytest.approx((fixed(x + step) - fixed(x - step)).item() / 2e-6, rel=1e-5,
                                                       abs=1e-8)


def test_each_class_has_the_options_that_its_step_obeys():
    """From diffusers' own source, so that a new version that changes it is noticed."""
    for name in NAMES:
        source = inspect.getsource(getattr(diffusers, name))
        uses = {key for key in ("thresholding", "clip_sample") if f"if self.config.{key}:" in source}
        assert uses == set(OPTIONS.get(name, ())), name


def test_students_copy_the_network_not_the_clipping(tmp_path):
    """What is copied from a clipping teacher is the network; the remark says so; disagreements are seen behind it."""
    teacher = pixel_teacher(DDPMScheduler())
    assert "clipped to [-1, 1] (clip_sample), as the pipeline's DDPMScheduler does" in teacher.remarks()[0]
    assert teacher.remarks()[0] in teacher.describe()
    x, t = noise()[:, :, :1, :1].float().expand(5, *teacher.shape) * 3, torch.full((5,), 0.6)
    copied = teacher.student_copy()(x, t)
    assert torch.equal(copied, teacher.network(x, t)) and not torch.equal(copied, teacher.velocity(x, t))
    flow = pixel_teacher(diffusers.FlowMatchEulerDiscreteScheduler())
    flow.network.path = flow.path = path_from_scheduler(DDIMScheduler())
    with torch.no_grad():
        flow.network.backbone.conv_out.weight.mul_(30)
    assert flow.denoise(x, t).abs().max() <= 1 and "seem to disagree" in flow.disagreement()


def test_a_pipeline_that_rebuilds_its_scheduler_decides_how_it_clips(tmp_path):
    """A folder of DDIMPipeline with a DDPMScheduler, which that pipeline calls as DDIM."""
    import json

    pipeline = tiny_unet_pipeline(DDPMScheduler(beta_schedule="scaled_linear"), num_class_embeds=None)
    pipeline.save_pretrained(tmp_path)
    assert load_teacher(tmp_path).path.clipping == Clipping("clip_sample", 1.0)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    teacher = load_teacher(tmp_path)
    assert teacher.path.clipping == Clipping("clip_sample", 1.0, keeps_noise=True)
    assert teacher.path.scheduler_name == "DDIMScheduler"


# --- starts


ASTRAY = {
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero SNR": diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True),
    "zero SNR, scaled linear": diffusers.EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "zero SNR, DPM": diffusers.DPMSolverMultistepScheduler(rescale_betas_zero_snr=True),
    "cosine, UniPC": diffusers.UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("scheduler", ASTRAY.values(), ids=ASTRAY)
def test_an_epsilon_teacher_starts_where_its_estimate_is_no_noise(scheduler):
    """A network 0.01 off its target: one step gives data, not latents of standard deviation 40 to 200."""
    native = path_from_scheduler(scheduler)
    path = native.from_working_start()
    factor = 1 / (1 - path.t_max)
    assert 1 / (1 - native.t_max) > 4000 and 100 < factor <= 200
    # On a timestep of the table, from which the trailing grid goes on in timesteps.
    asked = path.coefficients(torch.tensor([path.t_max], dtype=torch.float64)).timestep.item()
    assert asked == pytest.approx(round(asked), abs=1e-9) and 900 < asked < 999
    assert path.time_grid(1).tolist() == [path.t_max, 0.0]
    assert f"t_max {path.t_max:.6f}, timestep {round(asked)}, was chosen" in path.start

    def one_step(way):
        n = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        error = 0.01 * torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t = torch.tensor(way.t_max, dtype=torch.float64)
        c = way.coefficients(t)
        x = t * n
        v = c.state * x + c.output * (t * c.input_scale * n + error)  # a perfect network of data 0, and its error
        return (x - t * v).std().item()

    assert one_step(path) < 2 < 40 < one_step(native)
    teacher = pixel_teacher(scheduler)
    assert teacher.t_max == path.t_max and path.start in teacher.remarks() and path.start in teacher.describe()
    later = load_teacher(tiny_unet_pipeline(scheduler, num_class_embeds=None), t_max=native.t_max)
    assert later.t_max == native.t_max and path.start not in later.remarks()


def test_starts_that_work_stay():
    """DDPM's and Stable Diffusion's betas, and every prediction that divides by no alpha."""
    for scheduler in (
        DDPMScheduler(), DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), EDMEulerScheduler(sigma_max=400.0),
        diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.KarrasVeScheduler(),
    ):
        path = path_from_scheduler(scheduler)
        assert path.from_working_start() is path


def test_a_last_entry_below_its_neighbour_is_read():
    """Linear betas at zero terminal SNR: diffusers replaces the last alpha by one above those before it."""
    scheduler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert (scheduler.alphas_cumprod.diff() > 0).any()
    path = path_from_scheduler(scheduler)
    timesteps = torch.tensor([0.0, 500.0, 900.0, 990.0, 999.0], dtype=torch.float64)
    alphas = scheduler.alphas_cumprod.double()[timesteps.long()]
    t = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
    assert (path.native_to_linear(timesteps) - t).abs().max() < 1e-15
    assert (path.coefficients(t).timestep - timesteps).abs().max() < 1e-9
    rising = path.native_to_linear(torch.arange(1000, dtype=torch.float64)).diff()
    assert (rising > 0).all()
