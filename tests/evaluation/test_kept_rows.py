"""A teacher's rows are measured once for a protocol, kept by content, and made anew when anything has changed."""

import json

import pytest
import torch
from torch import nn

import flowdistill
from flowdistill import load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import kept_rows
from flowdistill.evaluation.metrics.accuracy import Accuracy
from flowdistill.teachers import Teacher
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.images import save_images
from tests.families import stable_diffusion
from tests.tiny import tiny_unet_pipeline

SETTINGS = {"num_images": 30, "features": "digits", "reference": "digits", "teacher_steps": [1, 2], "progress": False}


@pytest.fixture
def sampled(monkeypatch):
    """A list that gets the steps and the number of images of every call of a teacher."""
    calls, sample, own = [], Teacher.sample, Teacher.pipeline_sample

    def counted(self, noise, condition=None, steps=50, **settings):
        calls.append((steps, len(noise)))
        return sample(self, noise, condition, steps, **settings)

    def counted_own(self, noise, condition, steps, *settings):
        calls.append((steps, len(noise)))
        return own(self, noise, condition, steps, *settings)

    monkeypatch.setattr(Teacher, "sample", counted)
    monkeypatch.setattr(Teacher, "pipeline_sample", counted_own)
    return calls


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(str(asset_path("digits-flow")))


def measure(teacher, folder, **settings):
    return flowdistill.evaluate(teacher, cache_dir=folder, **SETTINGS | settings)


def test_rows_of_the_teacher_and_of_its_pipeline_are_measured_once(teacher, tmp_path, sampled, capsys):
    first = measure(teacher, tmp_path, pipeline_steps=[3])
    assert sampled == [(1, 30), (2, 30), (3, 30)] and "rows_not_measured_here" not in first.protocol
    again = measure(load_teacher(str(asset_path("digits-flow"))), tmp_path, pipeline_steps=[3], batch_size=7)
    assert len(sampled) == 3 and again.rows == first.rows and again.rows[0].images_per_second > 0
    assert [text.split(":")[0] for text in again.protocol["rows_not_measured_here"]] == [
        "teacher at 1 call", "teacher at 2 calls", "pipeline at 3 calls"]
    how = f"from the cache, measured with torch {torch.__version__} on cpu, 1 process(es), batches of 250"
    assert how in str(again)
    # One row of several, and a line in a log for it.
    capsys.readouterr()
    third = measure(teacher, tmp_path, teacher_steps=[2, 4], progress=True)
    assert sampled[3:] == [(4, 30)] and third.rows[0] == first.rows[1]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("the teacher at 2 calls is known: from the cache")
    assert said[1:] == ["measuring the teacher at 4 calls, 30 images"]
    fresh = measure(teacher, tmp_path, teacher_steps=[2], fresh=True)
    assert sampled[4:] == [(2, 30)] and fresh.rows[0].fid == first.rows[1].fid


class Pool(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2)


def other_weights():
    teacher = load_teacher(str(asset_path("digits-flow")))
    with torch.no_grad():
        next(teacher.network.parameters()).flatten()[0] += 1e-3
    return teacher


