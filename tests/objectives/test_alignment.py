"""The terms that align a student with its teacher, against closed forms in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from flowdistill.objectives import alignment


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_signal_share_is_alpha_bar():
    alpha_bar = torch.tensor([0.999, 0.5, 0.00466], dtype=torch.float64)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    torch.testing.assert_close(alignment.signal_share(sigma / (alpha + sigma)), alpha_bar, rtol=1e-12, atol=0)


def test_latent_distance_by_hand_and_its_gradient():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64).reshape(2, 1, 1, 2).requires_grad_()
    teacher = torch.tensor([[0.0, 0.0], [3.0, 1.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    values = alignment.latent_distance(student, teacher)
    assert values.tolist() == [1.25, 2.5]  # (1 + 4) / 2 / 2, (9 + 1) / 2 / 2
    values.sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 2)


def test_identity_distance_is_one_minus_the_cosine_of_each_token():
    one = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 0.0]]], dtype=torch.float64)
    other = torch.tensor([[[5.0, 0.0], [0.0, -1.0]], [[4.0, 3.0], [1.0, 1.0]]], dtype=torch.float64)
    expected = [1 - (1 - 1) / 2, 1 - (0.96 + math.sqrt(0.5)) / 2]
    assert alignment.identity_distance(one, other).tolist() == pytest.approx(expected, abs=1e-12)
    assert alignment.identity_distance(one[:, 0], other[:, 0]).tolist() == pytest.approx([0.0, 0.04], abs=1e-12)
    assert alignment.identity_distance(7 * one, one).abs().max() < 1e-12  # length does not count


def test_gram_distance_by_hand_and_blind_to_positions():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]], dtype=torch.float64)
    gram = alignment.gram_matrix(tokens)
    assert gram.tolist() == [[[5.0, 1.0], [1.0, 2.0]]]  # (1 + 9) / 2, 2 / 2, 4 / 2
    zero = torch.zeros_like(tokens)
    assert alignment.gram_distance(tokens, zero).tolist() == [(25 + 1 + 1 + 4) / 4]
    assert alignment.gram_distance(tokens, tokens.flip(1)).item() == 0


def colour(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1)


@pytest.mark.parametrize(
    "srgb, expected",
    {  # published triples, D65
        (1, 0, 0): (53.2408, 80.0925, 67.2032), (0, 1, 0): (87.7347, -86.1827, 83.1793),
        (0, 0, 1): (32.2970, 79.1875, -107.8602), (1, 1, 0): (97.1393, -21.5537, 94.4780),
        (0, 1, 1): (91.1132, -48.0875, -14.1312), (1, 0, 1): (60.3242, 98.2343, -60.8249),
        (1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0),
    }.items(),
)  # fmt: skip
def test_lab_has_the_published_values(srgb, expected):
    assert alignment.lab(colour(*srgb)).flatten().tolist() == pytest.approx(expected, abs=6e-5)


def test_lab_of_a_gray_by_hand_and_beyond_the_range():
    """(0.5 + 0.055) / 1.055 to 2.4 is 0.21404; below 0 both curves are their linear beginnings: 29^3 / 27 Y."""
    y = ((0.5 + 0.055) / 1.055) ** 2.4
    assert alignment.lab(colour(0.5, 0.5, 0.5)).flatten().tolist() == pytest.approx((116 * y ** (1 / 3) - 16, 0, 0))
    assert alignment.lab(colour(-1.0, -1.0, -1.0))[0, 0].item() == pytest.approx(-(29**3) / 27 / 12.92, rel=1e-12)
    over = ((1.5 + 0.055) / 1.055) ** 2.4
    assert alignment.lab(colour(1.5, 1.5, 1.5))[0, 0].item() == pytest.approx(116 * over ** (1 / 3) - 16, rel=1e-12)
    images = (1.5 * random(2, 3, 4, 4)).requires_grad_()
    assert torch.autograd.gradcheck(alignment.lab, images)
    dark = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)  # where a root's slope is infinite
    alignment.lab(dark).sum().backward()
    assert dark.grad is not None and dark.grad.isfinite().all() and (dark.grad > 0).any()


def unit(directions):
    return directions / directions.flatten(3).norm(dim=3)[..., None, None, None]


def test_sliced_wasserstein_of_two_colours_is_their_distance_on_each_direction():
    """Every patch at every level is the same, so each direction sees the difference of the colours times its sum."""
    one, other = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in
                  ([0.8, -0.9, 0.3], [-0.2, 0.6, 0.1]))
    directions = random(3, 4, 6, 3, 5, 5, seed=1)
    apart = (alignment.lab(one) - alignment.lab(other)).flatten()
    expected = (unit(directions).sum((4, 5)) @ apart).abs().mean((1, 2))
    found = alignment.sliced_wasserstein(one.expand(3, 3, 32, 32), other.expand(3, 3, 32, 32), directions)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert expected.min() > 5  # and not the few hundredths of the same in RGB


def test_sliced_wasserstein_is_the_definition_step_by_step():
    """Against scipy: binomial blur with mirrored edges, every second pixel, Lab, all windows, sort, mean difference."""
    one, other = random(2, 3, 9, 12), random(2, 3, 9, 12, seed=1)
    directions = random(2, 2, 3, 3, 5, 5, seed=2)
    expected = np.zeros(2)
    for level in range(2):
        for row in range(2):
            seen = []
            for images in (one, other):
                picture = images[row].numpy()
                for _ in range(level):
                    for axis in (1, 2):
                        picture = ndimage.correlate1d(picture, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
                    picture = picture[:, ::2, ::2]
                colours = alignment.lab(torch.from_numpy(picture.copy())[None])[0].numpy()
                wide = np.pad(colours, ((0, 0), (2, 2), (2, 2)), mode="reflect")
                windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 5, 5)).reshape(-1, 75)
                seen.append(np.sort(windows @ unit(directions)[row, level].reshape(3, 75).numpy().T, axis=0))
            expected[row] += np.abs(seen[0] - seen[1]).mean() / 2
    found = alignment.sliced_wasserstein(one, other, directions)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mirrored = alignment.sliced_wasserstein(one, one.flip(3), torch.ones(2, 1, 1, 3, 1, 1, dtype=torch.float64))
    assert mirrored.abs().max() < 1e-12  # what is where does not count


@pytest.mark.parametrize(
    "side, patch, levels", [(81, 11, 5), (80, 11, 4), (33, 5, 5), (32, 5, 4), (3, 5, 1), (2, 5, 0)]
)
def test_a_pyramid_has_the_levels_that_hold_a_mirrored_patch(side, patch, levels):
    assert alignment.pyramid_levels(side, patch) == levels
    images = random(1, 3, side, side)
    if levels:
        value = alignment.sliced_wasserstein(images, images + 0.1, random(1, levels, 1, 3, patch, patch))
        assert value.shape == (1,) and value.item() > 0
    if levels < alignment.LEVELS:
        with pytest.raises(ValueError, match=f"have {levels} levels"):
            alignment.sliced_wasserstein(images, images, random(1, levels + 1, 1, 3, patch, patch))
