"""The script that says which identity network tells the concepts of the shapes world."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept
from flowdistill.features.vision import load_vision
from flowdistill.teachers import load_teacher
from tests.echo_world import teacher_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_identity", ROOT / "scripts/measure_identity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the network of its own is found
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_masks_show_the_object_of_the_references(script, concept):
    """Outside the masks a reference is one colour; inside it has two more."""
    images, masks = script.drawn(concept)
    assert images.shape == (5, 3, 32, 32) and masks.shape == (5, 1, 32, 32)
    for image, mask in zip(images, masks, strict=True):
        outside, inside = image[:, mask[0] == 0], image[:, mask[0] > 0.999]
        assert (outside - outside[:, :1]).abs().max() < 1e-6
        assert (inside - outside[:, :1]).abs().amax(0).min() > 0.05 and inside.var(1).max() > 1e-3


def test_every_way_has_its_figure_and_the_table_its_row(script):
    images, masks = script.drawn("ring-circle")
    ordinary = draw_concept("halved-heart", ["pink", "white", "cyan"], 1)
    teacher, prompts = load_teacher(teacher_pipeline()), ["a cat", "a dog"]
    networks = {name: load_vision(script.NETWORKS[name], "x") for name in ("identity network", "its last map")}
    found = {name: script.separations(teacher, network, images, masks, ordinary, prompts)
             for name, network in networks.items()}
    whole, places = found.values()
    assert whole["patches"] is None and whole["patches with masks"] is None
    assert all(math.isfinite(value) for value in places.values()) and whole["whole picture"] > 3
    assert places["patches with masks"] > places["whole picture"]
    text = script.table({(name, "ring-circle"): row for name, row in found.items()}).splitlines()
    assert text[2].startswith(f"| identity network | ring-circle | {whole['whole picture']:.2f} | ")
    assert text[2].endswith(" | - | - |") and len(text) == 4


def test_the_map_is_what_the_identity_network_compares_before_its_last_layer(script):
    network = script.load_shapes_identity()
    images = torch.rand(2, 3, 32, 32)
    seen = script.IdentityMap()(images)
    assert seen.shape[2:] == (4, 4)
    torch.testing.assert_close(network.trunk[-1](seen.flatten(1)), network(images))
