"""Several runs, students, pipelines and folders of images in one table and on one page."""

import json
import re

import pytest
import torch
from PIL import Image

import flowdistill
from flowdistill import UserError, load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Report, Row
from flowdistill.evaluation.html import page
from flowdistill.evaluation.pictures import Strip
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import Teacher
from flowdistill.utils.images import save_images
from tests.families import stable_diffusion

SOURCE = str(asset_path("digits-flow"))
WITH = ("--features", "digits", "--reference", "digits", "--num-images", 70, "--teacher-steps", "1,2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs of one teacher, a student of two labels, and folders of images."""
    folder = tmp_path_factory.mktemp("place")
    info = StudentInfo(method="freeflow", base_model=SOURCE)
    student = FlowMap.from_teacher(load_teacher(SOURCE), info)
    for name, features in (("a", "digits"), ("b", "digits"), ("other", str(asset_path("digits-classifier")))):
        student.save(folder / name / "student")
        (folder / name / "config.yaml").write_text(
            f"output_dir: {folder / name}\nteacher: {{source: {SOURCE}}}\n"
            f"evaluation: {{num_images: 30, features: {features}, reference: digits, teacher_steps: [1]}}\n")
    FlowMap.from_teacher(load_teacher(SOURCE, labels=[3, 8]), info).save(folder / "some labels")
    save_images(load_digits()[0][:100], folder / "images")
    save_images(load_digits()[0][:20], folder / "few")
    return folder


def evaluate(*sources, cache, **settings):
    given = {"features": "digits", "reference": "digits", "num_images": 70, "teacher_steps": [1], "progress": False}
    return flowdistill.evaluate(list(sources), cache_dir=cache, **given | settings)


def test_one_table_and_one_page_of_everything(place, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counted, sample = [], Teacher.sample
    monkeypatch.setattr(Teacher, "sample", lambda self, noise, *given, **named: counted.append(len(noise)) or sample(
        self, noise, *given, **named))
    monkeypatch.chdir(place)
    result = cli("evaluate", "a", "b", SOURCE, "images", *WITH, "--json", tmp_path / "r.json", "--html",
                 tmp_path / "r.html", "--device", "cpu")
    assert result.code == 0, result.err
    report = Report.read_json(tmp_path / "r.json")
    # The teacher of both runs, which is also the third thing to compare, is measured once.
    assert [(row.model, row.calls) for row in report.rows] == [
        (SOURCE, 1), (SOURCE, 2), ("a", 1), ("b", 1), ("images", None)]
    assert counted == [70, 10, 70, 10]
    one, two, a, b, images = report.rows
    assert a.fid == b.fid == pytest.approx(one.fid, rel=1e-4) and 0 < images.fid < one.fid and two.fid < one.fid
    assert report.num_images == 70 and "70 of 100, drawn with seed 0" in str(report.protocol["models"]["images"])
    assert set(report.protocol["models"]) == {"a", "b", SOURCE, "images"}
    assert all(name in result.out for name in (SOURCE, "images "))
    # As each is alone.
    alone = evaluate("a", "images", cache=tmp_path, teacher_rows=False)
    assert [(row.model, row.fid) for row in alone.rows] == [("a", a.fid), ("images", images.fid)]

    html = (tmp_path / "r.html").read_text()
    assert html.count("<tr>") == 6 and html.count('src="data:image/png;base64,') == 5
    assert not re.search(r"""(src|href)=["']?(https?:|//|/)|@import|<script|url\(""", html)
    assert "<svg" in html and f"{a.fid:.3f}±{a.fid_std:.3f}" in html and "features sha256" in html


def test_a_run_brings_its_settings_and_those_of_two_must_agree(place, tmp_path):
    report = flowdistill.evaluate([place / "a", place / "b"], cache_dir=tmp_path, progress=False)
    assert report.num_images == 30 and [row.calls for row in report.rows] == [1, 1, 1]
    with pytest.raises(UserError, match="a and .*other cannot be compared: features is 'digits' in the first and "
                                        "'.*digits-classifier' in the second; say which for all, with --features"):
        flowdistill.evaluate([place / "a", place / "other"], cache_dir=tmp_path, progress=False)
    assert evaluate(place / "a", place / "other", cache=tmp_path, num_images=10).features == "digits"


@pytest.mark.parametrize(
    ("sources", "settings", "sentence"),
    [
        (["a", "some labels"], {}, "the first makes all labels and the second the labels 3, 8"),
        (["images", "some labels"], {}, "the first makes the labels 3, 8 only, and the labels of a folder's images"),
        (["a", "few"], {}, "few holds 20 images, and 70 are measured of each; FID is .* --num-images 20 or less"),
        (["images", "few"], {"features": None, "num_images": 20}, "cannot be compared without features"),
        (["a", "nowhere"], {}, "nowhere does not exist"),
        (["a", "b"], {"teacher_steps": [0]}, "at least 1 step"),
        (["a"], {}, "at least two"),
        ([], {}, "nothing to evaluate"),
        (["a", SOURCE], {"teacher_rows": False}, "nothing to measure in"),
    ],
)
def test_what_cannot_be_compared_is_said(place, tmp_path, sources, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(*(place / source for source in sources), cache=tmp_path, **settings)


def test_prompts_have_to_be_the_same(tmp_path):
    teachers = [load_teacher(stable_diffusion(), prompts=[prompt]) for prompt in ("a cat", "a dog")]
    settings = {"features": lambda images: images.flatten(1)[:, :4], "reference": tmp_path / "images", "num_images": 2}
    save_images(torch.rand(4, 3, 16, 16), tmp_path / "images")
    with pytest.raises(UserError, match="their prompts differ; give both the same, with --prompts FILE"):
        evaluate(*teachers, cache=tmp_path, **settings)
    (tmp_path / "prompts.txt").write_text("a bird\n")
    report = evaluate(*teachers, cache=tmp_path, prompts=tmp_path / "prompts.txt", **settings)
    assert [row.model for row in report.rows] == ["StableDiffusionPipeline"]  # the same weights: one teacher


def test_teachers_that_are_sampled_in_different_ways_are_told_apart(place, tmp_path):
    teachers = [load_teacher(SOURCE, t_max=t_max) for t_max in (None, 0.9)]
    report = evaluate(*teachers, cache=tmp_path)
    assert [row.model for row in report.rows] == [f"{SOURCE} (1)", f"{SOURCE} (2)"]
    assert report.rows[0].fid != report.rows[1].fid
    assert next(teachers[0].network.parameters()).device.type == "cpu"


def test_one_model_has_a_page_too(place, tmp_path, cli):
    result = cli("evaluate", place / "a", *WITH, "--html", tmp_path / "one.html", "--device", "cpu")
    assert result.code == 0 and (tmp_path / "one.html").read_text().count("base64") == 3
    result = cli("evaluate", place / "a", *WITH, "--html", place)
    assert result.code == 2 and "is a folder; give the name of a file" in result.err


def test_a_page_escapes_names_and_does_without_figures():
    strips = [Strip("<b> & co", Image.new("L", (4, 4)))]
    report = Report([Row("<b> & co", 1, fid=1.0, fid_std=2.0), Row("far", 50, fid=1e6), Row("set", None, fid=3.0)],
                    10, "x<y", "r&d", 0, protocol={"note": "<i>few</i>"})
    text = page(report, strips)
    assert "<b> &" not in text and "<i>" not in text and text.count("&lt;b&gt; &amp; co") >= 3 and "NaN" not in text
    numbers = [float(number) for number in re.findall(r'c[xy]="([^"]+)"', text)]
    assert len(numbers) == 4 and all(0 < number < 720 for number in numbers)
    for called, figure in (("FD-DINOv2", "fd"), ("FD-CLIP", "fd"), ("FD-lite0", "fd"), ("FD", "fid"), ("FID", "fid")):
        rows = [Row("student", calls, **{figure: 20.0 / calls, f"{figure}_std": 1.0}) for calls in (1, 4)]
        drawn = page(Report(rows, 10, None, None, 0, protocol={"distance": called}), [])
        assert drawn.count("<circle") == 2 and f"<h2>{called} by network calls" in drawn
        assert f">{called}</text>" in drawn and (called == "FID") == ("FID" in drawn)
    assert "<svg" not in page(Report([Row("student", 1)], 10, None, None, 0), [])
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["fid_std"] == 2.0
