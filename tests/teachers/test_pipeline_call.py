"""The pipeline's own call, through its scheduler, against the pipeline itself: settings, guidance, noise and all."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from flowdistill.data import load_digits
from flowdistill.evaluation.evaluate import evaluate, pipeline_sampler
from flowdistill.evaluation.generation import generators_of
from flowdistill.features import load_features
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS, pipeline_latents
from tests.pixel_families import scheduler_images
from tests.teachers.test_families import condition_of, noise, teacher_of
from tests.tiny import VP, lively, tiny_unet, tiny_unet_pipeline

# With one step PixArt-alpha's pipeline takes the second thing that a step returns, and its DPM solver returns but one.
MEASURED = [(name, steps) for name in FAMILIES for steps in (1, 3)
            if name != "karras-ve" and (name, steps) != ("pixart-alpha", 1)]
NOISY = {
    "ddpm": lambda: DDPMPipeline(lively(tiny_unet(num_class_embeds=None)), DDPMScheduler()),
    "sd, Euler ancestral": lambda: stable_diffusion(EulerAncestralDiscreteScheduler(**VP, steps_offset=1)),
    "sd, LCM": lambda: stable_diffusion(LCMScheduler(**VP)),
    "sd, SDE": lambda: stable_diffusion(diffusers.DPMSolverMultistepScheduler(
        **VP, algorithm_type="sde-dpmsolver++", steps_offset=1)),
    "sd, KDPM2 ancestral": lambda: stable_diffusion(diffusers.KDPM2AncestralDiscreteScheduler(**VP, steps_offset=1)),
    "sd, TCD": lambda: stable_diffusion(diffusers.TCDScheduler(**VP, steps_offset=1)),
    "sd, Heun": lambda: stable_diffusion(diffusers.HeunDiscreteScheduler(**VP, steps_offset=1)),
    "sd, PNDM": lambda: stable_diffusion(diffusers.PNDMScheduler(**VP, skip_prk_steps=True, steps_offset=1)),
    "sd, UniPC": lambda: stable_diffusion(diffusers.UniPCMultistepScheduler(**VP, steps_offset=1)),
}


def stable_diffusion(scheduler):
    pipeline = FAMILIES["sd"].make()
    pipeline.scheduler = scheduler
    return pipeline


def generators(count=2):
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


@pytest.mark.parametrize(("name", "steps"), MEASURED)
def test_the_pipelines_own_call(name, steps):
    """With its own scheduler, whatever its spacing and order; images where the pipeline returns nothing else."""
    family, (pipeline, teacher) = replace(FAMILIES[name], scheduler=None), teacher_of(name)
    guided = family.guidance if teacher.can_guide else 1.0
    n, condition = noise(teacher), condition_of(name, teacher)
    ours = teacher.pipeline_sample(n, condition, steps, guided)
    if family.loop:
        pipeline.set_progress_bar_config(disable=True)
        if teacher.path.kind == "flow":  # its plain set_timesteps, as pipelines call it
            theirs = flow_images(pipeline, n, steps, guided, family)
        else:
            theirs = scheduler_images(pipeline, n, steps, guided, family.labels, family.null_label)
    else:
        if (name, steps) == ("qwen-image", 1):  # NaN by itself: see tests/teachers/test_families.py
            pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift_terminal=None)
        theirs = pipeline_latents(pipeline, family, n, steps, guided)
    ours = ours if family.prompts else teacher.decode(ours)
    size = max(1, theirs.abs().max())
    assert theirs.isfinite().all() and theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-4 * size
    assert teacher.pipeline_calls(steps) == len(pipeline.scheduler.timesteps)


def flow_images(pipeline, sample, steps, scale, family):
    scheduler, labels = pipeline.scheduler, torch.tensor(family.labels)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out, null = (pipeline.transformer(sample, t.expand(2), class_labels=given).sample[:, :4].detach()
                     for given in (labels, torch.full_like(labels, family.null_label)))
        sample = scheduler.step(null + scale * (out - null), t, sample).prev_sample
    return (pipeline.vae.decode(sample / pipeline.vae.config.scaling_factor).sample.detach() / 2 + 0.5).clamp(0, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOISY)
def test_noise_of_the_schedulers_own(name):
    """Stochastic schedulers and those of second order, with one generator a sample, as the pipeline draws it."""
    pipeline = NOISY[name]()
    pipeline.set_progress_bar_config(disable=True)
    teacher = load_teacher(pipeline)
    ours, theirs = generators(), generators()
    if teacher.prompts is None:
        n = torch.cat([torch.randn(1, *teacher.shape, generator=one) for one in ours])  # what its call draws first
        own = pipeline(batch_size=2, generator=theirs, num_inference_steps=4, output_type="np").images
        own = torch.from_numpy(own).permute(0, 3, 1, 2)
        got = teacher.decode(teacher.pipeline_sample(n, None, 4, generators=ours))
        other = teacher.decode(teacher.pipeline_sample(n, None, 4, generators=generators()))
    else:
        n, condition = noise(teacher), teacher.encode(prompts=PROMPTS[:2])
        own = pipeline(prompt=PROMPTS[:2], latents=n.clone(), num_inference_steps=4, guidance_scale=3.0,
                       generator=theirs, output_type="latent").images
        got = teacher.pipeline_sample(n, condition, 4, 3.0, ours)
        other = teacher.pipeline_sample(n, condition, 4, 3.0, [torch.Generator().manual_seed(i) for i in (1, 2)])
    size = max(1, own.abs().max())
    assert (got - own).abs().max() < 1e-4 * size
    noisy = name not in ("sd, TCD", "sd, Heun", "sd, PNDM", "sd, UniPC")
    assert ((got - other).abs().max() > 1e-2) == noisy
    assert ("adds noise at its steps" in teacher.describe()) == noisy


def test_what_has_no_own_call_says_why():
    with pytest.raises(UserError, match="teacher exact has no pipeline, so the pipeline's own call cannot be measured"):
        exact_teacher(GaussianVelocity(torch.zeros(2), 1.0)).pipeline_sample(torch.zeros(1, 2))
    _, teacher = teacher_of("karras-ve")
    with pytest.raises(UserError, match="takes two calls a step.*leave evaluation.pipeline_steps empty"):
        teacher.pipeline_calls(4)
    assert "not measured: KarrasVePipeline takes two calls a step" in teacher.describe()
    learned = load_teacher(tiny_unet_pipeline(DDPMScheduler(variance_type="learned_range"), out_channels=2))
    with pytest.raises(UserError, match="steps with a variance that the network learned"):
        learned.pipeline_calls(4)
    pndm = load_teacher(stable_diffusion(diffusers.PNDMScheduler(**VP, steps_offset=1)))
    with pytest.raises(UserError, match="own call with 2 steps is refused by its PNDMScheduler"):
        pndm.pipeline_calls(2)


def test_a_samples_generator_is_its_own():
    """Of its noise alone: the same in any batch, and another for another sample."""
    n = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = [one.initial_seed() for one in generators_of(n)]
    assert whole == [one.initial_seed() for row in n for one in generators_of(row[None])] and len(set(whole)) == 6
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None))
    sample = pipeline_sampler(teacher, 3)
    assert (sample(n, None) - torch.cat([sample(n[:2], None), sample(n[2:], None)])).abs().max() < 1e-5


def test_rows_of_the_pipelines_own_call(tmp_path):
    """In the report beside the deterministic solver's, on the same noise, and with what is to be known of both."""
    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None))
    measured = {"features": "digits", "reference": "digits", "cache_dir": tmp_path, "progress": False}
    options = measured | {"teacher_steps": [2]}
    report = evaluate(teacher, 40, pipeline_steps=[2, 3], **options)
    assert [(row.model, row.calls) for row in report.rows] == [("teacher", 2), ("pipeline", 2), ("pipeline", 3)]
    again = evaluate(teacher, 40, pipeline_steps=[2, 3], batch_size=7, **options)
    assert [row.fid for row in again.rows] == pytest.approx([row.fid for row in report.rows], rel=1e-5)
    assert "adds noise at its steps" in report.protocol["pipeline"]
    assert report.protocol["teacher_remarks"] == teacher.remarks() and teacher.remarks()[0] in str(report)
    plain = evaluate(teacher, 40, **options)
    assert [row.model for row in plain.rows] == ["teacher"] and "pipeline" not in plain.protocol
    with pytest.raises(UserError, match=r"pipeline_steps is \[0\]"):
        evaluate(teacher, 40, pipeline_steps=[0], **options)
    only = evaluate(teacher, 40, pipeline_steps=[2], **measured, teacher_steps=[])
    assert [row.model for row in only.rows] == ["pipeline"]


