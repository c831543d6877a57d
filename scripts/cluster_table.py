#!/usr/bin/env python
"""Write the tables of docs/experiments/clusters.md: what a process of many sends, draws and stores. Nothing is loaded.

    python scripts/cluster_table.py             compute, and write the tables into docs/experiments/clusters.md
    python scripts/cluster_table.py --print     compute, and print them
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "experiments" / "clusters.md"
BEGIN, END = "<!-- made by scripts/cluster_table.py -->", "<!-- end of the tables -->"
CONFIGS = {"SDXL, full": ("sdxl/dmd2_4step", ["train.gradient_accumulation=128"]),
           "Qwen-Image, LoRA": ("qwen_image/dmd2_4step_lora", [])}
GPUS = 64
FAST, SLOW = 400e9, 12.5e9  # bytes a second out of a node: eight network cards of 400 Gb/s, and one of 100 Gb/s
SPEED = 0.4 * 989e12  # operations a second: 40 % of an H100's peak in bf16
DISK = 2e9  # bytes a second of one process


class Update(NamedTuple):
    """One update of a role by one process, of one row."""

    role: str
    times: int
    gradients: int
    gathered: int
    operations: float
    drawn: int


class Figures(NamedTuple):
    """What one configuration takes."""

    updates: list[Update]
    peak: float
    prompt: int
    checkpoint: int
    full: bool


def figures(name: str, overrides: list[str]) -> Figures:
    """Counted on torch's meta device: plan, and the operations and draws of one update of each role."""
    from torch.utils.flop_counter import FlopCounterMode

    from flowdistill.config import load_config
    from flowdistill.plan import make_plan
    from flowdistill.plan.meta_teacher import META, meta_teacher, read_architecture
    from flowdistill.training.run import method_class
    from flowdistill.utils.randomness import Draw

    class Counted(Draw):
        drawn = 0

        def placed(self, values: Tensor) -> Tensor:
            self.drawn += values.nbytes
            return super().placed(values)

    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    plan = make_plan(config)
    teacher = meta_teacher(config.teacher, read_architecture(config.teacher.source))
    method = method_class(config.method.name)(config.method, teacher).to(META)
    networks = {role: part.network for role, part in method.roles().items()}
    full = all(getattr(config.method, role) == "full" for role in networks)
    for network in networks.values():
        if config.train.gradient_checkpointing:
            network.enable_gradient_checkpointing()
    updates = []
    for role, times in plan.updates.items():
        draw = Counted(config.seed, 0, rows=1, device=META)
        with FlopCounterMode(display=False) as counter:
            method.loss(role, networks, draw)[0].backward()
        part, others = plan.parts[role], [plan.parts[other].weights for other in networks if other != role]
        # Forward and backward of its own network, and one pass of the other one, which the loss asks as well.
        gathered = 2 * part.weights + sum(others)
        updates.append(Update(role, times, part.gradients, gathered, float(counter.get_total_flops()), draw.drawn))
        for network in networks.values():
            network.zero_grad(set_to_none=True)
    kept = sum(plan.parts[role].gradients + plan.parts[role].optimizer + plan.parts[role].average for role in networks)
    return Figures(updates, plan.peak, 0 if plan.prompts is None else plan.prompts.row, kept, full)


def tables(found: dict[str, Figures]) -> str:
    """Both tables as Markdown."""
    share = (GPUS - 1) / GPUS
    lines = ["| | an update of the | in a step | gradients | sent by DDP | on 400 GB/s | on 12.5 GB/s | with FSDP2 | "
             "operations | computing | drawn |", "|" + " --- |" * 11]
    for name, figure in found.items():
        for update in figure.updates:
            sent = 2 * share * update.gradients
            cut = share * (update.gathered + update.gradients)
            lines.append(
                f"| {name} | {update.role} | {update.times} | {update.gradients / 1e9:.2f} GB | {sent / 1e9:.2f} GB | "
                f"{sent / FAST:.3f} s | {sent / SLOW:.2f} s | {f'{cut / 1e9:.2f} GB' if figure.full else '-'} | "
                f"{update.operations / 1e12:.0f} T | {update.operations / SPEED:.2f} s | {update.drawn / 1e6:.2f} MB |")
    lines += ["", "| | memory of a process (GiB) | a prompt's row | a step: computing | its gradients on 400 GB/s | on "
              "12.5 GB/s | checkpoint | written in |", "|" + " --- |" * 8]
    for name, figure in found.items():
        computing = sum(update.times * update.operations for update in figure.updates) / SPEED
        sent = sum(update.times * 2 * share * update.gradients for update in figure.updates)
        lines.append(f"| {name} | {figure.peak / 2**30:.1f} | {figure.prompt / 1e6:.2f} MB | {computing:.2f} s | "
                     f"{sent / FAST:.2f} s | {sent / SLOW:.1f} s | {figure.checkpoint / 1e9:.1f} GB | "
                     f"{figure.checkpoint / DISK:.0f} s |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--print", action="store_true", help="print the tables instead of writing them")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    made = tables({title: figures(name, overrides) for title, (name, overrides) in CONFIGS.items()})
    if options.print:
        print(made)
        return 0
    from flowdistill.utils.text import read_text

    before, _, rest = read_text(PAGE).partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"the tables are in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
