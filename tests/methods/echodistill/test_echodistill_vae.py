"""EchoDistill with an autoencoder in the place of the two pipelines' own (``teacher.vae``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from flowdistill import load_student
from flowdistill.features.vision import load_vision
from flowdistill.methods.echodistill.compatibility import check_pair
from flowdistill.teachers import load_teacher
from flowdistill.teachers.autoencoder import BaseVae
from flowdistill.training.run import Run, distill
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import indexed_noise
from tests.echo_world import KEPT, TOKEN, make_method, student_pipeline, teacher_pipeline, write_pictures
from tests.tiny import lively, replaced, vae

PROMPTS = [f"a {TOKEN}", f"a {TOKEN} on d"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("echo")
    teacher_pipeline().save_pretrained(folder / "teacher")
    student_pipeline().save_pretrained(folder / "turbo")
    lively(vae(), seed=9).save_pretrained(folder / "new")
    lively(vae(), seed=5).save_pretrained(folder / "third")
    write_pictures(folder / "pictures")
    (folder / "kept.txt").write_text("\n".join(KEPT))
    (folder / "echo.yaml").write_text(yaml.safe_dump({
        "output_dir": "run", "teacher": {"source": "teacher", "prompts": "kept.txt", "vae": "new"},
        "method": {
            "name": "echodistill", "student": "turbo", "instance_data_dir": "pictures",
            "instance_prompt": f"a {TOKEN} c", "initializer_token": "c", "validation_prompts": PROMPTS,
            "teacher_steps": 2, "token_lr": 0.05, "optimizer": {"lr": 1e-2}, "teacher_optimizer": {"lr": 1e-2},
            "echo": {"start": None},
        },
        "train": {"steps": 1, "batch_size": 2, "num_samples": 2, "trackers": [], "device": "cpu"},
        "evaluation": {"at_end": False}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, distill("echo.yaml")


def stock(folder: Path, name: str, new: bool = True) -> Any:
    given = {"vae": AutoencoderKL.from_pretrained(folder / "new")} if new else {}
    base = folder / {"student": "turbo"}.get(name, name)
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, **given)
    pipeline.load_lora_weights(folder / "run" / name)
    pipeline.load_textual_inversion(folder / "run" / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_students_folder_loads_with_the_pictures_of_the_new_one(
    finished: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, in stock diffusers, and in its own samples; also from another folder."""
    folder, _ = finished
    monkeypatch.chdir(tmp_path)
    student = load_student(folder / "run")
    assert student.info.base_vae == BaseVae("new", "", "AutoencoderKL")
    noise, call = indexed_noise((4, 8, 8), 0, range(2)), {"num_inference_steps": 1, "guidance_scale": 0.0}
    theirs, before = (stock(folder, "student", new)(PROMPTS, latents=noise.clone(), output_type="pt", **call).images
                      for new in (True, False))
    ours = student.generate(prompts=PROMPTS, seed=0)
    assert (ours - theirs).abs().max() < 1e-4 and (ours - before).abs().max() > 0.02
    for number in range(2):
        with Image.open(folder / "run" / "student" / f"image_{number}.png") as image:
            shown = pil_to_tensor(image.convert("RGB")) / 255
        assert (shown - theirs[number]).abs().max() < 0.01


def test_the_cards_own_lines_load_it(finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    for name in ("student", "teacher"):
        card = (folder / "run" / name / "README.md").read_text()
        assert "- The autoencoder is `new`, in the place" in card and "`VAELoader`" in card and str(folder) not in card
        code = card.split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        expected = AutoencoderKL.from_pretrained("new").state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in names["pipe"].vae.state_dict().items())


def test_a_student_whose_autoencoder_has_gone_says_so(finished: tuple[Path, Run], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "run" / "student", tmp_path / "student")
    file = tmp_path / "student" / "flowdistill.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"base_model": str(folder / "turbo"), "base_vae": record["base_vae"] | {
        "source": str(tmp_path / "gone")}}))
    with pytest.raises(UserError, match=r"was trained with an autoencoder in the place of .*turbo's: .*gone does not"):
        load_student(tmp_path / "student")


