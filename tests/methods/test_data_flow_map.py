"""The data-based baseline against the closed two-time flow map of Gaussian data."""

import pytest
import torch
from torch import nn

from flowdistill.methods.data_flow_map import DataFlowMap, DataFlowMapConfig
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.tiny import tiny_unet_pipeline

MEAN, STD = torch.full((1, 4, 4), 0.3, dtype=torch.float64), 0.5


class DoubleDraw(Draw):
    def normal(self, shape, rows=None):
        return super().normal(shape, rows).double()

    def uniform(self, low=0.0, high=1.0, rows=None):
        return super().uniform(low, high, rows).double()


class TwoTime(nn.Module):
    """(x - phi(x, t -> t - d)) / d with phi = (1 - s) m + sqrt(V(s) / V(t)) (x - (1 - t) m), plus an offset."""

    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset), dtype=torch.float64))

    def forward(self, x, t, condition=None, *, duration):
        t, d = t.reshape(-1, 1, 1, 1), duration.reshape(-1, 1, 1, 1).clamp(min=1e-6)  # 0 / 0 at d = 0
        s = t - d

        def variance(time):
            return (1 - time) ** 2 * STD**2 + time**2

        end = (1 - s) * MEAN + torch.sqrt(variance(s) / variance(t)) * (x - (1 - t) * MEAN)
        return (x - end) / d + self.offset


def toy(offset=0.0, std=STD, **settings):
    images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = exact_teacher(GaussianVelocity(MEAN, std))
    settings = {"finite_difference_step": 1e-3, "damping": 0.0, **settings}
    config = DataFlowMapConfig(data="digits", **settings)
    method = DataFlowMap(config, teacher, TwoTime(offset), (images, torch.arange(32) % 4))
    return method, {"student": method.roles()["student"].network}


def test_exact_two_time_map_has_no_residual_on_any_data():
    """The identity holds at every state, so even data the teacher does not model leaves the exact map alone."""
    method, networks = toy()
    _, metrics = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
    assert metrics["residual"] < 1e-6
    wrong, networks = toy(std=0.8)  # the map of another teacher
    _, metrics = wrong.loss("student", networks, DoubleDraw(0, 0, rows=256))
    assert metrics["residual"] > 1e-3


def test_offset_is_pulled_back():
    method, networks = toy(offset=0.4)
    loss, _ = method.loss("student", networks, DoubleDraw(0, 0, rows=256))
    loss.backward()
    assert networks["student"].offset.grad == pytest.approx(0.4, rel=1e-3)


def test_shift_moves_whole_images_and_keeps_labels():
    method, _ = toy(shift_pixels=1)
    teacher = load_teacher(tiny_unet_pipeline())
    images = torch.zeros(4, 1, 8, 8)
    for label in range(4):
        images[label, 0, 3, 2 + label] = 1.0
    method = DataFlowMap(DataFlowMapConfig(data="digits", shift_pixels=2), teacher, None, (images, torch.arange(4)))
    clean, condition = method.draw_data(Draw(0, 0, rows=256))
    places = (clean > 0).flatten(1)
    assert (places.sum(dim=1) == 1).all()
    where = places.int().argmax(dim=1)
    rows, columns = where // 8 - 3, where % 8 - 2 - condition.tensors["class_labels"]
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}


def test_data_of_another_shape_is_refused():
    teacher = load_teacher(tiny_unet_pipeline(channels=2))
    with pytest.raises(UserError, match=r"'digits' has samples of shape \(1, 8, 8\).*\(2, 8, 8\)"):
        DataFlowMap(DataFlowMapConfig(data="digits"), teacher)
