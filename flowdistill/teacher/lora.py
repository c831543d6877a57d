"""Low-rank adapters on a backbone (peft), for critics and students that share frozen base weights."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """Freeze ``backbone`` and put float32 LoRA adapters of ``rank`` on all its linear and convolution layers, in place.

    The adapters start at zero, so the backbone's output does not change.
    """
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return backbone.eval()
