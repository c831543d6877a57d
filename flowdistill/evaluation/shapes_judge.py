"""A strict judge of pictures of a shapes concept, without any network: each is measured against its nearest rendering.

The concepts are drawn by code (``flowdistill.data.shapes``), so what a picture should be is known up to position, size,
turn and tint. The nearest rendering is found over those, and what is left is told apart, each measure blind to the
others: colours with the contrast undone, contrast with the blur undone, blur, the pattern's course, the outline, the
background, what is painted beside the object, and the distance to the nearest rendering as a whole. Colour differences
are Euclidean in CIE Lab (Delta E 1976: 2 can just be seen, 10 is another shade, 50 another colour).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.data import shapes
from flowdistill.data.shapes import Scenes
from flowdistill.data.shapes_concepts import CONCEPTS, check_concept
from flowdistill.objectives import alignment
from flowdistill.utils.errors import UserError

# Where the nearest rendering is looked for: a little beyond the world's own ranges.
REACH = {"x": (-3.0, 3.0), "y": (-3.0, 3.0), "radius": (10.0, 14.0), "angle": (-0.2, 0.2)}
COARSE = {"x": 7, "y": 7, "radius": 5, "angle": 5}  # places of the first search along each
STEP = (0.25, 0.25, 0.25, 0.02)  # of the derivatives, far above what antialiasing rounds
ROUNDS = 6
BLURS = (0.0, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)  # standard deviations in pixels
AT_ONCE = 64
FLOOR = 5.0  # Delta E outside the object that is taken for noise
TINT = shapes.JITTER / 255
Rows = TypeVar("Rows", "Measures", Scenes)


@dataclass
class Measures:
    """What is wrong with N pictures; each float (N,), and what a rendering has.

    ``colour``: Delta E of the worse of the object's two colours to the nearest tint, contrast and blur undone; 0.
    ``contrast``: difference of the two colours along that of the rendering's, as its share; 1.
    ``blur``: of the border between the two colours inside the object, a Gaussian's standard deviation in pixels; 0.
    ``pattern``: correlation of the colours' course inside the object with the rendering's; 1.
    ``outline``: intersection over union of the object's pixels, borders in part, with the rendering's; 1.
    ``background``: Delta E of the median outside the object to the nearest tint of the background; 0.
    ``ghosts``: what differs from the background outside the object, as a share of what the object does; 0.
    ``distance``: mean Delta E to the nearest rendering in the concept's and the background's tints; 0.
    """

    colour: Tensor
    contrast: Tensor
    blur: Tensor
    pattern: Tensor
    outline: Tensor
    background: Tensor
    ghosts: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.colour)


# Set on the sheet of scripts/shapes_judge_sheet.py: what an eye refuses fails one, what it takes passes all.
AT_MOST = {"colour": 8.0, "blur": 1.15, "background": 10.0, "ghosts": 0.012, "distance": 8.0}
AT_LEAST = {"contrast": 0.75, "pattern": 0.93, "outline": 0.9}


@dataclass
class Judged:
    """Measures of N pictures, and where their nearest renderings are.

    Attributes:
        scenes: of the nearest renderings, their tints included.
        passed: bool (N,) for each measure.
    """

    measures: Measures
    scenes: Scenes

    @property
    def passed(self) -> dict[str, Tensor]:
        below = {name: getattr(self.measures, name) <= limit for name, limit in AT_MOST.items()}
        return below | {name: getattr(self.measures, name) >= limit for name, limit in AT_LEAST.items()}

    @property
    def accepted(self) -> Tensor:
        """bool (N,): whether a picture passes every measure."""
        return torch.stack(list(self.passed.values())).all(0)


def judge_concept(images: Tensor, concept: str, backgrounds: Sequence[str | None]) -> Judged:
    """Measure pictures against the nearest rendering of a concept.

    Args:
        images: (N, 3, 32, 32) in [0, 1].
        backgrounds: that each was asked for; None where any will do.

    Raises:
        UserError: unknown concept or background, or images of another shape.
    """
    _check(images, concept, backgrounds)
    images = images.detach().cpu().float().clamp(0.0, 1.0)
    parts = [_judge(images[start : start + AT_ONCE], concept, backgrounds[start : start + AT_ONCE])
             for start in range(0, len(images), AT_ONCE)]
    return Judged(_joined(Measures, [part.measures for part in parts]), _joined(Scenes, [p.scenes for p in parts]))


def measure_against(images: Tensor, scenes: Scenes, concept: str, grounds: Tensor) -> Measures:
    """The measures of pictures (N, 3, 32, 32) against the objects of these scenes, where those are.

    Args:
        scenes: of the concept; their own colours count for ``distance`` alone.
        grounds: the background's colour (N, 3) in 255ths before its tint.
    """
    about = CONCEPTS[concept]
    whole, other = (part.flatten(1) for part in shapes.coverage(scenes))
    ground = _ground_colour(images, whole)
    allowed_ground = _nearest_tint(ground, grounds / 255)
    blur, colours, share = _object_colours(images, whole, other)
    named = torch.tensor([about.first, about.second]) / 255
    wanted = _nearest_tint(colours, named.expand_as(colours))
    contrast, pure = _without_contrast(colours, wanted)
    apart = (_lab(pure) - _lab(wanted)).norm(dim=2)
    outline, ghosts = _outside(images, whole, share, colours, wanted, ground)
    return Measures(
        colour=apart.amax(1),
        contrast=contrast,
        blur=blur,
        pattern=_course(images, whole, share, wanted),
        outline=outline,
        background=(_lab(ground) - _lab(allowed_ground)).norm(dim=1),
        ghosts=ghosts,
        distance=_distance(images, scenes),
    )


def spread(judged: Judged) -> dict[str, float]:
    """How much pictures of one prompt differ: the standard deviation of their nearest renderings' position and size,
    as a share of what the world's own scenes have. Of the pictures that have the outline; NaN of fewer than two."""
    rows = judged.passed["outline"]
    scenes = judged.scenes

    def own(name: str) -> float:
        values = getattr(scenes, name)[rows]
        return float(values.double().std(correction=1)) if len(values) > 1 else math.nan

    def world(span: tuple[float, float]) -> float:
        return (span[1] - span[0]) / math.sqrt(12.0)

    return {
        "position": math.hypot(own("x"), own("y")) / math.hypot(world(shapes.OFFSET), world(shapes.OFFSET)),
        "size": own("radius") / world(shapes.RADIUS),
    }


