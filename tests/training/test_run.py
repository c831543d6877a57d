"""``distill``: a whole run folder, its resume, and the folders and devices it refuses."""

import errno
import functools
import json
import math
import re
import shutil
import signal
import time
import warnings
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

import flowdistill
from flowdistill import UserError
from flowdistill.config import METHODS, OptimizerConfig, TrainConfig, load_config, save_config
from flowdistill.evaluation import Report, Row
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.training import run as training_run
from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.environment import recorded_starts
from flowdistill.training.optimizer import rate_changes
from flowdistill.training.roles import prepare_roles
from flowdistill.training.run import check_folder, difference, distill, make_accelerator
from flowdistill.training.signals import Interrupts
from flowdistill.utils.environment import collected
from flowdistill.utils.files import atomic_folder
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import ToyConfig, ToyMethod, make_config


@pytest.fixture(autouse=True)
def toy():
    METHODS.register("toy")(ToyMethod)
    yield
    METHODS.unregister("toy")


@pytest.fixture
def measured(monkeypatch):
    """The toy as a registered method without a teacher, and a list that gets the arguments of every evaluation."""
    calls = []

    def evaluate(folder, **options):
        calls.append((folder, options))
        return Report([Row("student", 1, fid=2.5)], 10, "digits", "digits", 0)

    teacher = exact_teacher(GaussianVelocity(torch.zeros(2), 1.0))
    monkeypatch.setattr("flowdistill.training.run.load_teacher", lambda *settings, **more: teacher)
    opened = SimpleNamespace(reference=None, check_student=lambda student: None)  # a sample of the toy is two numbers
    monkeypatch.setattr("flowdistill.training.run.open_evaluation", lambda *given, **named: opened)
    monkeypatch.setattr("flowdistill.training.run.save_comparison", lambda *arguments: None)
    monkeypatch.setattr("flowdistill.training.run.evaluate", evaluate)
    return calls


def test_a_run_folder_holds_everything_and_a_second_call_changes_nothing(tmp_path, measured, capsys):
    folder = tmp_path / "run"
    run = distill(make_config(folder, precision=None))
    assert (run.output_dir, run.steps, run.completed, run.interrupted) == (folder, 8, True, 0)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.jsonl",
        "metrics.jsonl",
        "report.json",
        "samples",
        "student",
    ]
    assert (folder / "samples" / "final.png").is_file()
    assert json.loads((folder / "report.json").read_text())["rows"][0]["fid"] == 2.5 == run.report.rows[0].fid
    assert "student" in capsys.readouterr().out.splitlines()[2]
    saved = load_config(folder / "config.yaml")
    assert saved.train.precision == "fp32" and saved.method == ToyConfig()

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}
    again = distill(make_config(folder))
    assert again.completed and again.report.rows[0].fid == 2.5 and len(measured) == 1
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}
    assert {path.name for path in before if before[path] != after.get(path)} <= {
        "run", "metrics.jsonl", ".lock"}

    more = distill(make_config(folder, steps=10))
    assert more.steps == 10 and len(measured) == 2


def test_a_run_folder_says_what_it_was_trained_with(tmp_path, measured, monkeypatch):
    """A line for its start and for each resume elsewhere; not for one that finds nothing to do."""
    def trained(torch, **settings):
        monkeypatch.setattr("flowdistill.training.environment.collected", lambda: {"torch": torch})
        distill(make_config(tmp_path, checkpoint_every=2, **settings))
        return recorded_starts(tmp_path)

    assert trained("2.8", steps=4) == trained("2.9", steps=4) == [(0, {"torch": "2.8"})]
    both = trained("2.9", steps=6)
    assert both == trained("2.9", steps=8) == [(0, {"torch": "2.8"}), (4, {"torch": "2.9"})]
    line = json.loads((tmp_path / "environment.jsonl").read_text().splitlines()[1])
    assert line["step"] == 4 and datetime.fromisoformat(line["time"]).tzinfo is not None
    with open(tmp_path / "environment.jsonl", "a") as file:
        file.write('{"step": 9, "envi')  # cut short by a crash
    for name in ("checkpoints", "student", "samples"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "report.json").unlink()
    assert trained("3.0", steps=2) == [(0, {"torch": "3.0"})]  # which is made anew


