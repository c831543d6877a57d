"""MSD: K runs over a partition, their manifest, and the one student they are (arXiv 2410.23274)."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from flowdistill import UserError, load_student, load_teacher
from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.config import EvaluationConfig, RunConfig, StopConfig, TeacherConfig, TrainConfig, load_config
from flowdistill.export import export
from flowdistill.methods.boot import BootConfig
from flowdistill.methods.msd import runs
from flowdistill.methods.msd.partition import Partition
from flowdistill.methods.msd.runs import student_runs
from flowdistill.methods.msd.settings import AdversarialStage, MsdConfig
from flowdistill.methods.msd.student import RoutedStudent
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.methods.teacher_score_matching import ScoreMatchingConfig
from flowdistill.students import is_student_folder
from flowdistill.teachers.pairs import Pairs, teacher_pairs
from flowdistill.teachers.real_data import RealData
from flowdistill.training.run import distill
from flowdistill.training.signals import Interrupts
from tests.families import stable_diffusion
from tests.students.test_student import SCHEDULERS
from tests.students_of_steps import noises, pixel_student
from tests.tiny import replaced, tiny_unet_pipeline

PROMPTS = ["a red cat", "two birds", "the sea at night", "a cat", "birds", "the night sea"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A teacher of ten classes of 8x8 images."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny_unet_pipeline(num_class_embeds=10).save_pretrained(folder)
    return str(folder)


def config_of(source, folder, method=None, **train):
    settings = {"steps": 3, "batch_size": 4, "log_every": 1, "checkpoint_every": 0, "num_samples": 4, "trackers": [],
                "device": "cpu", "precision": "fp32", "ema_decay": 0.5} | train  # fmt: skip
    method = MsdConfig(host=Dmd2Config()) if method is None else method
    return RunConfig(output_dir=str(folder), teacher=TeacherConfig(source), method=method,
                     train=TrainConfig(**settings),
                     evaluation=EvaluationConfig(features="digits", reference="digits", at_end=False))


def msd(source, folder, train=None, **settings):
    return config_of(source, folder, MsdConfig(**{"host": Dmd2Config()} | settings), **(train or {}))


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """Three students in turn: classes 0-3, 4-6, 7-9."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    done = distill(msd(source, folder, num_students=3))
    assert (done.completed, done.steps, done.report) == (True, 9, None)
    return folder


# --- the runs


