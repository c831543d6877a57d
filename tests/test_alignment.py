"""The terms that align a student with its teacher, against closed forms in float64."""

import math

import pytest
import torch

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


def test_sliced_wasserstein_of_single_pixels_sorts_them():
    one = torch.tensor([0.0, 4.0, 1.0, 3.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    other = torch.tensor([5.0, 1.0, 1.0, 3.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    directions = torch.full((1, 1, 1, 1, 1), -2.0, dtype=torch.float64)  # scaled to -1
    # (0, 1, 3, 4) against (1, 1, 3, 5), then the means 2 and 2.5
    assert alignment.sliced_wasserstein(one, other, directions, levels=1).tolist() == [0.5]
    assert alignment.sliced_wasserstein(one, other, directions).tolist() == [0.5]  # the second level is |2 - 2.5| too
    shuffled = one.flatten(2)[..., [3, 1, 0, 2]].reshape(one.shape)
    assert alignment.sliced_wasserstein(one, shuffled, directions).item() == 0


def test_sliced_wasserstein_of_a_shift_is_its_projection_at_every_level():
    images, directions = random(3, 3, 16, 16), random(3, 5, 3, 5, 5, seed=1)
    shift = 0.3
    unit = directions / directions.flatten(2).norm(dim=2).reshape(3, 5, 1, 1, 1)
    expected = (shift * unit.sum((2, 3, 4))).abs().mean(1)
    found = alignment.sliced_wasserstein(images + shift, images, directions)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    # Each sample has its own directions: a batch is what its samples are alone.
    alone = [alignment.sliced_wasserstein(images[i:i + 1] ** 2, images[i:i + 1], directions[i:i + 1]) for i in range(3)]
    torch.testing.assert_close(alignment.sliced_wasserstein(images**2, images, directions), torch.cat(alone))
    with pytest.raises(ValueError, match="no patch"):
        alignment.sliced_wasserstein(images[..., :4, :4], images[..., :4, :4], directions)
