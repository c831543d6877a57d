"""Many machines: batch scripts for Slurm, with stand-ins for its commands, and a run of two "nodes" over loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from flowdistill.cli.commands import make_parser
from flowdistill.config import load_config
from flowdistill.training.checkpoint import checkpoints
from tests.processes import ROOT, TIMEOUT, Child, environment, ranks
from tests.toy_method import figures

SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*.sh"))
PAGE = ROOT / "docs" / "guides" / "clusters.md"
CONFIGS = {"array": "configs/digits/msd.yaml"}
STUBS = {
    # What a node's task runs, and what a launcher or a run does: to end, to fail, or to wait for a signal.
    "srun": 'exec "$@"',
    "accelerate": 'printf "%s\\0" accelerate "$@" > "$SAID"; . "$ACT"',
    "flowdistill": 'printf "%s\\0" flowdistill "$@" > "$SAID"; . "$ACT"',
    "scontrol": 'if [ "$1" = show ]; then echo first-node; echo second-node; else echo "$*" >> "$CALLED"; fi',
}
ACTS = {
    "ends": "exit 0",
    "fails": "exit 3",
    "is stopped": 'trap "exit 143" TERM; touch "$READY"; while :; do sleep 0.02; done',
    "ends at the signal": 'trap "exit 0" TERM; touch "$READY"; while :; do sleep 0.02; done',
}


def ended(job: subprocess.Popen[bytes] | Child) -> None:
    """End what is left of a process and of those that it has started, which it is asked to do first."""
    job.terminate()
    end = time.monotonic() + 60
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def submitted(folder: Path, script: Path, act: str, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
    """What becomes of a job: exit code, the command that was started, and what Slurm was asked for."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in STUBS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (folder / "act").write_text(ACTS[act])
    files = {name: str(folder / name.lower()) for name in ("SAID", "CALLED", "READY", "ACT")}
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4",
             "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    env = environment(**files, **slurm | variables) | {"PATH": f"{tools}:{os.environ['PATH']}"}
    config = CONFIGS.get(script.stem, "configs/sdxl/dmd2_4step.yaml")
    job = subprocess.Popen(["bash", str(script), config, *arguments], env=env, start_new_session=True)
    try:
        if "TERM" in ACTS[act]:
            end = time.monotonic() + 60
            while not Path(files["READY"]).exists():
                assert job.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@180 does: to the script alone
        code = job.wait(60)
    finally:
        ended(job)
    called = Path(files["CALLED"])
    return code, Path(files["SAID"]).read_text().split("\0")[:-1], called.read_text() if called.exists() else ""


def checked(command: list[str]) -> dict[str, object]:
    """What a command tells accelerate; flowdistill's part of it must be a command that it takes, of a valid run."""
    told: dict[str, object] = {}
    if command[0] == "accelerate":
        assert command[1] == "launch"
        options = launch_command_parser().parse_args(command[2:])
        assert options.module and options.training_script == "flowdistill"
        assert load_config_from_file(str(ROOT / options.config_file)) is not None
        told, command = vars(options), ["flowdistill", *options.training_script_args]
    given = make_parser().parse_args(command[1:])
    assert load_config(ROOT / given.config, given.overrides).output_dir
    return told | {"overrides": given.overrides, "command": command[1]}


