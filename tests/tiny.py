"""Tiny pipelines of real diffusers classes, made in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import nn

from tests.copies import copied

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def built_once(seed: int | None = None) -> Callable[[Callable[P, M]], Callable[P, M]]:
    """For what makes a network of plain settings: it is built once a process for each, and every call gets a copy.

    Args:
        seed: of torch's generator, which is then as after the building; None: the building leaves it as it is.
    """
    def decorated(make: Callable[P, M]) -> Callable[P, M]:
        built: dict[str, tuple[M, torch.Tensor]] = {}

        @functools.wraps(make)
        def copy(*args: P.args, **settings: P.kwargs) -> M:
            key = repr((args, sorted(settings.items())))
            if key not in built:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed or 0)
                    built[key] = make(*args, **settings), torch.get_rng_state()
            network, state = built[key]
            if seed is not None:
                torch.set_rng_state(state)
            return copied(network)

        return copy

    return decorated


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[None]:
    """Other weights in a safetensors file, or a line more in one of text, for a while."""
    kept = file.read_bytes()
    if file.suffix == ".safetensors":
        save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    else:
        file.write_bytes(kept + b"\nanother")
    try:
        yield
    finally:
        file.write_bytes(kept)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero-initialised layer hides a condition."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5, generator=generator)
            elif not name.endswith("weight"):
                parameter.normal_(std=0.1, generator=generator)
    return module.eval()


@built_once()
def network(kind: type[M], seed: int = 0, **settings: Any) -> M:
    """One of diffusers' networks with random weights."""
    return lively(kind(**settings), seed)


@built_once()
def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    return lively(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    ))


@built_once(seed=0)
def tiny_unet(
    num_class_embeds: int | None = 4, channels: int = 1, out_channels: int | None = None, sample_size: Any = 8,
    **settings: Any,
) -> UNet2DModel:
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D",) * 2,
              "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(
        sample_size=sample_size, in_channels=channels, out_channels=out_channels or channels, layers_per_block=1,
        norm_num_groups=4, num_class_embeds=num_class_embeds, attention_head_dim=8, **blocks | settings,
    ).eval()


def tiny_unet_pipeline(scheduler=None, **unet) -> DDPMPipeline:
    return DDPMPipeline(tiny_unet(**unet), scheduler or FlowMatchEulerDiscreteScheduler())


@built_once(seed=0)
def tiny_dit(learned_sigma: bool, layers: int, **settings: Any) -> nn.ModuleDict:
    """The networks of a DiT's pipeline."""
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8} | settings
    transformer = DiTTransformer2DModel(
        in_channels=4, out_channels=8 if learned_sigma else 4, num_layers=layers, patch_size=2, num_embeds_ada_norm=4,
        **size,
    ).eval()
    for block in transformer.transformer_blocks:  # zero-initialised modulation would hide the conditions
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    ).eval()
    return nn.ModuleDict({"transformer": transformer, "vae": vae})


def tiny_dit_pipeline(scheduler=None, learned_sigma: bool = True, layers: int = 2, **settings: Any) -> DiTPipeline:
    networks = tiny_dit(learned_sigma, layers, **settings)
    return DiTPipeline(networks["transformer"], networks["vae"], scheduler or DDIMScheduler(clip_sample=False),
                       id2label={0: "zero"})
