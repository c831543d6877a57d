"""The parts of scripts/accept_gpu.py as tests, which ``pytest -m gpu`` runs where there is a CUDA device."""

import pytest
import torch

from tests.gpu.bench import Part
from tests.gpu.parts import PARTS
from tests.gpu.runner import run_part


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARTS)
def test_part(name: str) -> None:
    part: Part = PARTS[name]
    assert torch.cuda.is_available(), "there is no CUDA device here; leave out -m gpu"
    outcome = run_part(part, torch.device("cuda", 0))
    assert outcome.result != "failed", outcome.sentence
