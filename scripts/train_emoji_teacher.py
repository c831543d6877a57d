#!/usr/bin/env python
"""Train a text-to-image teacher of emoji from nothing and save it as a StableDiffusionPipeline folder.

First the autoencoder, then UNet and text encoder together on its latents, each picture with its own name as caption
(v-prediction, Stable Diffusion's schedule). One caption in ten is empty, for classifier-free guidance.

    python scripts/train_emoji_teacher.py
    python scripts/train_emoji_teacher.py --size 64 --device cuda --compile --batch-size 256 --vae-batch-size 128 \\
        --within 10 --work runs/emoji64-teacher --out runs/emoji64-teacher/pipeline

The first has pictures of 32x32 and takes about an hour of one core for each of the two; the second has them at full
size, with wider networks, and is for a GPU.

--within ends training after so many minutes, three tenths of them the autoencoder's, the rate falling by the time; how
many steps that are depends on the machine. --minutes ends the command early; the same command then goes on where it
stopped, from the state in --work. It may name another number of steps or rate; flowdistill.json records from which step
on which were planned. captions.txt in --out has the captions, one a line, to distil with.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken
from torch import Tensor, nn
from train_shapes_teacher import (
    BOS,
    CAPTION_DROPOUT,
    EOS,
    KL_WEIGHT,
    Training,
    build_scheduler,
    build_text_encoder,
    encode,
)
from transformers import CLIPTokenizer

from flowdistill.cli.arguments import seed_number
from flowdistill.data.emoji import FULL_SIZE, SIZE, load_emoji
from flowdistill.data.named_sets import load_captions
from flowdistill.utils.devices import sent, usable_device
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder, local_path
from flowdistill.utils.images import save_grid
from flowdistill.utils.logging import say
from flowdistill.utils.text import check_made_place

Passes = TypeVar("Passes", bound=Callable)
MAX_TOKENS = 24
LATENT_CHANNELS = 8
VAE_SHARE = 0.3  # of the time of --within
UNLIMITED = 10**9  # steps of a training that time ends
GRID_STEPS = 25
GRID_GUIDANCE = 3.0
GRID_SIZE = 64
GRID_CAPTIONS = (
    "grinning face", "face with tears of joy", "red apple", "cat face", "cactus", "rainbow", "guitar", "fire engine",
    "flag of japan", "heart with arrow", "soccer ball", "slice of pizza", "clock face three oclock",
    "waving hand sign, dark skin tone", "police officer, medium skin tone", "dog face",
)


class Widths(NamedTuple):
    """Channels of the autoencoder, whose latents have a quarter of the picture's side, of the UNet, and of a token."""

    vae: tuple[int, ...]
    unet: tuple[int, ...]
    text: int


WIDTHS = {SIZE: Widths((32, 48, 64), (96, 128), 96), FULL_SIZE: Widths((64, 96, 128), (192, 320), 192)}


def build_autoencoder(size: int) -> AutoencoderKL:
    """Pictures (B, 3, S, S) to latents (B, 8, S / 4, S / 4)."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=WIDTHS[size].vae,
        layers_per_block=1, norm_num_groups=8, sample_size=size, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def build_unet(size: int) -> UNet2DConditionModel:
    """With attention to the caption at half the side of the latents: 4.7 M parameters, 26 M for the full size."""
    return UNet2DConditionModel(
        sample_size=size // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS[size].unet, layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=WIDTHS[size].text,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token; others are spelt.

    The words are added tokens and no merges of letters: among two thousand words some have merges that exclude each
    other, whatever their order.
    """
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), BOS, EOS]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=MAX_TOKENS
    )
    words = {word for caption in captions for word in re.findall("[a-z]{2,}", caption)}
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in sorted(words)])
    return tokenizer


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def pictures_of(args: argparse.Namespace) -> Tensor:
    """All pictures (N, 3, S, S) in [-1, 1], on the device."""
    return load_emoji(args.size)[0].mul_(2).sub_(1).to(args.device)


def compiled(args: argparse.Namespace, function: Passes) -> Passes:
    """The function, compiled if that is asked for."""
    return torch.compile(function) if args.compile else function


