"""A small classifier of 8x8 digits: features for the Fréchet distance, and label accuracy."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.data.assets import asset_path, load_network
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import generator_of, seed_torch


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers on images (B, 1, 8, 8) in [0, 1].

    Neither dropout nor batch statistics: train and eval mode are the same function, so a feature never depends on the
    other images of its batch. SiLU instead of ReLU keeps every feature alive, hence its covariance full rank.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        feature_size: width D of the penultimate layer.
    """

    def __init__(self, width: int = 32, feature_size: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.config = {"width": width, "feature_size": feature_size, "num_classes": num_classes}
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, feature_size),
            nn.SiLU(),
        )
        self.head = nn.Linear(feature_size, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float (B, D), of images (B, 1, 8, 8) in [0, 1].

        Raises:
            UserError: the images are not (B, 1, 8, 8).
        """
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise UserError(f"the digit classifier reads images of shape (B, 1, 8, 8), not {tuple(images.shape)}")
        return self.trunk(2.0 * images.to(self.head.weight.dtype) - 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, float (B, num_classes)."""
        return self.head(self.features(images))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn and scale each image (B, 1, H, W) a little: up to 1 pixel of 8, 9 degrees and 10 %."""
    rows = len(images)

    def draw(size: float) -> Tensor:
        return size * (2.0 * torch.rand(rows, generator=generator) - 1.0)

    angle, scale = draw(0.16), 1.0 + draw(0.1)
    # In grid coordinates the image is 2 wide, so a pixel of eight is 0.25.
    first = torch.stack([scale * angle.cos(), -scale * angle.sin(), draw(0.25)], dim=1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), draw(0.25)], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_digits_classifier(images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> DigitsClassifier:
    """Train a classifier on images (N, 1, 8, 8) in [0, 1] and labels (N,); AdamW, one-cycle rate, augmented."""
    generator = generator_of(seed)
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        model = DigitsClassifier(num_classes=int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(augment(images[rows], generator)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def classifier_accuracy(model: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (B, 1, 8, 8) in [0, 1] whose most likely class is the label, in [0, 1]."""
    return (model(images).argmax(1) == labels).double().mean().item()


def load_digits_classifier(path: str | Path | None = None) -> DigitsClassifier:
    """Load the classifier of a folder with ``config.json`` and ``model.safetensors``, frozen, in eval mode, on the CPU.

    Args:
        path: a folder made by ``scripts/train_digits_classifier.py``; None is the shipped one.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network its config describes.
    """
    folder = asset_path("digits-classifier") if path is None else local_path(path)
    return load_network(DigitsClassifier, folder, "digit classifier")
