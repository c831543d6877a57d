"""The built wheel, installed where there is no clone, runs the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing but the wheel is installed; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # as pip calls what builds it
        wheel = build_wheel(str(folder))
    with zipfile.ZipFile(folder / wheel) as file:  # all that pip does with a wheel of this kind
        file.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = """
import json, sys
import flowdistill
from flowdistill.cli.commands import main
print(flowdistill.__file__)
for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
"""


def test_the_main_job_runs_by_its_name_in_an_empty_folder(site, tmp_path):
    small = ["train.steps=2", "train.trackers=[]", "evaluation.num_images=40", "evaluation.teacher_steps=[1]"]
    commands = [["distill", "digits/freeflow", *small], ["inspect", "assets/digits-flow"]]
    out = run(site, tmp_path, "-c", COMMANDS, json.dumps(commands))
    assert Path(out.splitlines()[0]).is_relative_to(site)
    report = json.loads((tmp_path / "runs/digits-freeflow/report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["teacher", "student"] and "report.json" in out
    assert "FlowMatchEulerDiscreteScheduler" in out
    assert run(site, tmp_path, "-m", "flowdistill", "--version").startswith("flowdistill ")
