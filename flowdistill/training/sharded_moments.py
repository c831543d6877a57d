"""AdamW with moments of 8 bits that FSDP2 may cut: torchao's, in blocks that do not depend on who has which rows.

torchao cuts what a process has of a tensor into blocks of 256 numbers with a scale each, so that blocks depend on the
number of processes, even whether there are any. Here a block never reaches over the end of a row (of the first
dimension, along which FSDP2 cuts), and a tensor has blocks or not by its whole size. So moments are the same numbers on
any number of processes, and a checkpoint of theirs fits every other number.

Codes and scales: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flowdistill.config import OptimizerConfig
from flowdistill.utils.logging import quiet_libraries

SMALLEST = 4096
"""Numbers of the smallest tensor that is cut into blocks, as in bitsandbytes and torchao."""
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
"""Numbers that share a scale, at most and at least: with fewer the scales would weigh as much as what they save."""
CODES, SCALES = "codes", "scales"
"""Ends of the names of a moment's two plain tensors."""
SIGNED = "exp_avg"
"""The moment that has a sign."""
FLOAT, TABLE = 4, 256
"""Bytes of a float32; numbers of the table that says what a code means, of which each moment has one."""


def block(shape: Sequence[int]) -> int:
    """How many numbers share a scale: the largest power of two up to 256 that divides a row; 0: none do."""
    row = math.prod(shape[1:])
    largest = math.gcd(row, LARGEST_BLOCK)
    return largest if len(shape) > 1 and shape[0] * row >= SMALLEST and largest >= SMALLEST_BLOCK else 0


def state_bytes(network: nn.Module, reached: Sequence[Tensor]) -> int:
    """Of the parameters that have gradients, what the two moments and the count take."""
    total = 0
    for parameter in reached:
        size, numbers = block(parameter.shape), parameter.numel()
        moment = numbers + FLOAT * (numbers // size + TABLE) if size else FLOAT * numbers
        total += 2 * moment + FLOAT
    return total


def make(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of the parameters of ``network`` that train."""
    first, second = config.chosen_betas
    return _kind()([p for p in network.parameters() if p.requires_grad], lr=config.lr, betas=(first, second),
                   eps=config.chosen_eps, weight_decay=config.weight_decay)


@functools.cache
def _kind() -> Any:
    """torchao's class with blocks of ours; made where it is asked for, because the package may be missing."""
    # Of its compiled steps, which torch then keeps no file of.
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    with quiet_libraries():
        library: Any = importlib.import_module("torchao.optim")
        codes: Any = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit

    class ShardedAdamW8bit(library.AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            here = _local(p)
            size = block(p.shape)
            # A process that has none of the rows has no block either.
            if size and here.numel():
                return _placed(codes.zeros(here.shape, signed, size, here.device, here.dtype), p)
            return _placed(torch.zeros_like(here), p)

        def step(self, closure: Any = None) -> Any:
            # torchao compiles a function a shape, which on the CPU takes a C++ compiler and many seconds each.
            compiled = any(p.device.type != "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("default" if compiled else "force_eager"):
                return super().step(closure)

        @torch.no_grad()
        def plain_state(self, parameter: Tensor) -> dict[str, Tensor]:
            """What it keeps of a parameter as tensors of torch's, cut as the parameter is."""
            plain = {}
            for key, value in self.state.get(parameter, {}).items():
                if value.shape != parameter.shape or not block(parameter.shape):
                    plain[key] = value
                    continue
                here, whole = _local(value), _scales(parameter.shape)
                codes, scales = (here.codes, here.scale) if here.numel() else (here.byte(), here)
                plain[f"{key}.{CODES}"] = _placed(codes, parameter)
                plain[f"{key}.{SCALES}"] = _placed(scales.view(len(here), whole[1]), parameter, whole)
            return plain

        @torch.no_grad()
        def assign_state(self, parameter: Tensor, plain: Mapping[str, Tensor]) -> None:
            """Put back what ``plain_state`` gave, of whole tensors; all processes take part."""
            state: dict[str, Tensor] = {}
            for key, value in plain.items():
                name, _, part = key.rpartition(".")
                if part not in (CODES, SCALES):
                    state[key] = (_cut(value, parameter) if value.shape == parameter.shape else value).clone()
                    continue
                if name not in state:
                    state[name] = self._new_buffer(parameter, signed=name == SIGNED)
                mine, moment = _local(_cut(value, parameter)), _local(state[name])
                if moment.numel():
                    target = moment.codes if part == CODES else moment.scale
                    target.copy_(mine.view_as(target))
            self.state[parameter] = state

    return ShardedAdamW8bit


def _scales(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:]) // block(shape)


def _local(value: Tensor) -> Any:
    """What this process has of a tensor: one of torch's, or codes with their scales."""
    return value.to_local() if isinstance(value, DTensor) else value


def _placed(here: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """This process's part of a tensor that is cut as ``like`` is; of its shape, or of ``shape``."""
    if not isinstance(like, DTensor):
        return here
    whole = torch.Size(like.shape if shape is None else shape)
    stride = torch.empty(whole, device="meta").stride()
    placed = DTensor.from_local(here, like.device_mesh, like.placements, run_check=False, shape=whole, stride=stride)
    return placed.to(like.device)  # weights that FSDP2 keeps on the CPU are not on their mesh's device


def _cut(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
