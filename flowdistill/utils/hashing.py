"""SHA-256 of files, folders, networks and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdistill.utils.files import is_clutter, local_path

BLOCK = 1 << 20



def file_sha256(path: str | os.PathLike[str]) -> str:
    """The hash of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def add_file(digest: hashlib._Hash, path: str | os.PathLike[str]) -> None:
    """Hash a file's content on top of what ``digest`` has seen."""
    with open(local_path(path), "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)


def add_folder(digest: hashlib._Hash, folder: Path, name: str) -> None:
    """Hash the files below ``folder``, with their paths there behind ``name``, on top of what ``digest`` has seen."""
    add_files(digest, files_below(folder), folder, name)


def add_files(digest: hashlib._Hash, files: Iterable[Path], folder: Path, name: str) -> None:
    """The same for some ``files`` below it."""
    for file in files:
        digest.update(f"{name}/{file.relative_to(folder).as_posix()}\0".encode())
        add_file(digest, file)


def checksums(folder: Path) -> dict[str, str]:
    """The hash of every file below ``folder``, by its path there."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files_below(folder)}


def files_below(folder: Path) -> list[Path]:
    """All files below ``folder``, in the order of their paths, but for what is hidden or left behind by a system."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(map(is_clutter, path.relative_to(folder).parts)))


def json_sha256(value: object) -> str:
    """The hash of a JSON value, hexadecimal; the order of a mapping's keys counts.

    Any sequence is the list of what is in it: long lists of prompts are kept in objects of their own.
    """
    return hashlib.sha256(json.dumps(value, default=_as_list).encode()).hexdigest()


def _as_list(value: object) -> list[object]:
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def module_sha256(module: nn.Module) -> str:
    """The hash of a module's class, and of the names, types, shapes and bytes of its weights and buffers."""
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    add_module(digest, module)
    return digest.hexdigest()


def add_module(digest: hashlib._Hash, module: nn.Module, prefix: str = "") -> None:
    """Hash a module's weights and buffers, their names behind ``prefix``, on top of what ``digest`` has seen."""
    add_tensors(digest, module.state_dict(), prefix)


def add_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """The same for tensors by their names."""
    for name, value in sorted(tensors.items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
