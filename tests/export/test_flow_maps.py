"""Exported flow maps of several calls: the stock pipeline's own call makes what the student makes."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from flowdistill.export import export
from flowdistill.export.few_step_pipelines import plain_backbone
from flowdistill.export.pipelines import _with_constant_time
from flowdistill.export.time_fold import fold_time, time_folds
from flowdistill.methods.flow_map_matching import FlowMapMatching, FlowMapMatchingConfig
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.students import FlowMap, Generator, StudentInfo, exported_student
from flowdistill.students.steps import STEPPINGS, Steps
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from tests.export.test_few_step_pipelines import EXPORTED, encoding_once, own_latents, stock_images, with_lora
from tests.families import FAMILIES
from tests.students.test_two_times import map_of, noise
from tests.students_of_steps import moved, noises, pixel_student, steps_of


def family_map(name, stepping, count, guidance=(1.0, 2.0), **settings):
    """A map of a family's teacher that is not its start, of up to ``count`` calls."""
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size, null_label=family.null_label)
    info = StudentInfo("flow_map_matching", "tiny", guidance, 1.5 if guidance else 1.0)
    chains = [steps_of(teacher, k, stepping) for k in range(1, count + 1)]
    return with_steps(moved(FlowMap.from_teacher(teacher, info, chains=chains, **settings), 0.02))


def with_steps(student, count=None):
    """Beside the student its steps, as the tests of generators know them."""
    student.steps = student.chains[(count or student.num_steps) - 1]
    return student


