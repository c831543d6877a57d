"""One update on the meta device: the passes of a method, without numbers, while the memory of every tensor is counted.

Meta tensors have shapes, types and lifetimes and no content, so autograd keeps what it would keep. Two things that a
GPU does differently are put right: attention goes to a fused kernel, and half precision casts as autocast does.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flowdistill.networks.velocity import Around, VelocityNetwork
from flowdistill.training.method import NetworkCall
from flowdistill.training.precision import DTYPES

P = ParamSpec("P")

HALF = frozenset((
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm,
    torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
))
"""What autocast runs in half precision."""
SINGLE = frozenset((
    F.layer_norm, F.group_norm, F.softmax, F.rms_norm, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp, torch.pow,
    Tensor.pow, torch.rsqrt, Tensor.rsqrt,
))
"""What it runs in float32."""
REMEMBERED = 100_000
"""The most results that are remembered, in about 100 MB; those of a plan of Flux are 2,000."""


class GpuLike(TorchFunctionMode):
    """Meta tensors' functions as a GPU computes them.

    Args:
        dtype: of autocast; float32 for none.
        fused: whether attention is fused: it keeps its inputs, its output and a number a row, no matrix of weights.
    """

    def __init__(self, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        self.dtype, self.fused = dtype, fused

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and (func in HALF or func in SINGLE):
            wanted = self.dtype if func in HALF else torch.float32
            args, kwargs = _cast(wanted, args), _cast(wanted, kwargs)
        if func is F.scaled_dot_product_attention and self.fused:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    """An argument, or all of them, with tensors of another type of numbers as of ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if type(value) in (list, tuple):
        return type(value)([_cast(dtype, one) for one in value])
    if isinstance(value, dict):
        return {name: _cast(dtype, one) for name, one in value.items()}
    return value


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """The one fused kernel that meta tensors have on every machine; what it keeps is what the others keep. A mask is
    there already and changes no size."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, dim=-3) for x in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


class Live(TorchDispatchMode):
    """Counts the bytes of every storage of meta tensors that comes into being, and when it goes.

    torch finds most shapes of meta tensors in Python, which would take most of a plan's time. A network's blocks are
    alike, and so are the updates of a teacher's copies, in this plan and in the next one's of a search for what fits:
    what a function has made of arguments of the same shapes is remembered as long as the process lives.

    Attributes:
        events: (storage, bytes) in order of time: positive when it comes, negative when it goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._count = 0
        self._made = _remembered(torch.get_default_dtype())

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        key = _described((func, args, kwargs)) if _makes_new_tensors(func) else None
        remembered = self._made.get(key)
        if remembered is not None:
            out, old = _again(remembered), frozenset[int]()
        else:
            out = func(*args, **kwargs)
            # What a view or an addition in place returns was there: a weight, as its layer transposes it, before all.
            old = frozenset(x.untyped_storage()._cdata for x in _tensors((args, kwargs)))
            if key is not None:
                if len(self._made) >= REMEMBERED:
                    self._made.clear()
                self._made[key] = _layout(out, set(old))
        for tensor in _tensors(out):
            if tensor.is_meta and tensor.untyped_storage()._cdata not in old:
                self._note(tensor.untyped_storage())
        return out

    def number(self, tensor: Tensor) -> int | None:
        """Number of a tensor's storage in ``events``; None when it was there before."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._count += 1
        number = self._count
        self.events.append((number, size))

        def gone(_: object) -> None:
            self.events.append((number, -size))
            self._known.pop(key, None)

        self._known[key] = number, weakref.ref(storage, gone)

    def peak(self, without: frozenset[int] = frozenset()) -> int:
        """The most bytes alive at once, not counting some storages."""
        alive = highest = 0
        for number, size in self.events:
            if number not in without:
                alive += size
                highest = max(highest, alive)
        return highest


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors among a function's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Single(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Several(NamedTuple):
    kind: type[list[object]] | type[tuple[object, ...]]
    parts: list[_Layout]


_Layout: TypeAlias = "_Single | _Several"
"""What a function has returned: a tensor, or a list or tuple of them."""


@functools.cache
def _remembered(default: torch.dtype) -> dict[Hashable, _Layout | None]:
    """What functions have made, by function and arguments, while this was torch's default type."""
    return {}


@functools.cache
def _makes_new_tensors(func: OpOverload) -> bool:
    """Whether a function of torch says that it returns no view and changes no argument."""
    return not func.is_view and not func._schema.is_mutable


def _described(value: object) -> Hashable:
    """A key that is equal for tensors of equal layouts and types, and for other arguments that are equal."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg()
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value  # 1 == 1.0 == True, and types of results depend on it


def _layout(out: object, old: set[int]) -> _Layout | None:
    """What :func:`_again` makes the like of ``out`` from; None where it has more than meta tensors of new storages.

    Args:
        old: storages of the arguments, and of the parts of ``out`` that came before.
    """
    if isinstance(out, (list, tuple)):
        parts = []
        for one in out:
            part = _layout(one, old)
            parts += [] if part is None else [part]
        return _Several(type(out), parts) if len(parts) == len(out) else None
    if not isinstance(out, Tensor) or not out.is_meta or out.is_conj() or out.is_neg():
        return None
    storage = out.untyped_storage()
    alone = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta").untyped_storage()
    if storage._cdata in old or storage.nbytes() != alone.nbytes():
        return None
    old.add(storage._cdata)
    return _Single(out.shape, out.stride(), out.dtype)


def _again(layout: _Layout) -> object:
    if isinstance(layout, _Several):
        return layout.kind(map(_again, layout.parts))
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")


def simulated(networks: dict[str, nn.Module], precision: str, checkpointing: bool) -> dict[str, NetworkCall]:
    """A method's networks as the loop calls them: under autocast of ``precision``, with their blocks recomputed."""
    calls: dict[str, NetworkCall] = {}
    for name, network in networks.items():
        velocity = next(module for module in network.modules() if isinstance(module, VelocityNetwork))
        around = partial(GpuLike, DTYPES[precision], velocity.attention != "math")
        if checkpointing:
            network.enable_gradient_checkpointing(around)  # type: ignore[operator]
        calls[name] = _Call(network, around)
    return calls


class _Call(Generic[P]):
    def __init__(self, network: Callable[P, object], around: Around) -> None:
        self.network, self.around = network, around

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        with self.around():
            out = self.network(*args, **kwargs)
        return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, out)


@contextlib.contextmanager
def teacher_like_a_gpu(network: nn.Module) -> Iterator[None]:
    """A block in which a frozen network's attention is computed as on a GPU; it has no autocast."""
    forward, kernel = network.forward, network.attention if isinstance(network, VelocityNetwork) else "sdpa"

    def call(*args: object, **kwargs: object) -> object:
        with GpuLike(torch.float32, kernel != "math"):
            return forward(*args, **kwargs)

    network.forward = call
    try:
        yield
    finally:
        del network.forward
