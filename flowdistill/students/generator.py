"""The generator: the teacher's denoised estimate at one fixed time, trained to be a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.lora import LoraSettings
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import UserError

START_UNITS = ("linear", "timestep", "sigma")


def start_time(teacher: Teacher, start: float | None, unit: str = "linear") -> float:
    """The linear time of a generator's call.

    Args:
        start: None for the teacher's t_max.
        unit: ``"linear"``; ``"timestep"``, what the teacher's network calls it (399 of 1000 for a DDPM teacher); or
            ``"sigma"``, noise over signal, EDM's sigma_init: t = sigma / (1 + sigma).

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
        raise UserError(f"method.start is {start} ({unit}), which is t = {t:.4f}; this teacher allows "
                        f"{teacher.t_min:.4f} to {teacher.t_max:.4f}")
    return t


class Generator(Student):
    """G(n) = x - t v(x, t) at x = t n, t = ``t_start``, one time for all: at first the teacher's E[x_0 | x_t = x].

    EDM's form D(sigma z; sigma) and a DDPM network at one timestep are this with another time. The input has the noise
    of its time and no signal: t n, natively sigma_t n.
    """

    kind = "generator"

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, info: StudentInfo, t_start: float | None = None, network: nn.Module | None = None,
        lora: LoraSettings | None = None,
    ) -> Generator:
        """A generator that starts as its teacher's denoiser (``network`` None), or around a network of one's own.

        ``lora``: adapters on the teacher's own weights instead of a copy.
        """
        network = cls.network_from(teacher, network, lora)
        return cls.around(network, teacher, teacher.t_max if t_start is None else t_start, info)

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        self._guidance(guidance_scale)
        return {}

    def forward(
        self, noise: Tensor, condition: Condition | None = None, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """The map itself, differentiable, one network call.

        Args:
            noise: unit normal (B, *shape).
            condition: as the teacher's.
            guidance_scale: the one it was distilled at, or None.

        Returns:
            Latents (B, *shape).
        """
        self._guidance(guidance_scale)
        return generated(self.network, noise, self.t_start, condition)


def generated(
    network: Callable[..., Tensor], noise: Tensor, t_start: float, condition: Condition | None = None
) -> Tensor:
    """x - t v(x, t) at x = t n: ``network(x, t, condition) -> velocity``, unit noise (B, ...)."""
    state = t_start * noise
    # float64: near t = 1 the last digits of the time matter, for they are divided by 1 - t.
    time = torch.full((len(noise),), t_start, dtype=torch.float64, device=noise.device)
    return state - t_start * network(state, time, condition)
