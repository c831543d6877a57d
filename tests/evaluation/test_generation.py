"""The same image set for any batch size and any number of processes."""

import pytest
import torch

from flowdistill.evaluation import generate
from flowdistill.evaluation.generation import balanced_labels
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8

SHAPE = (2, 3, 3)


def sampler(noise, labels):
    return noise if labels is None else noise + 10 * labels.view(-1, 1, 1, 1)


def images(num_images=23, seed=0, batch_size=5, num_classes=3, world=1):
    made = [
        batch
        for rank in range(world)
        for batch in generate(
            sampler, SHAPE, num_images, seed, batch_size, rank, world, num_classes=num_classes, progress=False
        )
    ]
    assert [index for batch in made for index in batch.indices] == list(range(num_images))
    return torch.cat([batch.images for batch in made])


def test_batch_size_processes_and_set_size_do_not_matter():
    whole = images()
    for batch_size in (1, 7, 100):
        assert torch.equal(whole, images(batch_size=batch_size))
    for world in (2, 3, 30):
        assert torch.equal(whole, images(world=world))
    assert torch.equal(whole[:11], images(num_images=11))
    assert not torch.equal(whole, images(seed=1))


def test_noise_is_unit_normal_and_differs_between_images():
    noise = images(num_images=2000, num_classes=None)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(noise.flatten(1).unique(dim=0)) == 2000
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbours) < 0.02


def test_labels_are_balanced():
    assert balanced_labels(range(4, 9), 3).tolist() == [1, 2, 0, 1, 2]
    assert balanced_labels(range(3), None) is None
    made = next(generate(sampler, SHAPE, 4, num_classes=2, progress=False))
    assert made.labels.tolist() == [0, 1, 0, 1]
    assert made.images.flatten(1).mean(1).round(decimals=-1).tolist() == [0, 10, 0, 10]


def test_a_condition_replaces_labels():
    nines = lambda span: torch.full((len(span),), 9)  # noqa: E731
    made = list(generate(sampler, SHAPE, 4, batch_size=3, condition=nines, progress=False))
    assert made[0].labels is None
    assert torch.cat([batch.images for batch in made]).flatten(1).mean(1).round(decimals=-1).tolist() == [90] * 4


def test_uint8_rounds_and_clips():
    values = torch.tensor([-1.0, 0.0, 0.9 / 255, 127.4 / 255, 1.0, 3.0]).view(1, 1, 1, -1)
    assert to_uint8(values).flatten().tolist() == [0, 0, 1, 127, 255, 255]
    assert to_uint8(values).dtype == torch.uint8


@pytest.mark.parametrize("count", [0, -3])
def test_no_images_are_refused(count):
    with pytest.raises(UserError, match=f"at least 1, not {count}"):
        next(generate(sampler, SHAPE, count))
    with pytest.raises(UserError, match="batch_size"):
        next(generate(sampler, SHAPE, 4, batch_size=0))


def test_a_sampler_that_loses_images_is_found_out():
    with pytest.raises(ValueError, match="for 5 samples"):
        next(generate(lambda noise, labels: noise[1:], SHAPE, 5))
