"""A small network that knows objects of the shapes world again: on any background, in any place, size and turn.

It is trained on drawn objects of random shapes, patterns and colours, none of them near a concept
(``flowdistill.data.shapes_concepts``): two pictures of one object are pulled together, others apart, most of all those
that differ from it in one thing only: the shape, the pattern, one of the colours, or how clear the pattern is.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.data import shapes
from flowdistill.data.assets import asset_path, load_network
from flowdistill.data.shapes_concepts import CONCEPTS
from flowdistill.features.shapes_networks import spoil, trunk_features
from flowdistill.utils.randomness import generator_of

PATTERNS = 4
POSES = 150  # drawn of each shape and pattern
TEMPERATURE = 0.1
SIDES = 4  # objects that are alike but for one thing, in a family
APART = 0.3  # least distance of two colours of an object, or of an object's and another's, of RGB in [0, 1]
NEAR = 0.35  # an object of a concept's shape and pattern, both colours within this, is not trained on
CHANGES = ("shape", "pattern", "first", "second", "faint", "blurred")


class ShapesIdentity(nn.Module):
    """Five convolutions and a linear layer on images (B, 3, 32, 32) in [0, 1]; no dropout, no batch statistics.

    Args:
        width: channels of the first convolution; the others have up to four times as many.
        feature_size: D of the features.
    """

    def __init__(self, width: int = 20, feature_size: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "feature_size": feature_size}
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 1), (4 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.SiLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, feature_size))

    def features(self, images: Tensor) -> Tensor:
        """float (B, D), to be compared by their cosine.

        Raises:
            UserError: the images are not (B, 3, 32, 32).
        """
        return trunk_features(self.trunk, images)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class Objects(NamedTuple):
    """What N objects are: ``shape``, ``pattern`` int64 (N,); ``first``, ``second`` (N, 3) in [0, 1]; ``contrast`` (N,)
    of the two colours, 1 as they are; ``blur`` (N,) of the border between them, 0 or 1."""

    shape: Tensor
    pattern: Tensor
    first: Tensor
    second: Tensor
    contrast: Tensor
    blur: Tensor

    def rows(self, chosen: Tensor) -> Objects:
        return Objects(*(value[chosen] for value in self))


class PoseLibrary:
    """The drawing code's masks of every shape and pattern in ``POSES`` places, sizes and turns; colours come later."""

    def __init__(self, seed: int) -> None:
        kinds = torch.cartesian_prod(torch.arange(len(shapes.SHAPES)), torch.arange(PATTERNS))
        shape, pattern = (column.repeat_interleave(POSES) for column in kinds.unbind(1))
        blank = torch.zeros(len(shape), 3)
        scenes = shapes.place(shape, pattern, blank, blank, blank, seed)
        parts = [shapes.coverage(scenes[start : start + 256]) for start in range(0, len(scenes), 256)]
        self.whole, self.second = (torch.cat(masks) for masks in zip(*parts, strict=True))
        line = torch.exp(-0.5 * (torch.arange(-4, 5) / 1.5).square())
        kernel = torch.outer(line, line)[None, None]
        soft = [F.conv2d(masks, kernel, padding=4) for masks in (self.second, self.whole)]
        self.blurred = self.whole * soft[0] / soft[1].clamp(min=1e-6)

    def draw(self, objects: Objects, ground: Tensor, generator: torch.Generator) -> Tensor:
        """A picture (N, 3, 32, 32) of each object in a random pose on its ``ground`` (N, 3), all tinted anew."""
        kind = objects.shape * PATTERNS + objects.pattern
        rows = kind * POSES + torch.randint(POSES, kind.shape, generator=generator)
        whole = self.whole[rows]
        second = torch.where(objects.blur[:, None, None, None] > 0, self.blurred[rows], self.second[rows])

        def tinted(colours: Tensor) -> Tensor:
            return shapes.tint(255 * colours, generator)[:, :, None, None]

        first, last = tinted(objects.first), tinted(objects.second)
        middle, contrast = (first + last) / 2, objects.contrast[:, None, None, None]
        first, last = torch.lerp(middle, first, contrast), torch.lerp(middle, last, contrast)
        return (whole - second) * first + second * last + (1 - whole) * tinted(ground)


