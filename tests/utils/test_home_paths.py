"""``~`` is the home folder wherever a path is read or written: settings, overrides, arguments and Python."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowdistill import load_student, load_teacher
from flowdistill.conditioning.prompts import read_prompts
from flowdistill.config import found_again, load_config, run_settings, save_config
from flowdistill.data.image_sets import FolderImages
from flowdistill.evaluation import Report, evaluate
from flowdistill.evaluation.reference import load_reference
from flowdistill.export import export
from flowdistill.features import load_features
from flowdistill.features.digits_classifier import load_digits_classifier
from flowdistill.features.vision import load_vision
from flowdistill.methods.echodistill.concept_images import load_concept_images
from flowdistill.methods.msd.runs import make_partition
from flowdistill.plan.meta_teacher import read_architecture
from flowdistill.students import FlowMap, StudentInfo, is_student_folder
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import (
    atomic_folder,
    atomic_write,
    cache_folder,
    check_writable,
    local_path,
    portable_path,
)
from flowdistill.utils.images import save_grid, save_images
from tests.tiny import tiny_unet_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with everything that is read."""
    home = tmp_path_factory.mktemp("home")
    tiny_unet_pipeline().save_pretrained(home / "teacher")
    FlowMap.from_teacher(load_teacher(home / "teacher"), StudentInfo("freeflow", "~/teacher")).save(home / "student")
    shutil.copytree(ROOT / "assets" / "digits-classifier", home / "classifier")
    (home / "images").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), 80 * number).save(home / "images" / f"{number}.png")
    (home / "prompts.txt").write_text("a cat\n")
    (home / "base.yaml").write_text("output_dir: ~/run\nteacher: {source: ~/teacher}\nmethod: {name: freeflow}\n"
                                    "train: {steps: 1, batch_size: 2, num_samples: 2, trackers: [], device: cpu}\n"
                                    "evaluation: {at_end: false}\n")
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of this process, which works in an empty one."""
    place = tmp_path / "home"
    shutil.copytree(filled, place)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path / "work")
    return place


@pytest.fixture(autouse=True)
def no_folder_of_that_name(tmp_path: Path, home: Path):
    yield
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("~")]


def test_what_a_tilde_means(home, monkeypatch):
    assert local_path("~") == home and local_path("~/a/~b") == home / "a" / "~b" and local_path("a/~") == Path("a/~")
    assert local_path(Path("~/a")) == home / "a" and local_path(f"{home}/a") == home / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert cache_folder("x") == home / "cache" / "flowdistill" / "x"
    words = "~nobody-here/a: there is no home folder ~nobody-here .*written ./~nobody-here/a"
    with pytest.raises(UserError, match=words):
        local_path("~nobody-here/a")


@pytest.mark.parametrize("path", ["a" * 5000, "a/" + "b" * 256, "x\0y", "é" * 200])
def test_names_that_no_file_can_have(path):
    with pytest.raises(UserError, match="is no path: a name in it") as caught:
        local_path(path)
    assert len(str(caught.value)) < 250


READ = {
    "teacher": lambda: load_teacher("~/teacher").shape,
    "student": lambda: load_student("~/student").shape,
    "student's folder": lambda: is_student_folder("~/student") or 1 / 0,
    "prompts": lambda: read_prompts("~/prompts.txt").prompts,
    "configuration": lambda: load_config("~/base.yaml").output_dir,
    "images": lambda: len(FolderImages("~/images")),
    "reference": lambda: load_reference("~/images", load_features("~/classifier")).count,
    "statistics": lambda: load_reference("~/images.npz", load_features("digits")).count,
    "features": lambda: load_features("~/classifier").hash,
    "classifier": lambda: load_digits_classifier("~/classifier").config,
    "concept": lambda: load_concept_images("~/images", 8, "c").captions,
    "plan": lambda: read_architecture("~/teacher").components,
    "report": lambda: Report.read_json("~/report.json").seed,
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_found_at_home(home, name):
    load_reference(str(home / "images"), load_features("digits")).save("~/images.npz")
    Report([], 1, "f", "r", 7).write_json("~/report.json")
    assert READ[name]()


def test_frozen_networks_are_looked_for_at_home(home, monkeypatch):
    with pytest.raises(UserError, match=f"the vision model {home / 'nothing'}, which is not there"):
        load_vision("transformers:~/nothing", "x")
    opened: list[str] = []
    timm = types.SimpleNamespace(is_model=lambda name: True, __version__="1",
                                 create_model=lambda *given, checkpoint_path, **more: opened.append(checkpoint_path))
    monkeypatch.setitem(sys.modules, "timm", timm)
    (home / "weights.pth").touch()
    with pytest.raises(AttributeError):  # of what is no network
        load_vision("timm:resnet18=~/weights.pth", "x")
    assert opened == [str(home / "weights.pth")]


WRITTEN = {
    "grid": lambda: save_grid(torch.zeros(1, 1, 8, 8), "~/new/a.png"),
    "pictures": lambda: save_images(torch.zeros(1, 1, 8, 8), "~/new"),
    "student": lambda: load_student("~/student").save("~/new"),
    "pipeline": lambda: export(load_student("~/student"), "~/new"),
    "report": lambda: Report([], 1, "f", "r", 0).write_json("~/new/r.json"),
    "statistics": lambda: load_reference("~/images", load_features("digits")).save("~/new/s.npz"),
    "cache of statistics": lambda: load_reference("~/images", load_features("digits"), "~/new"),
    "pairs": lambda: teacher_pairs(load_teacher("~/teacher"), 2, 1, folder="~/new"),
    "configuration": lambda: (Path(os.environ["HOME"]) / "new").mkdir() or save_config(load_config("~/base.yaml"),
                                                                                       "~/new/c.yaml"),
    "any file": lambda: write("~/new/f"),
    "any folder": lambda: fill("~/new"),
    "check": lambda: check_writable("~/new/f") or (Path(os.environ["HOME"]) / "new").touch(),
}


def write(path):
    with atomic_write(path) as file:
        file.write(b"x")


def fill(path):
    with atomic_folder(path) as folder:
        (folder / "a").touch()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_written_at_home(home, name):
    WRITTEN[name]()
    assert [path for path in home.iterdir() if path.name.startswith("new")]
    assert not list(Path.cwd().iterdir())


def test_a_run_in_settings_overrides_and_bases(home):
    (home / "c.yaml").write_text("defaults_from: ~/base.yaml\n")
    run = distill("~/c.yaml", ["output_dir=~/other"])
    assert run.output_dir == home / "other" and (home / "other" / "student").is_dir()
    assert run_settings("~/other")["output_dir"] == "~/other"  # settings stay as they are written
    again = load_config("~/c.yaml")
    again.output_dir = "~/other"
    assert distill(again).steps == 1 and load_config("~/c.yaml").output_dir == "~/run"


def test_the_file_of_a_partition(home):
    (home / "two.yaml").write_text("[[0, 2], [1]]")
    config = load_config("~/base.yaml", ["method={name: msd, partition: file, host: {name: dmd2}}",
                                         "method.partition_file=~/two.yaml"])
    partition = make_partition(config.method, load_teacher("~/teacher", null_label=3))
    assert partition.router.owner == (0, 1, 0)


def test_commands(home, cli):
    assert cli("sample", "~/student", "--labels", "0,1", "--out", "~/grid.png").code == 0
    assert cli("sample", "~/teacher", "--labels", "0,1", "--steps", 1, "--out", "~/many").code == 0
    assert cli("export", "~/student", "~/exported").code == 0
    assert cli("inspect", "~/teacher").code == 0
    assert cli("plan", "~/base.yaml").code == 0
    result = cli("evaluate", "~/student", "--num-images", 4, "--teacher-steps", 1, "--features", "~/classifier",
                 "--reference", "~/images", "--json", "~/report.json", "--device", "cpu")
    assert result.code == 0, result.err
    rows = json.loads((home / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "student"]  # ~/teacher is its student's base model
    assert (home / "grid.png").is_file() and (home / "many" / "000001.png").is_file()
    assert (home / "exported" / "model_index.json").is_file() and not list(Path.cwd().iterdir())
    for arguments in (["sample", "~/nothing", "--out", "x.png"], ["evaluate", "~/nothing"], ["inspect", "~/nothing"],
                      ["sample", "~nobody-here/x", "--out", "x.png"]):
        result = cli(*arguments)
        assert result.code == 2 and result.err.count("\n") == 1 and "from the hub" not in result.err, result.err


def test_scripts(home, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import evaluate_fid

    command = ["~/images", "--reference", "~/images", "--features", "~/classifier", "--json", "~/r.json", "--no-kid",
               "--cache", "~/cache", "--save-reference", "~/s.npz"]
    assert evaluate_fid.main(command) == 0, capsys.readouterr().err
    assert (home / "r.json").is_file() and (home / "s.npz").is_file() and (home / "cache").is_dir()
    assert not list(Path.cwd().iterdir())


def test_evaluate_in_python(home):
    report = evaluate("~/student", num_images=4, teacher_steps=[1], features="~/classifier", reference="~/images",
                      json="~/r.json", cache_dir="~/cache", progress=False)
    assert len(report.rows) == 2 and Report.read_json("~/r.json").num_images == 4


@pytest.mark.parametrize("call", [
    lambda: load_student(""), lambda: load_config(""), lambda: evaluate(""), lambda: distill(""),
    lambda: load_reference("", None), lambda: load_features(""), lambda: check_writable(""), lambda: read_prompts(""),
    lambda: FolderImages(""), lambda: is_student_folder("")])
def test_nothing_is_no_path(call, tmp_path, monkeypatch):
    """Which would be the working folder; Path("") is one's own "."."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is an empty text; give one|^a path is an empty text"):
        call()
    assert local_path(Path("")) == Path(".") and local_path(".") == Path(".")
    assert portable_path("") == found_again("", tmp_path) == ""  # of what is not known
