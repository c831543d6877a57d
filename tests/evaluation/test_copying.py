"""Copies of a training set: the figures, and ``scripts/nearest_neighbours.py`` on stored images."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill.data import load_images
from flowdistill.evaluation.copying import copying
from flowdistill.evaluation.moments import frechet_distance
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images
from tests.data.fashion import FOLDER_VARIABLE, write_fashion

ROOT = Path(__file__).resolve().parents[2]


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_images_like_those_held_out_are_as_near_and_copies_are_nearer():
    training, held_out, fresh = points(2000, 0), points(1500, 1), points(1500, 2)
    found = copying(fresh, training, held_out)
    assert found.nearer == pytest.approx(0.5, abs=0.03) and found.very_near == pytest.approx(0.01, abs=0.008)
    assert torch.allclose(found.distances, torch.cdist(fresh.double(), training.double()).min(dim=1).values)

    copies = torch.cat([fresh[:750], training[:750] + 1e-3])
    found = copying(copies, training, held_out)
    assert found.nearer == pytest.approx(0.75, abs=0.03) and found.very_near == pytest.approx(0.5, abs=0.01)
    assert torch.equal(found.neighbours[750:], torch.arange(750))
    assert copying(fresh + 5, training, held_out).nearer < 0.05


def test_equal_distances_count_half():
    training = torch.zeros(1, 2)
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert copying(one, training, torch.cat([one, two])).nearer == 0.75
    assert copying(two, training, torch.cat([one, two])).nearer == 0.25


@pytest.mark.parametrize("shapes", [((0, 2), (3, 2), (3, 2)), ((3, 2), (3, 3), (3, 2)), ((3, 2), (3, 2), (0, 2))])
def test_sets_that_cannot_be_compared_are_refused(shapes):
    with pytest.raises(UserError, match=r"features \(N, D\) of images, of a training set and of held-out images"):
        copying(*(torch.zeros(shape) for shape in shapes))


def test_the_script_finds_copies_and_draws_them_with_their_neighbours(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(FOLDER_VARIABLE, str(write_fashion(tmp_path / "fashion")))
    main = runpy.run_path(str(ROOT / "scripts" / "nearest_neighbours.py"))["main"]
    images = load_images("fashion")[0][:12]
    save_images(images, tmp_path / "images")
    given = [str(tmp_path / "images"), "--training", "fashion", "--features", "tests.evaluation.test_copying:Pixels"]
    assert main([*given, "--held-out", "fashion-test", "--json", str(tmp_path / "found.json"), "--picture",
                 str(tmp_path / "found.png"), "--closest", "3"]) == 0
    said = capsys.readouterr().out
    assert "12 images against 40 of fashion and 20 of fashion-test" in said and "is: 1.000" in said
    assert "nearer than the closest 1% of the held-out images: 100.00%" in said
    figures = json.loads((tmp_path / "found.json").read_text())
    assert figures["nearer"] == 1.0
    sets = {"images": images, "training": load_images("fashion")[0], "held_out": load_images("fashion-test")[0]}
    moments = {name: (pixels.mean(axis=0), np.cov(pixels, rowvar=False)) for name, pixels in
               ((name, part.double().flatten(1).numpy()) for name, part in sets.items())}
    for name, pair in (("fid_training", ("images", "training")), ("fid_held_out", ("images", "held_out")),
                       ("fid_of_both", ("training", "held_out"))):
        assert figures[name] == pytest.approx(frechet_distance(*moments[pair[0]], *moments[pair[1]]), rel=1e-4)
        assert f"{figures[name]:.3f}" in said
    assert figures["fid_training"] < figures["fid_held_out"]
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (3 * 30 + 2, 2 * 30 + 2)
        rows = torch.from_numpy(np.array(picture.convert("L")))
    assert torch.equal(rows[:30], rows[30:60])  # copies, each above what it is a copy of

    for wrong, words in ((["--closest", "0"], "--closest is 0"), (["--json", str(tmp_path)], "is a folder")):
        assert main([*given, "--held-out", "fashion-test", *wrong]) == 2
        assert words in capsys.readouterr().err


class Pixels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)
