"""A run folder used from another working directory than that in which it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import load_student, load_teacher
from flowdistill.config import found_again, load_config, run_settings
from flowdistill.evaluation import evaluate
from flowdistill.evaluation.reference import load_reference
from flowdistill.features import load_features
from flowdistill.methods.echodistill.student import ConceptStudent
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from tests.tiny import tiny_unet_pipeline

TRAIN = "train: {steps: 1, batch_size: 2, num_samples: 2, trackers: [], device: cpu}\nevaluation: {at_end: false"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a teacher, images, features and two runs, which name all of these by relative paths."""
    project = tmp_path_factory.mktemp("before") / "project"
    tiny_unet_pipeline().save_pretrained(project / "models" / "teacher")
    shutil.copytree(ROOT / "assets" / "digits-classifier", project / "models" / "classifier")
    (project / "images").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), 80 * number).save(project / "images" / f"{number}.png")
    text = "output_dir: runs/a\nteacher: {source: models/teacher}\nmethod: {name: freeflow}\n" + TRAIN
    (project / "run.yaml").write_text(f"{text}, features: models/classifier, reference: images}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        distill("run.yaml")
        distill("run.yaml", [f"output_dir={project.parent / 'scratch' / 'b'}"])
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the process works elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(trained.parent, tmp_path / "now")
    return tmp_path / "now" / "project"


def rows(run: Path | str) -> list[str]:
    return [row.model for row in evaluate(run, num_images=4, teacher_steps=[1], progress=False).rows]


def test_the_run_says_where_it_was_started(trained: Path) -> None:
    assert load_config(trained / "runs" / "a" / "config.yaml").started_in == str(trained)
    assert run_settings(trained / "runs" / "a")["teacher"]["source"] == "models/teacher"


def test_a_run_is_evaluated_from_another_folder(project: Path, cli) -> None:
    assert rows(project / "runs" / "a") == ["teacher", "student"]
    result = cli("evaluate", project / "runs" / "a", "--num-images", 4, "--teacher-steps", 1, "--device", "cpu")
    assert result.code == 0 and f"reference {project / 'images'}" in result.out, result.err


def test_a_project_may_move_as_a_whole(project: Path, trained: Path) -> None:
    """Where it lay before, there is another one now: the run's own things count."""
    settings = run_settings(project / "runs" / "a")
    assert settings["started_in"] == str(trained) != str(project)
    assert found_again(settings["teacher"]["source"], project / "runs" / "a") == str(project / "models" / "teacher")
    assert found_again("images/*", project / "runs" / "a") == str(project / "images/*")
    assert found_again("images/*.tar", project / "runs" / "a") == "images/*.tar"


def test_a_run_may_lie_or_move_alone(project: Path, trained: Path, tmp_path: Path) -> None:
    for run in (project.parent / "scratch" / "b", project / "runs" / "a"):
        moved = tmp_path / "moved" / run.name
        shutil.move(run, moved)
        assert found_again("models/teacher", moved) == str(trained / "models" / "teacher")
        assert rows(moved) == ["teacher", "student"]


def test_a_students_folder_knows_its_teacher_too(project: Path) -> None:
    report = evaluate(project / "runs" / "a" / "student", num_images=4, teacher_steps=[1], progress=False,
                      features=str(project / "models" / "classifier"), reference=str(project / "images"))
    assert [row.model for row in report.rows] == ["teacher", "student"]


def test_what_is_here_stays_as_it_is_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project / "runs" / "a"
    monkeypatch.chdir(project)
    assert found_again("models/teacher", run) == "models/teacher" == found_again("models/teacher", "runs/a")
    assert found_again("owner/name", run) == "owner/name" and found_again("digits", run) == "digits"
    assert found_again("/abs/olute", run) == "/abs/olute" and found_again("~/x", run) == "~/x"
    assert found_again("models/teacher", project) == "models/teacher"  # no run, nothing to go by
    (project / "digits").mkdir()  # a folder named as a set is: the name stands for the set
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("reference: images", "reference: digits")
                                     .replace("features: models/classifier", "features: digits"))
    monkeypatch.chdir(project.parent)
    assert evaluate(run, num_images=4, teacher_rows=False, progress=False).reference == "digits"


def test_statistics_behind_the_name_of_their_features(project: Path) -> None:
    """``MODE:FILE.npz`` in a run's configuration, its file by a relative path."""
    run, features = project / "runs" / "a", load_features(project / "models" / "classifier")
    own = load_reference(project / "images", features)
    np.savez(project / "s.npz", mu=own.mean.numpy(), sigma=own.covariance.numpy())
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("reference: images", f"reference: {features.mode}:s.npz"))
    assert evaluate(run, num_images=4, teacher_rows=False, progress=False).reference.startswith("s.npz")


def test_a_run_of_before(project: Path, tmp_path: Path) -> None:
    """Without the record, or with a damaged one, only its place is known."""
    run = project / "runs" / "a"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("".join(line for line in text.splitlines(True) if "started_in" not in line))
    assert rows(run) == ["teacher", "student"]
    shutil.move(run, tmp_path / "alone")
    assert found_again("models/teacher", tmp_path / "alone") == "models/teacher"
    with pytest.raises(UserError, match="teacher source models/teacher"):
        rows(tmp_path / "alone")
    (tmp_path / "alone" / "config.yaml").write_text("a: [")
    assert found_again("models/teacher", tmp_path / "alone") == "models/teacher"
    with pytest.raises(UserError, match="config.yaml is not valid YAML"):
        rows(tmp_path / "alone")


def test_a_resume_elsewhere_is_the_same_run(project: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert distill("run.yaml").steps == 1
    assert run_settings("runs/a")["started_in"] == str(project)


def test_a_student_on_top_of_another_model_finds_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are changes to a pipeline that it names by a relative path, and so is another autoencoder for it."""
    asked: list[str | None] = []

    def load(base: str, folder: Path, vae: str | None = None) -> None:
        asked.extend((base, vae))
        raise UserError("enough")

    monkeypatch.setattr("flowdistill.methods.echodistill.student.load_adapted_pipeline", load)
    folder = project / "runs" / "a" / "student"
    with pytest.raises(UserError, match="enough"):
        ConceptStudent.load(folder, {"base_model": "models/teacher"})
    place = str(project / "models" / "teacher")
    assert asked == [place, None]
    with pytest.raises(UserError, match="enough"):
        ConceptStudent.load(folder, {"base_model": "models/teacher", "base_vae": {
            "source": "models/teacher", "subfolder": "vae", "kind": "AutoencoderKL"}})
    assert asked[2:] == [place, place]


def test_loading_alone_needs_nothing_of_it(project: Path) -> None:
    shutil.rmtree(project / "models")
    one = load_student(project / "runs" / "a")
    assert torch.isfinite(one.generate(labels=[0])).all()
    description = json.loads((project / "runs" / "a" / "student" / "flowdistill.json").read_text())
    assert description["base_model"] == "models/teacher"
    FlowMap.from_teacher(load_teacher(tiny_unet_pipeline()), StudentInfo()).save(project / "s")
    assert load_student(project / "s").shape == one.shape
