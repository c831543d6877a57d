"""A device that is not the CPU, in Python: what a GPU refuses it refuses, and what makes the host wait it writes down.

It has torch's dispatch key for devices of other makers (PrivateUse1) and is called ``python_device:0``. Each of its
tensors holds one on the CPU, on which every operation computes, so the numbers are the CPU's up to rounding; but
tensors of two devices do not mix, except for a single number of the CPU's (0-d), as on CUDA. The host waits, also as
on CUDA, for a number that is read (``.item()``, ``bool()``), a shape that depends on values (``nonzero``, a mask as
index), and a copy between host and device that is not ``non_blocking``. What is missing: pinned memory, streams,
forward-mode derivatives, and kernels of lower precision under autocast.

torch has it to the end of a process that has entered :func:`other_device` once.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree  # torch has no public name for it

from flowdistill.networks import velocity
from flowdistill.utils import quantized

NAME = "python_device"
CPU = torch.device("cpu")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
         "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::repeat_interleave"}
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TOGETHER = {"aten::cat", "aten::stack"}  # on CUDA not even single numbers of two devices
COPIED = {torch.tensor, torch.as_tensor}
RESIZED = {torch.arange, torch.linspace, torch.eye, torch.randperm}
# The bits of lazy views are not seen below the dispatcher's Python key.
PHYSICAL = {"aten::_conj": torch.ops.aten._conj_physical.default, "aten::_neg_view": torch.ops.aten.neg.default}
_watching: list[list[str]] = []


class Elsewhere(Tensor):
    """A tensor on ``python_device:0``; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        if id(self) not in memo:
            copy = Elsewhere(self.held.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held})"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    target = kwargs.get("device")
    outside = bool(away) if target is None else torch.device(target).type == NAME
    if name in COPIES:
        crosses = bool(here) if name == "aten::copy_" else bool(away) != outside
        if crosses and not kwargs.get("non_blocking") and (len(args) < 3 or not args[2]):
            _wait(name)
    elif away:
        _check_devices(name, args, here)
    if name in WAITS and away:
        _wait(name)
    plain_args, plain = pytree.tree_map(lambda leaf: leaf.held if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    if target is not None:
        plain["device"] = CPU
    func = PHYSICAL.get(name, func)
    out = func(*plain_args, **plain)
    given = {id(tensor.held): tensor for tensor in away}
    return pytree.tree_map(lambda leaf: leaf if not isinstance(leaf, Tensor) else given.get(
        id(leaf), Elsewhere(leaf) if outside else leaf), out)


def _check_devices(name: str, args: tuple[Any, ...], here: list[Tensor]) -> None:
    if name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Elsewhere) for index in indices):
            _wait(f"{name} by a mask or by indices of the host's")
        here = [tensor for tensor in here if not any(tensor is index for index in indices)]
    mixed = [tensor for tensor in here if tensor.ndim or name in TOGETHER]
    if mixed:
        raise RuntimeError(f"{name}: expected all tensors to be on {NAME}:0, but found one on the CPU, "
                           f"{tuple(mixed[0].shape)}")


def _wait(name: str) -> None:
    for watched in _watching:
        watched.append(f"{name.removeprefix('aten::')} in {_place()}")


def _place() -> str:
    """The line of flowdistill's that led there, and that of the library it called."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/flowdistill/" in file and "/site-packages/" not in file:
            return f"flowdistill/{file.rsplit('/flowdistill/', 1)[1]}:{frame.f_lineno}{library}"
        if not library and "/site-packages/" in file and "/torch/" not in file:
            library = f" (by {file.rsplit('/site-packages/', 1)[1]}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return f"a backward pass{library}"


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """A block whose waits of the host for the device are written down, with the line of flowdistill's that waits."""
    found: list[str] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


class _Made(TorchFunctionMode):
    """What torch makes and reads in C++ past the dispatcher, or in a size that it changes after."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            if func in COPIED:  # made on the host
                return func(*args, **kwargs | {"device": None}).to(torch.device(NAME, 0))
            if func in RESIZED:
                return Elsewhere(func(*args, **kwargs | {"device": CPU}))
        if func in (Tensor.tolist, Tensor.new_tensor) and isinstance(args[0], Elsewhere):
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(args[0].device)
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


class _Backend:
    """What torch asks the module of a device."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """Its random numbers are the CPU's, whose state torch keeps beside this one."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@contextlib.contextmanager
def other_device() -> Iterator[torch.device]:
    """A block in which there is the device."""
    _register()
    # Such parameters are no plain ones, as those that another library has quantised.
    swaps, kinds = torch.__future__.get_swap_module_params_on_conversion(), quantized.foreign_layers
    torch.__future__.set_swap_module_params_on_conversion(True)  # nn.Module.to keeps what ties parameters together
    for module in (quantized, velocity):
        module.foreign_layers = lambda network: []  # type: ignore[attr-defined]
    try:
        # torch starts its threads for devices at the first backward pass of a process, which may be over.
        with _Made(), torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        for module in (quantized, velocity):
            module.foreign_layers = kinds  # type: ignore[attr-defined]


@functools.cache
def _register() -> torch.library.Library:
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        pytest.skip(f"torch {torch.__version__} has no devices in Python")
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    return library  # which takes its kernels with it when it goes
