"""Small changes to a frozen network that stock diffusers loads as a LoRA file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.lora import LoraSettings, add_lora, layers_named, lora_tensors
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import weight_of

KEY_VALUE = ("attn2.to_k", "attn2.to_v")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: dict[str, tuple[str, ...] | None] = {
    "kv_full": KEY_VALUE,
    "kv": KEY_VALUE,
    "attention": ATTENTION,
    "attention_ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),
    "all": None,
}
"""What each kind of adaptation changes, by the ends of the layers' names; None: every linear layer and convolution."""


class DeltaLinear(nn.Module):
    """A frozen linear layer plus a trainable matrix of full rank, zero at the start."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(weight_of(base), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        weight = weight_of(self.base)
        return F.linear(x, (weight + self.delta).to(weight.dtype), self.base.bias)


def adapted(velocity: VelocityNetwork, kind: str, rank: int) -> VelocityNetwork:
    """A second network over the same frozen tensors with float32 weights that train; equal to the first at the start.

    Args:
        kind: a key of ``TARGETS``: "kv_full" changes the cross-attention's keys and values freely (Custom Diffusion),
            the others add LoRA of ``rank`` (alpha = rank, gaussian start, as diffusers' scripts do).

    Raises:
        UserError: the network has no such layer.
    """
    network = velocity.frozen_copy()
    backbone, ends = network.backbone, TARGETS[kind]
    names = layers_named(backbone, ends)
    if not names:
        raise UserError(f"method.adapter is '{kind}', but the {type(backbone).__name__} has no layers named "
                        f"{', '.join(ends or ())}; choose another of {', '.join(TARGETS)}")
    if kind == "kv_full":
        backbone.requires_grad_(False)
        for name in names:
            owner, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(owner), last, DeltaLinear(backbone.get_submodule(name)))
    else:
        add_lora(backbone, LoraSettings(rank, target_modules=None if ends is None else list(ends)), gaussian=True)
    network.eval()
    return network


@torch.no_grad()
def adapted_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """What an :func:`adapted` backbone has learned, as the tensors of a LoRA file without prefix, on the CPU.

    A matrix of full rank is factored by its singular values into one of as many rows as it has rank, which is exact.
    The names are peft's: with diffusers' older ones in the same file, ``load_lora_weights`` takes one sort only.
    """
    deltas = {name: module.delta for name, module in backbone.named_modules() if isinstance(module, DeltaLinear)}
    if not deltas:
        return lora_tensors(backbone)
    tensors = {}
    for name, delta in deltas.items():
        left, values, right = torch.linalg.svd(delta.double().cpu(), full_matrices=False)
        root = values.sqrt()
        tensors[f"{name}.lora_A.weight"] = (root[:, None] * right).float().contiguous()
        tensors[f"{name}.lora_B.weight"] = (left * root).float().contiguous()
    return tensors
