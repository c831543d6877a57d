"""Students as stock diffusers pipelines and as LoRA files."""

from flowdistill.export.pipelines import export

__all__ = ["export"]
