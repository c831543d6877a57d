"""One small run of every method, and of what differs between devices within them: a table, and its trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowdistill.config import METHODS, RunConfig, TeacherConfig, TrainConfig
from flowdistill.networks.lora import LoraSettings
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.training.loop import Trainer
from tests import echo_world
from tests.families import PROMPTS, pixart
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

TEACHERS: dict[str, Callable[[], Teacher]] = {
    "pixels": lambda: load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10),
    "latents": lambda: load_teacher(tiny_dit_pipeline()),
    "prompts": lambda: load_teacher(pixart(), prompts=PROMPTS),
    "some labels": lambda: load_teacher(tiny_dit_pipeline(), labels=[1, 3]),
}


@dataclass
class Case:
    """A method with settings that reach what its defaults leave out.

    Attributes:
        method: its name.
        teacher: of :data:`TEACHERS`.
        settings: of the method.
        steps: how many come between the first and the one that is looked at.
    """

    method: str
    teacher: str = "latents"
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 0


SMALL_PAIRS = {"pairs": 4, "pairs_steps": 1}
CASES = {
    "boot": Case("boot", settings={"guidance_scale": 2.0, "target_time": "reuse"}),
    "consistency": Case("consistency", settings=SMALL_PAIRS | {"guidance_max": 2.0, "target": "ema"}),
    "consistency, jvp": Case("consistency", "pixels", {"derivative": "jvp", "states": "data", "data": "digits"}),
    "data_flow_map": Case("data_flow_map", "pixels", {"data": "digits", "shift_pixels": 1}),
    "diff_instruct": Case("diff_instruct", "some labels"),
    "disback": Case("disback", settings={
        "degradation_steps": 2, "degradation_every": 1, "interval": [1]}, steps=2),
    "dmd2": Case("dmd2", "pixels", {
        "adversarial_weight": 0.1, "data": "digits", "regression_weight": 0.1, "regression_pairs": 4,
        "regression_steps": 1, "guidance_scale": 2.0, "r1_weight": 1.0}),
    "dmd2, 2 steps": Case("dmd2", "prompts", {"steps": 2, "guidance_scale": 2.0, "critic_told_step": True}),
    "dmd2, lora": Case("dmd2", settings={"student": "lora", "critic": "lora", "lora": LoraSettings(rank=2)}),
    "flow_map_matching": Case("flow_map_matching", settings={"guidance_max": 2.0, "correction_strength": 1.0}),
    "flow_map_matching, jvp": Case("flow_map_matching", settings=SMALL_PAIRS | {
        "states": "pairs", "objective": "eulerian", "derivative": "jvp"}),
    "freeflow": Case("freeflow", settings={"guidance_max": 2.0}),
    "freeflow, jvp": Case("freeflow", "prompts", {"derivative": "jvp", "guidance_max": 2.0}),
    "sid": Case("sid", settings={"guidance_scale": 2.0}),
    "teacher_score_matching": Case("teacher_score_matching", "pixels", {"data": "digits", "student_size": 0.5}),
    "echodistill": Case("echodistill", settings={"teacher_steps": 1}),
    "msd": Case("msd", "some labels", {"host": METHODS.get("dmd2").Config(guidance_scale=2.0)}),
}


def make_trainer(
    name: str, folder: Path, accelerator: Accelerator, changes: Mapping[str, Any] | None = None, **train: Any
) -> Trainer:
    """The loop of a case, on the accelerator's device; what its method makes before (pairs, latents) is made there.

    Args:
        changes: of the method's settings.
        train: settings of ``train`` besides the small ones here.
    """
    case = CASES[name]
    settings: dict[str, Any] = {
        "steps": 100, "batch_size": 4, "log_every": 1, "checkpoint_every": 0, "trackers": [], "num_samples": 2,
        "precision": "fp32",
    } | train
    torch.manual_seed(0)
    if case.method == "echodistill":
        folder.mkdir(parents=True, exist_ok=True)
        method = echo_world.make_method(folder, device=accelerator.device, **(case.settings | dict(changes or {})))
        config = RunConfig(str(folder), 0, TeacherConfig("tiny"), method.config, TrainConfig(**settings))
        return Trainer(method, config, folder, accelerator)
    chosen = METHODS.get(case.method).Config(**(case.settings | dict(changes or {})))
    config = RunConfig(str(folder), 0, TeacherConfig("tiny"), chosen, TrainConfig(**settings))
    config = METHODS.get(case.method).representative_run(config)
    teacher = TEACHERS[case.teacher]()
    teacher.to(accelerator.device)
    return Trainer(METHODS.get(config.method.name)(config.method, teacher), config, folder, accelerator)
