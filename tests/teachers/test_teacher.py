"""Teachers: exact fields, adapters on real diffusers classes, guidance, loading and its errors."""

import json

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from flowdistill.conditioning.conditions import Condition
from flowdistill.data.assets import asset_path
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, MixtureVelocity, exact_teacher
from flowdistill.teachers.solvers import network_calls
from flowdistill.utils.errors import UserError
from tests.tiny import tiny_dit_pipeline, tiny_unet, tiny_unet_pipeline

MEAN, STD = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), 0.6


def gaussian():
    return exact_teacher(GaussianVelocity(MEAN, STD))


def noise(rows=16, shape=(3,), dtype=torch.float64):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- exact teachers


def test_gaussian_velocity_is_the_flow_maps_derivative():
    field, n = gaussian().network, noise()
    for d in (0.2, 0.5, 0.9):
        duration = torch.full((16,), d, dtype=torch.float64, requires_grad=True)
        state = field.flow_map(n, duration)
        slope = torch.stack([torch.autograd.grad(state[:, i].sum(), duration, retain_graph=True)[0] for i in range(3)])
        velocity = field(state.detach(), 1 - duration.detach())
        assert torch.allclose(-slope.T, velocity, atol=1e-12)  # time runs against duration


def test_gaussian_boundary_and_average():
    field, n = gaussian().network, noise()
    zero, one = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    assert torch.allclose(field.average_velocity(n, zero), n - MEAN, atol=1e-14)
    assert torch.allclose(field(n, one), n - MEAN, atol=1e-14)  # v(n, 1) = n - E[x_0]
    average = field.average_velocity(n, 0.7 * one)
    assert torch.allclose(n - 0.7 * average, field.flow_map(n, 0.7 * one), atol=1e-14)


def test_denoise_is_the_posterior_mean():
    teacher, x, t = gaussian(), noise(), 0.4
    gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    assert torch.allclose(teacher.denoise(x, t), MEAN + gain * (x - (1 - t) * MEAN), atol=1e-13)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("edm_heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    teacher, n = gaussian(), noise()
    top = 0.9 if solver == "edm_heun" else 1.0
    exact = teacher.network.flow_map(n, torch.ones(16, dtype=torch.float64))
    start = n if top == 1 else teacher.network.flow_map(n, torch.full((16,), 0.1, dtype=torch.float64)) / top

    def error(steps):
        times = torch.linspace(top, 0, steps + 1, dtype=torch.float64).tolist()
        return (teacher.sample(start, times=times, solver=solver) - exact).abs().max().item()

    assert 0.8 * 2**order < error(40) / error(80) < 1.3 * 2**order


def edm_sampler(denoiser, noise, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Karras et al. 2022, Algorithm 1 without churn: the network calls it takes, and its sample."""
    index = torch.arange(steps, dtype=torch.float64)
    ends = [value ** (1 / rho) for value in (sigma_max, sigma_min)]
    sigmas = [*((ends[0] + index / (steps - 1) * (ends[1] - ends[0])) ** rho).tolist(), 0.0]
    x, calls = noise * sigmas[0], 0
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoiser(x, now)) / now
        ahead, calls = x + (after - now) * slope, calls + 1
        if after != 0:
            late = (ahead - denoiser(ahead, after)) / after
            ahead, calls = x + (after - now) * (slope / 2 + late / 2), calls + 1
        x = ahead
    return calls, x


def test_edm_heun_is_edms_own():
    """To 1e-12, on the denoiser of a mixture and the teacher's own grid; ``heun`` is another solver."""
    means = torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    field = MixtureVelocity(means, 0.3)
    teacher = exact_teacher(field)
    teacher.path = path_from_scheduler(EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0))

    def denoiser(x, sigma):
        t = torch.full((len(x),), sigma / (1 + sigma), dtype=torch.float64)
        state = x / (1 + sigma)
        return state - t[:, None] * field(state, t)

    n, asked = noise(32, (2,)), []
    calls, theirs = edm_sampler(denoiser, n, 18)
    handle = teacher.network.register_forward_hook(lambda *arguments: asked.append(1))
    ours = teacher.sample(n, steps=18, solver="edm_heun")
    handle.remove()
    assert len(asked) == calls == network_calls("edm_heun", 18) == network_calls("heun", 18) == 35
    assert (ours - theirs).abs().max() < 1e-12
    assert (teacher.sample(n, steps=18, solver="heun") - theirs).abs().max() > 1e-3
    with pytest.raises(UserError, match="sigma = t / .1 - t., which is infinite at t = 1"):
        gaussian().sample(noise(), steps=4, solver="edm_heun")
    with pytest.raises(UserError, match="solver is 'dopri5'; supported are euler, heun, edm_heun"):
        gaussian().sample(noise(), steps=4, solver="dopri5")


def test_mixture_is_the_gaussian_with_one_component_and_samples_modes():
    x, t = noise(), torch.full((16,), 0.3, dtype=torch.float64)
    single = MixtureVelocity(MEAN[None], STD)
    assert torch.allclose(single(x, t), gaussian().network(x, t), atol=1e-12)
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    ends = exact_teacher(MixtureVelocity(means, 0.1)).sample(noise(64, (2,)), steps=200)
    assert (torch.cdist(ends, means).min(dim=1).values < 0.6).all()
    assert 10 < (ends[:, 0] > 0).sum() < 54


def test_mixture_velocity_is_its_score():
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=torch.float64)
    field, t = MixtureVelocity(means, 0.5, torch.tensor([0.3, 0.7], dtype=torch.float64)), 0.6
    x = noise(8, (2,)).requires_grad_()
    variance = (1 - t) ** 2 * 0.25 + t**2
    logp = torch.logsumexp(field.log_weights - (x[:, None] - (1 - t) * means).square().sum(-1) / (2 * variance), dim=1)
    score = torch.autograd.grad(logp.sum(), x)[0]
    velocity = field(x.detach(), torch.full((8,), t, dtype=torch.float64))
    assert torch.allclose(score, -(x + (1 - t) * velocity) / t, atol=1e-12)


