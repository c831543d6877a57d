"""Settings that make a run fit, found by planning it with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flowdistill.config import RunConfig, load_config
from flowdistill.plan.memory import Plan, make_plan
from flowdistill.training.optimizers import optimizers_by_key
from flowdistill.utils.errors import UserError

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


def _codes(config: RunConfig) -> Sequence[str]:
    return ["teacher.quantize=int8"] if config.teacher.quantize is None else []


def _average_elsewhere(config: RunConfig) -> Sequence[str]:
    return ["train.ema_device=cpu"] if config.train.ema_device is None else []


def _small_moments(config: RunConfig) -> Sequence[str]:
    found = optimizers_by_key(config.method, "method.")
    return [f"{key}.name=adamw8bit" for key, optimizer in found if optimizer.name == "adamw"]


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
    Option("its average in host memory", _average_elsewhere),
    Option("moments of 8 bits", _small_moments),
    Option("a teacher in 8 bits", _codes),
    Option("a low-rank critic", _low_rank("critic")),
    Option("a low-rank student", _low_rank("student")),
)
"""In the order in which they are tried: those that change what is learned come last, and go first."""


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

    An option that saves nothing is left out. Once the run fits, what the later options have made unnecessary is taken
    out again, or made weaker, beginning with those that change most.
    """
    plans = _Plans(path, overrides, plan)
    chosen: dict[str, list[str]] = {}
    weaker: dict[str, list[list[str]]] = {}
    for option in OPTIONS:
        while not fits(plan, gpu_memory) and (more := list(option.overrides(plan.config))):
            try:
                tried = plans.with_(chosen | {option.words: more})
            except UserError:  # nothing that this network could have so
                break
            if tried.peak >= plan.peak:
                break
            if option.words in chosen:
                weaker.setdefault(option.words, []).append(chosen[option.words])
            chosen[option.words], plan = more, tried
    if fits(plan, gpu_memory):
        for words in reversed(list(chosen)):
            others = {name: given for name, given in chosen.items() if name != words}
            for less in (others, *({**chosen, words: given} for given in weaker.get(words, ()))):
                if fits(plans.with_(less), gpu_memory):
                    chosen = less
                    break
    names = list(chosen)
    return [Step(name, chosen[name], plans.with_({other: chosen[other] for other in names[: number + 1]}))
            for number, name in enumerate(names)]


class _Plans:
    """The plans of a configuration with some options on top, each made once."""

    def __init__(self, path: str | os.PathLike[str], overrides: Sequence[str], plan: Plan) -> None:
        self.path, self.overrides, self.known = path, list(overrides), {frozenset[str](): plan}

    def with_(self, chosen: Mapping[str, Sequence[str]]) -> Plan:
        added = [text for more in chosen.values() for text in more]
        if frozenset(added) not in self.known:
            keys = {text.partition("=")[0] for text in added}
            kept = [text for text in self.overrides if text.partition("=")[0] not in keys]
            self.known[frozenset(added)] = make_plan(load_config(self.path, [*kept, *added]))
        return self.known[frozenset(added)]
