"""``train.stop_when``: the best student is kept and training ends, whatever happens on the way."""

import dataclasses
import json
import math
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowdistill.config import METHODS, EvaluationConfig, StopConfig, load_config, save_config
from flowdistill.evaluation import Report, Row
from flowdistill.evaluation.metrics import all_metrics
from flowdistill.evaluation.reference import Reference
from flowdistill.students import load_student
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.training.callbacks import FidCallback
from flowdistill.training.folder_lock import LOCK
from flowdistill.training.loop import Trainer
from flowdistill.training.run import describe_run, distill
from flowdistill.training.signals import Interrupts
from flowdistill.training.stopping import Stopping
from flowdistill.utils.errors import UserError
from tests.processes import Child, ranks, run
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import ToyFigures, ToyMethod, make_config, make_trainer

TOY = "tests.toy_method"
# ToyFigures is best at step 10; three measurements later it is step 16.
SETTINGS = {"steps": 40, "evaluate_every": 2, "checkpoint_every": 4, "log_every": 3}
BEST, END = 10, 16


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    monkeypatch.setattr("flowdistill.training.loop.FidCallback", ToyFigures)


def stopped_trainer(folder, patience=3, **train):
    return make_trainer(folder, **SETTINGS | {"stop_when": StopConfig(patience=patience)} | train)


def lines(folder):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(text).items() if key not in ("seconds", "images_per_second")}
            for text in texts]


def best_files(folder):
    return sorted(file.name for file in (folder / "best").iterdir())


# --- the decision


def seen(values, better="lower", **settings):
    """A Stopping that has seen one value after the other, and at which of them it said that this is the best."""
    figure = {"lower": "fid", "higher": "recall"}[better]
    stopping = Stopping(StopConfig(figure, **settings), EvaluationConfig(features="digits", reference="digits"))
    best = []
    for step, value in enumerate(values):
        stopping.updated = True
        if stopping.see(step, {figure: value}):
            best.append(step)
    return stopping, best


def test_every_figure_that_ranks_models_says_which_way_it_is_better():
    ways = {name: way for metric in all_metrics() for name, way in metric.better.items()}
    distances = ("fid", "fd", "fid_infinity", "fd_infinity", "sfid", "patch_fid", "kid", "cmmd")
    shares = ("accuracy", "precision", "recall", "precision_adm", "recall_adm", "density", "coverage")
    scores = ("inception_score", "clip_score", "pickscore", "hpsv2")
    assert ways == dict.fromkeys(distances, "lower") | dict.fromkeys((*shares, *scores), "higher")
    for metric in all_metrics():
        assert set(metric.better) <= set(metric.figures)
        # Whoever adds a column to the table says what it is for; those of images of one prompt rank no models.
        columns = {column.name for column in metric.columns}
        assert set(metric.better) >= columns or metric.name in ("diversity", "paired_distance")


@pytest.mark.parametrize("sign", [1, -1])
def test_patience_counts_measurements_without_a_better_one(sign):
    way = "lower" if sign > 0 else "higher"
    values = [sign * value for value in (5.0, 4.0, 4.0, 4.5, 3.0, 3.5, 3.1)]
    stopping, best = seen(values, way, patience=3)
    assert best == [0, 1, 4] and (stopping.step, stopping.best) == (4, sign * 3.0)
    assert (stopping.waited, stopping.exhausted, stopping.count) == (2, False, 7)
    stopping, _ = seen([*values, sign * 3.0], way, patience=3)
    assert stopping.exhausted and stopping.step == 4  # of two that are equal the first


def test_small_gains_are_kept_but_do_not_count():
    stopping, best = seen([5.0, 4.9, 4.8, 4.6, 4.55], patience=2, min_delta=0.3)
    assert best == [0, 1, 2, 3, 4] and stopping.step == 4
    assert stopping.waited == 1  # 4.6 is better than 5.0 by 0.4, 4.55 than 4.6 by too little


def test_a_student_that_was_not_updated_is_not_counted():
    stopping, _ = seen([5.0], patience=1)
    for step in range(1, 9):
        assert not stopping.see(step, {"fid": 5.0})
    assert (stopping.count, stopping.exhausted) == (1, False)
    stopping.updated = True
    assert not stopping.see(9, {"fid": 5.0}) and stopping.exhausted


