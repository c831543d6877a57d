"""The non-saturating adversarial losses on logits (Goodfellow et al. 2014), per sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """softplus(l_fake) + softplus(-l_real), logits (B,) of generated and of real samples; 2 log 2 at chance."""
    return softplus(fake) + softplus(-real)


def generator_loss(fake: Tensor) -> Tensor:
    """softplus(-l_fake), (B,): small where the sample passes for real."""
    return softplus(-fake)
