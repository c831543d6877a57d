"""One training at a time in a run folder, whatever becomes of the others and of the file that is locked."""

import contextlib
import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from flowdistill import UserError
from flowdistill.training.folder_lock import alone_in, in_turn, is_in_use


def refused(folder):
    with pytest.raises(UserError, match=rf"another training is going on in {folder}; wait"), alone_in(folder):
        pass
    return True


def test_a_killed_training_leaves_no_lock(tmp_path):
    code = ("import sys, time\nfrom pathlib import Path\nfrom flowdistill.training.folder_lock import alone_in\n"
            "with alone_in(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(100)")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"in\n"
        assert refused(tmp_path) and is_in_use(tmp_path)
        first.kill()
    assert not is_in_use(tmp_path)
    with alone_in(tmp_path):
        assert refused(tmp_path)


def test_who_leaves_takes_no_lock_from_who_enters(tmp_path, monkeypatch):
    """A folder that was made for nothing is removed, but not the lock of the training that has come just then."""
    folder, release = tmp_path / "runs" / "one", FileLock.release
    with contextlib.ExitStack() as second:

        def released(self, *given, **named):
            release(self, *given, **named)
            monkeypatch.undo()
            second.enter_context(alone_in(folder))

        with alone_in(folder):
            monkeypatch.setattr(FileLock, "release", released)
        assert refused(folder)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_lock_whose_file_has_been_removed_is_none(tmp_path, monkeypatch, name):
    """The file is opened before it is locked; meanwhile who held it may have left and removed it."""
    folder, acquire = tmp_path / "one", FileLock.acquire

    def acquired(self, *given, **named):
        monkeypatch.undo()
        proxy = acquire(self, *given, **named)
        (folder / ".lock").unlink()
        if name == "folder":
            folder.rmdir()
        return proxy

    monkeypatch.setattr(FileLock, "acquire", acquired)
    with alone_in(folder):
        assert refused(folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_no_lock_that_goes(tmp_path, monkeypatch):
    def mkdir(self, *given, **named):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))  # as /proc has it

    monkeypatch.setattr(Path, "mkdir", mkdir)
    said = "output_dir .*new cannot be made where it is; choose"
    with pytest.raises(UserError, match=said), alone_in(tmp_path / "new"):
        pass


def test_a_file_that_is_removed_each_time_is_no_lock(tmp_path, monkeypatch):
    acquire = FileLock.acquire

    def acquired(self, *given, **named):
        proxy = acquire(self, *given, **named)
        (tmp_path / ".lock").unlink()
        return proxy

    monkeypatch.setattr(FileLock, "acquire", acquired)
    with pytest.raises(UserError, match=r"\.lock is removed again and again"), alone_in(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path, monkeypatch, code):
    """Nor does it leave a file there that stands for a lock, which a kill -9 would leave for ever."""
    def flock(*given):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # the second enters what the first has not left
        context = alone_in(tmp_path / "a" / "b")
        with pytest.warns(UserWarning, match="has no locks, so nothing keeps a second training out of it"):
            context.__enter__()
        (tmp_path / "a" / "b" / "file").touch()
        assert not is_in_use(tmp_path / "a" / "b")
    with in_turn(tmp_path / "a" / "b"), in_turn(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "file").exists()


def test_jobs_that_begin_wait_for_each_other(tmp_path, capsys):
    folder, entered = tmp_path / "shared", threading.Event()

    def second():
        with in_turn(folder):
            assert is_in_use(folder)
            entered.set()

    with alone_in(folder):  # a training in it is no reason to wait
        with in_turn(folder):
            thread = threading.Thread(target=second)
            thread.start()
            assert not entered.wait(0.3)
        thread.join(10)
        assert entered.is_set()
    assert capsys.readouterr().err == f"waiting for another job that is beginning in {folder}\n"
    assert not folder.exists()


def test_who_waited_does_not_hold_what_the_first_has_removed(tmp_path):
    """The first job is refused something, so that it removes the folder; the second makes it anew."""
    folder, done = tmp_path / "shared", threading.Event()

    def second():
        with in_turn(folder):
            assert (folder / ".begin.lock").is_file()
            (folder / "config.yaml").touch()
            done.set()

    with pytest.raises(UserError, match="refused"), in_turn(folder):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.3)
        raise UserError("refused")
    thread.join(10)
    assert done.is_set() and {entry.name for entry in folder.iterdir()} == {".begin.lock", "config.yaml"}
