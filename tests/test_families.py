"""Every text-to-image family against its own pipeline, on tiny random pipelines of real diffusers classes."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from flowdistill.errors import UserError
from flowdistill.methods.base import Draw
from flowdistill.methods.boot import Boot, BootConfig
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.path import path_from_scheduler
from flowdistill.student import FlowMap, StudentInfo, export, load_student
from flowdistill.teacher import load_teacher
from tests.families import FAMILIES, NEGATIVE, PROMPTS, VP, pipeline_latents

FLOW = ("sd3", "flux-dev", "flux-schnell", "sana", "lumina2", "qwen-image", "z-image")


def noise(model, rows=2):
    return torch.randn(rows, *model.shape, generator=torch.Generator().manual_seed(1))


def teacher_of(name, **settings):
    family = FAMILIES[name]
    pipeline = family.make()
    return pipeline, load_teacher(pipeline, image_size=family.image_size, **settings)


def difference(name, scale, negative=None, steps=4, change=None):
    """Largest difference of latents between a teacher's Euler steps and its pipeline's own call.

    ``change(teacher, condition, settings)`` may spoil something, and returns the condition.
    """
    pipeline, teacher = teacher_of(name)
    n = noise(teacher)
    negatives = None if negative is None else [negative] * len(n)
    condition = teacher.encode(prompts=PROMPTS[: len(n)], negative_prompts=negatives)
    settings = {"guidance_scale": scale}
    if change is not None:
        condition = change(teacher, condition, settings)
    ours = teacher.sample(n, condition, steps=steps, **settings)
    theirs = pipeline_latents(pipeline, FAMILIES[name], n, steps, scale, negative)
    assert 0.1 < theirs.std() < 20
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_those_of_the_pipeline(name):
    family = FAMILIES[name]
    assert difference(name, 1.0) < 1e-4
    assert difference(name, family.guidance) < 1e-4
    if family.negative:
        assert difference(name, family.guidance, NEGATIVE) < 1e-4


def no_guidance(teacher, condition, settings):
    settings["guidance_scale"] = 1.0
    return condition


def other_prompts(teacher, condition, settings):
    return condition[torch.tensor([1, 0])]


def wrong_schedule(teacher, condition, settings):
    if teacher.path.kind == "flow":  # all times of the pipeline, but another shift
        settings["times"] = [1.0, 0.6, 0.4, 0.2, 0.0]
    else:
        wrong = "epsilon" if teacher.path.prediction == "v_prediction" else "v_prediction"
        teacher.network.path = path_from_scheduler(DDIMScheduler(**VP, prediction_type=wrong))
    return condition


def wrong_sign(teacher, condition, settings):
    call = teacher.network.forward
    teacher.network.forward = lambda *arguments: -call(*arguments)
    return condition


@pytest.mark.parametrize("mistake", [no_guidance, other_prompts, wrong_schedule, wrong_sign])
@pytest.mark.parametrize("name", FAMILIES)
def test_mistakes_are_seen(name, mistake):
    assert difference(name, FAMILIES[name].guidance, change=mistake) > 1e-3


# --- students


def student_of(name, guidance_range=None, trained=False, **settings):
    pipeline, teacher = teacher_of(name, **settings)
    student = FlowMap.from_teacher(teacher, StudentInfo("freeflow", name, guidance_range, 1.0))
    if trained:  # stands for training: every weight, and the zero-initialised embeddings above all
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in student.network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return pipeline, teacher, student


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_starts_as_the_teachers_euler_step(name):
    _, teacher, student = student_of(name, (1.0, 2.0))
    n, condition = noise(teacher), teacher.encode(prompts=PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(student(n, condition), teacher.sample(n, condition, times=[teacher.t_max, 0.0]))


@pytest.mark.parametrize("method", ["freeflow", "boot"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_training_step(name, method):
    _, teacher = teacher_of(name, prompts=PROMPTS)
    if method == "freeflow":
        trained = FreeFlow(FreeFlowConfig(guidance_max=2.0), teacher)
    else:
        trained = Boot(BootConfig(guidance_scale=2.0), teacher)
    networks = {role: part.network for role, part in trained.roles().items()}
    for role, network in networks.items():
        before = {key: value.clone() for key, value in network.state_dict().items()}
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        loss, _ = trained.loss(role, networks, Draw(0, 1, rows=4))
        loss.backward()
        optimizer.step()
        moved = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
        assert loss.isfinite() and len(moved) > len(before) / 2, (role, len(moved), len(before))


@pytest.mark.parametrize("name", FAMILIES)
def test_disk_round_trip(tmp_path, name):
    _, teacher, student = student_of(name, (1.0, 2.0), trained=True, prompts=PROMPTS)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    n, condition = noise(student), teacher.encode(prompts=PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(again(n, condition, 1.25), student(n, condition, 1.25))
    images = again.generate(num_images=2)
    assert torch.equal(images, student.generate(num_images=2)) and 0.01 < images.std() < 0.5
    reencoded = again.encode(prompts=PROMPTS[:2])
    for key, value in condition.tensors.items():
        assert torch.equal(value, reencoded.tensors[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_pipeline_gives_the_same_latents_and_images(tmp_path, name):
    _, _, student = student_of(name, (1.0, 2.0), trained=True)
    export(student, tmp_path / "out", guidance_scale=1.25)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    line = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "pipe(" in line)
    family, n = FAMILIES[name], noise(student)
    expected = student(n, student.encode(prompts=PROMPTS[:2]), 1.25)
    size = {"height": student.prompts.image_size[0], "width": student.prompts.image_size[1]}
    call = eval(f"dict({line.split('(', 1)[1].split(').images')[0].split(', ', 1)[1]})")  # as the README says
    assert call.pop("num_inference_steps") == 1 and {key: call[key] for key in size} == size
    call |= family.call
    for output in ("latent", "pt"):
        images = pipe(prompt=PROMPTS[:2], latents=family.pack(n.clone()), num_inference_steps=1, output_type=output,
                      **call).images
        if output == "latent":
            assert (family.unpack(images) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
        else:
            assert (images - student.decode(expected)).abs().max() < 1e-3


def test_a_flow_student_from_a_later_start_has_no_stock_pipeline(tmp_path):
    _, _, student = student_of("sd3", t_max=0.9)
    with pytest.raises(UserError, match="starts at the noise itself.*t_max = 0.9000"):
        export(student, tmp_path / "out")
