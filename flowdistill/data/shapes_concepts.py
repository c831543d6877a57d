"""Objects that no caption of the shapes world describes: a few images of each, and places to ask for it in.

Their colours and their patterns are not in the captioned world, so that only a new word can call for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from flowdistill.data import shapes
from flowdistill.data.shapes import Scenes
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import local_path

REFERENCES = 5
DESCRIPTION = "concept.json"
CAPTIONS = "metadata.jsonl"
TOKEN = "<new1>"  # the new word of the captions
# What has these backgrounds is shown; the others are only asked for.
SHOWN = ("white", "gray", "brown")
HELD_OUT = ("pink", "cyan", "black")
CONTEXTS = ("a {} on a {} background", "a picture of a {} in front of a {} background")


@dataclass(frozen=True)
class Concept:
    """An object: which word is nearest to it, its pattern (``shapes.WHOLE`` ...), its two colours in 255ths."""

    word: str
    pattern: int
    first: tuple[int, int, int]
    second: tuple[int, int, int]


CONCEPTS = {
    "striped-star": Concept("star", shapes.STRIPES, (225, 30, 160), (0, 125, 130)),
    "ring-circle": Concept("circle", shapes.RING, (165, 225, 50), (25, 35, 105)),
    "halved-heart": Concept("heart", shapes.HALVES, (0, 140, 140), (250, 150, 125)),
}


def check_concept(name: str, backgrounds: Sequence[str]) -> None:
    """
    Raises:
        UserError: unknown concept or background.
    """
    if name not in CONCEPTS:
        raise UserError(f"unknown concept {shown(name)}; the concepts are {', '.join(CONCEPTS)}")
    for background in backgrounds:
        if background not in shapes.BACKGROUNDS:
            raise UserError(f"unknown background {shown(background)}; there are {', '.join(shapes.BACKGROUNDS)}")


def place_concept(name: str, backgrounds: list[str], seed: int) -> Scenes:
    """N scenes of a concept, one a background, in the world's positions, sizes, turns and tints.

    Raises:
        UserError: unknown concept or background.
    """
    check_concept(name, backgrounds)
    concept, rows = CONCEPTS[name], len(backgrounds)
    ground = torch.tensor([shapes.BACKGROUNDS[background] for background in backgrounds], dtype=torch.float32)

    def column(value: int) -> Tensor:
        return torch.full((rows,), value)

    first, second = (torch.tensor(c, dtype=torch.float32).expand(rows, 3) for c in (concept.first, concept.second))
    shape = column(shapes.SHAPES.index(concept.word))
    return shapes.place(shape, column(concept.pattern), first, second, ground, seed)


def draw_concept(name: str, backgrounds: list[str], seed: int) -> Tensor:
    """Images (N, 3, SIZE, SIZE) in [0, 1] of :func:`place_concept`."""
    return shapes.render(place_concept(name, backgrounds, seed))


def references(name: str) -> tuple[Tensor, list[str]]:
    """The ``REFERENCES`` images that a method is shown of a concept, and their backgrounds."""
    backgrounds = [SHOWN[i % len(SHOWN)] for i in range(REFERENCES)]
    return draw_concept(name, backgrounds, seed=list(CONCEPTS).index(name) if name in CONCEPTS else 0), backgrounds


def held_out_prompts(subject: str) -> list[tuple[str, str]]:
    """(prompt, background) of places where no reference shows the concept; ``subject`` is like ``<new1> star``."""
    return [(context.format(subject, background), background) for context in CONTEXTS for background in HELD_OUT]


def write_concepts(folder: str | os.PathLike[str]) -> list[Path]:
    """Write each concept's references as PNG files into a folder of its own, with ``concept.json`` and captions."""
    written = []
    for name, concept in CONCEPTS.items():
        target = local_path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        images, backgrounds = references(name)
        for i, image in enumerate(images):
            save_image(image, target / f"{i}.png")
        description = {
            "word": concept.word,
            "backgrounds": backgrounds,
            "held_out_backgrounds": list(HELD_OUT),
            "held_out_prompts": [prompt for prompt, _ in held_out_prompts("{}")],
        }
        subject = f"{TOKEN} {concept.word}"
        captions = [
            {"file_name": f"{i}.png", "text": CONTEXTS[0].format(subject, background)}
            for i, background in enumerate(backgrounds)
        ]
        lines = "".join(json.dumps(caption) + "\n" for caption in captions)
        (target / CAPTIONS).write_text(lines, encoding="utf-8")
        (target / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        written.append(target)
    return written
