"""``scripts/derivative_precision.py``: differences of a map whose derivative is known, and what it refuses."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowdistill import load_teacher
from flowdistill.config import load_config
from flowdistill.training.run import method_class

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "assets/digits-flow"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "derivative_precision.py"))


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)


class Map(torch.nn.Module):
    """V = W (x, d^power), of which central differences are exact for powers up to 2."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.layer, self.power = torch.nn.Linear(3, 2), power

    def forward(self, x, t, condition, duration):
        return self.layer(torch.cat([x, duration[:, None] ** self.power], dim=1))


def of(power: int) -> SimpleNamespace:
    return SimpleNamespace(network=Map(power), shape=(2,), t_max=1.0, device=torch.device("cpu"),
                           examples=lambda rows: None)


def test_differences_of_a_parabola_are_exact_in_float32_and_lose_digits_in_half(script):
    torch.manual_seed(0)
    found = script["errors"](of(2), 64)
    assert max(found["fp32"]) < 1e-4
    # The rounding of two passes over the step: larger for a shorter step, and for bfloat16, which has three bits less.
    assert found["bf16"][0] > 4 * found["bf16"][-1] and found["bf16"][0] > 4 * found["fp16"][0] > 50 * found["fp32"][0]
    assert script["errors"](of(4), 64)["fp32"][-1] > 1e-3  # a step that is long for the curve shows


def test_the_table_of_a_run_and_what_is_no_flow_map_from_noise(script, tmp_path, capsys):
    teacher = load_teacher(SOURCE)
    for name in ("freeflow", "dmd2", "flow_map_matching"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"output_dir: {tmp_path / name}\nteacher: {{source: {SOURCE}}}\nmethod: {{name: {name}}}\n")
        student = method_class(name)(load_config(config, []).method, teacher).student()
        with torch.no_grad():
            for parameter in student.network.parameters():  # a student that has learnt nothing has no derivative
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        student.save(tmp_path / name / "student")
    assert script["main"]([str(tmp_path / "freeflow"), "--rows", "4"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| precision | step 0.005 | step 0.01 | step 0.02 | step 0.05 | step 0.1 |" and len(rows) == 5
    errors = {row.split("|")[1].strip(): float(row.split("|")[4].split("%")[0]) for row in rows[2:]}
    assert errors["fp32"] < errors["fp16"] < errors["bf16"]
    for name in ("dmd2", "flow_map_matching"):
        assert script["main"]([str(tmp_path / name)]) == 2
        assert "is no flow map from noise, which takes a duration" in capsys.readouterr().err
    assert script["main"]([str(tmp_path / "freeflow"), "--rows", "0"]) == 2
    assert "--rows is 0; it must be at least 1" in capsys.readouterr().err
    assert script["main"]([str(tmp_path / "freeflow"), "--device", "cud"]) == 2
    assert "--device" in capsys.readouterr().err
