"""Copies of networks."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

python_deepcopy = copy.deepcopy
"""Python's own, also where ``quick_deepcopy`` stands in for it."""

_UNCHANGEABLE = frozenset((bool, int, float, str, type(None), type, torch.dtype, torch.device, torch.Size,
                           types.FunctionType))
_CONTAINERS = frozenset((dict, OrderedDict, set, list))


def copied(module: M, shared: Mapping[int, object] | None = None) -> M:
    """What ``copy.deepcopy(module, dict(shared))`` returns, in a third of its time.

    Python copies each attribute of each module by itself, and every module has a dozen empty tables of hooks. Here only
    those that could change are copied. Modules that copy themselves in a way of their own, and everything that is no
    module, are left to ``copy.deepcopy``.

    Args:
        module: a network with all that it is made of.
        shared: id -> what stands for the object with that id in the copy: itself, where both are to have it.
    """
    return _copied_into(module, dict(shared or {}))


def quick_deepcopy(x: Any, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy``, of networks as ``copied`` makes them."""
    if isinstance(x, nn.Module):
        return _copied_into(x, {} if memo is None else memo)
    return python_deepcopy(x, memo)


def _copied_into(module: M, memo: dict[int, Any]) -> M:
    if id(module) in memo:
        return cast(M, memo[id(module)])
    made = []
    for part in module.modules():
        if id(part) not in memo and _is_plain(type(part)):
            memo[id(part)] = new = type(part).__new__(type(part))
            made.append((part, new))
    for part, new in reversed(made):  # only now, for an attribute may hold any of them; the inner ones first
        new.__setstate__({name: _copied(value, memo) for name, value in vars(part).items()})
    return python_deepcopy(module, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _UNCHANGEABLE or kind is tuple and all(type(one) in _UNCHANGEABLE for one in value):
        return value
    return kind() if kind in _CONTAINERS and not value else python_deepcopy(value, memo)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are copied as most objects are: a new one with copies of the attributes."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__",
           "__slots__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)
