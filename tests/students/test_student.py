"""Flow-map students: initialisation, disk, one-step sampling, and export to stock diffusers."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from flowdistill.export import export
from flowdistill.students import FlowMap, StudentInfo, is_student_folder, load_student
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import indexed_noise
from tests.students_of_steps import noises, pixel_student
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler,
    "epsilon": lambda: DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     clip_sample=False),
    "v": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "sample": lambda: DDPMScheduler(prediction_type="sample", clip_sample=False),
    "edm": EDMEulerScheduler,
}
FAMILIES = {"unet": tiny_unet_pipeline, "dit": tiny_dit_pipeline}


def student_of(family="unet", scheduler="flow", guidance=None, trained=False, target_time="separate"):
    teacher = load_teacher(FAMILIES[family](SCHEDULERS[scheduler]()), null_label=3 if family == "unet" else None)
    info = StudentInfo("freeflow", "tiny", guidance, 1.5 if guidance else 1.0, {"damping": 1.0})
    student = FlowMap.from_teacher(teacher, info, target_time=target_time)
    if trained:  # stands for training: every weight, and the zero-initialised embeddings above all
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in student.network.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return teacher, student


def noise(student, rows=3):
    return torch.randn(rows, *student.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_teachers_euler_step_bit_for_bit(family, scheduler):
    teacher, student = student_of(family, scheduler, guidance=(1.0, 2.0))
    n, condition = noise(student), teacher.encode([0, 1, 2])
    assert torch.equal(student(n, condition), teacher.sample(n, condition, steps=1))
    start, time = teacher.t_max * n, torch.full((3,), teacher.t_max, dtype=torch.float64)
    for d in (0.0, 0.3):  # the average velocity is v(start, t_max) for every duration and guidance scale
        column = torch.full((3,), d)
        average = student.network(start, time, condition, duration=column, guidance=1 + column)
        assert torch.equal(average, teacher.velocity(start, teacher.t_max, condition))
    assert torch.equal(student(n, condition, duration=0.0), start)


def test_deep_copy_owns_its_extra_embedding():
    _, student = student_of(trained=True)
    other = copy.deepcopy(student.network)
    time, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3)
    condition, n = student.encode([0, 1, 2]), noise(student)
    first = student.network(n, time, condition, duration=zero)
    other(n, time, condition, duration=zero + 0.9)
    assert torch.equal(first, student.network.velocity(n, time, condition))  # which adds what the network last told it
    assert torch.equal(first, other(n, time, condition, duration=zero))
    assert not torch.equal(first, other(n, time, condition, duration=zero + 0.9))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    """Also when another forward pass, with other scalars, comes between forward and backward."""
    _, student = student_of(family, trained=True)
    network, n, condition = student.network, noise(student), student.encode([0, 1, 2])
    time = torch.ones(3, dtype=torch.float64)

    def gradients():
        network.zero_grad()
        out = network(n, time, condition, duration=torch.tensor([0.1, 0.5, 0.9]))
        with torch.no_grad():
            network(n, time, condition, duration=torch.zeros(3))
        out.square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    network.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["flow", "epsilon"])
def test_disk_round_trip(tmp_path, scheduler):
    _, student = student_of(scheduler=scheduler, guidance=(1.0, 2.0), trained=True)
    student.save(tmp_path / "run" / "student")
    student.save(tmp_path / "run" / "student")  # replacing is fine
    assert is_student_folder(tmp_path / "run") and not is_student_folder(tmp_path)
    again = load_student(tmp_path / "run")
    assert again.info == student.info and again.t_max == student.t_max
    n, condition = noise(student), student.encode([0, 1, 2])
    assert torch.equal(again(n, condition, 1.25), student(n, condition, 1.25))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["student"]


def test_latent_student_carries_its_autoencoder(tmp_path):
    teacher, student = student_of("dit", trained=True)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    latents = noise(student)
    assert torch.equal(again.decode(latents), teacher.decode(latents))
    assert again.decode(latents).shape == (3, 3, 8, 8)


def test_damaged_students(tmp_path):
    _, student = student_of()
    student.save(tmp_path / "s")
    weights = tmp_path / "s" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_student(tmp_path / "s")
    weights.write_bytes(content)
    (tmp_path / "s" / "flowdistill.json").write_text("{")
    with pytest.raises(UserError, match="flowdistill.json is not valid JSON"):
        load_student(tmp_path / "s")
    with pytest.raises(UserError, match="does not exist"):
        load_student(tmp_path / "no" / "such")
    with pytest.raises(UserError, match="holds no student"):
        load_student(tmp_path)


def test_generate_does_not_depend_on_the_batch_size():
    _, student = student_of(trained=True)
    many = student.generate(labels=[0, 1], num_images=7, seed=4, batch_size=7)
    few = student.generate(labels=[0, 1], num_images=7, seed=4, batch_size=2)
    assert many.shape == (7, 1, 8, 8) and 0 <= many.min() and many.max() <= 1
    assert torch.allclose(many, few, atol=1e-5)
    assert not torch.allclose(many, student.generate(labels=[0, 1], num_images=7, seed=5), atol=1e-2)
    with pytest.raises(UserError, match="num_images is 0"):
        student.generate(num_images=0)
    with pytest.raises(UserError, match="label 3 is out of range"):
        student.generate(labels=[3])
    with pytest.raises(UserError, match="guidance_scale is 2.0.*only 1.0"):
        student.generate(labels=[0], guidance_scale=2.0)


@pytest.mark.parametrize("target_time", ["separate", "reuse"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_is_the_forward_pass_bit_for_bit(family, scheduler, target_time):
    _, student = student_of(family, scheduler, (1.0, 2.0), True, target_time)
    n, condition = noise(student), student.encode([0, 1, 2])
    with torch.no_grad():
        for scale in (None, 2.0):
            one_step = student.sampler(scale)
            for rows in (3, 1):  # one value serves batches of any size
                assert torch.equal(one_step(n[:rows], condition[:rows]), student(n[:rows], condition[:rows], scale))
        kept = student.sampler(2.0)
        student.sampler(1.0)(n, condition)  # another one does not change it, nor does the map to a middle time
        student(n, condition, duration=0.3)
        assert torch.equal(kept(n, condition), student(n, condition, 2.0))
    with pytest.raises(UserError, match="guidance_scale is 3.0"):
        student.sampler(3.0)


def test_generate_embeds_its_constants_once_and_images_are_those_of_the_forward_pass():
    _, student = student_of(guidance=(1.0, 2.0), trained=True)
    embedded = []
    for embedding in student.network.embeddings.values():
        embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    images = student.generate(num_images=9, seed=4, batch_size=3, guidance_scale=2.0)
    assert len(embedded) == 2  # duration and guidance
    with torch.no_grad():
        for rows in (range(3), range(3, 6), range(6, 9)):
            made = student.decode(student(indexed_noise(student.shape, 4, rows), student.examples(rows), 2.0))
            assert torch.equal(images[rows.start : rows.stop], made)


def test_the_type_a_network_computes_in_follows_it():
    teacher, student = student_of()
    network = student.network.velocity
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert network.to(dtype).dtype == network.backbone.dtype == dtype
    assert copy.deepcopy(network).half().dtype == torch.float16 and network.dtype == torch.float32
    half = teacher.network.frozen_copy()
    half.backbone.half()
    assert half.dtype == torch.float16 and half.trainable_copy().dtype == torch.float32


LOAD = """
import json, sys, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with open(folder + "/flowdistill.json") as file:
        record = json.load(file)
    given = dict(output_type="pt", generator=torch.Generator().manual_seed(5), **record["call"])
    if "guidance_scale" not in given:
        given["batch_size"] = 3
    if "label" not in record:
        given["class_labels"] = [0, 1, 2]
    torch.save(pipe(**given).images, folder + ".pt")
