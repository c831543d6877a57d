"""LoRA files for ComfyUI: the names of its layers, the header, and the sampler's settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from flowdistill.export import export
from flowdistill.export.comfyui import COMFYUI_FILE, Sampling, kohya_tensors, sampling, write_lora
from flowdistill.networks.backbones import family_of
from flowdistill.networks.lora import LoraSettings, layers_named
from flowdistill.paths.schedulers import path_from_scheduler
from flowdistill.students import FlowMap, Generator, StudentInfo
from flowdistill.students.steps import Steps, start_scale
from flowdistill.teachers import load_teacher
from tests.families import FAMILIES
from tests.students_of_steps import moved, steps_of
from tests.tiny import VP

FILE = "pytorch_lora_weights.safetensors"
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": ("UNet2DConditionModel", {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "StableDiffusionXLPipeline": ("UNet2DConditionModel", {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", {
        "sample_size": 16, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
        "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "out_channels": 16, "pos_embed_max_size": 8}),
    "FluxPipeline": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", {}),
    "ZImagePipeline": ("ZImageTransformer2DModel", {}),
}
"""The networks of the public models: Stable Diffusion 1.5, SDXL, Stable Diffusion 3 medium, FLUX.1 dev, Qwen-Image,
Z-Image."""

# Frozen facts: the layers that ComfyUI's key map has for these models, under the names by which a LoRA file asks for
# them (comfy/lora.py, model_lora_keys_unet; comfy/utils.py, unet_to_diffusers, mmdit_to_diffusers, flux_to_diffusers,
# z_image_to_diffusers; of Qwen-Image those of its own network, comfy/ldm/qwen_image/model.py).
ATTENTION = ["transformer_blocks_DEPTH_{attn1,attn2}_{to_q,to_k,to_v,to_out_0}",
             "transformer_blocks_DEPTH_ff_net_{0_proj,2}", "{proj_in,proj_out}"]


def unet(blocks: int, depths: dict[str, int]) -> str:
    """Of a UNet of so many blocks a side; ``depths``: of its attentions, "down_blocks_0_attentions_{0..1}" -> 1."""
    resnets = f"{{down_blocks_{{0..{blocks - 1}}}_resnets_{{0..1}},mid_block_resnets_{{0..1}}," \
        f"up_blocks_{{0..{blocks - 1}}}_resnets_{{0..2}}}}_{{conv1,conv2,time_emb_proj}}"
    attentions = [f"{place}_{part}".replace("DEPTH", f"{{0..{depth - 1}}}")
                  for place, depth in depths.items() for part in ATTENTION]
    between = f"{{down_blocks_{{0..{blocks - 2}}}_downsamplers_0,up_blocks_{{0..{blocks - 2}}}_upsamplers_0}}_conv"
    return " ".join([resnets, *attentions, between, f"up_blocks_{{0..{blocks - 1}}}_resnets_{{0..2}}_conv_shortcut",
                     "{conv_in,conv_out,time_embedding_linear_1,time_embedding_linear_2}"])


KNOWN = {
    "StableDiffusionPipeline": "lora_unet_ " + unet(4, {
        "down_blocks_{0..2}_attentions_{0..1}": 1, "mid_block_attentions_0": 1, "up_blocks_{1..3}_attentions_{0..2}": 1,
    }) + " down_blocks_{1..2}_resnets_0_conv_shortcut",
    "StableDiffusionXLPipeline": "lora_unet_ " + unet(3, {
        "down_blocks_1_attentions_{0..1}": 2, "down_blocks_2_attentions_{0..1}": 10, "mid_block_attentions_0": 10,
        "up_blocks_0_attentions_{0..2}": 10, "up_blocks_1_attentions_{0..2}": 2,
    }) + " down_blocks_{1..2}_resnets_0_conv_shortcut label_emb_0_{0,2}",
    "StableDiffusion3Pipeline": "transformer. "
        "transformer_blocks.{0..23}.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0} "
        "transformer_blocks.{0..23}.{norm1.linear,norm1_context.linear,ff.net.0.proj,ff.net.2} "
        "transformer_blocks.{0..22}.{attn.to_add_out,ff_context.net.0.proj,ff_context.net.2} "
        "time_text_embed.{timestep_embedder,text_embedder}.linear_{1,2} "
        "{pos_embed.proj,context_embedder,norm_out.linear,proj_out}",
    "FluxPipeline": "transformer. "
        "transformer_blocks.{0..18}.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out} "
        "transformer_blocks.{0..18}.{norm1.linear,norm1_context.linear} "
        "transformer_blocks.{0..18}.{ff,ff_context}.net.{0.proj,2} "
        "single_transformer_blocks.{0..37}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp,norm.linear,proj_out} "
        "time_text_embed.{timestep_embedder,text_embedder,guidance_embedder}.linear_{1,2} "
        "{x_embedder,context_embedder,norm_out.linear,proj_out}",
    "QwenImagePipeline": "transformer. "
        "transformer_blocks.{0..59}.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out} "
        "transformer_blocks.{0..59}.{img,txt}_{mod.1,mlp.net.0.proj,mlp.net.2} "
        "time_text_embed.timestep_embedder.linear_{1,2} {img_in,txt_in,norm_out.linear,proj_out}",
    "ZImagePipeline": "transformer. "
        "{layers.{0..29},context_refiner.{0..1},noise_refiner.{0..1}}.attention.{to_q,to_k,to_v,to_out.0} "
        "{layers.{0..29},context_refiner.{0..1},noise_refiner.{0..1}}.feed_forward.{w1,w2,w3} "
        "{layers.{0..29},noise_refiner.{0..1}}.adaLN_modulation.0 t_embedder.mlp.{0,2} cap_embedder.1 "
        "all_x_embedder.2-1 all_final_layer.2-1.{linear,adaLN_modulation.1}",
}
VERSIONS = {"StableDiffusionPipeline": ("stable-diffusion-v1/lora", "sd_v1"),
            "StableDiffusionXLPipeline": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
            "StableDiffusion3Pipeline": ("stable-diffusion-3-m/lora", "sd3"),
            "FluxPipeline": ("flux-1-dev/lora", "flux1"),
            "QwenImagePipeline": ("QwenImagePipeline/lora", None), "ZImagePipeline": ("ZImagePipeline/lora", None)}


def expanded(pattern: str) -> Iterator[str]:
    """The names of a shell's braces, {a,b} and {0..3}, from the inside out."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    for choice in map(str, range(int(span[1]), int(span[2]) + 1)) if span else inner.split(","):
        yield from expanded(pattern[: match.start()] + choice + pattern[match.end():])


