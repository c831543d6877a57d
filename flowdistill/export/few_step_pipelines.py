"""The folder of a student of several calls: its network, the scheduler that takes its steps, and its card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DiTPipeline
from torch import nn

from flowdistill.export.card_data import write_card
from flowdistill.export.cards import (
    about_labels,
    about_size,
    about_types,
    class_record,
    code,
    constant_arguments,
    four_labels,
    origin,
    pixel_arguments,
)
from flowdistill.export.few_step import StockSteps, native_times, rounded_times, stock_steps
from flowdistill.export.lora import save_lora
from flowdistill.export.prompt_pipelines import assembled_pipeline, prompt_call, stock_pipeline
from flowdistill.export.time_fold import fold_time, time_folds
from flowdistill.networks.backbones import last_linear
from flowdistill.networks.lora import merged
from flowdistill.networks.storage import SIDECAR
from flowdistill.students.flow_map import FlowMap
from flowdistill.students.steps import Steps
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import portable_path
from flowdistill.utils.hashing import checksums


def export_steps(student: Student, steps: Steps, target: Path, guidance_scale: float | None = None) -> None:
    """Write a student of several calls, ``steps``, which have no :func:`flowdistill.export.few_step.few_step_problem`.

    Where the pipeline passes no class labels on, each class becomes a pipeline of its own, ``class-0`` ..., with the
    embedding of its label in the network's biases, and ``manifest.json`` says which is whose.

    A generator's network stays as it is. What a flow map is told of the ends of its jumps, and of guidance, is folded
    into its time embedding, exactly at the timesteps of these steps.

    Raises:
        UserError: a guidance scale that is not the student's, a latent pipeline without an autoencoder, or a time
            embedding that does not tell the timesteps apart.
    """
    student.scalars(guidance_scale)
    found = stock_steps(student, student.network.velocity, steps)
    assert found is not None
    backbone, folds = plain_backbone(student), time_folds(student, steps, guidance_scale)
    fold_time(backbone, folds)
    scale = student.info.guidance_scale if guidance_scale is None else guidance_scale
    written = Written(student, steps, found, scale, max((fold.condition for fold in folds.values()), default=None))
    call = _call(student, found)
    if student.classes is None or found.takes_labels:
        _write(written, backbone, call, target, class_record(student))
        card = _card(written, code(call)) + (save_lora(student, target, folds, found, steps) or "")
        write_card(target, card, student, len(steps))
        return
    labels = student.classes.shown
    names = [f"class-{label}" for label in labels]
    embedding = _without_labels(backbone)
    layer = last_linear(student.network.velocity.family.time_embeddings(backbone)[0])
    bias = layer.bias.detach().clone()
    for label, name in zip(labels, names, strict=True):
        with torch.no_grad():
            layer.bias.copy_(bias + embedding[label])
        _write(written, backbone, call, target / name, {"label": label})
        card = _card(written, code(call), f" Images of class {label}.")
        write_card(target / name, card, student, len(steps))
    pipelines = [{"folder": name, "label": label, "sha256": checksums(target / name)}
                 for label, name in zip(labels, names, strict=True)]
    (target / "manifest.json").write_text(json.dumps({"pipelines": pipelines}, indent=1) + "\n", encoding="utf-8")
    card = _card(written, code(call, f"path/to/this/folder/{names[0]}"),
                 f" Each class is a pipeline of its own, for a {found.loop.pipeline} passes no labels on.")
    write_card(target, card, student, len(steps))


class Written(NamedTuple):
    """What the files of a folder say: the student, its steps, what takes them, the guidance scale in the weights, and
    the condition number of the fold; None without one."""

    student: Student
    steps: Steps
    found: StockSteps
    guidance_scale: float
    condition: float | None


def plain_backbone(student: Student) -> Any:
    """A copy of the network on the CPU, adapters merged, without flowdistill's hooks."""
    backbone = merged(student.network.velocity.backbone)
    for module in student.network.velocity.family.time_embeddings(backbone):
        module._forward_hooks.clear()
    return backbone


def _without_labels(backbone: Any) -> torch.Tensor:
    """Take the label embedding (classes, D) out of a UNet2DModel, which adds it to its time embedding."""
    embedding = backbone.class_embedding.weight.detach().clone()
    backbone.class_embedding = None
    backbone.register_to_config(num_class_embeds=None)
    return embedding


