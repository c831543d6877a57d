"""Autoencoders of the families: the teacher's against the pipeline's own decoding, and very large images."""

import pytest
import torch

from flowdistill.teachers import codec as codec_module
from tests.families import FAMILIES, pipeline_latents
from tests.test_families import noise, teacher_of


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "qwen-image"])
def test_the_codec_is_the_pipelines_and_turns_round(name, monkeypatch):
    """Scaling, shift, mean and standard deviation: through the pipeline's own decoding, and back by encode()."""
    _, teacher = teacher_of(name)
    family, codec = FAMILIES[name], teacher.codec
    pipeline = family.make()
    n = noise(teacher)
    images = pipeline_latents(pipeline, family, n, 2, 1.0, output="pt")
    latents = pipeline_latents(pipeline, family, n, 2, 1.0)
    whole = teacher.decode(latents)
    assert (whole - images).abs().max() < 1e-5
    native = codec.vae.encode(2 * images[:, :, None] - 1 if codec.frames else 2 * images - 1)
    native = native.latent_dist.mean if hasattr(native, "latent_dist") else native.latent
    again = codec.encode(images)
    native = native[:, :, 0] if codec.frames else native
    assert torch.allclose(again * codec.std / codec.scale + codec.shift + codec.mean, native, atol=1e-5)
    monkeypatch.setattr(codec_module, "AT_ONCE", 1)  # image by image
    assert torch.allclose(teacher.decode(latents), whole, atol=1e-5)


def test_very_large_images_are_decoded_in_tiles(monkeypatch):
    _, teacher = teacher_of("sd")
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = teacher.decode(latents)
    monkeypatch.setattr(codec_module, "WHOLE", 16**2)
    tiled = teacher.decode(latents)
    assert teacher.codec.vae.use_tiling and tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().max() and (tiled - whole).abs().mean() < 0.1
