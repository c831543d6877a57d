"""``evaluate`` end to end on small things, and the report it returns."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

import flowdistill
from flowdistill.conditioning import ClassLabels, Condition
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Evaluator, Report, Row, evaluate_models
from flowdistill.evaluation.metrics.kernel import Kernel
from flowdistill.evaluation.report import DIRECTIONS
from flowdistill.features import load_features
from flowdistill.students import StudentInfo
from flowdistill.utils.errors import UserError

LABELS = load_digits()[1]
ROWS = {label: [i for i, other in enumerate(LABELS.tolist()) if other == label] for label in range(10)}


def evaluate(model, *arguments, **settings):
    """``flowdistill.evaluate`` with the digits to measure with and against."""
    return flowdistill.evaluate(model, *arguments, **{"features": "digits", "reference": "digits"} | settings)


class Fake:
    """Real digits of the class asked for, under more noise the fewer steps are taken."""

    shape, num_classes, device = (1, 8, 8), 10, torch.device("cpu")
    classes, prompts = ClassLabels(10, None), None

    def __init__(self) -> None:
        self.images = load_digits()[0]
        self.asked: list[tuple] = []

    def encode(self, labels=None):
        return Condition({"class_labels": torch.as_tensor(labels)})

    def draw(self, noise, condition, steps):
        labels = condition.tensors["class_labels"].tolist()
        picks = (noise[:, 0, 0, 0].abs() * 1000).long().tolist()
        rows = [ROWS[label][pick % len(ROWS[label])] for label, pick in zip(labels, picks, strict=True)]
        return 2 * self.images[rows] - 1 + noise / steps

    def decode(self, latents):
        return latents / 2 + 0.5


class FakeTeacher(Fake):
    source = "fake"

    def remarks(self):
        return []

    def velocity(self, *args):
        raise AssertionError("not needed")

    def sample(self, noise, condition, steps=50, solver="euler", guidance_scale=1.0):
        self.asked.append((steps, solver, guidance_scale, len(noise)))
        return self.draw(noise, condition, steps)


class FakeStudent(Fake):
    info, class_owner, networks, num_steps, step_counts = StudentInfo(), None, [torch.nn.Linear(2, 3)], 1, [1]

    def checked_steps(self, steps):
        return steps

    def __call__(self, noise, condition=None, guidance_scale=None):
        self.asked.append((guidance_scale, len(noise)))
        return self.draw(noise, condition, 20)

    def generate(self, *args):
        raise AssertionError("not needed")


def test_evaluate_gives_the_rows_and_writes_them(tmp_path):
    teacher, student = FakeTeacher(), FakeStudent()
    path = tmp_path / "deep" / "report.json"
    report = evaluate(
        student,
        num_images=700,
        teacher_steps=(1, 20),
        teacher=teacher,
        json=path,
        batch_size=300,
        solver="heun",
        cache_dir=tmp_path,
        progress=False,
        guidance_scale=2.0,
    )
    assert [(row.model, row.calls) for row in report.rows] == [("teacher", 1), ("teacher", 39), ("student", 1)]
    assert teacher.asked[:4] == [
        (1, "heun", 2.0, 300),
        (1, "heun", 2.0, 300),
        (1, "heun", 2.0, 100),
        (20, "heun", 2.0, 300),
    ]
    assert student.asked == [(2.0, 300), (2.0, 300), (2.0, 100)]
    one, twenty, last = report.rows
    assert one.fid > 10 * twenty.fid and one.kid > twenty.kid and one.accuracy < twenty.accuracy
    # The same noise and labels, hence the same images and figures.
    assert (last.fid, last.kid, last.accuracy) == (twenty.fid, twenty.kid, twenty.accuracy)
    assert twenty.accuracy > 0.95 and twenty.images_per_second > 0
    assert (last.precision, last.recall) == (twenty.precision, twenty.recall)
    assert one.precision < 0.5 < twenty.precision and one.recall < 0.5 < twenty.recall
    assert set(twenty.per_class_fid) == {str(label) for label in range(10)} and min(twenty.per_class_fid.values()) > 0
    assert report.fid_floor == pytest.approx(sum(report.protocol["fid_floors"]) / 3)

    written = json.loads(path.read_text())
    assert set(written) == {"rows", "num_images", "features", "reference", "seed", "fid_floor", "protocol"}
    columns = {"model", "calls", "fid", "kid", "accuracy", "images_per_second", "per_class_fid"} | {
        "precision", "recall", "per_part_fid", "stored_parameters", "active_parameters", "fid_std", "kid_std",
        "precision_std", "recall_std", "accuracy_std", "fid_infinity", "fid_infinity_std",
    }
    # Of other features, or when asked for.
    others = {
        "fd", "fd_std", "fd_infinity", "fd_infinity_std", "sfid", "patch_fid", "inception_score", "inception_score_std",
        "precision_adm", "precision_adm_std", "recall_adm", "recall_adm_std", "cmmd", "cmmd_std", "density",
        "density_std", "coverage", "coverage_std", "clip_score", "clip_score_std",
        "pickscore", "pickscore_std", "hpsv2", "hpsv2_std", "diversity", "diversity_std", "diversity_of_reference",
        "paired_distance", "paired_distance_std", "paired_distance_of_chance",
    }
    assert all(set(row) == columns | others for row in written["rows"])
    assert all(row[name] is None for row in written["rows"] for name in others)
    assert (written["num_images"], written["features"], written["reference"], written["seed"]) == (
        700,
        "digits",
        "digits",
        0,
    )
    assert written["protocol"]["processes"] == 1 and len(written["protocol"]["features_sha256"]) == 64
    assert Report.read_json(path) == report


def test_copies_of_the_reference_have_the_kid_that_the_report_gives_for_them(tmp_path):
    """As many of every class: without allowing for that, the distance would be seven times as far below 0."""
    report = evaluate(FakeTeacher(), 500, teacher_steps=[1, 10**6], cache_dir=tmp_path, progress=False)
    far, near = (row.kid for row in report.rows)
    copies = report.protocol["kid_of_copies"]
    assert -0.030 < copies < -0.018 and 0.3 < near / copies < 2.5 and far > 1
    assert f"KID x 1000 of a model that only copies the reference's images: {1000 * copies:.3f}" in str(report)
    assert "only copies" not in str(evaluate(FakeTeacher(), 50, teacher_steps=[1], cache_dir=tmp_path, progress=False))


def test_a_log_file_says_what_is_measured_before_each_row(tmp_path, capsys, monkeypatch):
    def shown(**options):
        evaluate(FakeStudent(), 40, teacher_steps=(1, 4), teacher=FakeTeacher(), cache_dir=tmp_path, **options)
        return capsys.readouterr().err

    calls = ["teacher at 1 call", "teacher at 4 calls", "student at 1 call"]
    assert shown() == "".join(f"measuring the {name}, 40 images\n" for name in calls)
    assert shown(progress=False) == ""
    Evaluator("digits", "digits", 1200, metrics=["frechet"]).measure(
        lambda noise, labels: noise, (1, 8, 8), name="pipeline", calls=None)
    assert capsys.readouterr().err == "measuring the pipeline, 1,200 images\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = shown()
    assert "measuring" not in bars and "teacher at 4 calls: " in bars and "0/40" in bars


def test_the_figures_do_not_depend_on_the_batch_size_but_on_the_seed(tmp_path):
    def fid(**options):
        return (
            evaluate(FakeTeacher(), 300, teacher_steps=[2], cache_dir=tmp_path, progress=False, **options).rows[0].fid
        )

    assert fid(batch_size=300) == pytest.approx(fid(batch_size=47), rel=1e-6)
    assert fid() != pytest.approx(fid(seed=1), rel=1e-3)


def test_what_is_not_measured_is_null(tmp_path):
    report = evaluate(FakeTeacher(), 50, teacher_steps=[2], cache_dir=tmp_path, progress=False)
    # Five images a class are fewer than features: no distance within a class.
    assert report.rows[0].per_class_fid is None and report.rows[0].fid > 0
    assert "note" in report.protocol
    plain = load_features(lambda images: images.flatten(1)[:, :10], device="cpu")
    evaluator = Evaluator(plain, "digits", 50, metrics=("frechet", "accuracy", "frechet_by_class"), progress=False)
    row = evaluator.measure(lambda noise, labels: noise, (1, 8, 8))
    assert row.accuracy is None and row.kid is None and row.fid > 0 and row.per_class_fid is None
    assert row.precision is None and row.recall is None and "precision_recall" not in evaluator.protocol()
    assert evaluator.report([row]).protocol["features_sha256"] is None


def test_without_features_speed_is_measured_and_without_a_reference_what_needs_none(tmp_path):
    teacher = FakeTeacher()
    report = flowdistill.evaluate(teacher, 700, teacher_steps=(2, 4), batch_size=30, progress=False)
    assert [asked[3] for asked in teacher.asked] == [30] * 4 and report.num_images == 60
    assert all(row.figures == {} and row.images_per_second > 0 for row in report.rows)
    text = str(report)
    said = "nothing but speed is measured: set evaluation.features (--features) and"
    assert f"60 images, seed 0; {DIRECTIONS}\n{said}" in text
    report.write_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["features"], written["reference"], written["rows"][0]["fid"]) == (None, None, None)
    assert Report.read_json(tmp_path / "report.json") == report

    report = flowdistill.evaluate(teacher, 50, teacher_steps=[20], features="digits", progress=False)
    assert report.rows[0].accuracy > 0.9 and set(report.rows[0].figures) == {"accuracy", "accuracy_std"}
    said = "nothing is compared with real images: set evaluation.reference"
    assert f"50 images, features digits, seed 0; {DIRECTIONS}\n{said}" in str(report)
    report = flowdistill.evaluate(teacher, 5, teacher_steps=[2], reference="digits", progress=False)
    assert "set evaluation.features (--features), such as" in str(report) and report.reference is None
    with pytest.raises(UserError, match="cannot be measured without features"):
        Evaluator(None, None).measure_images(None, "these")


def test_images_that_are_not_finite_are_not_measured(tmp_path):
    def broken(noise, labels):
        return torch.where(noise > 2.5, torch.nan, noise)

    evaluator = Evaluator("digits", "digits", 50, cache_dir=tmp_path, progress=False)
    with pytest.warns(UserWarning, match="not finite"):
        report = evaluate_models([("student", 1, broken), ("student", 2, broken)], (1, 8, 8), None, evaluator)
    said = str(report)
    assert "not measured, for the images are not finite (the model diverged, or overflows in its precision): " in said
    assert re.search(r": student at 1 call, student at 2 calls: \d+ of 50 images\n", said)
    assert report.rows[0].fid is None and report.rows[0].accuracy is None
    report.write_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["fid"] is None


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    Report([Row("student", 1, fid=2.0)], 10, "digits", "digits", 0).write_json(path)
    with pytest.raises(ValueError):
        Report([Row("student", 1, fid=math.nan)], 10, "digits", "digits", 0).write_json(path)
    assert Report.read_json(path).rows[0].fid == 2.0 and list(tmp_path.iterdir()) == [path]


def test_an_older_report_without_a_figure_is_read(tmp_path):
    path = tmp_path / "report.json"
    report = Report([Row("student", 1, fid=2.0, precision=0.5, recall=0.25)], 10, "digits", "digits", 0)
    values = report.to_dict()
    path.write_text(json.dumps(values))
    assert Report.read_json(path) == report
    del values["rows"][0]["precision"], values["rows"][0]["recall"]
    path.write_text(json.dumps(values))
    assert Report.read_json(path).rows == [Row("student", 1, fid=2.0)]
    assert str(Report.read_json(path)).splitlines()[2].split() == ["student", "1", "2.000", "-", "-", "-", "-", "-"]


def test_the_table_shows_every_row():
    report = Report(
        [Row("teacher", 50, 1234.5, fid=8.7, kid=0.0012, accuracy=0.991, precision=0.75, recall=0.5),
         Row("student", 1)],
        10,
        "digits",
        "digits",
        3,
        1.25,
    )
    lines = str(report).splitlines()
    assert lines[0].split() == "model calls FID ↓ KID x 1000 ↓ precision ↑ recall ↑ accuracy ↑ images/s ↑".split()
    assert lines[2].split() == ["teacher", "50", "8.700", "1.200", "0.750", "0.500", "99.10%", "1234.5"]
    assert lines[3].split() == ["student", "1", "-", "-", "-", "-", "-", "-"]
    assert "10 images" in lines[4] and "seed 3; ↓ lower is better, ↑ higher is better" in lines[4]
    assert "halves of the reference: 1.250. That is what perfect images come to" in lines[5]
    assert len({len(line) for line in lines[:4]}) == 1


def test_bad_input_is_one_sentence(tmp_path):
    for count in (0, -5):
        with pytest.raises(UserError, match=f"at least 1, not {count}"):
            evaluate(FakeTeacher(), count)
    with pytest.raises(UserError, match="at least 1 step"):
        evaluate(FakeTeacher(), 10, teacher_steps=[0])
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate(FakeTeacher(), 10, teacher_rows=False)
    with pytest.raises(UserError, match="cannot be evaluated"):
        evaluate(42, 10)
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        evaluate(tmp_path, 10)
    (tmp_path / "config.yaml").write_text("teacher: [")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        evaluate(tmp_path, 10)


def test_a_run_folder_brings_its_teacher_student_and_settings(tmp_path):
    from flowdistill import load_teacher
    from flowdistill.students import FlowMap, StudentInfo

    source = str(asset_path("digits-flow"))
    run = tmp_path / "run"
    info = StudentInfo(method="freeflow", base_model=source)
    FlowMap.from_teacher(load_teacher(source), info).save(run / "student")
    run.joinpath("config.yaml").write_text(
        f"output_dir: {run}\nteacher: {{source: {source}, null_label: null, dtype: float32}}\n"
        "evaluation: {num_images: 60, teacher_steps: [1, 2], batch_size: 20, at_end: true}\n"
    )
    report = evaluate(run, cache_dir=tmp_path, progress=False)
    assert [(row.model, row.calls) for row in report.rows] == [("teacher", 1), ("teacher", 2), ("student", 1)]
    assert report.num_images == 60
    # An untrained flow map is its teacher's one Euler step.
    one, two, student = report.rows
    assert student.fid == pytest.approx(one.fid, rel=1e-5) and two.fid < one.fid
    # The student folder alone finds its teacher; arguments win over nothing.
    alone = evaluate(run / "student", 30, teacher_steps=[2], cache_dir=tmp_path, progress=False)
    assert [row.model for row in alone.rows] == ["teacher", "student"]
    only = evaluate(run, 30, teacher_rows=False, cache_dir=tmp_path, progress=False)
    assert [row.model for row in only.rows] == ["student"]
    pipeline = evaluate(source, 30, teacher_steps=[1], cache_dir=tmp_path, progress=False)
    assert [row.model for row in pipeline.rows] == ["teacher"]


@pytest.mark.parametrize("part", [
    {"base_model": "owner/teacher"}, {"base_model": "moved/teacher"}, {"base_model": ""},
    {"base_vae": {"source": "owner/vae", "subfolder": "", "kind": "AutoencoderKL"}},
    {"base_lora": {"source": "owner/lora", "scale": 1.0}}])
def test_a_student_folder_says_why_there_are_no_rows_of_its_teacher(tmp_path, capsys, part):
    from flowdistill import load_teacher
    from flowdistill.students import FlowMap, StudentInfo

    source = str(asset_path("digits-flow"))
    FlowMap.from_teacher(load_teacher(source), StudentInfo(base_model=source)).save(tmp_path / "student")
    file = tmp_path / "student" / "flowdistill.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    (value,) = part.values()
    report = evaluate(tmp_path / "student", 2, progress=False)
    assert [row.model for row in report.rows] == ["student"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rows of the teacher" in line]
    named = value["source"] if isinstance(value, dict) else value
    assert (f"because {named}, which the student names" in line) if named else "does not say which" in line
    assert "evaluate the run folder" in line and "or give the teacher's pipeline" in line
    evaluate(tmp_path / "student", 2, teacher_rows=False, progress=False)
    assert "rows of the teacher" not in capsys.readouterr().err


def test_importing_the_package_does_not_import_evaluation():
    code = "import sys, flowdistill; sys.exit('torch' in sys.modules or 'flowdistill.evaluation' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rows_that_were_kept_have_a_line_for_each_origin():
    kept = ["teacher at 1 call: shipped, measured: elsewhere", "teacher at 4 calls: from the cache",
            "hub/a: b at 1 call: x", "teacher at 50 calls: shipped, measured: elsewhere", "said otherwise"]
    report = Report([Row("student", 1)], 10, None, None, 0, protocol={"rows_not_measured_here": kept})
    lines = report.remarks()
    first = lines.index("not measured here:") + 1
    assert lines[first:first + 4] == [
        "  teacher at 1 call, teacher at 50 calls: shipped, measured: elsewhere",
        "  teacher at 4 calls: from the cache", "  hub/a: b at 1 call: x", "  said otherwise"]


def test_kid_that_is_left_out_and_kid_that_is_not_like_the_others():
    rows = [Row("a", 1, fid=1.0, kid=0.1), Row("b", None, fid=1.0, kid=-0.1), Row("c", 1, fid=1.0)]
    alone, unknown, copies = Kernel.remarks(rows, {"kid_of_copies": -0.5, "labels": "index modulo 10"})
    assert alone.startswith("no KID x 1000 where classes come in even numbers and one of them has a single image")
    assert unknown.startswith("KID x 1000 of b: what each image was asked to be is not known") and "-500.000" in copies
    assert Kernel.remarks(rows[:2], {}) == Kernel.remarks(rows[:1], {"kid_of_copies": -0.5}) == []
    assert Kernel.remarks(rows[2:], {}) == []  # against moments, of which there is no KID of anything
    assert Kernel.remarks(rows[1:2], {"labels": "index modulo 10"}) == []
