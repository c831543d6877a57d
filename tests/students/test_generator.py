"""Generators: initialisation, start times, disk, and export to stock diffusers."""

import re

import pytest
import torch

from flowdistill.export import export
from flowdistill.students import Generator, StudentInfo, given_times, load_student, start_time
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from tests.students.test_student import FAMILIES, SCHEDULERS, noise


def teacher_of(family="unet", scheduler="flow"):
    return load_teacher(FAMILIES[family](SCHEDULERS[scheduler]()), null_label=3 if family == "unet" else None)


def trained(teacher, start=None):
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", "tiny"), start)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return student


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_teachers_denoiser_bit_for_bit(family, scheduler, share):
    teacher = teacher_of(family, scheduler)
    t = share * teacher.t_max
    student = Generator.from_teacher(teacher, StudentInfo(), t)
    n, condition = noise(student), teacher.encode([0, 1, 2])
    assert torch.equal(student(n, condition), teacher.denoise(t * n, t, condition))
    assert not torch.equal(student(n, condition), teacher.denoise(t * n, 0.9 * t, condition))


def test_start_times():
    flow, ddpm, edm = (teacher_of(scheduler=name) for name in ("flow", "epsilon", "edm"))
    assert start_time(flow, None) == 1.0 and start_time(ddpm, None) == ddpm.t_max
    assert start_time(flow, 0.7) == 0.7
    alpha_bar = ddpm.scheduler.alphas_cumprod[399].double().item()
    assert alpha_bar == pytest.approx(0.42609, abs=1e-5)  # Stable Diffusion's own schedule
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    assert start_time(ddpm, 399, "timestep") == pytest.approx(sigma / (alpha + sigma), abs=1e-12)
    assert start_time(ddpm, sigma / alpha, "sigma") == pytest.approx(start_time(ddpm, 399, "timestep"), abs=1e-12)
    assert start_time(edm, 2.5, "sigma") == 2.5 / 3.5
    for start, unit in ((1000.0, "linear"), (0.0, "linear"), (1200.0, "timestep"), (1e6, "sigma")):
        with pytest.raises(UserError, match=r"method.start is .* this teacher allows"):
            start_time(ddpm, start, unit)
    for teacher, start, hint in ((ddpm, 399, "if 399 is a timestep of the network, set method.start_unit to timestep"),
                                 (edm, 80.0, "if 80 is a noise level (sigma), set method.start_unit to sigma")):
        with pytest.raises(UserError, match=re.escape(f"; {hint}")):
            start_time(teacher, start)


@pytest.mark.parametrize("times", [[1, 1e-9, 1e-10, 1e-11], [1, 0.5, 0.4999999, 0.1], [1, 1e-8]])
def test_times_that_schedulers_cannot_tell_apart(times):
    with pytest.raises(UserError, match="method.step_times is .*; schedulers cannot tell times apart that are closer"):
        given_times(teacher_of(scheduler="flow"), len(times), None, "linear", times)


@pytest.mark.parametrize("scheduler", ["flow", "epsilon", "edm"])
def test_disk_round_trip(tmp_path, scheduler):
    teacher = teacher_of(scheduler=scheduler)
    student = trained(teacher, 0.8 * teacher.t_max)
    student.save(tmp_path / "student")
    again = load_student(tmp_path)
    assert isinstance(again, Generator) and again.info == student.info and again.t_start == student.t_start
    n, condition = noise(student), student.encode([0, 1, 2])
    assert torch.equal(again(n, condition), student(n, condition))
    assert torch.equal(again.generate([0, 1], 4, seed=2), student.generate([0, 1], 4, seed=2))
    with pytest.raises(UserError, match="guidance_scale is 2.0.*only 1.0"):
        again(n, condition, 2.0)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_pipeline_gives_the_same_images(tmp_path, family, scheduler, share):
    from diffusers import DiffusionPipeline

    teacher = teacher_of(family, scheduler)
    student = trained(teacher, share * teacher.t_max)
    export(student, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"batch_size": 3} if family == "unet" else {"guidance_scale": 1}
    images = pipe(num_inference_steps=1, class_labels=[0, 1, 2], generator=torch.Generator().manual_seed(5),
                  output_type="pt", **kwargs).images
    expected = student.decode(student(noise(student), student.encode([0, 1, 2])))
    assert 0.01 < expected.std() < 1
    assert (images - expected).abs().max() < 1e-5
