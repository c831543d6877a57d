"""A small classifier of grey pictures, 8x8 digits or 28x28 clothes: features for the Fréchet distance, and label
accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.data.assets import asset_path, load_network
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import generator_of, seed_torch

SMALLEST = 4  # pixels of a side in front of the linear layers


class DigitsClassifier(nn.Module):
    """Convolutions and two linear layers on grey images (B, 1, S, S) in [0, 1]: two convolutions at full size, then one
    more after each halving, until a side has at most 4 pixels.

    Neither dropout nor batch statistics: train and eval mode are the same function, so a feature never depends on the
    other images of its batch. SiLU instead of ReLU keeps every feature alive, hence its covariance full rank.

    Args:
        width: channels of the first convolution; the others have twice as many.
        feature_size: width D of the penultimate layer.
        size: the images' side S in pixels, at least 8.
    """

    def __init__(self, width: int = 32, feature_size: int = 64, num_classes: int = 10, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.config = {"width": width, "feature_size": feature_size, "num_classes": num_classes, "size": size}
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.SiLU()]
        while size > SMALLEST:
            layers += [nn.MaxPool2d(2), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU()]
            size //= 2
        layers += [nn.Flatten(), nn.Linear(2 * width * size**2, feature_size), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(feature_size, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float (B, D), of images (B, 1, S, S) in [0, 1].

        Raises:
            UserError: the images are not (B, 1, S, S).
        """
        if images.ndim != 4 or images.shape[1:] != (1, self.size, self.size):
            raise UserError(f"the classifier of grey pictures reads images of shape (B, 1, {self.size}, {self.size}), "
                            f"not {tuple(images.shape)}")
        return self.trunk(2.0 * images.to(self.head.weight.dtype) - 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, float (B, num_classes)."""
        return self.head(self.features(images))


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Move, turn and scale each image (B, 1, H, W) a little: up to 1 pixel of 8, 9 degrees and 10 %, times
    ``strength``."""
    rows = len(images)

    def draw(size: float) -> Tensor:
        return strength * size * (2.0 * torch.rand(rows, generator=generator) - 1.0)

    angle, scale = draw(0.16), 1.0 + draw(0.1)
    # In grid coordinates the image is 2 wide, so a pixel of eight is 0.25.
    first = torch.stack([scale * angle.cos(), -scale * angle.sin(), draw(0.25)], dim=1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), draw(0.25)], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class ClassifierTraining:
    """The training of a classifier, step by step: AdamW, one-cycle rate, augmented images, label smoothing.

    Args:
        images: (N, 1, S, S) in [0, 1].
        labels: int (N,), from 0 on, each class at least once.
        steps: of the whole training; ``step`` counts those done.
        width: as ``DigitsClassifier``.
        strength: as ``augment``.
    """

    def __init__(self, images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int, width: int = 32,
                 strength: float = 1.0) -> None:
        self.images, self.labels, self.batch_size, self.strength = images, labels, batch_size, strength
        self.generator = generator_of(seed)
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            self.model = DigitsClassifier(width, num_classes=int(labels.max()) + 1, size=images.shape[-1])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=steps)
        self.step = 0

    def train_step(self) -> float:
        """One step; returns its loss."""
        rows = torch.randint(len(self.images), (self.batch_size,), generator=self.generator)
        logits = self.model(augment(self.images[rows], self.generator, self.strength))
        loss = F.cross_entropy(logits, self.labels[rows], label_smoothing=0.05)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that decides the steps to come, besides the arguments; ``load`` takes it."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(), "generator": self.generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of a training with the same arguments."""
        self.step = state["step"]
        self.generator.set_state(state["generator"])
        for part in ("model", "optimizer", "schedule"):
            getattr(self, part).load_state_dict(state[part])


def train_digits_classifier(images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> DigitsClassifier:
    """Train a classifier on images (N, 1, S, S) in [0, 1] and labels (N,), without a pause."""
    training = ClassifierTraining(images, labels, steps, batch_size, seed)
    for _ in range(steps):
        training.train_step()
    return training.model.eval()


@torch.no_grad()
def classifier_accuracy(model: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 1, S, S) in [0, 1] whose most likely class is the label, in [0, 1]."""
    right = [model(part).argmax(1) == names for part, names in zip(images.split(1000), labels.split(1000), strict=True)]
    return torch.cat(right).double().mean().item()


def load_digits_classifier(path: str | Path | None = None) -> DigitsClassifier:
    """Load the classifier of a folder with ``config.json`` and ``model.safetensors``, frozen, in eval mode, on the CPU.

    Args:
        path: a folder made by ``scripts/train_digits_classifier.py`` or ``scripts/train_fashion_classifier.py``; None
            is the digits' shipped one.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network its config describes.
    """
    folder = asset_path("digits-classifier") if path is None else local_path(path)
    return load_network(DigitsClassifier, folder, "classifier of grey pictures")
