"""Mixed precision, owned by the loop: accelerate shares one gradient scaler between all optimisers and has none on CPU.

Trained weights, their gradients and the optimiser stay float32; only the networks' forward passes run in half
precision, under autocast.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from flowdistill.utils.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(configured: str | None, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``: as configured, or with None as ``accelerate launch`` says, else fp32.

    Raises:
        UserError: a precision this does not know, or bf16 on a GPU without it.
    """
    name, origin = configured, "train.precision"
    if name is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        name, origin = "fp32" if launched == "no" else launched, "accelerate's mixed_precision"
    if name not in DTYPES:
        raise UserError(f"{origin} is '{name}'; allowed are {', '.join(DTYPES)}")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{origin} is 'bf16', which {torch.cuda.get_device_name(device)} does not have; use fp16")
    return name


class HalfPrecisionForward(Generic[P, R]):
    """A network that runs under autocast and returns float32; called as the network is.

    One autocast region a call: weights that autocast has cast are not kept between a pass without gradients and one
    with them. Forward-mode differentiation (``torch.func.jvp``) of an argument runs in float32: torch's rules for it do
    not go with autocast (GroupNorm's mixes the types), and a derivative wants the digits anyway.
    """

    def __init__(self, network: Callable[P, R], precision: str, device: torch.device) -> None:
        self.network = network
        self.dtype = DTYPES[precision]
        self.device_type = device.type

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(unpack_dual(value).tangent is not None for value in tensors):
            return self.network(*args, **kwargs)
        with torch.autocast(self.device_type, dtype=self.dtype):
            output = self.network(*args, **kwargs)
        return convert_to_fp32(output)
