"""Reference statistics from files: ours, those of other programs, and folders that cannot be a reference."""

import numpy as np
import pytest
import torch

from flowdistill.data import load_digits
from flowdistill.evaluation import Evaluator, frechet_distance, load_reference
from flowdistill.features import FeatureExtractor, load_features
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images


def extractor(name: str = "digits", mode: str = "") -> FeatureExtractor:
    """The mean of each quarter of an image, under a name."""
    pool = torch.nn.AdaptiveAvgPool2d(2)
    return FeatureExtractor(name, "0" * 64, pool, lambda images: images.float() / 255, mode=mode)


INCEPTION = {"name": "inception", "mode": "clean"}


@pytest.fixture
def file(tmp_path):
    """Statistics as pytorch-fid, torch-fidelity, EDM and clean-fid keep them."""
    path = tmp_path / "cifar10.npz"
    np.savez(path, mu=np.full(4, 0.5), sigma=np.eye(4), arr_0=np.zeros((2, 4, 3)))
    return path


@pytest.mark.parametrize(("features", "prefix", "message"), [
    (INCEPTION, "", "does not say which features made them; pytorch-fid, torch-fidelity, ADM, EDM and clean-fid's"),
    (INCEPTION, "", "or name the file clean:"),
    (INCEPTION, "", "give the reference's images themselves, in a folder"),
    (INCEPTION, "inception:", "or name the file clean:"),
    (INCEPTION, "legacy_tensorflow:", "made with 'legacy_tensorflow', and the features 'inception' are 'clean'"),
    (INCEPTION, "legacy_pytorch:", "cannot be compared; give the reference's images"),
    (INCEPTION, "adm:", "'adm' is no mode of features .* known are clean, inception, legacy_pytorch"),
    ({}, "", "does not say which features made them: give .* or name the file digits:"),
    ({}, "clean:", "made with 'clean', and the features 'digits' are 'digits'"),
])
def test_statistics_of_others_need_their_features_named(file, features, prefix, message):
    with pytest.raises(UserError, match=message) as refused:
        load_reference(f"{prefix}{file}", extractor(**features))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("features", "mode"), [(INCEPTION, "clean"), ({}, "digits"), ({"name": "pool.pt"}, "pool.pt")])
def test_statistics_of_the_named_features_are_read(file, features, mode):
    reference = load_reference(f"{mode}:{file}", extractor(**features))
    assert frechet_distance(reference.mean, reference.covariance, torch.full((4,), 0.5), torch.eye(4)) < 1e-9
    assert reference.name == f"cifar10.npz ({mode!r} features, as it was named)" and reference.features is None


def test_the_features_of_clean_fid_are_of_its_mode_clean(tmp_path, monkeypatch):
    monkeypatch.setattr("flowdistill.features.extractor.inception_file", lambda weights: tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"weights")
    monkeypatch.setattr("cleanfid.inception_torchscript.InceptionV3W", lambda *_, **__: torch.nn.Identity())
    assert load_features("inception", device="cpu").mode == "clean"
    assert load_features("digits", device="cpu").mode == "digits"


def test_our_own_statistics_need_no_name_and_any_ending_will_do(tmp_path):
    made = load_reference("digits", extractor(), tmp_path / "cache")
    for name in ("own.npz", "OWN.NPZ", "statistics", "a:b.npz", "digits"):
        made.save(tmp_path / "files" / name)
        again = load_reference(tmp_path / "files" / name, extractor())
        assert torch.equal(again.covariance, made.covariance) and again.name == "digits"
    assert torch.equal(load_reference(f"digits:{tmp_path / 'files' / 'own.npz'}", extractor()).mean, made.mean)
    with pytest.raises(UserError, match="made with other features"):
        other = extractor()
        other.hash = "1" * 64
        load_reference(tmp_path / "files" / "OWN.NPZ", other)
    with pytest.raises(UserError, match="ABSENT.NPZ do not exist"):
        load_reference(tmp_path / "ABSENT.NPZ", extractor())


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    def refused(name, **arrays):
        if arrays:
            np.savez(tmp_path / name, **arrays)
        with pytest.raises(UserError) as error:
            load_reference(tmp_path / name, extractor())
        return str(error.value)

    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "array.npy is damaged or no .npz file" in refused("array.npy")
    torch.save({"mu": torch.zeros(3)}, tmp_path / "fidelity.pt")
    assert "fidelity.pt holds neither 'mean' and 'covariance' nor 'mu' and 'sigma'" in refused("fidelity.pt")
    (tmp_path / "text.npz").write_text("mu, sigma")
    assert "text.npz is damaged or no .npz file" in refused("text.npz")
    assert "but arr_0" in refused("samples.npz", arr_0=np.zeros((2, 4, 4, 3)))
    wrong = {"mean": np.zeros(2), "covariance": np.eye(2)}
    assert "not finite" in refused("nan.npz", **{**wrong, "mean": np.array([0, np.nan])})
    assert "does not hold statistics" in refused("count.npz", **wrong, count=np.zeros(2))
    assert "does not hold statistics" in refused("names.npz", mean=np.array(["a"]), covariance=np.array([["b"]]))
    wrong["covariance"] = np.eye(3)
    assert "a mean of shape (2,) and a covariance of shape (3, 3)" in refused("shape.npz", **wrong)


def test_a_folder_of_one_image_is_named(tmp_path):
    save_images(load_digits()[0][:1], tmp_path / "lonely")
    with pytest.raises(UserError, match=f"the reference {tmp_path / 'lonely'} holds one image only"):
        load_reference(tmp_path / "lonely", extractor(), tmp_path / "cache")


def test_the_protocol_counts_what_was_left_out(tmp_path):
    folder = tmp_path / "images"
    save_images(load_digits()[0][:9], folder / "a")
    save_images(load_digits()[0][:3], folder / ".ipynb_checkpoints")
    (folder / "photo.heic").write_bytes(b"")
    for name in ("._000000.png", ".DS_Store"):
        (folder / "a" / name).write_bytes(b"\0\x05\x16\x07")
    said = "1 x .heic, 1 x folder .ipynb_checkpoints, 1 x hidden file"
    for _ in range(2):  # made, then from the cache
        protocol = Evaluator(extractor(), folder, 9, cache_dir=tmp_path / "cache", progress=False).protocol()
        assert (protocol["reference_images"], protocol["reference_left_out"]) == (9, said)
    (folder / "photo.heic").unlink()
    reference = load_reference(folder, extractor(), tmp_path / "cache")
    assert reference.left_out == "1 x folder .ipynb_checkpoints, 1 x hidden file"
    reference.save(tmp_path / "own.npz")
    assert load_reference(tmp_path / "own.npz", extractor()).left_out == reference.left_out
    assert Evaluator(extractor(), "digits", 9, progress=False).protocol()["reference_left_out"] is None


def test_statistics_that_an_older_version_cached_are_made_again(tmp_path, monkeypatch):
    """Of the same files it may have read clipped, hidden or unturned pixels."""
    save_images(load_digits()[0][:9], tmp_path / "images")
    old = extractor()
    old.network = lambda images: torch.zeros(len(images), 4)
    with monkeypatch.context() as older:
        older.setattr("flowdistill.evaluation.reference.VERSION", 1)
        assert load_reference(tmp_path / "images", old, tmp_path / "cache").mean.sum() == 0
    assert load_reference(tmp_path / "images", extractor(), tmp_path / "cache").mean.sum() > 0