def known(name: str) -> set[str]:
    prefix, *patterns = KNOWN[name].split()
    return {prefix + layer for layer in itertools.chain.from_iterable(map(expanded, patterns))}


def adapters_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Empty adapters of every layer that can get one, of rank 1."""
    tensors = {}
    for layer in layers_named(network, None):
        shape = network.get_submodule(layer).weight.shape
        tensors[f"{layer}.lora_A.weight"] = torch.zeros(1, *shape[1:])
        tensors[f"{layer}.lora_B.weight"] = torch.zeros(shape[0], 1, *(1 for _ in shape[2:]))
    return tensors


@pytest.mark.parametrize("name", FULL)
def test_every_layer_of_the_public_models_has_a_name_that_comfyui_knows(name: str, tmp_path: Path) -> None:
    network_class, config = FULL[name]
    with init_empty_weights():
        network = getattr(diffusers, network_class)(**config)
    family, kind = family_of(network), getattr(diffusers, name)
    file = write_lora(tmp_path, kind, adapters_of(network), family.pipelines[name],
                      family.base_version(network, "epsilon"), title="a title")
    assert file == (COMFYUI_FILE if "lora_unet" in KNOWN[name] else FILE)
    kohya = file == COMFYUI_FILE
    ends = ("lora_down.weight", "lora_up.weight", "alpha") if kohya else ("lora_A.weight", "lora_B.weight")
    names = known(name)
    with safe_open(tmp_path / file, "pt") as stored:
        assert set(stored.keys()) == {f"{layer}.{end}" for layer in names for end in ends}
        said = stored.metadata()
    assert (said["modelspec.architecture"], said.get("ss_base_model_version")) == VERSIONS[name]
    assert said["modelspec.sai_model_spec"] == "1.0.0" and said["modelspec.title"] == "a title"
    assert said["ss_network_dim"] == "1" and float(said["ss_network_alpha"]) == 1


def test_alpha_changes_nothing_of_what_is_added() -> None:
    """The product is the whole change whatever the rank, as it is in diffusers' file."""
    a, b = torch.randn(3, 8), torch.randn(5, 3)
    named = kohya_tensors({"mid_block.attentions.0.proj_in.lora_A.weight": a,
                           "mid_block.attentions.0.proj_in.lora_B.weight": b})
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    down, up, alpha = (named[f"{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert torch.equal(alpha / down.shape[0] * up @ down, b @ a)


def adapted(name: str, count: int) -> tuple[Any, Any]:
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size)
    info, lora = StudentInfo("dmd2", "path/to/base"), LoraSettings(2, 3.0)
    if count == 1:
        return teacher, moved(FlowMap.from_teacher(teacher, info, lora=lora))
    steps = steps_of(teacher, count, "stochastic")
    return teacher, moved(Generator.from_teacher(teacher, info, lora=lora, steps=steps))


@pytest.mark.parametrize(("name", "count"), [("sd", 1), ("sd", 4), ("sdxl", 1), ("sd3", 1), ("flux-dev", 1),
                                              ("qwen-image", 1), ("z-image", 1)])
def test_diffusers_reads_the_file_for_comfyui_as_its_own(tmp_path: Path, name: str, count: int) -> None:
    """Both files are the same change of every weight, of folded times and convolutions too."""
    family, (_, student) = FAMILIES[name], adapted(name, count)
    export(student, tmp_path / "out")
    file = COMFYUI_FILE if name in ("sd", "sdxl") else FILE
    assert (tmp_path / "out" / COMFYUI_FILE).exists() == (file == COMFYUI_FILE)
    weights = []
    for weight_name in (FILE, file):
        pipe = family.make()
        pipe.load_lora_weights(tmp_path / "out", weight_name=weight_name)
        pipe.fuse_lora(components=["unet" if hasattr(pipe, "unet") else "transformer"])
        pipe.unload_lora_weights()
        weights.append((pipe.unet if hasattr(pipe, "unet") else pipe.transformer).state_dict())
    before = (pipe.unet if hasattr(pipe := family.make(), "unet") else pipe.transformer).state_dict()
    layers = {key.split(".lora_")[0] for key in load_file(tmp_path / "out" / FILE)}
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-6)
        touched = f"{'unet' if file == COMFYUI_FILE else 'transformer'}.{key.removesuffix('.weight')}" in layers
        assert touched != torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["sana", "lumina2", "lcm"])
