"""The kernels that compute a backbone's attention, and those that forward-mode differentiation can pass.

| kernel | is | forward mode (JVP) |
|---|---|---|
| sdpa | torch's scaled-dot-product attention, the fastest of its fused kernels | no rule |
| xformers | xformers' memory-efficient attention, for networks without a mask over prompts | no rule |
| math | torch's plain formula: the whole matrix of weights in memory | yes |
"""

from __future__ import annotations

import contextlib
import importlib

import torch
from diffusers import attention_backend
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.networks.backbones import Backbone
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import log_once, quiet_libraries

CHOICES = ("auto", "sdpa", "xformers", "math")
PROCESSORS: dict[type, type] = {
    AttnProcessor2_0: XFormersAttnProcessor, JointAttnProcessor2_0: XFormersJointAttnProcessor,
}


def choose_attention(wanted: str, backbone: nn.Module, masked: bool, device: torch.device) -> str:
    """The kernels to use: sdpa, xformers or math. Sets the backbone's attention layers to them.

    Args:
        wanted: ``"auto"`` takes xformers where it is there and runs, else sdpa. ``"xformers"`` does so too, but says
            in one line of the log why it is not taken.
        masked: whether the backbone masks its prompts, which xformers' kernels refuse for most lengths.
        device: where the network will run.
    """
    if wanted not in CHOICES:
        raise UserError(f"teacher.attention is '{wanted}'; allowed are {', '.join(CHOICES)}")
    if wanted in ("sdpa", "math"):
        return wanted
    refusal = _refusal(backbone, masked, device)
    if refusal is None:
        use_attention(backbone, "xformers")
        return "xformers"
    if wanted == "xformers":
        log_once(f"teacher.attention is 'xformers', but {refusal}; torch's own attention (sdpa) is used")
    return "sdpa"


def use_attention(backbone: Backbone, kernel: str) -> None:
    """Set the attention layers that diffusers can switch to xformers, or those that are back to torch's own."""
    fused = kernel == "xformers"
    swap = PROCESSORS if fused else {there: here for here, there in PROCESSORS.items()}
    for module in backbone.modules():
        kind: type = type(getattr(module, "processor", None))
        if kind in swap:
            module.set_processor(swap[kind]())
    if any(_dispatches(module) for module in backbone.modules()):
        # The context keeps diffusers from making it the choice of every other model too.
        with quiet_libraries(), attention_backend("native"):
            backbone.set_attention_backend("xformers" if fused else "native")


def attention_kernels(kernel: str) -> contextlib.AbstractContextManager[None]:
    """The context in which a network with ``kernel`` is called."""
    return sdpa_kernel(SDPBackend.MATH) if kernel == "math" else contextlib.nullcontext()


def only_math() -> bool:
    """Whether torch's attention may use the plain formula only, here and now."""
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def allow_forward_mode(network: nn.Module, key: str) -> None:
    """Make a student's ``network`` ready for forward-mode differentiation, which runs with torch's math kernel.

    One line of the log says what changes.

    Args:
        key: the setting that asks for it.
    """
    velocity = getattr(network, "velocity", None)
    if velocity is None or velocity.attention == "math":
        return
    if velocity.attention == "xformers":
        use_attention(velocity.backbone, "sdpa")
        velocity.attention = "sdpa"
        log_once(f"{key} needs attention with a forward-mode rule, which xformers has not: the student uses sdpa, and "
                 "math in the passes that are differentiated forwards")
    else:
        log_once(f"{key} needs attention with a forward-mode rule, which of torch's kernels only math has: it is used "
                 "in the passes that are differentiated forwards")


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
