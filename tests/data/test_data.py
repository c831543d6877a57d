import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from flowdistill.data import assets, balanced_split, load_images, split_halves
from flowdistill.data.assets import asset_path
from flowdistill.features.digits_classifier import (
    DigitsClassifier,
    augment,
    classifier_accuracy,
    load_digits_classifier,
    train_digits_classifier,
)
from flowdistill.utils.errors import UserError


def test_digits_are_the_whole_set_in_unit_range():
    images, labels = load_images("digits")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0.0 and images.max() == 1.0
    assert torch.equal((images * 16).round(), images * 16)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # A zero is hollow and a one is not: the centre tells them apart, so images are ink on zero, with their labels.
    assert images[labels == 0][:, 0, 3:5, 3:5].mean() < 0.15 < 0.6 < images[labels == 1][:, 0, 3:5, 3:5].mean()


def test_image_sets_are_the_callers_to_change():
    images, _ = load_images("digits")
    images.zero_()
    assert load_images("digits")[0].max() == 1.0


def test_unknown_image_set_names_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'digits'.*digits, emoji, emoji64, fashion, fashion-"):
        load_images("digit")


def test_halves_are_disjoint_balanced_and_seeded():
    _, labels = load_images("digits")
    first, second = split_halves(labels, seed=0)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(1797))
    assert abs(len(first) - len(second)) == 1
    assert (labels[first].bincount() - labels[second].bincount()).abs().max() <= 1
    again, _ = split_halves(labels, seed=0)
    other, _ = split_halves(labels, seed=1)
    assert torch.equal(first, again)
    # Random within a class: two seeds share about half of a half.
    shared = torch.isin(first, other).float().mean()
    assert 0.4 < shared < 0.6


def test_balanced_split_takes_its_fraction_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    first, second = balanced_split(labels, 0.2, seed=3)
    assert labels[first].bincount().tolist() == [10, 6, 1]
    assert labels[second].bincount().tolist() == [40, 24, 4]
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            balanced_split(labels, fraction, seed=3)


def test_shipped_classifier_knows_the_digits_and_its_record_says_how_well():
    images, labels = load_images("digits")
    model = load_digits_classifier()
    assert classifier_accuracy(model, images, labels) > 0.99
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    record = json.loads((asset_path("digits-classifier") / "config.json").read_text())
    assert record["held_out_accuracy"] >= 0.98
    assert record["command"].startswith("python scripts/train_digits_classifier.py") and record["seed"] == 0


def test_features_have_full_rank_and_feed_the_head():
    images, labels = load_images("digits")
    model = load_digits_classifier()
    features = model.features(images)
    assert features.shape == (1797, 64) and features.dtype == torch.float32
    assert torch.equal(model.head(features), model(images))
    assert torch.linalg.matrix_rank(torch.cov(features.T.double())) == 64
    # A feature belongs to its image, whatever else is in the batch.
    assert torch.allclose(model.features(images[5:6]), features[5:6], atol=1e-5)
    with pytest.raises(UserError, match=r"\(B, 1, 8, 8\), not \(2, 3, 8, 8\)"):
        model.features(torch.zeros(2, 3, 8, 8))


def test_augmentation_moves_images_by_at_most_a_pixel_or_so():
    image = torch.zeros(64, 1, 8, 8)
    image[:, :, 3:5, 3:5] = 1.0
    moved = augment(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape and not torch.equal(moved, image)
    position = torch.arange(8.0)
    centre = (moved.sum((1, 2)) * position).sum(1) / moved.sum((1, 2, 3))
    assert (centre - 3.5).abs().max() < 1.3 and centre.std() > 0.3


def test_training_learns_and_repeats_itself():
    images, labels = load_images("digits")
    one = train_digits_classifier(images, labels, steps=60, batch_size=64, seed=0)
    two = train_digits_classifier(images, labels, steps=60, batch_size=64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert classifier_accuracy(one, images, labels) > 0.8


def test_damaged_classifier_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        load_digits_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": {"width": 4}}))
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load_digits_classifier(tmp_path)
    save_file(DigitsClassifier(width=4).state_dict(), tmp_path / "model.safetensors")
    assert load_digits_classifier(tmp_path).config["width"] == 4
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_digits_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": {"width": 8}}))
    with pytest.raises(UserError, match="does not fit"):
        load_digits_classifier(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe"):
        load_digits_classifier(tmp_path)


def test_missing_assets_come_with_the_command_that_makes_them(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="digits-classifier, digits-ddpm, digits-flow, fashion-classifier, fashion-d"):
        asset_path("digits")
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="lacks .*model_index.json; make it with.*train_digits_teacher.py --path ddpm"):
        asset_path("digits-ddpm")


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_shipped_teachers_are_stock_pipelines_that_denoise(path):
    folder = asset_path(f"digits-{path}")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    record = json.loads((folder / "flowdistill.json").read_text())
    assert record["null_label"] == 10 and record["num_classes"] == 10
    assert pipeline.unet.config.num_class_embeds == 11
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4e6
    assert sum(tensor.numel() for tensor in load_file(weights).values()) == record["parameters"]

    # Noised real digits, at the same signal-to-noise ratio for both: the network finds the clean image better than the
    # mean of its class would, and better with the right label than with none, and with none than with a wrong one.
    images, labels = load_images("digits")
    data, labels = 2.0 * images[:200] - 1.0, labels[:200]
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    if path == "flow":
        alpha, sigma, time = 0.6, 0.4, 400.0
    else:
        time = int((pipeline.scheduler.alphas_cumprod - 0.6**2 / (0.6**2 + 0.4**2)).abs().argmin())
        alpha = pipeline.scheduler.alphas_cumprod[time].sqrt()
        sigma = (1.0 - alpha**2).sqrt()
    noisy = alpha * data + sigma * noise

    def error(labels):
        with torch.no_grad():
            output = pipeline.unet(noisy, time, class_labels=labels).sample
        clean = noisy - sigma * output if path == "flow" else (noisy - sigma * output) / alpha
        return (clean - data).square().mean().item()

    means = torch.stack([data[labels == label].mean(0) for label in range(10)])
    right, none, wrong = error(labels), error(torch.full_like(labels, 10)), error((labels + 1) % 10)
    assert right < 0.6 * (means[labels] - data).square().mean().item()
    assert right < none < wrong
