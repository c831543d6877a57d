#!/usr/bin/env python
"""Convert a SiT checkpoint (also one trained with REPA) into a diffusers pipeline folder that flowdistill reads.

    python scripts/convert_sit.py SiT-XL-2-256.pt --vae stabilityai/sd-vae-ft-ema --out sit-xl-2
    python scripts/convert_sit.py last.pt --vae vae/ --time noise --out sit-xl-2-repa

The network becomes a stock ``DiTTransformer2DModel`` beside a flow-matching scheduler:

- SiT's time runs from noise (0) to data (1) and its velocity is data - noise (``--time data``). REPA's runs from data
  to noise, as diffusers' does (``--time noise``). Cosine and sine of 1 - t are combinations of those of t, so the time
  is turned round in the first layer of the time embedding, and the velocity in the last layer of the network.
- SiT's sinusoids have the frequencies 10000^(-i/128), those of diffusers' DiT 10000^(-i/127). For times in [0, 1] the
  former are interpolated from the latter (8 points, an error of 1e-9), again in the first layer of the time embedding.
- The channels of a learned variance, which SiT drops, are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of SiT-S, B, L and XL
FREQUENCIES = 128
POINTS = 8


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="state dict (.pt or .safetensors), or a training checkpoint that holds one")
    parser.add_argument("--vae", required=True, help="folder or hub id of the KL autoencoder")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--time", choices=("data", "noise"), default="data", help="what is at t = 1 (SiT: data)")
    parser.add_argument("--weights", default="ema", help="key in a training checkpoint (default: ema)")
    parser.add_argument("--heads", type=int, help="attention heads (default: those of SiT of this width)")
    options = parser.parse_args(arguments)
    from flowdistill.utils.errors import UserError

    try:
        convert(options)
    except UserError as error:
        print(f"convert_sit.py: error: {error}", file=sys.stderr)
        return 2
    print(f'{options.out}: a pipeline folder; see it with "flowdistill inspect {options.out}"')
    return 0


def convert(options: argparse.Namespace) -> None:
    """Write the folder; UserError for a checkpoint or an autoencoder that cannot be used."""
    from diffusers import AutoencoderKL, DiTPipeline, FlowMatchEulerDiscreteScheduler

    from flowdistill.utils.errors import UserError

    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give a new folder")
    transformer = converted(load(Path(options.checkpoint), options.weights), options.time, options.heads)
    try:
        vae = AutoencoderKL.from_pretrained(options.vae)
    except (OSError, ValueError) as error:
        raise UserError(f"--vae {options.vae} could not be loaded: {' '.join(str(error).split())[:200]}") from error
    # One training timestep: the network's time is t itself.
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    DiTPipeline(transformer, vae, scheduler, id2label=None).save_pretrained(out)


def load(file: Path, key: str) -> dict[str, Tensor]:
    """The state dict in ``file``."""
    import torch
    from safetensors.torch import load_file

    from flowdistill.utils.errors import UserError

    if not file.is_file():
        raise UserError(f"the checkpoint {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints hold their arguments
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many unrelated types
        raise UserError(f"{file} is no readable checkpoint: {' '.join(str(error).split())[:200]}") from error
    state = state.get(key, state) if isinstance(state, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "x_embedder.proj.weight" not in state:
        raise UserError(f"{file} holds no SiT (no x_embedder.proj.weight, also not below '{key}'); its keys begin "
                        f"with {', '.join(sorted(map(str, state))[:5])}")
    return state


def converted(state: dict[str, Tensor], time: str, heads: int | None = None) -> Any:
    """A ``DiTTransformer2DModel`` whose velocity at t is SiT's, in diffusers' direction of time.

    Raises:
        UserError: a shape that is not SiT's.
    """
    import torch
    from diffusers import DiTTransformer2DModel

    from flowdistill.utils.errors import UserError

    patch = state["x_embedder.proj.weight"]
    width, channels, size = patch.shape[0], patch.shape[1], patch.shape[2]
    if (count := heads or HEADS.get(width)) is None or width % count:
        raise UserError(f"the network is {width} wide, which is no SiT of known size; give --heads")
    places = state["pos_embed"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    network = DiTTransformer2DModel(
        num_attention_heads=count, attention_head_dim=width // count, in_channels=channels, out_channels=channels,
        num_layers=layers, sample_size=round(places**0.5) * size, patch_size=size, norm_eps=1e-6,
        num_embeds_ada_norm=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )
    if (network.pos_embed.pos_embed - state["pos_embed"]).abs().max() > 1e-4:
        raise UserError("the checkpoint's pos_embed is not the sinusoidal one, so it is no SiT")
    new: dict[str, Tensor] = {}

    def copy(source: str, target: str) -> None:
        for part in ("weight", "bias"):
            new[f"{target}.{part}"] = state[f"{source}.{part}"]

    copy("x_embedder.proj", "pos_embed.proj")
    copy("final_layer.adaLN_modulation.1", "proj_out_1")
    sign = -1.0 if time == "data" else 1.0
    for part in ("weight", "bias"):
        last = state[f"final_layer.linear.{part}"]
        rows = last.reshape(size * size, -1, *last.shape[1:])[:, :channels]
        new[f"proj_out_2.{part}"] = sign * rows.reshape(-1, *last.shape[1:])
    first = state["t_embedder.mlp.0.weight"].double() @ time_features(time == "data")
    for i in range(layers):
        source, target = f"blocks.{i}", f"transformer_blocks.{i}"
        new[f"{target}.norm1.emb.timestep_embedder.linear_1.weight"] = first.float()
        new[f"{target}.norm1.emb.timestep_embedder.linear_1.bias"] = state["t_embedder.mlp.0.bias"]
        copy("t_embedder.mlp.2", f"{target}.norm1.emb.timestep_embedder.linear_2")
        new[f"{target}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        copy(f"{source}.adaLN_modulation.1", f"{target}.norm1.linear")
        for part in ("weight", "bias"):
            each = state[f"{source}.attn.qkv.{part}"].chunk(3)
            for name, value in zip(("to_q", "to_k", "to_v"), each, strict=True):
                new[f"{target}.attn1.{name}.{part}"] = value
        copy(f"{source}.attn.proj", f"{target}.attn1.to_out.0")
        copy(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj")
        copy(f"{source}.mlp.fc2", f"{target}.ff.net.2")
    try:
        network.load_state_dict({name: value.float() for name, value in new.items()})
    except RuntimeError as error:
        raise UserError(f"the checkpoint is no SiT: {' '.join(str(error).split())[:300]}") from error
    unknown = [name for name in state if ".q_norm." in name or ".k_norm." in name]
    if unknown:
        raise UserError(f"the checkpoint normalises queries and keys ({unknown[0]}), which diffusers' DiT does not")
    return network.eval().requires_grad_(False).to(torch.float32)


def time_features(reverse: bool) -> Tensor:
    """(256, 256) float64: SiT's sinusoids of t, or of 1 - t, from those of diffusers' DiT at t; cosines come first."""
    import torch

    steps = torch.arange(FREQUENCIES, dtype=torch.float64)
    wanted, given = steps / FREQUENCIES, steps / (FREQUENCIES - 1)  # exponents of 1 / 10000
    weights = torch.zeros(FREQUENCIES, FREQUENCIES, dtype=torch.float64)
    for i, exponent in enumerate(wanted):
        start = int((exponent * (FREQUENCIES - 1)).floor()) - POINTS // 2 + 1
        nodes = range(max(0, min(start, FREQUENCIES - POINTS)), max(0, min(start, FREQUENCIES - POINTS)) + POINTS)
        for j in nodes:
            others = [k for k in nodes if k != j]
            weights[i, j] = torch.stack([(exponent - given[k]) / (given[j] - given[k]) for k in others]).prod()
    if not reverse:
        return torch.block_diag(weights, weights)
    frequencies = (10000.0**-wanted)[:, None]
    cosine, sine = frequencies.cos() * weights, frequencies.sin() * weights
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([sine, -cosine], dim=1)])


if __name__ == "__main__":
    raise SystemExit(main())
