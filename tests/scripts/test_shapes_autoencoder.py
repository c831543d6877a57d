"""The autoencoder of the shapes that concepts pass through: its training command, and what is shipped of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL

from flowdistill.data.assets import asset_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_shapes_autoencoder

    threads = torch.get_num_threads()
    yield train_shapes_autoencoder
    torch.set_num_threads(threads)


def own() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(asset_path("shapes/teacher") / "vae", torch_dtype=torch.float32).eval()


def test_the_shipped_one_keeps_latents_and_lets_concepts_through(command, monkeypatch):
    """The teacher's own autoencoder is the negative control: no star comes through it."""
    monkeypatch.setattr(command, "TEST_IMAGES", 18)
    two = {name: command.CONCEPTS[name] for name in ("striped-star", "halved-heart")}
    monkeypatch.setattr(command, "CONCEPTS", two)  # the judge takes a second or two to get ready for each
    like = own()
    shipped = AutoencoderKL.from_pretrained(asset_path("shapes/autoencoder"), torch_dtype=torch.float32).eval()
    found, before = command.tested(shipped, like, 5), command.tested(like, like, 5)
    assert before["latents_moved"] == 0 and found["latents_moved"] < 0.04
    assert before["renderings_accepted"]["striped-star"] == 0 and before["renderings_accepted"]["halved-heart"] < 0.5
    assert found["renderings_accepted"]["striped-star"] > 0.1 and found["renderings_accepted"]["halved-heart"] > 0.9
    assert shipped.config.scaling_factor == like.config.scaling_factor


def test_the_command_makes_one_and_goes_on(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "tested", lambda vae, like, seed: seed)  # the test above has it
    few = ["--like", str(asset_path("shapes/teacher")), "--images", "8", "--batch-size", "4", "--steps", "3",
           "--named-grounds-from", "2", "--threads", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(place, *more):
        monkeypatch.setattr("sys.argv", ["x", *few, "--work", str(place / "work"), "--out", str(place / "vae"), *more])
        command.main()
        return capsys.readouterr().out

    assert "wrote" in run(whole)
    assert "the same command goes on" in run(parts, "--minutes", "0")
    assert "wrote" in run(parts)
    made, again = (AutoencoderKL.from_pretrained(place / "vae").state_dict() for place in (whole, parts))
    assert all(torch.equal(made[key], again[key]) for key in made)
    record = json.loads((whole / "vae" / "flowdistill.json").read_text())
    assert record["test"] == 1000 and record["planned_steps"] == [[0, 3, 1e-3]]