def test_what_a_run_without_checkpoints_came_to_is_not_trained_over(tmp_path, measured, monkeypatch):
    """They may be deleted when it is done; one that was killed before its first begins anew."""
    folder = tmp_path / "run"
    distill(make_config(folder))
    shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for settings in ({}, {"steps": 10}):
        with pytest.raises(UserError, match=r"run has student/, samples/final.png, report.json of an earlier training "
                                            r"and no checkpoint to go on from.*choose another output_dir, or remove"):
            distill(make_config(folder, **settings))
    (folder / "config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="has student/"):
        distill(make_config(folder))
    (tmp_path / "config.yaml").rename(folder / "config.yaml")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("flowdistill.training.loop.write_checkpoint", lambda *given: 1 / 0)
        distill(make_config(tmp_path / "killed"))
    assert (tmp_path / "killed" / "metrics.jsonl").stat().st_size
    assert distill(make_config(tmp_path / "killed")).completed


def test_collecting_what_a_run_is_trained_with_takes_no_time():
    found = collected()
    assert found["torch"] == torch.__version__.partition("+")[0] and found["flowdistill"] == flowdistill.__version__
    began = time.process_time()
    for _ in range(3):
        collected()
    assert (time.process_time() - began) / 3 < 0.05


def test_a_file_with_overrides_and_without_evaluation(tmp_path, measured):
    save_config(make_config(tmp_path / "run"), tmp_path / "toy.yaml")
    run = distill(tmp_path / "toy.yaml", ["train.steps=3", "evaluation.at_end=false"])
    assert run.steps == 3 and run.report is None and not measured
    with pytest.raises(UserError, match="overrides go with a configuration file"):
        distill(make_config(tmp_path / "run"), ["train.steps=3"])


def test_a_method_is_asked_about_the_number_of_steps(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(ToyMethod, "check_length", lambda config, steps: f"{steps} are few")
    with pytest.warns(UserWarning, match="^8 are few$"):
        assert distill(make_config(tmp_path)).completed
    monkeypatch.setattr(ToyMethod, "check_length", lambda config, steps: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(make_config(tmp_path))
    file = Path(__file__).parents[2] / "configs/digits/disback.yaml"
    with pytest.raises(UserError, match="train.steps is 60, which ends in stage 1"):
        distill(file, ["train.steps=60", f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_signal_leaves_a_student_and_no_report(tmp_path, measured, monkeypatch):
    seen = []

    def agreed(self, device, world):
        seen.append(world)
        return signal.SIGTERM if len(seen) == 3 else 0

    monkeypatch.setattr(Interrupts, "agreed", agreed)
    run = distill(make_config(tmp_path))
    assert (run.steps, run.completed, run.interrupted, run.report) == (3, False, signal.SIGTERM, None)
    assert (tmp_path / "student").is_dir() and not measured and not (tmp_path / "samples").exists()
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [3]
    assert distill(make_config(tmp_path)).completed


CHANGES = {
    "seed": lambda config: setattr(config, "seed", 5),
    "teacher.source": lambda config: setattr(config.teacher, "source", "other"),
    "method.optimizer.lr": lambda config: setattr(config.method.optimizer, "lr", 0.5),
    "train.batch_size": lambda config: setattr(config.train, "batch_size", 16),
    "train.ema_decay": lambda config: setattr(config.train, "ema_decay", 0.5),
    "train.precision": lambda config: setattr(config.train, "precision", "bf16"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path, measured, key):
    distill(make_config(tmp_path, steps=4))
    before = (tmp_path / "config.yaml").read_text()
    changed = make_config(tmp_path, steps=8)
    CHANGES[key](changed)
    with pytest.raises(
        UserError, match=rf"holds another run: {key} is .* there and .* here; choose another output_dir"
    ):
        distill(changed)
    assert (tmp_path / "config.yaml").read_text() == before


def test_what_does_not_decide_what_is_learned_may_change(tmp_path, measured):
    distill(make_config(tmp_path, steps=4))
    config = make_config(tmp_path, steps=6, log_every=1, checkpoint_every=3, keep_checkpoints=5, num_samples=9)
    config.evaluation.num_images = 50
    assert distill(config).steps == 6
    assert load_config(tmp_path / "config.yaml").train.log_every == 1


RATES = {
    "cosine": (0.0, 1e-3 * (0.5 + 0.5 * math.cos(math.pi * 4 / 6))),
    "linear": (0.0, 1e-3 * 2 / 6),
}


@pytest.mark.parametrize("schedule", RATES)
def test_a_resume_under_a_schedule_says_the_old_and_the_new_rate(tmp_path, measured, schedule):
    def config(steps):
        made = make_config(tmp_path, steps=steps, log_every=1)
        made.method.optimizer = OptimizerConfig(lr=1e-3, schedule=schedule)
        return made

    distill(config(4))
    old, new = RATES[schedule]
    with pytest.warns(UserWarning) as said:
        distill(config(6))
    (text,) = [str(one.message) for one in said if "train.steps" in str(one.message)]
    assert text.startswith("train.steps was 4 and is 6, so after step 4 the scheduled learning rate goes on elsewhere")
    assert f"student ({schedule}) from {old:.3g} to {new:.3g}" in text and "\n" not in text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[4]["lr/student"] == pytest.approx(new)  # what was said is what came
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(config(6))  # the same again: nothing to say


def test_a_resume_whose_rate_stays_says_nothing(tmp_path, measured):
    distill(make_config(tmp_path, steps=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(make_config(tmp_path, steps=6))
    state = tmp_path / "checkpoints" / "step-000006" / "state.json"
    older = {key: value for key, value in json.loads(state.read_text()).items() if key != "planned_steps"}
    state.write_text(json.dumps(older))
    assert distill(make_config(tmp_path, steps=7)).steps == 7  # a checkpoint of an older version


def test_rates_that_differ_are_named_by_role():
    cosine, warm = OptimizerConfig(lr=1.0, schedule="cosine"), OptimizerConfig(schedule="linear", warmup_steps=5)
    assert rate_changes({"a": cosine, "b": OptimizerConfig(), "c": warm}, 4, 8, 16) == "a (cosine) from 0.5 to 0.854"
    assert rate_changes({"a": cosine}, 4, 8, 8) == "" == rate_changes({"b": OptimizerConfig(), "c": warm}, 4, 8, 16)


def test_a_run_that_never_saved_may_be_replaced(tmp_path, measured):
    save_config(make_config(tmp_path, seed=3), tmp_path / "config.yaml")
    assert distill(make_config(tmp_path, steps=2)).completed


def test_settings_an_older_version_did_not_write_do_not_count():
    saved = {"seed": 0, "train": {"steps": 5, "ema_decay": 0.9}, "method": {"name": "toy", "gone": 1}}
    here = {"seed": 0, "train": {"steps": 9, "ema_decay": 0.9, "new": 2}, "method": {"name": "toy"}}
    assert difference(saved, here) == ("method.gone", 1, None)
    here["method"]["gone"] = 1
    assert difference(saved, here) is None


def test_a_setting_an_older_version_did_not_have_is_at_its_default(tmp_path, measured):
    """Else half of the run would be trained with it; also in sections of sections. What decides nothing may be new."""
    def config():
        return make_config(tmp_path, steps=2, max_grad_norm=3.0)

    distill(config())
    file = tmp_path / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    for section, name in ((saved["teacher"], "vae"), (saved["method"], "dropout"), (saved["train"], "log_every"),
                          (saved["method"]["critic_optimizer"], "weight_decay"), (saved["train"], "stop_when")):
        del section[name]
    file.write_text(yaml.safe_dump(saved))
    assert check_folder(tmp_path, config())  # 0.1 is the decay that the section has by default
    changes = {"teacher.vae": "other", "method.dropout": 0.5, "method.critic_optimizer.weight_decay": 0.0}
    for key, value in changes.items():
        changed, (*sections, name) = config(), key.split(".")
        setattr(functools.reduce(getattr, sections, changed), name, value)
        with pytest.raises(UserError, match=rf"holds another run: {re.escape(key)} is .* there and {value} here"):
            check_folder(tmp_path, changed)
    changed = config()
    changed.train.log_every, changed.evaluation.at_end = 1, False
    assert not check_folder(tmp_path, changed)


def test_folders_that_cannot_be_used(tmp_path, measured):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir .*file is a file; it must be a folder"):
        distill(make_config(tmp_path / "file"))
    with pytest.raises(UserError, match=r"output_dir .*below cannot be written: .*file is a file, and no folder"):
        distill(make_config(tmp_path / "file" / "below"))
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for place in ("link", "link/below"):
        with pytest.raises(UserError, match=rf"output_dir .*{place} cannot be written: .*link is a symbolic link"):
            distill(make_config(tmp_path / place))
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "link"}
    distill(make_config(tmp_path / "run", steps=1))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds checkpoints but no config.yaml"):
        distill(make_config(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text("seed: [")
    with pytest.raises(UserError, match="config.yaml is damaged"):
        distill(make_config(tmp_path / "run"))


@pytest.mark.parametrize("name", ["environment.jsonl", "metrics.jsonl", "report.json", "samples/final.png"])
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, measured, monkeypatch, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("mine")
    monkeypatch.setattr(training_run, "load_teacher", lambda *given, **named: pytest.fail("work has begun"))
    with pytest.raises(UserError, match=rf"{tmp_path / name} is a folder, and a run has a file of this name; move it"):
        distill(make_config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml", ".lock", name.split("/")[0]}


@pytest.mark.parametrize("name", ["checkpoints", "student", "samples"])
def test_folders_of_a_run_that_cannot_be_made_are_refused_before_it(tmp_path, measured, name):
    (tmp_path / name).symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=rf"cannot be written: {tmp_path / name} is a symbolic link that leads nowhere"):
        distill(make_config(tmp_path))
    assert {entry.name for entry in tmp_path.iterdir()} == {".lock", name}
    (tmp_path / "disk").mkdir()
    assert distill(make_config(tmp_path, steps=1)).completed and any((tmp_path / "disk").iterdir())


def test_a_record_that_takes_no_line_is_refused_before_anything_is_written(tmp_path, measured, monkeypatch):
    """Root may write everywhere, so opening the file stands in for one that belongs to somebody else."""
    (tmp_path / "environment.jsonl").touch()
    (tmp_path / "config.yaml").write_text("mine")

    def refuse(file, *given, **named):
        if str(file).endswith("environment.jsonl"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(file, *given, **named)

    monkeypatch.setattr(training_run, "open", refuse, raising=False)
    monkeypatch.setattr("flowdistill.training.environment.open", refuse, raising=False)
    with pytest.raises(UserError, match=r"environment.jsonl could not be written: Permission denied"):
        distill(make_config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_two_trainings_do_not_enter_one_folder(tmp_path, measured, monkeypatch):
    """Neither while the first one begins nor while it trains, and whoever is killed leaves no lock."""
    folder, method = tmp_path / "runs" / "one", METHODS.get("toy")
    refused = []

    def second(*_):
        with pytest.raises(UserError, match=rf"another training is going on in {folder}; wait") as caught:
            distill(make_config(folder, steps=9))
        refused.append(caught)

    load = training_run.load_teacher
    monkeypatch.setattr(training_run, "load_teacher", lambda *given, **named: second() or load(*given, **named))
    monkeypatch.setattr(method, "after_update", second)
    assert distill(make_config(folder, steps=1)).steps == 1 and len(refused) > 1


def test_what_a_method_refuses_at_the_start_leaves_no_folder(tmp_path, measured, monkeypatch):
    asked = []

    def check_start(self):
        asked.append(next(self.roles()["student"].network.parameters()).device)
        raise UserError("this would choose by chance")

    monkeypatch.setattr(METHODS.get("toy"), "check_start", check_start)
    with pytest.raises(UserError, match="by chance"):
        distill(make_config(tmp_path / "runs" / "one", sample_every=1))
    assert asked == [torch.device("cpu")] and not list(tmp_path.iterdir())
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="by chance"):
        distill(make_config(kept))
    assert (kept / "config.yaml").read_text() == "mine" and {each.name for each in kept.iterdir()} <= {
        "config.yaml", ".lock"}


def test_devices_this_machine_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.device is 'cuda:3', which this machine does not have"):
        make_accelerator(make_config(tmp_path, device="cuda:3").train, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"'cuda:3', but this machine has 1 GPU\(s\)"):
        make_accelerator(make_config(tmp_path, device="cuda:3").train, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes were started"):
        make_accelerator(make_config(tmp_path, device="cuda:0").train, tmp_path)


def test_a_teacher_that_cannot_be_loaded_leaves_no_folder(tmp_path):
    config = make_config(tmp_path / "run")
    config.teacher.source = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere does not exist"):
        distill(config)
    assert not (tmp_path / "run").exists()


def test_freeflow_resumes_bit_for_bit(tmp_path):
    tiny_unet_pipeline().save_pretrained(tmp_path / "teacher")

    def go(name, steps):
        text = f"""
output_dir: {tmp_path / name}
teacher: {{source: {tmp_path / "teacher"}}}
method: {{name: freeflow}}
train: {{steps: {steps}, batch_size: 4, log_every: 1, num_samples: 4, trackers: [], device: cpu, precision: bf16}}
evaluation: {{at_end: false}}
"""
        (tmp_path / "config.yaml").write_text(text)
        return distill(tmp_path / "config.yaml")

    whole, first, second = go("whole", 4), go("parts", 2), go("parts", 4)
    assert whole.completed and first.steps == 2 and second.steps == 4
    one, other = flowdistill.load_student(tmp_path / "whole"), flowdistill.load_student(tmp_path / "parts")
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name
    teacher = flowdistill.load_teacher(tmp_path / "teacher")
    noise = torch.randn(2, 1, 8, 8)
    labels = teacher.encode(labels=[0, 1])
    moved = (one(noise, labels) - teacher.sample(noise, labels, steps=1)).abs().max()
    assert 0 < moved < 0.1
    figures = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures] == [1, 2, 3, 4]


def test_the_shipped_launch_configs_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(__file__).parents[2] / "configs" / "accelerate"
    kinds = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert {name: (config.distributed_type.value, config.mixed_precision) for name, config in kinds.items()} == {
        "cpu": ("MULTI_GPU", "no"),
        "single_gpu": ("NO", "bf16"),
        "multi_gpu_fp16": ("MULTI_GPU", "fp16"),
        "multi_node": ("MULTI_GPU", "bf16"),
        "multi_gpu_bf16": ("MULTI_GPU", "bf16"),
        "fsdp2": ("FSDP", "bf16"),
    }
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2


def test_a_kill_after_the_last_checkpoint_leaves_no_older_student(tmp_path, measured, monkeypatch):
    """The student and report of a shorter run must not pass for those of the longer one."""
    folder, weights = tmp_path / "run", tmp_path / "run" / "student" / "model.safetensors"
    distill(make_config(folder))
    short = weights.read_bytes()

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flowdistill.training.run.save_student", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(make_config(folder, steps=12))
    assert checkpoints(folder / "checkpoints")[-1][0] == 12 and weights.read_bytes() == short
    assert not (folder / "report.json").exists() and not (folder / "samples" / "final.png").exists()
    assert not (folder / "samples" / "comparison.png").exists()
    run = distill(make_config(folder, steps=12))
    assert run.report is not None and (folder / "samples" / "final.png").is_file()
    distill(make_config(tmp_path / "whole", steps=12))
    assert weights.read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes() != short


def test_a_method_may_refuse_shards():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(UserError, match="echodistill cannot be sharded"):
        prepare_roles(EchoDistill.__new__(EchoDistill), TrainConfig(), "fp32", accelerator)


def test_a_folder_is_replaced_only_once_it_is_complete(tmp_path):
    target, parent = tmp_path / "student", tmp_path
    for kind in ("old", "partial"):  # somebody's own, under names that copies are given
        (parent / f"student.{kind}").mkdir()
    with atomic_folder(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(OSError), atomic_folder(target) as new:
        (new / "a").write_text("2")
        raise OSError("no space left")
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as new:
        (new / "b").write_text("3")
    assert sorted(entry.name for entry in parent.iterdir()) == ["student", "student.old", "student.partial"]
    assert (target / "b").read_text() == "3"
    assert not (target / "a").exists()


def test_of_another_method_its_name_is_what_differs():
    saved = {"method": {"critic": "full", "name": "freeflow"}, "seed": 0}
    assert difference(saved, {"method": {"name": "boot", "metric": "l2"}, "seed": 0}) == (
        "method.name", "freeflow", "boot")
    assert difference(saved, {"method": {"critic": "lora", "name": "freeflow"}, "seed": 0}) == (
        "method.critic", "full", "lora")
