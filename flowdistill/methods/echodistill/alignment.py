"""EchoDistill's alignment: the student's sample against the teacher's one guided denoising of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowdistill.features.vision import Vision
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.objectives import alignment
from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers import Teacher
from flowdistill.utils.devices import sent
from flowdistill.utils.randomness import Draw

DIRECTIONS = 128  # of the sliced Wasserstein distance, a level of a sample (as the authors)
PATCH, SMALL_PATCH = 11, 5  # the authors' patches, and those of images whose pyramid has no five levels for them


class AlignmentTerms:
    """The three terms, each (B,), with their weights and the share of signal at their time.

    Args:
        feature_network: the identity network.
        null_ids: ids (1, L) of the other side of guidance.
    """

    def __init__(self, config: EchoDistillConfig, teacher: Teacher, feature_network: Vision, null_ids: Tensor) -> None:
        self.config, self.teacher, self.feature_network, self.null_ids = config, teacher, feature_network, null_ids

    def __call__(
        self, guide: Callable[..., Tensor], draw: Draw, sample: Tensor, pictures: Tensor, noise: Tensor, embeds: Tensor
    ) -> dict[str, Tensor]:
        """
        Args:
            guide: the personal teacher.
            sample: the student's latents (B, *shape), with gradients, made of ``noise`` for ``embeds`` (B, L, D).
            pictures: the same as images, with gradients.
        """
        config, time = self.config, self.config.alignment_time.draw(self.teacher, draw)
        with torch.no_grad():
            target = self.target(guide, sample.detach(), noise, time, embeds)
            wanted = self.teacher.codec.pixels(target)
        terms = {"latent": config.latent_weight * alignment.latent_distance(sample, target)}
        if config.identity_weight or config.texture == "gram":
            seen = self.feature_network(pictures)
            with torch.no_grad():
                goal = self.feature_network(wanted)
            terms["identity"] = config.identity_weight * alignment.identity_distance(seen.pooled, goal.pooled)
            if config.texture == "gram":
                terms["texture"] = config.texture_weight * alignment.gram_distance(seen.tokens, goal.tokens)
        if config.texture == "swd" and config.texture_weight:
            terms["texture"] = config.texture_weight * self.texture(draw, pictures, wanted)
        share = alignment.signal_share(time)
        return {name: share * value for name, value in terms.items()}

    def texture(self, draw: Draw, pictures: Tensor, wanted: Tensor) -> Tensor:
        """The sliced Wasserstein distance (B,) of pictures in [0, 1], given as the authors give them, in [-1, 1]."""
        side = min(pictures.shape[-2:])
        patch = PATCH if alignment.pyramid_levels(side, PATCH) == alignment.LEVELS else SMALL_PATCH
        directions = draw.normal((alignment.pyramid_levels(side, patch), DIRECTIONS, 3, patch, patch))
        return alignment.sliced_wasserstein(2 * pictures - 1, 2 * wanted - 1, directions)

    def target(
        self, guide: Callable[..., Tensor], sample: Tensor, noise: Tensor, time: Tensor, embeds: Tensor
    ) -> Tensor:
        """E[x_0 | x_t] by the guided teacher, x_t the sample (B, *shape) with its own noise at ``time`` (B,)."""
        state, null = dm.noised(sample, noise, time), guide(ids=sent(self.null_ids, sample.device)).expand_as(embeds)
        both = torch.cat([state, state]), torch.cat([time, time])
        conditional, empty = guide(*both, embeds=torch.cat([embeds, null])).chunk(2)
        velocity = empty + self.config.teacher_guidance_scale * (conditional - empty)
        return state - time.reshape(-1, *[1] * (state.ndim - 1)) * velocity
