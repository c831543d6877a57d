"""The processes that other tests start: as new as those of a command, and none is left behind."""

import copy
import importlib.metadata
import os
import signal
import sys
import time
from importlib.metadata import entry_points

import pytest
import torch
from torch.backends import mkldnn

from tests.copies import quick_deepcopy
from tests.processes import PRELOADED, Child, environment, ranks, run
from tests.quick import known_entry_points, usual_kernels


def describe() -> None:
    assert set(PRELOADED) <= set(sys.modules)
    assert not any(name.startswith("flowdistill.methods.") for name in sys.modules)
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == 1
    print(len(os.listdir("/proc/self/task")), os.environ.get("RANK"), os.getcwd())


def test_a_process_has_one_thread_its_own_environment_and_no_methods(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # of a launcher that runs the tests
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run(describe, cwd=tmp_path).split() == ["1", "None", str(tmp_path)]
    assert "ACCELERATE_USE_CPU" not in environment()


def say_kernels() -> None:
    print(mkldnn.enabled, copy.deepcopy is quick_deepcopy)


def test_a_process_computes_as_the_tests_do(monkeypatch):
    for enabled in (True, False):
        monkeypatch.setattr(mkldnn, "enabled", enabled)
        assert run(say_kernels).split() == [str(enabled), "True"]
    assert copy.deepcopy is quick_deepcopy  # nothing came before, and LARGER does not name this file
    monkeypatch.undo()
    assert not mkldnn.enabled
    with usual_kernels():
        assert mkldnn.enabled
    assert not mkldnn.enabled


def test_what_a_test_installs_is_found(tmp_path):
    info = tmp_path / "some-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tests.some]\none = a:b\n")
    found = importlib.metadata.entry_points
    assert found is known_entry_points and not found(group="tests.some")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        (point,) = found(group="tests.some")
    assert point.value == "a:b" and not found(group="tests.some")
    assert found(group="console_scripts") == entry_points(group="console_scripts")
    assert found(group="console_scripts", name="no such program") == ()


def test_a_script_has_its_arguments_exit_code_and_streams(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(sys.argv, __name__)\nsys.stderr.write('no')\nsys.exit(beside.CODE)\n")
    (tmp_path / "beside.py").write_text("CODE = 3\n")
    with Child(script, 1, "b") as child:
        assert (child.wait(), child.output, child.errors) == (3, f"[{str(script)!r}, '1', 'b'] __main__\n", "no")
    with Child(script, log=tmp_path / "log") as child:
        assert child.wait() == 3
    log = (tmp_path / "log").read_text()
    assert f"[{str(script)!r}] __main__\n" in log and "no" in log.replace(str(script), "")
    assert run("platform")  # a module, as with python -m


def wait_or_fail() -> None:
    print("here", flush=True)
    if os.environ.get("RANK") == "1":
        raise RuntimeError("rank 1 is no good")
    time.sleep(600)


def wait_or_crash() -> None:
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def test_processes_are_ended():
    with Child(wait_or_fail) as child:
        assert child.line("he") == "here" and child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
    with Child(wait_or_fail) as child:
        child.line("here")
    assert child.returncode == -signal.SIGKILL  # by leaving
    with pytest.raises(AssertionError, match="still ran after 0.01 seconds"), Child(wait_or_fail) as child:
        child.wait(0.01)
    with pytest.raises(AssertionError, match="rank 1 is no good") as failed:
        ranks(2, wait_or_fail)
    assert str(failed.value).startswith("process 0 still runs; process 1 ended with exit code 1\n")
    with pytest.raises(AssertionError, match="in wait_or_crash") as failed:
        ranks(2, wait_or_crash)
    assert str(failed.value).startswith("process 0 still runs; process 1 was ended by SIGSEGV\n")
    with pytest.raises(AssertionError, match="no line begins with 'there'"), Child("platform") as child:
        child.line("there")
