"""The strict judge of the shapes: perfect for what the drawing code draws; each fault fails a measure of its own."""

import math
from dataclasses import fields, replace

import pytest
import torch

from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, place_concept, references
from flowdistill.evaluation.shapes_judge import (
    AT_LEAST,
    AT_MOST,
    Measures,
    judge_concept,
    measure_against,
    spread,
)
from flowdistill.utils.errors import UserError

GROUNDS = ["pink", "gray", "white"]
STAR = "striped-star"
PERFECT = {"colour": 0, "contrast": 1, "blur": 0, "pattern": 1, "outline": 1, "background": 0, "ghosts": 0,
           "distance": 0}


def named(backgrounds):
    return torch.tensor([shapes.BACKGROUNDS[name] for name in backgrounds], dtype=torch.float32)


def layers(scenes):
    """The object's share of each pixel, the second colour's share of the object, and the three colours."""
    whole, other = shapes.coverage(scenes)
    colours = [colour[:, :, None, None] for colour in (scenes.first, scenes.second, scenes.ground)]
    return whole, other / whole.clamp(min=1e-6), colours


def painted(scenes, whole=None, share=None, first=None, second=None, ground=None):
    own, own_share, colours = layers(scenes)
    whole, share = own if whole is None else whole, own_share if share is None else share
    first, second, ground = (b if a is None else a for a, b in zip((first, second, ground), colours, strict=True))
    return whole * ((1 - share) * first + share * second) + (1 - whole) * ground


def scenes_of(concept=STAR):
    return place_concept(concept, GROUNDS, seed=8)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_rendering_against_itself_is_perfect(concept):
    scenes = scenes_of(concept)
    found = measure_against(shapes.render(scenes), scenes, concept, named(GROUNDS))
    for name, value in PERFECT.items():
        # What 8 bits round away remains, in Delta E and as a share.
        near = 0.05 if name in ("colour", "background", "distance") else 5e-3
        assert getattr(found, name).tolist() == pytest.approx([value] * 3, abs=near), name


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_nearest_rendering_is_found_where_it_was_drawn(concept):
    scenes = place_concept(concept, list(shapes.BACKGROUNDS), seed=3)
    found = judge_concept(shapes.render(scenes), concept, list(shapes.BACKGROUNDS))
    assert found.accepted.all()
    for name in ("x", "y", "radius"):
        assert (getattr(found.scenes, name) - getattr(scenes, name)).abs().max() < 0.05, name
    if concept != "ring-circle":  # a circle has no turn
        assert (found.scenes.angle - scenes.angle).abs().max() < 0.01
    assert found.measures.distance.max() < 0.3 and found.measures.outline.min() > 0.95
    # Where any background will do, the one that is there is taken.
    free = judge_concept(shapes.render(scenes)[:2], concept, [None, None])
    torch.testing.assert_close(free.measures.background, found.measures.background[:2])


def blurred_stripes(scenes):
    """A Gaussian of 1.5 pixels along the stripes' course inside the object, its outline as it was."""
    whole, share, _ = layers(scenes)
    line = torch.exp(-0.5 * (torch.arange(-6, 7) / 1.5).square())
    kernel = torch.outer(line / line.sum(), line / line.sum())[None, None]
    soft = torch.nn.functional.conv2d(whole * share, kernel, padding=6)
    return painted(scenes, share=soft / torch.nn.functional.conv2d(whole, kernel, padding=6).clamp(min=1e-6))


def other_colour(scenes):
    """Dark blue in the place of teal."""
    return painted(scenes, second=torch.tensor([20, 30, 120])[None, :, None, None] / 255)


def half_contrast(scenes):
    _, _, (first, second, _) = layers(scenes)
    middle = (first + second) / 2
    return painted(scenes, first=(first + middle) / 2, second=(second + middle) / 2)


def ghost(scenes):
    """The object once more, faintly, five pixels higher."""
    whole, _, _ = layers(scenes)
    faint = 0.3 * whole.roll(-5, dims=2)
    _, _, (first, _, ground) = layers(scenes)
    return painted(scenes, ground=(1 - faint) * ground + faint * first)


def wrong_background(scenes):
    return painted(scenes, ground=torch.tensor(shapes.BACKGROUNDS["cyan"])[None, :, None, None] / 255)


