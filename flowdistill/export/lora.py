"""A low-rank student as the LoRA file of its teacher's own pipeline, which ``load_lora_weights`` takes.

The student's calls are the teacher's network at as many constant times, plus adapters, plus a constant vector in the
time embedding (duration, guidance), which is a weight of low rank as well (:mod:`flowdistill.export.time_fold`): of one
call with the vector e and the layer's input a it is e a^T / |a|^2. A generator of several calls has no such vector: its
file is the adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from flowdistill.conditioning.pipeline_lora import FILE, BaseLora
from flowdistill.export.cards import origin
from flowdistill.export.comfyui import about_comfyui, sampling, with_vae, write_lora
from flowdistill.export.few_step import StockSteps, native_times
from flowdistill.export.prompt_pipelines import size_arguments, stock_pipeline
from flowdistill.export.time_fold import TimeFold
from flowdistill.networks.lora import lora_tensors
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.students.steps import Steps
from flowdistill.students.student import Student
from flowdistill.utils.files import portable_path
from flowdistill.utils.shipped import find_path

SCHEDULERS = {
    "vp": "EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=\"trailing\")",
    "flow": "FlowMatchEulerDiscreteScheduler()",
}


def save_lora(
    student: Student, folder: Path, folds: Mapping[str, TimeFold], found: StockSteps | None = None,
    chain: Steps | None = None,
) -> str | None:
    """Write ``FILE``, and what ComfyUI loads, into ``folder`` and return Markdown that says how to use them.

    None, and no file, for a student without adapters, a pipeline without LoRA files, or a one-step map that is not one
    step of the pipeline with a stock scheduler (EDM, or a start after the scheduler's own).

    Args:
        folds: what goes into the time embedding.
        found, chain: the steps of a student of several calls, and what takes them.
    """
    velocity = student.network.velocity
    if velocity.lora is None or student.prompts is None:
        return None
    name, _ = stock_pipeline(student.prompts, velocity.family)
    kind = getattr(diffusers, name)
    if not hasattr(kind, "save_lora_weights"):
        return None
    if found is None:
        if velocity.path.kind not in SCHEDULERS or student.t_start != path_from_scheduler(student.scheduler).t_max:
            return None
        scheduler, steps = SCHEDULERS[velocity.path.kind], "num_inference_steps=1"
    else:
        scheduler = found.code or f'{found.kind.__name__}.from_pretrained("path/to/this/folder", subfolder="scheduler")'
        steps = found.written_arguments
    tensors = lora_tensors(velocity.backbone)
    for layer, (left, right, _) in folds.items():
        a, b = (tensors.get(f"{layer}.lora_{side}.weight") for side in "AB")
        tensors[f"{layer}.lora_A.weight"] = right if a is None else torch.cat([a, right])
        tensors[f"{layer}.lora_B.weight"] = left if b is None else torch.cat([b, left], dim=1)
    taken = Steps.single(student.t_start) if found is None else chain
    assert taken is not None
    return _use(student, scheduler, steps) + _write(student, folder, tensors, taken)


def _write(student: Student, folder: Path, tensors: Mapping[str, Tensor], steps: Steps) -> str:
    """Write the files, and return the card's section for ComfyUI."""
    assert student.prompts is not None
    velocity = student.network.velocity
    family, path = velocity.family, velocity.path
    name, facts = stock_pipeline(student.prompts, family)
    base = portable_path(student.info.base_model) or "the base model"
    table = getattr(student.scheduler, "alphas_cumprod", None) if path.kind == "vp" else None
    found = sampling(path, steps, native_times(path, steps), None if table is None else len(table))
    height, width = student.prompts.image_size
    guided = family.takes_guidance(velocity.backbone)
    if guided and facts.lora_names == "kohya":  # an input of latent consistency models, which ComfyUI's UNet has not
        facts = replace(facts, lora_names="")
    calls = "1 step" if len(steps) == 1 else f"{len(steps)} steps"
    sampler = "" if found is None else f", sampler {found.sampler}"
    file = write_lora(
        folder, getattr(diffusers, name), tensors, facts, family.base_version(velocity.backbone, path.prediction),
        title=f"{base.rstrip('/').rpartition('/')[2]} in {calls}",
        description=origin(student),
        resolution=f"{width}x{height}",
        prediction_type={"epsilon": "epsilon", "v_prediction": "v"}.get(path.prediction),
        usage_hint=f"{calls}, cfg 1.0{sampler}, strength 1.0",
    )
    more = "Set the node `FluxGuidance` to 1.0, as this network was trained." if guided else ""
    return about_comfyui(file, found, f"`{base}`{with_vae(student.info.base_vae)}", more)


def _use(student: Student, scheduler: str, steps: str) -> str:
    """Markdown that loads the file beside the scheduler (in Python) and calls the pipeline for its steps."""
    assert student.prompts is not None
    family = student.network.velocity.family
    name, facts = stock_pipeline(student.prompts, family)
    # Of some pipelines another class makes the student's images.
    loaded = name if family.pipelines[student.prompts.text.pipeline_class].exported_as else "DiffusionPipeline"
    guided = family.takes_guidance(student.network.velocity.backbone)
    guidance = "guidance_scale=1, " if guided else f"{facts.no_guidance}, " if facts.no_guidance else ""
    base, vae = portable_path(student.info.base_model), student.info.base_vae
    fused, other = _base_lora(student.info.base_lora, getattr(diffusers, name))
    imports = [] if vae is None else [vae.kind]
    own = "" if vae is None else f", vae={vae.code()}"
    imports += [loaded, scheduler.partition("(")[0].partition(".")[0]]
    return (
        f"\n`{FILE}` is the same student as a LoRA of its teacher:\n\n"
        f"```python\nfrom diffusers import {', '.join(imports)}\n\n"
        f'pipe = {loaded}.from_pretrained("{base}"{own})\n'
        f"{fused}pipe.scheduler = {scheduler}\n"
        'pipe.load_lora_weights("path/to/this/folder")\n'
        f'images = pipe("a prompt", {steps}, {guidance}{size_arguments(student)}).images\n```\n'
        f"{other}{_rounded(student.info.base_quantize)}"
    )


def _rounded(scheme: str | None) -> str:
    """That training had rounded weights beside the adapters, in words."""
    return "" if scheme is None else (
        f"\nIt was trained on weights in {scheme}, which the pipeline in this folder has; the LoRA goes onto the base "
        "model's whole ones, so images of the two differ by that rounding.\n")


def _base_lora(lora: BaseLora | None, kind: Any) -> tuple[str, str]:
    """Lines that make a teacher of its base model, and what that means for other programs; empty without a LoRA."""
    if lora is None:
        return "", ""
    # All of them: Flux's default leaves the text encoder's part out.
    parts = json.dumps(kind._lora_loadable_modules)
    repository, file = lora.source, ""
    if lora.source.count("/") > 1 and not find_path(lora.source).exists():  # owner/name/file
        owner, name, inside = lora.source.split("/", 2)
        repository, file = f"{owner}/{name}", f', weight_name="{inside}"'
    return (
        f'pipe.load_lora_weights("{portable_path(repository)}"{file})\n'
        f"pipe.fuse_lora({parts}, lora_scale={lora.scale})\npipe.unload_lora_weights()\n",
        f"\nThe teacher was the base model with the LoRA `{portable_path(lora.source)}` in its weights, and `{FILE}` "
        f"is what training added to both. Other programs load the two: that LoRA at strength {lora.scale}, this one at "
        "1.\n",
    )
