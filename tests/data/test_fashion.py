import gzip
from pathlib import Path

import pytest
import torch

from flowdistill.data import fashion, load_images
from flowdistill.utils.errors import UserError
from tests.data.fashion import FOLDER_VARIABLE, idx, write_fashion

TRAIN = "train-images-idx3-ubyte.gz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "fashion"))
    return write_fashion(tmp_path / "fashion")


def test_both_parts_are_read_in_unit_range_and_are_the_callers_to_change(folder):
    images, labels = load_images("fashion")
    assert images.shape == (40, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == list(range(10)) * 4
    stored = gzip.decompress((folder / TRAIN).read_bytes())[16:]
    assert (images * 255).round().to(torch.uint8).numpy().tobytes() == stored
    held_out, held_out_labels = load_images("fashion-test")
    assert held_out.shape == (20, 1, 28, 28) and held_out_labels.shape == (20,)
    images.zero_()
    labels.zero_()
    assert load_images("fashion")[0].max() > 0.7 and load_images("fashion")[1].max() == 9


def test_the_files_are_read_once_a_process_and_may_be_unpacked(folder, monkeypatch):
    (folder / TRAIN).with_suffix("").write_bytes(gzip.decompress((folder / TRAIN).read_bytes()))
    (folder / TRAIN).unlink()
    first = load_images("fashion")
    monkeypatch.setattr(fashion, "read_idx", lambda *_: pytest.fail("read again"))
    assert torch.equal(load_images("fashion")[0], first[0])


def test_without_the_files_the_error_says_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"{FOLDER_VARIABLE} names, has no {TRAIN}; get it with 'apt install "
                                        "dataset-fashion-mnist', or set .*zalandoresearch/fashion-mnist"):
        load_images("fashion")
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr(fashion, "PACKAGE_FOLDER", tmp_path / "package")
    with pytest.raises(UserError, match="package, where Debian's package puts it, has no t10k-images-idx3"):
        load_images("fashion-test")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, str]]:
    """Contents of the file of training images, packed, and what is said of each."""
    whole = (write_fashion(tmp_path_factory.mktemp("fashion")) / TRAIN).read_bytes()
    raw = gzip.decompress(whole)
    return {
        "cut short": (whole[:-100], "is damaged .*copy it again"),
        "a bit turned": (whole[:500] + bytes([whole[500] ^ 4]) + whole[501:], "is damaged .*copy it again"),
        "not packed": (raw, "is damaged .*copy it again"),
        "labels": (gzip.compress(idx(torch.zeros(40, dtype=torch.uint8))), r"not an IDX file of bytes in 3 dim"),
        "header only in part": (gzip.compress(raw[:9]), "not an IDX file of bytes in 3 dim"),
        "an image too few": (gzip.compress(raw[:-784]), "of 40x28x28 it should have 31,360 .*, not 30,576"),
        "no image": (gzip.compress(idx(torch.zeros(0, 28, 28, dtype=torch.uint8))), "of 0x28x28"),
        "other pictures": (gzip.compress(idx(torch.zeros(40, 32, 32, dtype=torch.uint8))), "of 32x32, not 28x28"),
        "more than labels": (gzip.compress(idx(torch.zeros(41, 28, 28, dtype=torch.uint8))), "41 pictures and .* 40 l"),
    }


def test_a_damaged_file_is_named(folder, damaged):
    for case, (content, words) in damaged.items():
        (folder / TRAIN).write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            load_images("fashion")
        assert TRAIN in str(error.value), case


def test_a_label_of_no_class_is_refused(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.full((40,), 10, dtype=torch.uint8))))
    with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz has the label 10; the classes are 0 to 9"):
        load_images("fashion")
