"""The kernel distance (KID when the features are Inception's)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> float | None:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, the mean of 100 subsets of up to 1,000 samples.

    Binkowski et al. 2018, "Demystifying MMD GANs"; torchmetrics computes it.

    The estimate has no bias for independent samples. Classes in exactly equal numbers are not independent: pairs of one
    class are a little too rare within a set, so that good models come out slightly below zero, all by the same amount.

    Args:
        features, reference: (N, D) and (M, D).
        seed: of the subsets; the global generator is left alone.

    Returns:
        The estimate, which may be negative; None with fewer than two samples on a side.
    """
    size = min(len(features), len(reference), SUBSET_SIZE)
    if size < 2:
        return None
    # With everything in every subset, all subsets give the same figure.
    subsets = 1 if size == len(features) == len(reference) else SUBSETS
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        # It says that it keeps all features in memory; they are there already.
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False)
    metric.update(reference.float().cpu(), real=True)
    metric.update(features.float().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float(metric.compute()[0])