def train_autoencoder(args: argparse.Namespace, deadline: float) -> AutoencoderKL | None:
    images = pictures_of(args)
    torch.manual_seed(args.seed)
    modules = nn.ModuleDict({"vae": build_autoencoder(args.size)}).to(args.device)
    training = Training("vae", modules, 2e-3, args.vae_steps, args, 60 * VAE_SHARE * args.within)
    vae = modules["vae"]

    def passes(batch: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(batch).latent_dist
        return vae.decode(posterior.sample()).sample, posterior.kl()

    passes = compiled(args, passes)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.vae_batch_size,), generator=generator)
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        batch = images[sent(rows, images.device)]
        batch = torch.where(sent(mirrored, images.device), batch.flip(-1), batch)
        with autocast(args):
            decoded, divergence = passes(batch)
        error = decoded.float() - batch
        # The absolute error keeps edges sharp, where the squared one alone would blur them.
        divergence = divergence.float().mean() / (args.size // 4) ** 2 / 4
        return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * divergence

    if not training.run(loss_of, deadline):
        return None
    vae = training.averaged()["vae"]
    latents = encode(vae, images)
    squares = [(vae.decode(part).sample - true).square().mean(dim=(1, 2, 3))
               for part, true in zip(latents.split(250), images.split(250), strict=True)]
    error = torch.cat(squares).mean().sqrt() / 2
    say(f"autoencoder: root mean squared error {error:.4f} of a pixel's range")
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    return vae


def train_denoiser(
    args: argparse.Namespace, vae: AutoencoderKL, captions: Sequence[str], tokenizer: CLIPTokenizer, deadline: float
) -> nn.ModuleDict | None:
    latents = vae.config.scaling_factor * encode(vae, pictures_of(args))
    tokens = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokens.to(args.device)
    scheduler = build_scheduler()
    torch.manual_seed(args.seed)
    unet, text = build_unet(args.size), build_text_encoder(tokenizer, WIDTHS[args.size].text)
    modules = nn.ModuleDict({"unet": unet, "text": text}).to(args.device)
    training = Training("denoiser", modules, args.lr, args.steps, args, 60 * (1 - VAE_SHARE) * args.within)

    def passes(noised: Tensor, times: Tensor, told: Tensor) -> Tensor:
        return unet(noised, times, text(told)[0]).sample

    passes = compiled(args, passes)

    def loss_of(generator: torch.Generator) -> Tensor:
        count = args.batch_size
        rows = torch.randint(len(latents), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        # Stratified times: one from each of ``count`` equal parts.
        times = ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(max=999)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        told = torch.where(dropped, len(captions), rows)
        rows, told, times, noise = (sent(drawn, latents.device) for drawn in (rows, told, times, noise))
        data = latents[rows]
        with autocast(args):
            output = passes(scheduler.add_noise(data, noise, times), times, tokens[told])
        return F.mse_loss(output.float(), scheduler.get_velocity(data, noise, times))

    return training.averaged() if training.run(loss_of, deadline) else None


def save(
    args: argparse.Namespace, vae: AutoencoderKL, parts: nn.ModuleDict, captions: Sequence[str],
    tokenizer: CLIPTokenizer
) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text"], tokenizer=tokenizer, unet=parts["unet"], scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    grid = [caption for caption in GRID_CAPTIONS if caption in captions]
    others = GRID_SIZE - len(grid)
    grid += captions[:: max(1, len(captions) // others)][:others]
    pictures = pipeline(grid, num_inference_steps=GRID_STEPS, guidance_scale=GRID_GUIDANCE, output_type="pt",
                        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(len(grid))]).images
    # Stored in half precision, except for the text encoder: its own type is the one of the embeddings in a pipeline.
    pipeline.unet.half()
    pipeline.vae.half()
    timed = math.isfinite(args.within)
    length = f"--within {args.within:g}" if timed else f"--vae-steps {args.vae_steps} --steps {args.steps}"
    command = (
        f"python scripts/train_emoji_teacher.py --out {args.out.as_posix()} --size {args.size} {length} "
        f"--vae-batch-size {args.vae_batch_size} --batch-size {args.batch_size} --lr {args.lr} "
        f"--precision {args.precision} --seed {args.seed} --threads {args.threads}"
    )
    if torch.device(args.device).type != "cpu":
        command += f" --device {torch.device(args.device).type}" + " --compile" * args.compile
    states = {name: torch.load(args.work / f"{name}.pt", weights_only=True) for name in ("vae", "denoiser")}
    record = {
        "data": "emoji" if args.size == SIZE else f"emoji{args.size}",
        "licence": "trained on Noto Emoji, Copyright Google LLC, Apache-2.0",
        "parameters": {name: sum(p.numel() for p in getattr(pipeline, name).parameters())
                       for name in ("unet", "vae", "text_encoder")},
        "command": command,
        "steps": {name: state["step"] for name, state in states.items()},
        "planned_steps": {name: state["plans"] for name, state in states.items()},
        "training_seconds": {name: round(state["seconds"]) for name, state in states.items()},
        "torch": torch.__version__,
    }
    with atomic_folder(args.out) as folder:
        pipeline.save_pretrained(folder)
        (folder / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "captions.txt").write_text("\n".join(dict.fromkeys(captions)) + "\n", encoding="utf-8")
        save_grid(pictures.float(), folder / "samples.png", columns=16)
    say(f"wrote {args.out}; samples.png there has {len(grid)} of the {len(captions):,} captions")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out, work = Path("runs/emoji-teacher/pipeline"), Path("runs/emoji-teacher")
    parser.add_argument("--out", type=local_path, default=out, help="pipeline folder to write")
    parser.add_argument("--work", type=local_path, default=work, help="folder of its state, to go on")
    parser.add_argument("--size", type=int, choices=tuple(WIDTHS), default=SIZE, help="of the pictures, in pixels")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--within", type=float, default=math.inf, metavar="MINUTES",
                        help="end training after so many minutes, in place of --vae-steps and --steps")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--vae-batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60.0 * args.minutes
    if math.isfinite(args.within):
        args.vae_steps = args.steps = UNLIMITED
    try:
        usable_device(args.device, "--device")
        for name in ("vae_steps", "vae_batch_size", "steps", "batch_size", "threads"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
        if not args.within > 0:
            raise UserError(f"--within is {args.within}; it must be above 0 minutes")
        torch.set_num_threads(args.threads)
        check_made_place(args.out / "flowdistill.json", Path(__file__).name)
        captions = load_captions("emoji") or []
        tokenizer = build_tokenizer(captions)
        vae = train_autoencoder(args, deadline)
        parts = None if vae is None else train_denoiser(args, vae, captions, tokenizer, deadline)
        if vae is None or parts is None:
            say("stopped; the same command goes on")
            return 0
        save(args, vae, parts, captions, tokenizer)
    except UserError as error:
        print(f"train_emoji_teacher: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