@pytest.mark.parametrize("name", EXPORTED)
def test_the_stock_pipelines_call_makes_the_maps_images(tmp_path, name):
    """With guidance as an input fixed; by the stepping that it has, of families with two by each in turn."""
    stepping = EXPORTED[name][sorted(EXPORTED).index(name) % len(EXPORTED[name])]
    # The embedding of the tiny Lumina 2 has a condition number of 17,000 at four calls.
    student = family_map(name, stepping, 2 if name == "lumina2" else 4)
    before = {key: value.clone() for key, value in student.network.state_dict().items()}
    export(student, tmp_path / "out")
    assert all(torch.equal(before[key], value) for key, value in student.network.state_dict().items())
    pipe = encoding_once(DiffusionPipeline.from_pretrained(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((tmp_path / "out/flowdistill.json").read_text())["call"]
    drawn = noises(student)
    expected = own_latents(name, student, drawn)
    images, pictures = stock_images(pipe, name, student, call, drawn), student.decode(expected)
    assert 0.01 < pictures.std() < 1 and (images - pictures).abs().max() < 1e-5
    if FAMILIES[name].prompts:
        latents = stock_images(pipe, name, student, call, drawn, "latent")
        assert (latents - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("scheduler", ["flow", "epsilon"])
@pytest.mark.parametrize("count", [2, 8])
def test_other_numbers_of_calls(tmp_path, scheduler, count):
    """Of one student, each a pipeline of its own; of a flow UNet with classes a pipeline each."""
    _, student = map_of(scheduler, 8, guidance=(1.0, 3.0))
    export(student, tmp_path / "out", guidance_scale=2.5, steps=count)
    folder = tmp_path / "out" / ("class-1" if scheduler == "flow" else "")
    record = json.loads((folder / "flowdistill.json").read_text())
    assert record["guidance_scale"] == 2.5 and record["student_steps"]["times"] == list(student.chains[count - 1].times)
    assert "guidance scale 2.5 is part of the weights" in (folder / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels = {} if scheduler == "flow" else {"class_labels": [1, 1, 1]}
    images = pipe(batch_size=3, output_type="pt", generator=torch.Generator().manual_seed(5), **labels,
                  **record["call"]).images
    with torch.no_grad():
        expected = student.decode(student(noise(student), student.encode([1, 1, 1]), 2.5, steps=count))
    assert 0.01 < expected.std() < 1 and (images - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dit", [False, True])
def test_a_fold_is_exact_at_its_timesteps_and_of_one_call_the_constant(dit):
    teacher, student = map_of("epsilon", 4, guidance=(1.0, 2.0), dit=dit)
    x, condition = noise(student), student.encode([0, 1, 2])
    chain, path, family = student.chains[3], teacher.path, teacher.network.family
    folded = plain_backbone(student)
    fold_time(folded, time_folds(student, chain))
    plain = VelocityNetwork(folded, path, family)

    def gap(network, t, aim, x=x):
        with torch.no_grad():
            time = torch.full((3,), t, dtype=torch.float64)
            scalars = {"duration": torch.full((3,), t - aim), "guidance": torch.full((3,), 1.5)}
            own = student.network(x, time, condition, **scalars)
            return ((network(x, time, condition) - own).abs().max() / own.abs().max()).item()

    for t, aim in zip(chain.times, chain.aims, strict=True):
        assert gap(plain, t, aim) < 1e-5
        assert gap(plain, t, 0.5 * t) > 1e-4
    assert gap(plain, 0.4, 0.3) > 1e-4  # between them it is another network
    one = plain_backbone(student)
    fold_time(one, time_folds(student, Steps.single(student.t_start)))
    constant = VelocityNetwork(_with_constant_time(student, None), path, family)
    for network in (VelocityNetwork(one, path, family), constant):
        assert gap(network, student.t_start, 0.0) < 1e-5


def test_timesteps_that_the_embedding_cannot_tell_apart_are_refused(tmp_path):
    _, student = map_of(count=2)
    student.chains = (student.chains[0], Steps((1.0, 1.0 - 1e-9), "deterministic", 1.0))
    with pytest.raises(UserError, match=r"the 2 calls .* condition number [\d.e+inf]+, above 10000; export"):
        time_folds(student, student.chains[1])


def test_calls_that_a_generator_does_not_have(tmp_path):
    student = pixel_student(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="steps is 2; this student becomes a pipeline of its 4 calls only"):
        export(student, tmp_path / "out", steps=2)
    with pytest.raises(UserError, match="steps is 9; this student was trained for 8 calls"):
        export(map_of(count=8)[1], tmp_path / "out", steps=9)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_teachers_pipeline_takes_the_lora_file(tmp_path, name):
    """The fold is in it too, of rank 4 in the time embedding."""
    family = FAMILIES[name]
    student = family_map(name, "deterministic", 4, lora=LoraSettings(2, 3.0))
    drawn = noises(student)
    expected = own_latents(name, student, drawn)
    pipe, call, _ = with_lora(student, tmp_path, pipe=family.make())
    latents = stock_images(pipe, name, student, call, drawn, "latent")
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_command_line_exports_a_number_of_calls(tmp_path, cli):
    _, student = map_of("epsilon", 4)
    student.save(tmp_path / "run")
    result = cli("export", tmp_path / "run", tmp_path / "out", "--steps", 2)
    assert result.code == 0 and "num_inference_steps" in result.out, result.err
    again = exported_student(tmp_path / "out")
    assert isinstance(again, Generator) and again.steps == replace(student.chains[1], whole=True)
    images = again.generate(num_images=3, seed=2)
    assert (images - student.generate(num_images=3, seed=2, steps=2)).abs().max() < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert re.search(r"exactly at these 2 timesteps \(condition number [\d.]+\)", card)
    for steps in (1, 2):
        picture = tmp_path / f"{steps}.png"
        assert cli("sample", tmp_path / "run", "--num-images", 3, "--steps", steps, "--out", picture).code == 0
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()
    result = cli("sample", tmp_path / "run", "--steps", 5, "--out", tmp_path / "no.png")
    assert result.code == 2 and "trained for 4 calls, and takes 1 to 4" in result.err
    # What the fold is of is the export's calls: after fewer of them there is no image.
    result = cli("sample", tmp_path / "out", "--steps", 1, "--out", tmp_path / "no.png")
    assert result.code == 2 and "an image only after all of its 2 calls" in result.err
    assert list(again.step_counts) == [2] and not (tmp_path / "no.png").exists()


def test_a_pipeline_that_no_flow_scheduler_fits_is_refused_before_training():
    pipeline = FAMILIES["sd"].make()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="2 calls|2 steps|steps") as refused:
        FlowMapMatching(FlowMapMatchingConfig(steps=3), load_teacher(pipeline, prompts=["a"]))
    assert "\n" not in str(refused.value)


def test_steppings_have_their_aims():
    for stepping in STEPPINGS:
        steps = Steps((1.0, 0.6, 0.2), stepping, 1.0)
        assert steps.aims == ((0.6, 0.2, 0.0) if stepping == "deterministic" else (0.0, 0.0, 0.0))
