"""Critics: online copies of the teacher that follow the student's samples."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import Around, ExtendedVelocity, VelocityNetwork
from flowdistill.objectives.distribution_matching import flow_matching_loss
from flowdistill.paths.native_path import NativePath


def make_critic(
    teacher: VelocityNetwork, lora: LoraSettings | None = None, scalars: tuple[str, ...] = ()
) -> ExtendedVelocity:
    """A trainable velocity network that starts equal to the teacher's.

    Args:
        teacher: the teacher's network.
        lora: adapters over the teacher's own frozen tensors; None for a float32 copy.
        scalars: extra conditions, zero at the start.
    """
    return ExtendedVelocity(teacher.trainable_copy(lora=lora), scalars)


def critic_loss(velocity: Tensor, sample: Tensor, noise: Tensor, t: Tensor, path: NativePath) -> Tensor:
    """Flow matching on the student's samples, per sample (B,), in the units of what the network predicts.

    An epsilon network's velocity is its output over 1 - t. The minimum is the same, but otherwise the rows near t_max
    outweigh all others, by 1,000 for a DDPM teacher. For EDM this is its own weight 1 / sigma^2 + 1 / sigma_data^2.

    Args:
        velocity: the critic's (B, ...) at the noised samples.
        sample, noise: (B, ...), what was noised and with what.
        t: linear times (B,).
        path: the network's native path.
    """
    weight = path.prediction_weight(t).to(velocity.dtype)
    return weight * flow_matching_loss(velocity, sample, noise)


class Discriminator(nn.Module):
    """A critic with a small head on the features of its backbone's middle: DMD2's adversarial term.

    ``forward(x, t, condition)`` is the velocity of the critic. With ``logits=True`` it returns (velocity, logits (B,))
    of one pass: the mean over positions of a two-layer perceptron. High logits mean real.
    """

    def __init__(self, critic: ExtendedVelocity) -> None:
        super().__init__()
        self.critic = critic
        backbone, family = critic.velocity.backbone, critic.velocity.family
        channels = family.middle_channels(backbone)
        hidden = nn.Linear(channels, channels)
        self.head = nn.Sequential(nn.LayerNorm(channels), hidden, nn.SiLU(), nn.Linear(channels, 1))
        self._features = _Keep()
        family.middle(backbone).register_forward_hook(self._features)

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition | None = None, logits: bool = False, **scalars: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        velocity = self.critic(x, t, condition, **scalars)
        features, self._features.value = self._features.value, None
        if not logits:
            return velocity
        assert features is not None
        # Convolutional features are (B, C, H, W), a transformer's (B, N, C).
        positions = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return velocity, self.head(positions).mean(dim=(1, 2)).float()

    def enable_gradient_checkpointing(self, around: Around = contextlib.nullcontext) -> None:
        self.critic.enable_gradient_checkpointing(around)


class _Keep:
    """Forward hook that keeps a module's output; an object, so that a copy of the network has its own."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.value = output
