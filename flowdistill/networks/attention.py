"""The kernels that compute a backbone's attention, and those that forward-mode differentiation can pass.

| kernel | is | forward mode (JVP) |
|---|---|---|
| sdpa | torch's scaled-dot-product attention, the fastest of its fused kernels | no rule |
| xformers | xformers' memory-efficient attention, for networks without a mask over prompts | no rule |
| math | torch's plain formula: the whole matrix of weights in memory | yes |
| native, flash, _flash_3, sage, ... | diffusers' backends, of networks whose attention it dispatches | no rule |
"""

from __future__ import annotations

import contextlib
import importlib
from functools import partial

import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.config.schema import ATTENTION
from flowdistill.networks.backbones import Backbone
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import log_once, quiet_libraries

DISPATCHED = tuple(name for name in ATTENTION if name not in ("auto", "sdpa", "xformers", "math"))
"""Names of diffusers' own, which its ``set_attention_backend`` takes."""
FORWARD_ONLY = ("sage", "sage_varlen")
"""Kernels without a backward pass."""
PROCESSORS: dict[type, type] = {
    AttnProcessor2_0: XFormersAttnProcessor, JointAttnProcessor2_0: XFormersJointAttnProcessor,
}


def choose_attention(wanted: str, backbone: nn.Module, masked: bool, device: torch.device) -> str:
    """The kernels to use: sdpa, xformers, math or one of diffusers' backends. Sets the backbone's layers to them.

    Args:
        wanted: ``"auto"`` takes xformers where it is there and runs, else sdpa. ``"xformers"`` and the names of
            diffusers do so too, but one line of the log says why they are not taken.
        masked: whether the backbone masks its prompts, which xformers' kernels refuse for most lengths.
        device: where the network will run.
    """
    if wanted not in ATTENTION:
        raise UserError(f"teacher.attention is '{wanted}'; allowed are {', '.join(ATTENTION)}")
    if wanted in ("sdpa", "math"):
        return wanted
    kernel = "xformers" if wanted == "auto" else wanted
    refuse = _refusal if kernel == "xformers" else partial(_refusal_of_diffusers, kernel)
    refusal = refuse(backbone, masked, device)
    if refusal is None:
        use_attention(backbone, kernel)
        return kernel
    if wanted != "auto":
        log_once(f"teacher.attention is '{wanted}', but {refusal}; torch's own attention (sdpa) is used")
    return "sdpa"


def use_attention(backbone: Backbone, kernel: str) -> None:
    """Set the attention layers that diffusers can switch to xformers or to a backend of its, or those that are back to
    torch's own."""
    fused = kernel == "xformers"
    swap = PROCESSORS if fused else {there: here for here, there in PROCESSORS.items()}
    for module in backbone.modules():
        kind: type = type(getattr(module, "processor", None))
        if kind in swap:
            module.set_processor(swap[kind]())
    if any(_dispatches(module) for module in backbone.modules()):
        # The context keeps diffusers from making it the choice of every other model too.
        with quiet_libraries(), attention_backend("native"):
            backbone.set_attention_backend(kernel if fused or kernel in DISPATCHED else "native")


def attention_kernels(kernel: str) -> contextlib.AbstractContextManager[None]:
    """The context in which a network with ``kernel`` is called."""
    return sdpa_kernel(SDPBackend.MATH) if kernel == "math" else contextlib.nullcontext()


def only_math() -> bool:
    """Whether torch's attention may use the plain formula only, here and now."""
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def allow_forward_mode(network: nn.Module, key: str) -> None:
    """Make a student's ``network`` ready for forward-mode differentiation, which runs with torch's math kernel.

    One line of the log says what changes. In such passes group norms get their input in order, which the transposed
    rows of an attention block are not: up to torch 2.8 their forward-mode rule ends in an error on others.

    Args:
        key: the setting that asks for it.
    """
    velocity = getattr(network, "velocity", None)
    if velocity is None:
        return
    for module in velocity.backbone.modules():
        if isinstance(module, nn.GroupNorm) and _in_order not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_in_order)
    if velocity.attention == "math":
        return
    if velocity.attention != "sdpa":
        log_once(f"{key} needs attention with a forward-mode rule, which {velocity.attention} has not: the student "
                 "uses sdpa, and math in the passes that are differentiated forwards")
        use_attention(velocity.backbone, "sdpa")
        velocity.attention = "sdpa"
    else:
        log_once(f"{key} needs attention with a forward-mode rule, which of torch's kernels only math has: it is used "
                 "in the passes that are differentiated forwards")


def _in_order(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    differentiated = bool(inputs) and unpack_dual(inputs[0]).tangent is not None
    return (inputs[0].contiguous(), *inputs[1:]) if differentiated else None


def no_forward_mode(error: Exception, key: str, instead: str) -> bool:
    """False, after a line of the log that says so, when ``error`` is that of a network that cannot be differentiated
    forwards; any other error is raised again."""
    text = _first_line(error)
    if not isinstance(error, NotImplementedError) and not ("functorch" in text or "jvp" in text):
        raise error
    log_once(f"{key} needs a forward-mode rule that the student's network has not ({text}); {instead}")
    return False


def _dispatches(module: nn.Module) -> bool:
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def _refusal_of_diffusers(kernel: str, backbone: Backbone, masked: bool, device: torch.device) -> str | None:
    """Why one of diffusers' backends cannot compute this network's attention, or None."""
    if not any(_dispatches(module) for module in backbone.modules()):
        return f"diffusers does not dispatch the attention of the {type(backbone).__name__}"
    row = torch.zeros(1, 128, 2, 64, device=device, dtype=backbone.dtype, requires_grad=kernel not in FORWARD_ONLY)
    mask = torch.ones(1, 128, dtype=torch.bool, device=device) if masked else None
    try:
        with quiet_libraries(), attention_backend(kernel), torch.enable_grad():
            out = dispatch_attention_fn(row, row, row, attn_mask=mask)
            if row.requires_grad:
                out.sum().backward()
    except Exception as error:  # it raises many unrelated types, and every one means the same here
        masks = ", with a mask over its prompts" if masked else ""
        return (f"it does not run on {device} in {str(backbone.dtype).removeprefix('torch.')}{masks} "
                f"({_first_line(error)})")
    return None


def _refusal(backbone: Backbone, masked: bool, device: torch.device) -> str | None:
    """Why xformers cannot compute this network's attention, or None."""
    try:
        ops = importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:  # OSError: built for another torch
        found = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("xformers")
        return "it is not installed" if found else f"it cannot be imported ({_first_line(error)})"
    if masked:
        return f"the {type(backbone).__name__} masks its prompts, which its kernels refuse"
    if not any(type(getattr(m, "processor", None)) in PROCESSORS or _dispatches(m) for m in backbone.modules()):
        return f"the {type(backbone).__name__} has no attention layer that diffusers can switch to it"
    try:
        row = torch.zeros(1, 8, 1, 40, device=device, dtype=backbone.dtype)
        ops.memory_efficient_attention(row, row, row)
    except Exception as error:  # it raises many unrelated types, and every one means the same here
        return f"it does not run on {device} in {str(backbone.dtype).removeprefix('torch.')} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]
