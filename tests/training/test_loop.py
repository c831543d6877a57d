"""Whole runs in this process: resume, lines of metrics, divergence, broken disks and checkpoints."""

import errno
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill.training import checkpoint
from flowdistill.training.callbacks import tracker_names, truncate_metrics
from flowdistill.training.loop import TrainingDiverged
from flowdistill.training.state import optimizer_tensors
from flowdistill.utils.errors import UserError
from tests.toy_method import ToyConfig, ToyMethod, make_config, make_trainer, weights

CLOCK = ("seconds", "images_per_second")


def lines(folder):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(text).items() if key not in CLOCK} for text in texts]


def steps_on_disk(folder):
    return [step for step, _ in checkpoint.checkpoints(folder / "checkpoints")]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop", [4, 5])  # on a logged step and between two
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, precision, stop):
    def settings():
        return ToyConfig(dropout=0.5, critic_updates=2), {"precision": precision, "ema_decay": 0.5, "log_every": 4}

    method, train = settings()
    whole = make_trainer(tmp_path / "whole", method, **train)
    whole.train()
    method, train = settings()
    first = make_trainer(tmp_path / "parts", method, **train, checkpoint_every=stop, keep_checkpoints=9)
    first.train()
    for step in steps_on_disk(tmp_path / "parts"):
        if step != stop:
            shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{step:06d}")
    method, train = settings()
    second = make_trainer(tmp_path / "parts", method, seed=0, **train)
    assert second.step == stop
    torch.rand(3)  # the global generator may be anywhere
    second.train()
    assert_same(weights(whole), weights(second))
    assert whole.roles["student"].average.count == second.roles["student"].average.count == 8
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for name, role in whole.roles.items():
        assert role.scaler.state_dict() == second.roles[name].scaler.state_dict()