@pytest.mark.parametrize("way", ["lower", "higher"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_broken_student_is_worse_than_any(way, value):
    stopping, best = seen([5.0, value, value, 5.0], way, patience=5)
    assert best == [0] and stopping.waited == 3
    with pytest.raises(UserError, match="could not be measured of the student at step 0 with the features digits"):
        seen([value], way)


def test_its_state_goes_on_and_other_measurements_begin_anew():
    stopping, _ = seen([5.0, 4.0, 4.2, 4.1], patience=3)
    state = json.loads(json.dumps(stopping.state_dict(), allow_nan=False))
    settings = EvaluationConfig(features="digits", reference="digits")
    again = Stopping(StopConfig(patience=3), settings)
    again.load_state_dict(state)
    assert again.state_dict() == stopping.state_dict()
    again.updated = True
    assert not again.see(9, {"fid": 4.05}) and again.exhausted
    for changed, words in (
        (Stopping(StopConfig("recall"), settings), "metric was fid and is recall$"),
        (Stopping(StopConfig(), dataclasses.replace(settings, num_images=7)), "num_images was 10000 and is 7$"),
    ):
        with pytest.warns(UserWarning, match="seeks the best student anew, for it is measured otherwise: " + words):
            changed.load_state_dict(state)
        assert changed.step is None and changed.updated


def test_other_features_or_images_under_the_same_name_begin_anew():
    """A state of an older version, or of a reference that is not open, does not say which they were."""
    settings, nothing = EvaluationConfig(features="a.pt", reference="b"), torch.zeros(1)
    made = [Reference("b", nothing, nothing, source_hash=images, feature_hash=features)
            for images, features in (("1", "2"), ("1", "3"))]
    first = Stopping(StopConfig(), settings, made[0])
    first.see(0, {"fid": 5.0})
    state = json.loads(json.dumps(first.state_dict()))
    with pytest.warns(UserWarning, match="it is measured otherwise: features_sha256 was 2 and is 3$"):
        Stopping(StopConfig(), settings, made[1]).load_state_dict(state)
    older = {**state, "by": Stopping(StopConfig(), settings).state_dict()["by"]}
    for reference, known in ((None, state), (made[1], older)):
        stopping = Stopping(StopConfig(), settings, reference)
        stopping.load_state_dict(known)
        assert stopping.best == 5.0


# --- the run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stops by itself, and the averaged weights of every step of one that does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowdistill.training.loop.FidCallback", ToyFigures)
        folder = tmp_path_factory.mktemp("whole")
        stopped_trainer(folder).train()
    free, averages = make_trainer(tmp_path_factory.mktemp("free"), steps=20, checkpoint_every=0), {}
    for step in range(21):
        network = free.roles["student"].average.network
        averages[step] = {name: value.clone() for name, value in network.state_dict().items()}
        free.train_step()
    return folder, averages


def taken(trainer):
    trainer.take_best()
    return trainer.student().network.state_dict()


def assert_same_run(whole, folder):
    """The same lines, decision and best student as the run that nobody disturbed."""
    assert lines(folder) == lines(whole)
    one, other = (stopped_trainer(path) for path in (whole, folder))
    assert (one.step, one.completed) == (END, True) == (other.step, other.completed)
    assert one.stopping.state_dict() == other.stopping.state_dict()
    assert all(torch.equal(value, taken(other)[name]) for name, value in taken(one).items())
    name = f"step-{BEST:06d}.safetensors"
    assert (whole / "best" / name).read_bytes() == (folder / "best" / name).read_bytes()


def test_training_ends_and_the_best_student_is_the_one_of_its_step(whole):
    folder, averages = whole
    trainer = stopped_trainer(folder)
    assert trainer.completed and trainer.step == END < trainer.settings.steps
    for name, value in taken(trainer).items():
        assert torch.equal(value, averages[BEST][name])
    measured = [line for line in lines(folder) if "fid" in line]
    assert [line["step"] for line in measured] == list(range(0, END + 1, 2))
    assert [line["best_step"] for line in measured] == [0, 0, 4, 6, 8, 10, 10, 10, 10]
    assert measured[5]["fid"] == trainer.stopping.best == min(line["fid"] for line in measured)
    assert best_files(folder) == [f"step-{BEST:06d}.safetensors"]  # that of checkpoint 12 is the same one


def test_without_it_nothing_is_kept_and_all_steps_are_done(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS | {"steps": 20})
    trainer.train()
    assert trainer.step == 20 and not (tmp_path / "best").exists()
    assert [line["step"] for line in lines(tmp_path) if "fid" in line] == list(range(2, 21, 2))
    assert not any("best_step" in line for line in lines(tmp_path))
    before = {name: value.clone() for name, value in trainer.student().network.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in taken(trainer).items())


def test_the_last_student_is_measured_too(tmp_path, whole):
    trainer = stopped_trainer(tmp_path, steps=9, evaluate_every=4)
    trainer.train()
    assert [line["step"] for line in lines(tmp_path) if "fid" in line] == [0, 4, 8, 9]
    assert trainer.completed and not trainer.stopping.exhausted and trainer.stopping.step == 9
    assert all(torch.equal(value, whole[1][9][name]) for name, value in taken(trainer).items())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", [0, 1, 7, 9, 11, 15])
def test_a_kill_after_any_step_changes_nothing(tmp_path, whole, monkeypatch, last):
    """At 11 the best student is newer than the checkpoint, 8, from which the run goes on; at 0 there is none."""
    real = Trainer.train_step

    def train_step(trainer):
        if trainer.step == last:
            raise Killed
        real(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(Killed):
            stopped_trainer(tmp_path).train()
    resumed = stopped_trainer(tmp_path)
    assert resumed.step == last // 4 * 4
    resumed.train()
    assert_same_run(whole[0], tmp_path)


@pytest.mark.parametrize("last", [2, 3, 10, 16])
def test_a_signal_after_any_step_changes_nothing(tmp_path, whole, monkeypatch, last):
    """A measurement that was due at that very step is made up for by the resume."""
    agreed = Interrupts.agreed
    trainer = stopped_trainer(tmp_path, sample_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "agreed", lambda self, device, world: 15 if trainer.step == last else
                      agreed(self, device, world))
        trainer.train()
    assert (trainer.step, trainer.interrupted) == (last, 15)
    assert lines(tmp_path)[-1].get("best_step") is None or lines(tmp_path)[-1]["step"] < last
    resumed = stopped_trainer(tmp_path, sample_every=2)
    assert resumed.step == last
    resumed.train()
    assert_same_run(whole[0], tmp_path)
    pictures = sorted(path.stem for path in (tmp_path / "samples").iterdir())
    assert pictures == [f"step-{step:06d}" for step in range(0, END + 1, 2)]


def test_a_measurement_made_up_for_is_not_made_again(tmp_path, monkeypatch):
    trainer = stopped_trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "agreed", lambda self, device, world: 15 if trainer.step == 2 else 0)
        trainer.train()
    trainer = stopped_trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda trainer: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            trainer.train()
    assert stopped_trainer(tmp_path).stopping.count == 2
    stopped_trainer(tmp_path, steps=3).train()
    assert [line["step"] for line in lines(tmp_path) if "fid" in line] == [0, 2, 3]


def test_a_process_killed_for_good_goes_on_to_the_same_student(tmp_path, whole):
    options = [f"{name}={value}" for name, value in (SETTINGS | {"patience": 3}).items()]
    with Child(TOY, tmp_path, *options, "pause=30") as process:
        process.line("step 11")  # the best was written after the checkpoint of step 8
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert best_files(tmp_path) == [f"step-{step:06d}.safetensors" for step in (4, 8, BEST)]
    assert "from step 8" in run(TOY, tmp_path, *options)
    average = load_file(tmp_path / "average.safetensors")
    assert all(torch.equal(value, whole[1][BEST][name]) for name, value in average.items())
    assert_same_run(whole[0], tmp_path)


@pytest.mark.parametrize("options", [[], ["fsdp2=1"]], ids=["whole", "sharded"])
def test_two_processes_decide_alike_and_keep_the_same_student(tmp_path, whole, options):
    given = [f"{name}={value}" for name, value in (SETTINGS | {"patience": 3}).items()]
    outs = ranks(2, TOY, tmp_path, *given, *options)
    assert all(f"ended at step {END} with signal 0" in out for out in outs)
    average = load_file(tmp_path / "average.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(value, whole[1][BEST][name], rtol=0, atol=1e-5)
    trainer = stopped_trainer(tmp_path)  # one process goes on from there
    assert trainer.completed and trainer.stopping.step == BEST
    assert all(torch.equal(value, average[name]) for name, value in taken(trainer).items())


def test_more_patience_goes_on_as_if_it_had_been_there(tmp_path, whole):
    folder = tmp_path / "first"
    shutil.copytree(whole[0], folder)
    more = stopped_trainer(folder, patience=5)
    assert not more.completed
    more.train()
    assert more.step == 20 and more.stopping.step == BEST
    stopped_trainer(tmp_path / "at-once", patience=5).train()
    assert lines(folder) == lines(tmp_path / "at-once")


def test_weights_that_a_checkpoint_goes_on_from_are_kept(tmp_path):
    trainer = stopped_trainer(tmp_path, steps=9, keep_checkpoints=2)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / ".step-000002.safetensors.x.tmp").write_bytes(b"half")
    trainer.train()  # checkpoints 8 and 9, each the best when it was written
    assert best_files(tmp_path) == ["step-000008.safetensors", "step-000009.safetensors"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-000009")
    again = stopped_trainer(tmp_path)
    assert (again.step, again.stopping.step) == (8, 8)


def test_a_best_student_that_is_gone_or_damaged_is_named_at_once(tmp_path):
    stopped_trainer(tmp_path, steps=4).train()
    file = tmp_path / "best" / "step-000004.safetensors"
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-9]), file.unlink):
        damage()
        with pytest.raises(UserError, match="step-000004.safetensors is missing or damaged .* put it back"):
            stopped_trainer(tmp_path, steps=6)


