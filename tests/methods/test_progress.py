"""What a run's progress shows of a method whose loss is a number without meaning."""

import pytest
import torch

from flowdistill.training.method import METHODS
from flowdistill.utils.randomness import Draw
from tests.methods.test_flow_map_matching import teacher_of
from tests.students_of_steps import moved

SHOWN = [
    ("freeflow", {}, "prediction_residual"), ("freeflow", {"prediction_fraction": 0.0}, "correction_residual"),
    ("data_flow_map", {"data": "digits"}, "residual"), ("flow_map_matching", {}, "residual"),
    ("flow_map_matching", {"correction_strength": 1.0}, "residual"),
    ("consistency", {"derivative": "finite_difference", "states": "student"}, "residual"),
    ("consistency", {"correction_strength": 1.0, "states": "student"}, "squared_error"),
    ("consistency", {"states": "student"}, None), ("boot", {}, None), ("dmd2", {}, None), ("disback", {}, None),
]


@pytest.mark.parametrize(("name", "settings", "figure"), SHOWN)
def test_the_figure_in_the_place_of_a_loss_is_one_that_there_is(name, settings, figure):
    """A size, which <u, sg(signal)> is not; of the others the loss itself is one."""
    torch.manual_seed(0)
    method = METHODS.get(name)
    method = method(method.Config(**settings), teacher_of("flow"))
    assert method.shown("student") == figure
    moved(method.student())
    networks = {role: part.network for role, part in method.roles().items()}
    assert all(method.shown(role) is None for role in networks.keys() - {"student"})
    with torch.no_grad():
        for parameter in networks["critic"].parameters() if "critic" in networks else ():
            parameter += 0.02 * torch.randn_like(parameter)
    loss, figures = method.loss("student", networks, Draw(0, 0, rows=8))
    assert loss > 0 if figure is None else figures[figure] > 0
