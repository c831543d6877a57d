"""Emoji: the 3,786 colour pictures of Noto Emoji (Google, Apache-2.0) with their names, as the npm package
``emoji-datasource-google`` carries them."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.text import read_json

CATEGORIES = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
              "Objects", "Symbols", "Flags", "Component")
SIZE = 32
FULL_SIZE = 64
FOLDER_VARIABLE = "FLOWDISTILL_EMOJI"
PACKAGE_FOLDER = Path("node_modules/emoji-datasource-google")
"""Where ``npm install emoji-datasource-google`` puts the package, in the current folder."""
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


class Emoji(NamedTuple):
    """One picture: its file in the package, what describes it, and the number of its category in ``CATEGORIES``."""

    file: str
    caption: str
    category: int


def load_emoji(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Pictures on white, float32 (3786, 3, S, S) in [0, 1], and their categories, int64 (3786,), of ``CATEGORIES``.

    Args:
        size: the side S in pixels, a divisor of 64; smaller ones are means over squares of pixels.

    Raises:
        UserError: the package is not there, or a file of it is missing or damaged.
    """
    folder = emoji_folder()
    pixels = _pixels(folder)
    if FULL_SIZE % size:
        raise UserError(f"emoji have {FULL_SIZE} pixels a side, which {size} does not divide")
    images = torch.nn.functional.avg_pool2d(pixels.float().div_(255.0), FULL_SIZE // size)
    return images, torch.tensor([emoji.category for emoji in emoji_list(folder)])


def load_emoji64() -> tuple[Tensor, Tensor]:
    """The pictures at their full size of 64x64, as :func:`load_emoji`."""
    return load_emoji(FULL_SIZE)


def emoji_captions() -> list[str]:
    """What describes each picture of :func:`load_emoji`: "waving hand, medium skin tone".

    Raises:
        UserError: see :func:`load_emoji`.
    """
    return [emoji.caption for emoji in emoji_list(emoji_folder())]


def emoji_folder() -> Path:
    """The package's folder: what FLOWDISTILL_EMOJI names, by default npm's in the current folder.

    Raises:
        UserError: it has no ``emoji.json``.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    folder = local_path(named) if named else PACKAGE_FOLDER
    if not (folder / "emoji.json").is_file():
        where = f"which {FOLDER_VARIABLE} names" if named else "where npm puts the package"
        raise UserError(
            f"the emoji are not on this machine: {folder}, {where}, has no emoji.json; get them with 'npm install "
            f"emoji-datasource-google', or set {FOLDER_VARIABLE} to the unpacked package"
        )
    return folder


@lru_cache(maxsize=2)
def emoji_list(folder: Path) -> tuple[Emoji, ...]:
    """The package's pictures in the order of the keyboard, each in all its skin tones.

    Raises:
        UserError: ``emoji.json`` is damaged, holds something else, or lists no picture.
    """
    file = folder / "emoji.json"
    listed = read_json(file)
    try:
        entries = sorted(listed, key=lambda entry: entry["sort_order"])
        found = tuple(emoji for entry in entries if entry["has_img_google"] for emoji in _variations(entry))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged or not that of emoji-datasource ({type(error).__name__}: {error}); install "
                        "the package again") from error
    if not found:
        raise UserError(f"{file} lists no picture; install the package again")
    return found


def _variations(entry: dict[str, Any]) -> list[Emoji]:
    """A picture and its skin tones. One of two people has two tones, said in their order."""
    name, category = entry_caption(entry), CATEGORIES.index(entry["category"])
    found = [Emoji(entry["image"], name, category)]
    for code, variation in entry.get("skin_variations", {}).items():
        if variation["has_img_google"]:
            tones = " and ".join(SKIN_TONES[part] for part in code.split("-"))
            found.append(Emoji(variation["image"], f"{name}, {tones} skin tone", category))
    return found


def entry_caption(entry: dict[str, Any]) -> str:
    """What a person would call it: its name, or the short name where Unicode's own is the number of an ideograph."""
    name = plain(entry["short_name"].replace("_", " ") if "IDEOGRAPH" in entry["name"] else entry["name"])
    if entry["category"] == "Flags" and name.endswith(" flag"):
        return f"flag of {name.removesuffix(' flag')}"
    return name


def plain(text: str) -> str:
    """A name in small ASCII letters: "piñata" becomes "pinata"."""
    letters = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return letters.encode("ascii", "ignore").decode().lower()


@lru_cache(maxsize=1)
def _pixels(folder: Path) -> Tensor:
    """The pictures on white, uint8 (N, 3, 64, 64)."""
    return torch.stack([read_picture(folder / "img" / "google" / "64" / emoji.file) for emoji in emoji_list(folder)])


def read_picture(file: Path) -> Tensor:
    """A picture with transparency, laid on white: uint8 (3, 64, 64).

    Raises:
        UserError: the file cannot be read, or has another size.
    """
    try:
        with Image.open(file) as picture:
            colours = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); install emoji-datasource-google again") from error
    if colours.size != (FULL_SIZE, FULL_SIZE):
        raise UserError(f"{file} has {colours.width}x{colours.height} pixels, not {FULL_SIZE}x{FULL_SIZE}")
    white = Image.new("RGBA", colours.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, colours).convert("RGB"))).permute(2, 0, 1)
