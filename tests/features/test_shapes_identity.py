"""The identity network of the shapes world: what it is trained on, and what it knows again."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, place_concept, references
from flowdistill.features import shapes_identity as identity
from flowdistill.features.vision import load_vision
from flowdistill.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = "flowdistill.features.shapes_identity:load_shapes_identity"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosines(images, others):
    network = load_vision(NAME, "identity")
    one, other = (F.normalize(network(pictures).pooled, dim=1) for pictures in (images, others))
    return one @ other.T


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_concept_is_known_again_anywhere_and_its_neighbours_are_not_it(concept):
    """No concept is among what the network was trained on."""
    grounds = list(shapes.BACKGROUNDS)
    shown = references(concept)[0]
    same = cosines(draw_concept(concept, grounds * 4, seed=77), shown).mean(1)
    scenes = place_concept(concept, grounds * 4, seed=78)
    neighbours = {"shape": (scenes.shape + 1) % 6, "pattern": scenes.pattern % 3 + 1,
                  "first": scenes.first.roll(1, 1), "second": scenes.second.roll(1, 1)}  # fmt: skip
    for name, value in neighbours.items():
        before = getattr(scenes, name)
        setattr(scenes, name, value)
        other = cosines(shapes.render(scenes), shown).mean(1)
        setattr(scenes, name, before)
        assert (other[:, None] < same[None]).float().mean() > 0.95, name
    assert same.min() > 0.6
    plain = shapes.draw_shapes(torch.arange(0, shapes.NUM_CLASSES, 5), 3)
    assert cosines(plain, shown).mean(1).max() < same.min()


def test_the_objects_of_a_family_differ_in_one_thing_and_none_is_near_a_concept():
    objects = identity.draw_families(400, seeded())
    assert not identity.near_concept(objects).any() and len(objects.shape) > 4 * 380
    families = [value.reshape(-1, identity.SIDES, *value.shape[1:]) for value in objects]
    changes = torch.stack([(value[:, 1:] != value[:, :1]).flatten(2).any(2) if value.ndim == 3 else
                           value[:, 1:] != value[:, :1] for value in families])  # (things, families, sides)
    assert (changes.sum(0) == 1).all()
    assert changes.flatten(1).any(1).all()  # each thing is one of some
    first, second = families[2][:, 0], families[3][:, 0]
    assert (first - second).norm(dim=1).min() >= identity.APART
    known = next(iter(CONCEPTS.values()))
    near = identity.Objects(
        torch.tensor([shapes.SHAPES.index(known.word)]), torch.tensor([known.pattern]),
        torch.tensor([known.first]) / 255 + 0.1, torch.tensor([known.second]) / 255, torch.ones(1), torch.zeros(1),
    )  # fmt: skip
    assert identity.near_concept(near).all()
    assert not identity.near_concept(near._replace(pattern=near.pattern + 1)).any()


def test_the_contrastive_loss_is_its_definition():
    one, other = (torch.randn(3, 5, generator=seeded(i), dtype=torch.float64) for i in range(2))
    views = [*F.normalize(one, dim=1), *F.normalize(other, dim=1)]
    total = 0.0
    for i, view in enumerate(views):
        weights = [torch.exp(view @ another / identity.TEMPERATURE) for another in views]
        total -= torch.log(weights[(i + 3) % 6] / (sum(weights) - weights[i])) / 6
    assert identity.contrastive_loss(one, other).item() == pytest.approx(float(total), rel=1e-12)


def test_the_library_paints_what_the_drawing_code_draws(monkeypatch):
    monkeypatch.setattr(identity, "POSES", 1)
    library = identity.PoseLibrary(5)
    kinds = torch.cartesian_prod(torch.arange(6), torch.arange(4))
    blank = torch.zeros(24, 3)
    scenes = shapes.place(*kinds.unbind(1), blank, blank, blank, 5)
    scenes.first, scenes.second, scenes.ground = (torch.rand(24, 3, generator=seeded(i)) for i in range(3))
    monkeypatch.setattr(shapes, "JITTER", 0)
    objects = identity.Objects(*kinds.unbind(1), scenes.first, scenes.second, torch.ones(24), torch.zeros(24))
    painted = library.draw(objects, scenes.ground, seeded())
    assert (painted - shapes.render(scenes)).abs().max() <= 0.5 / 255 + 1e-6  # which is of 8 bits


def test_it_reads_pictures_of_the_world_alone():
    with pytest.raises(UserError, match=r"\(1, 3, 8, 8\)"):
        identity.ShapesIdentity(width=4).features(torch.zeros(1, 3, 8, 8))


def test_a_killed_training_goes_on_and_comes_to_the_same(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_networks", ROOT / "scripts/train_shapes_networks.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "KEEP_EVERY", 2)
    monkeypatch.setattr(identity, "POSES", 1)
    separation = identity.separation
    monkeypatch.setattr(identity, "separation", lambda model, seed: separation(model, seed, families=2, references=2))
    arguments = ["identity", "--steps", "4", "--batch-size", "32", "--out"]
    script.main([*arguments, str(tmp_path / "whole")])
    real, calls = identity.contrastive_loss, []

    def dies(*views):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*views)

    monkeypatch.setattr(identity, "contrastive_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        script.main([*arguments, str(tmp_path / "parts")])
    with pytest.raises(SystemExit) as stopped:  # not in silence with other settings
        script.main(["identity", "--steps", "6", "--batch-size", "32", "--out", str(tmp_path / "parts")])
    assert stopped.value.code == 2 and "training.pt is of a training with" in capsys.readouterr().err
    script.main([*arguments, str(tmp_path / "parts")])
    assert "goes on at step 2" in capsys.readouterr().out and not (tmp_path / "parts" / "training.pt").exists()
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
