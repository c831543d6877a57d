"""Train the networks that look at shapes: the classifier, the judge of concepts, and the identity network.

All are tested on images of other seeds than those they are trained on; the figures are recorded in their config.json.
With --teacher half of the classifier's or the judge's images pass through the autoencoder of that pipeline, as every
generated image does. The identity network draws its images as it goes; killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowdistill import load_teacher
from flowdistill.cli.arguments import seed_number
from flowdistill.features import shapes_identity as identity
from flowdistill.features import shapes_networks as networks
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, check_writable, local_path
from flowdistill.utils.randomness import generator_of

TEST_IMAGES = 4320
KEEP_EVERY = 100  # steps of the identity network's training


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("which", choices=("classifier", "judge", "identity"))
    parser.add_argument("--out", type=local_path, help="folder to write (default: assets/shapes/WHICH)")
    parser.add_argument("--teacher", type=local_path, help="pipeline whose autoencoder half of the images pass through")
    parser.add_argument("--images", type=int, default=12_000, help="of the classifier and the judge")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128, help="images; the identity network has two of an object")
    parser.add_argument("--seed", type=seed_number(2**32), help="default: 3 for the classifier, 5 for the judge, 9 for "
                                                                "the identity network")
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    out = args.out or Path("assets/shapes") / args.which
    try:
        check_writable(out / "model.safetensors")
    except UserError as error:
        parser.error(str(error))
    if args.which == "identity":
        if args.teacher is not None:
            parser.error("--teacher is of the classifier and the judge")
        if args.batch_size < 4 * identity.SIDES:
            parser.error(f"--batch-size is {args.batch_size}; the identity network needs at least {4 * identity.SIDES}")
        try:
            train_identity(out, args.steps, args.batch_size, 9 if args.seed is None else args.seed, args.threads)
        except UserError as error:
            parser.error(str(error))
        return
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


def train_identity(out: Path, steps: int, batch_size: int, seed: int, threads: int) -> None:
    """AdamW with a one-cycle rate; a step's objects depend on seed and step alone, so that a resume changes nothing."""
    torch.manual_seed(seed)
    model = identity.ShapesIdentity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    library, first = identity.PoseLibrary(seed), 0
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
    kept = out / "training.pt"
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        if state["settings"] != settings:
            raise UserError(f"{kept} is of a training with {state['settings']}; remove it, or train with these")
        first = state["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        print(f"goes on at step {first}")
    out.mkdir(parents=True, exist_ok=True)
    for step in range(first, steps):
        generator = generator_of(seed, step)
        objects = identity.draw_families(batch_size // 2 // identity.SIDES, generator)
        views = [identity.draw_views(library, objects, generator) for _ in range(2)]
        loss = identity.contrastive_loss(*(model(view) for view in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % KEEP_EVERY == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
            state = {"settings": settings, "step": step + 1, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            with atomic_write(kept) as file:
                torch.save(state, file)
    model.eval()
    save_file(model.state_dict(), out / "model.safetensors")
    config = {
        "architecture": model.config,
        "data": "shapes",
        "test": {name: round(value, 4) for name, value in identity.separation(model, seed + 1000).items()},
        "seed": seed,
        "command": f"python scripts/train_shapes_networks.py identity --out {out.as_posix()} --steps {steps} "
                   f"--batch-size {batch_size} --seed {seed} --threads {threads}",
        "torch": torch.__version__,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept.unlink(missing_ok=True)
    print(f"wrote {out}: {config['test']}")


if __name__ == "__main__":
    main()
