"""One training at a time in a run folder, and one job at a time that begins in a folder which several share."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_place, disk_errors
from flowdistill.utils.logging import say
from flowdistill.utils.processes import Processes

LOCK = ".lock"
"""Locked for as long as a training goes on in its folder."""
BEGINNING = ".begin.lock"
"""Locked while a job looks at a folder that several share, and writes what they share."""
WITHOUT = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""What a file system says that has no locks."""
POLL = 0.2  # seconds between two looks at a lock that is waited for
ATTEMPTS = 100  # at a file that others remove each time


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A block in which no other training enters the run folder; all processes of one training call it together.

    The system gives the lock back when the process ends, however that is. A folder that is made for it and in which the
    block leaves nothing is removed again.

    Raises:
        UserError: another training is in it, it is a file, or it cannot be written to.
    """
    with _on_main(lambda: _entered(folder)):
        yield


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """A block that one of the jobs which share a folder is in at a time, while the others wait; a training may go on in
    the folder. Else as :func:`alone_in`."""
    with _on_main(lambda: _entered(folder, BEGINNING, wait=True)):
        yield


def is_in_use(folder: Path) -> bool:
    """Whether a training goes on in a run folder.

    To look is to lock for a moment, which refuses a training that enters just then: look only within :func:`in_turn`,
    at folders that are entered within it.

    Raises:
        UserError: the folder cannot be written to.
    """
    if not (folder / LOCK).is_file():
        return False
    lock = _file_lock(folder / LOCK)
    with disk_errors(f"the run folder {folder}"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except (NotImplementedError, OSError) as error:
            if not _is_without_locks(error):
                raise
            return False
        lock.release()
    return False


@contextlib.contextmanager
def _on_main(enter: Callable[[], Callable[[], None]]) -> Iterator[None]:
    held: list[Callable[[], None]] = []
    Processes.current().on_main(lambda: held.append(enter()))
    try:
        yield
    finally:
        for leave in held:
            leave()


def _entered(folder: Path, name: str = LOCK, wait: bool = False) -> Callable[[], None]:
    """Make the folder and lock the file of this name in it; returns what ends that."""
    lock: BaseFileLock | None = None
    made: set[Path] = set()
    with disk_errors(f"the run folder {folder}"):
        check_is_folder(folder)
        for _ in range(ATTEMPTS):
            try:
                made |= {each for each in (folder, *folder.parents) if not each.exists()}
                folder.mkdir(parents=True, exist_ok=True)
                lock = _locked(folder / name, wait)
            except (FileExistsError, FileNotFoundError):  # whoever had made the folder has just removed it
                continue
            except Timeout:
                raise UserError(f"another training is going on in {folder}; wait until it has ended, or choose another "
                                "output_dir") from None
            except (NotImplementedError, OSError) as error:
                if not _is_without_locks(error):
                    raise
                if not wait:  # the training's own lock follows, and says it
                    warnings.warn(f"the file system of {folder} has no locks, so nothing keeps a second training out "
                                  "of it", stacklevel=2)
                break
            if lock is not None:
                break
        else:
            if not folder.is_dir():  # /proc and the like, which say so of what cannot be made
                raise UserError(f"output_dir {folder} cannot be made where it is; choose another one")
            raise UserError(f"{folder / name} is removed again and again, so it cannot be locked; see who else writes "
                            "to the folder, or choose another output_dir")

    def leave() -> None:
        # Unlinked while it is locked: who opened it before sees that it has lost its name (_locked), who comes later
        # makes a new one. After the release it might be somebody else's.
        with contextlib.suppress(OSError):
            if made and {entry.name for entry in folder.iterdir()} <= {LOCK, BEGINNING}:
                for each in (LOCK, BEGINNING):
                    (folder / each).unlink(missing_ok=True)
        if lock is not None:
            lock.release()
        with contextlib.suppress(OSError):  # others have entered it or removed it, or the block left something
            for folder_made in sorted(made, reverse=True):
                folder_made.rmdir()

    return leave


def _locked(file: Path, wait: bool) -> BaseFileLock | None:
    """The lock of a file; None where the file was removed meanwhile, so that another one may have its name."""
    lock = _file_lock(file)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # while it is open, no other file gets its number
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not _is_named(handle, file):
                return None
            if not wait:
                raise
            say(f"waiting for another job that is beginning in {file.parent}")
            lock.acquire(timeout=-1, poll_interval=POLL)
        if _is_named(handle, file):
            return lock
        lock.release()
        return None
    finally:
        os.close(handle)


def _is_without_locks(error: Exception) -> bool:
    return not isinstance(error, OSError) or error.errno in WITHOUT


def _is_named(handle: int, file: Path) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _file_lock(file: Path) -> BaseFileLock:
    # Never a soft lock, which is that a file exists: it would outlive a kill -9 and refuse the run for ever. Where the
    # system has no other locks, a training goes on without one, and says so.
    return FileLock(file, fallback_to_soft=False, preserve_lock_file=True)


def check_is_folder(folder: Path) -> None:
    """Refuse a file in the place of a run folder, and a place where no folder can be made.

    Raises:
        UserError: so.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; it must be a folder")
    check_place(folder, f"output_dir {folder}")
