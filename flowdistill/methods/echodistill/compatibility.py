"""Whether two pipelines speak of the same things: the same words and the same latents."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import indexed_noise

PIPELINE = "StableDiffusionPipeline"
ROUNDING = 1e-2  # relative difference of weights that were stored in another precision
SAME_IMAGE = 0.02  # mean difference of pixels in [0, 1]


def check_pair(teacher: Teacher, student: Teacher) -> None:
    """UserError unless both are Stable Diffusion pipelines with one text encoder and one latent space between them.

    Equal up to rounding is good enough, with a warning; schedules and prediction types may differ. Of a teacher with
    another autoencoder (``teacher.vae``), which both then have, the student's own may be like the one before or after.
    """
    for role, model in (("teacher.source", teacher), ("method.student", student)):
        kind = None if model.prompts is None else model.prompts.text.pipeline_class
        if kind != PIPELINE:
            raise UserError(f"{role} {model.source} is {'no text-to-image pipeline' if kind is None else 'a ' + kind}; "
                            f"this method takes pipelines of the class {PIPELINE}")
    _check_texts(teacher, student)
    _check_latents(teacher, student)


def _check_texts(teacher: Teacher, student: Teacher) -> None:
    assert teacher.prompts is not None and student.prompts is not None
    with teacher.prompts.text.opened(torch.device("cpu")) as one, student.prompts.text.opened(
        torch.device("cpu")
    ) as other:
        if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise _other_text(teacher, student, "their tokenizers have other words")
        apart = _difference(one.text_encoder.state_dict(), other.text_encoder.state_dict())
    if apart is None:
        raise _other_text(teacher, student, "the weights have other names or sizes")
    if apart > ROUNDING:
        raise _other_text(teacher, student, f"weights differ by {apart:.1e} of their size")
    if apart:
        warnings.warn(f"the text encoders of {teacher.source} and {student.source} differ by {apart:.1e} of their "
                      "weights' size; the word is learned in the teacher's", stacklevel=3)


def _other_text(teacher: Teacher, student: Teacher, how: str) -> UserError:
    return UserError(f"method.student {student.source} has another text encoder than the teacher {teacher.source} "
                     f"({how}), so a word of one means nothing to the other; give a student that was distilled from "
                     "this teacher, or its teacher")


def _check_latents(teacher: Teacher, student: Teacher) -> None:
    if teacher.shape != student.shape:
        problem: str | None = f"latents of {_size(student)} and {_size(teacher)}"
    else:
        problem = _codecs_apart(teacher, teacher.codec, student.codec)
        if problem is not None and teacher.own_codec is not None:  # another decoder of the latents that both have
            problem = _codecs_apart(teacher, teacher.own_codec().to(teacher.device), student.codec)
    if problem is not None:
        raise UserError(f"method.student {student.source} has another latent space than the teacher {teacher.source} "
                        f"({problem}); give a student with the teacher's autoencoder")


def _codecs_apart(teacher: Teacher, one: PixelCodec | VaeCodec, other: PixelCodec | VaeCodec) -> str | None:
    """How two codecs show that their latents are not the same; None: they are."""
    if not isinstance(one, VaeCodec) or not isinstance(other, VaeCodec):
        return "one of them has no autoencoder" if type(one) is not type(other) else None
    if _difference(one.vae.state_dict(), other.vae.state_dict()) == 0 and (one.scale, one.shift) == (
        other.scale, other.shift,
    ):
        return None
    latents = indexed_noise(teacher.shape, 0, range(1)).to(teacher.device)
    apart = (one.decode(latents) - other.to(teacher.device).decode(latents)).abs().mean().item()
    return f"the same latents become images {apart:.2f} apart" if apart > SAME_IMAGE else None


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """Largest difference of two networks' weights, each relative to its tensor's size; None: they are not alike."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return None
    largest = 0.0
    for name, value in one.items():
        value, there = value.detach().cpu().double(), other[name].detach().cpu().double()
        size = value.square().mean().sqrt().item()
        largest = max(largest, (value - there).abs().max().item() / max(size, 1e-12)) if value.numel() else largest
    return largest


def _size(model: Teacher) -> str:
    return " x ".join(map(str, model.shape))
