"""Two small networks that look at shapes: the classifier (with features for the Fréchet distance), and a judge.

The classifier reads shape, colour and background, and has never seen a concept. The judge has other weights and
another width, is trained on other images and knows the concepts: it may say whether a method that never used it has
learnt one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.data import shapes
from flowdistill.data.assets import asset_path, load_network
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import generator_of

CLASSIFIER_HEADS = {
    "shape": list(shapes.SHAPES), "colour": list(shapes.COLOURS), "background": list(shapes.BACKGROUNDS),
}
# Everything that is neither a plain shape nor a concept is "other", so that a blot is not taken for a concept.
JUDGE_HEADS = {"object": [*shapes.SHAPES, "other", *CONCEPTS], "background": list(shapes.BACKGROUNDS)}


def trunk_features(trunk: nn.Module, images: Tensor) -> Tensor:
    """What a trunk makes of images (B, 3, 32, 32) in [0, 1]: float (B, D).

    Raises:
        UserError: the images are not (B, 3, 32, 32).
    """
    if images.ndim != 4 or images.shape[1:] != (3, shapes.SIZE, shapes.SIZE):
        raise UserError(f"the networks of the shapes read images of shape (B, 3, {shapes.SIZE}, {shapes.SIZE}), "
                        f"not {tuple(images.shape)}")
    weight = next(trunk.parameters())
    return trunk(2.0 * images.to(weight.dtype) - 1.0)


class ShapesNet(nn.Module):
    """Four convolutions and a linear layer on images (B, 3, 32, 32) in [0, 1], with a linear head for each question.

    Neither dropout nor batch statistics, so a feature belongs to its image; SiLU keeps every feature alive.

    Args:
        heads: the possible answers to each question.
        width: channels of the first convolution; the others have up to four times as many.
        feature_size: width D of the penultimate layer.
    """

    def __init__(self, heads: dict[str, Sequence[str]], width: int = 16, feature_size: int = 64) -> None:
        super().__init__()
        self.config = {"heads": {name: list(answers) for name, answers in heads.items()}, "width": width,
                       "feature_size": feature_size}
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((width, 2), (2 * width, 2), (4 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.SiLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, feature_size), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(feature_size, len(answers)) for name, answers in heads.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float (B, D), of images (B, 3, 32, 32) in [0, 1].

        Raises:
            UserError: the images are not (B, 3, 32, 32).
        """
        return trunk_features(self.trunk, images)

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) of each question."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities, float (B, K), of all combinations of answers, the last question's counting fastest."""
        joint = torch.zeros(len(images), 1, device=images.device)
        for logits in self.answers(images).values():
            joint = (joint.unsqueeze(2) + logits.log_softmax(1).unsqueeze(1)).flatten(1)
        return joint


class ShapesClassifier(ShapesNet):
    """The network of ``CLASSIFIER_HEADS``, whose combinations are the classes of ``flowdistill.data.shapes``."""

    @staticmethod
    def prompt_labels(prompts: Sequence[str]) -> Tensor:
        """The class that each prompt describes, int64 (N,); -1 for a prompt that describes none."""
        return torch.tensor([shapes.class_of(prompt) for prompt in prompts], dtype=torch.int64)


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and a change of contrast in random strengths, as generated images have them."""
    rows = len(images)

    def strength(low: float, high: float) -> Tensor:
        return shapes.uniform(generator, rows, low, high)[:, None, None, None]

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = torch.lerp(images, blurred, strength(0.0, 1.0))
    noisy = mixed + strength(0.0, 0.06) * torch.randn(images.shape, generator=generator)
    return (strength(0.94, 1.06) * noisy + strength(-0.03, 0.03)).clamp(0.0, 1.0)


def classifier_data(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes (count, 3, 32, 32) and the answers to the classifier's questions, each int64 (count,)."""
    images, classes = shapes.make_shapes(count, seed)
    return images, dict(zip(CLASSIFIER_HEADS, shapes.split_class(classes), strict=True))


