"""The Fréchet distance against closed forms and scipy, and the moments it is made of."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch

from flowdistill.evaluation import Moments, frechet_distance, kernel_distance
from flowdistill.evaluation.metrics.kernel import copies_distance, evenness_term
from flowdistill.utils.errors import UserError


def covariance(rng: np.random.Generator, samples: int, size: int, decay: float) -> np.ndarray:
    rotation = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return np.cov(
        (rng.standard_normal((samples, size)) * np.exp(-decay * np.linspace(0, 1, size))) @ rotation.T, rowvar=False
    )


def with_sqrtm(mean1, cov1, mean2, cov2) -> float:
    """Through C1^(1/2) C2 C1^(1/2), whose root scipy takes accurately also for singular matrices."""
    root = scipy.linalg.sqrtm(cov1).real
    inner = root @ cov2 @ root
    overlap = np.trace(scipy.linalg.sqrtm((inner + inner.T) / 2).real)
    return np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap


def test_equals_scipy_sqrtm_of_the_product():
    rng = np.random.default_rng(0)
    for decay in (1.0, 4.0):
        c1, c2 = covariance(rng, 500, 60, decay), covariance(rng, 500, 60, decay + 1)
        m1, m2 = rng.standard_normal(60), rng.standard_normal(60)
        overlap = np.trace(scipy.linalg.sqrtm(c1 @ c2).real)
        expected = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * overlap
        assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, abs=1e-9 * np.trace(c1 + c2))


@pytest.mark.parametrize("samples", [(20, 500), (500, 20), (20, 30), (3, 3), (100, 101)])
def test_rank_deficient_covariances(samples):
    rng = np.random.default_rng(1)
    c1, c2 = covariance(rng, samples[0], 100, 2.0), covariance(rng, samples[1], 100, 3.0)
    zero = np.zeros(100)
    scale = np.trace(c1 + c2)
    # The exact overlap is the nuclear norm of C1^(1/2) C2^(1/2), with roots from the eigenvectors.
    roots = []
    for c in (c1, c2):
        values, vectors = np.linalg.eigh(c)
        roots.append(vectors * np.sqrt(np.where(values > 1e-13 * values.max(), values, 0.0)) @ vectors.T)
    exact = scale - 2 * np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(exact, abs=1e-7 * scale)
    assert frechet_distance(zero, c2, zero, c1) == pytest.approx(exact, abs=1e-7 * scale)
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(with_sqrtm(zero, c1, zero, c2), abs=1e-6 * scale)


def test_ranges_that_do_not_meet():
    """Each covariance lives where the other is zero: nothing overlaps, and roots of rounding errors must not count."""
    c1, c2 = np.zeros((50, 50)), np.zeros((50, 50))
    rng = np.random.default_rng(2)
    c1[:20, :20], c2[20:, 20:] = covariance(rng, 100, 20, 1.0), covariance(rng, 100, 30, 1.0)
    rotation = np.linalg.qr(rng.standard_normal((50, 50)))[0]
    c1, c2 = rotation @ c1 @ rotation.T, rotation @ c2 @ rotation.T
    zero, scale = np.zeros(50), np.trace(c1 + c2)
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(scale, abs=2e-7 * scale)


def test_one_shared_direction_among_hundreds_that_are_not():
    """The symmetric problem has 299 zero eigenvalues beside a one: the roots of their rounding errors add up."""
    size, half = 600, 300
    first, second = np.zeros(size), np.zeros(size)
    first[0] = second[0] = 1.0
    first[1:half], second[half:] = 1e-3, 1e-3
    rotation = np.linalg.qr(np.random.default_rng(4).standard_normal((size, size)))[0]
    c1, c2 = rotation * first @ rotation.T, rotation * second @ rotation.T
    zero = np.zeros(size)
    distance = frechet_distance(zero, c1, zero, c2)
    assert distance == pytest.approx(1e-3 * (size - 1), abs=1e-7 * (2 + 1e-3 * (size - 1)))


def test_closed_forms():
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0, 2.0]).double()
    m1, m2 = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 2.0, 0, 0])
    expected = 1 + 4 + ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    assert frechet_distance(m1, a.diag(), m2, b.diag()) == pytest.approx(expected, rel=1e-12)
    # Commuting covariances with a common rotation.
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert frechet_distance(m1, q @ a.diag() @ q.T, m2, q @ b.diag() @ q.T) == pytest.approx(expected, rel=1e-7)
    c = q @ b.diag() @ q.T
    assert frechet_distance(m1, c, m1, c) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(m1, c, m1, 4 * c) == pytest.approx(c.trace().item(), rel=1e-12)


def test_bad_input_is_refused():
    eye, zero = np.eye(3), np.zeros(3)
    with pytest.raises(UserError, match="positive semi-definite"):
        frechet_distance(zero, np.diag([1.0, 1.0, -1.0]), zero, eye)
    with pytest.raises(UserError, match="finite"):
        frechet_distance(zero, eye * np.nan, zero, eye)
    with pytest.raises(UserError, match="one size"):
        frechet_distance(zero, eye, np.zeros(4), np.eye(4))


def test_time_at_2048_features(record_property):
    rng = np.random.default_rng(3)
    # Full matrices as they are: a rotation would take longer than what is timed.
    scales = (np.exp(-decay * np.linspace(0, 1, 2048)) for decay in (4.0, 4.4))
    c1, c2 = (np.cov(rng.standard_normal((2500, 2048)) * scale, rowvar=False) for scale in scales)
    start = time.process_time()
    frechet_distance(np.zeros(2048), c1, np.zeros(2048), c2)
    seconds = time.process_time() - start
    record_property("cpu_seconds", seconds)
    print(f"Fréchet distance at 2048 features: {seconds:.2f} CPU seconds")
    assert seconds < 10


def test_moments_merge_to_one_pass():
    features = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)) * 3 + 2
    parts = [Moments(7) for _ in range(3)]
    for part, rows in zip(parts, features.split([1, 500, 499]), strict=True):
        for batch in rows.split(64):
            part.update(batch)
    merged = Moments(7)
    merged.merge(Moments(7))
    for part in parts:
        merged.merge(part)
    assert merged.count == 1000
    assert torch.allclose(merged.mean, features.double().mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(merged.covariance, features.double().T.cov(), rtol=0, atol=1e-12)


def test_moments_keep_their_digits_far_from_zero():
    """E[x^2] - E[x]^2 at an offset of 1e8 would lose all 16 digits of a unit variance."""
    small = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    small = (small * 1024).round() / 1024  # so that adding the offset is exact
    moments = Moments(3)
    for batch in (small + 2.0**27).split(100):
        moments.update(batch)
    assert torch.allclose(moments.covariance, small.T.cov(), rtol=0, atol=1e-9)


def test_too_few_samples_are_refused():
    moments = Moments(2)
    with pytest.raises(UserError, match="no samples"):
        _ = moments.mean
    moments.update(torch.ones(1, 2))
    with pytest.raises(UserError, match="at least 2"):
        _ = moments.covariance
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        moments.update(torch.ones(1, 3))


def test_kernel_distance_is_unbiased_seeded_and_grows():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 4, generator=draw), torch.randn(300, 4, generator=draw)
    state = torch.get_rng_state()
    # The definition, over all pairs.
    kernel = lambda a, b: ((a.double() @ b.double().T) / 4 + 1) ** 3  # noqa: E731
    xx, yy = kernel(x, x), kernel(y, y)
    exact = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (300 * 299) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y) == pytest.approx(exact.item(), abs=1e-5)
    more = torch.randn(2500, 4, generator=draw)
    assert kernel_distance(more, y, seed=3) == kernel_distance(more, y, seed=3) != kernel_distance(more, y, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert kernel_distance(more + 0.5, y) > 10 * abs(kernel_distance(more, y))
    assert kernel_distance(x[:1], y) is None


def mixture(labels, draw):
    """A feature vector for each label: its class's own mean, and unit noise."""
    means = 3 * torch.randn(10, 4, generator=torch.Generator().manual_seed(9))
    return means[labels] + torch.randn(len(labels), 4, generator=draw)


