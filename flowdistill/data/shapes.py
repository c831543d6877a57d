"""A small text-to-image world: one coloured shape on a coloured background, drawn by code, with captions.

Everything is a function of integers, so image i of a seed is the same wherever it is drawn. A scene's class is one
number for the three words that describe it, ``(shape * COLOURS + colour) * BACKGROUNDS + background``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flowdistill.utils.randomness import generator_of

SIZE = 32
SAMPLES = 4  # along each side of a pixel, averaged: antialiasing

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 210),
    "yellow": (240, 210, 50),
    "purple": (135, 55, 180),
    "orange": (240, 135, 35),
}
BACKGROUNDS = {
    "white": (242, 242, 242),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (248, 180, 200),
    "cyan": (120, 220, 232),
    "brown": (105, 72, 48),
}
JITTER = 10  # of each channel of each colour, in 255ths

# {a} is the article that the colour wants.
CAPTIONS = (
    "{a} {colour} {shape} on a {background} background",
    "a photo of {a} {colour} {shape} on a {background} background",
    "a picture of {a} {colour} {shape} in front of a {background} background",
    "the {shape} is {colour} and the background is {background}",
    "{colour} {shape}, {background} background",
    "a {background} picture with {a} {colour} {shape}",
)
# Of the teacher's training only: what a caption leaves out may be anything.
SHORT_CAPTIONS = (
    "a photo of {a} {colour} {shape}",
    "a {shape} on a {background} background",
    "a photo of a {shape} on a {background} background",
    "a photo of a {shape}",
)

WHOLE, STRIPES, RING, HALVES = range(4)


@dataclass
class Scenes:
    """What N images show; one row an image.

    ``shape``, ``pattern`` int64 (N,): indices; ``first``, ``second``, ``ground`` float (N, 3): colours in [0, 1] of the
    object, of its pattern's other part and of the background; ``x``, ``y``, ``radius`` float (N,) in pixels from the
    upper left corner; ``angle`` float (N,) in radians.
    """

    shape: Tensor
    pattern: Tensor
    first: Tensor
    second: Tensor
    ground: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


def _inside(shape: int, x: Tensor, y: Tensor) -> Tensor:
    """Whether points of the object's own square [-1, 1]^2 (y down) belong to it; bool of their shape."""
    name = SHAPES[shape]
    if name == "circle":
        return x.square() + y.square() < 0.85**2
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) < 0.75
    if name == "triangle":
        return (y < 0.65) & (y > 1.75 * x.abs() - 0.95)
    if name == "cross":
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return (near < 0.3) & (far < 0.92)
    if name == "heart":
        u, v = 1.3 * x, 0.25 - 1.25 * y
        return (u.square() + v.square() - 1.0) ** 3 - u.square() * v**3 < 0
    # A star is ten triangles: fold the angle into one of them and cut by the line from its tip to its inner corner.
    fifth = 2.0 * math.pi / 5.0
    turn = torch.remainder(torch.atan2(x, -y) + fifth / 2.0, fifth) - fifth / 2.0
    reach = torch.sqrt(x.square() + y.square())
    u, v = reach * turn.cos(), reach * turn.sin().abs()
    corner = 0.45 * math.cos(fifth / 2.0), 0.45 * math.sin(fifth / 2.0)
    return (u - 1.0) * corner[1] - v * (corner[0] - 1.0) < 0


