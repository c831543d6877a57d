"""Guidance that keeps the norm, as a function: exact norms, and what it leaves alone. Float64."""

import pytest
import torch

from flowdistill.objectives.guidance import NORMS, kept_norm


def predictions(factor=3.0):
    generator = torch.Generator().manual_seed(0)
    conditional = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    change = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    return conditional + factor * change, conditional


def whole(x):
    return x.flatten(1).norm(dim=1)


def test_none_is_the_same_tensor():
    guided, conditional = predictions()
    assert kept_norm(guided, conditional, "none") is guided


def test_last_dim_has_the_conditional_norm_of_each_row():
    guided, conditional = predictions()
    kept = kept_norm(guided, conditional, "last_dim")
    assert torch.allclose(kept.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-14)
    assert torch.allclose(torch.cosine_similarity(kept, guided, dim=-1), torch.ones(4, 2, 3, dtype=torch.float64))
    assert not torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1), rtol=0.1)


def test_per_sample_shortens_and_never_lengthens():
    guided, conditional = predictions()
    guided[:2] = 0.5 * conditional[:2]
    kept = kept_norm(guided, conditional, "per_sample")
    assert torch.equal(kept[:2], guided[:2])
    assert torch.allclose(whole(kept[2:]), whole(conditional[2:]), rtol=1e-14)
    assert (whole(guided) > whole(kept))[2:].all()
    ratio = kept[2:] / guided[2:]
    assert torch.allclose(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    longer = kept_norm(guided, conditional, "last_dim")
    assert torch.allclose(whole(longer[:2]), whole(conditional[:2]))  # the other kind does lengthen


@pytest.mark.parametrize("kind", NORMS)
def test_nothing_stays_nothing_and_has_a_gradient(kind):
    guided, conditional = predictions()
    guided[0] = 0
    guided.requires_grad_()
    kept = kept_norm(guided, conditional, kind)
    (gradient,) = torch.autograd.grad(kept.sum(), guided)
    assert (kept[0] == 0).all() and gradient.isfinite().all()


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="must be one of none, per_sample, last_dim"):
        kept_norm(*predictions(), "scalar")
