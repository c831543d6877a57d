#!/usr/bin/env python
"""Convert a SiT checkpoint (also one trained with REPA) into a diffusers pipeline folder that flowdistill reads.

    python scripts/convert_sit.py SiT-XL-2-256.pt --vae stabilityai/sd-vae-ft-ema --out sit-xl-2
    python scripts/convert_sit.py last.pt --vae vae/ --out sit-xl-2-repa

The network becomes a stock ``DiTTransformer2DModel`` beside a flow-matching scheduler:

- SiT's time runs from noise (0) to data (1) and its velocity is data - noise (``--time data``). REPA's runs from data
  to noise, as diffusers' does (``--time noise``); its checkpoints are known by their projectors. Cosine and sine of
  1 - t are combinations of those of t, so the time is turned round in the first layer of the time embedding, and the
  velocity in the last layer of the network.
- SiT's sinusoids have the frequencies 10000^(-i/128), those of diffusers' DiT 10000^(-i/127). For times in [0, 1] the
  former are interpolated from the latter (8 points, an error of 1e-9), again in the first layer of the time embedding.
- The channels of a learned variance, which SiT drops, are left out.

A DiT checkpoint has the same names and shapes, and is a diffusion model: read as a flow it makes noise. SiT never
trains its variance channels, whose weights are still the zeros that they begin as; DiT's are not. Where there are no
such channels, the training's settings in the checkpoint or REPA's projectors say what it is; else the user must
(``--flow-matching``).
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
PROJECTORS = "projectors."  # of REPA: what its alignment term trains beside the network


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="state dict (.pt or .safetensors), or a training checkpoint that holds one")
    parser.add_argument("--vae", required=True, help="folder or hub id of the KL autoencoder")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--time", choices=("data", "noise"), help="what is at t = 1 (default: data, as in SiT, but "
                        "noise where the checkpoint has REPA's projectors)")
    parser.add_argument("--flow-matching", action="store_true", help="it was trained by flow matching on the linear "
                        "path; for checkpoints that do not show it")
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

    from flowdistill.conditioning.components import load_model
    from flowdistill.utils.errors import UserError
    from flowdistill.utils.files import check_writable, local_path
    from flowdistill.utils.text import without_marks

    out = local_path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give a new folder")
    check_writable(out / "model_index.json")
    state, settings = load(local_path(options.checkpoint), options.weights)
    check_kind(state, settings, options.flow_matching)
    time = options.time or ("noise" if any(name.startswith(PROJECTORS) for name in state) else "data")
    try:
        transformer = converted(state, time, options.heads)
    except KeyError as error:
        raise UserError(f"{options.checkpoint} holds no SiT: it has no {error.args[0]}") from error
    place = local_path(options.vae)
    if place.is_dir():
        vae = load_model(without_marks(place), AutoencoderKL)
    else:
        try:
            vae = AutoencoderKL.from_pretrained(options.vae)
        except (OSError, ValueError) as error:
            raise UserError(f"--vae {options.vae} could not be loaded: {' '.join(str(error).split())[:200]}") from error
    # One training timestep: the network's time is t itself.
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    DiTPipeline(transformer, vae, scheduler, id2label=None).save_pretrained(out)


def load(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in ``file``, and the settings of the training that are beside it."""
    import torch
    from safetensors.torch import load_file

    from flowdistill.utils.errors import UserError
    from flowdistill.utils.files import check_pointer

    if not file.is_file():
        raise UserError(f"the checkpoint {file} does not exist")
    check_pointer(file)
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints hold their arguments
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many unrelated types
        raise UserError(f"{file} is no readable checkpoint: {' '.join(str(error).split())[:200]}") from error
    settings = state.get("args") if isinstance(state, dict) else None
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    state = state.get(key, state) if isinstance(state, dict) else {}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "x_embedder.proj.weight" not in state:
        raise UserError(f"{file} holds no SiT (no x_embedder.proj.weight, also not below '{key}'); its keys begin "
                        f"with {', '.join(sorted(map(str, state))[:5])}")
    return state, settings if isinstance(settings, dict) else {}


