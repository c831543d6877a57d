"""FSDP2 on two processes: students of real backbones train as one process trains them, and are saved whole."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from flowdistill.students import load_student
from flowdistill.training.state import network_tensors
from tests.sharded import NAMES, trainer_of
from tests.test_training_processes import BIN, figures, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process, and of two that shard, who stopped half-way and went on; and what the two said."""
    folder = tmp_path_factory.mktemp("sharded")
    cached = ("env", f"XDG_CACHE_HOME={folder / 'cache'}")  # encoded prompts
    run(*cached, sys.executable, "-m", "tests.sharded", folder / "one")
    lines = []
    for steps in (1, 2):
        launched = (BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "-m", "tests.sharded")
        out = run(*cached, *launched, folder / "two", f"steps={steps}", "fsdp2=1")
        lines += [json.loads(text) for text in re.findall(r"{[^}]*}", out)]  # two processes may share a line
    return folder, lines


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_hold_half_each_and_train_as_one(runs, name):
    folder, lines = runs
    said = [line for line in lines if line["name"] == name]
    assert sorted((line["rank"], line["world"], line["from"]) for line in said) == [
        (0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]
    for line in said:  # tensors whose first dimension is odd are not cut evenly
        assert 0.4 * line["all"] < line["here"] < 0.6 * line["all"]
    one, two = (folder / kind / name for kind in ("one", "two"))
    ours = torch.tensor(figures(two))
    torch.testing.assert_close(ours, torch.tensor(figures(one)), rtol=1e-3, atol=1e-4)
    for file in ("student", "student.average", "critic", "student.optimizer", "critic.optimizer"):
        first, second = (load_file(path / "checkpoints" / "step-000002" / f"{file}.safetensors") for path in (one, two))
        assert first.keys() == second.keys() and first
        apart = sum((second[key] - value).float().square().sum() for key, value in first.items()).sqrt()
        size = sum(value.float().square().sum() for value in first.values()).sqrt()
        assert apart < 1e-3 * size, file


@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_saved_whole_and_one_process_goes_on(runs, name):
    folder, _ = runs
    one, two = (load_student(folder / kind / name) for kind in ("one", "two"))
    first, second = (model.generate(num_images=4) for model in (one, two))
    assert first.std() > 0.01 and (first - second).abs().max() < 1e-2
    trainer = trainer_of(name, folder / "two" / name, steps=3)
    assert trainer.step == 2
    whole = load_file(folder / "two" / name / "checkpoints" / "step-000002" / "student.safetensors")
    here = network_tensors(trainer.roles["student"].network)
    assert all(torch.equal(value, whole[key]) for key, value in here.items())
    trainer.train_step()
    assert trainer.step == 3
