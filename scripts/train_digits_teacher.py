"""Train a class-conditional 8x8 digit teacher and save it as a diffusers pipeline folder.

--path flow   linear path x_t = (1 - t) x_0 + t n, network time 1000 t, target n - x_0 (FlowMatchEulerDiscreteScheduler)
--path ddpm   linear betas 1e-4..0.02, 1,000 steps, target epsilon (DDPMScheduler)

Both share one network. One label in ten is replaced by the null label for classifier-free guidance. The folder loads
with DiffusionPipeline.from_pretrained; flowdistill.json in it records the null label and how the weights were made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm import tqdm

from flowdistill.cli.arguments import seed_number
from flowdistill.data import load_digits
from flowdistill.utils.devices import sent
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.logging import say

NUM_CLASSES = 10
NULL_LABEL = 10
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999
# An epsilon network's clean-image error is its own error over alpha. Weighting by 1 / alpha^2 (the v loss of Salimans
# and Ho 2022) makes the noisy end usable; the cap keeps the last steps, where alpha is 0.006, from drowning the rest.
MAX_EPSILON_WEIGHT = 25.0


def build_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=NUM_CLASSES + 1,
    )


def build_scheduler(path: str) -> FlowMatchEulerDiscreteScheduler | DDPMScheduler:
    if path == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type="epsilon", clip_sample=False
    )


def flow_loss(network: UNet2DModel, data: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching: half of the times uniform, half logit-normal (Esser et al. 2024), shuffled into one batch.

    What is drawn is drawn on the host, so that it is the same on every device of the data's.
    """
    noise = sent(torch.randn(data.shape, generator=generator), data.device)
    uniform = torch.rand(len(data), generator=generator)
    t = torch.where(
        torch.rand(len(data), generator=generator) < 0.5,
        uniform,
        torch.randn(len(data), generator=generator).sigmoid(),
    )
    t = sent(t, data.device)
    wide = t[:, None, None, None]
    output = network((1.0 - wide) * data + wide * noise, 1000.0 * t, class_labels=labels).sample
    return (output - (noise - data)).square().mean()


def ddpm_loss(
    network: UNet2DModel, scheduler: DDPMScheduler, data: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    noise = sent(torch.randn(data.shape, generator=generator), data.device)
    steps = torch.randint(scheduler.config.num_train_timesteps, (len(data),), generator=generator)
    steps = sent(steps, data.device)
    output = network(scheduler.add_noise(data, noise, steps), steps, class_labels=labels).sample
    weight = (1.0 / scheduler.alphas_cumprod[steps]).clamp(max=MAX_EPSILON_WEIGHT)  # add_noise moves them there
    return (weight * (output - noise).square().mean(dim=(1, 2, 3))).mean()


@torch.no_grad()
def _average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    """EMA update with warm-up, so that the average of a short run does not remember the initial weights."""
    decay = min(EMA_DECAY, (1.0 + float(count)) / (10.0 + float(count)))
    torch._foreach_lerp_(averaged, current, 1.0 - decay)


@torch.no_grad()
def sample_grid(
    pipeline: DDPMPipeline, path: str, file: Path, seed: int, rows: int = 8, steps: int = 50, enlarged: int = 4
) -> None:
    """Write a grid PNG: one class a column, ``rows`` samples each, 50 deterministic steps (Euler, or DDIM); a pixel of
    a sample is ``enlarged`` pixels wide and high."""
    scheduler = pipeline.scheduler
    if path == "ddpm":
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    device, size = pipeline.unet.device, pipeline.unet.config.sample_size
    labels = torch.arange(NUM_CLASSES).repeat(rows).to(device)
    x = torch.randn(len(labels), 1, size, size, generator=torch.Generator().manual_seed(seed)).to(device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(pipeline.unet(x, t, class_labels=labels).sample, t, x).prev_sample
    images = ((x.cpu() + 1.0) / 2.0).clamp(0.0, 1.0)
    images = images.repeat_interleave(enlarged, dim=2).repeat_interleave(enlarged, dim=3)
    save_image(images, file, nrow=NUM_CLASSES, padding=4, pad_value=0.5)


def save(network: UNet2DModel, args: argparse.Namespace, steps_done: int, seconds: float) -> None:
    pipeline = DDPMPipeline(unet=network, scheduler=build_scheduler(args.path))
    pipeline.save_pretrained(args.out, safe_serialization=True)
    command = (
        f"python scripts/train_digits_teacher.py --path {args.path} --out {args.out.as_posix()} --steps {args.steps} "
        f"--batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} --threads {args.threads}"
    )
    record = {
        "null_label": NULL_LABEL,
        "num_classes": NUM_CLASSES,
        "data": "digits",
        "path": args.path,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": steps_done,
        "seed": args.seed,
        "command": command,
        "training_seconds": round(seconds),
        "torch": torch.__version__,
    }
    (args.out / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n")
    sample_grid(pipeline, args.path, args.out / "samples.png", args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--path", choices=("flow", "ddpm"), required=True)
    parser.add_argument("--out", type=local_path, required=True, help="pipeline folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--save-every", type=int, default=0, help="save the average so often (steps; 0: never)")
    args = parser.parse_args()
    try:
        check_writable(args.out / "model_index.json")
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    images, labels = load_digits()
    data = 2.0 * images - 1.0
    network, scheduler = build_network(), build_scheduler(args.path)
    average = AveragedModel(network, multi_avg_fn=_average)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, betas=(0.9, 0.99))
    warmup = max(1, min(100, args.steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - warmup)),
        ],
        milestones=[warmup],
    )
    started = time.monotonic()
    running = 0.0
    progress = tqdm(range(1, args.steps + 1), desc=f"digits {args.path}", disable=None)  # no bar in a log file
    for step in progress:
        rows = torch.randint(len(data), (args.batch_size,), generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < LABEL_DROPOUT
        batch_labels = torch.where(dropped, NULL_LABEL, labels[rows])
        if args.path == "flow":
            loss = flow_loss(network, data[rows], batch_labels, generator)
        else:
            loss = ddpm_loss(network, scheduler, data[rows], batch_labels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        running += loss.item()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{running / 100:.4f}")
            if progress.disable:
                say(f"step {step} of {args.steps}, loss {running / 100:.4f}")
            running = 0.0
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            save(average.module, args, step, time.monotonic() - started)
    save(average.module, args, args.steps, time.monotonic() - started)
    print(f"wrote {args.out}: {args.steps} steps in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