def judge_data(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A third scenes, a third concepts, a third other objects, and the answers to the judge's questions.

    The others are near a concept, one of its properties being another; a careless judge would accept them.
    """
    generator = generator_of(seed)
    third, names, grounds = count // 3, list(CONCEPTS), list(shapes.BACKGROUNDS)
    plain, classes = shapes.make_shapes(count - 2 * third, seed)
    shape, _, ground = shapes.split_class(classes)
    images, objects, backgrounds = [plain], [shape], [ground]
    for i, name in enumerate(names):
        rows = third // len(names) + (i < third % len(names))
        picked = torch.randint(len(grounds), (rows,), generator=generator)
        images.append(draw_concept(name, [grounds[k] for k in picked.tolist()], seed + 11 + i))
        objects.append(torch.full((rows,), JUDGE_HEADS["object"].index(name)))
        backgrounds.append(picked)
    picked = torch.randint(len(grounds), (third,), generator=generator)
    images.append(_others(third, picked, generator, seed + 29))
    objects.append(torch.full((third,), JUDGE_HEADS["object"].index("other")))
    backgrounds.append(picked)
    answers = {"object": torch.cat(objects), "background": torch.cat(backgrounds)}
    order = torch.randperm(count, generator=generator)
    return torch.cat(images)[order], {name: answer[order] for name, answer in answers.items()}


def _others(count: int, grounds: Tensor, generator: torch.Generator, seed: int) -> Tensor:
    """Objects of two colours that are no concept: another shape, or another pattern, or colours far from its own."""
    known = list(CONCEPTS.values())
    near = torch.randint(len(known), (count,), generator=generator)
    shape = torch.tensor([shapes.SHAPES.index(c.word) for c in known])[near]
    pattern = torch.tensor([c.pattern for c in known])[near]
    first, second = (torch.tensor([getattr(c, side) for c in known], dtype=torch.float32)[near]
                     for side in ("first", "second"))
    what = torch.randint(4, (count,), generator=generator)
    shape = torch.where(what == 0, (shape + torch.randint(1, 6, (count,), generator=generator)) % 6, shape)
    other = (pattern - 1 + torch.randint(1, 3, (count,), generator=generator)) % 3 + 1
    pattern = torch.where(what == 1, other, pattern)
    # With its channels exchanged a colour is clearly another.
    exchanged = (what == 2)[:, None]
    first = torch.where(exchanged, first.roll(1, dims=1), first)
    second = torch.where(exchanged, second.roll(1, dims=1), second)
    # Two of the world's colours together, in any pattern, also none.
    colours = shapes.palette(shapes.COLOURS)
    pick = [torch.randint(len(colours), (count,), generator=generator) for _ in range(2)]
    pick[1] = torch.where(pick[0] == pick[1], (pick[1] + 1) % len(colours), pick[1])
    two = (what == 3)[:, None]
    first, second = torch.where(two, colours[pick[0]], first), torch.where(two, colours[pick[1]], second)
    ground = shapes.palette(shapes.BACKGROUNDS)[grounds]
    return shapes.render(shapes.place(shape, pattern, first, second, ground, seed))


def train_network(
    model: ShapesNet, images: Tensor, answers: dict[str, Tensor], steps: int, batch_size: int, seed: int
) -> ShapesNet:
    """Train on images (N, 3, 32, 32), spoilt, and the answers (N,); AdamW, one-cycle rate, questions weigh alike."""
    generator = generator_of(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        logits = model.answers(spoil(images[rows], generator))
        loss = torch.stack([F.cross_entropy(logits[name], answers[name][rows], label_smoothing=0.02)
                            for name in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracies(model: ShapesNet, images: Tensor, answers: dict[str, Tensor]) -> dict[str, float]:
    """Share of images (N, 3, 32, 32) for which each answer is right, and all of them (``all``), in [0, 1]."""
    right: dict[str, list[Tensor]] = {name: [] for name in answers}
    for start in range(0, len(images), 500):
        for name, logits in model.answers(images[start : start + 500]).items():
            right[name].append(logits.argmax(1) == answers[name][start : start + 500])
    each = {name: torch.cat(parts) for name, parts in right.items()}
    every = torch.stack(list(each.values())).all(dim=0)
    return {name: flags.double().mean().item() for name, flags in (each | {"all": every}).items()}


def load_shapes_classifier(path: str | Path | None = None) -> ShapesClassifier:
    """The classifier in a folder with ``config.json`` and ``model.safetensors``, frozen; None is the shipped one.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network its config describes.
    """
    folder = asset_path("shapes/classifier") if path is None else path
    return load_network(ShapesClassifier, folder, "classifier of shapes")


def load_shapes_judge(path: str | Path | None = None) -> ShapesNet:
    """The judge, frozen, as :func:`load_shapes_classifier`."""
    return load_network(ShapesNet, asset_path("shapes/judge") if path is None else path, "judge of shapes")
