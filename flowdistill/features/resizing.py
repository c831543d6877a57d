"""How images are brought to the size that a feature network reads: each of a paper's or of a tool's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear`` without aligned corners, to float32 (B, C, size, size) in the same range.

    Pixel i of the result is read at i * (old / new), so that the picture moves by half a pixel, and nothing is averaged
    when it shrinks. That is wrong as resizing, and what the Inception graph of 2015 does with its input, so that every
    FID of ADM, EDM, BigGAN or StyleGAN has it (Parmar, Zhang, Zhu 2022, arXiv 2104.11222, section 3).

    Args:
        images: (B, C, H, W), uint8 or float.
    """
    pixels = images.float()
    low, high, share = _taps(pixels.shape[-1], size, pixels.device)
    left, right = pixels[..., low], pixels[..., high]
    across = left + (right - left) * share
    low, high, share = _taps(pixels.shape[-2], size, pixels.device)
    top, bottom = across[..., low, :], across[..., high, :]
    return top + (bottom - top) * share[:, None]


def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each new pixel the two old ones it lies between, and how far it is from the first."""
    # In float32, as TensorFlow has it: a rounding here decides which pixel is the first one.
    scale = torch.tensor(old, dtype=torch.float32) / torch.tensor(new, dtype=torch.float32)
    place = torch.arange(new, dtype=torch.float32) * scale
    low = place.floor().long()
    high = (low + 1).clamp(max=old - 1)
    return low.to(device), high.to(device), (place - low).to(device)


def square_crop(images: Tensor) -> Tensor:
    """The largest square in the middle of images (B, C, H, W); an odd rest goes to the right and to the bottom."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def pil_bicubic(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resizing of uint8 (B, C, H, W) to whole numbers in float32 (B, C, size, size), in [0, 255].

    PIL's filter, and its rounding and clipping after either of the two passes, rows first: equal to
    ``PIL.Image.resize`` with BICUBIC but for one level where PIL's weights, which are whole numbers, round another way.
    """
    pixels = images.to(torch.float32 if images.device.type == "mps" else torch.float64)
    for wanted in ((images.shape[-2], size), (size, size)):
        pixels = F.interpolate(pixels, size=wanted, mode="bicubic", antialias=True, align_corners=False)
        pixels = pixels.round().clamp(0.0, 255.0)
    return pixels.float()


def lanczos_square(images: Tensor, size: int) -> Tensor:
    """The largest square in the middle of uint8 images (B, C, H, W), by PIL's Lanczos, uint8 (B, C, size, size).

    By PIL itself: torch has no such filter, and what it rounds to levels is part of the measurement. Where a rest is
    odd the middle is torchvision's, which rounds halves to even. Always on the processor; several images are shared
    among threads.
    """
    squares = center_crop(images.cpu(), [min(images.shape[-2:])] * 2)

    def one(square: Tensor) -> Tensor:
        return pil_to_tensor(to_pil_image(square).resize((size, size), Image.Resampling.LANCZOS))

    if len(squares) < 2:
        resized = list(map(one, squares))
    else:
        with ThreadPoolExecutor() as pool:
            resized = list(pool.map(one, squares))
    return torch.stack(resized).to(images.device)


def middle_patch(images: Tensor, size: int) -> Tensor:
    """``size`` x ``size`` pixels in the middle of images (B, C, H, W); images with fewer in a direction as they are."""
    return images if min(images.shape[-2:]) < size else center_crop(images, [size, size])
