"""Students of real backbones that train whole or in parts (FSDP2), for tests in other processes.

UNet with FreeFlow, and a tiny Stable Diffusion with DMD2, once with full copies, whose critic follows the student, and
once with adapters.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import nn

from flowdistill.config import OptimizerConfig, RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.networks.lora import LoraSettings
from flowdistill.teachers import load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator, save_student
from tests.families import PROMPTS, stable_diffusion
from tests.processes import ROOT
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import shard

NAMES = ("unet", "text", "adapters")
# A large eps: otherwise AdamW makes a whole step of a gradient that is rounding and nothing else.
OPTIMIZERS = {key: OptimizerConfig(lr=1e-2, eps=1e-2) for key in ("optimizer", "critic_optimizer")}


def shipped() -> dict:
    """What configs/accelerate/fsdp2.yaml sets, with a size that tiny networks reach."""
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2 and settings["fsdp_auto_wrap_policy"] == "SIZE_BASED_WRAP"
    return {"auto_wrap_policy": settings["fsdp_auto_wrap_policy"].lower(), "min_num_params": 10000}


def method_of(name):
    # Each tensor costs FSDP2 time, whatever its size.
    if name == "unet":
        small = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return FreeFlow(FreeFlowConfig(**OPTIMIZERS), load_teacher(tiny_unet_pipeline(**small), null_label=3))
    low = {"student": "lora", "critic": "lora", "lora": LoraSettings(4)} if name == "adapters" else {
        "critic_follow": 0.3}
    small = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",),
             "up_block_types": ("CrossAttnUpBlock2D",)}
    teacher = load_teacher(stable_diffusion(**small), prompts=PROMPTS)
    return Dmd2(Dmd2Config(guidance_scale=2.0, **low, **OPTIMIZERS), teacher)


def trainer_of(name, folder, steps=2, fsdp2=False):
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source=name), method=None, train=TrainConfig(
        steps=steps, batch_size=8, log_every=1, checkpoint_every=1, trackers=[], device="cpu", precision="fp32",
        ema_decay=0.5, max_grad_norm=0.1))
    accelerator = make_accelerator(config.train, folder)
    if fsdp2:
        # Weights that stay whole after a pass are another copy, which must not outlive a change of them.
        shard(accelerator, reshard_after_forward=name != "text", **shipped())
    torch.manual_seed(0)
    method = method_of(name)
    config.method = method.config
    return Trainer(method, config, Path(folder), accelerator)


def parts(network: nn.Module) -> dict:
    """Of a network's parameters that train: how many elements are here, and how many there are."""
    trained = [value for value in network.parameters() if value.requires_grad]
    here = sum(value.to_local().numel() if hasattr(value, "to_local") else value.numel() for value in trained)
    return {"here": here, "all": sum(value.numel() for value in trained)}


def train(folder, *lengths, **settings):
    """Train each student to each of these numbers of steps, in a trainer of its own that goes on where the last ended.

    Prints a line of JSON a trainer. ``settings`` are those of ``trainer_of``.
    """
    for name in NAMES:
        for steps in lengths:
            trainer = trainer_of(name, folder / name, steps, **settings)
            print(json.dumps({"name": name, "rank": trainer.rank, "world": trainer.world, "from": trainer.step,
                              **parts(trainer.roles["student"].network)}), flush=True)
            trainer.train()
            save_student(trainer)


def train_in_parts(folder):
    """What each of several processes runs: the weights are sharded, and training stops half-way and goes on."""
    train(folder, 1, 2, fsdp2=True)
