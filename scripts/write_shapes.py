"""Write the files of the shapes world that are drawn, not trained: prompts.txt, the concepts' folders, a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from flowdistill.data.shapes import NUM_CLASSES, make_shapes, prompt_list
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, references, write_concepts
from flowdistill.utils.files import local_path
from flowdistill.utils.images import save_grid


def picture() -> Tensor:
    """Two rows of scenes and one of the concepts, (54, 3, SIZE, SIZE)."""
    concepts = [concept for name in CONCEPTS for concept in (references(name)[0], draw_concept(name, ["pink"], 0))]
    return torch.cat([make_shapes(NUM_CLASSES, 0)[0][:36], *concepts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=local_path, default=Path("assets/shapes"), help="folder to write to")
    parser.add_argument("--picture", type=local_path, default=Path("docs/images/shapes.png"), help="PNG file to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = prompt_list()
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    save_grid(picture(), args.picture, columns=18)
    print(f"wrote {len(prompts)} prompts and {', '.join(map(str, write_concepts(args.out / 'concepts')))}")


if __name__ == "__main__":
    main()
