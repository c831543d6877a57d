"""``scripts/train_fashion_teacher.py``: killed and gone on with, made longer, and what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from flowdistill import load_teacher
from flowdistill.data.assets import asset_path
from flowdistill.features import load_features
from flowdistill.utils.images import to_uint8
from tests.data.fashion import FOLDER_VARIABLE, write_fashion
from tests.other_device import other_device, waits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script with a network of 0.1 M parameters and grids of two steps, in a folder with a few pictures."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_fashion_teacher

    monkeypatch.setattr(train_fashion_teacher, "CHANNELS", (8, 8, 8))  # also the default of --channels
    monkeypatch.setattr(train_fashion_teacher, "GRID_STEPS", 2)
    monkeypatch.setattr(train_fashion_teacher, "WARMUP", 2)
    monkeypatch.setenv(FOLDER_VARIABLE, str(write_fashion(tmp_path / "fashion")))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield train_fashion_teacher
    torch.set_num_threads(threads)


def run(script: ModuleType, out: str, *more: object, path: str = "flow", state: str | None = None) -> int:
    arguments = ["--path", path, "--out", out, "--state", state or f"{out}.pt", "--batch-size", 4, *more]
    return script.main([str(argument) for argument in arguments])


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "unet" / "diffusion_pytorch_model.safetensors")


def same(one: str, other: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


class Killed(BaseException):
    """In place of a signal that no process can catch."""


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_a_killed_training_comes_to_the_bits_of_a_whole_one(script, monkeypatch, path):
    assert run(script, "whole", "--steps", 4, "--decay", 0.5, path=path) == 0

    step = script.Training.train_step
    for after in (2, 3):  # once at the constant rate, once while it falls

        def killed(self, *batch, after=after):
            if self.step == after:
                raise Killed
            return step(self, *batch)

        monkeypatch.setattr(script.Training, "train_step", killed)
        with pytest.raises(Killed):
            run(script, "parts", "--steps", 4, "--decay", 0.5, "--save-every", 1, path=path)
    monkeypatch.setattr(script.Training, "train_step", step)
    assert run(script, "parts", "--steps", 4, "--decay", 0.5, path=path) == 0
    assert same("whole", "parts")

    pipeline = DiffusionPipeline.from_pretrained("whole")
    record = json.loads(Path("whole/flowdistill.json").read_text())
    assert pipeline.unet.config.num_class_embeds == 11 and record["null_label"] == 10
    assert record["steps"] == 4 and record["parameters"] == sum(p.numel() for p in pipeline.unet.parameters())
    assert Path("whole/samples.png").stat().st_size > 1000
    teacher = load_teacher("whole")
    assert teacher.shape == (1, 28, 28) and teacher.num_classes == 10


def test_a_training_made_longer_comes_to_the_bits_of_a_long_one(script):
    assert run(script, "long", "--steps", 6, "--decay", 0.34) == 0
    assert run(script, "made_longer", "--steps", 4, "--decay", 0.5) == 0
    short = weights("made_longer")
    assert run(script, "made_longer", "--steps", 6, "--decay", 0.34) == 0
    assert same("long", "made_longer")
    assert any(not torch.equal(a, b) for a, b in zip(short.values(), weights("made_longer").values(), strict=True))


def test_a_wish_to_stop_is_kept_with_the_state_and_the_same_command_goes_on(script, monkeypatch, capfd):
    assert run(script, "whole", "--steps", 3) == 0
    step = script.Training.train_step

    def stopped(self, *batch):
        loss = step(self, *batch)
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(script.Training, "train_step", stopped)
    assert run(script, "parts", "--steps", 3) == 128 + 15
    assert "stopped at step 1; the same command goes on" in capfd.readouterr().err
    assert run(script, "parts", "--steps", 3) == 0
    assert same("whole", "parts")


def test_it_looks_at_the_average_on_the_way(script, capfd):
    assert run(script, "looks", "--steps", 3, "--look-every", 2) == 0
    said = capfd.readouterr().err
    assert "step 2, held-out loss" in said and "wrote looks: 3 steps" in said
    assert [step for step, _ in torch.load("looks.pt", weights_only=True)["losses"]] == [2]


def test_states_that_do_not_fit_are_refused(script, capfd):
    assert run(script, "run", "--steps", 4, "--decay", 0.25) == 0
    for more, words in (
        (("--steps", 4, "--decay", 0.5), "run.pt is at step 3, and in a run of 4 steps the rate falls from step 2 on; "
                                         "ask for at least --steps 6"),
        (("--lr", 0.5), "is the state of another run, with lr 0.001; name another file"),
        (("--decay", 1.0), "--decay is 1.0; it is a share"),
        (("--look-every", 0), "--look-every is 0; it must be at least 1"),
        (("--threads", 0), "--threads is 0; it must be at least 1"),
        (("--channels", "8,16,16"), "is the state of another run, with channels None; name another file"),
        (("--channels", "8,16,20"), "--channels is 8,16,20; each must be a multiple of 8"),
        (("--within", 0), "--within is 0.0; it must be above 0 minutes"),
        (("--device", "cuda:99"), "--device is cuda:99, which cannot be used here"),
        (("--device", "gpu"), "--device is gpu, which cannot be used here"),
    ):
        assert run(script, "other", *more, state="run.pt") == 2
        assert words in capfd.readouterr().err
    Path("run.pt").write_bytes(Path("run.pt").read_bytes()[:-100])
    assert run(script, "other", "--steps", 10, state="run.pt") == 2
    assert "run.pt is damaged or no state of this script" in capfd.readouterr().err
    assert not Path("other").exists()


def test_time_ends_a_training_of_another_size_and_the_rate_falls_by_it(script, monkeypatch, capfd):
    """The clock here goes on by 15 seconds a step, so that a minute has four, of which the last half falls."""
    now, rates = [0.0], []
    monkeypatch.setattr(script.time, "process_time", lambda: now[0])
    step = script.Training.train_step

    def timed(self, *batch):
        rates.append(self.rate())
        loss = step(self, *batch)
        now[0] += 15.0
        return loss

    monkeypatch.setattr(script.Training, "train_step", timed)
    monkeypatch.setattr(script, "WARMUP", 1)
    command = ("--within", 1, "--decay", 0.5, "--channels", "8,16,16", "--blocks", 2)
    assert run(script, "timed", *command) == 0
    assert rates == [1e-3, 1e-3, 1e-3, pytest.approx(5e-4)]
    record = json.loads(Path("timed/flowdistill.json").read_text())
    assert record["steps"] == 4 and record["training_cpu_seconds"] == 60
    assert "--within 1 --decay 0.5" in record["command"] and record["command"].endswith("--channels 8,16,16 --blocks 2")
    assert DiffusionPipeline.from_pretrained("timed").unet.config.block_out_channels == [8, 16, 16]
    assert run(script, "timed", *command) == 0 and len(rates) == 4  # what is over stays over
    assert "wrote timed: 4 steps, 60 s of CPU" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_a_step_on_a_device_is_the_cpus_and_does_not_wait(script, path, tmp_path):
    """On the device in Python. The first step moves the table of noise levels there."""
    losses = {}
    for name in ("cpu", "other"):
        with other_device() if name == "other" else contextlib.nullcontext(torch.device("cpu")) as device:
            arguments = argparse.Namespace(
                path=path, device=str(device), within=float("inf"), channels=[8, 8, 8], blocks=1, compile=False, seed=0,
                lr=1e-3, steps=10, decay=0.2, precision="fp32", batch_size=4, threads=1, state=tmp_path / "state.pt")
            training = script.Training(arguments)
            data, labels = (part.to(device) for part in script.load_images("fashion"))
            first = training.train_step(data, labels)
            with waits() as waited:
                second = training.train_step(data, labels)
            losses[name] = [first.item(), second.item()]
        assert not waited
    assert losses["other"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("name", ["fashion-flow", "fashion-ddpm"])
def test_the_shipped_teachers_make_garments_that_the_classifier_names(name):
    """Two images of each of the ten classes, with six steps; by chance two of the twenty would be named."""
    teacher, labels = load_teacher(asset_path(name)), torch.arange(20) % 10
    noise = torch.randn(20, *teacher.shape, generator=torch.Generator().manual_seed(0))
    images = teacher.decode(teacher.sample(noise, teacher.encode(labels), 6))
    named = load_features("fashion", "cpu").classify(to_uint8(images)) == labels
    assert named.sum() >= 15
    record = json.loads((asset_path(name) / "flowdistill.json").read_text())
    assert record["data"] == "fashion" and record["path"] == name.split("-")[1]
    assert record["command"].startswith(f"python scripts/train_fashion_teacher.py --path {record['path']}")
    assert sum(file.stat().st_size for file in asset_path(name).rglob("*") if file.is_file()) < 6e6