def test_the_folder_of_all_students(run):
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".begin.lock", ".lock", "README.md", "config.yaml", "flowdistill.json", "partition.json", "samples",
        "samples.png", "student-0", "student-1", "student-2", "weights.json"]
    assert sorted(entry.name for entry in (run / "samples").iterdir()) == ["comparison.png", "final.png"]
    for part, labels in enumerate(([0, 1, 2, 3], [4, 5, 6], [7, 8, 9])):
        one = load_config(run / f"student-{part}" / "config.yaml")
        assert one.teacher.labels == labels and one.method == Dmd2Config()
        assert load_student(run / f"student-{part}").classes.shown == tuple(labels)
    manifest = json.loads((run / "flowdistill.json").read_text())
    assert manifest["partition"] == {"count": 3, "rule": "sequential", "parts": [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    assert load_config(run / "config.yaml").method == MsdConfig.hosted("dmd2")(num_students=3, host=Dmd2Config())


@pytest.mark.parametrize(
    "host", [Dmd2Config(regression_weight=0.5, regression_pairs=6, regression_steps=2), BootConfig()])
def test_one_student_is_the_host_bit_for_bit(source, tmp_path, host):
    distill(config_of(source, tmp_path / "host", host))
    distill(msd(source, tmp_path / "one", num_students=1, host=host))
    assert same(weights(tmp_path / "host"), weights(tmp_path / "one" / "student-0"))
    single, routed = load_student(tmp_path / "host"), load_student(tmp_path / "one")
    assert isinstance(routed, RoutedStudent)
    images = [student.generate(num_images=7, seed=3, batch_size=3) for student in (single, routed)]
    assert torch.equal(*images)
    noise, condition = torch.randn(5, 1, 8, 8), single.encode([1, 9, 4, 4, 0])
    assert torch.equal(single(noise, condition), routed(noise, condition))


def test_jobs_of_one_student_each_make_what_one_job_makes(source, tmp_path, run):
    for part in (2, 0):
        done = distill(msd(source, tmp_path / "r", num_students=3, student_index=part))
        assert not done.completed and "the manifest follows when" in done.contents
        assert not (tmp_path / "r" / "flowdistill.json").exists()
    assert done.contents.endswith("when 1 are there too")
    with pytest.raises(UserError, match="its training has not finished yet"):
        load_student(tmp_path / "r")
    done = distill(msd(source, tmp_path / "r", num_students=3, student_index=1))
    assert done.completed
    for part in range(3):
        assert same(weights(run / f"student-{part}"), weights(tmp_path / "r" / f"student-{part}"))
    mine, other = (json.loads((folder / "flowdistill.json").read_text()) for folder in (run, tmp_path / "r"))
    assert mine == other


@pytest.mark.parametrize("index", [0, None])
def test_jobs_at_once_are_of_one_configuration(source, tmp_path, monkeypatch, index):
    """While another job is at work, which has saved nothing yet, whether it trains one student or all in turn."""
    folder, begun, train = tmp_path / "r", [], runs.distill_one

    def shared():
        return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}

    def train_beside(run, *given, **named):
        begun.append(Path(run.output_dir).name)
        if len(begun) > 1:
            return train(run, *given, **named)
        before = shared()
        for other in (1, 0, None):
            with pytest.raises(UserError, match="another run: method.partition is sequential there and random here"):
                distill(msd(source, folder, num_students=3, student_index=other, partition="random"))
            with pytest.raises(UserError, match="another run: train.batch_size is 4 there and 2 here"):
                distill(msd(source, folder, {"batch_size": 2}, num_students=3, student_index=other))
        with pytest.raises(UserError, match=f"another training is going on in .*r{'/student-0' * (index == 0)};"):
            distill(msd(source, folder, num_students=3, student_index=index))
        assert shared() == before and not (folder / "student-1").exists()
        distill(msd(source, folder, {"log_every": 3}, num_students=3, student_index=2))
        return train(run, *given, **named)

    monkeypatch.setattr(runs, "distill_one", train_beside)
    distill(msd(source, folder, num_students=3, student_index=index))
    assert begun == ["student-0", "student-2", *(["student-1"] if index is None else [])]
    # Nobody is at work any more, but there is a student now.
    with pytest.raises(UserError, match="another run: method.partition is sequential there"):
        distill(msd(source, folder, num_students=3, student_index=1, partition="random"))


def test_a_job_that_is_refused_leaves_no_folder(source, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_open_evaluation", lambda *given: load_teacher(str(tmp_path / "nowhere")))
    for index in (0, None):
        with pytest.raises(UserError, match="nowhere does not exist"):
            distill(msd(source, tmp_path / "a" / "b", student_index=index))
        assert not list(tmp_path.iterdir())


def test_another_teacher_in_the_place_of_the_first_trains_no_further_student(source, tmp_path):
    """Though the run of that student has not begun, nor the one of the first to be gone on with."""
    distill(msd(source, tmp_path / "r", {"steps": 1}, num_students=2, student_index=0))
    with replaced(Path(source) / "unet" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UserError, match=r"r was trained with other files than there are now: .*teacher\.source"):
            distill(msd(source, tmp_path / "r", {"steps": 1}, num_students=2, student_index=1))
    assert distill(msd(source, tmp_path / "r", {"steps": 1}, num_students=2)).completed


def test_it_goes_on_at_the_student_and_step_where_it_stopped(source, tmp_path, run, monkeypatch):
    seen = []

    def agreed(self, device, world):
        seen.append(1)
        return signal.SIGTERM if len(seen) == 5 else 0

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "agreed", agreed)
        stopped = distill(msd(source, tmp_path / "r", num_students=3))
    assert (stopped.completed, stopped.interrupted, stopped.steps) == (False, signal.SIGTERM, 5)
    assert not (tmp_path / "r" / "flowdistill.json").exists() and not (tmp_path / "r" / "student-2").exists()
    before = (tmp_path / "r" / "student-0" / "student" / "model.safetensors").stat().st_mtime_ns
    assert distill(msd(source, tmp_path / "r", num_students=3)).completed
    assert (tmp_path / "r" / "student-0" / "student" / "model.safetensors").stat().st_mtime_ns == before
    for part in range(3):
        assert same(weights(run / f"student-{part}"), weights(tmp_path / "r" / f"student-{part}"))


def test_a_student_without_checkpoints_is_not_trained_again(source, run, tmp_path, monkeypatch):
    """Nor are the others, and nothing is written."""
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "student-1" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    monkeypatch.setattr(runs, "distill_one", lambda *given: pytest.fail("something was trained"))
    for steps, index in ((3, None), (3, 1), (4, None)):
        with pytest.raises(UserError, match="student-1 has student/, samples/final.png of an earlier training and no "):
            distill(msd(source, tmp_path / "r", {"steps": steps}, num_students=3, student_index=index))
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}