# --- the search for the nearest rendering


def _judge(images: Tensor, concept: str, backgrounds: Sequence[str | None]) -> Judged:
    free = _fitted(images, concept, _coarse(images, concept), None)
    ground = _ground_colour(images, shapes.coverage(free)[0].flatten(1))
    grounds = _asked(ground, backgrounds)
    about = CONCEPTS[concept]
    centre = torch.stack([
        torch.tensor(about.first).float().expand_as(grounds), torch.tensor(about.second).float().expand_as(grounds),
        grounds,
    ], 1) / 255
    nearest = _fitted(images, concept, free, centre)
    measures = measure_against(images, free, concept, grounds)
    return Judged(replace(measures, distance=_distance(images, nearest)), nearest)


def _scenes(concept: str, places: Tensor, colours: Tensor | None = None) -> Scenes:
    """Scenes at places (N, 4): x, y off the middle, radius, angle; colours (N, 3, 3) of first, second and ground."""
    about, rows = CONCEPTS[concept], len(places)
    colours = torch.zeros(rows, 3, 3) if colours is None else colours
    middle = shapes.SIZE / 2
    return Scenes(
        torch.full((rows,), shapes.SHAPES.index(about.word)), torch.full((rows,), about.pattern),
        colours[:, 0], colours[:, 1], colours[:, 2],
        places[:, 0] + middle, places[:, 1] + middle, places[:, 2], places[:, 3],
    )  # fmt: skip


def _places(scenes: Scenes) -> Tensor:
    middle = shapes.SIZE / 2
    return torch.stack([scenes.x - middle, scenes.y - middle, scenes.radius, scenes.angle], 1)


