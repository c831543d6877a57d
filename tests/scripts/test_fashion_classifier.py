"""``scripts/train_fashion_classifier.py`` goes on to the bits of a whole run; the shipped features of clothes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowdistill.data.assets import asset_path
from flowdistill.features import load_features
from flowdistill.features.digits_classifier import ClassifierTraining, DigitsClassifier, load_digits_classifier
from tests.data.fashion import FOLDER_VARIABLE, write_fashion

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_fashion_classifier

    monkeypatch.setattr(train_fashion_classifier, "WIDTH", 4)
    monkeypatch.setenv(FOLDER_VARIABLE, str(write_fashion(tmp_path / "fashion")))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield train_fashion_classifier
    torch.set_num_threads(threads)


def run(script: ModuleType, out: str, *more: str, state: str | None = None) -> int:
    return script.main(["--out", out, "--state", state or f"{out}.pt", "--batch-size", "20", *more])


class Killed(BaseException):
    """In place of a signal that no process can catch."""


def test_a_killed_training_comes_to_the_bits_of_a_whole_one(script, monkeypatch):
    assert run(script, "whole", "--steps", "5") == 0
    step = ClassifierTraining.train_step

    def killed(self):
        if self.step == 3:
            raise Killed
        return step(self)

    monkeypatch.setattr(ClassifierTraining, "train_step", killed)
    with pytest.raises(Killed):
        run(script, "parts", "--steps", "5", "--save-every", "2")
    monkeypatch.setattr(ClassifierTraining, "train_step", step)
    assert run(script, "parts", "--steps", "5") == 0
    whole, parts = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    record = json.loads(Path("whole/config.json").read_text())
    assert record["trained_on"] == 40 and record["held_out_images"] == 20 and 0.0 <= record["held_out_accuracy"] <= 1.0
    assert load_digits_classifier("whole").size == 28


def test_it_learns_the_training_set_and_is_measured_on_the_other(script):
    assert run(script, "learnt", "--steps", "60") == 0
    record = json.loads(Path("learnt/config.json").read_text())
    assert record["training_accuracy"] > 0.5 and record["held_out_accuracy"] > 0.5  # of ten classes


def test_states_that_do_not_fit_are_refused(script, capfd):
    assert run(script, "run", "--steps", "1") == 0
    assert run(script, "other", "--steps", "2", state="run.pt") == 2
    assert "run.pt is the state of another run, with {'steps': 1" in capfd.readouterr().err
    Path("run.pt").write_bytes(b"no state")
    assert run(script, "other", state="run.pt") == 2
    assert "run.pt is damaged or no state of this script" in capfd.readouterr().err
    assert run(script, "other", "--save-every", "0") == 2
    assert "--save-every is 0; it must be at least 1" in capfd.readouterr().err
    assert not Path("other").exists()


def test_the_shipped_features_of_clothes():
    record = json.loads((asset_path("fashion-classifier") / "config.json").read_text())
    assert record["held_out_accuracy"] > 0.9 and record["held_out_images"] == 10_000 and record["trained_on"] == 60_000
    assert record["command"].startswith("python scripts/train_fashion_classifier.py") and record["seed"] == 0
    assert (asset_path("fashion-classifier") / "model.safetensors").stat().st_size < 1e6
    extractor = load_features("fashion", "cpu")
    assert (extractor.name, extractor.distance, extractor.channels) == ("fashion", "FID", 1)
    # Ten held-out pictures of each class, a class a column (MIT licence).
    with Image.open(ROOT / "tests" / "data" / "fashion_held_out.png") as grid:
        pixels = torch.from_numpy(np.array(grid)).reshape(10, 28, 10, 28)
    images = pixels.permute(0, 2, 1, 3).reshape(100, 1, 28, 28)
    right = extractor.classify(images) == torch.arange(10).repeat(10)
    assert right.double().mean() > 0.85
    features = extractor(images)
    assert features.shape == (100, 64) and torch.linalg.matrix_rank(features.double()) == 64


def test_larger_pictures_are_halved_more_often():
    for size, sides in ((8, [4]), (28, [14, 7, 3]), (32, [16, 8, 4])):
        model = DigitsClassifier(width=4, size=size)
        seen = []
        for layer in model.trunk:
            if isinstance(layer, torch.nn.MaxPool2d):
                layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.shape[-1]))
        assert model.features(torch.zeros(2, 1, size, size)).shape == (2, 64) and seen == sides
