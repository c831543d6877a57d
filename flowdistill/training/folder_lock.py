"""One training at a time in a run folder."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_place, disk_errors
from flowdistill.utils.processes import Processes

LOCK = ".lock"
WITHOUT = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""What a file system says that has no locks."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A block in which no other training enters the run folder; all processes of one training call it together.

    The system gives the lock back when the process ends, however that is. A folder that is made for it and in which the
    block leaves nothing is removed again.

    Raises:
        UserError: another training is in it, it is a file, or it cannot be written to.
    """
    held: list[Callable[[], None]] = []
    Processes.current().on_main(lambda: held.append(_entered(folder)))
    try:
        yield
    finally:
        for leave in held:
            leave()


def _entered(folder: Path) -> Callable[[], None]:
    """Make and lock the folder; returns what ends that."""
    with disk_errors(f"the run folder {folder}"):
        check_is_folder(folder)
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another training is going on in {folder}; wait until it has ended, or choose another "
                            "output_dir") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in WITHOUT:
                raise
            warnings.warn(f"the file system of {folder} has no locks, so nothing keeps a second training out of it",
                          stacklevel=2)

    def leave() -> None:
        lock.release()
        with contextlib.suppress(OSError):  # not empty any more, or gone
            if made and {entry.name for entry in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                for each in made:
                    each.rmdir()

    return leave


def check_is_folder(folder: Path) -> None:
    """Refuse a file in the place of a run folder, and a place where no folder can be made.

    Raises:
        UserError: so.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; it must be a folder")
    check_place(folder, f"output_dir {folder}")
