"""The npm package of emoji with a few pictures of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from flowdistill.data.emoji import FOLDER_VARIABLE, FULL_SIZE

__all__ = ["FOLDER_VARIABLE", "write_emoji"]


def entry(name: str, image: str, order: int, category: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "short_name": image, "image": f"{image}.png", "sort_order": order, "category": category,
            "has_img_google": True, **more}


def write_emoji(folder: Path) -> Path:
    """A folder with ``emoji.json`` and six pictures: the right half of each is transparent, the left of one colour."""
    tones = {code: {"image": f"wave-{code}.png", "has_img_google": code != "1F3FC-1F3FF"}
             for code in ("1F3FB", "1F3FC-1F3FE", "1F3FC-1F3FF")}
    entries = [
        entry("PI\u00d1ATA", "pinata", 5, "Activities"),
        entry("WAVING HAND", "wave", 2, "People & Body", skin_variations=tones),
        entry("\u00c5land Islands Flag", "flag-ax", 9, "Flags"),
        entry("CJK UNIFIED IDEOGRAPH-5272", "ideograph_discount", 7, "Symbols"),
        entry("NOT DRAWN", "none", 1, "Objects") | {"has_img_google": False},
    ]
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    (folder / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    for i, name in enumerate(("wave", "wave-1F3FB", "wave-1F3FC-1F3FE", "pinata", "ideograph_discount", "flag-ax")):
        picture = Image.new("RGBA", (FULL_SIZE, FULL_SIZE), (200, 0, 0, 0))
        picture.paste((40 * i, 255, 0, 255), (0, 0, FULL_SIZE // 2, FULL_SIZE))
        picture.save(pictures / f"{name}.png")
    return folder