def test_students_that_stop_early_are_complete(source, tmp_path, monkeypatch):
    """Each is measured and stopped by itself, and none is trained again by the next call; the shared start never is."""
    measured = []

    def figure(student):
        measured.append(tuple(student.classes.shown))
        return {"fid": float(len(measured))}

    monkeypatch.setattr("flowdistill.training.loop.FidCallback", lambda *given: figure)
    train = {"steps": 9, "evaluate_every": 1, "stop_when": StopConfig(patience=2)}
    shared = {"score_matching": ScoreMatchingConfig(student_size=0.5, samples=4, sample_steps=1),
              "score_matching_steps": 3}
    done = distill(msd(source, tmp_path, train, num_students=2, **shared))
    assert (done.completed, done.steps) == (True, 3 + 2 + 2) and is_student_folder(tmp_path)
    halves = tuple(range(5)), tuple(range(5, 10))
    assert measured == [tuple(range(10))] * 3 + [halves[0]] * 3 + [halves[1]] * 3  # the steps 1 to 3, then 0 to 2
    for part in range(2):  # the figure rises from the start
        start, kept = (load_file(path / "student" / "model.safetensors") for path in (
            tmp_path / "tsm", tmp_path / f"student-{part}"))
        assert same(start, kept)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = distill(msd(source, tmp_path, train, num_students=2, **shared))
    assert (again.completed, again.steps, len(measured)) == (True, 7, 9)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_students_differ_in_their_conditions_and_seeds_only(source, tmp_path):
    config = msd(source, tmp_path, num_students=2)
    from flowdistill.methods.msd.runs import make_partition

    partition = make_partition(config.method, load_teacher(source))
    (first,), (second,) = (student_runs(config, partition, part) for part in (0, 1))
    assert first.seed == config.seed != second.seed and first.evaluation.at_end is False
    assert dataclasses.replace(first, seed=0, output_dir="", teacher=second.teacher) == dataclasses.replace(
        second, seed=0, output_dir="")
    assert (first.teacher.labels, second.teacher.labels) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


def test_a_folder_of_another_partition_is_refused(source, run):
    before = (run / "config.yaml").read_text()
    for settings, key in (({"num_students": 2}, "method.num_students"),
                          ({"num_students": 3, "partition": "random"}, "method.partition")):
        with pytest.raises(UserError, match=f"holds another run: {key} is"):
            distill(msd(source, run, **settings))
    assert (run / "config.yaml").read_text() == before


# --- what each student sees


def test_pairs_are_shared_and_real_images_are_not(source):
    teacher = load_teacher(source, labels=[8, 3])
    pairs = teacher_pairs(teacher, 20, 2)
    assert pairs.labels.bincount().tolist() == [2] * 10
    own = pairs.of(teacher.classes.shown)
    assert own.labels.tolist() == [3, 8, 3, 8] and torch.equal(own.latents[0], pairs.latents[3])
    data = RealData(teacher, "digits")
    assert data.labels.unique().tolist() == [3, 8] and len(data) == len(data.labels) == 183 + 174
    with pytest.raises(UserError, match="none of the 3 pairs has one of the labels"):
        teacher_pairs(teacher, 3, 1).of([7])
    with pytest.raises(UserError, match="has no image of the labels"):
        RealData(teacher, "x", (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)))


def test_pairs_of_other_parts_move_shared_weights_but_no_table():
    """Digest, D: out-of-partition pairs have no gradient on a tabular generator's own rows."""
    labels = torch.tensor([0, 1, 2, 3])
    pairs = Pairs(torch.randn(4, 2), torch.randn(4, 2), labels)
    table = torch.zeros(4, 2, requires_grad=True)
    shared = torch.zeros(2, requires_grad=True)
    teacher = type("T", (), {"classes": ClassLabels(4, None), "device": torch.device("cpu")})()
    _, latents, condition = pairs.rows(torch.tensor([2, 3]), teacher)  # a student of 0 and 1 meets these
    for output in (table[condition.tensors["class_labels"]], shared.expand(2, 2)):
        (output - latents).square().mean().backward()
    assert (table.grad[:2] == 0).all() and (table.grad[2:] != 0).any() and (shared.grad != 0).any()


# --- all students as one


