"""One small adapter a backbone family. A new family is a file here and a line in ``ADAPTERS``."""

from __future__ import annotations

from flowdistill.networks.backbones.base import Adapter, Backbone, last_linear
from flowdistill.networks.backbones.dit import DiTAdapter
from flowdistill.networks.backbones.flux import FluxAdapter
from flowdistill.networks.backbones.lumina2 import Lumina2Adapter
from flowdistill.networks.backbones.pixart import PixArtAdapter
from flowdistill.networks.backbones.qwen_image import QwenImageAdapter
from flowdistill.networks.backbones.sana import SanaAdapter
from flowdistill.networks.backbones.stable_diffusion import StableDiffusionAdapter
from flowdistill.networks.backbones.stable_diffusion_3 import StableDiffusion3Adapter
from flowdistill.networks.backbones.unet2d import UNet2DAdapter
from flowdistill.networks.backbones.z_image import ZImageAdapter
from flowdistill.utils.errors import UserError

__all__ = ["ADAPTERS", "Adapter", "adapter_for", "last_linear"]

ADAPTERS: dict[str, Adapter] = {
    adapter.family: adapter
    for adapter in (
        DiTAdapter(),
        FluxAdapter(),
        Lumina2Adapter(),
        PixArtAdapter(),
        QwenImageAdapter(),
        SanaAdapter(),
        StableDiffusion3Adapter(),
        StableDiffusionAdapter(),
        UNet2DAdapter(),
        ZImageAdapter(),
    )
}


def adapter_for(network: Backbone) -> Adapter:
    """The adapter of a backbone's class.

    Raises:
        UserError: no adapter knows the class, or its output does not fit its input.
    """
    name = type(network).__name__
    if name not in ADAPTERS:
        raise UserError(f"the backbone {name} is not supported; supported are {', '.join(sorted(ADAPTERS))}")
    adapter = ADAPTERS[name]
    channels, extra = adapter.shape(network)[0], adapter.learned_variance_channels(network)
    if extra not in (0, channels):
        raise UserError(f"the backbone {name} takes {channels} channels and returns "
                        f"{adapter.output_channels(network)}; a teacher returns {channels}, "
                        f"or {2 * channels} with a learned variance")
    return adapter
