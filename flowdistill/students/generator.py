"""The generator: the teacher's denoised estimate at one fixed time or a few, trained to be a sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.storage import SEVERAL_STEPS, SIDECAR
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.students.steps import Noise, Steps, estimate, noise_of, rollout, teacher_times
from flowdistill.students.storage import read_student
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError

START_UNITS = ("linear", "timestep", "sigma")
UNITS_IN_WORDS = {"timestep": "a timestep of the network", "sigma": "a noise level (sigma)"}
APART = 1e-6
"""The least between the times of two calls, and between the last one's and 0: a thousandth of a timestep."""


def start_time(teacher: Teacher, start: float | None, unit: str = "linear", name: str = "method.start") -> float:
    """The linear time of a generator's call.

    Args:
        start: None for the teacher's t_max.
        unit: ``"linear"``; ``"timestep"``, what the teacher's network calls it (399 of 1000 for a DDPM teacher); or
            ``"sigma"``, noise over signal, EDM's sigma_init: t = sigma / (1 + sigma).
        name: of the setting, for the message.

    Raises:
        UserError: a time outside the teacher's range.
    """
    if start is None:
        return teacher.t_max
    if unit == "sigma":
        t = start / (1 + start)
    else:
        t = start if unit == "linear" else teacher.path.native_to_linear(torch.tensor(start)).item()
    if not (t > 0 and teacher.t_min <= t <= teacher.t_max):
        above = "" if teacher.t_min > 0 else ", and above 0"
        hint, other = "", "timestep" if teacher.path.kind in ("flow", "vp") else "sigma"
        if unit == "linear" and start > 1:  # a number as the teacher's own schedule has it
            hint = f"; if {start:g} is {UNITS_IN_WORDS[other]}, set method.start_unit to {other}"
        raise UserError(f"{name} is {start} ({unit}), which is t = {t:.6g}; this teacher allows "
                        f"{teacher.t_min:.6g} to {teacher.t_max:.6g}{above}{hint}")
    return t


def given_times(
    teacher: Teacher, count: int, start: float | None, unit: str, times: Sequence[float] | None
) -> tuple[float, ...]:
    """The linear times of a generator's ``count`` calls.

    Args:
        start, unit: see :func:`start_time`; of the first call.
        times: in ``unit``, falling; None for those of the teacher's own sampler, from ``start`` on.

    Raises:
        UserError: a list of another length, that does not fall, that leaves the teacher's range or does not begin at
            ``start``.
    """
    first = start_time(teacher, start, unit)
    if times is None:
        own = teacher_times(teacher.path, count)
        if start is None:
            return (first, *own[1:])
        later = [first * t / own[0] for t in own[1:]]  # the same spacing over what is left
        if teacher.path.kind == "vp":  # stock schedulers call such networks at whole timesteps
            timesteps = teacher.path.coefficients(torch.tensor(later, dtype=torch.float64)).timestep
            later = teacher.path.native_to_linear(timesteps.round()).tolist()
        return (first, *later)
    if unit == "timestep" and len(times) > 1 and times[0] <= 1:
        raise UserError(f"method.step_times is {list(times)} and method.start_unit is timestep, but these are linear "
                        "times from 0 to 1; set start_unit to linear")
    linear = tuple(start_time(teacher, t, unit, "a time of method.step_times") for t in times)
    if len(linear) != count:
        raise UserError(f"method.step_times has {len(linear)} times, and method.steps is {count}; give one time a "
                        "step")
    if any(a <= b for a, b in zip(linear, linear[1:], strict=False)):
        raise UserError(f"method.step_times is {list(times)}; it must fall, from noise towards the image")
    if len(linear) > 1 and any(a - b < APART for a, b in itertools.pairwise((*linear, 0.0))):
        raise UserError(f"method.step_times is {list(times)}; schedulers cannot tell times apart that are closer than "
                        f"{APART:g} (in t, where 0 is the image)")
    if start is not None and linear[0] != first:
        raise UserError(f"method.step_times begins at {times[0]} and method.start is {start}; leave start out, or make "
                        "them equal")
    return linear