def test_rows_go_to_their_student_and_come_back_in_order(run):
    routed, single = load_student(run), [load_student(run / f"student-{part}") for part in range(3)]
    labels = [9, 0, 5, 3, 7, 4, 1]
    noise, condition = torch.randn(7, 1, 8, 8), routed.encode(labels)
    out = routed(noise, condition)
    for row, label in enumerate(labels):
        owner = single[[0, 0, 0, 0, 1, 1, 1, 2, 2, 2][label]]
        torch.testing.assert_close(out[row : row + 1], owner(noise[row : row + 1], condition[row : row + 1]))
    images = routed.generate(num_images=23, seed=5, batch_size=4)
    torch.testing.assert_close(images, torch.cat(list(routed.batches(num_images=23, seed=5, batch_size=6))))
    mine = single[1].generate(labels=[4], seed=5, num_images=5)
    torch.testing.assert_close(images[4], mine[4])  # a four of the fifth noise


def test_the_map_is_differentiable(run):
    routed = load_student(run).requires_grad_(True)
    noise = torch.randn(4, 1, 8, 8, requires_grad=True)
    routed(noise, routed.encode([9, 0, 5, 0])).square().sum().backward()
    assert (noise.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert all(any(p.grad is not None for p in student.network.parameters()) for student in routed.students)


def test_only_some_students_are_on_the_device(run, monkeypatch):
    everything, few = load_student(run), load_student(run, device="cpu", resident=2)
    placed = []
    for part, student in enumerate(few.students):
        monkeypatch.setattr(student.network, "to", lambda device, part=part: placed.append((part, str(device))))
    few.to("cpu:0")  # where its networks are anyway, by a name that tells a student in use from one put away
    for part in (0, 1, 0, 2, 2, 0):
        few.student(part)
        assert len(few.on_device) <= 2
    moves = [part for part, device in placed if device == "cpu:0"]
    assert moves == [0, 1, 0, 2, 2, 0] and [part for part, device in placed if device == "cpu"] == [1]
    monkeypatch.undo()
    few.to("cpu")
    assert torch.equal(few.generate(num_images=20), everything.generate(num_images=20))
    with pytest.raises(UserError, match="resident is 0"):
        load_student(run, resident=0)


def test_a_label_without_a_student(run, cli, tmp_path):
    with pytest.raises(UserError, match="label 10 is out of range"):
        load_student(run).generate(labels=[10])
    with pytest.raises(UserError, match="no student owns the label 10"):
        load_student(run)(torch.randn(1, 1, 8, 8), Condition({"class_labels": torch.tensor([10])}))
    with pytest.raises(UserError, match="label 5 is none of those that this student was trained for: 0, 1, 2, 3"):
        load_student(run / "student-0").generate(labels=[0, 5])
    result = cli("sample", run / "student-1", "--num-images", 2, "--labels", "2", "--out", tmp_path / "x.png")
    assert result.code == 2 and "label 2 is none of those" in result.err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: shutil.rmtree(run / "student-1"), r"student 1 of .* is missing: there is no folder .*student-1"),
        (lambda run: (run / "student-2/student/scheduler/scheduler_config.json").write_text("{}"),
         r"student 2 of .* is not the one of the manifest: .*scheduler_config.json was altered"),
        (lambda run: (run / "student-0/student/model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda run: (run / "student-0/student/more").touch(), "more was added"),
        (lambda run: (run / "flowdistill.json").write_text('{"kind": "routed", "format": 1}'), "is damaged"),
        (lambda run: (run / "flowdistill.json").write_text('{"kind": "routed", "format": 9}'), "has the format 9"),
    ],
)
def test_a_manifest_whose_students_are_not_as_they_were(run, tmp_path, cli, change, sentence):
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        load_student(tmp_path / "run")
    result = cli("sample", tmp_path / "run", "--num-images", 1, "--out", tmp_path / "x.png")
    assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_saved_again_it_is_the_same(run, tmp_path):
    routed = load_student(run)
    routed.save(tmp_path / "again")
    assert is_student_folder(tmp_path / "again")
    assert torch.equal(load_student(tmp_path / "again").generate(num_images=10), routed.generate(num_images=10))