assert not any(name.startswith("flowdistill") for name in sys.modules)
"""
SEVERAL = {
    "unet-steps": lambda: pixel_student(SCHEDULERS["epsilon"]()),
    "dit-steps": lambda: pixel_student(SCHEDULERS["flow"](), "deterministic", dit=True),
    "class-steps": lambda: pixel_student(SCHEDULERS["flow"]()),  # a pipeline for each class
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_pipeline_gives_the_same_images(tmp_path, family, scheduler):
    """In this process for every path; ``test_export_loads_without_flowdistill`` uses a fresh interpreter."""
    from diffusers import DiffusionPipeline

    _, student = student_of(family, scheduler, guidance=(1.0, 2.0), trained=True)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    export(student, tmp_path / "out", guidance_scale=1.25)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"batch_size": 3} if family == "unet" else {"guidance_scale": 1}
    images = pipe(num_inference_steps=1, class_labels=[0, 1, 2], generator=torch.Generator().manual_seed(5),
                  output_type="pt", **kwargs).images
    expected = student.decode(student(noise(student), student.encode([0, 1, 2]), 1.25))
    assert 0.01 < expected.std() < 1
    assert (images - expected).abs().max() < 1e-5
    assert all(torch.equal(before[name], value) for name, value in student.network.state_dict().items())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Trained students, and a folder with the export of each and the images that stock diffusers makes with it."""
    folder = tmp_path_factory.mktemp("exported")
    students = {family: student_of(family, trained=True)[1] for family in FAMILIES}
    students |= {name: make() for name, make in SEVERAL.items()}
    for name, student in students.items():
        export(student, folder / name)
    loaded = [f"{name}/class-1" if name == "class-steps" else name for name in students]
    subprocess.run([sys.executable, "-c", LOAD, *loaded], check=True, cwd=folder)
    return students, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_export_loads_without_flowdistill(exported, family):
    students, folder = exported
    student, images = students[family], torch.load(folder / f"{family}.pt")
    expected = student.decode(student(noise(student), student.encode([0, 1, 2])))
    assert (images - expected).abs().max() < 1e-5
    with pytest.raises(UserError, match="not empty"):
        export(student, folder / family)


@pytest.mark.parametrize("name", SEVERAL)
def test_export_of_several_calls_loads_without_flowdistill(exported, name):
    """The pipeline's generator goes on where the start noise ends."""
    students, folder = exported
    one = name == "class-steps"
    student, images = students[name], torch.load(folder / (f"{name}/class-1.pt" if one else f"{name}.pt"))
    drawn = noises(student, 3, seed=5)
    condition = student.encode([1, 1, 1] if one else [0, 1, 2])
    with torch.no_grad():
        expected = student.decode(student(drawn[0], condition, between=lambda k: drawn[k - 1]))
    assert 0.01 < expected.std() < 1 and (images - expected).abs().max() < 1e-5
