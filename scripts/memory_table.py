#!/usr/bin/env python
"""Write the tables of docs/experiments/memory.md, and docs/gpu.md's of cards: the plans of the shipped configurations.

Nothing is loaded.

    python scripts/memory_table.py             plan, and write the tables into the two pages
    python scripts/memory_table.py --print     plan, and print them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowdistill.plan.advice import Card
    from flowdistill.plan.memory import Plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "experiments" / "memory.md"
GPU_PAGE, GPU_CARDS = ROOT / "docs" / "gpu.md", (24, 48, 80)
BEGIN, END = "<!-- made by scripts/memory_table.py -->", "<!-- end of the table -->"
BEGIN_CARDS, END_CARDS = "<!-- cards by scripts/memory_table.py -->", "<!-- end of the cards -->"
CARDS = (12, 16, 24, 48, 80)
SHORT = {"teacher.dtype=bfloat16": "teacher in bf16", "train.precision=bf16": "bf16",
         "train.gradient_checkpointing=true": "recomputed", "teacher.offload=codec": "autoencoder away",
         "teacher.offload=all": "teacher away", "train.ema_device=cpu": "average away",
         "teacher.quantize=int8": "teacher in int8", "method.critic=lora": "LoRA critic",
         "method.host.critic=lora": "LoRA critic", "method.student=lora": "LoRA student",
         "method.host.student=lora": "LoRA student"}
"""Overrides in the fewest words; ``train.gradient_accumulation=8`` is ``8 parts``."""
CONFIGS = ("sd15/dmd2", "sd15/dmd2_4step", "sd15/lcm_lora", "sdxl/disback", "sdxl/dmd2_4step", "sdxl/lcm_lora",
           "sd3/dmd2", "sd3/dmd2_4step", "sd3/flow_map_lora", "sit/freeflow", "sit/flow_map_matching", "flux/dmd2",
           "flux/dmd2_4step_lora", "flux/flow_map_lora", "qwen_image/dmd2_4step_lora", "z_image/dmd2_4step_lora")
HEAD = ("configuration", "network", "teacher", "autoencoder", "student", "its average", "its optimiser",
        "its gradients", "critic", "its optimiser", "its gradients", "other networks", "activations: student",
        "critic", "peak")


def planned(name: str) -> tuple[Plan, list[Card]]:
    """The plan of a shipped configuration, and what makes it fit on each card."""
    from flowdistill.config import load_config
    from flowdistill.plan import make_plan
    from flowdistill.plan.advice import on_cards

    file = ROOT / "configs" / f"{name}.yaml"
    plan = make_plan(load_config(file))
    return plan, on_cards(file, [], plan, CARDS)


def row(name: str, plan: Plan) -> list[str]:
    """One line of the table; GiB."""
    from flowdistill.plan.advice import GIB

    parts = plan.parts
    student, critic, other = parts["student"], parts.get("critic"), parts.get("other networks")
    of_critic = [None] * 3 if critic is None else [critic.weights, critic.optimizer, critic.gradients]
    sizes = [parts["teacher"].weights, parts["autoencoder"].weights, student.weights, student.average,
             student.optimizer, student.gradients, *of_critic,
             0 if other is None else other.weights, *(plan.activations.get(role) for role in ("student", "critic")),
             plan.peak]
    network = f"{parts['teacher'].parameters / 1e6:,.0f} M"
    return [f"`configs/{name}.yaml`", network, *("-" if size is None else f"{size / GIB:.2f}" for size in sizes)]


def cell(card: Card) -> str:
    """What makes a run fit on a card, in the fewest words."""
    from flowdistill.plan.advice import GIB

    if not card.fits:
        return f"does not fit: {card.plan.peak / GIB:.1f}"
    words = [f"FSDP2 on {card.gpus}"] * (card.gpus > 1)
    for text in card.overrides:
        key, _, value = text.partition("=")
        short = f"{value} parts" if key == "train.gradient_accumulation" else SHORT.get(text, "8-bit moments")
        words += [] if short in words else [short]
    return f"{', '.join(words) or 'as it is'}: {card.plan.peak / GIB:.1f}"


def table(rows: list[list[str]], head: Sequence[str] = HEAD) -> str:
    """The rows as Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ([*head], ["---"] * len(head), *rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    plans = {name: planned(name) for name in CONFIGS}
    made = table([row(name, plan) for name, (plan, _) in plans.items()])
    cells = {name: dict(zip(CARDS, map(cell, found), strict=True)) for name, (_, found) in plans.items()}
    cards, some = card_table(cells, CARDS), card_table(cells, GPU_CARDS)
    if options.print:
        print(f"{made}\n\n{cards}")
        return 0
    write(made, BEGIN, END)
    write(cards, BEGIN_CARDS, END_CARDS)
    write(some, BEGIN_CARDS, END_CARDS, GPU_PAGE)
    print(f"the tables of {len(CONFIGS)} configurations are in {PAGE.relative_to(ROOT)} and "
          f"{GPU_PAGE.relative_to(ROOT)}")
    return 0


def card_table(cells: Mapping[str, Mapping[int, str]], sizes: Sequence[int]) -> str:
    """What fits on cards of these sizes, a configuration a row."""
    return table([[f"`configs/{name}.yaml`", *(of_name[size] for size in sizes)] for name, of_name in cells.items()],
                 ("configuration", *(f"{size} GB" for size in sizes)))


def write(made: str, begin: str, end: str, page: Path = PAGE) -> None:
    """Put a table between its marks on the page."""
    from flowdistill.utils.text import read_text

    before, _, rest = read_text(page).partition(begin)
    page.write_text(f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
