"""Weights that were replaced behind a path that a run's settings name: noticed where the run is used again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from safetensors.torch import save_file

from flowdistill.cli.commands import main
from flowdistill.conditioning.components import read_files
from flowdistill.config import TeacherConfig
from flowdistill.evaluation.evaluate import _open
from flowdistill.students import Generator, StudentInfo
from flowdistill.teachers.loading import load_teacher, teacher_files
from flowdistill.teachers.weight_files import check_weights, hashes, record_weights
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS
from tests.lora_files import lora_file
from tests.teachers.test_autoencoder import other_vae
from tests.tiny import replaced, tiny_unet, tiny_unet_pipeline

CPU = torch.device("cpu")
CONFIG = {"method": {"name": "dmd2"}, "evaluation": {"at_end": False},
          "train": {"steps": 1, "batch_size": 2, "trackers": [], "num_samples": 2, "device": "cpu"}}


def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(yaml.safe_dump({"output_dir": "run", **CONFIG, **settings}))
    return Path("a.yaml")


def resumed(file: Path) -> Callable[[], object]:
    return lambda: distill(file, ["train.steps=2"])


def evaluated(place: str) -> Callable[[], object]:
    return lambda: _open(place, CPU, with_teacher=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline, a LoRA and another autoencoder for it, and a student that others start as."""
    place, pipeline = tmp_path_factory.mktemp("models"), FAMILIES["sd"].make()
    pipeline.save_pretrained(place / "base")
    lora_file(pipeline, place / "lora")
    other_vae(pipeline.vae).save_pretrained(place / "new")
    Generator.from_teacher(load_teacher(place / "base"), StudentInfo("dmd2", "base")).save(place / "start")
    return place


MODEL = "diffusion_pytorch_model.safetensors"
REPLACED = {
    "teacher.source": f"base/unet/{MODEL}",
    "teacher.vae": f"new/{MODEL}",
    "teacher.lora": "lora/pytorch_lora_weights.safetensors",
    "teacher.start": "start/model.safetensors",
    "teacher.prompts": "prompts.txt",
}


def test_whatever_a_run_names_is_noticed_where_it_is_used_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    both = {"student": "lora", "critic": "lora", "lora": {"rank": 2}}
    teacher = {"source": "base", "vae": "new", "lora": "lora", "start": "start", "prompts": "prompts.txt"}
    file = in_folder(tmp_path, monkeypatch, method={"name": "dmd2", **both}, teacher=teacher)
    distill(file)
    record = json.loads(Path("run/weights.json").read_text())
    assert record.keys() == REPLACED.keys() and record["teacher.vae"].keys() == {"config.json", MODEL}
    assert not any(name.startswith("vae/") for name in record["teacher.source"])
    assert "text_encoder/model.safetensors" in record["teacher.source"]
    for setting, name in REPLACED.items():
        with replaced(Path(name)):
            # What students start as says nothing about the teacher, and other prompts do not make another one.
            uses = [resumed(file)]
            if setting not in ("teacher.start", "teacher.prompts"):
                uses += map(evaluated, ("run", "run/student"))
            for use in uses:
                with pytest.raises(UserError, match=f"^run was trained with other files than there are now: .*{name},"
                                                    f" of {setting}, has changed since; put back what was there, or"):
                    use()
            assert _open("run", CPU, with_teacher=False).student is not None  # which has all that it needs itself
    Path("prompts.txt").rename("gone.txt")
    with pytest.raises(UserError, match="the prompts file prompts.txt does not exist"):
        resumed(file)()
    Path("gone.txt").rename("prompts.txt")
    with replaced(Path(REPLACED["teacher.vae"])):
        Path("run/weights.json").unlink()  # as a run of an older version
        evaluated("run")()
        resumed(file)()
    assert json.loads(Path("run/weights.json").read_text())["teacher.vae"] != record["teacher.vae"]


def test_the_commands_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tiny_unet_pipeline().save_pretrained(tmp_path / "base")
    in_folder(tmp_path, monkeypatch, teacher={"source": "base"})
    assert main(["distill", "a.yaml"]) == 0
    with replaced(Path(f"base/unet/{MODEL}")):
        for command in (["distill", "a.yaml", "train.steps=2"], ["evaluate", "run"], ["evaluate", "run", "base"]):
            capsys.readouterr()
            assert main(command) == 2
            assert capsys.readouterr().err.startswith(
                f"flowdistill: error: run was trained with other files than there are now: base/unet/{MODEL}, of te")
        assert main(["sample", "run", "--out", "a.png"]) == 0
    assert main(["distill", "a.yaml", "train.steps=2"]) == 0


def test_a_start_that_has_saved_nothing_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_unet_pipeline().save_pretrained(tmp_path / "base")
    file = in_folder(tmp_path, monkeypatch, teacher={"source": "base"})
    distill(file)
    record = Path("run/weights.json").read_text()
    for name in ("checkpoints", "student", "samples"):
        shutil.rmtree(f"run/{name}")
    tiny_unet(block_out_channels=(16, 16)).save_pretrained("base/unet")
    distill(file)
    assert Path("run/weights.json").read_text() != record


def test_saving_the_same_anew_changes_nothing(tmp_path: Path) -> None:
    """By another version, with a card, and with files of a variant beside them that nobody reads."""
    tiny_unet_pipeline().save_pretrained(tmp_path / "base")
    settings = load_teacher(tmp_path / "base").files
    before = hashes(settings())
    unet = tmp_path / "base" / "unet"
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}, sort_keys=True))
    UNet2DModel.from_pretrained(unet).half().save_pretrained(tmp_path / "half", variant="fp16")
    shutil.copy(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors", unet)
    (tmp_path / "base" / "scheduler" / "README.md").write_text("a card")
    assert hashes(settings()) == before
    (unet / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    assert hashes(settings())["teacher.source"]["unet/config.json"] != before["teacher.source"]["unet/config.json"]
    assert [file.name for file in read_files(unet, ("diffusers", "UNet2DModel"), "fp16")] == [
        "config.json", "diffusion_pytorch_model.fp16.safetensors"]


def test_what_is_gone_and_what_was_never_recorded(tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for each in (file, other):
        save_file({"a": torch.zeros(1)}, each)
    record_weights(tmp_path, {})
    check_weights(tmp_path, None, "or not")
    assert not (tmp_path / "weights.json").exists()
    record_weights(tmp_path, {"teacher.lora": {"a": file}})
    check_weights(tmp_path / "student", lambda: {"teacher.lora": {"a": other}, "method.new": {"c": file}}, "or not")
    with pytest.raises(UserError, match=r"b\.safetensors, of teacher\.lora, was not there or read then; put back"):
        check_weights(tmp_path, lambda: {"teacher.lora": {"a": file, "b": other}}, "or not")
    with pytest.raises(UserError, match=r": a, of teacher\.lora, is no longer there or read; put back"):
        check_weights(tmp_path, lambda: {"teacher.lora": {"b": file}}, "or not")
    (tmp_path / "weights.json").write_text('{"teacher.lora": 1}')
    with pytest.raises(UserError, match=r"weights\.json is damaged: it holds no hashes of files"):
        check_weights(tmp_path, lambda: {"teacher.lora": {"a": file}}, "or not")


def test_they_are_found_without_loading_them(models: Path) -> None:
    given = {"vae": str(models / "new"), "lora": str(models / "lora"), "start": str(models / "start")}
    teacher = load_teacher(models / "base", **given)
    assert teacher_files(TeacherConfig(str(models / "base"), **given)) == teacher.files()
    assert load_teacher(FAMILIES["sd"].make()).files() == {}