class Generator(Student):
    """G(n): the teacher's E[x_0 | x_t = x] at first, trained to be a sample; one call or several.

    One call is G(n) = x - t v(x, t) at x = t n, t = ``t_start``. EDM's form D(sigma z; sigma) and a DDPM network at one
    timestep are this with another time. The input has the noise of its time and no signal: t n, natively sigma_t n.
    Several calls follow ``steps``, see :mod:`flowdistill.students.steps`.

    Args:
        steps: None for one call at ``t_start``; else its first time is ``t_start``.
    """

    kind = "generator"

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
        steps: Steps | None = None,
    ) -> None:
        super().__init__(network, shape, t_start, codec, classes, info, scheduler, prompts)
        self.steps = Steps.single(t_start) if steps is None else steps

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, info: StudentInfo, t_start: float | None = None, network: nn.Module | None = None,
        lora: LoraSettings | None = None, steps: Steps | None = None,
    ) -> Generator:
        """A generator that starts as its teacher's denoiser (``network`` None), or around a network of one's own.

        ``lora``: adapters on the teacher's own weights instead of a copy. ``steps`` takes the place of ``t_start``.
        """
        network = cls.network_from(teacher, network, lora)
        steps = steps or Steps.single(teacher.t_max if t_start is None else t_start)
        made = cls.around(network, teacher, steps.times[0], info)
        made.steps = steps
        return made

    def with_network(self, network: nn.Module) -> Self:
        made = super().with_network(network)
        made.steps = self.steps
        return made

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def step_counts(self) -> Sequence[int]:
        return [self.num_steps] if self.steps.whole else super().step_counts

    def checked_steps(self, steps: int | None) -> int:
        if self.steps.whole and steps not in (None, self.num_steps):
            raise UserError(f"steps is {steps}; this student has an image only after all of its {self.num_steps} "
                            "calls, each of which aims at the state of the next one")
        return super().checked_steps(steps)

    def calls_in_words(self) -> str:
        if len(self.steps) == 1:
            return super().calls_in_words()
        times = ", ".join(f"{t:.4f}" for t in self.steps.times)
        return f"{len(self.steps)} of the network for an image, at t = {times}; {self.steps.stepping}"

    def own_description(self) -> dict[str, Any]:
        return {} if len(self.steps) == 1 else {"format": SEVERAL_STEPS, "steps": self.steps.to_json()}

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any], resident: int | None = None) -> Student:
        student = cls(*read_student(folder, description))
        if (steps := description.get("steps")) is not None:
            student.steps = Steps.from_json(steps, folder / SIDECAR, student.network.velocity.path.t_max)
            if student.steps.times[0] != student.t_start:
                raise UserError(f"{folder / SIDECAR} is damaged: its first step is at {student.steps.times[0]}, and "
                                f"its t_start is {student.t_start}")
        return student.requires_grad_(False).eval()

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        self._guidance(guidance_scale)
        return {}

    def forward(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        guidance_scale: Tensor | float | None = None,
        steps: int | None = None,
        between: Noise | None = None,
    ) -> Tensor:
        """The map itself; differentiable through its last call.

        Args:
            noise: unit normal (B, *shape).
            condition: as the teacher's.
            guidance_scale: the one it was distilled at, or None.
            steps: k for the estimate of step k; None for the sample, that of the last.
            between: the noise that enters each later step (:data:`flowdistill.students.steps.Noise`); None: a function
                of ``noise``, row by row, so that the result is one of ``noise`` and ``condition``.

        Returns:
            Latents (B, *shape).
        """
        self._guidance(guidance_scale)
        k = self.checked_steps(steps)
        return rollout(self.network, noise, self.steps, condition, between or noise_of(noise), k)

    def sampler(
        self, guidance_scale: float | None = None, steps: int | None = None
    ) -> Callable[[Tensor, Condition | None], Tensor]:
        self._guidance(guidance_scale)
        count, network = self.checked_steps(steps), self.network
        if not isinstance(network, ExtendedVelocity):
            return lambda noise, condition: self(noise, condition, guidance_scale, count)
        velocities = [network.fixed(torch.full((1,), t, dtype=torch.float64, device=self.device))
                      for t in self.steps.times[:count]]

        def call(noise: Tensor, condition: Condition | None) -> Tensor:
            state, between = self.steps.start(noise), noise_of(noise)
            for k in range(1, count):
                state = self.steps.after(k, state, velocities[k - 1](state, condition), between)
            return state - self.steps.times[count - 1] * velocities[-1](state, condition)

        return call


def generated(
    network: Callable[..., Tensor], noise: Tensor, t_start: float, condition: Condition | None = None
) -> Tensor:
    """x - t v(x, t) at x = t n: ``network(x, t, condition) -> velocity``, unit noise (B, ...)."""
    return estimate(network, t_start * noise, t_start, condition)
