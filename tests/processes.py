"""Real processes for tests, that start at once, and their launchers.

A process of Python that imports torch, diffusers and transformers anew takes six seconds of CPU. ``Child``, ``run`` and
``ranks`` fork theirs from a server that has imported them already: one for each process of pytest, begun when the first
is asked for, with one thread and an environment that knows of no launcher. ``launched`` runs a command as a user does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from torch.backends import mkldnn

from tests.quick import quicken

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TIMEOUT = 600.0
"""Seconds after which a test that waits for a process fails."""

# What tests' processes import, but for flowdistill.methods, of which each imports its own.
PRELOADED = ["torch", "diffusers", "transformers", "peft", "flowdistill.training.run", "flowdistill.evaluation",
             "flowdistill.export", "flowdistill.students", "flowdistill.teachers", "tests.families"]
# What launchers tell their processes; a test may itself run under one.
LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

Target = str | Path | Callable[..., Any]


def environment(**more: str) -> dict[str, str]:
    """This process's without what a launcher may have set, with one thread, the repository's modules, and ``more``."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in plain.items() if name not in LAUNCHED} | own | more


@functools.cache
def server() -> ForkServerContext:
    """The context whose server of forks has imported ``PRELOADED``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    return context


class Child:
    """A process forked from the server, with the parts of ``subprocess.Popen`` that tests need.

    Leaving it as a context ends it.

    Args:
        target: a module that runs as ``python -m`` runs it, the path of a script, or a function.
        arguments: of a command, as text; of a function, anything that pickle takes.
        env: the whole environment; None: ``environment()``.
        cwd: its folder.
        log: a file to which standard output and standard error are added; None: a file of its own for each.
        daemon: False: one that itself starts processes by ``multiprocessing``.
    """

    def __init__(
        self, target: Target, *arguments: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT,
        log: Path | None = None, daemon: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (log or Path(self._folder.name) / name for name in ("stdout", "stderr"))
        self._out.touch()
        self._err.touch()
        given = arguments if callable(target) else tuple(map(str, arguments))
        start = (target, given, dict(environment() if env is None else env), cwd, self._out, self._err,
                 not mkldnn.enabled)
        self._process = server().Process(target=_begin, args=start, daemon=daemon)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """What ``multiprocessing.connection.wait`` waits for: the end."""
        return self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    @property
    def output(self) -> str:
        """What it has written to standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"process {self.pid} still ran after {timeout:g} seconds\n{self.errors}")
        return self.returncode

    def line(self, beginning: str, timeout: float = TIMEOUT) -> str:
        """The first line of standard output that begins so, as soon as it is there."""
        end = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            for line in self.output.splitlines(keepends=True):
                if line.startswith(beginning) and line.endswith("\n"):
                    return line.rstrip()
            assert not ended and time.monotonic() < end, f"no line begins with {beginning!r}\n{self.errors}"
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.returncode is None:
            self.kill()
        self._process.join(TIMEOUT)


def run(target: Target, *arguments: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Standard output of one process, which must succeed; the arguments are those of ``Child``."""
    with Child(target, *arguments, env=env, cwd=cwd) as child:
        assert child.wait() == 0, child.errors
        return child.output


def ranks(world: int, target: Target, *arguments: Any, env: Mapping[str, str] | None = None) -> list[str]:
    """Standard output of each of ``world`` processes, started as torchrun starts those of one machine.

    All must succeed. When one fails the others, which wait for it, are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = dict(environment() if env is None else env) | address
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    with contextlib.ExitStack() as stack:
        children = []
        for rank in map(str, range(world)):
            child = Child(target, *arguments, env=common | {"RANK": rank, "LOCAL_RANK": rank})
            children.append(stack.enter_context(child))
        end, running = time.monotonic() + TIMEOUT, list(children)
        while running:
            ready = connection.wait([child.sentinel for child in running], end - time.monotonic())
            assert ready, f"{len(running)} of {world} processes still ran after {TIMEOUT:g} seconds"
            for child in [child for child in running if child.returncode is not None]:
                running.remove(child)
            # Of all, for those that wait for one that failed say only that it has gone.
            assert all(child.returncode in (None, 0) for child in children), "; ".join(
                f"process {rank} {_ending(child.returncode)}" for rank, child in enumerate(children)
            ) + "".join(f"\nerrors of process {rank}:\n{child.errors}" for rank, child in enumerate(children))
        return ["".join(line for line in child.output.splitlines(keepends=True) if not line.startswith("[Gloo]"))
                for child in children]  # without what torch 2.8 writes there of its connections


def _ending(code: int | None) -> str:
    if code is None:
        return "still runs"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def launched(*command: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Standard output of a command in a process of its own, which must succeed; the program is one in BIN or a path."""
    program, *arguments = map(str, command)
    done = subprocess.run([str(BIN / program), *arguments], cwd=cwd, env=environment() if env is None else env,
                          capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _begin(
    target: Target, arguments: tuple[Any, ...], env: dict[str, str], cwd: Path, out: Path, err: Path,
    without_onednn: bool,
) -> None:
    """In the child: put everything as in a process of its own, then run."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()  # where a signal ends it
    gc.freeze()  # what the server has imported is shared: looking through it for garbage would copy it
    # As in a process of its own. tqdm's lock would else be a file, which a process that is killed does not remove.
    multiprocessing.set_start_method("fork", force=True)
    quicken(without_onednn=without_onednn)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if callable(target):
        target(*arguments)
        return
    sys.argv = [str(target), *arguments]
    if isinstance(target, Path):
        sys.path.insert(0, str(target.parent))
        runpy.run_path(str(target), run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
