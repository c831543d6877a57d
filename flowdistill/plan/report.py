"""A plan in words and figures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence

from flowdistill.conditioning.pipeline_lora import teacher_in_words
from flowdistill.conditioning.prompts import in_bytes
from flowdistill.config import load_config
from flowdistill.plan import images
from flowdistill.plan.advice import GIB, RESERVED, Card, Step, advise, fits, on_cards
from flowdistill.plan.memory import Plan, PromptStore, make_plan

COLUMNS = ("parameters", "weights", "gradients", "optimiser", "average")


def report(
    path: str | os.PathLike[str], overrides: Sequence[str], gpu_memory: float | None = None,
    cards: Sequence[float] = (),
) -> Iterator[str]:
    """The plan of a configuration, and what makes it fit, which takes several more plans.

    Args:
        gpu_memory: of one GPU, GiB: said option by option.
        cards: of several sizes, GiB: said in a line each.
    """
    plan = make_plan(load_config(path, overrides))
    yield describe(plan)
    if gpu_memory is not None:
        yield "\n" + verdict(plan, advise(path, overrides, plan, gpu_memory), gpu_memory)
    if cards:
        yield "\n" + table(on_cards(path, overrides, plan, cards))


def table(cards: Sequence[Card]) -> str:
    """What makes a run fit, a line for each size of a card."""
    lines = [f"what makes it fit; sizes in GiB, of which {RESERVED:g} is kept free for the driver and the allocator",
             f"{'card':>8}{'cards':>8}{'peak':>10}  add"]
    for card in cards:
        count = f"{card.gpus}" if card.fits else "-"
        lines.append(f"{card.memory:>8g}{count:>8}{_gib(card.plan.peak):>10}  {in_words(card)}")
    if any(card.gpus > 1 for card in cards):
        lines.append("several cards: weights that train, their averages and moments in one part each, "
                     "configs/accelerate/fsdp2.yaml")
    return "\n".join(lines)


def in_words(card: Card) -> str:
    """The settings of a card, or that there are none."""
    if not card.fits:
        return "does not fit"
    return shlex.join(card.overrides) or ("as it is" if card.gpus == 1 else "nothing else")


def describe(plan: Plan) -> str:
    """The parts, the activations and the peak; GiB."""
    config = plan.config
    lines = [
        f"{config.method.name} of {teacher_in_words(config.teacher)}, for one process; GiB (2^30 bytes)",
        f"from {plan.architecture.origin}; nothing was loaded",
        "",
        f"{'':16}" + "".join(f"{column:>12}" for column in COLUMNS),
    ]
    for name, part in plan.parts.items():
        sizes = (part.weights, part.gradients, part.optimizer, part.average)
        lines.append(f"{name:16}{part.parameters / 1e6:>10.1f} M" + "".join(f"{_gib(size):>12}" for size in sizes))
    lasting = sum(part.lasting for part in plan.parts.values())
    lines += ["", f"{'stays in memory':40}{_gib(lasting):>12}"]
    lines += [f"{f'average of the {name}, on {config.train.ema_device}':40}{_gib(part.average_elsewhere):>12}"
              for name, part in plan.parts.items() if part.average_elsewhere]
    for role, size in plan.activations.items():
        rows = f"update of the {role}, {plan.rows} row{'s' if plan.rows > 1 else ''}: gradients"
        lines.append(f"{rows:40}{_gib(plan.parts[role].gradients):>12}  + activations (estimated) {_gib(size):>8}")
    if plan.unknown is not None:
        lines.append(f"activations: unknown, because the network reads its tensors' values ({plan.unknown})")
    without = "" if plan.unknown is None else "  without activations"
    lines.append(f"{'peak':40}{_gib(plan.peak):>12}{without}")
    lines += [passes(plan), *([] if plan.prompts is None else [_prompts(plan.prompts)])]
    if plan.teacher is not None:
        lines += [images.in_words(each, plan.teacher) for each in images.images_of(config.method)]
    return "\n".join(lines)


def _prompts(store: PromptStore) -> str:
    """Where the encoded prompts come from, and what that takes outside the device."""
    most = "up to " if store.ragged else ""
    each = f"{most}{in_bytes(store.row)} each"
    if store.count is None:
        return f"prompts: their file is not here; encoded, they take {each}"
    held = f"{most}{in_bytes(store.memory)} of host memory and {most}{in_bytes(store.disk)} of disk"
    if store.mode == "live":
        held = f"{in_bytes(store.memory)} of host memory, none of disk, and text encoders "
        held += "whose sizes are not known here" if store.encoders is None else f"of {_gib(store.encoders)} GiB, " + (
            "counted above" if store.on_device else "in host memory")
    return f"prompts: {store.count:,}, encoded {each}, in the mode {store.mode} (teacher.prompt_cache): {held}"


def passes(plan: Plan) -> str:
    """What a step does: its updates, and the passes (forward and backward) of micro-batches that each takes."""
    parts, rows = plan.config.train.gradient_accumulation, f"{plan.rows} row{'s' if plan.rows > 1 else ''}"
    updates = ", ".join(f"the {role} {_times(count)}" for role, count in plan.updates.items())
    each = f"{parts} passes of a micro-batch of {rows}" if parts > 1 else f"one pass of {rows}"
    total = parts * sum(plan.updates.values())
    calls = parts * sum(count * plan.calls[role] for role, count in plan.updates.items())
    besides = f", and on average {round(calls, 1):g} calls of the student without gradients" if calls else ""
    return f"a step updates {updates}, each time in {each}: {total} pass{'es' if total > 1 else ''}{besides}"


def verdict(plan: Plan, steps: list[Step], gpu_memory: float) -> str:
    """Whether it fits, and with what."""
    room = f"{gpu_memory:g} GiB, of which {RESERVED:g} GiB is kept free for the driver and the allocator"
    if fits(plan, gpu_memory):
        return f"it fits in {room}"
    lines = [f"it does not fit in {room}.", "Each of these is added to the ones before it:"]
    lines += [f"  {step.words:30}{' '.join(step.overrides):40}peak {_gib(step.plan.peak):>8}" for step in steps]
    if steps and fits(steps[-1].plan, gpu_memory):
        lines.append(passes(steps[-1].plan))
        lines.append(f"it fits with: {' '.join(text for step in steps for text in step.overrides)}")
    else:
        lines.append("it still does not" if steps else "  (there is no option left)")
        lines.append("FSDP2 cuts weights that train, their average and their moments into one part a GPU "
                     "(configs/accelerate/fsdp2.yaml)")
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.01 * GIB or size == 0 else f"{size / GIB:.1e}"
