"""Metrics against the implementations and formulas that papers use, and against sets that are not alike."""

import numpy as np
import pytest
import torch

from flowdistill.evaluation.metrics.cmmd import cmmd
from flowdistill.evaluation.metrics.density_coverage import density_coverage
from flowdistill.evaluation.metrics.inception_score import inception_score


def points(count: int, seed: int, shift: float = 0.0, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_density_and_coverage_are_those_of_the_paper(shift):
    """Equations 4 and 5 in NumPy with differences, which the authors' package prdc 0.2 computes as well."""
    ours, theirs = points(90, 0, shift), points(70, 1)
    a, b = ours.double().numpy(), theirs.double().numpy()
    radii = np.sort(np.linalg.norm(b[:, None] - b, axis=-1), axis=1)[:, 5]
    inside = np.linalg.norm(a[:, None] - b, axis=-1) < radii
    hits, covered = density_coverage(ours, theirs, 5)
    assert hits.mean().item() == pytest.approx(inside.sum() / (5 * len(a)), abs=1e-12)
    assert covered == inside.any(0).mean()


def test_density_and_coverage_know_what_is_missing():
    theirs = torch.cat([points(100, 0), points(100, 1, 20)])
    same = density_coverage(torch.cat([points(100, 2), points(100, 3, 20)]), theirs)
    half = density_coverage(points(200, 4), theirs)  # one of two modes: as dense, and covers half
    away = density_coverage(points(200, 5, 100), theirs)
    assert same[0].mean() == pytest.approx(1, abs=0.2) and same[1] > 0.9
    assert half[0].mean() == pytest.approx(1, abs=0.2) and half[1] < 0.51
    assert away[0].mean() == away[1] == 0
    # The set itself: each ball holds its middle and k - 1 neighbours, and an edge is outside, however it was rounded.
    copied = density_coverage(theirs, theirs, 5)
    assert copied[0].sum().item() == pytest.approx(200) and copied[1] == 1
    assert density_coverage(points(3, 0), points(5, 0)) is None


def test_cmmd_is_that_of_its_code():
    """Embeddings of one length; the mean of exp(-|x - y|^2 / 200) over all pairs, an image with itself too."""
    ours, theirs = (torch.nn.functional.normalize(points(count, seed, 0.3 * seed), dim=1)
                    for count, seed in ((2100, 0), (50, 1)))
    a, b = ours.double().numpy(), theirs.double().numpy()

    def kernel(x, y):
        return np.exp(-((x[:, None] - y) ** 2).sum(-1) / (2 * 10**2)).mean()

    value, influence = cmmd(ours, theirs)
    assert value == pytest.approx(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), abs=1e-9) and value > 0.5
    assert abs(cmmd(theirs, theirs)[0]) < 1e-9
    # The influence is what the distance moves by with an image's weight: a difference quotient.
    more = torch.cat([ours, ours[:1]])
    moved = (cmmd(more, theirs)[0] - value) * len(more)
    assert moved == pytest.approx((influence[0] - influence.mean()).item(), rel=0.01)


def test_inception_score_is_torchmetrics_and_torch_fidelitys():
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * points(64, 0, size=9)
    metric = InceptionScore(torch.nn.Identity(), splits=1)
    metric.update(logits)
    value, spread = inception_score(logits)
    assert value == pytest.approx(metric.compute()[0].item(), rel=1e-5) and spread is None
    # Splits in order, as in ADM's and torch-fidelity's code without shuffling.
    parts = [inception_score(part)[0] for part in logits.split(16)]
    assert inception_score(logits, 16) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))


def test_inception_score_is_between_one_and_the_number_of_classes():
    assert inception_score(torch.zeros(20, 5))[0] == pytest.approx(1)
    assert inception_score(100 * torch.eye(5).repeat(4, 1))[0] == pytest.approx(5)
    assert inception_score(100 * torch.eye(5)[:1].repeat(20, 1))[0] == pytest.approx(1)
