"""Images as PNG files, and the files that are complete or absent."""

from __future__ import annotations

import errno
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from flowdistill import UserError
from flowdistill.utils.files import atomic_folder, check_new, check_place, check_writable
from flowdistill.utils.images import save_grid, save_images, to_uint8


def test_grid_enlarges_small_images_by_whole_factors(tmp_path: Path) -> None:
    images = torch.zeros(3, 1, 5, 7)
    images[1, 0, 2, 3] = 1.0
    save_grid(images, tmp_path / "grid.png", columns=2)
    grid = pil_to_tensor(Image.open(tmp_path / "grid.png"))[0]
    # ceil(32 / 5) = 7: cells of 35 x 49, two rows of two with gaps of 2.
    assert grid.shape == (2 * 37 + 2, 2 * 51 + 2)
    cell = grid[2:37, 53:102]
    assert cell.sum() == 255 * 7 * 7
    assert (cell[14:21, 21:28] == 255).all()


def test_grid_keeps_large_images_and_clips(tmp_path: Path) -> None:
    images = torch.full((1, 3, 40, 40), 2.0)
    images[0, 0] = -1.0
    images[0, 1] = 0.5
    save_grid(images, tmp_path / "new" / "grid.png")
    grid = pil_to_tensor(Image.open(tmp_path / "new" / "grid.png"))
    assert [int(channel.unique()) for channel in grid] == [0, 128, 255]
    assert grid.shape == (3, 40, 40)


def test_grid_and_images_refuse_other_shapes(tmp_path: Path) -> None:
    for images in (torch.zeros(1, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(1, 0, 8, 8)):
        with pytest.raises(ValueError, match="must have the shape"):
            save_grid(images, tmp_path / "grid.png")
        with pytest.raises(ValueError, match="must have the shape"):
            save_images(images, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_is_shown_and_stored(tmp_path: Path, channels: int) -> None:
    images = torch.linspace(0, 1, 2 * channels * 32 * 40).reshape(2, channels, 32, 40)
    save_grid(images, tmp_path / "grid.png", columns=1)
    shown = pil_to_tensor(Image.open(tmp_path / "grid.png"))[:, 2:34, 2:-2].float() / 255
    parts = shown.split(40, dim=2)
    assert len(parts) == {1: 1, 2: 2, 3: 1, 4: 2, 5: 5}[channels]
    # Colour, then what is no colour in grey: nothing is lost, and nothing is taken for transparency.
    found = torch.cat([part if part[0].ne(part[1]).any() else part[:1] for part in parts])
    torch.testing.assert_close(found, images[0], atol=0.51 / 255, rtol=0)

    path = save_images(images, tmp_path)[1]
    stored = pil_to_tensor(Image.open(path)).float() / 255
    assert Image.open(path).mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA", 5: "L"}[channels]
    torch.testing.assert_close(stored.reshape(images[1].shape), images[1], atol=0.51 / 255, rtol=0)


def test_images_are_numbered_from_start(tmp_path: Path) -> None:
    paths = save_images(torch.rand(2, 3, 4, 6), tmp_path / "folder", start=41)
    assert [path.name for path in paths] == ["000041.png", "000042.png"]
    assert pil_to_tensor(Image.open(paths[0])).shape == (3, 4, 6)


@pytest.mark.parametrize("closing", ["broken", "whole"])
def test_a_grid_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closing: str) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    if closing == "broken":
        def fail(*names: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            save_grid(torch.rand(1, 1, 8, 8), path)
        assert path.read_bytes() == b"old"
    else:
        save_grid(torch.rand(1, 1, 8, 8), path)
        assert pil_to_tensor(Image.open(path)).shape == (3, 32, 32)
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_a_place_that_takes_no_bytes_is_no_place_for_a_result(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: a file can be made, but holds nothing."""
    resource = pytest.importorskip("resource")
    target = tmp_path / "new" / "report.json"
    check_writable(target)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=f"{target} cannot be written; {tmp_path}: File too large"):
            check_writable(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    """Said of the place that is wrong, and by whatever writes there; links that lead somewhere are followed."""
    link, file, disk = tmp_path / "link", tmp_path / "file", tmp_path / "disk"
    link.symlink_to(disk)
    file.touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for wrong, why in ((link, f"a symbolic link that leads nowhere, to {disk}; make what it names"),
                       (loop, "a symbolic link that leads nowhere"), (file, "a file, and no folder; choose")):
        for place in (wrong / "new", wrong / "new" / "er", *([] if wrong is file else [wrong])):
            for check in (check_place, check_writable, check_new):
                with pytest.raises(UserError, match=f"{place} cannot be written: {wrong} is {why}"):
                    check(place)
    with pytest.raises(UserError, match=f"--out {link} cannot be written: {link} is "):
        check_place(link, f"--out {link}")
    assert {entry.name for entry in tmp_path.iterdir()} == {"link", "file", "loop"}
    disk.mkdir()
    check_place(link)
    for text in ("1", "2", "3"):
        with atomic_folder(link) as folder:
            (folder / "new").write_text(text)
        assert link.is_symlink() and (disk / "new").read_text() == text
    assert {entry.name for entry in tmp_path.iterdir()} == {"link", "file", "loop", "disk"}


def test_images_that_are_not_finite_are_said_to_be_so(tmp_path: Path) -> None:
    """Wherever they become a picture; black takes their place, and none of the others changes."""
    images = torch.full((4, 1, 32, 32), 0.5)
    images[1, 0, 0, 0], images[2] = math.nan, math.inf
    for write in (lambda: save_grid(images, tmp_path / "grid.png"), lambda: save_images(images, tmp_path / "all"),
                  lambda: to_uint8(images)):
        with pytest.warns(UserWarning, match="2 of 4 images have values that are not finite"):
            write()
    stored = [pil_to_tensor(Image.open(tmp_path / "all" / f"00000{i}.png"))[0] for i in range(4)]
    assert [int(picture[0, 0]) for picture in stored] == [128, 0, 0, 128]
    assert int(stored[1][0, 1]) == 128 and int(stored[2].max()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_grid(images[:1], tmp_path / "grid.png")
