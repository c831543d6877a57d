"""Settings that make a run fit, found by planning it with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flowdistill.config import RunConfig, load_config
from flowdistill.plan.memory import Plan, make_plan, moved
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


def _small_moments_in_parts(config: RunConfig) -> Sequence[str]:
    """Moments of 8 bits that FSDP2 can cut."""
    found = optimizers_by_key(config.method, "method.")
    return [f"{key}.name=ao_adamw8bit" for key, optimizer in found
            if optimizer.name in ("adamw", "adamw8bit", "paged_adamw8bit")]


def _settings(config: RunConfig) -> Sequence[tuple[str, object]]:
    """The sections that may say which networks are low-rank."""
    return ("method", config.method), ("method.host", getattr(config.method, "host", None))


def _at_rest(config: RunConfig) -> Sequence[str]:
    # Adapters stand on the teacher's own weights, which then cannot go away.
    low = any(getattr(settings, role, None) == "lora" for _, settings in _settings(config)
              for role in ("student", "critic"))
    wanted = "codec" if low else "all"
    return [] if config.teacher.offload in (wanted, "all") else [f"teacher.offload={wanted}"]


def _low_rank(role: str) -> Callable[[RunConfig], Sequence[str]]:
    def overrides(config: RunConfig) -> Sequence[str]:
        for prefix, settings in _settings(config):
            if getattr(settings, role, None) == "full":
                stays = ["teacher.offload=codec"] if config.teacher.offload == "all" else []
                return [f"{prefix}.{role}=lora", *stays]
        return []

    return overrides


AVERAGE, AT_REST, EIGHT_BITS = "its average in host memory", "frozen parts on the CPU", "moments of 8 bits"
OPTIONS = (
    Option("a teacher in half precision", _half_teacher),
    Option("passes in half precision", _half_passes),
    Option("activations recomputed", _checkpointing),
    Option("smaller micro-batches", _smaller_batches),
    Option(AVERAGE, _average_elsewhere),
    Option(AT_REST, _at_rest),
    Option(EIGHT_BITS, _small_moments),
    Option("a teacher in 8 bits", _codes),
    Option("a low-rank critic", _low_rank("critic")),
    Option("a low-rank student", _low_rank("student")),
)
"""In the order in which they are tried: those that change what is learned come last, and go first."""
LEARNED = ("a low-rank critic", "a low-rank student")
"""Those that change what is learned."""
GPUS = (2, 4, 8)
"""Over how many GPUs of a machine FSDP2 may cut what trains."""


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
    path: str | os.PathLike[str], overrides: Sequence[str], plan: Plan, gpu_memory: float, plans: Plans | None = None
) -> list[Step]:
    """Options on top of each other until the run fits in ``gpu_memory`` GiB, or there are no more.

    An option that saves nothing is left out. Once the run fits, what the later options have made unnecessary is taken
    out again, or made weaker, beginning with those that change most.

    Args:
        plans: what was planned of this configuration before.
    """
    plans = plans or Plans(path, overrides, plan)
    chosen: dict[str, list[str]] = {}
    weaker: dict[str, list[list[str]]] = {}
    for option in OPTIONS:
        while not fits(plan, gpu_memory) and (more := list(option.overrides(plan.config))):
            tried = plans.possible(chosen | {option.words: more})
            if tried is None or tried.peak >= plan.peak:
                break
            if option.words in chosen:
                weaker.setdefault(option.words, []).append(chosen[option.words])
            chosen[option.words], plan = more, tried
    if fits(plan, gpu_memory):
        for words in reversed(list(chosen)):
            others = {name: given for name, given in chosen.items() if name != words}
            for less in (others, *({**chosen, words: given} for given in weaker.get(words, ()))):
                if (enough := plans.possible(less)) is not None and fits(enough, gpu_memory):
                    chosen = less
                    break
        if AT_REST not in chosen:  # then adapters need not say what stays
            bare = {words: [text for text in given if not text.startswith("teacher.offload=")]
                    for words, given in chosen.items()}
            if bare != chosen and (enough := plans.possible(bare)) is not None and fits(enough, gpu_memory):
                chosen = bare
    names = list(chosen)
    return [Step(name, chosen[name], plans.with_({other: chosen[other] for other in names[: number + 1]}))
            for number, name in enumerate(names)]


@dataclass
class Card:
    """What makes a run fit on cards of one size.

    Attributes:
        memory: of a card, GiB.
        plan: of one process, with everything that helps; ``fits`` says whether that is enough.
        overrides: settings to add.
        gpus: cards over which FSDP2 (configs/accelerate/fsdp2.yaml) cuts what trains; 1: it is not used.
    """

    memory: float
    plan: Plan
    overrides: list[str]
    gpus: int = 1

    @property
    def fits(self) -> bool:
        return fits(self.plan, self.memory)


def on_cards(
    path: str | os.PathLike[str], overrides: Sequence[str], plan: Plan, memories: Sequence[float]
) -> list[Card]:
    """What makes a run fit on cards of each size: options on one card, then, of a method that can be cut, FSDP2 over
    the fewest cards of a machine, without the options that change what is learned before with them."""
    plans, found = Plans(path, overrides, plan), []
    for memory in memories:
        steps = advise(path, overrides, plan, memory, plans)
        chosen = {step.words: step.overrides for step in steps}
        card = Card(memory, steps[-1].plan if steps else plan, _joined(chosen))
        # Some moments of 8 bits need whole weights, and an average is cut as its weights are.
        whole = {words: given for words, given in chosen.items() if words not in (AVERAGE, EIGHT_BITS)}
        kept = {words: given for words, given in whole.items() if words not in LEARNED}
        small = {EIGHT_BITS: _small_moments_in_parts(plan.config)}
        several = (_cut(plans, given | more, memory, gpus) for given in (kept, whole) for gpus in GPUS
                   for more in ({}, small))
        found.append(card if card.fits else next((other for other in several if other is not None), card))
    return found


def _cut(plans: Plans, chosen: Mapping[str, Sequence[str]], memory: float, gpus: int) -> Card | None:
    """The card, where the run fits on so many with FSDP2; the batch stays what it is."""
    plan = plans.possible(chosen)
    if plan is None:
        return None
    train = plan.config.train
    parts = train.gradient_accumulation
    share = parts // gpus if parts % gpus == 0 else parts
    if not plan.can_be_cut or train.batch_size // share % gpus:
        return None
    plan = replace(plan, gpus=gpus)
    given = [text for text in _joined(chosen) if not text.startswith("train.gradient_accumulation=")]
    given += [] if share == parts and given == _joined(chosen) else [f"train.gradient_accumulation={share}"]
    return Card(memory, plan, given, gpus) if fits(plan, memory) else None


def _joined(chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """All overrides, of each setting the last one."""
    last = {text.partition("=")[0]: text for given in chosen.values() for text in given}
    return list(last.values())


class Plans:
    """The plans of a configuration with some options on top, each made once."""

    def __init__(self, path: str | os.PathLike[str], overrides: Sequence[str], plan: Plan) -> None:
        self.path, self.overrides, self.known = path, list(overrides), {frozenset[str](): plan}

    def possible(self, chosen: Mapping[str, Sequence[str]]) -> Plan | None:
        """The same; None where a run would refuse these options together."""
        try:
            return self.with_(chosen)
        except UserError:
            return None

    def with_(self, chosen: Mapping[str, Sequence[str]]) -> Plan:
        added = _joined(chosen)
        if frozenset(added) not in self.known:
            keys = {text.partition("=")[0] for text in added}
            kept = [text for text in self.overrides if text.partition("=")[0] not in keys]
            config = load_config(self.path, [*kept, *added])
            alike = (moved(plan, config) for plan in self.known.values())
            self.known[frozenset(added)] = next(filter(None, alike), None) or make_plan(config)
        return self.known[frozenset(added)]
