"""LoRA files of the tiny pipelines, as the training scripts of diffusers and of kohya write them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 2


def matrices(module: nn.Module, ends: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random A and B, by peft's names, of the linear layers whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            for side, shape in (("A", (RANK, layer.in_features)), ("B", (layer.out_features, RANK))):
                found[f"{name}.lora_{side}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    assert found
    return found


def network_of(pipeline: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    return name, getattr(pipeline, name)


def lora_file(pipeline: Any, folder: Path, texts: bool = True) -> Path:
    """A LoRA of the network and, where the pipeline's class writes them, of the CLIP text encoders, by its
    ``save_lora_weights``."""
    name, network = network_of(pipeline)
    layers = {f"{name}_lora_layers": matrices(network, ("to_q", "to_v", "to_out.0"))}
    for part in inspect.signature(pipeline.save_lora_weights).parameters:
        component = part.removesuffix("_lora_layers")
        if texts and component.startswith("text_encoder") and component != part:
            layers[part] = matrices(getattr(pipeline, component), ("q_proj", "out_proj"), seed=len(layers))
    pipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def kohya_file(pipeline: Any, file: Path, alpha: float = 0.5) -> Path:
    """The same with kohya's names and an alpha, as ComfyUI reads them: of Stable Diffusion and SDXL."""
    encoders = {"text_encoder": "lora_te1" if hasattr(pipeline, "text_encoder_2") else "lora_te"}
    encoders |= {"text_encoder_2": "lora_te2"} if hasattr(pipeline, "text_encoder_2") else {}
    tensors = {}
    for component, head in ({"unet": "lora_unet"} | encoders).items():
        ends = ("to_q", "to_v", "to_out.0") if component == "unet" else ("q_proj", "out_proj")
        for key, value in matrices(getattr(pipeline, component), ends, seed=7).items():
            layer, _, side = key.partition(".lora_")
            layer = layer if component == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
            stem = f"{head}_{layer.replace('.', '_')}"
            tensors[f"{stem}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file
