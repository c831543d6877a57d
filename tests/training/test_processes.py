"""What needs other processes: two train as one does, and what a signal or a crash leaves."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.signals import Interrupts
from tests.processes import ROOT, Child, launched, ranks, run
from tests.toy_method import figures, make_trainer, weights

CPU_CONFIG = ROOT / "configs" / "accelerate" / "cpu.yaml"
TOY = "tests.toy_method"


def assert_close_runs(one, other):
    """Averaged weights to 1e-5, and losses and gradient norms of every line."""
    first, second = load_file(one / "average.safetensors"), load_file(other / "average.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(figures(other)), torch.tensor(figures(one)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(TOY, folder, "gradient_accumulation=2")
    return folder


def test_the_shipped_cpu_config_starts_two_processes_that_train_as_one(alone, tmp_path):
    launch = ("accelerate", "launch", "--config_file", CPU_CONFIG, "--main_process_port", 0)
    out = launched(*launch, "-m", TOY, tmp_path, "gradient_accumulation=2")
    assert "rank 0 of 2 from step 0" in out and "rank 1 of 2 from step 0" in out
    assert_close_runs(alone, tmp_path)


JOIN = """
import json, os, sys
from pathlib import Path
import torch
from flowdistill.utils.exit import exit_process
from flowdistill.utils.processes import Processes

processes = Processes.start()
rows = processes.rows(torch.arange(processes.rank + 1))
named = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
port = int(os.environ["MASTER_PORT"]) > 0 and len(os.environ["MASTER_ADDR"]) > 0
print(json.dumps([named, port, processes.rank, processes.world, rows.tolist()]), file=open(sys.argv[1], "a"))
exit_process(0)
"""


def test_torchrun_and_what_starts_the_other_tests_processes_say_the_same(tmp_path):
    """The variables that a launcher sets, by which the processes find each other; and both see a good end."""
    program = tmp_path / "join.py"
    program.write_text(JOIN)
    launched("torchrun", "--standalone", "--nproc_per_node", 2, program, tmp_path / "launched")
    ranks(2, program, tmp_path / "forked")
    said = [sorted((tmp_path / name).read_text().splitlines()) for name in ("launched", "forked")]
    assert said[0] == said[1]
    each = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert [json.loads(line) for line in said[0]] == [
        [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | each, True, rank, 2, [0, 0, 1]] for rank in range(2)]


def test_two_processes_that_shard_the_weights_train_as_one_and_one_goes_on(alone, tmp_path):
    outs = ranks(2, TOY, tmp_path, "gradient_accumulation=2", "fsdp2=1")
    assert "rank 1 of 2" in outs[1]
    assert_close_runs(alone, tmp_path)
    whole, sharded = (make_trainer(folder, gradient_accumulation=2) for folder in (alone, tmp_path))
    assert whole.step == sharded.step == 8
    one, other = weights(whole), weights(sharded)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_one_process_checkpoint_goes_on_in_two(alone, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000008")
    (tmp_path / "average.safetensors").unlink()
    outs = ranks(2, TOY, tmp_path, "gradient_accumulation=2")
    assert "rank 1 of 2 from step 4" in outs[1]
    assert_close_runs(alone, tmp_path)


def test_a_process_killed_while_writing_a_checkpoint_leaves_the_older_one_and_resumes(alone, tmp_path):
    with Child(TOY, tmp_path, "gradient_accumulation=2", "slow=8") as process:
        process.line("writing student.safetensors")
        process.line("writing student.optimizer.safetensors")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == [".step-000008.partial", "step-000004"]
    half = tmp_path / "checkpoints" / ".step-000008.partial"
    assert [file.name for file in half.iterdir()] == ["student.safetensors"]
    out = run(TOY, tmp_path, "gradient_accumulation=2")
    assert "rank 0 of 1 from step 4" in out
    one, other = load_file(alone / "average.safetensors"), load_file(tmp_path / "average.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    assert figures(tmp_path) == figures(alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves_cleanly(tmp_path, number):
    with Child(TOY, tmp_path, "steps=1000", "pause=50", "checkpoint_every=0") as process:
        process.line("step 3")
        process.send_signal(number)
        assert process.wait(60) == 0, process.errors
    found = checkpoints(tmp_path / "checkpoints")
    assert len(found) == 1 and 3 <= found[0][0] < 100
    assert f"ended at step {found[0][0]} with signal {int(number)}" in process.output
    resumed = make_trainer(tmp_path, steps=found[0][0] + 1)
    assert resumed.step == found[0][0]


def test_a_second_signal_acts_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    acted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: acted.append(number))
    try:
        with Interrupts() as interrupts:
            assert interrupts.agreed(torch.device("cpu"), 1) == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.agreed(torch.device("cpu"), 1) == signal.SIGTERM and acted == []
            now = time.monotonic()
            monkeypatch.setattr("flowdistill.training.signals.time.monotonic", lambda: now + 3)
            os.kill(os.getpid(), signal.SIGTERM)
            assert acted == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(acted) == 2  # the handler from before is back
    finally:
        signal.signal(signal.SIGTERM, before)
