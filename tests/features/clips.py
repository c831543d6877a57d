"""Tiny CLIPs with their processors, on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.families import clip_tokenizer
from tests.tiny import lively

SIZE = 16


def config(**text: Any) -> CLIPConfig:
    side = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": "gelu"}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return CLIPConfig(text_config={**side, "vocab_size": 54, "max_position_embeddings": 16, **ends, **text},
                      vision_config={**side, "image_size": SIZE, "patch_size": 8}, projection_dim=8)


def tiny_clip(folder: Path, seed: int = 0, **text: Any) -> CLIPModel:
    """A CLIP of random weights, saved with a tokenizer of letters; of all its weights none is 0."""
    network = lively(CLIPModel(config(**text)), seed)
    with torch.no_grad():
        for name in ("vision_model.embeddings.class_embedding", "logit_scale"):
            network.get_parameter(name).fill_(1.3)
    network.save_pretrained(folder)
    save_processor(folder)
    return network


def save_processor(folder: Path) -> None:
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPProcessor(CLIPImageProcessor(**sizes), clip_tokenizer()).save_pretrained(folder)


def without_processor(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()


def as_open_clip(network: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights under open_clip's names, written down block by block."""
    found, given = {}, network.state_dict()
    towers = {"": ("text_model", "text_model.final_layer_norm", "ln_final"),
              "visual.": ("vision_model", "vision_model.post_layernorm", "visual.ln_post")}
    for prefix, (tower, last, ln) in towers.items():
        for kind in ("weight", "bias"):
            found[f"{ln}.{kind}"] = given[f"{last}.{kind}"]
            for number in range(2):
                ours, theirs = f"{tower}.encoder.layers.{number}", f"{prefix}transformer.resblocks.{number}"
                found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                    [given[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
                found[f"{theirs}.attn.out_proj.{kind}"] = given[f"{ours}.self_attn.out_proj.{kind}"]
                found[f"{theirs}.ln_1.{kind}"] = given[f"{ours}.layer_norm1.{kind}"]
                found[f"{theirs}.ln_2.{kind}"] = given[f"{ours}.layer_norm2.{kind}"]
                found[f"{theirs}.mlp.c_fc.{kind}"] = given[f"{ours}.mlp.fc1.{kind}"]
                found[f"{theirs}.mlp.c_proj.{kind}"] = given[f"{ours}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = given[f"vision_model.pre_layrnorm.{kind}"]
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    return found | {
        "visual.class_embedding": given[f"{vision}.class_embedding"],
        "visual.positional_embedding": given[f"{vision}.position_embedding.weight"],
        "visual.conv1.weight": given[f"{vision}.patch_embedding.weight"],
        "visual.proj": given["visual_projection.weight"].T,
        "token_embedding.weight": given[f"{text}.token_embedding.weight"],
        "positional_embedding": given[f"{text}.position_embedding.weight"],
        "text_projection": given["text_projection.weight"].T,
        "logit_scale": given["logit_scale"],
    }


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["text_config"] |= values
    file.write_text(json.dumps(content))
