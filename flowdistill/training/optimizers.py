"""Optimisers by name: what makes each, what it needs, what it keeps beside the weights.

| name | bytes a parameter | from |
|---|---|---|
| adamw | 8 | torch, the fused kernel |
| adamw8bit, paged_adamw8bit | 2.03 | bitsandbytes: moments in blocks of 256 (Dettmers et al., arXiv 2110.02861) |
| ao_adamw8bit | 2.03 to 2.5 | torchao: the same in blocks of rows, see :mod:`flowdistill.training.sharded_moments` |
| adafactor | about 0: a row and a column of a matrix | torch (Shazeer and Stern, arXiv 1804.04235) |
| muon | 4 of linear layers, 8 of the rest, which AdamW trains | torch (Jordan et al., 2024; Liu et al., 2502.16982) |
| lion | 4 | pytorch-optimizer (Chen et al., arXiv 2302.06675) |
| prodigy | 16 | pytorch-optimizer (Mishchenko and Defazio, arXiv 2306.06101) |
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.config import OptimizerConfig
from flowdistill.training import sharded_moments
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import log_once, quiet_libraries

FLOAT = 4
"""Bytes of a float32."""
BLOCK, SMALLEST_IN_BLOCKS, CODES = 256, 4096, 256
"""Of bitsandbytes' 8-bit moments: numbers that share a scale, the smallest tensor that is cut so, and numbers of the
table that says what a code means."""


@dataclass(frozen=True)
class Package:
    """What an optimiser comes from besides torch.

    Attributes:
        module: what is imported.
        name: what is installed.
        extra: of flowdistill, which brings it.
        series: the beginning of the versions that will do; empty: all that pip lets in.
    """

    module: str
    name: str
    extra: str = "optimizers"
    series: str = ""


@dataclass(frozen=True)
class Kind:
    """An optimiser.

    Attributes:
        make: from the network and its settings; of its parameters those that train.
        state_bytes: of the network's parameters that have gradients, what it keeps once it has stepped.
        package: None for torch's own.
        shards: whether it trains weights that FSDP2 has cut.
        counters: what it writes into its groups, and goes on from.
    """

    make: Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer]
    state_bytes: Callable[[nn.Module, Sequence[Tensor]], int]
    package: Package | None = None
    shards: bool = False
    counters: tuple[str, ...] = ()


class Several(torch.optim.Optimizer):
    """Optimisers that share a network's parameters among them, as one: their groups, their states and their step."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = list(parts)
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch overloads it for closures
        for part in self.parts:
            part.step()


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser ``config`` names, of the parameters of ``network`` that train.

    Raises:
        UserError: its package is not installed, or torch is too old for it.
    """
    kind = KINDS[config.name]
    check_package(config)
    return kind.make(network, config)


def check_package(config: OptimizerConfig) -> None:
    """Refuse an optimiser whose package is missing or of another version; nothing is imported.

    Raises:
        UserError: so, with the command that installs it.
    """
    package = KINDS[config.name].package
    if package is not None and find_spec(package.module) is None:
        raise UserError(f"the optimiser {config.name} needs the package {package.name}, which is not installed: "
                        f"pip install 'flowdistill[{package.extra}]'")
    if package is not None and not (found := version(package.name)).startswith(
            package.series):
        raise UserError(f"the optimiser {config.name} needs {package.name} {package.series}x, and {found} is installed"
                        f": pip install 'flowdistill[{package.extra}]'")
    if config.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"the optimiser muon needs torch 2.9 or later, and this is {torch.__version__}; choose another "
                        "one, or pip install -U torch")


def check_shards(config: OptimizerConfig, role: str) -> None:
    """UserError for an optimiser that FSDP2's shares of weights are not enough for."""
    if not KINDS[config.name].shards:
        able = ", ".join(name for name, kind in KINDS.items() if kind.shards)
        raise UserError(f"the optimiser of the role '{role}' is {config.name}, which needs whole weights, and FSDP "
                        f"cuts them; choose one of {able}, or start several processes with whole networks (MULTI_GPU)")


def optimizers_by_key(settings: object, prefix: str) -> Iterable[tuple[str, OptimizerConfig]]:
    """(full key, settings) of the optimisers of a method, those of a host method included."""
    for item in fields(settings) if is_dataclass(settings) else ():
        value = getattr(settings, item.name)
        if isinstance(value, OptimizerConfig):
            yield f"{prefix}{item.name}", value
        else:
            yield from optimizers_by_key(value, f"{prefix}{item.name}.")