def other_shape(scenes):
    """The halves in a square of the same size and turn."""
    return shapes.render(replace(scenes, shape=torch.full_like(scenes.shape, shapes.SHAPES.index("square"))))


FAULTS = [
    (STAR, blurred_stripes, {"blur"}), (STAR, other_colour, {"colour"}), (STAR, half_contrast, {"contrast"}),
    (STAR, ghost, {"ghosts"}), (STAR, wrong_background, {"background"}), ("halved-heart", other_shape, {"outline"}),
    ("ring-circle", half_contrast, {"contrast"}),
    ("ring-circle", ghost, {"ghosts"}), ("halved-heart", blurred_stripes, {"blur"}),
]  # fmt: skip


@pytest.mark.parametrize("concept, fault, own", FAULTS, ids=[f"{name}-{f.__name__}" for name, f, _ in FAULTS])
def test_each_fault_fails_its_own_measure_and_no_other(concept, fault, own):
    found = judge_concept(fault(scenes_of(concept)), concept, GROUNDS)
    assert not found.accepted.any()
    # The distance is of everything that differs.
    failed = [{name for name, passed in found.passed.items() if not passed[i] and name != "distance"} for i in range(3)]
    assert failed == [own] * 3, found.measures


def test_another_pattern_has_neither_the_course_nor_its_contrast():
    scenes = scenes_of()
    halves = shapes.render(replace(scenes, pattern=torch.full_like(scenes.pattern, shapes.HALVES)))
    found = judge_concept(halves, STAR, GROUNDS)
    assert not found.passed["pattern"].any() and not found.passed["contrast"].any()
    assert found.passed["colour"].all() and found.passed["background"].all() and found.passed["ghosts"].all()


def test_measures_grow_with_their_faults():
    scenes = scenes_of()
    _, _, (first, second, _) = layers(scenes)
    middle = (first + second) / 2
    for part in (0.8, 0.5, 0.2):
        faint = painted(scenes, first=middle + part * (first - middle), second=middle + part * (second - middle))
        found = measure_against(faint, scenes, STAR, named(GROUNDS)).contrast
        # Tints nearer together, which the world has as well, make up for a little.
        assert all(part - 0.01 <= value <= part + 0.12 for value in found.tolist())
    sharp = measure_against(blurred_stripes(scenes), scenes, STAR, named(GROUNDS))
    assert sharp.blur.tolist() == pytest.approx([1.5] * 3, abs=0.16)


def test_spread_is_a_share_of_the_worlds_own():
    names = ["gray"] * 48
    drawn = judge_concept(draw_concept(STAR, names, 11), STAR, names)
    wide = spread(drawn)
    assert 0.8 < wide["position"] < 1.2 and 0.8 < wide["size"] < 1.2
    one = judge_concept(draw_concept(STAR, ["gray"], 11).repeat(4, 1, 1, 1), STAR, ["gray"] * 4)
    assert spread(one) == {"position": pytest.approx(0, abs=1e-3), "size": pytest.approx(0, abs=1e-3)}
    few = judge_concept(shapes.draw_shapes(torch.zeros(2, dtype=torch.int64), 0), STAR, [None, None])  # no stars
    assert all(math.isnan(value) for value in spread(few).values())


def test_all_measures_have_a_threshold():
    assert {*AT_MOST, *AT_LEAST} == {field.name for field in fields(Measures)} == PERFECT.keys()
    assert judge_concept(references(STAR)[0], STAR, references(STAR)[1]).accepted.all()


@pytest.mark.parametrize("images, concept, grounds, words", [
    (torch.zeros(1, 3, 16, 16), STAR, ["gray"], r"\(1, 3, 16, 16\)"),
    (torch.zeros(1, 3, 32, 32), "moon", ["gray"], "'moon'"),
    (torch.zeros(1, 3, 32, 32), STAR, ["sea"], "'sea'"), (torch.zeros(2, 3, 32, 32), STAR, ["gray"], "2 images"),
])  # fmt: skip
def test_bad_input_is_said_in_a_sentence(images, concept, grounds, words):
    with pytest.raises(UserError, match=words):
        judge_concept(images, concept, grounds)