def test_no_file_is_named_where_comfyui_knows_no_names(tmp_path: Path, name: str) -> None:
    _, student = adapted(name, 1)
    export(student, tmp_path)
    assert "ComfyUI has no names" in (tmp_path / "README.md").read_text() and (tmp_path / FILE).exists()
    assert not (tmp_path / COMFYUI_FILE).exists()


# --- the sampler


def vp(count: int, stepping: str, timesteps: list[int]) -> Sampling:
    scheduler = EulerDiscreteScheduler(**VP)
    path = path_from_scheduler(scheduler)
    times = tuple(path.native_to_linear(torch.tensor(float(t), dtype=torch.float64)).item() for t in timesteps)
    steps = Steps(times, stepping, start_scale(path, times, stepping, True))
    found = sampling(path, steps, list(map(float, timesteps)), 1000)
    assert found is not None and len(timesteps) == count
    return found


def test_trailing_timesteps_are_those_of_its_simple_scheduler() -> None:
    found = vp(4, "stochastic", [999, 749, 499, 249])
    assert (found.sampler, found.scheduler) == ("lcm", "simple")
    scheduler = EulerDiscreteScheduler(**VP, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert found.sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-4)


def test_other_timesteps_are_noise_levels_for_a_node_of_their_own() -> None:
    found = vp(2, "deterministic", [999, 399])
    assert (found.sampler, found.scheduler) == ("euler", None) and found.sigmas[-1] == 0


def test_the_first_state_is_compared_with_the_students() -> None:
    """ComfyUI begins at (sigma^2 + 1)^1/2 n, diffusers' Euler of one trailing step at sigma n."""
    path = path_from_scheduler(EulerDiscreteScheduler(**VP))
    found = sampling(path, Steps.single(path.t_max), [999.0], 1000)
    assert found is not None and found.scheduler == "simple"
    sigma = found.sigmas[0]
    assert sigma == pytest.approx(14.6146, rel=1e-4) and found.start == pytest.approx((1 + sigma**-2) ** 0.5)


@pytest.mark.parametrize(("name", "count", "words"), [
    ("sd", 4, ["| sampler | `lcm` |", "| steps | 4 |", "| cfg | 1.0 |", "| scheduler | `simple` |"]),
    ("sd3", 1, ["| sampler | `euler` |", "| steps | 1 |", "| scheduler | `simple` |", "`1, 0`"]),
    ("flux-dev", 1, ["FluxGuidance", "`pytorch_lora_weights.safetensors` to ComfyUI"]),
    ("sd3", 4, ["`ManualSigmas`", "| sampler | `lcm` |"]),
])
def test_the_card_has_the_samplers_settings(tmp_path: Path, name: str, count: int, words: list[str]) -> None:
    _, student = adapted(name, count)
    export(student, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert all(word in card.split("## ComfyUI")[1] for word in words), card
    assert "path/to/base" in card.split("## ComfyUI")[1]
