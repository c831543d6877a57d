"""A one-step student as a stock diffusers pipeline: every constant folds into a weight, nothing custom remains.

The student's one call is affine in noise and in the network's output,

    latents = k_noise * n + k_output * network(k_input * n, constant time, constant embeddings),

so the time embedding becomes its own constant (in the bias of its last layer), ``k_input`` and ``k_output`` go into
the first and the last layer, and a stock scheduler's single step supplies ``k_noise``.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
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
from flowdistill.export.few_step import few_step_problem, native_times
from flowdistill.export.few_step_pipelines import export_steps
from flowdistill.export.finite import overflowing
from flowdistill.export.folding import fold_scales, folding_problem
from flowdistill.export.lora import save_lora
from flowdistill.export.prompt_pipelines import prompt_pipeline
from flowdistill.export.time_fold import time_folds
from flowdistill.networks.backbones import last_linear
from flowdistill.networks.lora import merged
from flowdistill.networks.storage import SIDECAR
from flowdistill.networks.velocity import ExtendedVelocity, VelocityNetwork
from flowdistill.students.flow_map import FlowMap
from flowdistill.students.generator import Generator
from flowdistill.students.steps import Steps
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_place, local_path
from flowdistill.utils.logging import log_once
from flowdistill.utils.randomness import indexed_noise

SMALLEST_ALPHA = 3e-3
"""Of one timestep of an exported DDIM schedule: float32 has 1 - alpha to a relative 2e-5."""

AGAIN = ("so it is not exported: its training diverged, or it overflows in its precision; train it again, with a lower "
         "learning rate, in another output_dir")


@functools.singledispatch
def export(
    student: Student, folder: str | os.PathLike[str], guidance_scale: float | None = None, steps: int | None = None
) -> Path:
    """Write ``student`` as a pipeline folder that ``DiffusionPipeline.from_pretrained`` loads without flowdistill.

    ``UNet2DModel`` becomes a ``ConsistencyModelPipeline``, or a ``DDPMPipeline`` where it draws rectangles,
    ``DiTTransformer2DModel`` a ``DiTPipeline`` (call it with ``guidance_scale=1``), and a text-to-image student a
    pipeline of its teacher's class. A student of one call samples with ``num_inference_steps=1``; one of several is its
    network beside a scheduler that takes its steps (:mod:`flowdistill.export.few_step`). A flow map between any two
    times becomes a pipeline of as many calls as are asked for, of those alone. The folder's
    README.md says how to call it; its flowdistill.json has the arguments of that call, and says which class labels
    there are and which one means "no class". Adapters are merged into the weights; where the teacher's pipeline takes
    LoRA files, the folder has one too (:mod:`flowdistill.export.lora`). ``export.register`` adds what another kind of
    student becomes.

    Args:
        student: on a diffusers backbone.
        folder: where to write; must not exist or be empty.
        guidance_scale: the scale to freeze into the weights; None for the student's default.
        steps: calls of the pipeline; None for all of the student's.

    Raises:
        UserError: the folder is not empty or cannot be made, weights or images that are not finite, or no stock
            pipeline makes this student's images (the message says why).
    """
    target = local_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give a new folder for the exported pipeline")
    check_place(target)
    if not isinstance(student.network, ExtendedVelocity):
        raise UserError("only students on a diffusers backbone can be exported")
    if (broken := overflowing(student.network.named_parameters())) is not None:
        raise UserError(f"the student's weights are not finite, or too large ({broken}), {AGAIN}")
    chain = _chain(student, steps)
    if (problem := export_problem(student, student.network.velocity, chain)) is not None:
        raise UserError(problem)
    if not _first_latents(student, guidance_scale).isfinite().all():
        raise UserError(f"what the student makes is not finite, {AGAIN}")
    if chain is not None:
        export_steps(student, chain, target, guidance_scale)
        return target
    backbone = _with_constant_time(student, guidance_scale)
    c = student.network.velocity.path.coefficients(torch.tensor([student.t_start], dtype=torch.float64))
    t, state, output = student.t_start, c.state.item(), c.output.item()
    k_input, k_noise, k_output = t * c.input_scale.item(), t * (1 - t * state), -t * output
    if student.prompts is not None:
        pipeline, call = prompt_pipeline(student, backbone, k_input, k_noise, k_output)
    elif student.network.velocity.family.student_pipeline == "ConsistencyModelPipeline":
        make = _consistency_pipeline if student.shape[1] == student.shape[2] else _rectangle_pipeline
        pipeline = make(student, backbone, k_input, k_noise, k_output)
        call = f"pipe({pixel_arguments(student, 'num_inference_steps=1', labels=True)})"
    else:
        pipeline = _dit_pipeline(student, backbone, k_input, k_noise, k_output)
        call = f"pipe(class_labels={four_labels(student)}, num_inference_steps=1, guidance_scale=1)"
    pipeline.save_pretrained(target)
    record = {"call": constant_arguments(call)} | class_record(student)
    (target / SIDECAR).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    folds = time_folds(student, Steps.single(student.t_start), guidance_scale) if student.network.velocity.lora else {}
    text = _card(student, call, guidance_scale, k_noise, type(pipeline.scheduler).__name__)
    write_card(target, text + (save_lora(student, target, folds) or ""), student, 1)
    return target


@torch.no_grad()
def _first_latents(student: Student, guidance_scale: float | None) -> torch.Tensor:
    """What the student makes of one noise."""
    noise = indexed_noise(student.shape, 0, [0]).to(student.device)
    return student.sampler(guidance_scale, student.checked_steps(None))(noise, student.examples([0]))


def _chain(student: Student, steps: int | None) -> Steps | None:
    """The steps of a pipeline of several calls; None for one call."""
    count = student.checked_steps(steps)
    if isinstance(student, FlowMap) and student.chains:
        return None if count == 1 else student.chains[count - 1]
    if count != student.num_steps:
        raise UserError(f"steps is {steps}; this student becomes a pipeline of its {student.num_steps} calls only")
    return student.steps if isinstance(student, Generator) and count > 1 else None


def check_exportable(teacher: Teacher, steps: Steps | None = None) -> None:
    """Before a student of ``teacher`` trains: say that it will have no stock pipeline.

    Args:
        steps: of a student of several calls.

    Raises:
        UserError: it draws rectangles of classes, which not even the teacher's own pipeline does, or it has several
            steps that no scheduler takes. Of others there is a warning: they are of use in flowdistill.
    """
    velocity = teacher.network
    problem = export_problem(teacher, velocity, steps) if isinstance(velocity, VelocityNetwork) else None
    if problem is None:
        return
    if steps is not None or _draws_rectangles_of_classes(teacher, velocity):
        raise UserError(f"{problem}, so nothing was trained")
    log_once(f"this run's student will have no stock pipeline: {problem}")


def _draws_rectangles_of_classes(model: Teacher | Student, velocity: VelocityNetwork) -> bool:
    pixels = velocity.family.student_pipeline == "ConsistencyModelPipeline"
    return pixels and model.classes is not None and model.shape[1] != model.shape[2]


def export_problem(model: Teacher | Student, velocity: VelocityNetwork, steps: Steps | None = None) -> str | None:
    """Why no stock pipeline can make what a student of this kind makes; None where one can, as far as is known early.

    Args:
        model: a teacher, before its student trains, or the student.
        velocity: its network.
        steps: of a student of several calls.
    """
    if velocity.path.kind == "ve":
        return ("students of KarrasVe teachers cannot be exported: their network takes pixels in [0, 1], and no stock "
                "pipeline moves the input of its single step there")
    pixels = velocity.family.student_pipeline == "ConsistencyModelPipeline"
    if pixels and isinstance(model.codec, VaeCodec):
        return "students of a UNet2DModel beside an autoencoder cannot be exported: no stock pipeline has both"
    if steps is not None and len(steps) > 1:
        return few_step_problem(model, velocity, steps)
    if _draws_rectangles_of_classes(model, velocity):
        return (f"students that draw rectangles ({model.shape[1]} x {model.shape[2]}) of classes cannot be exported: "
                "no stock pipeline gives class labels to a UNet2DModel whose two sizes differ; squares of classes and "
                "rectangles without classes can be")
    return folding_problem(velocity.backbone)


@torch.no_grad()
def _with_constant_time(student: Student, guidance_scale: float | None) -> nn.Module:
    """The backbone with its whole time embedding, extra conditions included, frozen at the student's one time."""
    network = student.network
    scalars = student.scalars(guidance_scale)
    captured: dict[int, torch.Tensor] = {}
    modules = network.velocity.family.constant_embeddings(network.velocity.backbone)
    handles = [
        module.register_forward_hook(lambda m, args, out, i=i: captured.__setitem__(i, out[0].clone()))
        for i, module in enumerate(modules)
    ]
    try:
        device = student.device
        noise = torch.zeros(1, *student.shape, device=device)
        condition = student.examples([0])
        columns = {name: torch.full((1,), float(value), device=device) for name, value in scalars.items()}
        network(noise, torch.full((1,), student.t_start, dtype=torch.float64, device=device), condition, **columns)
    finally:
        for handle in handles:
            handle.remove()
    backbone = merged(network.velocity.backbone)
    for i, module in enumerate(network.velocity.family.constant_embeddings(backbone)):
        module._forward_hooks.clear()  # the hook that adds the extra embedding: it is in the constant now
        layer = last_linear(module)
        layer.weight.zero_()
        layer.bias.copy_(captured[i])
    return backbone


