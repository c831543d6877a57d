"""Autoencoders of the families: the teacher's against the pipeline's own decoding, and very large images."""

import math

import pytest
import torch

from flowdistill.teachers import codec as codec_module
from flowdistill.teachers import load_teacher
from flowdistill.teachers.codec import PixelCodec
from tests.families import FAMILIES, pipeline_latents
from tests.teachers.test_families import noise, teacher_of


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


def overflowing(pipeline):
    """Scales of SDXL's kind: a decoder and an encoder with activations beyond float16's 65,504, and outputs within it.

    What makes them large and small again cancels, so that float32 gives what the weights gave before.
    """
    with torch.no_grad():
        for half in (pipeline.vae.decoder, pipeline.vae.encoder):
            half.conv_in.weight.mul_(2.0**16)  # the norms of the blocks bring it back
            half.conv_in.bias.mul_(2.0**16)
    return pipeline


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_in_half_precision(upcast):
    """SDXL's: ``force_upcast`` makes it float32, as the stock pipeline does, for encoding as well, and only here."""
    pipelines = {dtype: overflowing(FAMILIES["sdxl"].make()).to(dtype) for dtype in (torch.float32, torch.float16)}
    pipelines[torch.float16].vae.register_to_config(force_upcast=upcast)
    full, half = (load_teacher(pipeline, dtype=dtype) for dtype, pipeline in pipelines.items())
    latents = 0.5 * torch.randn(2, *half.shape, generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert half.network.dtype == pipelines[torch.float16].vae.dtype == torch.float16  # the pipeline's stays as it was
    if not upcast:  # what the option is for: and the picture does not hide it
        assert not half.decode(latents).isfinite().all() and not half.codec.encode(images).isfinite().all()
        return
    decoded, encoded = half.decode(latents), half.codec.encode(images)
    # The weights were rounded to half precision when they were loaded; nothing else is.
    assert (decoded - full.decode(latents)).abs().max() < 5e-3
    assert (encoded - full.codec.encode(images)).abs().max() < 5e-3 * full.codec.encode(images).abs().max()
    pipeline = pipelines[torch.float16]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.upcast_vae()
    stock = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    assert (decoded - (stock / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_pictures_of_infinite_latents_are_not_white():
    """Limits hide what is infinite; NaN takes its place, which every way to a picture warns of."""
    latents = torch.tensor([[[[0.0, math.inf, -math.inf, math.nan, 3.0]]]])
    decoded = PixelCodec().decode(latents).flatten()
    assert decoded[[0, 4]].tolist() == [0.5, 1.0] and decoded[1:4].isnan().all()
