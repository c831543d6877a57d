#!/usr/bin/env python
"""Train a class-conditional teacher of Fashion-MNIST and save it as a diffusers pipeline folder.

    python scripts/train_fashion_teacher.py --path flow --state runs/fashion-flow.pt --out assets/fashion-flow

--path flow and ddpm are those of train_digits_teacher.py; so is the null label. It takes hours, and may be killed at
any time: the same command goes on from the last state, and comes to the same bits as a run that nobody stopped.

The learning rate is constant, and falls to zero over the last steps (--decay, a share). A run can be made longer: the
state before the fall is kept in --state, what follows in a second file beside it. The same command with more --steps
goes on from the former, and comes to the bits of a run that was as long from the beginning. A number of --steps that is
never reached trains at the constant rate for as long as there is time.

On a GPU (--device cuda) a larger network is a matter of minutes, and --within ends training after so many of them, the
rate falling by the time as it does by the steps; how many steps that are depends on the machine, so that it is the one
training that does not come to the same bits:

    python scripts/train_fashion_teacher.py --path flow --device cuda --channels 128,256,256 --blocks 2 --compile \
        --batch-size 512 --within 10 --state runs/fashion-gpu/teacher.pt --out runs/fashion-gpu/teacher

Every --look-every steps the averaged network so far is written to --out, with a grid of its samples, and its loss on
1,000 pictures that are held out is printed: always with the same noise and times, so that two such losses compare.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor
from train_digits_teacher import LABEL_DROPOUT, NULL_LABEL, build_scheduler, ddpm_loss, flow_loss, sample_grid

from flowdistill.cli.arguments import seed_number
from flowdistill.data import load_images
from flowdistill.data.fashion import CLASSES, SIZE
from flowdistill.training.signals import Interrupts
from flowdistill.utils.devices import sent, usable_device
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder, atomic_write, check_writable, local_path
from flowdistill.utils.logging import say
from flowdistill.utils.randomness import generator_of
from flowdistill.utils.text import check_made_place

CHANNELS = (32, 64, 64)  # at 28, 14 and 7 pixels
UNLIMITED = 10**9  # steps of a training that time ends
EMA_DECAY = 0.9995
WARMUP = 200
LOG_EVERY = 100
HELD_OUT = 1000
GRID_STEPS = 50


def build_network(channels: Sequence[int], blocks: int) -> UNet2DModel:
    """A UNet whose only attention is in its middle, at 7 x 7: by default 1.1 M parameters."""
    levels = len(channels)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(channels),
        layers_per_block=blocks,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


class Training:
    """A network, its average and its optimiser, all that a state file keeps. What a step draws belongs to the step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.limit = args, torch.device(args.device), 60.0 * args.within
        torch.manual_seed(args.seed)
        self.network = build_network(args.channels, args.blocks).to(self.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        # Not a network of its own, so that the state's names are the same with and without it.
        self.call = torch.compile(self.network) if args.compile else self.network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                          fused=True if self.device.type == "cuda" else None)
        self.scheduler = build_scheduler(args.path)
        self.step, self.seconds = 0, 0.0
        self.losses: list[list[float]] = []
        self.constant_until = args.steps - math.floor(args.decay * args.steps)
        self.asked = {name: getattr(args, name) for name in ("path", "precision", "batch_size", "lr", "seed",
                                                              "threads")}
        for name, usual in (("channels", list(CHANNELS)), ("blocks", 1)):
            if (value := getattr(args, name)) != usual:
                self.asked[name] = value
        self.plan = {"steps": args.steps, "constant_until": self.constant_until}
        self.falling_file = args.state.with_name(f"{args.state.stem}.falling{args.state.suffix}")

    def rate(self) -> float:
        """The learning rate of the next step: warmed up, constant, and at the end in equal steps to zero."""
        left = (self.args.steps - self.step) / max(1, self.args.steps - self.constant_until)
        if math.isfinite(self.limit):
            left = min(left, max(0.0, 1.0 - self.seconds / self.limit) / max(self.args.decay, 1e-9))
        return self.args.lr * min(1.0, (self.step + 1) / WARMUP, left)

    @property
    def done(self) -> bool:
        """Whether the last step is made, or the time is over."""
        return self.step >= self.args.steps or self.seconds >= self.limit

    def resume(self) -> None:
        """Go on from the newest state of this run, if there is one.

        Raises:
            UserError: the state is another run's, damaged, or beyond the step at which the rate begins to fall.
        """
        if self.falling_file.is_file() and (falling := self._read(self.falling_file))["plan"] == self.plan:
            self._load(falling)
        elif self.args.state.is_file():
            state = self._read(self.args.state)
            if state["step"] > self.constant_until:
                least = math.ceil(state["step"] / (1.0 - self.args.decay))
                raise UserError(
                    f"{self.args.state} is at step {state['step']}, and in a run of {self.args.steps} steps the rate "
                    f"falls from step {self.constant_until} on; ask for at least --steps {least}"
                )
            self._load(state)

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            state = torch.load(file, weights_only=True, map_location=self.device)
            asked = state["asked"]
        except Exception as error:  # torch raises many unrelated types
            raise UserError(f"{file} is damaged or no state of this script: {' '.join(str(error).split())}") from error
        if asked != self.asked:
            different = [name for name in {**self.asked, **asked} if asked.get(name) != self.asked.get(name)]
            was = ", ".join(f"{name} {asked.get(name)}" for name in different)
            raise UserError(f"{file} is the state of another run, with {was}; name another file, or ask for the same")
        return state

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def save(self) -> None:
        """Write the state, complete or not at all: before the rate falls to --state, then beside it."""
        state = {"network": self.network.state_dict(), "average": self.average.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds,
                 "losses": self.losses, "asked": self.asked, "plan": self.plan}
        with atomic_write(self.args.state if self.step <= self.constant_until else self.falling_file) as file:
            torch.save(state, file)

    def loss(self, network: Any, data: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if self.args.path == "flow":
            return flow_loss(network, data, labels, generator)
        return ddpm_loss(network, self.scheduler, data, labels, generator)

    def train_step(self, data: Tensor, labels: Tensor) -> Tensor:
        """One step on a batch of data (N, 1, 28, 28) in [-1, 1]; returns its loss, on the device."""
        generator = generator_of(self.args.seed, self.step)
        rows = torch.randint(len(data), (self.args.batch_size,), generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < LABEL_DROPOUT
        rows, dropped = sent(rows, self.device), sent(dropped, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            loss = self.loss(self.call, data[rows], torch.where(dropped, NULL_LABEL, labels[rows]), generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Warmed up, so that the average of a short run does not remember the initial weights.
        decay = min(EMA_DECAY, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1.0 - decay)
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, data: Tensor, labels: Tensor) -> float:
        """Loss of the averaged network on held-out data, with the same noise and times whenever it is asked."""
        generator = generator_of(0)
        parts = zip(data.split(250), labels.split(250), strict=True)
        losses = [(len(part), self.loss(self.average, part, names, generator).item()) for part, names in parts]
        return sum(count * loss for count, loss in losses) / len(data)

    def write_pipeline(self, held_out_loss: float) -> None:
        """The averaged network as a stock pipeline in --out, with a record of its training and a grid of samples."""
        args = self.args
        pipeline = DDPMPipeline(unet=self.average, scheduler=self.scheduler)
        command = (
            f"python scripts/train_fashion_teacher.py --path {args.path} --steps {args.steps} --decay {args.decay} "
            f"--precision {args.precision} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} "
            f"--threads {args.threads} --state {args.state.name} --out {args.out.as_posix()}"
        )
        if self.asked.keys() & {"channels", "blocks"}:
            command += f" --channels {','.join(map(str, args.channels))} --blocks {args.blocks}"
        if math.isfinite(self.limit):
            command = command.replace(f"--steps {args.steps}", f"--within {args.within:g}")
        if self.device.type != "cpu":
            command += f" --device {self.device.type}" + " --compile" * args.compile
        record = {
            "null_label": NULL_LABEL,
            "num_classes": len(CLASSES),
            "data": "fashion",
            "path": args.path,
            "parameters": sum(p.numel() for p in self.average.parameters()),
            "steps": self.step,
            "seed": args.seed,
            "held_out_loss": held_out_loss,
            "command": command,
            "training_cpu_seconds" if self.device.type == "cpu" else "training_seconds": round(self.seconds),
            "torch": torch.__version__,
        }
        with atomic_folder(args.out) as folder:
            pipeline.save_pretrained(folder, safe_serialization=True)
            (folder / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n")
            sample_grid(pipeline, args.path, folder / "samples.png", args.seed, steps=GRID_STEPS, enlarged=2)


def train(args: argparse.Namespace) -> int:
    """Train to the end or to a signal; the exit code."""
    check_writable(args.state)
    check_made_place(args.out / "flowdistill.json", Path(__file__).name)
    training = Training(args)
    training.resume()
    (data, labels), (held_out, held_out_labels) = load_images("fashion"), load_images("fashion-test")
    held_out, held_out_labels = 2.0 * held_out[:HELD_OUT] - 1.0, held_out_labels[:HELD_OUT]
    data.mul_(2.0).sub_(1.0)
    data, labels, held_out, held_out_labels = (
        part.to(training.device) for part in (data, labels, held_out, held_out_labels))
    # Beside other work the processor's own time is what a step takes; a GPU works while the processor waits.
    on_cpu = training.device.type == "cpu"
    clock = time.process_time if on_cpu else time.monotonic
    running: list[Tensor] = []
    begun, before, logged = training.step, training.seconds, clock()
    started = logged
    if begun:
        say(f"goes on from step {begun}")
    with Interrupts() as interrupts:
        while not training.done and not interrupts.received:
            running.append(training.train_step(data, labels))
            step = training.step
            training.seconds = before + clock() - started
            if step % LOG_EVERY == 0:
                mean = torch.stack(running).mean().item()
                now = clock()
                say(f"step {step}, loss {mean:.4f}, {1000 * (now - logged) / len(running):.{0 if on_cpu else 1}f} ms "
                    f"{'of CPU ' if on_cpu else ''}a step")
                running, logged = [], now
            if step % args.look_every == 0 and not training.done:
                loss = training.held_out_loss(held_out, held_out_labels)
                training.losses.append([step, loss])
                training.write_pipeline(loss)
                say(f"step {step}, held-out loss {loss:.5f}; wrote {args.out}")
                logged = clock()
            if step % args.save_every == 0 or step == training.constant_until:
                training.save()
    if training.step > begun:
        training.save()
    if not training.done:
        say(f"stopped at step {training.step}; the same command goes on")
        return 128 + interrupts.received
    loss = training.held_out_loss(held_out, held_out_labels)
    training.write_pipeline(loss)
    say(f"wrote {args.out}: {training.step} steps, {training.seconds:.0f} s{' of CPU' if on_cpu else ''}, "
        f"held-out loss {loss:.5f}")
    return 0


def channel_numbers(text: str) -> list[int]:
    """Three numbers above 0 from "32,64,64"."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers such as 32,64,64")
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, 2 for input that cannot be used, 128 and the signal's number when it was told to stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--path", choices=("flow", "ddpm"), required=True)
    parser.add_argument("--out", type=local_path, required=True, help="pipeline folder to write")
    parser.add_argument("--state", type=local_path, required=True, metavar="FILE", help="state to go on from")
    parser.add_argument("--steps", type=int, default=None, help="default: 60,000; with --within as many as there is "
                        "time for")
    parser.add_argument("--within", type=float, default=math.inf, metavar="MINUTES", help="end training after so many "
                        "minutes, on the CPU of its own time")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--channels", type=channel_numbers, default=list(CHANNELS), metavar="A,B,C",
                        help="of the network at 28, 14 and 7 pixels (default: 32,64,64)")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks at each of these sizes")
    parser.add_argument("--decay", type=float, default=0.2, help="share of the steps over which the rate falls")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the network's passes in "
                        "training; weights stay float32 (default: bf16, a third faster where a CPU has it)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=1, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="write the state so often")
    parser.add_argument("--look-every", type=int, default=2000, metavar="STEPS", help="write --out so often")
    args = parser.parse_args(arguments)
    if args.steps is None:
        args.steps = 60_000 if math.isinf(args.within) else UNLIMITED
    try:
        usable_device(args.device, "--device")
        for name in ("steps", "batch_size", "threads", "save_every", "look_every", "blocks"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
        if not args.within > 0.0:
            raise UserError(f"--within is {args.within}; it must be above 0 minutes")
        if any(width % 8 for width in args.channels):
            raise UserError(f"--channels is {','.join(map(str, args.channels))}; each must be a multiple of 8")
        if not 0.0 <= args.decay < 1.0:
            raise UserError(f"--decay is {args.decay}; it is a share of the steps, at least 0 and below 1")
        torch.set_num_threads(args.threads)
        return train(args)
    except UserError as error:
        print(f"train_fashion_teacher: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