def _basis(scenes: Scenes, shaded: bool) -> Tensor:
    """Shares (N, pixels, 3) of the first colour, the second and the background; ``shaded``: two more (N, pixels, 5), of
    shades across and down the object, so that another pattern does not move the outline."""
    whole, other = (part.flatten(1) for part in shapes.coverage(scenes))
    shares = [whole - other, other, 1 - whole]
    if shaded:
        pixel = torch.arange(shapes.SIZE) + 0.5
        across, down = (pixel[None] - centre[:, None] for centre in (scenes.x, scenes.y))
        square = whole.reshape(-1, shapes.SIZE, shapes.SIZE) / scenes.radius[:, None, None]
        shares += [(square * across[:, None, :]).flatten(1), (square * down[:, :, None]).flatten(1)]
    return torch.stack(shares, 2)


@functools.lru_cache(maxsize=4)
def _library(concept: str) -> tuple[Tensor, Tensor]:
    """Places (M, 4) all over the reach, and an orthonormal basis (M, pixels, K) of what can be painted there."""
    places = torch.cartesian_prod(*(torch.linspace(*REACH[name], COARSE[name]) for name in REACH))
    bases = [_basis(_scenes(concept, part), shaded=True) for part in places.split(AT_ONCE)]
    return places, torch.linalg.qr(torch.cat(bases)).Q


def _coarse(images: Tensor, concept: str) -> Scenes:
    """The best of the library in any colours."""
    places, bases = _library(concept)
    pixels = images.flatten(2).transpose(1, 2)  # (N, pixels, 3)
    flat = bases.transpose(1, 2).flatten(0, 1)  # (M K, pixels)
    seen = (flat @ pixels.transpose(0, 1).flatten(1)).square()  # (M K, N 3)
    explained = seen.reshape(len(places), -1, len(images), 3).sum((1, 3))
    return _scenes(concept, places[explained.argmax(0)])


def _fitted(images: Tensor, concept: str, start: Scenes, centre: Tensor | None) -> Scenes:
    """The nearest scene by damped Gauss-Newton steps over place and, in between, colours.

    Args:
        centre: named colours (N, 3, 3) in [0, 1], from which only tints are allowed; None: any, shaded.
    """
    shaded = centre is None
    pixels = images.flatten(2).transpose(1, 2)
    low, high = (torch.tensor([REACH[name][side] for name in REACH]) for side in (0, 1))
    places, step = _places(start), torch.tensor(STEP)
    basis = _basis(start, shaded)
    colours = _best_colours(basis, pixels, centre)
    error = (pixels - basis @ colours).square().sum((1, 2))
    damping = torch.full((len(images),), 1e-3)
    for _ in range(ROUNDS):
        moved = []
        for axis in range(len(REACH)):
            for sign in (1.0, -1.0):
                there = places.clone()
                there[:, axis] += sign * step[axis]
                moved.append(_basis(_scenes(concept, there), shaded))
        slopes = torch.stack([((moved[2 * axis] - moved[2 * axis + 1]) @ colours).flatten(1)
                              for axis in range(len(REACH))], 2)  # (N, 3 pixels, 4), in steps of two
        rest = (pixels - basis @ colours).flatten(1)
        normal = slopes.transpose(1, 2) @ slopes
        normal = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-9)
        change = torch.linalg.solve(normal, (slopes.transpose(1, 2) @ rest[:, :, None]))[:, :, 0]
        tried = (places + 2 * step * change.clamp(-3, 3)).clamp(low, high)
        new_basis = _basis(_scenes(concept, tried), shaded)
        new_colours = _best_colours(new_basis, pixels, centre)
        new_error = (pixels - new_basis @ new_colours).square().sum((1, 2))
        better = new_error < error
        places = torch.where(better[:, None], tried, places)
        basis = torch.where(better[:, None, None], new_basis, basis)
        colours = torch.where(better[:, None, None], new_colours, colours)
        error = torch.where(better, new_error, error)
        damping = torch.where(better, damping / 4, damping * 10)
    return _scenes(concept, places, colours[:, :3])


def _best_colours(basis: Tensor, pixels: Tensor, centre: Tensor | None) -> Tensor:
    """Colours (N, K, 3) of the basis by least squares, those of first, second and ground within ``centre``'s tints."""
    found = _least_squares(basis, pixels)
    return found if centre is None else _nearest_tint(found, centre)


