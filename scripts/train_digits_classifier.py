"""Train the digit classifier whose features measure the digit experiments (well under a minute on one core).

First a model on a random class-balanced 80 % gives the held-out accuracy, then the shipped one is trained on everything
the same way; the held-out figure is recorded in its config.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowdistill.cli.arguments import seed_number
from flowdistill.data import balanced_split, load_digits
from flowdistill.features.digits_classifier import classifier_accuracy, train_digits_classifier
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=local_path, default=Path("assets/digits-classifier"), help="folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    args = parser.parse_args()
    try:
        check_writable(args.out / "config.json")
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)

    images, labels = load_digits()
    held_out, rest = balanced_split(labels, 0.2, args.seed)
    model = train_digits_classifier(images[rest], labels[rest], args.steps, args.batch_size, args.seed)
    accuracy = classifier_accuracy(model, images[held_out], labels[held_out])
    print(f"held-out accuracy {accuracy:.4f} on {len(held_out)} of {len(labels)} images (class-balanced)")

    model = train_digits_classifier(images, labels, args.steps, args.batch_size, args.seed)
    fitted = classifier_accuracy(model, images, labels)
    print(f"shipped model, trained on all {len(labels)}: accuracy on them {fitted:.4f}")

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / "model.safetensors")
    command = (
        f"python scripts/train_digits_classifier.py --out {args.out.as_posix()} --steps {args.steps} "
        f"--batch-size {args.batch_size} --seed {args.seed} --threads {args.threads}"
    )
    config = {
        "architecture": model.config,
        "data": "digits",
        "trained_on": len(labels),
        "training_accuracy": fitted,
        "held_out_accuracy": accuracy,
        "held_out_images": len(held_out),
        "seed": args.seed,
        "command": command,
        "torch": torch.__version__,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
