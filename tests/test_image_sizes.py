"""Sizes of images: rectangles through every family of prompts and the command line, and sizes that are none."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from flowdistill import load_student, load_teacher
from flowdistill.config import TeacherConfig, load_config
from flowdistill.export import export
from flowdistill.students import Generator, StudentInfo, exported_student
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS, Family, pipeline_latents, sdxl
from tests.students_of_steps import moved, steps_of

TEXT = [name for name, family in FAMILIES.items() if family.prompts]
WIDE, TALL = (32, 64), (64, 32)
ROWS = 2


@functools.lru_cache(maxsize=2)
def at(name: str, size: tuple[int, int]) -> tuple[Family, Any, Teacher]:
    pipeline = FAMILIES[name].make()
    teacher = load_teacher(pipeline, image_size=size)
    return FAMILIES[name].sized(*size, teacher.shape), pipeline, teacher


def noise(model: Any) -> torch.Tensor:
    return torch.randn(ROWS, *model.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("size", [WIDE, TALL])
def test_samples_of_a_rectangle_are_those_of_the_pipeline(name: str, size: tuple[int, int]) -> None:
    family, pipeline, teacher = at(name, size)
    assert teacher.shape[1] * size[1] == teacher.shape[2] * size[0]
    condition, n = teacher.encode(prompts=PROMPTS[:ROWS]), noise(teacher)
    ours = teacher.sample(n * family.start(teacher), condition, steps=2, guidance_scale=family.guidance)
    theirs = pipeline_latents(pipeline, family, n, 2, family.guidance)
    assert 0.05 < theirs.std() < 30
    assert (ours - theirs).abs().max() < 1e-4


KEPT = {"StableDiffusionPipeline": (WIDE, (32, 32)), "StableDiffusionXLPipeline": ((32, 32),),
        "StableDiffusion3Pipeline": ((32, 32),), "Lumina2Pipeline": ((32, 32),)}
"""Sizes that an export of the class draws when its call says none."""


@pytest.mark.parametrize("name", TEXT)
def test_an_export_draws_the_students_size(tmp_path: Path, name: str) -> None:
    """By the call of its card, and by default where the pipeline's class can know it; else the card says so."""
    for size in (WIDE, (32, 32)):
        family, _, teacher = at(name, size)
        student = moved(Generator.from_teacher(teacher, StudentInfo("", name)), 0.02)
        export(student, folder := tmp_path / f"{size}")
        record = json.loads((folder / "flowdistill.json").read_text())
        assert (record["call"]["height"], record["call"]["width"]) == size
        pipe, n = DiffusionPipeline.from_pretrained(folder), noise(student)
        pipe.set_progress_bar_config(disable=True)
        warned = "draws another size" in (folder / "README.md").read_text()
        default = size in KEPT.get(type(pipe).__name__, ())
        call = {key: value for key, value in record["call"].items() if not (default and key in ("height", "width"))}
        assert warned != (default or size == (32, 32) and name == "sana")
        if size != WIDE and not default:
            continue
        latents = pipe(prompt=PROMPTS[:ROWS], latents=family.pack(n.clone()), output_type="latent", **call).images
        with torch.no_grad():
            expected = student(n, student.encode(prompts=PROMPTS[:ROWS]))
        assert (family.unpack(latents) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", ["sdxl", "flux-dev", "sd3"])
def test_an_exported_student_of_several_steps_keeps_its_size(tmp_path: Path, name: str) -> None:
    _, _, teacher = at(name, TALL)
    student = moved(Generator.from_teacher(teacher, StudentInfo("", name),
                                           steps=steps_of(teacher, 2, "deterministic")), 0.02)
    export(student, tmp_path / "export")
    again = exported_student(tmp_path / "export")
    assert again is not None and again.prompts is not None
    assert (again.shape, again.prompts.image_size) == (student.shape, TALL)
    made, expected = (model.generate(prompts=PROMPTS[:1], seed=3) for model in (again, student))
    assert made.shape[-2:] == TALL
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert load_teacher(tmp_path / "export").shape == teacher.shape  # what inspect describes


# --- the setting


def test_a_square_is_one_setting_however_it_is_written(tmp_path: Path) -> None:
    assert TeacherConfig("x", image_size=[512, 512]) == TeacherConfig("x", image_size=512)
    assert TeacherConfig("x", image_size=(832, 1216)).image_size == [832, 1216]
    file = tmp_path / "a.yaml"
    file.write_text("teacher: {source: x, image_size: [64, 64]}\nmethod: {name: dmd2}\noutput_dir: run")
    assert load_config(file).teacher.image_size == 64
    assert load_config(file, ["teacher.image_size=[64,96]"]).teacher.image_size == [64, 96]
    assert load_config(file, ["teacher.image_size=null"]).teacher.image_size is None


@pytest.mark.parametrize("value", ["0", "-8", "[]", "[64]", "[64,64,64]", "[64,0]", "64.0", "[64,9.5]", "true", "64x96",
                                   "{height: 64}", "[[64,64]]", "[64,null]"])
def test_sizes_that_are_none(tmp_path: Path, cli: Callable[..., Any], value: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("teacher: {source: x}\nmethod: {name: dmd2}\noutput_dir: run")
    result = cli("plan", file, f"teacher.image_size={value}")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "'teacher.image_size' must be the side of a square in pixels, such as 1024, or [height, width]" in result.err
    assert f"override 'teacher.image_size={value}'" in result.err
    if value != "64x96":
        with pytest.raises(UserError, match=r"teacher.image_size must be the side of a square"):
            load_teacher(sdxl(), image_size=yaml.safe_load(value))


@pytest.mark.parametrize("name", TEXT)
def test_sizes_that_the_network_or_the_autoencoder_cannot_divide(name: str) -> None:
    """By what they must be divided is said, and that is enough and no more than needed."""
    pipeline = FAMILIES[name].make()
    with pytest.raises(UserError, match=r"is \[129, 160\]; .* height and width must be multiples of") as said:
        load_teacher(pipeline, image_size=[129, 160])
    unit = int(str(said.value).rpartition(" ")[2])
    teacher = load_teacher(pipeline, image_size=[unit, 2 * unit])
    velocity = teacher.velocity(noise(teacher), 0.5, teacher.encode(prompts=PROMPTS[:ROWS]))
    assert velocity.shape[1:] == teacher.shape and velocity.isfinite().all()
    if unit % 2 == 0:
        with pytest.raises(UserError, match=f"multiples of {unit}"):
            load_teacher(pipeline, image_size=[unit // 2, unit])


# --- the command line


def test_a_rectangle_from_the_run_to_figures(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Planned, trained, stopped and gone on with, sampled, exported and measured; SDXL is told its size."""
    sdxl().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    features = tmp_path / "features.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())).save(features)
    config = {
        "teacher": {"source": str(tmp_path / "pipeline"), "prompts": str(tmp_path / "prompts.txt"),
                    "image_size": [16, 24]},
        "method": {"name": "dmd2", "guidance_scale": 2.0}, "output_dir": str(tmp_path / "run"),
        "train": {"steps": 2, "batch_size": 2, "num_samples": 2, "trackers": [], "device": "cpu"},
        "evaluation": {"features": str(features), "num_images": 4, "teacher_steps": [1], "guidance_scale": 2.0,
                       "reference": "teacher"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    whole, file = f"output_dir={tmp_path / 'whole'}", tmp_path / "a.yaml"
    run, images = tmp_path / "run", tmp_path / "images"
    for command in (["plan", file], ["distill", file, "train.steps=1", "evaluation.at_end=false"], ["distill", file],
                    ["distill", file, whole, "evaluation.at_end=false"],
                    ["sample", run, "--num-images", 2, "--out", images],
                    ["export", run, tmp_path / "export"]):
        result = cli(*command)
        assert result.code == 0, result.err
    stopped, straight = (load_student(folder) for folder in (run, tmp_path / "whole"))
    assert stopped.shape == (4, 8, 12)
    for one, other in zip(stopped.network.parameters(), straight.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert Image.open(images / "000000.png").size == (24, 16)
    assert Image.open(run / "samples" / "final.png").size == (2 * (24 * 2 + 2) + 2, 16 * 2 + 4)
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert all(row["fid"] is not None for row in rows) and len(rows) == 2
    # The same size as a run's: another one is another run.
    result = cli("distill", file, "teacher.image_size=16")
    assert result.code == 2 and "teacher.image_size" in result.err and result.err.count("\n") == 1
