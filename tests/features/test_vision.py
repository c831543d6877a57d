"""Frozen networks that look at pictures: from where they come, what they give, and what is refused."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from flowdistill.features.vision import load_vision
from flowdistill.utils.errors import UserError
from tests.families import lively
from tests.tiny import POINTER

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def pictures(size=32, rows=2):
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def refused(name):
    with pytest.raises(UserError) as caught:
        load_vision(name, "method.identity")
    assert "method.identity" in str(caught.value)
    return str(caught.value)


def brightness():
    return nn.Flatten(2)


def mean_colour():
    return nn.AdaptiveAvgPool2d(1)


def pixels():
    return nn.Identity()


class Classifier(nn.Module):
    def features(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        return self.features(x).argmax(1)


def test_the_built_in_network_is_its_seed_and_frozen():
    one, same, other = (load_vision(name, "x") for name in ("small:3", "small:3", "small"))
    seen = one(pictures())
    assert seen.pooled.shape == (2, one.width) and seen.tokens.shape == (2, 16, 64)
    assert torch.equal(seen.pooled, same(pictures()).pooled)
    assert not torch.allclose(seen.pooled, other(pictures()).pooled)
    assert not any(p.requires_grad for p in one.parameters()) and not one.network.training
    images = pictures().requires_grad_()
    one(images).pooled.sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_function_of_ones_own():
    feature_network = load_vision("python:tests.features.test_vision:mean_colour", "x")
    torch.testing.assert_close(feature_network(pictures()).pooled, pictures().mean((2, 3)))
    torch.testing.assert_close(load_vision("python:tests.features.test_vision:Classifier", "x")(pictures()).pooled,
                               pictures().mean((2, 3)))
    tokens = load_vision("python:tests.features.test_vision:brightness", "x")(pictures())  # (B, 3, 1024): three tokens
    assert tokens.tokens.shape == (2, 3, 1024)


def test_a_folder_of_transformers_with_its_normalisation(tmp_path):
    model = lively(ViTModel(ViTConfig(image_size=16, patch_size=8, **TINY)))
    model.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    feature_network = load_vision(f"transformers:{tmp_path}", "x")
    images = pictures(16)
    prepared = (images - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    with torch.no_grad():
        output = model(prepared)
    seen = feature_network(images)
    torch.testing.assert_close(seen.pooled, output.pooler_output)
    torch.testing.assert_close(seen.tokens, output.last_hidden_state)
    assert feature_network(pictures(48)).tokens.shape == seen.tokens.shape  # resized to what it reads


def test_the_visual_side_of_a_two_sided_model(tmp_path):
    config = CLIPConfig(text_config={**TINY, "vocab_size": 20}, vision_config={**TINY, "image_size": 16,
                                                                              "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    assert load_vision(f"transformers:{tmp_path}", "x").width == 16


@pytest.mark.parametrize("registers", [0, 3])
def test_the_places_of_a_transformer_leave_its_leading_tokens_out(tmp_path, registers):
    """Class and register tokens come first; one token a patch is left."""
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
            image_size=24, patch_size=8, num_register_tokens=registers, **TINY))
    else:
        model = ViTModel(ViTConfig(image_size=24, patch_size=8, **TINY))
    lively(model).save_pretrained(tmp_path)
    network = load_vision(f"transformers:{tmp_path}", "x")
    images = pictures(24)
    seen = network(images)
    places, grid = seen.places()
    assert grid == (3, 3) and network.num_places == 9 and seen.tokens.shape[1] == 10 + registers
    assert torch.equal(places, seen.tokens[:, 1 + registers :])


def test_the_places_of_a_map_are_its_grid():
    small = load_vision("small", "x")
    places, grid = small(pictures()[:, :, :, :16]).places()  # 32 x 16 pixels
    assert grid == (4, 2) and places.shape == (2, 8, 64) and small.num_places == 16
    colours = load_vision("python:tests.features.test_vision:pixels", "x")
    places, grid = colours(pictures()[:, :, :, :16]).places()
    assert grid == (32, 16) and torch.equal(places, pictures()[:, :, :, :16].flatten(2).transpose(1, 2))
    whole = load_vision("python:tests.features.test_vision:Classifier", "x")
    assert whole.num_places == 1 and whole(pictures()).places()[1] == (1, 1)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    assert f"hf download facebook/dinov2-small --local-dir {tmp_path}/dino" in refused(f"transformers:{tmp_path}/dino")
    (tmp_path / "config.json").write_text("{}")
    assert "could not be loaded as a transformers model" in refused(f"transformers:{tmp_path}")
    assert "small, small:SEED, timm:NAME=FILE" in refused("dino")
    assert "cannot be imported" in refused("python:no.such.module:function")
    assert "not a torch module" in refused("python:os:getcwd")
    if importlib.util.find_spec("timm") is None:
        assert "pip install timm" in refused("timm:vit_small_patch16_224.dino=/x")


def test_weights_that_are_missing_are_named_and_not_made_up(tmp_path):
    model = lively(ViTModel(ViTConfig(image_size=16, patch_size=8, **TINY)))
    model.save_pretrained(tmp_path)
    file, images = tmp_path / "model.safetensors", pictures(16)
    weights = load_file(file)
    # Of a checkpoint for another task, which has no pooler, the tokens' mean is what it sees.
    save_file({name: value for name, value in weights.items() if "pooler" not in name}, file, {"format": "pt"})
    seen = load_vision(f"transformers:{tmp_path}", "x")(images)
    torch.testing.assert_close(seen.pooled, seen.tokens.mean(1))
    gone = [name for name in weights if name.endswith("attention.q_proj.weight") or "query.weight" in name]
    save_file({name: value for name, value in weights.items() if name not in gone}, file, {"format": "pt"})
    assert len(gone) == 2 and "incomplete; missing are layers.0.attention." in refused(f"transformers:{tmp_path}")
    file.write_text(POINTER)
    with pytest.raises(UserError, match="git lfs pull"):
        load_vision(f"transformers:{tmp_path}", "x")


def test_timm_models_come_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    assert "which timm" in refused(f"timm:no_such_model={tmp_path}/w.safetensors")
    name = "resnet18.a1_in1k"
    message = refused(f"timm:{name}={tmp_path}/w.safetensors")
    assert f"{tmp_path}/w.safetensors, which are not there" in message and f"hf download timm/{name}" in message
    model = timm.create_model(name, pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    feature_network = load_vision(f"timm:{name}={tmp_path}/w.pth", "x")
    images = pictures(feature_network.size)
    with torch.no_grad():
        normal = (images - feature_network.mean) / feature_network.std
        wanted = model.forward_head(model.forward_features(normal), pre_logits=True)
    torch.testing.assert_close(feature_network(images).pooled, wanted)
    (tmp_path / "w.pth").write_bytes(b"damaged")
    assert "do not fit the timm model" in refused(f"timm:{name}={tmp_path}/w.pth")
