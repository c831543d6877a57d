"""The two ways to tell a flow map its target time: ``reuse`` asks the backbone at t_max - d, scales frozen at t_max."""

import copy
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from flowdistill.export import export
from flowdistill.methods.boot import Boot, BootConfig
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students import FlowMap, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.training.average import MovingAverage
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler,
    "epsilon": lambda: DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    "v": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "sample": lambda: DDPMScheduler(prediction_type="sample", clip_sample=False),
    "edm": EDMEulerScheduler,
}
FAMILIES = {"unet": tiny_unet_pipeline, "dit": tiny_dit_pipeline}
every_pipeline = [pytest.mark.parametrize("scheduler", SCHEDULERS), pytest.mark.parametrize("family", FAMILIES)]


def on_every_pipeline(test):
    for mark in every_pipeline:
        test = mark(test)
    return test


def student_of(family="unet", scheduler="flow", guidance=None, trained=False, target_time="reuse"):
    teacher = load_teacher(FAMILIES[family](SCHEDULERS[scheduler]()), null_label=3 if family == "unet" else None)
    info = StudentInfo("boot", "tiny", guidance, 1.5 if guidance else 1.0)
    student = FlowMap.from_teacher(teacher, info, target_time=target_time)
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in student.network.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return teacher, student


def noise(student, rows=3):
    return torch.randn(rows, *student.shape, generator=torch.Generator().manual_seed(5))


@on_every_pipeline
def test_before_training_the_backbone_is_asked_at_the_target_time(family, scheduler):
    teacher, student = student_of(family, scheduler)
    assert len(student.network.embeddings) == 0  # nothing but the teacher's weights
    n, condition, path = noise(student), teacher.encode([0, 1, 2]), teacher.path
    start, time = teacher.t_max * n, torch.full((3,), teacher.t_max, dtype=torch.float64)
    at_prior = path.coefficients(time)
    wide = (-1, 1, 1, 1)
    for d in (0.0, 0.3, teacher.t_max):
        duration = torch.full((3,), d, dtype=torch.float64)
        asked = path.coefficients((time - duration).clamp(min=teacher.t_min)).timestep
        raw = teacher.network.family.call(
            teacher.network.backbone, start * at_prior.input_scale.float().reshape(wide), asked.float(), condition
        )
        expected = start * at_prior.state.float().reshape(wide) + raw * at_prior.output.float().reshape(wide)
        average = student.network(start, time, condition, duration=duration)
        assert torch.equal(average, expected)
        at_boundary = torch.equal(average, teacher.velocity(start, teacher.t_max, condition))
        assert at_boundary == (d == 0)  # the boundary holds bit for bit, and the target time matters


@pytest.mark.parametrize("family", FAMILIES)
def test_boundary_loss_is_zero_before_training_and_gradients_reach_the_time_channel(family):
    teacher = load_teacher(FAMILIES[family](), null_label=3 if family == "unet" else None)
    method = Boot(BootConfig(target_time="reuse"), teacher)
    network = method.student().network
    loss, metrics = method.loss("student", {"student": network}, Draw(0, 0, rows=8))
    # Not bit for bit: the student's rows share a pass with others, and a larger batch may round differently.
    assert metrics["boundary_error"] < 1e-8 and metrics["bootstrap_error"] > 1e-6
    loss.backward()
    for module in teacher.network.family.time_embeddings(network.velocity.backbone):
        assert module.linear_2.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.network.parameters())


def test_guidance_keeps_its_embedding():
    teacher, student = student_of(guidance=(1.0, 2.0), trained=True)
    assert list(student.network.embeddings) == ["guidance"]
    n, condition = noise(student), teacher.encode([0, 1, 2])
    assert not torch.equal(student(n, condition, 1.0), student(n, condition, 2.0))


def test_copies_and_averages_keep_the_wiring():
    teacher, student = student_of()
    n, condition = noise(student), teacher.encode([0, 1, 2])
    for other in (copy.deepcopy(student.network), MovingAverage(student.network, 0.9, False).network):
        assert torch.equal(student.with_network(other)(n, condition), student(n, condition))
        assert not torch.equal(student.with_network(other)(n, condition), teacher.sample(n, condition, steps=1))


@on_every_pipeline
def test_disk_round_trip(tmp_path, family, scheduler):
    _, student = student_of(family, scheduler, trained=True)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    n, condition = noise(student), student.encode([0, 1, 2])
    assert again.network.target_time == "reuse"
    for duration in (None, 0.4):
        assert torch.equal(again(n, condition, duration=duration), student(n, condition, duration=duration))


def test_older_descriptions_are_separate_and_unknown_ones_are_refused(tmp_path):
    _, student = student_of(trained=True, target_time="separate")
    student.save(tmp_path / "s")
    file = tmp_path / "s" / "flowdistill.json"
    description = json.loads(file.read_text())
    assert description.pop("target_time") == "separate"
    file.write_text(json.dumps(description))
    n, condition = noise(student), student.encode([0, 1, 2])
    assert torch.equal(load_student(tmp_path / "s")(n, condition), student(n, condition))
    file.write_text(json.dumps(description | {"target_time": "both"}))
    with pytest.raises(UserError, match="target_time 'both'; this version knows separate, reuse"):
        load_student(tmp_path / "s")
    with pytest.raises(ValueError, match="target_time is 'both'"):
        ExtendedVelocity(student.network.velocity, (), "both")


@on_every_pipeline
def test_exported_pipeline_gives_the_same_images(tmp_path, family, scheduler):
    _, student = student_of(family, scheduler, guidance=(1.0, 2.0), trained=True)
    export(student, tmp_path / "out", guidance_scale=1.25)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"batch_size": 3} if family == "unet" else {"guidance_scale": 1}
    images = pipe(num_inference_steps=1, class_labels=[0, 1, 2], generator=torch.Generator().manual_seed(5),
                  output_type="pt", **kwargs).images
    n, condition = noise(student), student.encode([0, 1, 2])
    expected = student.decode(student(n, condition, 1.25))
    assert 0.01 < expected.std() < 1
    assert (images - expected).abs().max() < 1e-5
    separate = FlowMap.from_teacher(student_of(family, scheduler)[0], student.info)
    separate.network.load_state_dict(student.network.state_dict(), strict=False)
    # The constant is that of time 0: the same weights asked at t_max draw something else.
    assert (separate.decode(separate(n, condition, 1.25)) - expected).abs().max() > 1e-3
