"""Features by name, by file and by module; reference statistics and their cache."""

import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowdistill.data import load_digits
from flowdistill.data.image_sets import FolderImages
from flowdistill.data.pictures import read_picture
from flowdistill.evaluation import Evaluator, Reference, frechet_distance, load_reference
from flowdistill.features import load_features
from flowdistill.features.extractor import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    INCEPTION_URL,
    FeatureExtractor,
    clean_resize,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images, to_uint8


class Pool(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 2)


class FakeInception(nn.Module):
    """The two things clean-fid uses of the weight file: ``layers``, and 2,048 numbers an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 3, stride=100), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def script(module: nn.Module, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))


def digits(count: int = 200) -> torch.Tensor:
    return to_uint8(load_digits()[0][:count])


def test_digits_features_see_digits():
    extractor = load_features("digits", device="cpu")
    images, labels = load_digits()
    images = to_uint8(images)
    assert extractor(images[:5]).shape == (5, 64) and extractor(images[:5]).dtype == torch.float32
    assert (extractor.classify(images) == labels).float().mean() > 0.98
    assert len(extractor.hash) == 64
    with pytest.raises(UserError, match="uint8"):
        extractor(images.float())
    with pytest.raises(UserError, match="1 channel"):
        extractor(images[:2].expand(-1, 3, -1, -1))


def test_a_module_is_features_and_is_left_as_it_was():
    module = Pool().train()
    extractor = load_features(module, device="cpu")
    features = extractor(torch.full((3, 2, 8, 8), 51, dtype=torch.uint8))
    assert features.shape == (3, 8) and torch.allclose(features, torch.tensor(0.2))
    assert not features.requires_grad and module.training
    assert extractor.classify(torch.zeros(1, 2, 8, 8, dtype=torch.uint8)) is None
    assert extractor.hash == load_features(Pool(), device="cpu").hash != load_features(Pool(1.1), device="cpu").hash
    assert load_features(lambda images: images, device="cpu").hash is None


def test_a_torchscript_file_is_features(tmp_path):
    script(Pool(2.0), tmp_path / "pool.pt")
    extractor = load_features(tmp_path / "pool.pt", device="cpu")
    assert torch.allclose(extractor(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)), torch.tensor(2.0))
    with pytest.raises(UserError, match="unknown features 'digitz'"):
        load_features("digitz")
    (tmp_path / "pool.pt").write_bytes(b"no model")
    with pytest.raises(UserError, match="pool.pt is not a TorchScript file"):
        load_features(tmp_path / "pool.pt")


def test_missing_inception_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWDISTILL_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as missing:
        load_features("inception")
    for part in (str(tmp_path / INCEPTION_FILE), INCEPTION_URL, INCEPTION_SHA256, "FLOWDISTILL_WEIGHTS"):
        assert part in str(missing.value)
    with pytest.raises(UserError, match=str(tmp_path / "elsewhere")):
        load_features("inception", weights=tmp_path / "elsewhere")


def test_truncated_inception_weights_are_named(tmp_path):
    path = tmp_path / INCEPTION_FILE
    script(FakeInception(), path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as truncated:
            load_features("inception", weights=path)
        assert f"{path} are truncated or damaged ({size} bytes" in str(truncated.value)
        assert INCEPTION_URL in str(truncated.value)


def test_inception_reads_resized_images_and_says_which_weights(tmp_path):
    path = tmp_path / INCEPTION_FILE
    module = FakeInception()
    script(module, path)
    extractor = load_features("inception", weights=tmp_path, device="cpu")
    assert extractor.name == "inception (not the published weights)" and "299x299" in extractor.resize
    grey = digits(2)
    expected = module.layers((clean_resize(grey.expand(-1, 3, -1, -1)) - 128) / 128)
    assert torch.allclose(extractor(grey), expected, atol=1e-5)
    # Images of different sizes, one by one.
    mixed = [grey[0], torch.zeros(3, 20, 30, dtype=torch.uint8)]
    assert torch.allclose(extractor(mixed)[:1], expected[:1], atol=1e-5)
    assert load_features(path, device="cpu").hash == extractor.hash


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (299, 299), (512, 400)])
def test_resizing_is_clean_fids(size):
    from cleanfid.resize import build_resizer

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = build_resizer("clean")(pixels)
    ours = clean_resize(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))[0].permute(1, 2, 0).numpy()
    # Of 255; float32 rounding is 1.5e-5.
    assert np.abs(ours - expected).max() < 1e-4


def test_reference_is_cached_and_follows_what_made_it(tmp_path):
    def files():
        return sorted(path.name for path in tmp_path.iterdir())

    first = load_reference("digits", load_features(Pool(), device="cpu"), tmp_path)
    assert first.count == 1797 and first.labelled is not None and len(files()) == 1
    features = load_features(Pool(), device="cpu")(digits(1797))
    assert torch.allclose(first.covariance, features.double().T.cov(), atol=1e-12)

    def forbidden(images):
        raise AssertionError("the cache was not used")

    again = load_features(Pool(), device="cpu")
    again.network = forbidden
    second = load_reference("digits", again, tmp_path)
    assert torch.equal(first.covariance, second.covariance) and torch.equal(first.labels, second.labels)
    assert first.source_hash == second.source_hash and second.name == "digits"
    # Other weights, other resizing: other statistics.
    scaled = load_reference("digits", load_features(Pool(2.0), device="cpu"), tmp_path)
    assert torch.allclose(scaled.covariance, 4 * first.covariance, atol=1e-10) and len(files()) == 2
    again.resize = "some other way"
    with pytest.raises(AssertionError, match="the cache was not used"):
        load_reference("digits", again, tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text", "other"])
def test_a_damaged_cache_file_is_rebuilt(tmp_path, damage):
    extractor = load_features(Pool(), device="cpu")
    good = load_reference("digits", extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "other":
        Reference("x", good.mean, good.covariance, 5, source_hash="a", feature_hash="b").save(path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"statistics")
    rebuilt = load_reference("digits", extractor, tmp_path)
    assert torch.equal(rebuilt.covariance, good.covariance)
    assert list(tmp_path.iterdir()) == [path] and np.load(path)["count"] == 1797


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    extractor = load_features(Pool(), device="cpu")
    with pytest.warns(UserWarning, match="not cached"):
        reference = load_reference("digits", extractor, tmp_path / "file" / "cache")
    assert reference.count == 1797


def test_npz_of_others_and_of_ours(tmp_path):
    extractor = load_features(Pool(), device="cpu")
    own = load_reference("digits", extractor, tmp_path / "cache")
    np.savez(tmp_path / "adm.npz", mu=own.mean.numpy().astype(np.float32), sigma=own.covariance.numpy())
    adm = load_reference(f"Pool:{tmp_path / 'adm.npz'}", extractor)
    assert adm.count is None and adm.labelled is None and adm.fid_floor() is None
    assert frechet_distance(adm.mean, adm.covariance, own.mean, own.covariance) == pytest.approx(0, abs=1e-9)
    own.save(tmp_path / "own.npz")
    loaded = load_reference(str(tmp_path / "own.npz"), extractor)
    assert loaded.fid_floor() == own.fid_floor() and loaded.feature_hash == extractor.hash
    with pytest.raises(UserError, match="made with other features"):
        load_reference(tmp_path / "own.npz", load_features(Pool(3.0), device="cpu"))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    evaluator = Evaluator(extractor, f"Pool:{tmp_path / 'wide.npz'}", num_images=4, progress=False)
    with pytest.raises(UserError, match="are 4 numbers an image, but the reference has 9"):
        evaluator.measure(lambda noise, labels: noise, (1, 8, 8))
    np.savez(tmp_path / "none.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="neither 'mean' and 'covariance' nor"):
        load_reference(tmp_path / "none.npz", extractor)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="bad.npz is damaged"):
        load_reference(tmp_path / "bad.npz", extractor)
    with pytest.raises(UserError, match="do not exist"):
        load_reference(tmp_path / "absent.npz", extractor)


def test_a_folder_is_a_reference(tmp_path):
    images = digits(40)
    folder = tmp_path / "images"
    for index, image in enumerate(images):
        path = folder / f"{index % 2}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    extractor = load_features("digits", device="cpu")
    reference = load_reference(folder, extractor, tmp_path / "cache", batch_size=7)
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    assert torch.allclose(reference.features, extractor(images[order]), atol=1e-4)
    assert reference.count == 40 and reference.labelled is None
    before = FolderImages(folder).hash()
    Image.new("L", (9, 9)).save(folder / "z.png")
    assert FolderImages(folder).hash() != before
    with pytest.raises(UserError, match="differ in size"):
        load_reference(folder, extractor, tmp_path / "cache")
    (folder / "z.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="z.png cannot be read as a picture"):
        load_reference(folder, extractor, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_reference(tmp_path / "empty", extractor)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_reference("digit", extractor)


def test_grey_and_colour_files(tmp_path):
    Image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / "colour.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "colour.png").tolist() == [[[v, v], [v, v]] for v in (10, 20, 30)]
    assert read_picture(tmp_path / "grey.png").shape == (1, 2, 2)
    assert read_picture(tmp_path / "grey.png", 3).shape == (3, 2, 2)
    assert read_picture(tmp_path / "colour.png", 1).shape == (1, 2, 2)


def test_floor_is_the_distance_of_halves():
    extractor = load_features("digits", device="cpu")
    images, labels = load_digits()
    features = extractor(to_uint8(images))
    reference = Reference("x", features.mean(0), features.T.cov(), 1797, features, labels)
    floors = reference.fid_floor()
    assert len(floors) == 3 and len(set(floors)) == 3 and floors == reference.fid_floor()
    whole = reference.mean.double(), reference.covariance.double()
    noise = extractor(
        torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    far = frechet_distance(noise.mean(0), noise.T.cov(), *whole)
    assert 0 < max(floors) < far / 20


class Slow(nn.Module):
    """Features that wait until all images of the next batch have been read."""

    def __init__(self, read: list[object], ahead: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.read, self.ahead, self.seen = read, ahead, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        end = time.monotonic() + 10
        while len(self.read) < min(self.seen + self.ahead, 20) and time.monotonic() < end:
            time.sleep(0.001)
        assert len(self.read) >= min(self.seen + self.ahead, 20), f"{self.seen} seen, {len(self.read)} read"
        return images.flatten(1)[:, :4]


def test_pictures_are_read_beside_the_network(tmp_path, monkeypatch):
    save_images(load_digits()[0][:20], tmp_path / "images")
    read: list[object] = []

    def counted(path, channels=None):
        picture = read_picture(path, channels)
        read.append(path)
        return picture

    monkeypatch.setattr("flowdistill.data.image_sets.read_picture", counted)
    load_reference(tmp_path / "images", load_features(Slow(read, 5), "cpu"), tmp_path / "cache", batch_size=5)
    assert len(read) == 20


@pytest.mark.parametrize("sizes", [(40,), (40, 30, 64)])
def test_figures_are_the_same_bits_for_any_number_of_workers(tmp_path, monkeypatch, sizes):
    """As they are of the same images from memory; the features resize."""
    generator = torch.Generator().manual_seed(0)
    for number in range(70):
        size = sizes[number % len(sizes)]
        image = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "images" / f"{number:03}.png")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=9), nn.SiLU(), nn.AdaptiveAvgPool2d(1)).requires_grad_(False)
    extractor = FeatureExtractor("small", "its hash", layers, clean_resize, "299x299", channels=3)
    found = []
    for workers in (1, 3):
        monkeypatch.setattr("flowdistill.data.image_sets.MOST_WORKERS", workers)
        found.append(load_reference(tmp_path / "images", extractor, tmp_path / f"cache {workers}", batch_size=50))
    one, three = found
    assert torch.equal(one.mean, three.mean) and torch.equal(one.covariance, three.covariance)
    images = [read_picture(path, 3) for path in sorted((tmp_path / "images").iterdir())]
    in_memory = torch.cat([extractor(images[start : start + 32]) for start in range(0, 70, 32)])
    assert torch.equal(one.features, in_memory)
