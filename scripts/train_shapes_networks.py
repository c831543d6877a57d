"""Train the networks that measure the shapes experiments: the classifier, and the judge of concepts.

Both are tested on images of other seeds than those they are trained on; the figures are recorded in their config.json.
With --teacher half of the images pass through the autoencoder of that pipeline, as every generated image does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowdistill import load_teacher
from flowdistill.cli.arguments import seed_number
from flowdistill.features import shapes_networks as networks
from flowdistill.utils.files import local_path

TEST_IMAGES = 4320


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("which", choices=("classifier", "judge"))
    parser.add_argument("--out", type=local_path, help="folder to write (default: assets/shapes/WHICH)")
    parser.add_argument("--teacher", type=local_path, help="pipeline whose autoencoder half of the images pass through")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=seed_number(2**32), help="default: 3 for the classifier, 5 for the judge")
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or Path("assets/shapes") / args.which
    is_judge = args.which == "judge"
    seed = args.seed if args.seed is not None else 5 if is_judge else 3
    torch.manual_seed(seed)
    model: networks.ShapesNet
    if is_judge:
        model, data = networks.ShapesNet(networks.JUDGE_HEADS, width=20, feature_size=48), networks.judge_data
    else:
        model, data = networks.ShapesClassifier(networks.CLASSIFIER_HEADS), networks.classifier_data
    images, answers = data(args.images, seed)
    codec = None if args.teacher is None else load_teacher(args.teacher).codec
    if codec is not None:
        images[::2] = codec.decode(codec.encode(images[::2]))
    networks.train_network(model, images, answers, args.steps, args.batch_size, seed)
    images, answers = data(TEST_IMAGES, seed + 1000)
    spoilt = networks.spoil(images, torch.Generator().manual_seed(seed + 1001))
    found = {"test_accuracy": networks.accuracies(model, images, answers),
             "test_accuracy_spoilt": networks.accuracies(model, spoilt, answers)}
    if codec is not None:
        found["test_accuracy_decoded"] = networks.accuracies(model, codec.decode(codec.encode(images)), answers)
    print(f"on {TEST_IMAGES} images of another seed: {found}")
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    through = "" if args.teacher is None else f"--teacher {args.teacher.as_posix()} "
    config = {
        "architecture": model.config,
        "data": "shapes",
        "test_images": TEST_IMAGES,
        **found,
        "seed": seed,
        "command": f"python scripts/train_shapes_networks.py {args.which} --out {out.as_posix()} {through}"
                   f"--images {args.images} --steps {args.steps} --batch-size {args.batch_size} --seed {seed} "
                   f"--threads {args.threads}",
        "torch": torch.__version__,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
