"""Two gloo processes measure what one process measures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowdistill.evaluation import Evaluator, Moments, PromptsInTurn, load_reference
from flowdistill.features import load_features
from flowdistill.features.scorers import Scorer
from flowdistill.utils.errors import UserError
from flowdistill.utils.processes import Processes
from tests.features.clips import tiny_clip
from tests.processes import ranks

SHAPE = (1, 4, 4)


class Judge(nn.Module):
    """A fixed random classifier with 6 features and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(16, 6, generator=draw))
        self.register_buffer("head", torch.randn(6, 3, generator=draw))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh((images.flatten(1) - 0.5) @ self.first)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images) @ self.head


def sampler(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(noise + 0.3 * labels.view(-1, 1, 1, 1))


def measure(folder: Path) -> dict:
    """Everything that communicates, as one process of however many there are."""
    features = torch.randn(101, 5, generator=torch.Generator().manual_seed(1)) + 100
    moments = Moments(5)
    moments.update(features[list(Processes.current().span(101))])
    total = moments.reduce()
    extractor = load_features(Judge(), device="cpu")
    reference = load_reference(folder / "images", extractor, folder / "cache", batch_size=4)
    evaluator = Evaluator(extractor, reference, num_images=61, seed=5, batch_size=7, more_metrics=["diversity"],
                          progress=False)
    row = evaluator.measure(sampler, SHAPE, num_classes=3)
    # One image: with two processes, one of them has none.
    alone = Evaluator(extractor, reference, num_images=1, progress=False).measure(sampler, SHAPE, num_classes=3)
    by_place = replace(extractor, hash="by place", spatial=lambda images: (extractor.network(images), images[:, 0]))
    placed = load_reference(folder / "images", by_place, folder / "cache", batch_size=4)
    spatial = Evaluator(by_place, placed, num_images=61, seed=5, batch_size=7, progress=False)
    scored = Evaluator(None, None, 61, 5, 7, scorers=[f"clip:{folder / 'clip'}"], device="cpu", progress=False)
    prompts = PromptsInTurn(lambda indices: None, ["a cat", "a dog", "x"])
    failing = Evaluator(None, None, 61, 5, 7, scorers=[Scorer("own", "own", fails_last)], progress=False)
    with pytest.raises(UserError, match="only the last process"):
        failing.measure(unlabelled, SHAPE, condition=prompts)
    with pytest.raises(UserError, match="only the main process"):
        Processes.current().on_main(refuse)
    return {
        "mean": total.mean,
        "covariance": total.covariance,
        "reference": reference.covariance,
        "features": reference.features,
        "row": row,
        "alone": alone,
        "placed": placed.spatial_covariance,
        "spatial": spatial.measure(sampler, SHAPE, num_classes=3),
        "scored": scored.measure(unlabelled, SHAPE, condition=prompts),
        "spans": [list(Processes(rank, 3).span(10)) for rank in range(3)],
        "batches": [list(Processes(rank, 3).span(10, 4)) for rank in range(3)],
    }


def unlabelled(noise: torch.Tensor, given: None) -> torch.Tensor:
    return torch.sigmoid(noise)


def fails_last(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    processes = Processes.current()
    if processes.rank == processes.world - 1:
        raise RuntimeError("only the last process says so")
    return images.float().mean((1, 2, 3))


def refuse() -> None:
    raise UserError("only the main process says so")


def worker(folder: Path) -> None:
    rank = Processes.start().rank
    torch.save(measure(folder), folder / f"rank{rank}.pt")


def image_folder(path: Path) -> None:
    path.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 4, 4), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{index:03}.png")


def test_two_processes_equal_one(tmp_path):
    for name in ("one", "two"):
        image_folder(tmp_path / name / "images")
        tiny_clip(tmp_path / name / "clip", 5)
    one = measure(tmp_path / "one")
    ranks(2, worker, tmp_path / "two")
    both = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert one["spans"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert one["batches"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for two in both:
        for name in ("mean", "covariance"):
            assert torch.allclose(one[name], two[name], rtol=1e-12, atol=1e-12), name
        # To the last bit: the batches are the same ones, and the moments those of all features.
        for name in ("reference", "features", "placed"):
            assert torch.equal(one[name], two[name]), name
        for row in ("row", "scored", "spatial"):
            assert two[row].figures == one[row].figures
        assert two["alone"].fid is None and two["alone"].kid is None and two["alone"].accuracy in (0.0, 1.0)
    assert both[0]["row"] == both[1]["row"]
    assert one["scored"].clip_score > 1 < one["scored"].clip_score_std
    assert one["spatial"].sfid > 0.01 and one["placed"].shape == (16, 16)
    assert one["row"].diversity > one["row"].diversity_std > 0
    assert one["row"].fid > 0.1 and 0 < one["row"].recall < 1
    # A tie would prove little: the accuracy is neither none nor all, and the two processes wrote each cache file once.
    assert 0 < one["row"].accuracy < 1
    assert len(list((tmp_path / "two" / "cache").iterdir())) == 2  # of the features, and of those by place
