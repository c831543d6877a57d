"""What a scheduler does to a network's denoised estimate before it steps: clipping and dynamic thresholding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdistill.paths.scheduler_protocol import SchedulerConfig

# The options that the step of each class obeys; TCDScheduler has both among its settings and reads neither.
OPTIONS: dict[str, tuple[str, ...]] = {
    "DDIMParallelScheduler": ("thresholding", "clip_sample"),
    "DDIMScheduler": ("thresholding", "clip_sample"),
    "DDPMParallelScheduler": ("thresholding", "clip_sample"),
    "DDPMScheduler": ("thresholding", "clip_sample"),
    "DEISMultistepScheduler": ("thresholding",),
    "DPMSolverMultistepScheduler": ("thresholding",),
    "DPMSolverSinglestepScheduler": ("thresholding",),
    "EDMDPMSolverMultistepScheduler": ("thresholding",),
    "HeunDiscreteScheduler": ("clip_sample",),
    "LCMScheduler": ("thresholding", "clip_sample"),
    "UniPCMultistepScheduler": ("thresholding",),
}
KEEPS_NOISE = ("DDIMParallelScheduler", "DDIMScheduler")


@dataclass(frozen=True)
class Clipping:
    """Denoised estimates (B, ...) brought into a range, each sample by itself.

    Attributes:
        option: the scheduler's own word: ``"clip_sample"``, to [-limit, limit]; or ``"thresholding"`` (Imagen, arXiv
            2205.11487, section 2.3), to [-s, s] and then divided by s, with s the ``ratio`` quantile of the sample's
            absolute values, at least 1 and at most ``limit``.
        keeps_noise: whether a step goes on with the noise that belongs to the estimate as it was (DDIM, as diffusers
            has it), and not with the noise that the clipped estimate leaves over.
    """

    option: str
    limit: float
    ratio: float = 1.0
    keeps_noise: bool = False

    def __call__(self, clean: Tensor) -> Tensor:
        if self.option == "clip_sample":
            return clean.clamp(-self.limit, self.limit)
        sizes = clean.flatten(1).abs()
        sizes = sizes if sizes.dtype == torch.float64 else sizes.float()  # quantiles of half precision do not exist
        # The limit after the 1: a limit below 1 wins.
        level = torch.quantile(sizes, self.ratio, dim=1).clamp(min=1).clamp(max=self.limit).to(clean.dtype)
        level = level.reshape(-1, *[1] * (clean.ndim - 1))
        return torch.maximum(torch.minimum(clean, level), -level) / level

    def __str__(self) -> str:
        if self.option == "clip_sample":
            return f"each denoised estimate is clipped to [-{self.limit:g}, {self.limit:g}] (clip_sample)"
        return (f"each denoised estimate is clipped at the {self.ratio:g} quantile of its absolute values, between 1 "
                f"and {self.limit:g}, and divided by it (thresholding)")


def clipping_of(name: str, config: SchedulerConfig) -> Clipping | None:
    """What a scheduler of class ``name`` with this config does; thresholding goes before clipping, as in its step."""
    options = OPTIONS.get(name, ())
    keeps_noise = name in KEEPS_NOISE
    if "thresholding" in options and config.get("thresholding") and config.get("predict_x0", True):
        ratio = float(config["dynamic_thresholding_ratio"])
        return Clipping("thresholding", float(config["sample_max_value"]), ratio, keeps_noise)
    if "clip_sample" in options and config.get("clip_sample"):
        return Clipping("clip_sample", float(config.get("clip_sample_range", 1.0)), keeps_noise=keeps_noise)
    return None
