"""Write the files of the shapes world that are drawn, not trained: prompts.txt, the concepts' folders, a picture; or,
with --images, its images with their captions, as a folder that a method's data can name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from flowdistill.data.pictures import check_without_pictures
from flowdistill.data.shapes import CAPTIONS, NUM_CLASSES, REFERENCE, caption, load_shapes, make_shapes, prompt_list
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, references, write_concepts
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.images import save_grid, save_images


def picture() -> Tensor:
    """Two rows of scenes and one of the concepts, (54, 3, SIZE, SIZE)."""
    concepts = [concept for name in CONCEPTS for concept in (references(name)[0], draw_concept(name, ["pink"], 0))]
    return torch.cat([make_shapes(NUM_CLASSES, 0)[0][:36], *concepts])


def write_images(folder: Path, count: int) -> None:
    """The first images of the named set ``shapes`` as PNG, their captions in all phrasings and labels beside them."""
    images, labels = load_shapes()
    files = save_images(images[:count], folder)
    rows = [{"file_name": file.name, "text": [caption(label, phrasing) for phrasing in range(len(CAPTIONS))],
             "label": label} for file, label in zip(files, labels[:count].tolist(), strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=local_path, default=Path("assets/shapes"), help="folder to write to")
    parser.add_argument("--picture", type=local_path, default=Path("docs/images/shapes.png"), help="PNG file to write")
    parser.add_argument("--images", type=local_path, help="folder for images with captions; nothing else is written")
    parser.add_argument("--count", type=int, default=REFERENCE, help=f"how many of the {REFERENCE} images")
    args = parser.parse_args()
    try:
        for file in [args.out / "prompts.txt", args.picture] if args.images is None else [args.images / "0.png"]:
            check_writable(file)
        if args.images is not None:
            check_without_pictures(args.images, "--images")
    except UserError as error:
        parser.error(str(error))
    if args.images is not None:
        write_images(args.images, args.count)
        print(f"wrote {args.count} images and metadata.jsonl to {args.images}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = prompt_list()
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    save_grid(picture(), args.picture, columns=18)
    print(f"wrote {len(prompts)} prompts and {', '.join(map(str, write_concepts(args.out / 'concepts')))}")


if __name__ == "__main__":
    main()
