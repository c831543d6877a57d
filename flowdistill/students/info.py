"""Where a student comes from and what it may be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowdistill.conditioning.pipeline_lora import BaseLora
from flowdistill.teachers.autoencoder import BaseVae


@dataclass(frozen=True)
class StudentInfo:
    """Where a student comes from and what it may be asked.

    Attributes:
        method: the distillation method.
        base_model: the teacher's source.
        guidance_range: guidance scales it was trained for; None when guidance is not an input.
        guidance_scale: the scale used when none is asked for, or the one it was distilled at.
        settings: the method's own settings, for the record.
        base_lora: the LoRA that was part of the teacher's weights; None where there was none.
        base_quantize: what the teacher's weights were kept in (``teacher.quantize``); None: in their own type.
        base_vae: the autoencoder in the place of the teacher's pipeline's own (``teacher.vae``); None: its own.
    """

    method: str = ""
    base_model: str = ""
    guidance_range: tuple[float, float] | None = None
    guidance_scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    base_lora: BaseLora | None = None
    base_quantize: str | None = None
    base_vae: BaseVae | None = None
