"""The randomness of a step: the same for any number of processes, different for everything else."""

import pytest
import torch

from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw, mixed_seed


def numbers(draw):
    return [draw.normal((3, 2)), draw.uniform(-1.0, 2.0), draw.integers(10), draw.normal((5,), rows=4)]


def test_the_rows_of_two_processes_together_are_the_rows_of_one():
    whole = numbers(Draw(7, 3, 1, 2, rows=8))
    parts = [numbers(Draw(7, 3, 1, 2, rows=8, rank=rank, world=2)) for rank in range(2)]
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one[0::2], first) and torch.equal(one[1::2], second)
    assert whole[0].shape == (8, 3, 2) and parts[0][3].shape == (2, 5)


def test_the_first_share_of_the_rows_is_the_same_for_any_number_of_processes():
    whole = Draw(0, 0, rows=8).normal((2,))[:6]
    parts = [Draw(0, 0, rows=8, rank=rank, world=2).normal((2,))[:3] for rank in range(2)]
    assert torch.equal(whole.sort(0).values, torch.cat(parts).sort(0).values)


def test_ranges_and_types():
    draw = Draw(0, 0, rows=4000)
    normal, uniform, integers = draw.normal(()), draw.uniform(-1.0, 2.0), draw.integers(3)
    assert normal.dtype == uniform.dtype == torch.float32 and integers.dtype == torch.int64
    assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
    assert -1 <= uniform.min() < -0.9 and 1.9 < uniform.max() < 2
    assert integers.unique().tolist() == [0, 1, 2]


def test_an_index_may_stay_on_the_cpu():
    far, near = (Draw(0, 0, rows=8, rank=1, world=2, device=device) for device in ("meta", "cpu"))
    assert far.integers(3).device.type == "meta"
    index = far.integers(3, on_cpu=True)
    near.integers(3)
    assert index.device.type == "cpu" and torch.equal(index, near.integers(3))


@pytest.mark.parametrize("other", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_every_seed_step_update_and_micro_batch_has_its_own_numbers(other):
    first, second = Draw(0, 0, 0, 0, rows=4), Draw(*other, rows=4)
    assert not torch.equal(first.normal((2,)), second.normal((2,)))


def test_every_call_has_its_own_numbers_and_a_second_draw_repeats_them():
    draw, again = Draw(0, 5, rows=4), Draw(0, 5, rows=4)
    first, second = draw.normal((2,)), draw.normal((2,))
    assert not torch.equal(first, second)
    assert torch.equal(first, again.normal((2,))) and torch.equal(second, again.normal((2,)))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    numbers(Draw(0, 0, rows=8))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_that_the_processes_cannot_share_are_refused():
    with pytest.raises(UserError, match="9 rows cannot be shared equally by 2 processes"):
        Draw(0, 0, rows=9, world=2)
    with pytest.raises(UserError, match="3 rows"):
        Draw(0, 0, rows=8, world=2).uniform(rows=3)


def test_mean_is_detached():
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    mean = Draw(0, 0, rows=2).mean(x)
    assert mean == 2.5 and not mean.requires_grad


def test_mixed_seed_depends_on_every_part_and_its_place():
    seeds = {mixed_seed(*parts) for parts in [(0, 1), (1, 0), (0, 0), (1, 1), (11,), ("a", 1), (0, 1, 0)]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_process_makes_its_own_rows_only(monkeypatch):
    made = []
    real = torch.Generator.manual_seed
    monkeypatch.setattr("flowdistill.utils.randomness.torch.Generator", lambda: Counting())

    class Counting:
        def manual_seed(self, seed):
            made.append(seed)
            return real(REAL(), seed)

    draw = Draw(0, 0, rows=64, rank=3, world=16)
    assert draw.normal((4, 8, 8)).shape == (4, 4, 8, 8) and len(made) == 4
    assert len(draw.uniform()) == len(draw.integers(5)) == 4 and len(made) == 4


REAL = torch.Generator


def test_numbers_of_single_rows_have_their_distributions():
    draw = Draw(3, 1, rows=200_000)
    uniform, normal = draw.uniform(), draw.normal(())
    for k in (1, 2, 3, 4):  # moments of the uniform distribution, to five standard errors
        assert uniform.double().pow(k).mean() == pytest.approx(1 / (k + 1), abs=5 * 200_000**-0.5)
    assert normal.mean().abs() < 0.012 and normal.std() == pytest.approx(1, abs=0.01)
    assert normal.pow(4).mean() == pytest.approx(3, abs=0.15) and normal.isfinite().all()
    assert (uniform[1:] - 0.5).dot(uniform[:-1] - 0.5).div(200_000).abs() < 0.001  # neighbours; variance 1/12
    counts = torch.bincount(draw.integers(7), minlength=7).double()
    assert ((counts - 200_000 / 7).square() / (200_000 / 7)).sum() < 22.5  # chi-squared, six degrees: 0.1 %
    two = Draw(3, 2, rows=200_000).uniform()
    assert (uniform - 0.5).dot(two - 0.5).div(200_000).abs() < 0.001


def test_all_rows_of_a_call_differ():
    noise = Draw(0, 0, rows=512).normal((2,))
    assert len({tuple(row) for row in noise.tolist()}) == 512
    assert len(set(Draw(0, 0, rows=4096).uniform().tolist())) > 4090  # 24 bits