def test_classes_in_even_numbers_leave_the_kernel_distance_unbiased():
    """Classes that are single points: the distance of a set to another of the same classes is 0 without any noise."""
    labels = torch.arange(300) % 10
    points = mixture(labels[:10], torch.Generator().manual_seed(0))[labels]
    kernel = (points[:10].double() @ points[:10].double().T / 4 + 1) ** 3
    within = kernel.diagonal().mean()
    between = (900 * kernel.sum() - 300 * within) / (300 * 299)  # all pairs but those of an image with itself
    assert kernel_distance(points, points) == pytest.approx(2 * (between - within).item() / 300, rel=1e-3)
    assert evenness_term(points, labels) == pytest.approx((within - between).item() / 300, rel=1e-6)
    assert kernel_distance(points, points) + 2 * evenness_term(points, labels) == pytest.approx(0, abs=1e-3)
    # Of a large set a random part of the rows is kept; the term is that of the whole set.
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:200].sort().values
    assert evenness_term(points[rows], labels, rows) == pytest.approx(evenness_term(points, labels), rel=0.1)


def test_the_kernel_distance_of_equal_mixtures_is_0_however_the_classes_are_drawn():
    """Means over 40 draws, in units of their standard error; independent labels get no term, even ones need it."""
    for even in (True, False):
        plain, whole = [], []
        for seed in range(40):
            draw = torch.Generator().manual_seed(seed)
            sides = []
            for count in (300, 300):
                labels = torch.arange(count) % 10 if even else torch.randint(10, (count,), generator=draw)
                sides.append((mixture(labels, draw), labels))
            plain.append(kernel_distance(sides[0][0], sides[1][0], seed))
            whole.append(plain[-1] + sum(evenness_term(*side) for side in sides))
        plain, whole = torch.tensor(plain), torch.tensor(whole)
        assert abs(whole.mean()) < 3 * whole.std() / 40**0.5, even
        assert (plain.mean() < -6 * plain.std() / 40**0.5) == even