def test_a_solver_much_worse_than_the_pipeline_is_said(tmp_path):
    """Its own call draws the reference, and its ODE draws noise."""
    images, teacher = load_digits()[0], load_teacher(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None))

    def own(noise, condition, steps, guidance_scale, generators):
        return 2 * images[[int(torch.randint(len(images), (1,), generator=one)) for one in generators]] - 1

    teacher.sample, teacher.pipeline_sample = (lambda noise, *arguments, **settings: noise), own
    options = {"pipeline_steps": [10], "cache_dir": tmp_path, "progress": False}
    report = evaluate(teacher, 100, "digits", "digits", [1, 4], **options)
    note = report.protocol["pipeline_note"]
    assert "the deterministic solver is much worse than the pipeline's own call" in note and "at 10; compare" in note
    assert f"teacher: {note}" in str(report)
    named = replace(load_features("digits", "cpu"), hash="other", distance="FD-CLIP")
    other = evaluate(teacher, 100, "digits", named, [1, 4], **options).protocol["pipeline_note"]
    assert "pipeline's own call: FD-CLIP" in other and "FID" in note and "FID" not in other
    teacher.sample = lambda noise, condition, **settings: own(noise, condition, 1, 1.0, generators_of(noise))
    options["cache_dir"] = tmp_path / "another"  # the weights are the same, whatever this teacher's sampler does
    assert "pipeline_note" not in evaluate(teacher, 100, "digits", "digits", [4], **options).protocol