def draw_families(count: int, generator: torch.Generator) -> Objects:
    """``count`` families of ``SIDES`` objects that follow each other: one, and the same but for one thing each.

    None is near a concept.
    """
    shape = torch.randint(len(shapes.SHAPES), (count,), generator=generator)
    pattern = torch.randint(1, PATTERNS, (count,), generator=generator)
    first = torch.rand(count, 3, generator=generator)
    second = _colours_apart(first, generator)
    one = Objects(shape, pattern, first, second, torch.ones(count), torch.zeros(count))
    sides = [one]
    order = torch.rand(count, len(CHANGES), generator=generator).argsort(1)
    for side in range(SIDES - 1):
        what = order[:, side]

        def chosen(name: str, what: Tensor = what) -> Tensor:
            return what == CHANGES.index(name)

        other_shape = (shape + torch.randint(1, len(shapes.SHAPES), (count,), generator=generator)) % len(shapes.SHAPES)
        other_pattern = (pattern + torch.randint(1, PATTERNS, (count,), generator=generator)) % PATTERNS
        sides.append(Objects(
            torch.where(chosen("shape"), other_shape, shape),
            torch.where(chosen("pattern"), other_pattern, pattern),
            torch.where(chosen("first")[:, None], _colours_apart(first, generator), first),
            torch.where(chosen("second")[:, None], _colours_apart(second, generator), second),
            torch.where(chosen("faint"), 0.4, 1.0),
            chosen("blurred").float(),
        ))  # fmt: skip
    together = Objects(*(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*sides, strict=True)))
    fine = ~near_concept(together).reshape(count, SIDES).any(1)
    return together.rows(fine.repeat_interleave(SIDES))


def _colours_apart(colours: Tensor, generator: torch.Generator) -> Tensor:
    """Random colours (N, 3), each at least ``APART`` from the one in its row."""
    tries = torch.rand(24, *colours.shape, generator=generator)
    far = (tries - colours).norm(dim=2) >= APART
    first = far.float().argmax(0)  # of 24 tries one is far enough, but for once in 10^15
    return tries[first, torch.arange(len(colours))]


def near_concept(objects: Objects) -> Tensor:
    """bool (N,): which have shape and pattern of a concept, and both colours near it."""
    found = torch.zeros(len(objects.shape), dtype=torch.bool)
    for concept in CONCEPTS.values():
        alike = (objects.shape == shapes.SHAPES.index(concept.word)) & (objects.pattern == concept.pattern)
        for colours, named in ((objects.first, concept.first), (objects.second, concept.second)):
            alike &= (colours - torch.tensor(named) / 255).norm(dim=1) < NEAR
        found |= alike
    return found


def draw_views(library: PoseLibrary, objects: Objects, generator: torch.Generator) -> Tensor:
    """A picture (N, 3, 32, 32) of each object, mostly on a background of the world, else on any, a little spoilt."""
    count = len(objects.shape)
    known = shapes.palette(shapes.BACKGROUNDS) / 255
    ground = known[torch.randint(len(known), (count,), generator=generator)]
    anything = torch.rand(count, 3, generator=generator)
    ground = torch.where(torch.rand(count, 1, generator=generator) < 0.25, anything, ground)
    images = library.draw(objects, ground, generator)
    return torch.lerp(images, spoil(images, generator), torch.rand(count, 1, 1, 1, generator=generator) * 0.6)


def contrastive_loss(one: Tensor, other: Tensor) -> Tensor:
    """Cross-entropy of finding an object's other view among all views but its own (NT-Xent; Chen et al. 2020).

    Args:
        one, other: features (N, D) of two views of N objects.
    """
    features = F.normalize(torch.cat([one, other]), dim=1)
    count = len(one)
    logits = (features @ features.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count).roll(count)
    return F.cross_entropy(logits, partner)


@torch.no_grad()
def separation(model: nn.Module, seed: int, families: int = 250, references: int = 5) -> dict[str, float]:
    """How well features of objects never trained on tell them apart, each in ``references`` pictures.

    ``same``: mean cosine of two pictures of one object; ``changed``: of an object and what differs in one thing;
    ``told_apart``: share of pairs of a picture with another of its object and with one of what differs in one thing in
    which the former is more alike (0.5 is chance).
    """
    generator = generator_of(seed)
    objects = draw_families(families, generator)
    library = PoseLibrary(seed + 1)
    views = torch.stack([
        F.normalize(model(draw_views(library, objects, generator)), dim=1) for _ in range(references)
    ], 1)
    views = views.reshape(-1, SIDES, references, views.shape[-1])
    own = torch.einsum("frd,fsd->frs", views[:, 0], views[:, 0])
    apart = ~torch.eye(references, dtype=torch.bool)
    same = own[:, apart]
    changed = torch.einsum("frd,fksd->frks", views[:, 0], views[:, 1:]).flatten(1)
    better = (same[:, :, None] > changed[:, None, :]).float().mean()
    return {"same": same.mean().item(), "changed": changed.mean().item(), "told_apart": better.item()}


def load_shapes_identity(path: str | Path | None = None) -> ShapesIdentity:
    """The network in a folder with ``config.json`` and ``model.safetensors``, frozen; None is the shipped one.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network its config describes.
    """
    folder = asset_path("shapes/identity") if path is None else path
    return load_network(ShapesIdentity, folder, "identity network of shapes")


