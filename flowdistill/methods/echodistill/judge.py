"""Whether a picture shows the concept and follows its prompt, said by networks that do not train (ours)."""

from __future__ import annotations

from collections.abc import Sequence

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


class Judge:
    """Two scores of pictures made for known prompts.

    The level is the mean cosine of their identity features to the references', on a scale where 0 is what pictures of
    the initializer's word have and 1 what the references have among themselves. The margin is how much worse the frozen
    teacher denoises a picture under other prompts than under its own, the new word replaced by the initializer; below
    0 another prompt fits better.

    Args:
        teacher: the frozen one.
        feature_network: identity features.
        references: the concept's pictures (N, 3, H, W) in [0, 1].
        ordinary: pictures of the initializer's word in the same prompts.
        prompts: the prompts with the initializer in the place of the word.
    """

    def __init__(
        self, teacher: Teacher, feature_network: Vision, references: Tensor, ordinary: Tensor, prompts: Sequence[str]
    ) -> None:
        self.teacher, self.feature_network = teacher, feature_network
        self.references = self._features(references)
        self.low = self._cosine(ordinary).mean().item()
        count = len(references)
        alike = self.references @ self.references.T
        self.high = ((alike.sum() - count) / (count * (count - 1))).item() if count > 1 else 1.0
        self.names = list(prompts)
        condition = teacher.encode(prompts=self.names)
        assert condition is not None
        self.condition = condition

    @property
    def separates(self) -> bool:
        """Whether the identity network sees the concept at all: the references are more alike than ordinary pictures
        are to them."""
        return self.high > self.low + 1e-4

    @torch.no_grad()
    def levels(self, images: Tensor) -> Tensor:
        """The level (B,) of images (B, 3, H, W); -inf where the identity network cannot tell."""
        cosine = self._cosine(images)
        return (cosine - self.low) / (self.high - self.low) if self.separates else torch.full_like(cosine, -torch.inf)

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
        parts = [self.feature_network(part.to(self.teacher.device)).pooled for part in images.split(AT_ONCE)]
        return F.normalize(torch.cat(parts), dim=1)

    def _cosine(self, images: Tensor) -> Tensor:
        """Mean cosine (B,) to the references, on the CPU."""
        return (self._features(images) @ self.references.T).mean(1).cpu()
