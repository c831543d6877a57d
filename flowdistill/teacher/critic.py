"""Critics: online copies of the teacher that follow the student's samples; full, or low-rank on shared weights."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flowdistill.teacher.teacher import Teacher
from flowdistill.teacher.velocity import ExtendedVelocity


def make_critic(teacher: Teacher, kind: str, lora_rank: int, scalars: tuple[str, ...] = ()) -> ExtendedVelocity:
    """A trainable velocity network that starts equal to the teacher's.

    Args:
        kind: ``"full"``, a float32 copy, or ``"lora"``, float32 adapters over the teacher's own frozen tensors.
        lora_rank: rank of the adapters.
        scalars: extra conditions, zero at the start.
    """
    if kind == "full":
        return ExtendedVelocity(teacher.network.trainable_copy(), scalars)
    critic = ExtendedVelocity(teacher.network.frozen_copy(), scalars)
    add_lora(critic.velocity.backbone, lora_rank)
    return critic


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """Freeze ``backbone`` and put float32 LoRA adapters of ``rank`` on all its linear and convolution layers, in place.

    Convolutions in groups get none. The adapters start at zero, so the backbone's output does not change.
    """
    names = [name for name, module in backbone.named_modules()
             if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1]
    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return backbone.eval()