def test_there_is_a_script_for_each_kind_of_job() -> None:
    assert [script.stem for script in SCRIPTS] == ["array", "multi_node", "single_node"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_starts_a_valid_command_and_goes_on_after_a_signal(tmp_path: Path, script: Path) -> None:
    expected = {"ends": (0, False), "fails": (3, False), "is stopped": (0, True), "ends at the signal": (0, False)}
    for number, (act, (code, again)) in enumerate(expected.items()):
        (folder := tmp_path / str(number)).mkdir()
        found, command, called = submitted(folder, script, act, "output_dir=runs/a run", "train.steps=7")
        assert (found, called) == (code, "requeue 4711\n" * again), act
        told = checked(command)
        assert told["command"] == "distill" and {"output_dir=runs/a run", "train.steps=7"} <= {*told["overrides"]}


def test_each_script_tells_the_launcher_what_slurm_says(tmp_path: Path) -> None:
    scripts = {script.stem: script for script in SCRIPTS}

    def told(name: str, *arguments: str, **variables: str) -> dict[str, object]:
        return checked(submitted(tmp_path, scripts[name], "ends", *arguments, **variables)[1])

    one = told("single_node")
    assert (one["num_processes"], one["config_file"]) == (4, "configs/accelerate/multi_gpu_bf16.yaml")
    assert "num_processes" not in told("single_node", SLURM_GPUS_ON_NODE="1")
    assert told("single_node", ACCELERATE_CONFIG="configs/accelerate/fsdp2.yaml")["config_file"].endswith("fsdp2.yaml")
    many = told("multi_node")
    wanted = {"num_machines": 2, "machine_rank": 1, "num_processes": 8, "main_process_ip": "first-node",
              "main_process_port": 24711, "rdzv_backend": "c10d"}
    assert {name: many[name] for name in wanted} == wanted
    assert told("array")["overrides"] == ["method.student_index=1"]
    smaller = "method.score_matching.student_size=0.3"
    assert told("array", smaller, STUDENT="-1")["overrides"] == [smaller, "method.student_index=-1"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_leaves_time_for_a_checkpoint_and_may_be_queued_again(script: Path) -> None:
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    to, _, seconds = options["signal"].partition("@")
    assert to == "B:TERM" and "requeue" in options and options["open-mode"] == "append"
    assert int(seconds) > max(map(int, re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", text)), default=0)
    assert int(options["ntasks-per-node"]) == 1


def test_what_is_told_to_be_submitted_can_be() -> None:
    """In the scripts' own words and on the page."""
    sources = {source.name: source.read_text().replace("\\\n", " ") for source in (*SCRIPTS, PAGE)}
    lines = [(name, shlex.split(line.strip("# `)"))) for name, text in sources.items()
             for line in re.findall(r"sbatch [^\n]*configs/slurm/[^\n]*", text)]
    assert {name for name, _ in lines} == set(sources)
    for name, words in lines:
        place = next(i for i, word in enumerate(words) if word.startswith("configs/slurm/"))
        assert (ROOT / words[place]).is_file(), (name, words)
        if len(words) > place + 1 and words[place + 1].startswith("configs/"):
            load_config(ROOT / words[place + 1], words[place + 2 :])


def torchrun(*arguments: str) -> None:
    """In a process of its own: the leader of a group, so that its workers can be ended with it."""
    os.setsid()
    sys.argv = ["torchrun", *arguments]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


PROGRAM = """
import sys
from tests.toy_method import main
main(sys.argv[1:])
"""


def test_two_nodes_train_and_stop_as_one_does(tmp_path: Path) -> None:
    """torchrun's rendezvous over loopback: one of two nodes is told to stop, and both write the same checkpoint as one
    node of two processes does after as many steps. Its workers are forked, as it can do with programs by their path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (program := tmp_path / "program.py").write_text(PROGRAM)
    meet = ("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id",
            "two", "--start-method", "fork", "--run-path", str(program), str(tmp_path / "two"), "steps=100000",
            "checkpoint_every=0", "pause=20")
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(2):
            node = stack.enter_context(Child(torchrun, *meet, log=log, daemon=False))
            stack.callback(ended, node)
            nodes.append(node)
        end = time.monotonic() + TIMEOUT
        while "step 3\n" not in log.read_text():
            assert time.monotonic() < end and nodes[0].poll() is None, log.read_text()
            time.sleep(0.02)
        nodes[1].send_signal(signal.SIGTERM)
        while log.read_text().count("ended at step") < 2:  # the other node's launcher then waits for this one
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
    text = log.read_text()
    assert "rank 0 of 2 from step 0" in text and "rank 1 of 2 from step 0" in text
    (steps, found), = checkpoints(tmp_path / "two" / "checkpoints")
    assert text.count(f"ended at step {steps} with signal 15") == 2
    ranks(2, "tests.toy_method", tmp_path / "one", f"steps={steps}", "checkpoint_every=0")
    (_, expected), = checkpoints(tmp_path / "one" / "checkpoints")
    names = sorted(file.name for file in expected.glob("*.safetensors"))
    assert names and names == sorted(file.name for file in found.glob("*.safetensors"))
    for name in names:
        one, other = load_file(expected / name), load_file(found / name)
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items()), name
    assert figures(tmp_path / "one")[: steps // 2] == figures(tmp_path / "two")
    assert json.loads((found / "state.json").read_text())["world_size"] == 2
