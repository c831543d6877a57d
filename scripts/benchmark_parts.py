#!/usr/bin/env python
"""What each way of doing the same work costs: the parts of a training step, in pairs that alternate.

    python scripts/benchmark_parts.py
    python scripts/benchmark_parts.py --rounds 60 --device cuda

On the CPU it is this process's processor time, on a GPU the time until the device is done. The ratios are medians over
the rounds, each of one run beside the other.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from flowdistill.config import OptimizerConfig
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.training.optimizer import apply_update
from flowdistill.training.optimizers import make_optimizer
from flowdistill.utils.devices import OnDevices, sent
from flowdistill.utils.randomness import Draw

Thunk = Callable[[], Any]
CHANNELS, SIDE = (64, 128), 16
"""Of the U-Nets, and of the latents."""


def unet(prompts: bool) -> torch.nn.Module:
    """A U-Net as Stable Diffusion's are built, or one of convolutions only."""
    torch.manual_seed(0)
    if not prompts:
        return UNet2DModel(sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=CHANNELS,
                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=CHANNELS, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def pairs(device: torch.device) -> dict[str, tuple[Thunk, Thunk]]:
    """Name -> (as flowdistill does it, the other way)."""
    x, t = torch.randn(4, 4, SIDE, SIDE, device=device), torch.full((4,), 500.0, device=device)
    text = torch.randn(4, 16, 64, device=device)
    found: dict[str, tuple[Thunk, Thunk]] = {}
    for name, network in (("with attention", unet(True)), ("convolutions only", unet(False))):
        plain = network.to(device)
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        given = (text,) if name == "with attention" else ()

        def trained(network: Any, memory_format: torch.memory_format, given: Any = given) -> None:
            network(x.contiguous(memory_format=memory_format), t, *given).sample.square().mean().backward()

        found[f"U-Net {name}, forward and backward: contiguous / channels_last"] = (
            lambda plain=plain, run=trained: run(plain, torch.contiguous_format),
            lambda last=last, run=trained: run(last, torch.channels_last))
    network = unet(True).to(device).requires_grad_(False)
    both, rows, texts = torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text])

    def twice() -> None:
        network(x, t, text)
        network(x, t, text)

    found["guidance: both sides in one pass / in two"] = (lambda: network(both, rows, texts), twice)
    optimizers = []
    for fused in (True, False):
        own = unet(True).to(device)
        for p in own.parameters():
            p.grad = torch.randn_like(p)
        plain_adamw = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=False, foreach=False)
        optimizer = make_optimizer(own, OptimizerConfig(lr=1e-6)) if fused else plain_adamw
        optimizers.append(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def plain_update() -> None:
        torch.nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0, foreach=False)
        optimizers[1].step()

    found["clipping and AdamW: fused / one weight after another"] = (
        lambda: apply_update(optimizers[0], scaler, 1.0), plain_update)
    path = path_from_scheduler(DDIMScheduler())
    knots = torch.randn(2, 1000, dtype=torch.float64)
    constant = OnDevices(knots)
    found["a path's table: kept on the device / copied each time"] = (
        lambda: constant.on(device), lambda: knots.to(device))
    draw = Draw(0, 0, rows=64, device=device)
    found["64 rows of 4 x 32 x 32: each row's own numbers, sent / torch.randn on the device"] = (
        lambda: draw.normal((4, 32, 32)), lambda: torch.randn(64, 4, 32, 32, device=device))
    batch = torch.randn(64, 4, 32, 32)
    found["a batch to the device: without a wait / with"] = (lambda: sent(batch, device), lambda: batch.to(device))
    times = torch.rand(64, device=device, dtype=torch.float64)
    kept = path.karras_times(1000)
    found["Karras's noise levels: made at each draw / kept"] = (
        lambda: path.karras_times(1000).to(device)[(1000 * times).long()], lambda: kept[(1000 * times).long().cpu()])
    return found


def measure(one: Thunk, other: Thunk, device: torch.device, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios."""
    taken: tuple[list[float], list[float]] = ([], [])
    for index in range(-2, rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            began = clock()
            (one, other)[which]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 0:
                taken[which].append(clock() - began)
    ratios = [a / max(b, 1e-9) for a, b in zip(*taken, strict=True)]
    return statistics.median(taken[0]), statistics.median(taken[1]), statistics.median(ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="default: 30")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        print(f"benchmark_parts: error: --rounds is {options.rounds}; it must be at least 1", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmark_parts: error: --device is cuda, but this machine has no CUDA device", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    print("| | ms | the other way, ms | ratio |\n| --- | --- | --- | --- |")
    for name, (one, other) in pairs(device).items():
        ours, theirs, ratio = measure(one, other, device, options.rounds)
        print(f"| {name} | {1000 * ours:.3f} | {1000 * theirs:.3f} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
