"""Train a larger autoencoder of the shapes world whose latents of captioned scenes are those of the teacher's own.

The teacher's own spoils what no caption describes: of drawn concepts that go through it hardly one passes the strict
judge. This one is trained on as many objects in any two colours and any pattern as on captioned scenes, and is held to
the teacher's latents of the latter, so that UNet, text encoder and every student stay valid in its latent space: for
``teacher.vae``.

--minutes ends the command early; the same command then goes on where it stopped, from the state in --work.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from train_shapes_teacher import Training, strange_shapes

from flowdistill.cli.arguments import seed_number
from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept
from flowdistill.evaluation.shapes_judge import judge_concept
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path

LATENT_WEIGHT = 1.0  # of the mean square between the two autoencoders' latents, in units of the latents' variance
KL_WEIGHT = 5e-5
NAMED_GROUNDS = 0.5  # share of the others that are on the backgrounds of captions
TEST_IMAGES = 96  # of each concept
EDGE_WEIGHT = 0.5  # of the absolute error of differences between neighbours, which a blurred border has


def build_autoencoder(like: AutoencoderKL) -> AutoencoderKL:
    """One of random weights, for latents (4, 8, 8) on the scale of ``like``'s."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 48, 64), layers_per_block=1,
        norm_num_groups=8, sample_size=shapes.SIZE, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=like.config.scaling_factor,
    )


def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents (N, 4, 8, 8) of images (N, 3, SIZE, SIZE) in [-1, 1], not scaled."""
    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(250)])


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours down (..., H - 1, W) and across (..., H, W - 1) images (..., H, W)."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def train(args: argparse.Namespace, like: AutoencoderKL, deadline: float) -> AutoencoderKL | None:
    """The averaged autoencoder; None where the deadline (seconds, monotonic clock) came first."""
    captioned = shapes.make_shapes(args.images, args.seed)[0].mul_(2).sub_(1)
    others = [strange_shapes(args.images, args.seed + 1 + i, share).mul_(2).sub_(1)
              for i, share in enumerate((0.0, NAMED_GROUNDS))]
    wanted = latents_of(like, captioned)
    scale = wanted.std()
    torch.manual_seed(args.seed)
    training = Training("autoencoder", nn.ModuleDict({"vae": build_autoencoder(like)}), args.lr, args.steps, args)
    vae = training.modules["vae"]
    half = args.batch_size // 2

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(captioned), (half,), generator=generator)
        strange = others[training.step >= args.named_grounds_from]
        batch = torch.cat([captioned[rows], strange[torch.randint(len(strange), (half,), generator=generator)]])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            posterior = vae.encode(batch).latent_dist
            images = vae.decode(posterior.sample()).sample.float()
        error = images - batch
        edges = sum(part.abs().mean() for part in slopes(error)) / 2
        moved = F.mse_loss(posterior.mean[:half].float(), wanted[rows]) / scale.square()
        kl = posterior.kl().float().mean() / wanted[0].numel()
        return error.abs().mean() + EDGE_WEIGHT * edges + LATENT_WEIGHT * moved + KL_WEIGHT * kl

    return training.averaged()["vae"] if training.run(loss_of, deadline) else None


def tested(vae: AutoencoderKL, like: AutoencoderKL, seed: int) -> dict[str, object]:
    """How far latents of captioned scenes are from the teacher's, root mean square in standard deviations of those, and
    the share of drawn concepts that the strict judge accepts after a way through it."""
    scenes = 2.0 * shapes.draw_shapes(torch.arange(shapes.NUM_CLASSES), seed) - 1.0
    wanted = latents_of(like, scenes)
    accepted = {}
    for name in CONCEPTS:
        grounds = [list(shapes.BACKGROUNDS)[i % len(shapes.BACKGROUNDS)] for i in range(TEST_IMAGES)]
        drawn = 2.0 * draw_concept(name, grounds, seed) - 1.0
        with torch.no_grad():
            again = vae.decode(latents_of(vae, drawn)).sample
        found = judge_concept(again / 2.0 + 0.5, name, grounds).accepted
        accepted[name] = round(found.double().mean().item(), 4)
    moved = F.mse_loss(latents_of(vae, scenes), wanted).sqrt() / wanted.std()
    return {"latents_moved": round(moved.item(), 4), "renderings_accepted": accepted}


def save(args: argparse.Namespace, vae: AutoencoderKL, like: AutoencoderKL) -> None:
    vae.half().save_pretrained(args.out)  # stored in half precision, and tested as stored
    found = tested(AutoencoderKL.from_pretrained(args.out, torch_dtype=torch.float32), like, args.seed + 1000)
    state = torch.load(args.work / "autoencoder.pt", weights_only=True)
    record = {
        "data": "shapes",
        "parameters": sum(p.numel() for p in vae.parameters()),
        "test": found,
        "command": f"python scripts/train_shapes_autoencoder.py --like {args.like.as_posix()} --out "
                   f"{args.out.as_posix()} --images {args.images} --steps {args.steps} --named-grounds-from "
                   f"{args.named_grounds_from} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} "
                   f"--threads {args.threads} --{'' if args.bfloat16 else 'no-'}bfloat16",
        "planned_steps": state["plans"],
        "training_seconds": round(state["seconds"]),
        "torch": torch.__version__,
    }
    (args.out / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--like", type=local_path, default=Path("assets/shapes/teacher"), help="whose latents they are")
    parser.add_argument("--out", type=local_path, default=Path("assets/shapes/autoencoder"), help="folder to write")
    parser.add_argument("--work", type=local_path, default=Path("runs/shapes-autoencoder"), help="folder of its state")
    parser.add_argument("--images", type=int, default=20_000, help="of captioned scenes, and as many of the others")
    parser.add_argument("--steps", type=int, default=9500)
    parser.add_argument("--named-grounds-from", type=int, default=5500,
                        help="step from which half of the others are on the backgrounds that captions name")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on")
    args = parser.parse_args()
    try:
        for file in (args.work / "autoencoder.pt", args.out / "config.json"):
            check_writable(file)
    except UserError as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60.0 * args.minutes
    torch.set_num_threads(args.threads)
    like = AutoencoderKL.from_pretrained(args.like, subfolder="vae", torch_dtype=torch.float32)
    like.eval().requires_grad_(False)
    vae = train(args, like, deadline)
    if vae is None:
        print("stopped; the same command goes on")
        return
    save(args, vae, like)


if __name__ == "__main__":
    main()
