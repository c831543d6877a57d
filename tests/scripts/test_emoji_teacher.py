"""``scripts/train_emoji_teacher.py`` makes a pipeline that takes a name, and goes on where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from flowdistill import load_teacher
from flowdistill.data.named_sets import load_captions
from tests.data.emoji import FOLDER_VARIABLE, write_emoji
from tests.other_device import other_device, waits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_emoji_teacher

    monkeypatch.setenv(FOLDER_VARIABLE, str(write_emoji(tmp_path / "emoji")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_emoji_teacher, "GRID_STEPS", 1)
    threads = torch.get_num_threads()
    yield train_emoji_teacher
    torch.set_num_threads(threads)


def run(script: ModuleType, name: str, *more: str) -> int:
    return script.main(["--out", f"{name}/pipeline", "--work", name, "--vae-steps", "2", "--vae-batch-size", "2",
                        "--steps", "2", "--batch-size", "3", *more])


@pytest.fixture
def small(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a few channels."""
    widths = {size: script.Widths((8, 8, 8), (8, 16), 8) for size in script.WIDTHS}
    monkeypatch.setattr(script, "WIDTHS", widths)


def test_it_makes_a_pipeline_that_takes_a_name_and_goes_on_where_it_stopped(script, small, capfd):
    assert run(script, "whole") == 0
    assert "samples.png there has 6 of the 6 captions" in capfd.readouterr().err
    assert Path("whole/pipeline/captions.txt").read_text().splitlines() == load_captions("emoji")
    assert run(script, "parts", "--minutes", "0") == 0
    assert "stopped; the same command goes on" in capfd.readouterr().err and not Path("parts/pipeline").exists()
    assert run(script, "parts") == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(f"{run}/pipeline/{name}") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    record = json.loads(Path("whole/pipeline/flowdistill.json").read_text())
    assert "Apache-2.0" in record["licence"] and record["planned_steps"]["denoiser"] == [[0, 2, 2e-3]]
    pipeline = DiffusionPipeline.from_pretrained("whole/pipeline")
    # Words are tokens, also beside punctuation; nothing is unknown.
    assert pipeline.tokenizer.tokenize("waving hand, light skin tone")[:3] == ["waving", "hand", ",</w>"]
    ids = pipeline.tokenizer(load_captions("emoji")).input_ids
    assert all(pipeline.tokenizer.unk_token_id not in row[1:-1] for row in ids)
    teacher = load_teacher("whole/pipeline")
    condition = teacher.encode(prompts=["pinata", "waving hand"])
    images = teacher.decode(teacher.sample(torch.randn(2, *teacher.shape), condition, 2))
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_time_ends_a_training_of_full_size_and_the_rate_falls_by_it(script, small, monkeypatch):
    """The clock here goes on by a second each time it is looked at, which is twice a step and once before."""
    now = itertools.count()
    monkeypatch.setattr(script.time, "monotonic", lambda: float(next(now)))
    assert run(script, "run", "--size", "64", "--within", "0.5") == 0
    record = json.loads(Path("run/pipeline/flowdistill.json").read_text())
    # The denoiser has 21 s.
    assert record["steps"]["denoiser"] == 11 and record["training_seconds"]["denoiser"] == 22
    assert record["steps"]["vae"] == 5 and record["data"] == "emoji64" and "--size 64 --within 0.5" in record["command"]
    rate = torch.load("run/denoiser.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(2e-3 * 11 / 100 * (0.5 + 0.5 * math.cos(math.pi * 20 / 21)))
    teacher = load_teacher("run/pipeline")
    assert teacher.shape == (8, 16, 16)


def test_a_loss_on_a_device_is_the_cpus_and_does_not_wait(script, small, monkeypatch, tmp_path):
    """On the device in Python; from the second step on, as the first moves the table of noise levels there."""
    losses, waited = {}, []
    for name in ("cpu", "other"):
        with other_device() if name == "other" else contextlib.nullcontext(torch.device("cpu")) as device:

            def run_steps(self, loss_of, deadline, name=name):
                made = []
                for step in range(2):
                    torch.manual_seed(0)  # the autoencoder's noise is the device's
                    with waits() as found:
                        made.append(loss_of(torch.Generator().manual_seed(step)))
                    waited[:] = found
                losses[f"{self.name} on {name}"] = [loss.item() for loss in made]
                return False

            monkeypatch.setattr(script.Training, "run", run_steps)
            args = argparse.Namespace(
                size=32, device=str(device), compile=False, within=float("inf"), seed=0, lr=1e-3, vae_steps=2, steps=2,
                vae_batch_size=2, batch_size=3, precision="fp32", work=tmp_path)
            captions = load_captions("emoji")
            assert script.train_autoencoder(args, 0.0) is None
            assert not waited
            torch.manual_seed(0)
            vae = script.build_autoencoder(32).to(device).requires_grad_(False)
            assert script.train_denoiser(args, vae, captions, script.build_tokenizer(captions), 0.0) is None
            assert not waited
    assert losses["denoiser on other"] == pytest.approx(losses["denoiser on cpu"], rel=1e-4)
    assert losses["vae on other"] == pytest.approx(losses["vae on cpu"], rel=0.2)  # of other noise


def test_words_inside_other_words_are_spelt(script):
    tokenizer = script.build_tokenizer(["red car", "card"])
    assert tokenizer.tokenize("red card hundred") == ["red", "card", *"hundre", "d</w>"]


def test_bad_input_is_refused(script, capfd):
    for more, sentence in ((("--batch-size", "0"), "--batch-size is 0; it must be at least 1"),
                           (("--within", "0"), "--within is 0.0; it must be above 0 minutes"),
                           (("--device", "cuda:99"), "--device is cuda:99, which cannot be used here")):
        assert run(script, "run", *more) == 2
        assert sentence in capfd.readouterr().err
    Path("emoji/emoji.json").unlink()
    assert run(script, "run") == 2
    assert "npm install emoji-datasource-google" in capfd.readouterr().err and not Path("run").exists()