# --- adapters


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), DDIMScheduler(prediction_type="v_prediction"), EDMEulerScheduler(),
     FlowMatchEulerDiscreteScheduler(shift=3.0)],
    ids=["ddpm", "v", "edm", "flow"],
)
@pytest.mark.parametrize("family", ["unet", "dit"])
def test_sampling_matches_the_scheduler_on_the_raw_network(family, scheduler):
    """Euler on the linear path = the scheduler's own loop around the raw network, on the teacher's own times."""
    pipeline = (tiny_unet_pipeline if family == "unet" else tiny_dit_pipeline)(scheduler)
    teacher = load_teacher(pipeline)
    labels = torch.tensor([0, 1, 2, 3])
    n = noise(4, teacher.shape, torch.float32)
    got = teacher.sample(n, teacher.encode(labels), steps=4)

    network = pipeline.unet if family == "unet" else pipeline.transformer
    path = teacher.path
    grid = path.time_grid(4)
    times = path.coefficients(grid[:-1]).timestep
    alpha, sigma = path.alpha_sigma(grid[0])
    x, extra = (sigma * n.double()).float(), {}
    if path.kind == "vp":
        # DDPM's posterior mean is of the clipped estimate only; DDIM goes on with the noise from before the clipping.
        extra = {"use_clipped_model_output": isinstance(scheduler, DDPMScheduler)}
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.25, 4).tolist()) if path.kind == "flow" else (
        scheduler.set_timesteps(4))
    for expected_time, timestep in zip(times, scheduler.timesteps, strict=True):
        assert timestep.item() == pytest.approx(expected_time.item(), rel=1e-4, abs=1e-4)
        scaled = x if path.kind == "flow" else scheduler.scale_model_input(x, timestep)
        if family == "unet":
            output = network(scaled, timestep, class_labels=labels).sample
        else:
            output = network(scaled, timestep=timestep.expand(4), class_labels=labels).sample[:, :4]
        x = scheduler.step(output, timestep, x, **extra).prev_sample.detach()
    assert (got - x).abs().max() < 2e-4 * max(1, x.abs().max())


def test_guidance_is_one_batched_pass_and_obeys_its_interval():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    assert teacher.num_classes == 3
    x, condition = noise(4, teacher.shape, torch.float32), teacher.encode([0, 1, 2, 0])
    null = Condition({"class_labels": torch.full((4,), 3)})
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    calls = []
    handle = teacher.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    guided = teacher.velocity(x, t, condition, 3.0, (0.3, 0.7))
    assert calls == [8]
    handle.remove()
    conditional, unconditional = teacher.velocity(x, t, condition), teacher.velocity(x, t, null)
    expected = unconditional + 3.0 * (conditional - unconditional)
    assert torch.allclose(guided[1:3], expected[1:3], atol=1e-5)
    assert torch.allclose(guided[[0, 3]], conditional[[0, 3]], atol=1e-5)
    assert not torch.allclose(guided[1:3], conditional[1:3], atol=1e-3)


