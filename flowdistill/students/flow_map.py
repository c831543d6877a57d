"""The flow map: the teacher's ODE from the prior to any later time, in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.lora import LoraSettings
from flowdistill.objectives.flow_map import end_point
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.teacher import Teacher


class FlowMap(Student):
    """A prior-anchored flow map: f(n, d) = t_max n - d V(n, d), with V the average velocity over duration d.

    At d = 0 it is the identity on the start state and at d = t_max a one-step generator, for every V. Before training
    V(n, d) = v_teacher(t_max n, t_max) for all d, so that f is the teacher's single Euler step (FreeFlow, section 2);
    a network with ``target_time="reuse"`` starts so at d = 0 only.
    """

    kind = "flow_map"

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, info: StudentInfo, network: nn.Module | None = None, target_time: str = "separate",
        lora: LoraSettings | None = None,
    ) -> FlowMap:
        """A student that starts as its teacher (``network`` None), or around a network of one's own.

        ``target_time``: how the teacher's copy learns the duration, see :class:`ExtendedVelocity`. ``lora``: adapters
        on the teacher's own weights instead of a copy.
        """
        scalars = ("duration",) if info.guidance_range is None else ("duration", "guidance")
        network = cls.network_from(teacher, network, lora, scalars, target_time)
        return cls.around(network, teacher, teacher.t_max, info)

    @property
    def t_max(self) -> float:
        return self.t_start

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        guidance = self._guidance(guidance_scale)
        return {"duration": self.t_max} | ({} if self.info.guidance_range is None else {"guidance": guidance})

    def forward(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        guidance_scale: Tensor | float | None = None,
        duration: Tensor | float | None = None,
    ) -> Tensor:
        """The map itself, differentiable, one network call.

        Args:
            noise: unit normal (B, *shape).
            condition: as the teacher's.
            guidance_scale: float or (B,), within ``info.guidance_range``; None for ``info.guidance_scale``.
            duration: float or (B,) in [0, t_max]; None for t_max, i.e. to data.

        Returns:
            Latents (B, *shape) at time t_max - duration.
        """

        def column(value: Tensor | float) -> Tensor:
            # One value for the whole batch stays one row: it is embedded once and broadcast.
            return torch.as_tensor(value, dtype=torch.float32, device=noise.device).reshape(-1)

        scalars = {name: column(value) for name, value in self.scalars(guidance_scale).items()}
        if duration is not None:
            scalars["duration"] = column(duration)
        start = self.t_max * noise
        # float64: near t = 1 the last digits of the time matter, for they are divided by 1 - t.
        time = torch.full((noise.shape[0],), self.t_max, dtype=torch.float64, device=noise.device)
        velocity = self.network(start, time, condition, **scalars)
        return end_point(start, scalars["duration"], velocity)