def check_kind(state: dict[str, Tensor], settings: dict[str, Any], said: bool) -> None:
    """Refuse a network that was not trained by flow matching on the linear path to predict the velocity.

    Args:
        settings: the training's, by SiT's and REPA's names; may be empty.
        said: whether the user has said that it was.

    Raises:
        UserError: the settings or the last layer show another training, or nothing shows which it was.
    """
    from flowdistill.utils.errors import UserError

    model = str(settings.get("model", ""))
    path, prediction = (str(settings.get(key, "")) for key in ("path_type", "prediction"))
    if path.lower() not in ("", "linear") or prediction.lower() not in ("", "v", "velocity"):
        raise UserError(f"the checkpoint was trained on the path '{path}' to predict '{prediction}'; converted is the "
                        "velocity on the linear path")
    patch, last = state["x_embedder.proj.weight"], state.get("final_layer.linear.weight")
    if last is None:
        raise UserError("the checkpoint is no SiT: it has no final_layer.linear.weight")
    channels, places = patch.shape[1], patch.shape[2] ** 2
    if len(last) not in (places * channels, 2 * places * channels):
        raise UserError(f"the last layer returns {len(last)} numbers a patch; a SiT of {channels} channels and patches "
                        f"of {places} pixels returns {places * channels}, or twice as many")
    variance = last.reshape(places, -1, last.shape[1])[:, channels:]
    if said:
        return
    if "DiT" in model or variance.any():
        why = f"it is the model {model}" if "DiT" in model else "its variance channels are trained, and SiT's never are"
        raise UserError(f"the checkpoint is a DiT, a diffusion model: {why}; diffusers has a script for those, "
                        "convert_dit_to_diffusers.py; if it was trained by flow matching all the same, add "
                        "--flow-matching")
    if not ("SiT" in model or path or variance.numel() or any(name.startswith(PROJECTORS) for name in state)):
        raise UserError("the checkpoint does not show whether it is a SiT (flow matching) or a DiT (diffusion), which "
                        "have the same layers; if it was trained by flow matching on the linear path, add "
                        "--flow-matching")


def converted(state: dict[str, Tensor], time: str, heads: int | None = None) -> Any:
    """A ``DiTTransformer2DModel`` whose velocity at t is SiT's, in diffusers' direction of time.

    Raises:
        UserError: layers or shapes that are not SiT's.
    """
    import torch
    from diffusers import DiTTransformer2DModel

    from flowdistill.utils.errors import UserError

    patch = state["x_embedder.proj.weight"]
    width, channels, size = patch.shape[0], patch.shape[1], patch.shape[2]
    if (count := heads or HEADS.get(width)) is None or width % count:
        raise UserError(f"the network is {width} wide, which is no SiT of known size; give --heads")
    places = state["pos_embed"].shape[1]
    layers = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=0)
    network = DiTTransformer2DModel(
        num_attention_heads=count, attention_head_dim=width // count, in_channels=channels, out_channels=channels,
        num_layers=layers, sample_size=round(places**0.5) * size, patch_size=size, norm_eps=1e-6,
        num_embeds_ada_norm=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )
    expected = network.pos_embed.pos_embed
    if expected.shape != state["pos_embed"].shape or (expected - state["pos_embed"]).abs().max() > 1e-4:
        raise UserError("the checkpoint's pos_embed is not the sinusoidal one, so it is no SiT")
    new: dict[str, Tensor] = {}
    read = {"x_embedder.proj", "pos_embed", "y_embedder.embedding_table", "final_layer.linear", "t_embedder.mlp.0"}

    def copy(source: str, target: str) -> None:
        read.add(source)
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
        read.add(f"{source}.attn.qkv")
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
    unknown = sorted(name for name in state if not name.startswith(PROJECTORS)
                     and name.removesuffix(".weight").removesuffix(".bias") not in read)
    if unknown:
        raise UserError(f"the checkpoint is no SiT: it has {unknown[0]}, which a SiT does not have")
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