def test_unconditional_and_half_precision():
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None), dtype="float16")
    full = load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None))
    assert teacher.encode() is None and teacher.num_classes is None
    x = noise(4, teacher.shape, torch.float32)
    for t in (full.t_min, 0.5, full.t_max):
        half, single = teacher.velocity(x, t), full.velocity(x, t)
        assert half.dtype == torch.float32
        assert ((half - single).norm() / single.norm()) < 5e-3
    with pytest.raises(UserError, match="takes none"):
        teacher.encode([1])
    with pytest.raises(UserError, match="unconditional"):
        teacher.velocity(x, 0.5, None, 2.0)


# --- loading


def test_folder_round_trip_keeps_the_scheduler_as_written(tmp_path):
    pipeline = tiny_unet_pipeline()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": DDIMPipeline.__name__}))
    (tmp_path / "flowdistill.json").write_text('{"null_label": 3}')
    teacher = load_teacher(tmp_path)
    assert teacher.path.kind == "flow"  # DDIMPipeline would have rebuilt it as DDIM
    assert teacher.null_label == 3
    assert "flow matching" in teacher.describe() and "labels 0 to 2; null label 3" in teacher.describe()


def test_wrong_prediction_type_is_noticed():
    """The digits teacher read under the wrong schedule gives itself away at high noise."""
    teacher = load_teacher(asset_path("digits-flow"))
    assert teacher.disagreement() is None
    teacher.network.path = teacher.path = path_from_scheduler(DDPMScheduler())
    assert "seem to disagree" in teacher.disagreement()


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        load_teacher(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_teacher("./nowhere/at/all")
    tiny_unet_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is damaged or truncated"):
        load_teacher(tmp_path)


def test_a_hub_that_does_not_answer_is_the_reason_given(monkeypatch):
    def download(source):
        raise OSError("the model is not fully cached locally") from ConnectionError("name or service not known")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(UserError) as caught:
        load_teacher("some/model")
    assert str(caught.value) == ("teacher source some/model is no folder here and could not be fetched from the hub: "
                                 "name or service not known")


@pytest.mark.parametrize("setting", ["source", "lora", "vae", "start", "prompts", "prompt_column"])
def test_no_argument_takes_the_working_folder_for_nothing(setting, tmp_path, monkeypatch):
    """As no setting of a file does; a live pipeline has no source."""
    tiny_unet_pipeline().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {"source": "."} | {setting: ""}
    sources = [given.pop("source"), *([] if setting == "source" else [tiny_unet_pipeline()])]
    instead = "" if setting == "source" else ", or set it to null"
    for source in sources:
        with pytest.raises(UserError, match=f"^'teacher.{setting}' is an empty text; give one{instead}$"):
            load_teacher(source, **given)


def test_disagreements_and_unknown_backbones():
    with pytest.raises(UserError, match="takes 1 channels and returns 3"):
        load_teacher(tiny_unet_pipeline(out_channels=3))
    with pytest.raises(UserError, match="variance_type 'learned_range'.*disagree"):
        load_teacher(tiny_unet_pipeline(DDPMScheduler(variance_type="learned_range")))
    with pytest.raises(UserError, match="null_label is 2.*only be the last one, 3"):
        load_teacher(tiny_unet_pipeline(), null_label=2)
    with pytest.raises(UserError, match="label 7 is out of range"):
        load_teacher(tiny_unet_pipeline()).encode([7])
    with pytest.raises(UserError, match="dtype is 'int8'"):
        load_teacher(tiny_unet_pipeline(), dtype="int8")
    for key in ("quantize", "text_encoder_quantize"):
        for scheme in ("", "int9"):
            with pytest.raises(UserError, match=f"teacher.{key} is '{scheme}'; allowed are int8, fp8, nf4 and null"):
                load_teacher(asset_path("digits-flow"), **{key: scheme})
    pipeline = tiny_dit_pipeline()
    pipeline.register_modules(transformer=tiny_unet(channels=2, num_class_embeds=None))
    with pytest.raises(UserError, match="2 latent channels.*autoencoder has 4"):
        load_teacher(pipeline)
