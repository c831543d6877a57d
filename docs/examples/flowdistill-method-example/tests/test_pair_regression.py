"""The method against a closed form, and in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flowdistill_method_example.pair_regression import PairRegression, PairRegressionConfig
from torch import Tensor, nn

from flowdistill import distill, load_student
from flowdistill.config import METHODS
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.utils.randomness import Draw

MEAN, STD = torch.tensor([1.0, -2.0]), 0.3
SHORT = ["train.steps=2", "train.batch_size=8", "train.log_every=1", "train.trackers=[]", "train.device=cpu",
         "method.pairs=8", "method.pair_steps=2", "evaluation.at_end=false"]


class ExactMap(nn.Module):
    """The velocity whose one step from noise n at t = 1 is what the ODE of N(MEAN, STD^2) makes of it, MEAN + STD n."""

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return (1 - STD) * x - MEAN


def loss_of_the_exact_map(pair_steps: int) -> float:
    teacher = exact_teacher(GaussianVelocity(MEAN, STD))
    method = PairRegression(PairRegressionConfig(pairs=64, pair_steps=pair_steps), teacher, ExactMap())
    networks = {name: role.network for name, role in method.roles().items()}
    loss, figures = method.loss("student", networks, Draw(seed=0, step=0, rows=64))
    assert figures["error"] == loss
    return loss.item()


def test_the_exact_map_has_no_error_but_that_of_the_solver() -> None:
    errors = [loss_of_the_exact_map(steps) for steps in (50, 100, 200)]
    # Euler's error falls with the number of steps, and its square four times for twice as many.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    assert errors[2] < 1e-4


def test_a_configuration_names_it(tmp_path: Path) -> None:
    assert METHODS.get("pair_regression") is PairRegression
    run = distill(Path(__file__).parents[1] / "digits.yaml", [*SHORT, f"output_dir={tmp_path / 'run'}"])
    assert run.completed and run.steps == 2
    last = json.loads((run.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["student/error"] > 0, last
    student = load_student(run.output_dir)
    assert student.info.method == "pair_regression" and student.generate(labels=[3]).shape == (1, 1, 8, 8)