def test_a_run_that_begins_to_ask_measures_what_it_has(tmp_path):
    make_trainer(tmp_path, **SETTINGS | {"steps": 5}).train()
    trainer = stopped_trainer(tmp_path, steps=7)
    trainer.train()
    assert [(line["step"], line["best_step"]) for line in lines(tmp_path) if "best_step" in line] == [
        (5, 5), (6, 6), (7, 7)]


# --- the run folder


@pytest.fixture
def toy(monkeypatch):
    """The toy as a registered method without a teacher, and how often a run was evaluated."""
    calls = []

    def evaluate(folder, **options):
        calls.append(folder)
        return Report([Row("student", 1, fid=2.5)], 10, "digits", "digits", 0)

    teacher = exact_teacher(GaussianVelocity(torch.zeros(2), 1.0))
    monkeypatch.setattr("flowdistill.training.run.load_teacher", lambda *settings, **more: teacher)
    monkeypatch.setattr("flowdistill.training.run.open_run_evaluation", lambda *given: None)
    monkeypatch.setattr("flowdistill.training.run.save_comparison", lambda *arguments: None)
    monkeypatch.setattr("flowdistill.training.run.evaluate", evaluate)
    METHODS.register("toy")(ToyMethod)
    yield calls
    METHODS.unregister("toy")


