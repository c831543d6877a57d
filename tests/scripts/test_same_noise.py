"""``scripts/same_noise.py``: students of one teacher from the same noise, and what it refuses."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import load_student, load_teacher
from flowdistill.config import load_config
from flowdistill.evaluation import student_sampler
from flowdistill.training.run import method_class
from flowdistill.utils.images import grid
from flowdistill.utils.randomness import indexed_noise

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(ROOT / "scripts" / "same_noise.py"))["main"]


SOURCE = "assets/digits-flow"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of the teacher of digits: of one call, of one to eight, of one with guidance, and one of another teacher."""
    folder = tmp_path_factory.mktemp("place")
    teacher = load_teacher(SOURCE)
    for name, source, method, scale in (
        ("a", SOURCE, "freeflow", 1.0), ("map", SOURCE, "flow_map_matching", 1.0), ("guided", SOURCE, "freeflow", 2.0),
        ("ddpm", "assets/digits-ddpm", "boot", 1.0),
    ):
        own = teacher if source == SOURCE else load_teacher(source)
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(
            f"output_dir: {folder / name}\nteacher: {{source: {source}}}\nmethod: {{name: {method}}}\n")
        config = load_config(folder / name / "config.yaml", [])
        student = method_class(method)(config.method, own).student()
        student.info = dataclasses.replace(student.info, guidance_scale=scale)
        student.save(folder / name / "student")
    return folder


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_each_block_is_of_the_same_noise_and_labels(main, place, capsys):
    given = [place / "a", f"any={place / 'map'}@1,4,1", "--teacher-steps", 2, "--columns", 3, "--seed", 5]
    assert main([*map(str, given), "--out", str(place / "out.png")]) == 0
    assert capsys.readouterr().out == (
        "from top to bottom: teacher, 2 calls; freeflow, 1 call; any, 1 call; any, 4 calls\n")
    teacher = load_teacher(SOURCE)
    noise, condition = indexed_noise(teacher.shape, 5, range(6)), teacher.examples([0, 1, 2, 0, 1, 2])
    wanted = [
        teacher.decode(teacher.sample(noise, condition, steps=2)),
        student_sampler(load_student(place / "a"))(noise, condition),
        *(student_sampler(load_student(place / "map"), steps=steps)(noise, condition) for steps in (1, 4)),
    ]
    wanted = [np.array(grid(images, 3)) for images in wanted]
    with Image.open(place / "out.png") as picture:
        pixels, height = np.array(picture), wanted[0].shape[0]
    band = pixels.shape[0] // 4 - height
    for number, block in enumerate(wanted):
        top = number * (band + height) + band
        assert np.array_equal(pixels[top : top + height], block)
    assert not np.array_equal(wanted[0], wanted[1])


@pytest.mark.parametrize("given, read", [
    ("lr=1/a@1,4", ("", "lr=1/a", [1, 4])), ("lr=1/a", ("", "lr=1/a", [])), ("lr=1/a@b@2", ("", "lr=1/a@b", [2])),
    ("one=lr=1/a@2", ("one", "lr=1/a", [2])), ("x=y=plain@1", ("x=y", "plain", [1])),
    ("x@2=plain", ("x@2", "plain", [])), ("x@2=lr=1/a@b", ("x@2", "lr=1/a@b", [])), ("a@1", ("", "a@1", [])),
    ("a@1@4", ("", "a@1", [4])), ("=plain@3", ("", "plain", [3])), ("~nobody=plain", ("~nobody", "plain", [])),
])
def test_a_title_and_a_folder_may_have_either_sign_in_them(main, tmp_path, monkeypatch, given, read):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1/a", "lr=1/a@b", "plain", "a@1"):
        (tmp_path / name).mkdir(parents=True)
    assert main.__globals__["_asked"](given) == (read[0], Path(read[1]), read[2])


@pytest.mark.parametrize("given, words", [
    ("lr=1/b@1,4", "lr=1/b@1,4 has no config.yaml; give the folder of a run, with TITLE= before it and @1,4 or other"),
    ("x=lr=1/a@1;4", "ends in @1;4; behind the @ are calls of the student, such as @1,4"),
    ("lr=1/a@0", "ends in @0; behind the @ are calls"), ("@3", "@3 has no config.yaml; give the folder of a run, with"),
    ("title=", "title= has no config.yaml; give the folder of a run, with TITLE= before it"),
    ("me@host/a", "me@host/a has no config.yaml"), ("", "a run is an empty text; give the folder of a run"),
])
def test_what_leads_to_no_folder_is_named_as_it_was_given(main, tmp_path, monkeypatch, given, words, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1" / "a").mkdir(parents=True)
    assert main([given, "--out", "a.png"]) == 2
    assert words in capsys.readouterr().err and not Path("a.png").exists()


@pytest.mark.parametrize("given, words", [
    (["nowhere"], "nowhere has no config.yaml; give the folder of a run"),
    (["a", "ddpm"], "has another teacher than"),
    (["a", "guided"], "guidance scales 1 and 2"),
    (["a", "a"], "two blocks would be called 'freeflow, 1 call'"),
    (["a@3"], "is asked for 3 calls an image, and goes by 1"), (["a@x"], "ends in @x; behind the @ are calls"),
    (["a", "--rows", "0"], "--rows is 0"), (["a", "--out", "none.jpg"], "--out none.jpg must be a .png file"),
    (["a", "--teacher-steps", "-1"], "--teacher-steps has -1"),
])
def test_what_makes_no_picture_is_refused(main, place, given, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # before any network is asked
    out = place / "none.png"
    given = [one if one.startswith("-") or one.isdigit() or "." in one else str(place / one) for one in given]
    assert main(["--out", str(out), *given]) == 2
    assert words in capsys.readouterr().err and not out.exists()
