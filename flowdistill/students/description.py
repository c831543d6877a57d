"""A student in words."""

from __future__ import annotations

from torch import nn

from flowdistill.conditioning.pipeline_lora import with_parts
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec


def describe(student: Student) -> str:
    """What a student is, where it comes from and what it takes, one fact a line."""
    info, networks = student.info, student.networks
    vae = None if info.base_vae is None else info.base_vae.source
    origin = f", distilled from {with_parts(info.base_model, info.base_lora, vae)}" if info.base_model else ""
    latents = "latents of an autoencoder" if isinstance(student.codec, VaeCodec) else "pixels in [-1, 1]"
    lines = [
        f"student       {student.kind.replace('_', ' ')}, by {info.method or 'an unknown method'}{origin}",
        f"call          {student.calls_in_words()}",
        f"backbone      {_backbone(networks[0])}"
        + (f"; {len(networks)} networks, of which one makes an image" if len(networks) > 1 else ""),
        f"sample        {' x '.join(map(str, student.shape))}, {latents}",
        f"conditions    {_conditions(student)}",
        f"guidance      {_guidance(student)}",
    ]
    return "\n".join(lines)


def _backbone(network: nn.Module) -> str:
    backbone = getattr(getattr(network, "velocity", None), "backbone", network)
    parameters = sum(p.numel() for p in network.parameters())
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return f"{type(backbone).__name__}, {parameters / 1e6:.2f} M parameters, {dtype}"


def _conditions(student: Student) -> str:
    if student.prompts is not None:
        known = student.prompts.prompts
        return f"prompts, by {student.prompts.describe()}" + (f"; {len(known)} to show" if known else "")
    if student.classes is None:
        return "none (unconditional)"
    own = student.classes.own
    return f"class labels {f'0 to {student.classes.num_classes - 1}' if own is None else ', '.join(map(str, own))}"


def _guidance(student: Student) -> str:
    low, high = student.info.guidance_range or (student.info.guidance_scale,) * 2
    if low == high:
        return f"scale {low:g} is part of the weights"
    return f"an input of the network, {low:g} to {high:g}; {student.info.guidance_scale:g} where none is asked for"