@pytest.mark.parametrize("setting, name", [("teacher.vae", "new"), ("method.student", "turbo/unet")])
def test_a_student_whose_base_has_other_weights_says_so(
    finished: tuple[Path, Run], setting: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is changes to them, and its run is not resumed with them either."""
    monkeypatch.chdir(finished[0])
    found = f"^run was trained with other files than there are now: .*{name}/.*, of {setting}, has changed since; "
    with replaced(Path(name) / "diffusion_pytorch_model.safetensors"):
        for use in (partial(load_student, "run"), partial(distill, "echo.yaml", ["train.steps=2"])):
            with pytest.raises(UserError, match=found):
                use()
    assert load_student("run").kind == "generator"


@pytest.mark.parametrize("change, what", [
    (lambda folder: (folder / "0.png").rename(folder / "9.png"), "0.png, of .*, is no longer there or read"),
    (lambda folder: shutil.copy(folder / "0.png", folder / "9.png"),
     "pictures/9.png, of .*, was not there or read then"),
    (lambda folder: shutil.copy(folder / "0.png", folder / "1.png"), "pictures/1.png, of .*, has changed since"),
    (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a <new1> cat"}'),
     "pictures/metadata.jsonl, of .*, was not there or read then"),
])
def test_a_run_does_not_go_on_with_other_pictures(
    finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], what: str
) -> None:
    monkeypatch.chdir(finished[0])
    shutil.copytree("pictures", "kept")
    try:
        change(Path("pictures"))
        with pytest.raises(UserError, match=f"^run was trained with other files .*: {what}; put back what was there, "):
            distill("echo.yaml", ["train.steps=2"])
    finally:
        shutil.rmtree("pictures")
        Path("kept").rename("pictures")


def test_networks_that_look_at_pictures_are_among_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "seen"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_bytes(b"{}")
    network = load_vision("small", "")
    monkeypatch.setattr("flowdistill.methods.echodistill.method.load_vision", lambda name, setting: network)
    method = make_method(tmp_path, identity=f"transformers:{folder}", discriminators=["small:1", "timm:a=b/c.bin"])
    assert method.files() == {
        "method.student": {},
        "method.identity": {f"0 {name}": folder / name for name in ("config.json", "model.safetensors")},
        "method.discriminators": {"1 c.bin": Path("b/c.bin")},
        "method.instance_data_dir": {file.name: file for file in sorted((tmp_path / "pictures").iterdir())},
    }


def test_both_pipelines_have_it(finished: tuple[Path, Run], tmp_path: Path) -> None:
    """A live student too; without the setting both keep their own."""
    folder, _ = finished
    teacher = load_teacher(folder / "teacher", vae=str(folder / "new"), prompts=KEPT)
    method = make_method(tmp_path, teacher=folder / "teacher")
    assert method.source.codec is not method.teacher.codec and method.student().info.base_vae is None
    method = type(method)(method.config, teacher, student_pipeline())
    assert method.source.codec is teacher.codec is method.student().codec
    assert method.student().info.base_vae == teacher.vae == BaseVae(str(folder / "new"), "", "AutoencoderKL")


def test_the_students_own_is_compared_before(finished: tuple[Path, Run]) -> None:
    """It may be like the teacher's own or like the new one; one like neither has other latents."""
    folder, _ = finished
    teacher = load_teacher(folder / "teacher", vae=str(folder / "new"))
    student = student_pipeline()
    check_pair(teacher, load_teacher(student))
    student.vae = lively(vae(), seed=9)
    check_pair(teacher, load_teacher(student))
    student.vae = lively(vae(), seed=5)
    with pytest.raises(UserError, match="another latent space than the teacher .*the same latents become images"):
        check_pair(teacher, load_teacher(student))