def test_export_is_a_stock_pipeline_each(run, tmp_path, cli):
    result = cli("export", run, tmp_path / "out")
    assert result.code == 0 and "a diffusers pipeline for each student" in result.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    routed = load_student(run)
    for part, entry in enumerate(manifest["pipelines"]):
        labels = manifest["partition"]["parts"][part]
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / entry["folder"])
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=len(labels), class_labels=labels, num_inference_steps=1, output_type="pt",
                      generator=torch.Generator().manual_seed(4)).images
        noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(4))
        expected = routed.decode(routed(noise, routed.encode(labels)))
        got = torch.as_tensor(images).reshape(expected.shape) if images.shape != expected.shape else images
        torch.testing.assert_close(torch.as_tensor(got), expected, atol=1e-4, rtol=0)
    assert cli("export", run, tmp_path / "out").code == 2
    assert cli("export", run, tmp_path / "out", "--overwrite").code == 0


@pytest.mark.parametrize(("scheduler", "folders"), [
    ("epsilon", ["student-0", "student-1"]), ("flow", ["student-0/class-0", "student-0/class-1", "student-1/class-2"])])
def test_export_of_students_of_several_calls(tmp_path, scheduler, folders):
    """A pipeline each, or one for each of a student's classes where no pipeline takes their labels."""
    parts = [[0, 1], [2]]
    students = [pixel_student(SCHEDULERS[scheduler](), labels=labels) for labels in parts]
    with torch.no_grad():
        for parameter in students[1].network.parameters():
            parameter.mul_(1.1)
    routed = RoutedStudent(students, Partition.from_dict({"count": 2, "rule": "sequential", "parts": parts}))
    export(routed, tmp_path / "out")
    assert "# 2 4-step generators" in (tmp_path / "out/README.md").read_text()
    drawn = noises(students[0], 2)
    for folder in folders:
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / folder)
        pipe.set_progress_bar_config(disable=True)
        labels = [int(folder[-1])] * 2 if scheduler == "flow" else [parts[int(folder[-1])][0]] * 2
        given = {} if scheduler == "flow" else {"class_labels": labels}
        images = pipe(batch_size=2, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(1),
                      **given).images
        own = students[labels[0] // 2]
        with torch.no_grad():
            expected = own.decode(own(drawn[0], routed.encode(labels), between=lambda k: drawn[k - 1]))
        assert (images - expected).abs().max() < 1e-5


def test_evaluation_pools_all_students_and_measures_each_part(run, cli, tmp_path):
    report = tmp_path / "report.json"
    result = cli("evaluate", run, "--num-images", 400, "--no-teacher", "--json", report, "--device", "cpu")
    assert result.code == 0 and "FID of each student's part: 0: " in result.out and "parameters stored" in result.out
    (row,) = json.loads(report.read_text())["rows"]
    assert set(row["per_part_fid"]) == {"0", "1", "2"} and row["images_per_second"] > 0
    assert row["stored_parameters"] == 3 * row["active_parameters"]
    alone = tmp_path / "alone.json"
    result = cli("evaluate", run / "student-0", "--num-images", 160, "--no-teacher", "--json", alone, "--device", "cpu")
    assert result.code == 0 and "reference digits, labels 0, 1, 2, 3" in result.out
    assert json.loads(alone.read_text())["rows"][0]["fid"] == pytest.approx(row["per_part_fid"]["0"], rel=0.2)


# --- stages


def test_smaller_students_share_one_start(source, tmp_path):
    matching = ScoreMatchingConfig(student_size=0.5, samples=4, sample_steps=1)
    settings = {"score_matching": matching, "score_matching_steps": 2}
    with pytest.raises(UserError, match="the students' shared start, is not complete; train it first"):
        distill(msd(source, tmp_path / "a", student_index=0, **settings))
    assert not (tmp_path / "a").exists()
    done = distill(msd(source, tmp_path / "a", student_index=-1, **settings))
    assert not done.completed and done.steps == 2 and not (tmp_path / "a" / "student-0").exists()
    assert distill(msd(source, tmp_path / "a", **settings)).completed
    student = load_student(tmp_path / "a")
    small = sum(p.numel() for p in student.students[0].network.parameters())
    assert small <= 0.5 * sum(p.numel() for p in load_teacher(source).network.parameters())
    assert student.generate(num_images=3).isfinite().all()
    # Without its training the start is random, and still the same for all.
    distill(msd(source, tmp_path / "b", **settings | {"score_matching_steps": 0}))
    assert load_student(tmp_path / "b" / "tsm").info.method == "teacher_score_matching"
    assert not same(weights(tmp_path / "a" / "tsm"), weights(tmp_path / "b" / "tsm"))


def test_an_adversarial_stage_goes_on_from_the_first(source, tmp_path):
    stage = AdversarialStage(data="digits", steps=2, lr=1e-9)
    assert distill(msd(source, tmp_path / "r", adversarial=stage)).completed
    for part, labels in enumerate(([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])):
        folders = [tmp_path / "r" / f"{name}-{part}" for name in ("matching", "student")]
        first, second = (load_config(folder / "config.yaml") for folder in folders)
        assert first.method.adversarial_weight == 0 and second.method.adversarial_weight == 5e-3
        assert first.teacher.labels == second.teacher.labels == labels and second.train.steps == 2
        before, after = map(weights, folders)  # the second rate is next to nothing
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
        assert not same(before, after)


# --- prompts


@pytest.fixture(scope="module")
def prompt_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    stable_diffusion().save_pretrained(folder / "teacher")
    (folder / "prompts.csv").write_text("\n".join(["caption", *PROMPTS, "a cat"]))
    host = Dmd2Config(regression_weight=0.5, regression_pairs=8, regression_steps=1)
    config = msd(str(folder / "teacher"), folder / "run", partition="balanced_kmeans", num_students=3, host=host)
    config.teacher.prompts, config.teacher.prompt_column = str(folder / "prompts.csv"), "caption"
    config.teacher.prompt_cache = "disk"
    assert distill(config).completed
    return folder / "run"


def test_prompts_are_split_and_routed(prompt_run):
    routed = load_student(prompt_run)
    partition = routed.partition
    assert partition.prompts == PROMPTS
    assert partition.weights == pytest.approx([1 / 7, 1 / 7, 1 / 7, 2 / 7, 1 / 7, 1 / 7])
    sizes = [partition.owner.count(part) for part in range(3)]
    assert sizes == [2, 2, 2]
    for part in range(3):
        lines = (prompt_run / f"prompts-{part}.jsonl").read_text().splitlines()
        mine = [prompt for prompt, owner in zip(PROMPTS, partition.owner, strict=True) if owner == part]
        assert [json.loads(line)["prompt"] for line in lines] == mine
        assert load_student(prompt_run / f"student-{part}").prompts.prompts == mine
    assert routed.route(routed.encode(prompts=PROMPTS)).tolist() == partition.owner
    unseen = ["a cat at sea", "a red bird"]
    alone = [int(routed.route(routed.encode(prompts=[prompt]))) for prompt in unseen]
    assert routed.route(routed.encode(prompts=[*PROMPTS, *unseen])).tolist() == [*partition.owner, *alone]


def test_pairs_are_of_all_prompts_or_of_the_students_own(prompt_run):
    """Each student has the same pairs, whatever prompts it draws; its own ones only where that is asked for."""
    every = None
    for part in range(3):
        config = load_config(prompt_run / f"student-{part}" / "config.yaml")
        teacher = load_teacher(config.teacher)
        pairs = Dmd2(config.method, teacher).pairs
        assert pairs.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
        every = every or pairs
        noise, latents, condition = pairs.rows(torch.arange(6), teacher)
        assert torch.equal(noise, every.noise[:6]) and torch.equal(latents, every.latents[:6])
        whole = teacher.prompts.encode(PROMPTS).tensors
        assert all(torch.equal(value, whole[name]) for name, value in condition.tensors.items())
    partition = load_student(prompt_run).partition
    config = load_config(prompt_run / "config.yaml")
    config.method.host.regression_own = True
    run = student_runs(config, partition, 1)[0]
    assert run.method.regression_prompts is None and run.teacher.prompts.endswith("prompts-1.jsonl")
    assert Dmd2(run.method, load_teacher(run.teacher)).pairs.labels.tolist() == [0, 1] * 4


def test_images_of_prompts_come_from_their_students(prompt_run, tmp_path, cli):
    routed = load_student(prompt_run)
    images = routed.generate(prompts=PROMPTS, seed=2, batch_size=2)
    for row, owner in enumerate(routed.partition.owner):
        student = load_student(prompt_run / f"student-{owner}")
        single = student.generate(prompts=[PROMPTS[row]], num_images=row + 1, seed=2)
        torch.testing.assert_close(images[row], single[row], atol=1e-4, rtol=0)
    assert len(routed.generate(num_images=4)) == 4
    assert cli("sample", prompt_run, "--num-images", 7, "--out", tmp_path / "grid.png").code == 0
    assert cli("export", prompt_run, tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["partition"]["prompts"] == PROMPTS and len(manifest["pipelines"]) == 3
    assert "squared distance to `centres` plus `offsets`" in (tmp_path / "out" / "README.md").read_text()
