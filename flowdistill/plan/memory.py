"""The memory of one training process, counted on the meta device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn

from flowdistill.conditioning.prompt_bank import LIVE_BYTES
from flowdistill.config import RunConfig
from flowdistill.plan.meta_teacher import (
    META,
    Architecture,
    has_prompts,
    meta_teacher,
    read_architecture,
    text_encoder_size,
)
from flowdistill.plan.simulation import Live, simulated, teacher_like_a_gpu
from flowdistill.teachers import Teacher
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.loading import DTYPES
from flowdistill.training.average import MovingAverage
from flowdistill.training.fsdp import units
from flowdistill.training.method import Method, NetworkCall
from flowdistill.training.optimizers import KINDS, optimizers_by_key
from flowdistill.training.precision import resolve_precision
from flowdistill.training.roles import check_not_shared
from flowdistill.training.run import method_class
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import parameter_count
from flowdistill.utils.randomness import Draw, seed_torch
from flowdistill.utils.text import JsonObject

LISTED_BYTES = 24
"""Of a prompt in a list that is not in memory: its place in a file, its weight, and the running sum of the weights."""
UNIT = 1_000_000
"""Parameters above which configs/accelerate/fsdp2.yaml cuts a module by itself."""


@dataclass
class Part:
    """One network and what training keeps beside it; bytes.

    Attributes:
        parameters: its numbers, those that it shares with an earlier part included.
        weights: its own weights and buffers: none that an earlier part has.
        average_elsewhere: of an average that rests on ``train.ema_device``, and so takes no memory of the device.
        cut: of a role, what FSDP2 would cut into one part a process: network and average with all that they share.
        gathered: what of it would be whole at a time (an estimate): the outermost module, and of the largest inner one
            the weights, those of the next one, which come early, and the gradients.
        moments: of a role, what each optimiser by its name would keep.
    """

    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    average_elsewhere: int = 0
    cut: int = 0
    gathered: int = 0
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def lasting(self) -> int:
        """Bytes that stay from step to step: gradients are dropped after each update."""
        return self.weights + self.optimizer + self.average


@dataclass
class PromptStore:
    """Where the encoded prompts of a run come from.

    Attributes:
        mode: ``memory``, ``disk`` or ``live``.
        count: prompts of the list; None where its file is not here.
        row: bytes of one encoded prompt, of the longest where they differ.
        ragged: whether they differ.
        encoders: bytes of text encoders that stay loaded; 0: none do; None: some do, whose sizes are not known here.
        encoder_parameters: of these.
        on_device: whether these are on the device that trains.
    """

    mode: str
    count: int | None
    row: int
    ragged: bool
    encoders: int | None = 0
    encoder_parameters: int = 0
    on_device: bool = True

    @property
    def memory(self) -> int:
        """Bytes of host memory, text encoders apart: at most, where rows differ."""
        count = self.count or 0
        if self.mode == "memory":
            return count * self.row
        return count * LISTED_BYTES + (LIVE_BYTES if self.mode == "live" else 0)

    @property
    def disk(self) -> int:
        """Bytes of the cache: at most, where rows differ."""
        return 0 if self.mode == "live" else (self.count or 0) * self.row


@dataclass
class Plan:
    """What a run takes.

    Attributes:
        config, architecture: what was planned.
        parts: ``teacher``, ``autoencoder`` (where there is one), every role, and ``other networks`` of the method.
        activations: by role, what its update takes beyond its gradients at the worst moment (estimated).
        forward: by role, what it takes before the backward pass, in which a teacher that rests on the CPU is away.
        decodes: whether a loss calls the autoencoder.
        shards: whether the method can be trained with FSDP2.
        settings: by role, the key of its optimiser's settings.
        adapters: whether networks that train stand on the teacher's own weights.
        teacher: on the meta device.
        gpus: over how many processes FSDP2 cuts the weights that train; 1: nothing is cut.
        rows: of a micro-batch.
        updates: how often each role is updated in a step, at the end of the training.
        calls: by role, how often an update calls the student without a gradient besides.
        prompts: None for a teacher without prompts.
        unknown: why there is no estimate of the activations; then every weight that trains counts as having a gradient.
    """

    config: RunConfig
    architecture: Architecture
    parts: dict[str, Part]
    rows: int
    updates: dict[str, int] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    unknown: str | None = None
    prompts: PromptStore | None = None
    forward: dict[str, int] = field(default_factory=dict)
    decodes: bool = True
    shards: bool = True
    gpus: int = 1
    settings: dict[str, str] = field(default_factory=dict)
    adapters: bool = False
    teacher: Teacher | None = field(default=None, compare=False)

    @property
    def can_be_cut(self) -> bool:
        """Whether FSDP2 takes the method, its optimisers, its averages, which must be beside their weights, and its
        adapters, which must not be on codes."""
        config, optimizers = self.config, optimizers_by_key(self.config.method, "method.")
        whole = any(not KINDS[optimizer.name].shards for _, optimizer in optimizers)
        on_codes = self.adapters and config.teacher.quantize is not None
        return self.shards and not whole and not on_codes and config.train.ema_device is None

    @property
    def peak(self) -> int:
        """Bytes of a process at the worst moment: what lasts, and one update's gradients and activations.

        What rests on the CPU (``teacher.offload``) counts where a loss asks it: the autoencoder during the whole of it,
        the teacher's network during the forward pass alone.
        """
        offload, n = self.config.teacher.offload, self.gpus
        lasting = {name: part.lasting for name, part in self.parts.items()}
        if n > 1:
            lasting |= {name: (part.cut + part.optimizer) // n for name, part in self.parts.items() if part.cut}
        if offload != "none" and not self.decodes and "autoencoder" in lasting:
            lasting["autoencoder"] = 0
        whole = max(part.gathered for part in self.parts.values()) if n > 1 else 0
        stays, teacher = sum(lasting.values()) + whole, lasting["teacher"]
        moments = []
        for name, part in self.parts.items():
            gradients, activations = part.gradients // n, self.activations.get(name, 0)
            if offload != "all" or self.unknown is not None:
                moments.append(stays + gradients + activations)
                continue
            kept = gradients if self.config.train.gradient_accumulation > 1 else 0  # of the micro-batches before
            moments += [stays - teacher + gradients + activations, stays + kept + self.forward.get(name, 0)]
        return max(moments)


def make_plan(config: RunConfig) -> Plan:
    """Count a run's memory without loading it.

    Raises:
        UserError: the pipeline's configurations are not here, or the method refuses them.
    """
    architecture = read_architecture(config.teacher.source, config.teacher.variant)
    teacher = meta_teacher(config.teacher, architecture)
    precision = resolve_precision(config.train.precision, META)
    seed_torch(config.seed)
    try:
        method = method_class(config.method.name)(config.method, teacher).to(META)
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"the method {config.method.name} needs the teacher's weights to be built with these settings, "
                        f"so it cannot be planned ({reason})") from error
    roles = method.roles()
    teacher.offload = config.teacher.offload  # only now: nothing of it moves here
    check_not_shared(teacher, [role.network for role in roles.values()])
    own = {id(p) for p in teacher.network.parameters()}
    seen: set[int] = set()
    parts = {"teacher": _part(teacher.network, seen)}
    if any(True for _ in teacher.codec.parameters()):
        parts["autoencoder"] = _part(teacher.codec, seen)
    store = _prompt_store(config, teacher, architecture)
    if store is not None and store.encoders and store.on_device:
        parts["text encoders"] = Part(store.encoder_parameters, store.encoders)
    for name, role in roles.items():
        parts[name] = _part(role.network, seen)
    averages = {name: MovingAverage(role.network, config.train.ema_decay, config.train.ema_warmup)
                for name, role in roles.items() if role.ema}
    for name, average in averages.items():
        size = _bytes(_tensors(average.network), seen)
        if config.train.ema_device is None:
            parts[name].average = size
        else:
            parts[name].average_elsewhere = size
    for name, role in roles.items():
        parts[name].cut = _bytes(_tensors(role.network)) + (
            _bytes(_tensors(averages[name].network)) if name in averages else 0)
        parts[name].gathered = _gathered(role.network)
    others = [module for module in _modules(method) if _bytes(_tensors(module), set(seen))]
    if others:
        parts["other networks"] = _part(nn.ModuleList(others), seen)
    rows = config.train.batch_size // config.train.gradient_accumulation
    plan = Plan(config, architecture, parts, rows, dict(Counter(method.schedule(max(0, config.train.steps - 1)))),
                prompts=store, decodes=False, shards=method.shards, teacher=teacher)
    networks = {name: role.network for name, role in roles.items()}
    plan.adapters = any(id(p) in own for network in networks.values() for p in network.parameters())
    keys = {id(settings): key for key, settings in optimizers_by_key(config.method, "method.")}
    plan.settings = {name: keys[id(role.optimizer)] for name, role in roles.items() if id(role.optimizer) in keys}
    plan.calls = {name: method.calls_without_gradient(name) for name in networks}
    calls = simulated(networks, precision, config.train.gradient_checkpointing)
    for name, network in networks.items():
        if name not in plan.updates and name not in method.schedule(0):  # it follows another one
            continue
        try:
            with _watched(teacher.codec) as asked:
                plan.activations[name], plan.forward[name] = _update(method, name, calls, config, plan.rows)
            plan.decodes |= bool(asked)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):  # how torch words that a value was asked for
                raise
            plan.unknown = str(error).splitlines()[0][:150]
        # Gradients and moments are made for the weights that the loss reaches.
        reached = [p for p in network.parameters() if p.requires_grad and (p.grad is not None or plan.unknown)]
        parts[name].gradients = _bytes(reached)
        parts[name].moments = {each: kind.state_bytes(network, reached) for each, kind in KINDS.items()}
        parts[name].optimizer = parts[name].moments[roles[name].optimizer.name]
        for other in networks.values():
            other.zero_grad(set_to_none=True)
    return plan


def moved(plan: Plan, config: RunConfig) -> Plan | None:
    """The plan of a configuration that differs from a plan's in its optimisers, and in where frozen parts and averages
    rest, which no update sees; None for any other, which must be counted anew."""
    if _of_updates(plan.config) != _of_updates(config) or plan.adapters and config.teacher.offload == "all":
        return None
    optimizers = dict(optimizers_by_key(config.method, "method."))
    roles = {name: part for name, part in plan.parts.items() if part.moments}
    if roles.keys() - plan.settings.keys():
        return None
    names = {name: optimizers[plan.settings[name]].name for name in roles}
    parts = {}
    for name, part in plan.parts.items():
        average, here = part.average + part.average_elsewhere, config.train.ema_device is None
        parts[name] = replace(part, optimizer=part.moments[names[name]] if name in names else part.optimizer,
                              average=average if here else 0, average_elsewhere=0 if here else average)
    return replace(plan, config=config, parts=parts)


def _of_updates(config: RunConfig) -> JsonObject:
    """The settings that updates depend on."""
    values = asdict(config)
    del values["teacher"]["offload"], values["train"]["ema_device"]
    for key, _ in optimizers_by_key(config.method, "method."):
        section = values
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        del section[last]
    return values


def words(config: RunConfig) -> str:
    """The type of the text encoders."""
    return config.teacher.text_encoder_dtype or config.teacher.dtype


def _prompt_store(config: RunConfig, teacher: Teacher, architecture: Architecture) -> PromptStore | None:
    prompts = teacher.prompts
    if prompts is None or prompts.row_bytes is None:
        return None
    count = len(prompts.prompts or ()) if has_prompts(config.teacher) else None
    store = PromptStore(prompts.mode, count, prompts.row_bytes, prompts.family.ragged)
    if store.mode == "live":
        size = text_encoder_size(architecture, DTYPES[words(config)], config.teacher.text_encoder_quantize)
        store.encoder_parameters, store.encoders = (0, None) if size is None else size
        device = config.teacher.text_encoder_device
        store.on_device = device is None or device != "cpu"
    return store


@contextlib.contextmanager
def _watched(codec: PixelCodec | VaeCodec) -> Iterator[list[str]]:
    """A block in which the list gets a name for each call of the autoencoder."""
    asked: list[str] = []
    if not isinstance(codec, VaeCodec):
        yield asked
        return

    def noting(name: str) -> Callable[..., object]:
        call = getattr(codec.vae, name)

        def noted(*args: object, **kwargs: object) -> object:
            asked.append(name)
            return call(*args, **kwargs)

        return noted

    for name in ("encode", "decode"):
        setattr(codec.vae, name, noting(name))
    try:
        yield asked
    finally:
        del codec.vae.encode, codec.vae.decode


def _gathered(network: nn.Module) -> int:
    """See :class:`Part`."""
    inside: set[int] = set()
    sizes = [_bytes(module.parameters(), inside) for module in units(network, UNIT)]
    return _bytes(network.parameters(), inside) + 3 * max(sizes, default=0)


def _update(
    method: Method, role: str, calls: dict[str, NetworkCall], config: RunConfig, rows: int
) -> tuple[int, int]:
    """Bytes that an update of ``role`` takes at its worst moment beyond its gradients, and before its backward pass."""
    draw = Draw(config.seed, 0, rows=rows, device=META)
    with teacher_like_a_gpu(method.teacher.network), Live() as live:
        loss, _ = method.loss(role, calls, draw)
        forward = live.peak()
        loss.backward()
        trained = [p for role in method.roles().values() for p in role.network.parameters() if p.grad is not None]
        numbers = frozenset(live.number(p.grad) for p in trained)
    if config.train.gradient_accumulation > 1:  # from the second micro-batch on, all gradients are there all the time
        return live.peak(without=numbers), forward
    # Gradients come while the rest goes: the two never have their full sizes at once.
    own = [p for p in method.roles()[role].network.parameters() if p.grad is not None]
    return max(0, live.peak() - _bytes(p.grad for p in own if p.grad is not None)), forward


def _part(module: nn.Module, seen: set[int]) -> Part:
    return Part(parameter_count(module), _bytes(_tensors(module), seen))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of storages that are not in ``seen``, each counted once."""
    known, total = set() if seen is None else seen, 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total


def _modules(value: object, depth: int = 2) -> list[nn.Module]:
    """Networks that a method keeps, directly or in an object of its own."""
    if isinstance(value, nn.Module):
        return [value]
    inner = vars(value).values() if depth and hasattr(value, "__dict__") else ()
    return [module for each in inner for module in _modules(each, depth - 1)]