def test_other_seeds_and_dropout_masks_differ(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make_trainer(tmp_path / name, ToyConfig(dropout=0.5), seed=seed, steps=2)
        trainer.train()
        runs.append(weights(trainer)["student.0.weight"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_log_file_gets_a_plain_line_at_each_logged_step(tmp_path, capsys):
    make_trainer(tmp_path, log_every=3).train()
    shown = capsys.readouterr().err
    assert "\r" not in shown and "|" not in shown
    first, *_ = found = shown.splitlines()
    assert [line.split(",")[0] for line in found] == [f"toy: step {step} of 8" for step in (3, 6, 8)]
    assert re.fullmatch(r"toy: step 3 of 8, student [\d.]+, critic [\d.]+, images/s [\d.e+]+", first)


def test_a_figure_takes_the_place_of_a_loss_whose_value_is_not_meant(tmp_path, capsys, monkeypatch):
    """Of the role that has it; where a line has no such figure, the loss is there."""
    monkeypatch.setattr(ToyMethod, "shown", lambda self, role: {"student": "distance", "critic": "absent"}[role])
    make_trainer(tmp_path, log_every=3).train()
    first = capsys.readouterr().err.splitlines()[0]
    found = re.fullmatch(r"toy: step 3 of 8, student/distance ([\d.]+), critic [\d.]+, images/s [\d.e+]+", first)
    assert float(found[1]) == pytest.approx(lines(tmp_path)[0]["student/distance"], rel=1e-3)


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    make_trainer(tmp_path, log_every=3).train()
    shown = capsys.readouterr().err
    assert "8/8" in shown and "toy: step" not in shown and "images/s=" in shown


def test_a_logged_line_says_what_was_done(tmp_path):
    trainer = make_trainer(tmp_path, log_every=3)
    trainer.train()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 8] and [line["images"] for line in found] == [24, 48, 64]
    assert found[0]["lr/student"] == 0.01 and found[0]["lr/critic"] == 0.02 and found[0]["skipped"] == 0
    assert found[0]["student/distance"] > found[2]["student/distance"] > 0
    assert {"loss/student", "loss/critic", "grad_norm/student", "grad_norm/critic", "student/spread"} <= found[0].keys()
    raw = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < raw[0]["seconds"] < raw[2]["seconds"] and raw[0]["images_per_second"] > 0


def test_a_logged_loss_is_the_mean_since_the_line_before(tmp_path):
    every, third = (
        make_trainer(tmp_path / "a", log_every=1, steps=3),
        make_trainer(tmp_path / "b", log_every=3, steps=3),
    )
    every.train()
    third.train()
    losses = [line["loss/student"] for line in lines(tmp_path / "a")]
    assert lines(tmp_path / "b")[0]["loss/student"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert max(losses) > min(losses) + 0.01


def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path):
    make_trainer(tmp_path, log_every=1, steps=8, checkpoint_every=4, keep_checkpoints=9).train()
    shutil.rmtree(tmp_path / "checkpoints" / "step-000008")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "im')
    make_trainer(tmp_path, log_every=1, steps=8).train()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_truncating_drops_a_broken_line_and_what_follows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st\n{"step": 3}\n')
    truncate_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_more_steps_go_on_and_fewer_are_refused(tmp_path):
    make_trainer(tmp_path, steps=4).train()
    more = make_trainer(tmp_path, steps=6)
    assert more.step == 4
    more.train()
    assert more.step == 6 and steps_on_disk(tmp_path) == [4, 6]
    with pytest.raises(UserError, match="is at step 6 already, beyond train.steps=5"):
        make_trainer(tmp_path, steps=5)


def test_old_checkpoints_go_and_leftovers_of_a_crash_go(tmp_path):
    make_trainer(tmp_path, checkpoint_every=2, keep_checkpoints=2).train()
    assert steps_on_disk(tmp_path) == [6, 8]
    for name in (".step-000009.partial", ".step-000002.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "student.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert make_trainer(tmp_path).step == 8
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "notes",
        "step-000006",
        "step-000008",
    ]


def test_a_role_that_has_not_stepped_resumes_without_a_step(tmp_path):
    trainer = make_trainer(tmp_path, ToyConfig(critic_updates=0), steps=2)
    trainer.train()
    again = make_trainer(tmp_path, ToyConfig(critic_updates=1), steps=3)
    assert optimizer_tensors(again.roles["critic"].network, again.roles["critic"].optimizer) == {}
    again.train()
    assert {int(state["step"]) for state in again.roles["critic"].optimizer.state.values()} == {1}


# --- not finite


def test_a_nan_loss_is_skipped_counted_and_forgotten(tmp_path):
    trainer = make_trainer(tmp_path, ToyConfig(bad_steps=[2, 3, 5]), log_every=4, max_nonfinite_steps=3)
    trainer.train()
    assert [line["skipped"] for line in lines(tmp_path)] == [2, 3]
    assert lines(tmp_path)[0]["loss/student"] is not None
    state = weights(trainer)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["student.optimizer.0.weight/step"] == 5 and state["critic.optimizer.0.weight/step"] == 8
    assert trainer.roles["student"].consecutive == 0


def test_a_line_of_nothing_but_nan_is_null(tmp_path):
    make_trainer(tmp_path, ToyConfig(bad_steps=[0, 1]), log_every=2, steps=2).train()
    assert lines(tmp_path)[0]["loss/student"] is None and lines(tmp_path)[0]["grad_norm/student"] is None
    assert lines(tmp_path)[0]["loss/critic"] > 0


def test_too_many_in_a_row_stop_the_run_with_its_checkpoint_intact(tmp_path):
    method = ToyConfig(bad_steps=list(range(5, 30)))
    trainer = make_trainer(tmp_path, method, steps=30, log_every=2, max_nonfinite_steps=4)
    with pytest.raises(TrainingDiverged) as stop:
        trainer.train()
    # Steps 5 to 9 are skipped, and the first line with four of them is that of step 10.
    assert "stopped at step 10: the loss or gradient of the role 'student' was not finite in 5 updates" in str(
        stop.value
    )
    assert "step-000008" in str(stop.value)
    assert steps_on_disk(tmp_path) == [4, 8] and isinstance(stop.value, UserError)
    clean = make_trainer(tmp_path, ToyConfig(), steps=12)
    assert clean.step == 8 and clean.roles["student"].skipped == 3
    clean.train()
    assert all(torch.isfinite(value).all() for value in weights(clean).values())


# --- disks


def test_a_full_disk_ends_in_a_sentence_and_leaves_older_checkpoints(tmp_path, monkeypatch):
    real = checkpoint.write_tensors
    done = []

    def full(path, tensors):
        done.append(path)
        if len(done) > 7:  # five files a checkpoint: the second one breaks in its middle
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(
        UserError, match="step-000008 .older ones are intact. could not be written: No space left"
    ) as stop:
        make_trainer(tmp_path).train()
    assert "\n" not in str(stop.value)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    monkeypatch.undo()
    resumed = make_trainer(tmp_path)
    assert resumed.step == 4
    resumed.train()
    assert steps_on_disk(tmp_path) == [4, 8]


def test_safetensors_own_error_is_a_sentence_too(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="could not be written: I/O error: No space left on device"):
        make_trainer(tmp_path).train()


@pytest.mark.parametrize("name", ["student.safetensors", "critic.optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    make_trainer(tmp_path).train()
    file = tmp_path / "checkpoints" / "step-000008" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name} is missing or damaged .*; delete .*step-000008 to resume"):
        make_trainer(tmp_path)


def test_a_checkpoint_says_what_a_run_can_go_on_from(tmp_path):
    make_trainer(tmp_path).train()
    folder = tmp_path / "checkpoints" / "step-000008"
    good = checkpoint.read_state(folder, 8)
    role = good["roles"]["student"]
    for change, words in (
        ({"step": 4}, "its step is 4, not 8"), ({"step": -8}, "its step is -8, not 8"),
        ({"lap": [-1, 0.0]}, "its lap is -1"),
        ({"seconds": -1.0}, "its seconds is -1.0"), ({"seconds": "1"}, "its seconds is '1'"),
        ({"roles": good["roles"] | {"student": role | {"average_count": -8}}},
         "its average_count of the role 'student' is -8"),
        ({"roles": good["roles"] | {"student": role | {"skipped": 0.5}}}, "its skipped of the role 'student' is 0.5"),
        ({"roles": []}, "its roles are no objects"), ({"meters": ...}, "it has no meters"),
    ):
        state = {key: value for key, value in (good | change).items() if value is not ...}
        (folder / "state.json").write_text(json.dumps(state))
        said = re.escape(f"state.json is missing or damaged ({words}); delete {folder} to")
        with pytest.raises(UserError, match=said):
            make_trainer(tmp_path)


def test_the_only_checkpoint_is_not_followed_by_one_before_it(tmp_path):
    make_trainer(tmp_path).train()
    folder = tmp_path / "checkpoints"
    for step, words in ((8, f"delete {folder / 'step-000008'} to resume from the checkpoint before it"),
                        (4, "there is no checkpoint before it: put it back, .* or remove the run folder to begin")):
        (folder / f"step-{step:06d}" / "state.json").write_text("{")
        with pytest.raises(UserError, match=f"state.json is missing or damaged .*; {words}"):
            make_trainer(tmp_path)
        shutil.rmtree(folder / f"step-{step:06d}")
    assert make_trainer(tmp_path).step == 0


def test_a_checkpoint_of_other_networks_is_refused(tmp_path, monkeypatch):
    make_trainer(tmp_path).train()
    with pytest.raises(UserError, match="student.safetensors does not fit: 0.weight has the shape .16, 2. there"):
        make_trainer(tmp_path, ToyConfig(width=8))
    real = ToyMethod.roles
    monkeypatch.setattr(ToyMethod, "roles", lambda self: {"student": real(self)["student"]})
    with pytest.raises(UserError, match="holds the roles student, critic, and the method has student"):
        make_trainer(tmp_path)


# --- reports


def test_sample_grids_come_at_intervals_from_fixed_noise(tmp_path, monkeypatch):
    asked = []
    real = ToyMethod.student

    def student(self, network=None):
        made = real(self, network)
        generate = made.generate
        made.generate = lambda **options: asked.append((network, options)) or generate(**options)
        return made

    monkeypatch.setattr(ToyMethod, "student", student)
    trainer = make_trainer(tmp_path, sample_every=4, num_samples=6)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000000.png", "step-000004.png", "step-000008.png"]
    assert [options for _, options in asked] == [{"num_images": 6, "seed": 0}] * 3
    assert all(network is trainer.roles["student"].average.network for network, _ in asked)


def test_figures_at_intervals_are_lines_of_their_own(tmp_path, monkeypatch):
    class Fid:
        def __init__(self, config, accelerator, reference=None):
            pass

        def __call__(self, student):
            return {"fid": 3.5, "accuracy": math.nan}

    monkeypatch.setattr("flowdistill.training.loop.FidCallback", Fid)
    make_trainer(tmp_path, evaluate_every=4, log_every=4).train()
    measured = [line for line in lines(tmp_path) if "fid" in line]
    assert [(line["step"], line["images"], line["fid"], line["accuracy"]) for line in measured] == [
        (4, 32, 3.5, None),
        (8, 64, 3.5, None),
    ]


def test_trackers_get_the_figures(tmp_path):
    class Recorder:
        name = "recorder"

        def __init__(self):
            self.logged, self.finished = [], False

        def start(self):
            pass

        def store_init_configuration(self, values):
            self.settings = values

        def log(self, values, step=None):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    recorder = Recorder()
    trainer = make_trainer(tmp_path, ToyConfig(bad_steps=[0, 1]))
    trainer.accelerator.trackers.append(recorder)
    trainer.train()
    assert [step for step, _ in recorder.logged] == [2, 4, 6, 8] and recorder.finished
    assert recorder.settings["train.batch_size"] == 8 and recorder.settings["method.optimizer.lr"] == 0.01
    assert "loss/student" not in recorder.logged[0][1]  # null is no number
    assert recorder.logged[1][1]["loss/student"] == lines(tmp_path)[1]["loss/student"]


def test_trackers_get_the_grids_from_step_0_on_each_in_its_own_form(tmp_path):
    """As accelerate's classes take them: a picture (aim, clearml), several (wandb, swanlab), a batch (tensorboard)."""

    class Blind:  # as of mlflow and others: it takes no images
        start = store_init_configuration = log = finish = lambda *_, **__: None

        def __init__(self, name):
            self.name, self.logged = name, []

    class Recorder(Blind):
        def log_images(self, values, step=None, **kwargs):
            self.logged.append((step, values, kwargs))

    recorders = {name: Recorder(name) for name in ("tensorboard", "wandb", "aim", "clearml", "swanlab")}
    trainer = make_trainer(tmp_path, sample_every=4, num_samples=6)
    trainer.accelerator.trackers += [*recorders.values(), Blind("mlflow")]
    trainer.train()
    with Image.open(tmp_path / "samples" / "step-000004.png") as file:
        pixels = np.asarray(file.convert("RGB"))
    for name, recorder in recorders.items():
        assert [step for step, _, _ in recorder.logged] == [0, 4, 8]
        _, values, kwargs = recorder.logged[1]
        assert list(values) == ["samples"] and kwargs == ({"dataformats": "NHWC"} if name == "tensorboard" else {})
        one = name in ("aim", "clearml")
        assert isinstance(values["samples"], Image.Image if one else np.ndarray)
        assert (np.asarray(values["samples"]) == (pixels if one else pixels[None])).all()


def test_tensorboard_is_the_default_when_it_is_installed(monkeypatch):
    config = make_config("unused", trackers=None).train
    for installed in (object(), None):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        assert tracker_names(config) == (["tensorboard"] if installed else [])


def test_unknown_and_missing_trackers_are_refused(tmp_path):
    with pytest.raises(UserError, match="names 'tensorbord'; accelerate has .*tensorboard"):
        make_trainer(tmp_path, trackers=["tensorbord"])
    with pytest.raises(UserError, match="names 'aim', which is not installed; run: pip install aim"):
        make_trainer(tmp_path, trackers=["aim"])
