"""SciPy 1.18 removed ``sqrtm(..., disp=False)``, which a function of clean-fid calls that flowdistill never does."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch


def test_a_frechet_distance_needs_no_matrix_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def removed(*arguments: object, **keywords: object) -> None:
        raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")

    monkeypatch.setattr(scipy.linalg, "sqrtm", removed)
    import cleanfid.inception_torchscript  # noqa: F401  # what flowdistill uses of clean-fid

    from flowdistill.evaluation import frechet_distance

    mean, root = torch.zeros(3), torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.T
    assert frechet_distance(mean, covariance, mean, 4 * covariance) == pytest.approx(covariance.trace().item())
