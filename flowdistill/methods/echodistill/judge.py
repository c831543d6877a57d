"""Whether a picture shows the concept and follows its prompt, said by networks that do not train (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.features.vision import Vision
from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers import Teacher
from flowdistill.utils.randomness import indexed_noise

TIMES = (0.35, 0.5, 0.65)  # where the prompt decides much, as shares of the teacher's t_max
RIVALS = 3
AT_ONCE = 64
PLAIN = (1.0, 0.75, 0.5, 0.25, 0.0)  # grays that a cut-out object is put on


@dataclass(frozen=True)
class Separation:
    """How well identity features tell the concept's pictures from ordinary ones of the same prompts.

    ``d_prime``: difference of the mean cosines in their common standard deviation (0: not at all, 3: almost always; NaN
    of a single picture). ``overlap``: share of pairs of one of each in which the ordinary one is at least as alike, in
    [0, 1] (0.5: chance).
    """

    d_prime: float
    overlap: float

    @classmethod
    def of(cls, own: Tensor, ordinary: Tensor) -> Separation:
        """
        Args:
            own: cosines (N,) of the concept's pictures, each to the others alone.
            ordinary: cosines (M,) of ordinary pictures.
        """
        if len(own) < 2:
            return cls(math.nan, math.nan)
        own, ordinary = own.double(), ordinary.double()
        apart = (own.mean() - ordinary.mean()).item()
        spread = math.sqrt((own.var() + ordinary.var(correction=min(1, len(ordinary) - 1))).item() / 2)
        pairs = ordinary[None, :] - own[:, None]
        overlap = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
        return cls(apart / spread if spread > 0 else math.copysign(math.inf, apart) if apart else 0.0, overlap)


class Judge:
    """Two scores of pictures made for known prompts.

    The level is the mean cosine of their identity features to the references', on a scale where 0 is what pictures of
    the initializer's word have and 1 what the references have among themselves, each left out in turn. With masks a
    reference's features are those of its object alone: the mean over plain backgrounds that it is put on, grays and
    the colours around the objects. With ``patches`` the cosine is that of the network's features of places: the mean,
    over a reference's places (with masks those of the object, by their share of it), of the greatest to any place of
    the picture. So the object may be anywhere, and what else the picture shows takes nothing away. The margin is how
    much worse the frozen teacher denoises a picture under other prompts than under its own, the new word replaced by
    the initializer; below 0 another prompt fits better.

    Args:
        teacher: the frozen one.
        feature_network: identity features.
        references: the concept's pictures (N, 3, H, W) in [0, 1].
        ordinary: pictures of the initializer's word in the same prompts.
        prompts: the prompts with the initializer in the place of the word.
        masks: (N, 1, H, W) in [0, 1], 1 where a reference shows the object.
        patches: compare the features of places, not those of whole pictures.

    Attributes:
        references: features (N, T, D) of length 1, of whole pictures as one place.
        shares: (N, T) of a reference's places in its cosine, 1 in sum.
        separation: how much the level can be trusted.
    """

    def __init__(
        self,
        teacher: Teacher,
        feature_network: Vision,
        references: Tensor,
        ordinary: Tensor,
        prompts: Sequence[str],
        masks: Tensor | None = None,
        patches: bool = False,
    ) -> None:
        self.teacher, self.feature_network, self.patches = teacher, feature_network, patches
        self.references = self._features(references) if masks is None else self._of_objects(references, masks)
        self.shares = self._shares(references, masks)
        count = len(references)
        alike = self._alike(references).fill_diagonal_(0)
        own, plain = alike.sum(1) / max(1, count - 1), self._cosine(ordinary)
        self.low, self.high = plain.mean().item(), own.mean().item() if count > 1 else 1.0
        self.separation = Separation.of(own, plain)
        self.names = list(prompts)
        condition = teacher.encode(prompts=self.names)
        assert condition is not None
        self.condition = condition

    @torch.no_grad()
    def levels(self, images: Tensor) -> Tensor:
        """The level (B,) of images (B, 3, H, W); -inf where the identity network cannot tell."""
        cosine = self._cosine(images)
        blind = self.high <= self.low
        return torch.full_like(cosine, -torch.inf) if blind else (cosine - self.low) / (self.high - self.low)

    @torch.no_grad()
    def margins(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """The margin (B,) of latents made for the prompts of these numbers (B,); inf where all prompts are one."""
        others = self._rivals(prompts)
        if others.shape[1] == 0:
            return torch.full((len(latents),), torch.inf)
        noise = indexed_noise(self.teacher.shape, 1, range(len(latents)))
        parts = []
        for start in range(0, len(latents), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            x, n = latents[rows].to(self.teacher.device), noise[rows].to(self.teacher.device)
            own = self.error(x, n, prompts[rows])
            rivals = [self.error(x, n, column) for column in others[rows].unbind(1)]
            parts.append((torch.stack(rivals).amin(0) - own).cpu())
        return torch.cat(parts)

    def _rivals(self, prompts: Tensor) -> Tensor:
        """Numbers (B, K) of prompts with another text."""
        rows = []
        for own in prompts.tolist():
            later = [(own + shift) % len(self.names) for shift in range(1, len(self.names))]
            different = {self.names[i]: i for i in reversed(later) if self.names[i] != self.names[own]}
            rows.append(list(different.values())[:RIVALS])
        fewest = min((len(row) for row in rows), default=0)
        return torch.tensor([row[:fewest] for row in rows], dtype=torch.int64).reshape(len(rows), fewest)

    def error(self, x: Tensor, noise: Tensor, prompts: Tensor) -> Tensor:
        """How far off the denoised picture is (B,), over a few times."""
        condition: Condition = self.condition[prompts.to(self.teacher.device)]
        total = torch.zeros(len(x), device=x.device)
        for share in TIMES:
            time = torch.full((len(x),), share * self.teacher.t_max, device=x.device)
            velocity = self.teacher.velocity(dm.noised(x, noise, time), time, condition)
            total += (velocity - (noise - x)).square().flatten(1).mean(1)
        return total / len(TIMES)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """Features (B, T, D) of length 1 of places, or of the whole as one place."""
        parts = []
        for part in images.split(AT_ONCE):
            seen = self.feature_network(part.to(self.teacher.device))
            parts.append(seen.places()[0] if self.patches else seen.pooled[:, None])
        return F.normalize(torch.cat(parts), dim=2)

    def _of_objects(self, references: Tensor, masks: Tensor) -> Tensor:
        """Features (N, T, D) of length 1 of the objects alone."""
        around = ((1 - masks) * references).sum((2, 3)) / (1 - masks).sum((2, 3)).clamp(min=1e-6)
        grounds = torch.cat([references.new_tensor(PLAIN)[:, None].expand(-1, 3), around])
        total = torch.stack([
            self._features(masks * references + (1 - masks) * ground[None, :, None, None]) for ground in grounds
        ]).sum(0)
        return F.normalize(total, dim=2)

    @torch.no_grad()
    def _shares(self, references: Tensor, masks: Tensor | None) -> Tensor:
        shares = torch.ones(self.references.shape[:2], device=self.references.device)
        if self.patches and masks is not None:
            _, grid = self.feature_network(references[:1].to(self.teacher.device)).places()
            shares = F.adaptive_avg_pool2d(masks, grid).flatten(1).to(shares)
        return shares / shares.sum(1, keepdim=True)

    @torch.no_grad()
    def _alike(self, images: Tensor) -> Tensor:
        """Cosine (B, N) to each reference, on the CPU."""
        parts = []
        for part in images.split(AT_ONCE):
            seen = self._features(part)
            best = [(seen @ reference.T).amax(1) @ share
                    for reference, share in zip(self.references, self.shares, strict=True)]
            parts.append(torch.stack(best, 1).cpu())
        return torch.cat(parts)

    def _cosine(self, images: Tensor) -> Tensor:
        """Mean cosine (B,) to the references, on the CPU."""
        return self._alike(images).mean(1)
