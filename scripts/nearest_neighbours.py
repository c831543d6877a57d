#!/usr/bin/env python
"""Say whether images are copies of a training set, and draw those that are nearest to it with their neighbours.

    flowdistill sample runs/fashion-dmd2 --num-images 2000 --out images
    python scripts/nearest_neighbours.py images --training fashion --held-out fashion-test --features fashion

A folder of images, or a named set, is held against the training set and against images that were not trained on, in a
feature space. "nearer" is 0.5 for images like those held out, and 1 for copies; "very near" is 1 % for the former. The
FID of the images to either set stands beside them: a model that remembers is nearer to the one it was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, check_writable, local_path
from flowdistill.utils.text import check_json_place


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or a named set")
    parser.add_argument("--training", required=True, help="what the model was trained on: a named set or a folder")
    parser.add_argument("--held-out", required=True, help="images of the same kind that it was not trained on")
    parser.add_argument("--features", required=True, help="as for flowdistill evaluate")
    parser.add_argument("--picture", type=local_path, metavar="FILE.png", help="draw the closest images, and below "
                        "each the training image that is nearest")
    parser.add_argument("--closest", type=int, default=20, metavar="N", help="how many the picture has (default: 20)")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the figures")
    options = parser.parse_args(arguments)
    try:
        if options.closest < 1:
            raise UserError(f"--closest is {options.closest}; it must be at least 1")
        if options.picture is not None:
            if options.picture.suffix.lower() != ".png":
                raise UserError(f"--picture {options.picture} must be a .png file")
            check_writable(options.picture)
        if options.json is not None:
            check_json_place(options.json, ("nearer", "very_near"), "a file of this script")
        look(options)
    except UserError as error:
        print(f"nearest_neighbours: error: {error}", file=sys.stderr)
        return 2
    return 0


def look(options: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    import torch
    from torchvision.utils import save_image

    from flowdistill.evaluation.copying import CLOSEST, copying
    from flowdistill.evaluation.moments import frechet_distance
    from flowdistill.evaluation.reference import Reference, load_reference, open_images
    from flowdistill.features import load_features

    extractor = load_features(options.features)
    sets = {name: load_reference(name, extractor) for name in (options.images, options.training, options.held_out)}
    for name, found in sets.items():
        if found.features is None or len(found.features) != found.count:
            raise UserError(f"{name} has more images than features of each are kept; give fewer, or another set")
    found = copying(*(sets[name].features for name in (options.images, options.training, options.held_out)))

    def distance(first: Reference, second: Reference) -> float:
        return frechet_distance(*(part.numpy() for one in (first, second) for part in (one.mean, one.covariance)))

    ours, seen, unseen = (sets[name] for name in (options.images, options.training, options.held_out))
    figures = {
        "images": options.images, "training": options.training, "held_out": options.held_out,
        "features": extractor.name, "num_images": len(found.distances), "num_held_out": sets[options.held_out].count,
        "nearer": found.nearer, "very_near": found.very_near, "median_distance": found.distances.median().item(),
        "fid_training": distance(ours, seen), "fid_held_out": distance(ours, unseen),
        "fid_of_both": distance(seen, unseen),
    }
    print(f"{figures['num_images']:,} images against {sets[options.training].count:,} of {options.training} and "
          f"{figures['num_held_out']:,} of {options.held_out}, features {extractor.name}\n"
          f"nearer to the training set than a held-out image is: {found.nearer:.3f} (0.5: no copying, 1: copies)\n"
          f"nearer than the closest {CLOSEST:.0%} of the held-out images: {found.very_near:.2%}\n"
          f"FID of the images: {figures['fid_training']:.3f} to the training set, {figures['fid_held_out']:.3f} to "
          f"those held out; of these two to each other: {figures['fid_of_both']:.3f}")
    if options.json:
        with atomic_write(options.json) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())
    if options.picture:
        stored = {name: open_images(name) for name in (options.images, options.training)}
        rows = found.distances.argsort()[: options.closest].tolist()

        def picture(name: str, row: int) -> torch.Tensor:
            ((_, (image,)),) = stored[name].batches(range(row, row + 1), 1, extractor.channels)
            return image / 255.0

        above = [picture(options.images, row) for row in rows]
        below = [picture(options.training, int(found.neighbours[row])) for row in rows]
        try:
            drawn = torch.stack([*above, *below])
        except RuntimeError as error:
            raise UserError(f"the picture needs images of one size, and those of {options.images} and "
                            f"{options.training} are not") from error
        with atomic_write(options.picture) as file:
            save_image(drawn, file, nrow=len(rows), padding=2, pad_value=0.5, format="png")


if __name__ == "__main__":
    sys.exit(main())