def _least_squares(basis: Tensor, pixels: Tensor, weight: Tensor | None = None) -> Tensor:
    """(N, K, 3) that paints pixels (N, P, 3) best with shares (N, P, K), pixels weighted by ``weight`` (N, P)."""
    weighted = basis if weight is None else basis * weight[:, :, None]
    normal = weighted.transpose(1, 2) @ basis
    ridge = 1e-6 * torch.eye(basis.shape[2])
    return torch.linalg.solve(normal + ridge, weighted.transpose(1, 2) @ pixels)


# --- the measures


def _nearest_tint(colours: Tensor, named: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(colours, named + TINT), named - TINT).clamp(0, 1)


def _ground_colour(images: Tensor, whole: Tensor) -> Tensor:
    """The median colour (N, 3) of the pixels that the object does not touch."""
    hidden = (whole > 0)[:, None].expand(-1, 3, -1)
    return images.flatten(2).masked_fill(hidden, math.nan).nanmedian(dim=2).values


def _asked(ground: Tensor, backgrounds: Sequence[str | None]) -> Tensor:
    """Named colours (N, 3) in 255ths: that asked for, or the nearest to what is there."""
    known = shapes.palette(shapes.BACKGROUNDS)
    nearest = (_lab(ground)[:, None] - _lab(known / 255)).norm(dim=2).argmin(1)
    names = list(shapes.BACKGROUNDS)
    return known[torch.tensor([names.index(name) if name is not None else int(nearest[i])
                               for i, name in enumerate(backgrounds)])]


def _interior(whole: Tensor) -> Tensor:
    return (whole > 0.999).float()