CHANGES = {
    "number": {"num_images": 31},
    "seed": {"seed": 1},
    "solver": {"solver": "heun"},
    "guidance": {"guidance_scale": 1.5},
    "features": {"features": Pool()},
    "reference": {},
    "t_max": {"model": lambda: load_teacher(str(asset_path("digits-flow")), t_max=0.9)},
    "labels": {"model": lambda: load_teacher(str(asset_path("digits-flow")), labels=[3, 8])},
    "weights": {"model": other_weights},
    "metric": {"version": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_row_is_part_of_its_name(teacher, tmp_path, sampled, monkeypatch, change):
    settings = dict(CHANGES[change])
    if change == "reference":
        save_images(load_digits()[0][:40], tmp_path / "images")
        settings = {"reference": tmp_path / "images"}
    measure(teacher, tmp_path, teacher_steps=[1])
    assert len(sampled) == 1
    monkeypatch.setattr(Accuracy, "version", settings.pop("version", 1))
    other = settings.pop("model", lambda: teacher)()
    report = measure(other, tmp_path, teacher_steps=[1], **settings)
    assert len(sampled) == 2 and "rows_not_measured_here" not in report.protocol
    assert measure(other, tmp_path, teacher_steps=[1], **settings).rows == report.rows and len(sampled) == 2


def test_prompts_are_part_of_it_and_features_without_a_hash_keep_nothing(tmp_path, sampled):
    teacher = load_teacher(stable_diffusion(), prompts=["a cat", "a dog"])
    save_images(torch.rand(4, 3, 8, 8), tmp_path / "images")
    settings = {"num_images": 2, "teacher_steps": [1], "features": Pool(), "reference": tmp_path / "images"}
    first = measure(teacher, tmp_path, **settings)
    assert measure(teacher, tmp_path, **settings).rows == first.rows and len(sampled) == 1
    (tmp_path / "prompts.txt").write_text("a cat\na bird\n")
    measure(teacher, tmp_path, **settings, prompts=tmp_path / "prompts.txt")
    assert len(sampled) == 2

    plain = load_teacher(tiny_unet_pipeline())
    for _ in range(2):
        measure(plain, tmp_path, teacher_steps=[1], features=lambda images: images.flatten(1)[:, :5])
    assert len(sampled) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"key": "another", "row": {}, "made": {}}', '{"key": KEY}',
                                     '{"key": KEY, "row": {"model": 3}, "made": {}}'])
def test_a_damaged_entry_is_made_anew(teacher, tmp_path, sampled, content):
    first = measure(teacher, tmp_path, teacher_steps=[1])
    (entry,) = tmp_path.glob("*.json")
    whole = entry.read_text()
    entry.write_text(content.replace("KEY", json.dumps(json.loads(whole)["key"])))
    again = measure(teacher, tmp_path, teacher_steps=[1])
    assert len(sampled) == 2 and again.rows[0].fid == first.rows[0].fid
    assert json.loads(entry.read_text())["row"]["fid"] == first.rows[0].fid


def test_of_a_shipped_row_the_speed_is_measured_here(teacher, tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(kept_rows, "shipped_folder", lambda name: tmp_path / name)
    measure(teacher, tmp_path / "one", teacher_steps=[2, 4])
    entries = [json.loads(file.read_text()) for file in (tmp_path / "one").glob("*.json")]
    for entry in entries:
        entry["row"] |= {"fid": 12.5, "images_per_second": 1e9}
        entry["made"] |= {"torch": "0.1"}
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / kept_rows.SHIPPED).write_text(json.dumps({"rows": entries}))
    report = measure(teacher, tmp_path / "two", teacher_steps=[2], batch_size=5)
    assert sampled[2:] == [(2, 5), (2, 5)]  # two batches, the second one on the clock
    assert report.rows[0].fid == 12.5 and 0 < report.rows[0].images_per_second < 1e8
    assert "teacher at 2 calls: shipped, measured with torch 0.1 on cpu; images/s are measured here" in str(report)
    again = measure(teacher, tmp_path / "two", teacher_steps=[2])
    assert len(sampled) == 4 and again.rows == report.rows
    measure(teacher, tmp_path / "three", teacher_steps=[2, 4], batch_size=5)
    assert sampled[4:] == [(2, 5), (2, 5), (4, 5)]  # the network is warm by then
    assert "from the cache, measured with torch 0.1 on cpu" in str(again)


def test_a_schedule_that_differs_in_its_last_digits_is_the_same(teacher, monkeypatch):
    known = kept_rows.TeacherIdentity(teacher)
    monkeypatch.setattr(kept_rows, "teacher_facts", lambda teacher, *settings: ["a", 1, 0.1, *settings])
    one = known._hash(2)
    monkeypatch.setattr(kept_rows, "teacher_facts", lambda teacher, *settings: ["a", 1, 0.1 + 1e-13, *settings])
    assert known._hash(2) == one != known._hash(3)
    assert json_sha256([0.1]) != json_sha256([0.1 + 1e-13])


def test_a_cache_that_cannot_be_written_costs_a_warning(teacher, tmp_path, sampled):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the teacher's rows are not cached"):
        measure(teacher, tmp_path / "file" / "cache", teacher_steps=[1])
    measure(teacher, tmp_path / "file" / "cache", teacher_steps=[1])
    assert len(sampled) == 2
