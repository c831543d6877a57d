"""The sheet on which the strict judge's thresholds were set: the judge and the eye agree on every picture."""

import importlib.util
import sys
from pathlib import Path

import pytest

from flowdistill.evaluation.shapes_judge import judge_concept

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("shapes_judge_sheet", ROOT / "scripts/shapes_judge_sheet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_judge_takes_what_the_eye_took_and_refuses_the_rest(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    images, names, asked = script.pictures()
    assert sorted(script.EYE) == list(range(len(images))) == list(range(20))
    judged = judge_concept(images, script.CONCEPT, asked)
    taken = set(script.EYE[: script.TAKEN])
    assert {number for number in range(20) if judged.accepted[number]} == taken
    rows = script.table(judged, names).splitlines()[2:]
    assert len(rows) == 20 and all("| takes | takes |" in row and "**" not in row for row in rows[: script.TAKEN])
    assert all("| refuses | refuses |" in row and "**" in row for row in rows[script.TAKEN :])


def test_a_missing_strip_of_made_pictures_is_said_in_a_sentence(script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script, "MADE", tmp_path / "none.png")
    assert script.main(["--out", str(tmp_path / "sheet.png")]) == 2
    assert "none.png" in capsys.readouterr().err and not (tmp_path / "sheet.png").exists()