def _write(written: Written, backbone: nn.Module, call: str, folder: Path, about: dict[str, Any]) -> None:
    """The pipeline, and flowdistill.json: what makes a student of it again, beside the arguments of the call."""
    student, found = written.student, written.found
    scheduler = found.scheduler()
    kind = found.loop.pipeline
    if student.prompts is not None:
        pipeline = assembled_pipeline(student, backbone, scheduler)
    elif kind == "DiTPipeline":
        if not isinstance(student.codec, VaeCodec):
            raise UserError("a DiTPipeline needs an autoencoder, and this student has none")
        pipeline = DiTPipeline(transformer=backbone, vae=student.codec.vae, scheduler=scheduler)
    else:
        pipeline = (DDPMPipeline if kind == "DDPMPipeline" else ConsistencyModelPipeline)(backbone, scheduler)
    pipeline.save_pretrained(folder)
    info, steps = student.info, written.steps
    if isinstance(student, FlowMap) and steps.stepping == "deterministic":  # the fold is of these aims, and no others
        steps = replace(steps, whole=True)
    record = {
        "call": constant_arguments(call),
        "student_steps": steps.to_json(),
        "timesteps": native_times(student.network.velocity.path, written.steps),
        "method": info.method,
        "base_model": portable_path(info.base_model),
        "guidance_scale": written.guidance_scale,
    }
    (folder / SIDECAR).write_text(json.dumps(record | about, indent=2) + "\n", encoding="utf-8")


def _call(student: Student, found: StockSteps) -> str:
    steps = found.written_arguments
    if student.prompts is not None:
        velocity = student.network.velocity
        _, facts = stock_pipeline(student.prompts, velocity.family)
        # A network with guidance as an input is asked at 1 by a generator, whatever it has learned.
        guided = velocity.family.takes_guidance(velocity.backbone)
        return prompt_call(student, steps, "guidance_scale=1" if guided else facts.no_guidance)
    if found.loop.pipeline == "DiTPipeline":
        return f"pipe(class_labels={four_labels(student)}, {steps}, guidance_scale=1)"
    return f"pipe({pixel_arguments(student, steps, found.takes_labels)})"


# --- the card


def _card(written: Written, how: str, more: str = "") -> str:
    student, steps, found = written.student, written.steps, written.found
    path, count = student.network.velocity.path, len(steps)
    native = native_times(path, steps)
    kept = " and ".join(f"`{name}`" for name, value in found.arguments.items() if value is not None)
    rows = "".join(f"| {k} | {t:.6f} | {timestep:.6g} |\n"
                   for k, (t, timestep) in enumerate(zip(steps.times, native, strict=True), start=1))
    c = path.coefficients(torch.tensor([steps.times[-1]], dtype=torch.float64))
    last = steps.times[-1] * (1 - steps.times[-1] * c.state.item())
    return (
        f"# A generator of {count} steps\n\n{origin(student)} {count} network calls an image; guidance scale "
        f"{written.guidance_scale} is part of the weights.{more}\n\n{how}\n"
        f"It is made for exactly these {count} steps: leave {kept} and the scheduler as they are. With other ones it "
        "makes other images without a word, or ends in an error.\n\n"
        f"The scheduler is a `{found.kind.__name__}`.\n\n| step | t | timestep |\n|---|---|---|\n{rows}\n"
        f"The first state is {steps.start_scale:.6f} times unit noise on x_t = (1 - t) x_0 + t n. "
        f"{_between(found, steps)}\n{_about_fold(written)}"
        + _about_rounding(found, native) + about_labels(student) + about_size(student)
        + about_types(student, last, "its last step")
    )


def _between(found: StockSteps, steps: Steps) -> str:
    if steps.stepping == "deterministic":
        return "The steps are deterministic: there is no new noise between them."
    told = "The steps are stochastic: before each but the first the scheduler draws new noise. "
    if found.loop.seeded:
        return told + "The pipeline's `generator` is that of this noise too."
    return told + (f"A {found.loop.pipeline} takes it from torch's global generator, not from its `generator`: call "
                   "`torch.manual_seed(0)` first to have the same images again, which then also depend on how many are "
                   "made at once.")


def _about_fold(written: Written) -> str:
    if written.condition is None:
        return ""
    return ("\nIts network is told the time it is called at and no other: where each jump ends is in the last layer of "
            f"the time embedding, exactly at these {len(written.steps)} timesteps (condition number "
            f"{written.condition:.3g}).\n")


def _about_rounding(found: StockSteps, native: list[float]) -> str:
    pairs = rounded_times(native, torch.bfloat16) if found.loop.rounded else []
    if not pairs:
        return ""
    told = ", ".join(f"{value:.6g} to {rounded:g}" for value, rounded in pairs)
    return (f"\nIn bfloat16 a {found.loop.pipeline} rounds the timesteps that it tells its network ({told}); the "
            "student was not trained at these.\n")