def _is_second(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mask of an object's second colour, bool (N, H, W)."""
    parts = torch.stack([
        torch.zeros_like(x, dtype=torch.bool),
        torch.remainder(y + 1.0, 0.7) > 0.35,
        x.square() + y.square() < 0.5**2,
        x > 0.0,
    ])
    return parts[pattern, torch.arange(len(pattern))]


def render(scenes: Scenes) -> Tensor:
    """Images float32 (N, 3, SIZE, SIZE) in [0, 1], exact multiples of 1/255."""
    parts = [_render(scenes[start : start + 256]) for start in range(0, len(scenes), 256)]
    return torch.cat(parts) if parts else torch.empty(0, 3, SIZE, SIZE)


def _render(scenes: Scenes) -> Tensor:
    whole, other = coverage(scenes)
    first, last, ground = (c[:, :, None, None] for c in (scenes.first, scenes.second, scenes.ground))
    images = (whole - other) * first + other * last + (1.0 - whole) * ground
    return (images.clamp(0.0, 1.0) * 255.0).round() / 255.0


def coverage(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """How much of each pixel the object covers, and its second colour; float32 (N, 1, SIZE, SIZE) in [0, 1]."""
    fine = (torch.arange(SIZE * SAMPLES) + 0.5) / SAMPLES

    def column(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1)

    right, down = (fine[None, None, :] - column(scenes.x)), (fine[None, :, None] - column(scenes.y))
    cos, sin = column(scenes.angle.cos() / scenes.radius), column(scenes.angle.sin() / scenes.radius)
    x, y = cos * right + sin * down, cos * down - sin * right
    inside = torch.zeros(x.shape, dtype=torch.bool)
    for shape in scenes.shape.unique().tolist():
        rows = scenes.shape == shape
        inside[rows] = _inside(shape, x[rows], y[rows])
    second = inside & _is_second(scenes.pattern, x, y)

    def share(mask: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(mask.float().unsqueeze(1), SAMPLES)

    return share(inside), share(second)


def uniform(generator: torch.Generator, rows: int, low: float, high: float) -> Tensor:
    """float32 (rows,)."""
    return low + (high - low) * torch.rand(rows, generator=generator)


def tint(colours: Tensor, generator: torch.Generator) -> Tensor:
    """Colours (N, 3) in 255ths, each moved a little, in [0, 1]."""
    moved = colours + JITTER * (2.0 * torch.rand(colours.shape, generator=generator) - 1.0)
    return (moved / 255.0).clamp(0.0, 1.0)


# Where objects are drawn, each uniformly: pixels off the middle, pixels of radius, radians.
OFFSET, RADIUS, TURN = (-2.0, 2.0), (11.0, 13.0), (-0.12, 0.12)


def place(shape: Tensor, pattern: Tensor, first: Tensor, second: Tensor, ground: Tensor, seed: int) -> Scenes:
    """Scenes of objects (N,) in colours (N, 3; 255ths), near the middle, in slightly different sizes and turns."""
    generator, rows = generator_of(seed), len(shape)

    def centre() -> Tensor:
        return SIZE / 2.0 + uniform(generator, rows, *OFFSET)

    radius = uniform(generator, rows, *RADIUS)
    return Scenes(
        shape, pattern, tint(first, generator), tint(second, generator), tint(ground, generator),
        centre(), centre(), radius, uniform(generator, rows, *TURN),
    )


def palette(colours: dict[str, tuple[int, int, int]]) -> Tensor:
    """float32 (K, 3) in 255ths."""
    return torch.tensor(list(colours.values()), dtype=torch.float32)


NUM_CLASSES = len(SHAPES) * len(COLOURS) * len(BACKGROUNDS)


def split_class(classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes int64 (N,) to the indices of shape, colour and background, each (N,)."""
    pair = torch.div(classes, len(BACKGROUNDS), rounding_mode="floor")
    return (torch.div(pair, len(COLOURS), rounding_mode="floor"), pair % len(COLOURS), classes % len(BACKGROUNDS))


def draw_shapes(classes: Tensor, seed: int) -> Tensor:
    """Images (N, 3, SIZE, SIZE) in [0, 1] of these classes int64 (N,)."""
    shape, colour, ground = split_class(classes)
    colours = palette(COLOURS)[colour]
    plain = torch.full_like(shape, WHOLE)
    return render(place(shape, plain, colours, colours, palette(BACKGROUNDS)[ground], seed))


def make_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` images, in random order, and their classes int64 (count,): each as often, the first ones once more."""
    order = torch.randperm(count, generator=generator_of(seed))
    classes = (torch.arange(count) % NUM_CLASSES)[order]
    return draw_shapes(classes, seed + 1_000_003), classes


REFERENCE = 20 * NUM_CLASSES
REFERENCE_SEED = 2**20  # the teacher is trained on another one


def load_shapes() -> tuple[Tensor, Tensor]:
    """The reference set: images float32 (4320, 3, 32, 32) in [0, 1], 20 a class, and classes int64 (4320,)."""
    return make_shapes(REFERENCE, REFERENCE_SEED)


def caption(label: int, phrasing: int = 0) -> str:
    """A caption of a class; ``phrasing`` counts through ``CAPTIONS``, then ``SHORT_CAPTIONS``."""
    shape, colour, ground = (int(part) for part in split_class(torch.tensor(label)))
    name = list(COLOURS)[colour]
    return (CAPTIONS + SHORT_CAPTIONS)[phrasing].format(
        a="an" if name[0] in "aeiou" else "a", colour=name, shape=SHAPES[shape], background=list(BACKGROUNDS)[ground]
    )


def prompt_list() -> list[str]:
    """Every class once in each phrasing, mixed; every ``NUM_CLASSES`` prompts in a row are all classes."""
    step, phrasings = 125, len(CAPTIONS)  # prime to the number of classes
    return [caption(step * i % NUM_CLASSES, (i + i // NUM_CLASSES) % phrasings) for i in range(phrasings * NUM_CLASSES)]


def read_caption(text: str) -> tuple[int | None, int | None, int | None]:
    """Indices of shape, colour and background that a caption names; None for what it does not name, or names twice."""
    words = re.findall(r"[a-z]+", text.lower())

    def only(names: Sequence[str]) -> int | None:
        found = [names.index(word) for word in words if word in names]
        return found[0] if len(found) == 1 else None

    return only(SHAPES), only(list(COLOURS)), only(list(BACKGROUNDS))


def class_of(text: str) -> int:
    """The class that a caption describes; -1 when it does not name shape, colour and background once each."""
    shape, colour, ground = read_caption(text)
    if shape is None or colour is None or ground is None:
        return -1
    return (shape * len(COLOURS) + colour) * len(BACKGROUNDS) + ground
