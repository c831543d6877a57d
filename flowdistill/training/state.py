"""Networks and optimisers as named tensors on the CPU, whole even when they are sharded, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flowdistill.utils.errors import UserError

TABLE = "qmap"
"""How the names of tables begin that bitsandbytes' parameters share: what a code of 8 bits means."""

# torch.distributed.checkpoint's state dictionaries are not used for optimisers: reading the state of one that has not
# stepped yet makes a step (its count becomes 1), and a parameter without state cannot be loaded.


def network_tensors(network: nn.Module, trained: nn.Module | None = None) -> dict[str, Tensor]:
    """What a network does not get from elsewhere: the parameters that train, and the buffers it saves.

    ``trained`` tells which parameters train, when ``network`` is a frozen copy of it.
    """
    frozen = {name for name, p in (trained or network).named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, counters: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>/<key>``, and ``counters`` of its groups as ``#<number>/<key>``; no state
    before its first step. Numbers of Python's are 0-d, of 64 bits, as no optimiser has tensors. An optimiser with
    tensors of a class of its own says what they consist of (``plain_state``, ``assign_state``)."""
    plain = getattr(optimizer, "plain_state", lambda parameter: optimizer.state.get(parameter, {}))
    states = {
        f"{name}/{key}": _as_tensor(value)
        for name, parameter in network.named_parameters()
        for key, value in plain(parameter).items()
    }
    groups = {
        f"#{number}/{key}": _as_tensor(group[key])
        for number, group in enumerate(optimizer.param_groups)
        for key in counters
        if key in group
    }
    return states | groups


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _number(value: Tensor) -> float | None:
    """The number of Python's that a tensor was made of; None for one that was a tensor."""
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else None


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU. All processes must call this; those that do not ``keep`` get an empty dictionary."""
    whole: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if not keep:
            continue
        value = value.cpu().contiguous()
        # safetensors refuses tensors that share memory (tied weights).
        shared = value.untyped_storage().data_ptr() in storages
        whole[name] = value.clone() if shared else value
        storages.add(whole[name].untyped_storage().data_ptr())
    return whole


@torch.no_grad()
def assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Copy ``values`` into ``targets``; UserError unless names and shapes are the same."""
    if targets.keys() != values.keys():
        odd = sorted(targets.keys() ^ values.keys())
        side = "is missing there" if odd[0] in targets else "is not in the network"
        raise UserError(f"{what} does not fit: {odd[0]} {side}")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise UserError(
                f"{what} does not fit: {name} has the shape {tuple(values[name].shape)} there and "
                f"{tuple(target.shape)} in the network"
            )
        target.copy_(_like(values[name], target))


@torch.no_grad()
def assign_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    optimizer.state.clear()
    parameters = dict(network.named_parameters())
    own: dict[str, dict[str, Tensor]] = {}
    tables: dict[str, Tensor] = {}
    for name, value in values.items():
        owner, _, key = name.rpartition("/")
        number = _number(value)
        if owner.startswith("#"):
            group = optimizer.param_groups[int(owner[1:])]
            group[key] = value.to(group["params"][0].device) if number is None else number
            continue
        parameter = parameters[owner]
        if hasattr(optimizer, "assign_state"):
            own.setdefault(owner, {})[key] = value
        elif number is not None:
            optimizer.state[parameter][key] = number
        elif key.startswith(TABLE):
            table = tables.setdefault(key, value.to(parameter.device))
            optimizer.state[parameter][key] = table if torch.equal(table.cpu(), value) else value.to(parameter.device)
        elif hasattr(optimizer, "get_state_buffer") and value.shape == parameter.shape:
            # bitsandbytes makes its moments itself: those of a paged optimiser are memory of another kind.
            optimizer.state[parameter][key] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
        else:
            # The step count is a scalar of its own; the moments are placed like their parameter, or a part of them is.
            like = value.shape == parameter.shape
            placed = _like(value, parameter) if like else value.to(parameter.device)
            optimizer.state[parameter][key] = placed.clone()
    for owner, state in own.items():
        cast(Any, optimizer).assign_state(parameters[owner], state)


def _like(value: Tensor, target: Tensor) -> Tensor:
    value = value.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value