def stopped_config(folder, patience=3, metric="fid", **train):
    return make_config(folder, **SETTINGS | {"stop_when": StopConfig(metric, patience)} | train)


def student_of(folder):
    return load_file(folder / "student" / "model.safetensors")


def test_the_students_folder_and_the_report_are_of_the_best(tmp_path, toy, whole, capsys):
    done = distill(stopped_config(tmp_path))
    assert (done.completed, done.steps) == (True, END) and len(toy) == 1
    assert all(torch.equal(value, whole[1][BEST][name]) for name, value in student_of(tmp_path).items())
    said = [line for line in capsys.readouterr().err.splitlines() if "stop_when" in line]
    fid = stopped_trainer(tmp_path).stopping.best
    kept = f"the student of step 10, whose fid of {fid:.4g} is the best of 9 measurements"
    assert said == [f"training ended at step 16, after 3 measurements without a better fid (train.stop_when); "
                    f"student/ is {kept}"]
    protocol = json.loads((tmp_path / "report.json").read_text())["protocol"]
    assert protocol == {"student_step": BEST, "student": kept}
    assert f"step 16 of 40, in {tmp_path}/checkpoints/step-000016, stopped by train.stop_when; kept is {kept}" in (
        _described(tmp_path))

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = distill(stopped_config(tmp_path))
    assert (again.completed, again.steps, len(toy)) == (True, END, 1) and "stop_when" not in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # filelock 3.30 touches the file of a lock that it takes.
    assert {path.name for path in before if before[path] != after[path]} <= {"config.yaml", "metrics.jsonl", LOCK}

    more = distill(stopped_config(tmp_path, patience=4))
    assert more.steps == 18 and len(toy) == 2 and more.report is not None


