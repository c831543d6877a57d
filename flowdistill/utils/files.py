"""Files that are complete or absent, and where caches live."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from flowdistill.utils.errors import UserError, shown

# What macOS, Windows, Synology and QNAP systems and a fresh disk put into folders besides the names with a dot.
_CLUTTER = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found",
     "@eadir", "#recycle", "@recycle", "@recently-snapshot")
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PROBE = 2**16  # bytes: more than a report or a grid of small images
LONGEST_NAME = 255  # bytes, of one file or folder on every common file system


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path as the user wrote it, with ``~`` and ``~name`` in front replaced by the home folder.

    Every path from outside passes through here where it is read or written; settings keep it as it was written.

    Raises:
        UserError: ``~name`` names nobody on this machine; no file can have such a name; an empty text, which would be
            the working folder.
    """
    text = os.fspath(path)
    if not text:
        raise UserError("a path is an empty text; give one, such as . for the working folder")
    if "\0" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in re.split(r"[/\\]", text)):
        raise UserError(f"{shown(text)} is no path: a name in it " + (
            "has a zero byte" if "\0" in text else f"is longer than {LONGEST_NAME} bytes"))
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        head = re.split(r"[/\\]", expanded, maxsplit=1)[0]
        raise UserError(f"{expanded}: there is no home folder {head} on this machine; a name that begins with ~ is "
                        f"written ./{expanded}")
    return Path(expanded)


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set.

    Such are hidden names (``.ipynb_checkpoints``, ``._0000.png``) and what systems leave behind (``__MACOSX``,
    ``Thumbs.db``, ``@eaDir``).
    """
    return name.startswith(".") or name.lower() in _CLUTTER


def check_place(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Refuse a place where nothing can be made: a symbolic link that leads nowhere, such as to a disk that is not
    mounted, and whatever lies below one or below a file.

    Args:
        path: of a file or a folder.
        name: words for it in the error, such as the option that names it.

    Raises:
        UserError: so.
    """
    whole = local_path(path).absolute()
    for each in (*reversed(whole.parents), whole):
        if os.path.islink(each) and not os.path.exists(each):
            raise UserError(f"{name or path} cannot be written: {each} is a symbolic link that leads nowhere, to "
                            f"{os.readlink(each)}; make what it names, or choose another place")
        if each != whole and os.path.exists(each) and not os.path.isdir(each):
            raise UserError(f"{name or path} cannot be written: {each} is a file, and no folder; choose another place")


def check_writable(path: str | os.PathLike) -> None:
    """Refuse a file that could not be written, before the work whose result it takes. Nothing is left behind.

    Raises:
        UserError: ``path`` is a folder, a device or a pipe, what :func:`check_place` refuses, or the nearest of its
            folders that exists takes no new file of 64 KiB.
    """
    path = local_path(path)
    check_place(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # a complete file would take its place
        raise UserError(f"{path} is a device or a pipe; give the name of a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
    except OSError as error:
        raise UserError(f"{path} cannot be written; {folder}: {error.strerror}") from error


def check_replaceable(path: str | os.PathLike[str], is_own: Callable[[Path], bool], what: str) -> None:
    """Refuse what :func:`check_writable` refuses, and a file that is there and is not what is to be written anew.

    Args:
        is_own: whether the file is such a one.
        what: words for it.

    Raises:
        UserError: so. An empty file may be replaced.
    """
    check_writable(path)
    path = local_path(path)
    if path.is_file() and path.stat().st_size and not is_own(path):
        raise UserError(f"{path} is there already and is not {what}, so it is left as it is; choose another name, or "
                        "remove it")


def check_new(path: str | os.PathLike[str], name: str = "the file") -> Path:
    """The path of a file that :func:`write_new` may write; the same errors."""
    target = local_path(path)
    if target.exists() and not target.is_dir():
        raise UserError(f"{name} {target} exists already and is left as it is; choose another name, or remove it")
    check_writable(target)
    return target


def write_new(path: str | os.PathLike[str], text: str, name: str = "the file") -> Path:
    """Write a text file where none is yet, complete or not at all; returns its path.

    Args:
        path: the file; folders that are missing are made.
        text: what it holds, written in UTF-8.
        name: words for it in errors, such as the option that names it.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    target = check_new(path, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(text.encode())
    return target


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for binary writing that takes its name only once it is complete and on disk.

    An error inside the block leaves an older file of that name as it was.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; a result is as readable as any other new file.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder to fill, which replaces ``path`` only once it is complete.

    An error inside the block leaves an older folder of that name as it was. The names beside it are hidden ones: what
    a user keeps as ``NAME.old`` is his. Where ``path`` is a symbolic link, the folder is where it leads.
    """
    path = local_path(path)
    if path.is_symlink():
        path = path.resolve()
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def portable_path(source: str) -> str:
    """A source as a file that travels may name it: a hub id or a relative path as it is, an absolute path from the
    working folder, or, of one that is elsewhere, its last name behind ``path/to``; an empty text, of a source that is
    not known, stays one."""
    if not source:
        return source
    path = local_path(source)
    if not path.is_absolute():
        return source
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return f"path/to/{path.name}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/flowdistill/<name>``, by default ``~/.cache/flowdistill/<name>``; not created here."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (local_path(root) if root else Path.home() / ".cache") / "flowdistill" / name
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / f"flowdistill-{os.getuid()}" / name


def in_cache(path: Path) -> bool:
    """Whether a cached file is there and may be looked for."""
    try:
        return path.is_file()
    except OSError:  # a folder that this user may not enter
        return False


def write_cache(path: Path, content: bytes, what: str) -> None:
    """Keep ``content``, complete or not at all; where that is not possible, a warning says so.

    Args:
        what: words for it, in the plural.
    """
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        # Python's default filter shows a warning of one place and text once, so a training run is not flooded.
        warnings.warn(f"the {what} are not cached: {path.parent} cannot be written to ({error.strerror or error}); "
                      "XDG_CACHE_HOME moves it", stacklevel=2)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{what} could not be written: {reason}") from error


def check_pointer(path: str | os.PathLike[str]) -> None:
    """Refuse a file that git-lfs has left in the place of a large one.

    Raises:
        UserError: so, or a file that cannot be read.
    """
    try:
        with open(local_path(path), "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror}") from error
    if pointer:
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its repository")


def check_weight_file(path: Path) -> None:
    """Refuse a weight file that is a pointer of git-lfs, or a safetensors file that is damaged or ends too early.

    Raises:
        UserError: so.
    """
    check_pointer(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weight file {path} is damaged or truncated ({error}); copy it again") from error