def _consistency_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> ConsistencyModelPipeline:
    # One step of this scheduler is c_skip * (sigma n) + c_out * network(sigma n / root). With sigma_data equal to
    # sigma - sigma_min, c_skip is 1/2, so sigma = 2 k_noise supplies any positive k_noise. For k_noise = 0 (sample
    # prediction) a tiny sigma_data makes c_skip vanish.
    if k_noise > 1e-6:
        sigma = 2 * k_noise
        # A power of two: the scheduler takes sqrt(float32(sigma_min)^2 - sigma_min^2), NaN if that rounds below 0.
        sigma_min = 2.0 ** math.floor(math.log2(sigma) - 10)
        data = sigma - sigma_min
    else:
        sigma, sigma_min, data = 1.0, 2.0**-10, 1e-5
    root = (sigma**2 + data**2) ** 0.5
    fold_scales(student, backbone, k_input * root / sigma, k_output * root / ((sigma - sigma_min) * data))
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=2, sigma_min=sigma_min, sigma_max=sigma, sigma_data=data, clip_denoised=False
    )
    return ConsistencyModelPipeline(unet=backbone, scheduler=scheduler)


def _rectangle_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> DDPMPipeline:
    if abs(k_noise - 1) < 1e-9:  # flow matching: n - network
        fold_scales(student, backbone, k_input, -k_output)
        return DDPMPipeline(unet=backbone, scheduler=FlowMatchEulerDiscreteScheduler())
    return DDPMPipeline(unet=backbone, scheduler=_one_step_ddim(student, backbone, k_input, k_noise, k_output))


