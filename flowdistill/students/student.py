"""What all students share: a network called once, its conditions and its codec, and sampling."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.prompts import PromptConditions, encode
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students.info import StudentInfo
from flowdistill.students.storage import read_student, save_student
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.devices import as_tensor
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.registry import Registry
from flowdistill.utils.seeds import check_seed

STUDENT_KINDS: Registry[type[Student]] = Registry(
    "kind of student", package="flowdistill.methods", group="flowdistill.students"
)
"""Kind -> class. A method may bring a kind of its own, which is known once the method's module is imported."""


class Student(nn.Module, ABC):
    """A network called once, or a few times, with its conditions, its codec and how it is used; :class:`FlowMap` and
    ``Generator`` say what map the calls make.

    Args:
        network: ``(start, t, condition, **scalars) -> velocity``; usually an :class:`ExtendedVelocity`.
        shape, codec, classes, scheduler, prompts: as of its teacher.
        t_start: linear time of the first call.
        info: see :class:`StudentInfo`.
    """

    kind: ClassVar[str]
    """Its name on disk."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Make a class with a ``kind`` of its own known to :func:`flowdistill.load_student`."""
        super().__init_subclass__(**settings)
        if "kind" in cls.__dict__:
            STUDENT_KINDS.register(cls.kind)(cls)

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        t_start: float,
        codec: PixelCodec | VaeCodec,
        classes: ClassLabels | None,
        info: StudentInfo,
        scheduler: Any = None,
        prompts: PromptConditions | None = None,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.shape = tuple(shape)
        self.t_start = t_start
        self.codec = codec
        self.classes = classes
        self.info = info
        self.scheduler = scheduler
        self.prompts = prompts

    @classmethod
    def around(cls, network: nn.Module, teacher: Teacher, t_start: float, info: StudentInfo) -> Self:
        """A student of ``teacher`` around ``network``."""
        info = replace(info, base_lora=teacher.lora, base_quantize=teacher.quantize, base_vae=teacher.vae)
        return cls(network, teacher.shape, t_start, teacher.codec, teacher.classes, info, teacher.scheduler,
                   teacher.prompts)

    @staticmethod
    def network_from(
        teacher: Teacher, given: nn.Module | None, lora: LoraSettings | None, *wiring: Any
    ) -> nn.Module:
        """The network ``given``, or the teacher's with an :class:`ExtendedVelocity` of this ``wiring`` around it.

        Raises:
            UserError: adapters for a network that is given.
        """
        if given is None:
            return ExtendedVelocity(teacher.student_copy(lora), *wiring)
        if lora is not None:
            raise UserError("method.student is 'lora', but the student's network was given; leave it at full")
        return given

    def with_network(self, network: nn.Module) -> Self:
        """The same student around another network (an EMA copy)."""
        return type(self)(network, self.shape, self.t_start, self.codec, self.classes, self.info, self.scheduler,
                          self.prompts)

    @abstractmethod
    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        """The extra conditions of the network's call to data."""

    @property
    def num_steps(self) -> int:
        """Network calls of an image."""
        return 1

    @property
    def step_counts(self) -> Sequence[int]:
        """The numbers of calls that are shown and measured, rising; the last is :attr:`num_steps`."""
        return range(1, self.num_steps + 1)

    def calls_in_words(self) -> str:
        """How often the network is called for an image, and at which times."""
        return f"one of the network for an image, from t = {self.t_start:.4f}"

    def checked_steps(self, steps: int | None) -> int:
        """The number of network calls asked for, or of an image (None).

        Raises:
            UserError: more than the student was trained for, or less than one.
        """
        if steps is None:
            return self.num_steps
        if not 1 <= steps <= self.num_steps:
            allowed = "1 call" if self.num_steps == 1 else f"{self.num_steps} calls, and takes 1 to {self.num_steps}"
            raise UserError(f"steps is {steps}; this student was trained for {allowed}")
        return steps

    def sampler(
        self, guidance_scale: float | None = None, steps: int | None = None
    ) -> Callable[[Tensor, Condition | None], Tensor]:
        """The way to data for many batches of noise: :meth:`forward` bit for bit, its constants computed once.

        Args:
            guidance_scale: see :meth:`forward`.
            steps: network calls; None for all that the student was trained for.

        Returns:
            ``(noise, condition) -> latents``; of the weights as they are now, so not one to keep while they train.

        Raises:
            UserError: a guidance scale or steps outside the student's range.
        """
        self.checked_steps(steps)
        scalars, network = self.scalars(guidance_scale), self.network
        if not isinstance(network, ExtendedVelocity):
            return lambda noise, condition: self(noise, condition, guidance_scale)

        def one(value: Tensor | float, dtype: torch.dtype) -> Tensor:
            return as_tensor(value, dtype, self.device).reshape(1)

        # float64: near t = 1 the last digits of the time matter, for they are divided by 1 - t.
        velocity = network.fixed(one(self.t_start, torch.float64),
                                 **{name: one(value, torch.float32) for name, value in scalars.items()})

        def call(noise: Tensor, condition: Condition | None) -> Tensor:
            start = self.t_start * noise
            return start - self.t_start * velocity(start, condition)

        return call

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else self.classes.num_classes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _guidance(self, scale: Tensor | float | None) -> Tensor | float:
        if scale is None or isinstance(scale, Tensor):
            return self.info.guidance_scale if scale is None else scale
        low, high = self.info.guidance_range or (self.info.guidance_scale, self.info.guidance_scale)
        if not low <= scale <= high:
            allowed = f"{low} to {high}" if low < high else f"only {low}"
            raise UserError(f"guidance_scale is {scale}; this student was distilled for {allowed}")
        return scale

    def encode(
        self, labels: Sequence[int] | Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> Condition | None:
        """Labels (B,) or prompts (B) as a condition; raises :class:`UserError` for what this student does not take."""
        condition = encode(self.classes, self.prompts, labels, prompts, None, self.device)
        if condition is not None and self.classes is not None and self.classes.own is not None:
            strange = set(condition.tensors["class_labels"].tolist()) - set(self.classes.own)
            if strange:
                own = listed(self.classes.own)
                raise UserError(f"label {min(strange)} is none of those that this student was trained for: {own}")
        return None if condition is None else condition.to(self.device)

    def examples(self, indices: Sequence[int]) -> Condition | None:
        """Conditions of samples with these indices: the classes, or the prompts it was trained on, in turn."""
        if self.prompts is not None:
            return self.prompts.examples(indices).to(self.device)
        return None if self.classes is None else self.classes.examples(indices).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *shape) to images (B, C, H, W) in [0, 1]."""
        return self.codec.decode(latents)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int] | None = None,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        guidance_scale: float | None = None,
        prompts: Sequence[str] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) in [0, 1], on the CPU.

        Image i depends on ``seed``, i and its label or prompt only, not on the batch size.

        Args:
            labels: one an image; None cycles through the classes of a conditional student.
            num_images: N; may be omitted when labels or prompts are given, which are cycled to N.
            seed: 0 to 2^64 - 1; each gives other images.
            batch_size: images in one network call.
            guidance_scale: see :meth:`forward`.
            prompts: one an image; None cycles through those a text-to-image student was trained on.
            steps: network calls an image, 1 to :attr:`num_steps`; None for all.

        Raises:
            UserError: N < 1, a label or a seed out of range, or a guidance scale or steps outside the student's range.
        """
        return torch.cat(list(self.batches(labels, num_images, seed, batch_size, guidance_scale, prompts, steps)))

    @torch.no_grad()
    def batches(
        self,
        labels: Sequence[int] | None = None,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        guidance_scale: float | None = None,
        prompts: Sequence[str] | None = None,
        steps: int | None = None,
    ) -> Iterator[Tensor]:
        """Generate as :meth:`generate` does, batch by batch: only the current one is in memory."""
        check_seed(seed)
        count, conditions = self.plan(labels, num_images, batch_size, prompts)
        sample = self.sampler(guidance_scale, steps)
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            noise = indexed_noise(self.shape, seed, indices).to(self.device)
            yield self.decode(sample(noise, conditions(indices))).cpu()

    def plan(
        self, labels: Sequence[int] | None, num_images: int | None, batch_size: int, prompts: Sequence[str] | None
    ) -> tuple[int, Callable[[Sequence[int]], Condition | None]]:
        """Number of images, and the condition of those with given indices, for the arguments of :meth:`generate`."""
        given = labels if labels is not None else prompts
        classes = 1 if self.classes is None else len(self.classes.shown)
        count = num_images if num_images is not None else len(given) if given is not None else classes
        if count < 1 or batch_size < 1:
            raise UserError(f"num_images is {count} and batch_size {batch_size}; both must be at least 1")
        # Encoded once for all batches; without prompts to show there is nothing to go through.
        listless = self.prompts is not None and self.prompts.prompts is None
        listed = None
        if given is not None or listless:
            listed = self.encode(labels, prompts)
        elif self.classes is not None:
            listed = self.examples(range(classes))
        if listed is None:
            return count, self.examples
        rows = listed
        return count, lambda indices: rows[torch.tensor(list(indices), device=self.device) % len(rows)]

    # --- as one of several networks, and on disk

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The networks of which one makes an image: one, or one for each part of the conditions."""
        return [self.network]

    @property
    def class_owner(self) -> Sequence[int] | None:
        """Number of the network that makes each class label; None where one network makes all."""
        return None

    def own_description(self) -> dict[str, Any]:
        """What its description on disk has besides that of every student, or instead of it."""
        return {}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the student to ``folder`` (safetensors and JSON), replacing it in one move."""
        save_student(self, folder)

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any], resident: int | None = None) -> Student:
        """The student that :meth:`save` has written, frozen; see :func:`flowdistill.load_student`."""
        return cls(*read_student(folder, description)).requires_grad_(False).eval()
