#!/usr/bin/env python
"""Train the classifier whose features measure pictures of clothes: on the training set only (minutes on one core).

The accuracy on the 10,000 pictures that are held out, which it never sees, is recorded in its config.json. It may be
killed at any time: the same command goes on from --state, and comes to the same bits as a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowdistill.cli.arguments import seed_number
from flowdistill.data import load_images
from flowdistill.features.digits_classifier import ClassifierTraining, classifier_accuracy
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder, atomic_write, check_writable, local_path
from flowdistill.utils.logging import say
from flowdistill.utils.text import check_made_place

STRENGTH = 0.3  # of the augmentation: up to a pixel of 28, 3 degrees and 3 %
WIDTH = 16
LOG_EVERY = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out, state = Path("assets/fashion-classifier"), Path("runs/fashion-classifier.pt")
    parser.add_argument("--out", type=local_path, default=out, help="folder to write")
    parser.add_argument("--state", type=local_path, default=state, metavar="FILE", help="state to go on from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="write the state so often")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        for name in ("steps", "batch_size", "threads", "save_every"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
        check_writable(args.state)
        check_made_place(args.out / "config.json", Path(__file__).name)
        train(args)
    except UserError as error:
        print(f"train_fashion_classifier: error: {error}", file=sys.stderr)
        return 2
    return 0


def train(args: argparse.Namespace) -> None:
    images, labels = load_images("fashion")
    asked = {name: getattr(args, name) for name in ("steps", "batch_size", "seed", "threads")}
    training = ClassifierTraining(images, labels, args.steps, args.batch_size, args.seed, WIDTH, STRENGTH)
    before = 0.0
    if args.state.is_file():
        try:
            state = torch.load(args.state, weights_only=True)
            was = state["asked"]
        except Exception as error:  # torch raises many unrelated types
            reason = " ".join(str(error).split())
            raise UserError(f"{args.state} is damaged or no state of this script: {reason}") from error
        if was != asked:
            raise UserError(f"{args.state} is the state of another run, with {was}; name another file")
        training.load(state["training"])
        before = state["seconds"]
        say(f"goes on from step {training.step}")
    started, running = time.process_time(), []
    while training.step < args.steps:
        running.append(training.train_step())
        if training.step % LOG_EVERY == 0:
            say(f"step {training.step} of {args.steps}, loss {sum(running) / len(running):.4f}")
            running = []
        if training.step % args.save_every == 0 or training.step == args.steps:
            seconds = before + time.process_time() - started
            with atomic_write(args.state) as file:
                torch.save({"training": training.state(), "asked": asked, "seconds": seconds}, file)
    seconds = before + time.process_time() - started
    model = training.model.eval()
    held_out, held_out_labels = load_images("fashion-test")
    accuracy = classifier_accuracy(model, held_out, held_out_labels)
    fitted = classifier_accuracy(model, images, labels)
    command = (
        f"python scripts/train_fashion_classifier.py --out {args.out.as_posix()} --steps {args.steps} "
        f"--batch-size {args.batch_size} --seed {args.seed} --threads {args.threads}"
    )
    config = {
        "architecture": model.config,
        "data": "fashion",
        "trained_on": len(labels),
        "training_accuracy": fitted,
        "held_out_accuracy": accuracy,
        "held_out_images": len(held_out_labels),
        "seed": args.seed,
        "command": command,
        "training_cpu_seconds": round(seconds),
        "torch": torch.__version__,
    }
    with atomic_folder(args.out) as folder:
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    say(f"wrote {args.out}: accuracy {accuracy:.4f} on {len(held_out_labels)} held-out pictures, {fitted:.4f} on those "
        "it was trained on")


if __name__ == "__main__":
    sys.exit(main())
