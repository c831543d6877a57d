"""Tiny random pipelines, pictures and prompts for EchoDistill's tests."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from flowdistill.config import OptimizerConfig, RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.echodistill.echo import EchoConfig
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.teachers import load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from tests.families import VP, lively, stable_diffusion

KEPT = ["a cat", "a dog on b", "the sea"]
TOKEN = "<new1>"


def teacher_pipeline(prediction="v_prediction"):
    return stable_diffusion(DDIMScheduler(**VP, clip_sample=False, prediction_type=prediction, steps_offset=1))


def student_pipeline():
    """SD-Turbo's scheduler and prediction, and weights of its own."""
    pipeline = stable_diffusion(EulerDiscreteScheduler(**VP, timestep_spacing="trailing", steps_offset=1))
    lively(pipeline.unet, seed=7)
    return pipeline


def write_pictures(folder, count=4):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(256, (18, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def settings(folder, echo=None, **changes):
    values = {
        "student": "turbo", "instance_data_dir": str(write_pictures(folder / "pictures")),
        "instance_prompt": f"a {TOKEN} c", "initializer_token": "c", "teacher_steps": 2, "token_lr": 1e-2,
        "student_prompts": [f"a {TOKEN} on b"], "validation_prompts": [f"a {TOKEN}", f"a {TOKEN} on d"],
        "optimizer": OptimizerConfig(lr=1e-3), "teacher_optimizer": OptimizerConfig(lr=1e-3),
    } | changes  # fmt: skip
    stage = {"steps": 2, "num_samples": 6, "num_validation": 2, "min_level": -1e9, "tolerance": None,
             "min_separation": None} | (echo or {})
    return EchoDistillConfig(**values, echo=EchoConfig(**stage))


def make_method(folder, teacher=None, student=None, echo=None, device=None, **changes):
    torch.manual_seed(0)
    config = settings(folder, echo, **changes)
    teacher = load_teacher(teacher or teacher_pipeline(), prompts=KEPT, device=device)
    return EchoDistill(config, teacher, student or student_pipeline())


def make_trainer(folder, method, steps=6, name="run", **train):
    values = {"steps": steps, "batch_size": 2, "log_every": 1, "checkpoint_every": 0, "trackers": [], "device": "cpu",
              "precision": "fp32", "num_samples": 2} | train  # fmt: skip
    config = RunConfig(str(folder / name), 0, TeacherConfig("tiny"), method.config, TrainConfig(**values))
    return Trainer(method, config, folder / name, make_accelerator(config.train, folder / name))


def weights(method):
    """Everything that trains, copied."""
    return {name: value.detach().clone() for name, value in method.trained().items()}
