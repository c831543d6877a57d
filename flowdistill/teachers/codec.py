"""Latents <-> images. A pixel model's latents are its images in [-1, 1]."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.teachers.offload import OffloadHook
from flowdistill.utils.errors import UserError

AT_ONCE = 4 * 1024**2  # pixels of one pass through an autoencoder
WHOLE = 2048**2  # pixels of an image that still fits in one


class PixelCodec(nn.Module):
    """The identity codec: latents are pixels in [-1, 1], images are in [0, 1]."""

    factor = 1

    def image_channels(self, channels: int) -> int:
        """Channels of the images that latents of ``channels`` become."""
        return channels

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, C, H, W) in [0, 1]; NaN where a latent is not finite."""
        return _limited(latents.float() / 2 + 0.5)

    def pixels(self, latents: Tensor) -> Tensor:
        """The same without the limits, with gradients."""
        return latents.float() / 2 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to latents."""
        return images * 2 - 1


class VaeCodec(nn.Module):
    """A diffusers autoencoder with its scaling and shift factors.

    One whose config has ``force_upcast`` overflows in float16 (SDXL's), so its weights become float32, as in diffusers'
    pipelines of it, for decoding and encoding; the autoencoder that was given stays as it is.

    Attributes:
        factor: pixels along one side of a latent's element.

    Raises:
        UserError: an autoencoder that takes more than latents, that draws noise to decode them, or whose configuration
            does not say how much it shrinks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        config = vae.config
        if vae.dtype == torch.float16 and config.get("force_upcast"):
            vae = copy.deepcopy(vae).float()
        self.vae = vae
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        taken = inspect.signature(vae.decode).parameters
        if "num_inference_steps" in taken:
            raise UserError(f"the autoencoder {type(vae).__name__} is not supported: its decode() draws noise of its "
                            "own, so the same latents become other images each time")
        needs = [name for name, parameter in list(taken.items())[1:]
                 if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if needs or not blocks and not config.get("temperal_downsample"):
            raise UserError(f"the autoencoder {type(vae).__name__} is not supported: "
                            + (f"its decode() also needs {', '.join(needs)}" if needs else
                               "its configuration does not say how much smaller than images latents are"))
        self.factor = 2 ** (len(blocks) - 1 if blocks else len(config.temperal_downsample))
        self.channels = int(config.get("latent_channels") or config.z_dim)
        # Of video autoencoders, which images pass as one frame.
        self.frames = config.get("temperal_downsample") is not None
        each = [config.get(name) for name in ("latents_mean", "latents_std")]
        for name, values, otherwise in zip(("mean", "std"), each, (0.0, 1.0), strict=True):
            given = torch.tensor(otherwise if None in each else values, dtype=torch.float32)
            self.register_buffer(name, given.reshape(1, -1, 1, 1), persistent=False)

        self.offload_hook: OffloadHook | None = None

    def offload_to(self, device: torch.device | str) -> None:
        """Keep the autoencoder on the CPU between calls, which run on ``device``."""
        if self.offload_hook is not None:
            self.offload_hook.remove()
        self.offload_hook = OffloadHook(self.vae, device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def image_channels(self, channels: int) -> int:
        """Channels of the images that latents of ``channels`` become."""
        return int(self.vae.config.get("out_channels") or 3)

    def _release(self) -> None:
        if self.offload_hook is not None:
            self.offload_hook.offload()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H * f, W * f) in [0, 1]; NaN where the autoencoder overflows.

        At most ``AT_ONCE`` pixels are decoded in one pass, images above ``WHOLE`` pixels in overlapping tiles where the
        autoencoder can (diffusers blends their edges, so they differ a little from an image made whole).
        """
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        if pixels > WHOLE and hasattr(self.vae, "enable_tiling"):
            self.vae.enable_tiling()
        rows = max(1, AT_ONCE // pixels)
        parts = [self.pixels(latents[start : start + rows]) for start in range(0, len(latents), rows)]
        self._release()
        return _limited(torch.cat(parts))

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images as the autoencoder makes them, not limited to [0, 1], with gradients."""
        dtype = next(self.vae.parameters()).dtype
        native = (latents * (self.std / self.scale) + self.shift + self.mean).to(dtype)
        images = self.vae.decode(native[:, :, None] if self.frames else native, return_dict=False)[0]
        images = images[:, :, 0] if self.frames else images
        return images.float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the mean latents; in passes and tiles as :meth:`decode`."""
        pixels = images.shape[2] * images.shape[3]
        if pixels > WHOLE and hasattr(self.vae, "enable_tiling"):
            self.vae.enable_tiling()
        rows = max(1, AT_ONCE // pixels)
        latents = torch.cat([self._encode(images[start : start + rows]) for start in range(0, len(images), rows)])
        self._release()
        return latents

    def _encode(self, images: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        pixels = (images * 2 - 1).to(dtype)
        out = self.vae.encode(pixels[:, :, None] if self.frames else pixels)
        # The others' outputs have the latents under several names, and nothing else.
        native = (out.latent_dist.mean if hasattr(out, "latent_dist") else out[0]).float()
        native = native[:, :, 0] if self.frames else native
        return (native - self.mean - self.shift) * (self.scale / self.std)


def _limited(images: Tensor) -> Tensor:
    """Images limited to [0, 1]. What is infinite becomes NaN, not white or black, so that it is seen to be wrong."""
    return images.where(images.isfinite(), torch.nan).clamp(0, 1)
