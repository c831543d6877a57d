"""Caches that cannot be written, entered or read: the work is done without them, and says so."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowdistill import load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation.reference import load_reference
from flowdistill.features import load_features
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.utils.files import cache_folder, in_cache, write_cache
from flowdistill.utils.images import save_images
from tests.families import stable_diffusion


def prompts(tmp_path: Path) -> torch.Tensor:
    return load_teacher(stable_diffusion()).encode(prompts=["a cat"]).tensors["prompt_embeds"]


def pairs(tmp_path: Path) -> torch.Tensor:
    return teacher_pairs(load_teacher(asset_path("digits-flow")), 3, 1).latents


def statistics(tmp_path: Path) -> torch.Tensor:
    if not (tmp_path / "images").is_dir():  # new ones would be another entry
        save_images(load_digits()[0][:4], tmp_path / "images")
    return load_reference(tmp_path / "images", load_features("digits", "cpu")).mean


CACHES = {"prompts": prompts, "pairs": pairs, "statistics": statistics}


def below_a_file(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def where_nobody_writes(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", "/proc/flowdistill")


def on_a_full_disk(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("flowdistill.utils.files.os.fsync", full)


def where_one_may_not_look(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    is_file = Path.is_file

    def forbidden(path: Path) -> bool:
        if str(tmp_path / "cache") in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    def make(path: Path, **settings: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    patch.setattr(Path, "is_file", forbidden)
    patch.setattr("flowdistill.utils.files.Path.mkdir", make)


PLACES = [below_a_file, where_nobody_writes, on_a_full_disk, where_one_may_not_look]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cache", CACHES)
def test_without_its_cache_the_work_is_done_all_the_same(
    tmp_path: Path, cache: str, place: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    make = CACHES[cache]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "good"))
        expected = make(tmp_path)
        assert list((tmp_path / "good").rglob("*.safetensors")) or list((tmp_path / "good").rglob("*.npz"))
    with pytest.MonkeyPatch.context() as patch:
        place(tmp_path, patch)
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"not cached: .* cannot be written to \(\w"):
                assert torch.equal(make(tmp_path), expected)
    assert not (tmp_path / "cache").exists() or not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, content: bytes
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = CACHES[cache](tmp_path)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    for file in files:
        file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(CACHES[cache](tmp_path), expected)
    assert files and all(file.stat().st_size > 20 for file in files)


def test_a_user_without_a_home_has_a_cache_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_cache(cache_folder("prompts") / "a", b"content", "prompts")
    assert in_cache(cache_folder("prompts") / "a")
    assert (cache_folder("prompts") / "a").is_relative_to(tmp_path)
