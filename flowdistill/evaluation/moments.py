"""The Fréchet distance of two Gaussians, and the means and covariances it needs, in float64."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigvalsh, lapack
from torch import Tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.processes import Processes

Array = np.ndarray | Tensor

ROWS = 4096
"""Rows that are taken into moments at once: 64 MiB of 2,048 features in double precision."""


class Moments:
    """Running mean and covariance of feature rows, accumulated on the CPU in float64.

    Batches are merged with Chan's update (Chan, Golub, LeVeque 1983): only deviations from a mean are ever squared, so
    a large common offset costs no digits, and any split into batches or processes gives the same result up to rounding.

    Args:
        size: number of features D.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._scatter = torch.zeros(size, size, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add rows (B, D), any float dtype and device."""
        if features.ndim != 2 or features.shape[1] != self.size:
            raise ValueError(f"features must have the shape (B, {self.size}), not {tuple(features.shape)}")
        if len(features) == 0:
            return
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the rows that another accumulator has seen."""
        if other.count:
            self._merge(other.count, other._mean, other._scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        step = mean - self._mean
        self._scatter += scatter + torch.outer(step, step) * (self.count * count / total)
        self._mean += step * (count / total)
        self.count = total

    def reduce(self, processes: Processes | None = None) -> Moments:
        """The moments of all rows of all processes of torch.distributed (a copy when there is one process).

        Every process must call it, also one that has seen no rows.
        """
        processes = processes or Processes.current()
        total = Moments(self.size)
        total.count = int(processes.sum(torch.tensor(self.count)))
        if total.count:
            total._mean = processes.sum(self._mean * (self.count / total.count))
            step = self._mean - total._mean
            total._scatter = processes.sum(self._scatter + self.count * torch.outer(step, step))
        return total

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count < 1:
            raise UserError("the mean of no samples is not defined; at least one sample is needed")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by count - 1)."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.count}")
        return self._scatter / (self.count - 1)


def moments_of(features: Tensor) -> Moments:
    """Mean and covariance of features (N, D), the same bits for the same features."""
    moments = Moments(features.shape[1])
    for rows in features.split(ROWS):
        moments.update(rows)
    return moments


def frechet_distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson, Landau 1982), the FID when the features are Inception's.

        |mean1 - mean2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

    With C1 = A A^T and C2 = B B^T (pivoted Cholesky, which also reveals the ranks) the eigenvalues of C1 C2 are the
    squared singular values of A^T B, found as eigenvalues of a symmetric matrix of the smaller rank: no square root of
    a non-symmetric matrix is taken. Rounding costs at most about 1e-7 of tr(C1) + tr(C2), for any ranks.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric and positive semi-definite, of any rank.

    Returns:
        The distance, in squared units of the features, >= 0.

    Raises:
        UserError: shapes that do not fit, values that are not finite, a covariance that is not positive semi-definite.
    """
    m1, m2 = _as_float64(mean1), _as_float64(mean2)
    c1, c2 = _as_float64(covariance1), _as_float64(covariance2)
    size = m1.shape[0] if m1.ndim == 1 else -1
    if m2.shape != (size,) or c1.shape != (size, size) or c2.shape != (size, size):
        raise UserError(
            "the Fréchet distance needs two means (D,) and two covariances (D, D) of one size, "
            f"not {m1.shape}, {c1.shape}, {m2.shape}, {c2.shape}"
        )
    if not all(np.isfinite(array).all() for array in (m1, m2, c1, c2)):
        raise UserError("the Fréchet distance needs finite means and covariances; a feature was NaN or infinite")
    overlap = _trace_of_root(c1, c2) if size else 0.0
    distance = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2.0 * overlap
    return max(float(distance), 0.0)


def _as_float64(array: Array) -> np.ndarray:
    if isinstance(array, Tensor):
        array = array.detach().to("cpu", torch.float64).numpy()
    return np.asarray(array, dtype=np.float64)


def _trace_of_root(c1: np.ndarray, c2: np.ndarray) -> float:
    """tr((C1 C2)^(1/2)), the nuclear norm of A^T B."""
    a, b = _root(c1), _root(c2)
    product = a.T @ b
    if min(product.shape) == 0:
        return 0.0
    # Of the two symmetric products the smaller one: the other has the same eigenvalues and zeros besides.
    gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    return float(np.sqrt(np.maximum(eigvalsh(gram, check_finite=False), 0.0)).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    """A of shape (D, rank) with A A^T = covariance, by pivoted Cholesky."""
    size = len(covariance)
    factor, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    root = np.empty((size, rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    # The factorisation stops silently at a negative pivot: one product with a fixed vector finds out.
    probe = np.random.default_rng(0).standard_normal(size)
    scale = np.abs(covariance).max() * size
    if np.abs(covariance @ probe - root @ (root.T @ probe)).max() > 1e-6 * scale:
        raise UserError("a covariance is not symmetric positive semi-definite, so no Fréchet distance is defined")
    return root
