"""What flowdistill knows of each family of backbones, one file a family."""

from __future__ import annotations

from flowdistill.networks.backbones.base import FAMILIES, Backbone, BackboneFamily, last_linear, register_family
from flowdistill.utils.errors import UserError, listed, shown

__all__ = ["FAMILIES", "Backbone", "BackboneFamily", "family_of", "last_linear", "register_family"]


def family_of(network: Backbone) -> BackboneFamily:
    """The family of a backbone's class.

    Raises:
        UserError: no family knows the class, or its output does not fit its input.
    """
    name = type(network).__name__
    if name not in FAMILIES:
        raise UserError(f"the backbone {shown(name, quoted=False)} is not supported; supported are {listed(FAMILIES)}")
    family = FAMILIES.get(name)
    channels, extra = family.shape(network)[0], family.learned_variance_channels(network)
    if extra not in (0, channels):
        raise UserError(f"the backbone {name} takes {channels} channels and returns "
                        f"{family.output_channels(network)}; a teacher returns {channels}, "
                        f"or {2 * channels} with a learned variance")
    return family
