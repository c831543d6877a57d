"""Weights of open_clip's CLIP (two transformers of ``resblocks``) under the names of transformers' ``CLIPModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""There features are multiplied by them from the right, here from the left."""
NORMS = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
         "visual.ln_post": "vision_model.post_layernorm"}
PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, float32, under other names; a name that is not known stays, for whoever loads them to find."""
    found: dict[str, Tensor] = {}
    for given, value in state.items():
        name, tensor = given.removeprefix("module."), value.float()
        stem, _, kind = name.rpartition(".")
        block = BLOCK.fullmatch(name)
        if name in WHOLE:
            found[WHOLE[name]] = tensor
        elif name in TRANSPOSED:
            found[TRANSPOSED[name]] = tensor.T.contiguous()
        elif stem in NORMS:
            found[f"{NORMS[stem]}.{kind}"] = tensor
        elif block:
            visual, number, inside = block.groups()
            layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
            found |= _of_block(layer, inside, tensor)
        elif name != "attn_mask":  # of older files; it says nothing
            found[name] = tensor
    return found


def _of_block(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem, _, kind = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):  # queries, keys and values in one
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", torch.chunk(tensor, 3), strict=True)
        return {f"{layer}.self_attn.{part}_proj.{kind}": value.contiguous() for part, value in parts}
    return {f"{layer}.{PARTS.get(stem, stem)}.{kind}": tensor}
