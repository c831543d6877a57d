"""What needs other processes: two train as one does, and what a signal or a crash leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.signals import Interrupts
from tests.toy_method import make_trainer, weights

ROOT = Path(__file__).parent.parent
CPU_CONFIG = ROOT / "configs" / "accelerate" / "cpu.yaml"
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def run(*command):
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(*command):
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process, start):
    for line in process.stdout:
        if line.startswith(start):
            return line.strip()
    raise AssertionError(process.stderr.read())


def figures(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[value for key, value in line.items() if "/" in key] for line in lines]


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
    run(sys.executable, "-m", "tests.toy_method", folder, "gradient_accumulation=2")
    return folder


def test_the_shipped_cpu_config_starts_two_processes_that_train_as_one(alone, tmp_path):
    out = run(
        BIN / "accelerate",
        "launch",
        "--config_file",
        CPU_CONFIG,
        "--main_process_port",
        0,
        "-m",
        "tests.toy_method",
        tmp_path,
        "gradient_accumulation=2",
    )
    assert "rank 0 of 2 from step 0" in out and "rank 1 of 2 from step 0" in out
    assert_close_runs(alone, tmp_path)


def test_two_processes_that_shard_the_weights_train_as_one_and_one_goes_on(alone, tmp_path):
    out = run(
        BIN / "torchrun",
        "--standalone",
        "--nproc_per_node",
        2,
        "-m",
        "tests.toy_method",
        tmp_path,
        "gradient_accumulation=2",
        "fsdp2=1",
    )
    assert "rank 1 of 2" in out
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
    out = run(
        BIN / "torchrun",
        "--standalone",
        "--nproc_per_node",
        2,
        "-m",
        "tests.toy_method",
        tmp_path,
        "gradient_accumulation=2",
    )
    assert "rank 1 of 2 from step 4" in out
    assert_close_runs(alone, tmp_path)


def test_a_process_killed_while_writing_a_checkpoint_leaves_the_older_one_and_resumes(alone, tmp_path):
    process = start(sys.executable, "-m", "tests.toy_method", tmp_path, "gradient_accumulation=2", "slow=8")
    wait_for_line(process, "writing student.safetensors")
    wait_for_line(process, "writing student.optimizer.safetensors")
    process.kill()
    process.communicate()
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == [".step-000008.partial", "step-000004"]
    half = tmp_path / "checkpoints" / ".step-000008.partial"
    assert [file.name for file in half.iterdir()] == ["student.safetensors"]
    out = run(sys.executable, "-m", "tests.toy_method", tmp_path, "gradient_accumulation=2")
    assert "rank 0 of 1 from step 4" in out
    one, other = load_file(alone / "average.safetensors"), load_file(tmp_path / "average.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    assert figures(tmp_path) == figures(alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves_cleanly(tmp_path, number):
    process = start(sys.executable, "-m", "tests.toy_method", tmp_path, "steps=1000", "pause=50", "checkpoint_every=0")
    wait_for_line(process, "step 3")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = checkpoints(tmp_path / "checkpoints")
    assert len(found) == 1 and 3 <= found[0][0] < 100
    assert f"ended at step {found[0][0]} with signal {int(number)}" in out
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