def _described(folder):
    shutil.rmtree(folder / "student")  # the toy's is not one that can be loaded
    return describe_run(folder)


def test_a_signal_leaves_the_best_student_so_far(tmp_path, toy, whole, monkeypatch):
    steps = []
    monkeypatch.setattr(Interrupts, "agreed", lambda self, device, world: 15 * (steps.append(1) or len(steps) == 13))
    done = distill(stopped_config(tmp_path))
    assert (done.completed, done.steps, done.interrupted) == (False, 13, 15) and not toy
    assert all(torch.equal(value, whole[1][BEST][name]) for name, value in student_of(tmp_path).items())


def test_the_end_of_all_steps_says_which_student_is_kept(tmp_path, toy, capsys):
    distill(stopped_config(tmp_path, steps=5))
    assert "training ended at step 5; student/ is the student of step 5, whose fid of" in capsys.readouterr().err


def test_a_kill_before_the_student_is_written_leaves_the_best_one(tmp_path, toy, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flowdistill.training.run.save_student", lambda trainer: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            distill(stopped_config(tmp_path))
    assert not (tmp_path / "student").exists()
    assert distill(stopped_config(tmp_path)).report is not None
    assert all(torch.equal(value, whole[1][BEST][name]) for name, value in student_of(tmp_path).items())


# --- settings


def test_settings_in_a_file_and_on_the_command_line(tmp_path, toy):
    config = make_config(tmp_path / "run", evaluate_every=2)
    save_config(config, tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml").train.stop_when is None
    found = load_config(tmp_path / "a.yaml", ["train.stop_when.patience=3"]).train.stop_when
    assert found == StopConfig("fid", 3, 0.0)
    found = load_config(tmp_path / "a.yaml", ["train.stop_when={metric: recall, min_delta: 0.01}"])
    assert found.train.stop_when == StopConfig("recall", 5, 0.01)
    save_config(found, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == found
    assert load_config(tmp_path / "b.yaml", ["train.stop_when=null"]) == config


BAD = {
    "nothing measured": (["train.stop_when.patience=2"],
                         "'train.stop_when' goes by what is measured during training; set 'train.evaluate_every'"),
    "no features": (["train.stop_when.patience=2", "train.evaluate_every=2", "evaluation.features=null"],
                    "train.evaluate_every is 2, but .*set evaluation.*(features|reference)"),
    "no reference": (["train.stop_when.patience=2", "train.evaluate_every=2", "evaluation.reference=null"],
                     "train.evaluate_every is 2, but .*set evaluation.*(features|reference)"),
    "unknown": (["train.stop_when.metric=fdi", "train.evaluate_every=2"],
                "'train.stop_when.metric' must be one of fid, .*, not 'fdi'; did you mean 'fd'"),
    "a figure by class": (["train.stop_when.metric=per_class_fid", "train.evaluate_every=2"],
                          "'train.stop_when.metric' must be one of fid, .*, not 'per_class_fid'"),
    "no patience": (["train.stop_when.patience=0", "train.evaluate_every=2"],
                    "'train.stop_when.patience' must be at least 1, not 0"),
    "negative gain": (["train.stop_when.min_delta=-1", "train.evaluate_every=2"],
                      "'train.stop_when.min_delta' must be at least 0, not -1"),
    "a plain value": (["train.stop_when=fid", "train.evaluate_every=2"],
                      "'train.stop_when' must be a section with keys of its own, not 'fid'"),
    "unknown key": (["train.stop_when.metrics=fid", "train.evaluate_every=2"],
                    "unknown key 'train.stop_when.metrics' .*did you mean 'train.stop_when.metric'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_sentence_before_anything_is_loaded(tmp_path, toy, monkeypatch, case):
    save_config(make_config(tmp_path / "run"), tmp_path / "toy.yaml")
    monkeypatch.setattr("flowdistill.training.run.make_accelerator", lambda *given: pytest.fail("it began"))
    overrides, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        distill(tmp_path / "toy.yaml", overrides)


def test_what_it_sets_may_change_between_a_run_and_its_resume(tmp_path, toy):
    distill(make_config(tmp_path, **SETTINGS | {"steps": 2}))
    distill(stopped_config(tmp_path, steps=4))
    assert distill(stopped_config(tmp_path, patience=9, steps=6)).steps == 6
    anew = pytest.warns(UserWarning, match="seeks the best student anew")
    with anew, pytest.raises(UserError, match="recall, which"):
        distill(stopped_config(tmp_path, metric="recall", steps=8))
    assert distill(make_config(tmp_path, **SETTINGS | {"steps": 8})).steps == 8


# --- with real figures


def test_a_real_run_of_a_student_of_several_calls(tmp_path, monkeypatch):
    """A row of pictures and figures for each number of calls, measurements of all calls, and the best student."""
    monkeypatch.setattr("flowdistill.training.loop.FidCallback", FidCallback)
    tiny_unet_pipeline(num_class_embeds=10).save_pretrained(tmp_path / "teacher")
    (tmp_path / "config.yaml").write_text(f"""
output_dir: {tmp_path / "run"}
teacher: {{source: {tmp_path / "teacher"}}}
method: {{name: dmd2, steps: 3, optimizer: {{lr: 0.05}}}}
train: {{steps: 6, batch_size: 4, log_every: 2, sample_every: 4, evaluate_every: 3, num_samples: 4, trackers: [],
         device: cpu, ema_decay: 0.0, stop_when: {{metric: recall, patience: 9}}}}
evaluation: {{features: digits, reference: digits, num_images: 40, teacher_steps: []}}
""")
    report, folder = distill(tmp_path / "config.yaml").report, tmp_path / "run"
    pictures = {path.stem: Image.open(path).size for path in (folder / "samples").iterdir()}
    assert set(pictures) == {"step-000000", "step-000004", "final", "comparison"}
    assert pictures["step-000000"] == pictures["step-000004"] == pictures["final"]
    assert pictures["final"][0] == 4 * 34 + 2 and pictures["final"][1] > 3 * 34
    logged = [line for line in lines(folder) if "lr/student" in line]
    names = [{name.rpartition("/")[2] for name in line if name.startswith(f"student/{figure}/")}
             for line in logged for figure in ("sample_mean", "sample_std", "gradient_size")]
    assert [line["step"] for line in logged] == [2, 4, 6] and set().union(*names) == {"1", "2", "3"}
    assert all(1 <= len(found) <= 2 for found in names)  # of the two updates of a line
    measured = [line for line in lines(folder) if "recall" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert {"fid", "accuracy", "precision", "recall", "best_step"} <= measured[0].keys()
    best = max(measured, key=lambda line: line["recall"])
    assert measured[-1]["best_step"] == best["step"] == report.protocol["student_step"]
    # The report is of the student that was kept, and what was measured was all its calls.
    rows = {row.calls: row.fid for row in report.rows}
    assert best["fid"] == pytest.approx(rows[3], rel=1e-6) and rows[1] != pytest.approx(rows[3], rel=1e-3)
    assert load_student(folder).generate(num_images=2, steps=2).shape == (2, 1, 8, 8)


def test_a_figure_that_cannot_be_measured_ends_the_run_before_its_first_step(tmp_path, toy):
    with pytest.raises(UserError, match="'train.stop_when.metric' is accuracy, which could not be measured"):
        distill(stopped_config(tmp_path, metric="accuracy"))
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "student").exists()


def test_a_method_whose_student_has_more_than_one_network_keeps_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyMethod, "student_roles", ("student", "critic"))
    trainer = stopped_trainer(tmp_path)
    trainer.train()
    assert set(load_file(tmp_path / "best" / f"step-{BEST:06d}.safetensors")) == {
        *(f"student.{name}" for name in trainer.student().network.state_dict()),
        *(f"critic.{name}" for name in trainer.roles["critic"].network.state_dict())}
    before = trainer.roles["critic"].network.state_dict()["0.weight"].clone()
    trainer.take_best()
    assert not torch.equal(before, trainer.roles["critic"].network.state_dict()["0.weight"])


def test_a_stage_in_which_the_student_rests_costs_no_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyMethod, "schedule", lambda self, step: ("critic",) if step < 9 else ("student", "critic"))
    trainer = stopped_trainer(tmp_path, patience=2, steps=16)
    trainer.train()
    measured = [line for line in lines(tmp_path) if "fid" in line]
    assert [line["step"] for line in measured][:6] == [0, 2, 4, 6, 8, 10]  # they are logged
    assert trainer.step == 16 and trainer.stopping.count == 5  # 0, 10, 12, 14, 16