def _object_colours(images: Tensor, whole: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blur (N,), first and second colour (N, 2, 3) before it, and the second's share (N, pixels) with it, which
    paint the object's inside best."""
    pixels, inside = images.flatten(2).transpose(1, 2), _interior(whole)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    lowest = torch.full((len(images),), math.inf)
    for blur in BLURS:
        share = _blurred(other, blur) / _blurred(whole, blur).clamp(min=1e-3)
        basis = torch.stack([1 - share, share], 2)
        colours = _least_squares(basis, pixels, inside)
        error = ((pixels - basis @ colours).square().sum(2) * inside).sum(1)
        found = torch.full_like(error, blur), colours, share
        if best is None:
            best = found
        else:
            # A blur must explain more than rounding does.
            better = error < 0.99 * lowest - 1e-5 * inside.sum(1)
            best = (torch.where(better, found[0], best[0]), torch.where(better[:, None, None], found[1], best[1]),
                    torch.where(better[:, None], found[2], best[2]))
            error = torch.where(better, error, lowest)
        lowest = error
    assert best is not None
    return best


def _blurred(maps: Tensor, blur: float) -> Tensor:
    """Maps (N, pixels) under a Gaussian of this standard deviation in pixels, nothing beyond the picture's edge."""
    if blur == 0:
        return maps
    reach = torch.arange(-6, 7) / blur
    line = torch.exp(-0.5 * reach.square())
    line = line / line.sum()
    square = maps.reshape(-1, 1, shapes.SIZE, shapes.SIZE)
    square = F.conv2d(square, line.reshape(1, 1, 1, -1), padding=(0, 6))
    return F.conv2d(square, line.reshape(1, 1, -1, 1), padding=(6, 0)).flatten(1)


def _without_contrast(colours: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The contrast (N,), and the colours (N, 2, 3) with the wanted one in its place.

    The half difference of the two is a part along the wanted half difference, which is the contrast, and a part across,
    which belongs to the colours.
    """
    middle, half = colours.mean(1), (colours[:, 1] - colours[:, 0]) / 2
    wanted_half = (wanted[:, 1] - wanted[:, 0]) / 2
    contrast = (half * wanted_half).sum(1) / wanted_half.square().sum(1)
    full = half + (1 - contrast)[:, None] * wanted_half
    return contrast, torch.stack([middle - full, middle + full], 1)


def _course(images: Tensor, whole: Tensor, share: Tensor, wanted: Tensor) -> Tensor:
    """Correlation (N,), over the object's inside, of the picture along the two colours' difference with ``share``."""
    inside = _interior(whole)
    along = F.normalize(wanted[:, 1] - wanted[:, 0], dim=1)
    seen = (images.flatten(2) * along[:, :, None]).sum(1)
    count = inside.sum(1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        return (values - (values * inside).sum(1, keepdim=True) / count) * inside

    seen, told = centred(seen), centred(share)
    return (seen * told).sum(1) / (seen.norm(dim=1) * told.norm(dim=1)).clamp(min=1e-6)


def _outside(
    images: Tensor, whole: Tensor, share: Tensor, colours: Tensor, wanted: Tensor, ground: Tensor
) -> tuple[Tensor, Tensor]:
    """Outline and ghosts, each (N,)."""
    inner = (1 - share)[:, None] * colours[:, 0, :, None] + share[:, None] * colours[:, 1, :, None]
    drawn = (whole[:, None] * inner + (1 - whole)[:, None] * ground[:, :, None]).clamp(0, 1)
    known = torch.cat([colours, wanted], 1)
    found = _is_object(images.flatten(2), inner, whole, known, ground)
    expected = _is_object(drawn, inner, whole, known, ground)
    outline = torch.minimum(found, expected).sum(1) / torch.maximum(found, expected).sum(1).clamp(min=1e-6)
    square = whole.reshape(-1, 1, shapes.SIZE, shapes.SIZE)
    away = (F.max_pool2d(square, 3, stride=1, padding=1).flatten(1) == 0) * (1 - found)
    ground_lab = _lab(ground)[:, :, None]
    excess = ((_pixel_lab(images.flatten(2)) - ground_lab).norm(dim=1) - FLOOR).clamp(min=0) * away
    own = ((_pixel_lab(drawn) - ground_lab).norm(dim=1) * whole).sum(1)
    return outline, excess.sum(1) / own.clamp(min=1.0)


def _is_object(pixels: Tensor, inner: Tensor, whole: Tensor, colours: Tensor, ground: Tensor) -> Tensor:
    """Whether pixels (N, 3, P) are nearer in Lab to a colour of the object than to the background, (N, P): 0 or 1, and
    in between within an eighth of halfway. Where the object is, its own colour ``inner`` there is one as well."""
    seen = _pixel_lab(pixels)
    to_inner = (seen - _pixel_lab(inner)).norm(dim=1)
    to_object = (seen[:, None] - _lab(colours)[:, :, :, None]).norm(dim=2).amin(1)
    to_object = torch.where(whole > 0, torch.minimum(to_object, to_inner), to_object)
    to_ground = (seen - _lab(ground)[:, :, None]).norm(dim=1)
    return (4 * to_ground / (to_object + to_ground).clamp(min=1e-6) - 1.5).clamp(0, 1)


# --- Lab


def _lab(colours: Tensor) -> Tensor:
    """Colours (..., 3) in sRGB [0, 1] in Lab."""
    return alignment.lab(colours.reshape(-1, 3, 1, 1)).reshape(colours.shape)


def _pixel_lab(pixels: Tensor) -> Tensor:
    return alignment.lab(pixels[:, :, :, None])[:, :, :, 0]


def _distance(images: Tensor, scenes: Scenes) -> Tensor:
    """Mean Delta E (N,) of images to the renderings."""
    return (alignment.lab(images) - alignment.lab(shapes.render(scenes))).norm(dim=1).mean((1, 2))


def _joined(kind: type[Rows], parts: Sequence[Rows]) -> Rows:
    return kind(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(kind)})


def _check(images: Tensor, concept: str, backgrounds: Sequence[str | None]) -> None:
    if images.ndim != 4 or images.shape[1:] != (3, shapes.SIZE, shapes.SIZE) or not len(images):
        raise UserError(f"the judge of shapes reads images of shape (N, 3, {shapes.SIZE}, {shapes.SIZE}), not "
                        f"{tuple(images.shape)}")
    if len(backgrounds) != len(images):
        raise UserError(f"{len(images)} images need as many backgrounds, not {len(backgrounds)}")
    check_concept(concept, [name for name in backgrounds if name is not None])
