"""FSDP2 on two processes: students of real backbones train as one process trains them, and are saved whole."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flowdistill.students import load_student
from flowdistill.training.state import network_tensors
from tests.processes import environment, ranks, run
from tests.sharded import NAMES, train, train_in_parts, trainer_of
from tests.toy_method import figures


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process, and of two that shard, who stopped half-way and went on; and what the two said."""
    folder = tmp_path_factory.mktemp("sharded")
    env = environment(XDG_CACHE_HOME=str(folder / "cache"))  # encoded prompts
    run(train, folder / "one", 2, env=env)
    outs = ranks(2, train_in_parts, folder / "two", env=env)
    lines = [json.loads(line) for out in outs for line in out.splitlines() if line.startswith("{")]
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
