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
from flowdistill.utils.randomness import Draw

DIRECTIONS = 32  # of the sliced Wasserstein distance, a sample
LARGE = 176  # pixels from which five levels have the authors' patches of 11


class AlignmentTerms:
    """The three terms, each (B,), with their weights and the share of signal at their time.

    Args:
        eye: the identity network.
        null_ids: ids (1, L) of the other side of guidance.
    """

    def __init__(self, config: EchoDistillConfig, teacher: Teacher, eye: Vision, null_ids: Tensor) -> None:
        self.config, self.teacher, self.eye, self.null_ids = config, teacher, eye, null_ids

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
            seen = self.eye(pictures)
            with torch.no_grad():
                goal = self.eye(wanted)
            terms["identity"] = config.identity_weight * alignment.identity_distance(seen.pooled, goal.pooled)
            if config.texture == "gram":
                terms["texture"] = config.texture_weight * alignment.gram_distance(seen.tokens, goal.tokens)
        if config.texture == "swd" and config.texture_weight:
            patch = 11 if min(pictures.shape[-2:]) >= LARGE else 5
            directions = draw.normal((DIRECTIONS, 3, patch, patch))
            terms["texture"] = config.texture_weight * alignment.sliced_wasserstein(pictures, wanted, directions)
        share = alignment.signal_share(time)
        return {name: share * value for name, value in terms.items()}

    def target(
        self, guide: Callable[..., Tensor], sample: Tensor, noise: Tensor, time: Tensor, embeds: Tensor
    ) -> Tensor:
        """E[x_0 | x_t] by the guided teacher, x_t the sample (B, *shape) with its own noise at ``time`` (B,)."""
        state, null = dm.noised(sample, noise, time), guide(ids=self.null_ids.to(sample.device)).expand_as(embeds)
        both = torch.cat([state, state]), torch.cat([time, time])
        conditional, empty = guide(*both, embeds=torch.cat([embeds, null])).chunk(2)
        velocity = empty + self.config.teacher_guidance_scale * (conditional - empty)
        return state - time.reshape(-1, *[1] * (state.ndim - 1)) * velocity
