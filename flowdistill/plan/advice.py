"""Which settings make a run fit, found by planning it with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowdistill.config import RunConfig, load_config
from flowdistill.plan.memory import Plan, make_plan

GIB = 2**30
RESERVED = 1.0
"""GiB that the driver's context and the allocator's gaps get besides the plan: an allowance, not a measurement."""


@dataclass(frozen=True)
class Option:
    """Something that saves memory: its words, and the overrides that add it; none where the run has it or cannot."""

    words: str
    overrides: Callable[[RunConfig], Sequence[str]]


def _half_teacher(config: RunConfig) -> Sequence[str]:
    return ["teacher.dtype=bfloat16"] if config.teacher.dtype == "float32" else []


def _half_passes(config: RunConfig) -> Sequence[str]:
    return ["train.precision=bf16"] if config.train.precision in (None, "fp32") else []


def _checkpointing(config: RunConfig) -> Sequence[str]:
    return [] if config.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]


def _smaller_batches(config: RunConfig) -> Sequence[str]:
    rows, parts = config.train.batch_size, config.train.gradient_accumulation
    more = next((n for n in range(2 * parts, rows + 1) if rows % n == 0), None)
    return [] if more is None else [f"train.gradient_accumulation={more}"]


def _low_rank(role: str) -> Callable[[RunConfig], Sequence[str]]:
    def overrides(config: RunConfig) -> Sequence[str]:
        for prefix, settings in (("method", config.method), ("method.host", getattr(config.method, "host", None))):
            if getattr(settings, role, None) == "full":
                return [f"{prefix}.{role}=lora"]
        return []

    return overrides


OPTIONS = (
    Option("a teacher in half precision", _half_teacher),
    Option("passes in half precision", _half_passes),
    Option("activations recomputed", _checkpointing),
    Option("smaller micro-batches", _smaller_batches),
    Option("a low-rank critic", _low_rank("critic")),
    Option("a low-rank student", _low_rank("student")),
)
"""In the order in which they are tried: those that change what is learned come last."""


@dataclass
class Step:
    """What one more option brings."""

    words: str
    overrides: list[str]
    plan: Plan


def fits(plan: Plan, gpu_memory: float) -> bool:
    """Whether a process fits on a GPU with so many GiB."""
    return plan.peak / GIB + RESERVED <= gpu_memory


def advise(
    path: str | os.PathLike[str], overrides: Sequence[str], plan: Plan, gpu_memory: float
) -> list[Step]:
    """Options on top of each other until the run fits in ``gpu_memory`` GiB, or there are no more.

    An option that saves nothing is left out.
    """
    steps: list[Step] = []
    given = list(overrides)
    for option in OPTIONS:
        while not fits(plan, gpu_memory) and (more := option.overrides(plan.config)):
            tried = make_plan(load_config(path, [*given, *more]))
            if tried.peak >= plan.peak:
                break
            keys = {text.partition("=")[0] for text in more}
            given = [text for text in given if text.partition("=")[0] not in keys] + list(more)
            steps = [step for step in steps if step.words != option.words]
            steps.append(Step(option.words, list(more), tried))
            plan = tried
    return steps
