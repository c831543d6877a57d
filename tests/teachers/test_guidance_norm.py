"""``teacher.guidance_norm``: in the units of what each network predicts, and as the pipelines that have it do it."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler

from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.score_distillation import HostConfig
from flowdistill.objectives.guidance import kept_norm
from flowdistill.teachers import load_teacher
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS, pipeline_latents
from tests.tiny import tiny_unet_pipeline

SCHEDULERS = {
    "flow": lambda: None,
    "epsilon": DDPMScheduler,
    "v_prediction": lambda: DDPMScheduler(prediction_type="v_prediction"),
    "sample": lambda: DDPMScheduler(prediction_type="sample", clip_sample=False),
    "edm": EDMEulerScheduler,
}


def exact(path, norm):
    """A teacher in float64, states, times from t_min to t_max, a condition and its null one."""
    teacher = load_teacher(tiny_unet_pipeline(SCHEDULERS[path]()), null_label=3, guidance_norm=norm)
    teacher.network.backbone.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *teacher.shape, generator=generator, dtype=torch.float64)
    t = torch.linspace(teacher.t_min, teacher.t_max, 6, dtype=torch.float64)
    teacher.path = replace(teacher.path, clipping=None)
    return teacher, x, t, teacher.encode([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("kind", ["per_sample", "last_dim"])
@pytest.mark.parametrize("path", SCHEDULERS)
def test_the_norm_is_that_of_the_networks_own_prediction(path, kind):
    teacher, x, t, condition = exact(path, kind)
    network, c = teacher.network, teacher.path.coefficients(t)
    column = {name: getattr(c, name).reshape(-1, 1, 1, 1) for name in ("input_scale", "state", "output")}
    native = x * column["input_scale"]
    own, null = (network(native, c.timestep, each, native=True) for each in (condition, teacher.null(condition)))
    prediction = kept_norm(null + 4 * (own - null), own, kind)
    expected = column["state"] * x + column["output"] * prediction
    got = teacher.velocity(x, t, condition, 4.0)
    # The backbone's sinusoidal embedding is float32, and rows of one batch of 12 or two of 6 differ in its last bits.
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    velocities = (column["state"] * x + column["output"] * each for each in (null + 4 * (own - null), own))
    in_velocities = kept_norm(*velocities, kind)
    assert torch.allclose(got, in_velocities, atol=1e-9) == (path == "flow")  # elsewhere it is another thing
    both = teacher.sides(x, t, condition, 4.0)
    assert torch.allclose(both[1], got, rtol=1e-9) and torch.allclose(
        both[0], teacher.velocity(x, t, condition), rtol=1e-9)


@pytest.mark.parametrize("path", SCHEDULERS)
def test_none_changes_no_bit_of_plain_guidance(path):
    for norm in (None, "none"):
        teacher, x, t, condition = exact(path, norm)
        both = torch.cat([x, x]), torch.cat([t, t]), type(condition).cat([condition, teacher.null(condition)])
        own, null = teacher.network(*both).chunk(2)
        assert torch.equal(teacher.velocity(x, t, condition, 4.0), null + 4.0 * (own - null))


def latents(name, norm, **call):
    """Of a teacher's own steps, and of its pipeline's call with these arguments."""
    family = replace(FAMILIES[name], call=FAMILIES[name].call | call)
    pipeline = family.make()
    teacher = load_teacher(pipeline, image_size=family.image_size, guidance_norm=norm)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    ours = teacher.sample(noise, teacher.encode(prompts=PROMPTS[:2]), steps=3, guidance_scale=5.0)
    return ours, pipeline_latents(pipeline, family, noise, 3, 5.0)


AS_THE_PIPELINE = {  # teacher.guidance_norm, its call's argument, and the setting that is another thing
    "z-image": ("per_sample", {"cfg_normalization": True}, "none"),
    "lumina2": ("none", {"cfg_normalization": False}, "last_dim"),
    "qwen-image": ("last_dim", {}, "per_sample"),
}


@pytest.mark.parametrize("name", AS_THE_PIPELINE)
def test_it_is_what_the_pipelines_call_it(name):
    norm, call, other = AS_THE_PIPELINE[name]
    ours, theirs = latents(name, norm, **call)
    assert (ours - theirs).abs().max() < 1e-4 < 0.1 * theirs.std()
    assert (latents(name, other)[0] - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen-image", "flux-schnell"])
def test_last_dim_is_a_token_where_the_network_returns_tokens(name):
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size, guidance_norm="last_dim")
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    conditional, guided = teacher.sides(x, torch.tensor([0.3, 0.8]), teacher.encode(prompts=PROMPTS[:2]), 5.0)
    norms = [family.pack(value).norm(dim=-1) for value in (conditional, guided)]
    assert torch.allclose(*norms, rtol=1e-5)
    assert not torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-2)


def test_the_pipelines_own_call_stays_what_it_is():
    pipeline = tiny_unet_pipeline()
    plain, kept = (load_teacher(pipeline, null_label=3, guidance_norm=norm) for norm in (None, "last_dim"))
    noise, condition = torch.randn(2, *plain.shape), plain.encode([0, 1])
    own = [teacher.pipeline_sample(noise, condition, 3, 4.0) for teacher in (plain, kept)]
    assert torch.equal(*own)
    assert not torch.allclose(plain.sample(noise, condition, 3, guidance_scale=4.0),
                              kept.sample(noise, condition, 3, guidance_scale=4.0), atol=1e-2)


def test_pairs_of_another_norm_are_other_pairs(tmp_path):
    for norm in (None, "last_dim", "per_sample"):
        teacher = load_teacher(tiny_unet_pipeline(), null_label=3, guidance_norm=norm)
        teacher_pairs(teacher, 3, 1, 4.0, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "lumina2", "sd"])
def test_nodes_are_guided_as_their_teacher_is(name):
    """DisBack's target that is a copy of the critic: guidance as an input, and the pipeline's norm, go through it."""
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size, prompts=PROMPTS)
    method = DisBack(DisBackConfig(degradation_steps=2, degradation_every=1, interval=[9],
                                   host=HostConfig(guidance_scale=3.0)), teacher)
    assert method.node is not None
    target = type(teacher)(method.node, teacher.path, teacher.shape, prompts=teacher.prompts)
    assert target.takes_guidance == teacher.takes_guidance == (name == "flux-dev")
    x, t = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    condition = teacher.encode(prompts=PROMPTS[:2])
    got, expected = (model.velocity(x, t, condition, 3.0) for model in (target, teacher))
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, teacher.velocity(x, t, condition, 1.0), atol=1e-4)


def test_teachers_without_two_sides_refuse_it():
    with pytest.raises(UserError, match="guidance is an input of"):
        load_teacher(FAMILIES["flux-dev"].make(), image_size=16, guidance_norm="last_dim")
    with pytest.raises(UserError, match="cannot be guided: it has no null label and takes no prompts"):
        load_teacher(tiny_unet_pipeline(num_class_embeds=None), guidance_norm="per_sample")
    with pytest.raises(UserError, match=r"teacher.guidance_norm is 'scalar'; allowed are none, per_sample, last_dim"):
        load_teacher(tiny_unet_pipeline(), null_label=3, guidance_norm="scalar")


def test_inspect_says_it():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3, guidance_norm="per_sample")
    assert "classifier-free guidance possible, the norm kept: per_sample\n" in teacher.describe()
