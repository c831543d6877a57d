"""What flowdistill knows of each family of backbones, one file a family."""

from __future__ import annotations

from flowdistill.networks.backbones.base import Backbone, BackboneFamily, last_linear
from flowdistill.networks.backbones.dit import DiTFamily
from flowdistill.networks.backbones.flux import FluxFamily
from flowdistill.networks.backbones.lumina2 import Lumina2Family
from flowdistill.networks.backbones.pixart import PixArtFamily
from flowdistill.networks.backbones.qwen_image import QwenImageFamily
from flowdistill.networks.backbones.sana import SanaFamily
from flowdistill.networks.backbones.stable_diffusion import StableDiffusionFamily
from flowdistill.networks.backbones.stable_diffusion_3 import StableDiffusion3Family
from flowdistill.networks.backbones.unet2d import UNet2DFamily
from flowdistill.networks.backbones.z_image import ZImageFamily
from flowdistill.utils.errors import UserError

__all__ = ["FAMILIES", "BackboneFamily", "family_of", "last_linear"]

FAMILIES: dict[str, BackboneFamily] = {
    family.backbone_class: family
    for family in (
        DiTFamily(),
        FluxFamily(),
        Lumina2Family(),
        PixArtFamily(),
        QwenImageFamily(),
        SanaFamily(),
        StableDiffusion3Family(),
        StableDiffusionFamily(),
        UNet2DFamily(),
        ZImageFamily(),
    )
}


def family_of(network: Backbone) -> BackboneFamily:
    """The family of a backbone's class.

    Raises:
        UserError: no family knows the class, or its output does not fit its input.
    """
    name = type(network).__name__
    if name not in FAMILIES:
        raise UserError(f"the backbone {name} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    channels, extra = family.shape(network)[0], family.learned_variance_channels(network)
    if extra not in (0, channels):
        raise UserError(f"the backbone {name} takes {channels} channels and returns "
                        f"{family.output_channels(network)}; a teacher returns {channels}, "
                        f"or {2 * channels} with a learned variance")
    return family
