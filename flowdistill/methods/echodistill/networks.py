"""EchoDistill's networks beside the student: the teacher with its word, and heads that tell real from made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.methods.echodistill.token import TokenEncoder
from flowdistill.networks.velocity import VelocityNetwork

HIDDEN = 512


class ConceptTeacher(nn.Module):
    """An adapted velocity and the text encoder with the new word: what the reconstruction loss trains together.

    ``forward(x, t, ids)`` encodes the ids (B, L) and gives the velocity; with ``embeds`` they are not encoded again;
    ``forward(ids=ids)`` gives the embeddings alone. One way in, so that wrappers see every use.
    """

    def __init__(self, velocity: VelocityNetwork, word: TokenEncoder) -> None:
        super().__init__()
        self.velocity, self.word = velocity, word

    def forward(
        self, x: Tensor | None = None, t: Tensor | None = None, ids: Tensor | None = None, embeds: Tensor | None = None
    ) -> Tensor:
        if embeds is None:
            assert ids is not None
            embeds = self.word(ids)
        return embeds if x is None else self.velocity(x, t, Condition({"prompt_embeds": embeds}))

    def enable_gradient_checkpointing(self) -> None:
        self.velocity.backbone.enable_gradient_checkpointing()
        self.word.encoder.gradient_checkpointing_enable()


class DiscriminatorHeads(nn.Module):
    """A two-layer perceptron for each frozen network's pooled features (B, D_k): logits (B, K), high where real.

    One logit and softplus is the same as the authors' two and cross-entropy.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)) for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(seen) for head, seen in zip(self.heads, features, strict=True)], dim=1)

    def enable_gradient_checkpointing(self) -> None:
        """Two layers have nothing worth recomputing."""