def _dit_pipeline(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> DiTPipeline:
    if not isinstance(student.codec, VaeCodec):
        raise UserError("a DiTPipeline needs an autoencoder, and this student has none")
    scheduler: Any
    if abs(k_noise - 1) < 1e-9:  # flow matching: n - network
        scheduler = FlowMapEulerDiscreteScheduler()
        fold_scales(student, backbone, k_input, -k_output)
    else:
        scheduler = _one_step_ddim(student, backbone, k_input, k_noise, k_output)
    return DiTPipeline(transformer=backbone, vae=student.codec.vae, scheduler=scheduler)


def _one_step_ddim(
    student: Student, backbone: nn.Module, k_input: float, k_noise: float, k_output: float
) -> DDIMScheduler:
    """DDIM from its last time to the data: x_0 = (n - sigma network) / alpha (epsilon) for k_noise > 1, and
    x_0 = alpha n - sigma network (v_prediction) below; the remaining scales are folded into ``backbone``."""
    alpha = 1 / k_noise if k_noise > 1 else k_noise
    sigma = (1 - alpha**2) ** 0.5
    gain = sigma / alpha if k_noise > 1 else sigma
    fold_scales(student, backbone, k_input, -k_output / gain)
    betas = _betas(alpha**2)
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        timestep_spacing="trailing",
        prediction_type="epsilon" if k_noise > 1 else "v_prediction",
        clip_sample=False,
    )


def _betas(wanted: float) -> list[float]:
    """Two betas or more, whose float32 product of 1 - beta is ``wanted`` (0 to 1) to float32's last digits.

    One beta near 1 cannot do it: 1 - beta goes in steps of 6e-8, so that the noise's share wanted^-1/2 would be off by
    up to 3e-8 wanted^-3/2 / 2: by 0.06 times the noise from the last timestep of a DDPM with linear betas.
    """
    if wanted == 0:
        return [0.0, 1.0]
    count = max(2, math.ceil(math.log(wanted) / math.log(SMALLEST_ALPHA)))
    root = wanted ** (1 / count)
    betas = [torch.tensor(1 - root, dtype=torch.float32)] * (count - 2)
    made = torch.ones(())
    for beta in betas:  # all in float32, one after the other, as the scheduler computes
        made = made * (1 - beta)
    rest = wanted / made.item()
    first = 1 - torch.linspace(max(root / 2, rest), root, 2**14)
    second = 1 - (rest / (1 - first.double())).float()
    best = (made * (1 - first) * (1 - second) - wanted).abs().argmin()
    return [beta.item() for beta in (*betas, first[best], second[best])]


def _card(student: Student, call: str, guidance_scale: float | None, k_noise: float, scheduler: str) -> str:
    scale = student.info.guidance_scale if guidance_scale is None else guidance_scale
    timestep, = native_times(student.network.velocity.path, Steps.single(student.t_start))
    return (
        f"# A one-step generator\n\n{origin(student)} "
        f"One network call an image; guidance scale {scale} is part of the weights.\n\n"
        + code(call) + f"\nThe network's one call is at t = {student.t_start:.6f} (timestep {timestep:.6g}), which "
        f"is part of the weights, and one step of the `{scheduler}` makes the sample of it.\n"
        + about_labels(student) + about_size(student) + about_types(student, k_noise)
    )
