"""Precision and recall against counted cases."""

import pytest
import torch

from flowdistill.evaluation import precision_recall
from flowdistill.evaluation.metrics import precision_recall as manifold


def points(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def clusters(rows=50, size=5):
    """Four far-apart clusters: features (4 rows, size) and their cluster."""
    drawn = torch.randn(4, rows, size, generator=torch.Generator().manual_seed(0))
    drawn[:, :, 0] += 100 * torch.arange(4)[:, None]
    return drawn.flatten(0, 1), torch.arange(4).repeat_interleave(rows)


def test_four_points_counted_by_hand():
    # With k = 1 the reference's radii are 1, 1, 2, 4: it covers [-1, 11], and 20 alone is outside. The samples' radii
    # are 0.5, 0.5, 5.5, 9: they cover [4.5, 29], where only 7 is.
    assert precision_recall(points(5, 5.5, 11, 20), points(0, 1, 3, 7), neighbours=1) == (0.75, 0.25)
    # 11 is on the edge; a little further is outside.
    assert precision_recall(points(5, 5.5, 11.001, 20), points(0, 1, 3, 7), neighbours=1) == (0.5, 0.25)
    # With k = 2 they are 3, 2, 3, 6, [-3, 13]; the samples' 6, 5.5, 6, 14.5 cover [-1, 34.5].
    assert precision_recall(points(5, 5.5, 11, 20), points(0, 1, 3, 7), neighbours=2) == (0.75, 1.0)


def test_one_set_is_all_of_itself_and_nothing_of_a_far_one():
    features, _ = clusters()
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features + 1e5) == (0.0, 0.0)
    # Many equal points have balls of no width, but are on them; rounding must not say otherwise.
    same = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).expand(20, -1)
    assert precision_recall(same, same.clone()) == (1.0, 1.0)


def test_a_dropped_mode_costs_recall_and_no_precision():
    reference, cluster = clusters()
    kept = reference[cluster != 3]
    samples = torch.cat([kept, kept[:50] + 1e-3])  # as many as in the reference
    assert precision_recall(samples, reference) == (1.0, 0.75)
    assert precision_recall(reference, samples) == (0.75, 1.0)


def test_chunks_do_not_show_and_distances_are_those_of_cdist(monkeypatch):
    draw = torch.Generator().manual_seed(2)
    ours, theirs = torch.randn(101, 6, generator=draw) * 1.3, torch.randn(101, 6, generator=draw)

    def share(some, others):
        radii = torch.cdist(others.double(), others.double()).sort(dim=1).values[:, 3]
        return (torch.cdist(some.double(), others.double()) <= radii).any(dim=1).double().mean().item()

    expected = share(ours, theirs), share(theirs, ours)
    assert 0.1 < expected[0] < expected[1] < 1
    assert precision_recall(ours, theirs) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(manifold, "CHUNK", 7)
    assert precision_recall(ours, theirs) == pytest.approx(expected, abs=1e-12)


def test_both_sets_are_cut_to_one_size(monkeypatch):
    draw = torch.Generator().manual_seed(3)
    many, few = torch.randn(400, 6, generator=draw), torch.randn(60, 6, generator=draw)
    before = torch.get_rng_state()
    one, again, other = (precision_recall(many, few, seed=seed) for seed in (0, 0, 1))
    assert one == again and one != other
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:60]
    assert other == precision_recall(many[rows], few)
    assert torch.equal(before, torch.get_rng_state())
    assert precision_recall(many[:4], few) is not None and precision_recall(many[:3], few) is None
    monkeypatch.setattr(manifold, "MOST_SAMPLES", 3)
    assert precision_recall(many, few) is None