def test_evenness_that_is_none():
    features = mixture(torch.arange(300) % 10, torch.Generator().manual_seed(0))
    numbers = torch.arange(300)
    for labels in (0 * numbers, numbers % 10 - 1, (numbers % 20).clamp(max=9)):
        assert evenness_term(features, labels) == 0


def test_even_classes_of_a_single_image_have_no_kernel_distance():
    """Without the term it would be far below 0, as that of copies is."""
    reference = mixture(torch.arange(300) % 10, torch.Generator().manual_seed(0))
    for count in (20, 19, 10, 7):
        labels = torch.arange(count) % 10
        features = mixture(labels, torch.Generator().manual_seed(1))
        term = evenness_term(features, labels)
        assert (term is None) == (count < 20)
        assert copies_distance(features, labels) is None if count < 20 else term > 0
    assert kernel_distance(features, reference) < -1  # of 7


def test_copies_have_a_distance_below_0_by_the_pairs_that_a_set_has_not():
    labels = torch.arange(200) % 10
    images = mixture(labels, torch.Generator().manual_seed(0))
    drawn = torch.arange(200).repeat(40)  # every image as often as any other: the mean over copies, without noise
    for classes, expected in ((None, copies_distance(images)), (labels, copies_distance(images, labels))):
        kernel = (images.double() @ images.double().T / 4 + 1) ** 3
        own = (kernel.sum() - kernel.trace()) / (200 * 199)
        made, real = kernel.mean(), own  # independent draws with repetition; the set's own pairs
        if classes is not None:
            real = real + evenness_term(images, labels)
        assert expected == pytest.approx((made + real - 2 * kernel.mean()).item(), rel=1e-9)
        assert expected < 0
    term = evenness_term(images[drawn], labels[drawn]) + evenness_term(images, labels)
    found = sum(kernel_distance(images[drawn], images, seed) for seed in range(4)) / 4 + term
    assert found == pytest.approx(copies_distance(images, labels), rel=0.3)
    assert copies_distance(images[:1]) is None