def forget(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Start anew from the weights as they are: no moments, no counts."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for key in KINDS[config.name].counters:
            group.pop(key, None)
            if key in optimizer.defaults:
                group[key] = optimizer.defaults[key]


# --- the kinds


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    first, second = config.chosen_betas
    return first, second


def _adamw(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """With the fused kernel, which exists on CPU, CUDA, MPS and XPU and can skip a step on the device."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=_betas(config),
        eps=config.chosen_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw_bytes(network: nn.Module, reached: Sequence[Tensor]) -> int:
    return sum(2 * FLOAT * p.numel() + FLOAT for p in reached)  # two moments, and a count


def _eight_bits(name: str) -> Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer]:
    def make(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        with quiet_libraries():
            library = importlib.import_module("bitsandbytes.optim")
        # On the CPU, where there are no pages, it says at the first step that it makes none.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        kind = getattr(library, name)
        return kind(_trained(network), lr=config.lr, betas=_betas(config), eps=config.chosen_eps,
                    weight_decay=config.weight_decay, min_8bit_size=SMALLEST_IN_BLOCKS)

    return make


def _eight_bit_bytes(network: nn.Module, reached: Sequence[Tensor]) -> int:
    whole = sum(2 * FLOAT * p.numel() for p in reached if p.numel() < SMALLEST_IN_BLOCKS)
    cut = [p.numel() for p in reached if p.numel() >= SMALLEST_IN_BLOCKS]
    tables = 2 * FLOAT * CODES if cut else 0
    return whole + tables + sum(2 * (n + FLOAT * math.ceil(n / BLOCK)) for n in cut)


def _adafactor(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(_trained(network), lr=config.lr, weight_decay=config.weight_decay)


def _adafactor_bytes(network: nn.Module, reached: Sequence[Tensor]) -> int:
    return sum(FLOAT * (1 + (p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]))
               for p in reached)


def _matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers that train: what Muon is for, unlike tables of embeddings and convolutions."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    found: dict[int, Any] = {id(layer.weight): layer.weight for layer in layers if layer.weight.requires_grad}
    return list(found.values())


def _muon(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    matrices = _matrices(network)
    known = {id(p) for p in matrices}
    rest = [p for p in _trained(network) if id(p) not in known]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, config)] if rest else []
    if matrices:
        # Steps as large as AdamW's, so that both go by one learning rate and one decay.
        parts.insert(0, torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay,
                                         adjust_lr_fn="match_rms_adamw"))
    return Several(parts)


def _muon_bytes(network: nn.Module, reached: Sequence[Tensor]) -> int:
    known = {id(p) for p in _matrices(network)}
    rest = [p for p in reached if id(p) not in known]
    return sum(FLOAT * p.numel() for p in reached if id(p) in known) + _adamw_bytes(network, rest)


def _lion(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    library = importlib.import_module("pytorch_optimizer")
    return library.Lion(_trained(network), lr=config.lr, betas=_betas(config), weight_decay=config.weight_decay)


def _prodigy(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.lr < 0.1:
        log_once(f"prodigy finds the learning rate by itself and takes lr as a factor of it, which is {config.lr:g} "
                 "here; its authors leave it at 1")
    library = importlib.import_module("pytorch_optimizer")
    return library.Prodigy(_trained(network), lr=config.lr, betas=_betas(config), eps=config.chosen_eps,
                           weight_decay=config.weight_decay)


def _each(count: int) -> Callable[[nn.Module, Sequence[Tensor]], int]:
    """So many float32 numbers a parameter."""
    return lambda network, reached: count * FLOAT * sum(p.numel() for p in reached)


BITSANDBYTES = Package("bitsandbytes", "bitsandbytes")
TORCHAO = Package("torchao", "torchao", "torchao", "0.18.")
PYTORCH_OPTIMIZER = Package("pytorch_optimizer", "pytorch-optimizer")
KINDS = {
    "adamw": Kind(lambda network, config: _adamw(_trained(network), config), _adamw_bytes, shards=True),
    "adamw8bit": Kind(_eight_bits("AdamW8bit"), _eight_bit_bytes, BITSANDBYTES),
    "paged_adamw8bit": Kind(_eight_bits("PagedAdamW8bit"), _eight_bit_bytes, BITSANDBYTES),
    "ao_adamw8bit": Kind(sharded_moments.make, sharded_moments.state_bytes, TORCHAO, shards=True),
    "adafactor": Kind(_adafactor, _adafactor_bytes),
    "muon": Kind(_muon, _muon_bytes),
    "lion": Kind(_lion, _each(1), PYTORCH_OPTIMIZER, shards=True, counters=("step",)),
    "prodigy": Kind(_prodigy, _each(4), PYTORCH_OPTIMIZER, counters=("step", "d", "d_max", "d_numerator")),
}
"""By ``optimizer.name``: the names of :data:`flowdistill.config.schema.OPTIMIZERS`."""
