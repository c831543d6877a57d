"""Latents <-> images. A pixel model's latents are its images in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelCodec(nn.Module):
    """The identity codec: latents are pixels in [-1, 1], images are in [0, 1]."""

    factor = 1

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, C, H, W) in [0, 1]."""
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to latents."""
        return images * 2 - 1


class VaeCodec(nn.Module):
    """A diffusers autoencoder with its scaling and shift factors.

    Attributes:
        factor: pixels along one side of a latent's element.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H * f, W * f) in [0, 1]."""
        dtype = next(self.vae.parameters()).dtype
        images = self.vae.decode((latents / self.scale + self.shift).to(dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the mean latents."""
        dtype = next(self.vae.parameters()).dtype
        posterior = self.vae.encode((images * 2 - 1).to(dtype)).latent_dist
        return (posterior.mean.float() - self.shift) * self.scale
