"""The flow map: the teacher's ODE from the prior, or between any two times, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.storage import SIDECAR, TWO_TIMES
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.objectives.flow_map import end_point
from flowdistill.students.steps import Noise, Steps, chained, noise_of
from flowdistill.students.storage import read_student
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.devices import as_tensor
from flowdistill.utils.errors import UserError


class FlowMap(Student):
    """A flow map anchored at the prior, f(n, d) = t_max n - d V(n, d), with V the average velocity over duration d; or
    one between any two times, X(x, t, r) = x - (t - r) u(x, t, r), which makes an image in one call or in several.

    Either is the identity where the duration t - r is 0, for every network, and a one-step generator at d = t_max.
    Before training u(x, t, r) = v_teacher(x, t) for all r, so that a jump is the teacher's single Euler step (FreeFlow,
    section 2); a network with ``target_time="reuse"``, which a map between two times cannot have, starts so at d = 0
    only.

    Attributes:
        chains: the steps of one call, of two and so on up to the most that are allowed; empty for a map from the prior.
    """

    kind = "flow_map"
    chains: tuple[Steps, ...] = ()

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, info: StudentInfo, network: nn.Module | None = None, target_time: str = "separate",
        lora: LoraSettings | None = None, chains: Sequence[Steps] = (),
    ) -> FlowMap:
        """A student that starts as its teacher (``network`` None), or around a network of one's own.

        ``target_time``: how the teacher's copy learns the duration, see :class:`ExtendedVelocity`. ``lora``: adapters
        on the teacher's own weights instead of a copy. ``chains``: of a map between any two times.

        Raises:
            UserError: a map between two times whose network would be told one of them.
        """
        if chains and target_time != "separate":
            raise UserError(f"target_time is '{target_time}', by which a network is told where a jump ends in place of "
                            "where it begins; a map between any two times needs both, so set it to separate")
        scalars = ("duration",) if info.guidance_range is None else ("duration", "guidance")
        network = cls.network_from(teacher, network, lora, scalars, target_time)
        made = cls.around(network, teacher, teacher.t_max, info)
        made.chains = tuple(chains)
        return made

    def with_network(self, network: nn.Module) -> Self:
        made = super().with_network(network)
        made.chains = self.chains
        return made

    @property
    def t_max(self) -> float:
        return self.t_start

    @property
    def num_steps(self) -> int:
        return max(1, len(self.chains))

    @property
    def step_counts(self) -> Sequence[int]:
        """Powers of two: each number of calls is a way of its own to the image, and not an earlier stop on one."""
        return sorted({*(2**i for i in range(self.num_steps.bit_length())), self.num_steps})

    def calls_in_words(self) -> str:
        if not self.chains:
            return super().calls_in_words()
        most = self.chains[-1]
        times = ", ".join(f"{t:.4f}" for t in most.times)
        numbers = "one" if len(most) == 1 else f"one to {len(most)}"
        return f"{numbers} of the network for an image, {most.stepping}; the most at t = {times}"

    def own_description(self) -> dict[str, Any]:
        if not self.chains:
            return {}
        return {"format": TWO_TIMES, "chains": [steps.to_json() for steps in self.chains]}

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any], resident: int | None = None) -> Student:
        student = cls(*read_student(folder, description))
        file, t_max = folder / SIDECAR, student.network.velocity.path.t_max
        chains = tuple(Steps.from_json(steps, file, t_max) for steps in description.get("chains", ()))
        if any(len(steps) != count or steps.times[0] != student.t_start for count, steps in enumerate(chains, start=1)):
            raise UserError(f"{file} is damaged: its chains must be one of each number of calls, all from its t_start, "
                            f"{student.t_start}")
        if chains and student.network.target_time != "separate":
            raise UserError(f"{file} is damaged: a map between any two times has target_time separate, and it has "
                            f"{student.network.target_time}")
        student.chains = chains
        return student.requires_grad_(False).eval()

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        guidance = self._guidance(guidance_scale)
        return {"duration": self.t_max} | ({} if self.info.guidance_range is None else {"guidance": guidance})

    def forward(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        guidance_scale: Tensor | float | None = None,
        duration: Tensor | float | None = None,
        steps: int | None = None,
        between: Noise | None = None,
    ) -> Tensor:
        """The map itself, differentiable through its last call.

        Args:
            noise: unit normal (B, *shape).
            condition: as the teacher's.
            guidance_scale: float or (B,), within ``info.guidance_range``; None for ``info.guidance_scale``.
            duration: float or (B,) in [0, t_max], for one call from the prior; None: to data.
            steps: calls to data, 1 to :attr:`num_steps`; None for all.
            between: the noise that enters each later stochastic step; None: a function of ``noise``, row by row.

        Returns:
            Latents (B, *shape) at time t_max - duration, or of data.
        """
        count = self.checked_steps(steps)
        if duration is not None or not self.chains:
            whole = self.t_max if duration is None else duration
            return self._jump(self.t_max * noise, self.t_max, whole, condition, guidance_scale)
        chain = self.chains[count - 1]

        def velocity(k: int, state: Tensor) -> Tensor:
            t, aim = chain.times[k - 1], chain.aims[k - 1]
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == count):
                return self._velocity(state, t, t - aim, condition, guidance_scale)

        return chained(velocity, noise, chain, between or noise_of(noise))

    def jump(
        self,
        x: Tensor,
        t: Tensor | float,
        r: Tensor | float,
        condition: Condition | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """X(x, t, r) (B, *shape): the states that those at t are at r, in one call, differentiable.

        Args:
            x: states (B, *shape) on x_t = (1 - t) x_0 + t n.
            t, r: floats or (B,), 0 <= r <= t <= t_max; for a map from the prior t is t_max.
            condition, guidance_scale: see :meth:`forward`.
        """
        return self._jump(x, t, torch.as_tensor(t, dtype=torch.float64) - r, condition, guidance_scale)

    def _jump(
        self, x: Tensor, t: Tensor | float, duration: Tensor | float, condition: Condition | None,
        guidance_scale: Tensor | float | None,
    ) -> Tensor:
        velocity = self._velocity(x, t, duration, condition, guidance_scale)
        return end_point(x, self._row(duration, x), velocity)

    def _velocity(
        self, x: Tensor, t: Tensor | float, duration: Tensor | float, condition: Condition | None,
        guidance_scale: Tensor | float | None,
    ) -> Tensor:
        # One value for the whole batch stays one row: it is embedded once and broadcast.
        scalars = {name: self._row(value, x) for name, value in self.scalars(guidance_scale).items()}
        scalars["duration"] = self._row(duration, x)
        # float64: near t = 1 the last digits of the time matter, for they are divided by 1 - t.
        time = as_tensor(t, torch.float64, x.device).expand(len(x))
        return self.network(x, time, condition, **scalars)

    @staticmethod
    def _row(value: Tensor | float, x: Tensor) -> Tensor:
        return as_tensor(value, torch.float32, x.device).reshape(-1)

    def sampler(
        self, guidance_scale: float | None = None, steps: int | None = None
    ) -> Callable[[Tensor, Condition | None], Tensor]:
        if not self.chains:
            return super().sampler(guidance_scale, steps)
        count, network = self.checked_steps(steps), self.network
        if not isinstance(network, ExtendedVelocity):
            return lambda noise, condition: self(noise, condition, guidance_scale, steps=count)
        chain, scalars = self.chains[count - 1], self.scalars(guidance_scale)

        def one(value: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
            return as_tensor(value, dtype, self.device).reshape(1)

        velocities = []
        for t, aim in zip(chain.times, chain.aims, strict=True):
            columns = {name: one(value) for name, value in (scalars | {"duration": t - aim}).items()}
            velocities.append(network.fixed(one(t, torch.float64), **columns))
        return lambda noise, condition: chained(lambda k, state: velocities[k - 1](state, condition), noise, chain,
                                                noise_of(noise))
