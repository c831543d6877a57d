"""What the README.md and the flowdistill.json of an exported pipeline say."""

from __future__ import annotations

import ast
from typing import Any

import torch

from flowdistill.conditioning.pipeline_lora import with_parts
from flowdistill.export.prompt_pipelines import stock_pipeline
from flowdistill.students.student import Student
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.files import portable_path

MOST_OF_PIL = 4
"""Channels of a picture; what has more is an array."""
ROUNDED = 0.02
"""Rounding errors below this, a hundredth of the pixels' range, are not worth a word."""


def constant_arguments(call: str) -> dict[str, Any]:
    """The arguments of a call, as Python writes it, that are the same for all images: steps, guidance and size."""
    written = ast.parse(call, mode="eval").body
    assert isinstance(written, ast.Call)
    return {word.arg: ast.literal_eval(word.value) for word in written.keywords
            if word.arg is not None and word.arg not in ("batch_size", "class_labels", "output_type")}


def four_labels(student: Student) -> list[int]:
    """Class labels for an example, of those that the student was trained for."""
    assert student.classes is not None
    return [student.classes.shown[i % len(student.classes.shown)] for i in range(4)]


def pixel_arguments(student: Student, steps: str, labels: bool) -> str:
    """The arguments of a pixel pipeline's call: four images, the steps, and class labels where it takes them."""
    arguments = f"batch_size=4, {steps}"
    if labels and student.classes is not None:
        arguments += f", class_labels={four_labels(student)}"
    return arguments + (', output_type="np"' if student.shape[0] > MOST_OF_PIL else "")


def class_record(student: Student) -> dict[str, Any]:
    """Which class labels there are and which one means "no class", for flowdistill.json."""
    if student.classes is None:
        return {}
    return {"num_classes": student.num_classes, "null_label": student.classes.null_label,
            "labels": student.classes.own}


def origin(student: Student) -> str:
    """The sentence that says where a student comes from."""
    info = student.info
    base, lora = portable_path(info.base_model) or "a diffusers pipeline", info.base_lora
    if lora is not None:
        lora = lora._replace(source=portable_path(lora.source))
    base = with_parts(base, lora, None if info.base_vae is None else portable_path(info.base_vae.source))
    return f"Distilled with {info.method or 'flowdistill'} from {base}."


def code(call: str, folder: str = "path/to/this/folder") -> str:
    """The lines of Python that load a pipeline and call it."""
    return (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{folder}")\nimages = {call}.images\n```\n'
    )


def about_labels(student: Student) -> str:
    """Which class labels the pipeline takes, in words."""
    classes = student.classes
    if classes is None:
        return ""
    shown = f"0 to {classes.num_classes - 1}" if classes.own is None else ", ".join(map(str, classes.own))
    null = "" if classes.null_label is None else (f"; label {classes.null_label} means \"no class\" and is none of "
                                                  "them, which flowdistill.json says too")
    return f"\nClass labels are {shown}{null}.\n"


def about_size(student: Student) -> str:
    """That a call needs its size, in words; nothing where the pipeline's own default is the student's."""
    velocity, prompts = student.network.velocity, student.prompts
    if prompts is None:
        return ""
    name, _ = stock_pipeline(prompts, velocity.family)
    known = velocity.family.sample_size(velocity.backbone, name, student.shape) is not None
    if known or tuple(student.shape) == velocity.family.shape(velocity.backbone):
        return ""
    height, width = prompts.image_size
    return (f"\nIt was trained at a height of {height} and a width of {width} pixels. Without them in its call a "
            f"{name} draws another size.\n")


def rounding(k_noise: float, dtype: torch.dtype) -> float:
    """About how far a student in ``dtype`` is from itself in float32: a standard deviation, where latents have about 1.

    Its one step takes the difference of the noise and of what the network returns, each rounded, k_noise times. The
    factor 3 beside one rounding of unit noise is what small networks were measured to have: 2 to 4.
    """
    noise = torch.randn(2**14, generator=torch.Generator().manual_seed(0))
    return 3 * k_noise * (noise.to(dtype).float() - noise).std().item()


def about_types(student: Student, k_noise: float, which: str = "its one step") -> str:
    """Which types of numbers are good enough for the weights, in words; nothing where all are.

    Args:
        k_noise: see :func:`rounding`; of the step that makes the sample.
        which: that step, in words.
    """
    half, brain = (rounding(k_noise, dtype) for dtype in (torch.float16, torch.bfloat16))
    if brain < ROUNDED:
        return ""
    what = "latents" if isinstance(student.codec, VaeCodec) else "pixels from -1 to 1"
    good = "float32 or float16" if half < ROUNDED else "float32"
    return (
        f"\nLoad it in {good}, not in bfloat16: {which} multiplies what its network rounds by {k_noise:.3g}. In "
        f"bfloat16 its {what} are off by about {brain:.2g} (standard deviation), in float16 by about {half:.2g}.\n"
    )
