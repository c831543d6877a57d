"""The times of a student of several calls, and the rule between them.

A student of K calls has times t_1 > ... > t_K > 0 and one network v. It starts at x = s n, and step k gives

    X_k = x - t_k v(x, t_k)                              its estimate of the sample; X_K is the sample

and, before the last, the state of the next step at t' = t_{k+1}:

    stochastic       x' = (1 - t') X_k + t' n_k          with fresh noise (DMD2, Yin et al., arXiv 2405.14867)
    deterministic    x' = x + (t' - t_k) v(x, t_k)       an Euler step; DDIM on the native path of a VP teacher

The two have different optima: a student that trains with one must be sampled with it.

A flow map of two times is told what time r each call aims at, and its v(x, t, r) is an average from t to r: r = 0
before a stochastic step and in the last one, and t' before a deterministic one, which then is a jump of the map itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.paths.native_path import NativePath
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import generator_of, row_digests

STEPPINGS = ("stochastic", "deterministic")
MOST_STEPS = 8
ALMOST_CLEAN = 0.03
"""A time at which a call has nothing left to do that the one before it has not."""

Network = Callable[[Tensor, Tensor, Condition | None], Tensor]
"""``(x, t, condition) -> velocity``, t float64 (B,)."""
Noise = Callable[[int], Tensor]
"""``noise(k)``: unit noise (B, *shape) with which step k, from 2 on, is entered; asked for in this order."""


@dataclass(frozen=True)
class Steps:
    """The calls of a generator.

    Attributes:
        times: linear times, falling, the last above 0.
        stepping: one of ``STEPPINGS``; without meaning for a single call.
        start_scale: the first state is this times unit noise; see :func:`start_scale`.
        whole: whether there is an image after the last call only, because those before it aim at the next one's state
            and their networks know no other aim.
    """

    times: tuple[float, ...]
    stepping: str
    start_scale: float
    whole: bool = False

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.times, (*self.times[1:], 0.0), strict=False))
        if not self.times or not falling or self.stepping not in STEPPINGS or not 0 < self.start_scale < math.inf:
            raise ValueError(f"{self} is no list of falling times above 0 with one of {', '.join(STEPPINGS)}")

    def __len__(self) -> int:
        return len(self.times)

    @property
    def aims(self) -> tuple[float, ...]:
        """What time each call of a flow map of two times aims at."""
        return (*self.times[1:], 0.0) if self.stepping == "deterministic" else (0.0,) * len(self)

    @classmethod
    def single(cls, t: float) -> Steps:
        """One call at ``t``."""
        return cls((t,), STEPPINGS[0], t)

    def to_json(self) -> dict[str, Any]:
        """For a student's description on disk."""
        content = {"times": list(self.times), "stepping": self.stepping, "start_scale": self.start_scale}
        return content | ({"whole": True} if self.whole else {})

    @classmethod
    def from_json(cls, content: Any, file: Path, t_max: float = 1.0) -> Steps:
        """What :meth:`to_json` gave, of a network that goes up to ``t_max``.

        Raises:
            UserError: it is damaged.
        """
        try:
            steps = cls(tuple(map(float, content["times"])), content["stepping"], float(content["start_scale"]),
                        bool(content.get("whole", False)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: its steps are {content!r}, and there must be falling times above 0, a "
                            f"stepping ({' or '.join(STEPPINGS)}) and a start_scale") from error
        if len(steps) > MOST_STEPS or steps.times[0] > t_max * (1 + 1e-9):
            raise UserError(f"{file} is damaged: its steps are {content!r}, and there must be at most {MOST_STEPS}, "
                            f"from {t_max:.6g} down")
        return steps

    def start(self, noise: Tensor) -> Tensor:
        """The first state."""
        return self.start_scale * noise

    def after(self, k: int, state: Tensor, velocity: Tensor, noise: Noise) -> Tensor:
        """The state of step k + 1 from that of step k (counted from 1) and its velocity there."""
        t, later = self.times[k - 1], self.times[k]
        if self.stepping == "deterministic":
            return state + (later - t) * velocity
        return (1 - later) * (state - t * velocity) + later * noise(k + 1)


def rollout(
    network: Network, noise: Tensor, steps: Steps, condition: Condition | None, between: Noise, k: int | None = None
) -> Tensor:
    """X_k (B, *shape), with a gradient through the call of step k alone: the states before it are given.

    Args:
        network: see :data:`Network`.
        noise: unit normal (B, *shape).
        between: see :data:`Noise`; called for stochastic steps only.
        k: 1 to K; None: K.
    """
    last = len(steps) if k is None else k
    state = steps.start(noise)
    with torch.no_grad():
        for step in range(1, last):
            state = steps.after(step, state, network(state, _column(steps.times[step - 1], state), condition), between)
    return estimate(network, state, steps.times[last - 1], condition)


def chained(velocity: Callable[[int, Tensor], Tensor], noise: Tensor, steps: Steps, between: Noise) -> Tensor:
    """The sample (B, *shape) of all steps.

    Args:
        velocity: ``(k, state) -> velocity`` of step k, from 1 on.
        noise: unit normal (B, *shape).
        between: see :data:`Noise`; called for stochastic steps only.
    """
    state, last = steps.start(noise), len(steps)
    for k in range(1, last):
        state = steps.after(k, state, velocity(k, state), between)
    return state - steps.times[-1] * velocity(last, state)


def estimate(network: Network, state: Tensor, t: float, condition: Condition | None) -> Tensor:
    """x - t v(x, t) of the state x (B, *shape) at one time."""
    return state - t * network(state, _column(t, state), condition)


def _column(t: float, state: Tensor) -> Tensor:
    # float64: near t = 1 the last digits of the time matter, for they are divided by 1 - t.
    return torch.full((len(state),), t, dtype=torch.float64, device=state.device)


def noise_of(start: Tensor) -> Noise:
    """Noise between the steps that is a function of each row's own start noise: so an image is one of its start noise
    and its condition, whatever the batch and the number of processes."""
    generators: list[torch.Generator] = []

    def noise(k: int) -> Tensor:
        if not generators:  # not before they are needed: reading a GPU's rows waits for it
            generators.extend(map(generator_of, row_digests(start)))
        rows = [torch.empty(start.shape[1:]).normal_(generator=generator) for generator in generators]
        return torch.stack(rows).to(start)

    return noise


def teacher_times(path: NativePath, count: int) -> tuple[float, ...]:
    """The ``count`` times at which the teacher's own sampler would call it.

    Spacings whose last call is at t_min or almost at 0, where a state is an image already, give theirs for one call
    more: those of EDM, and as pipelines set them those of Stable Diffusion 3 (0.0089) and Qwen-Image (0.02).
    """
    grid = path.time_grid(count)[:-1]
    if count > 1 and grid[-1] <= max(path.t_min * (1 + 1e-9), ALMOST_CLEAN):
        grid = path.time_grid(count + 1)[:-2]
    return tuple(grid.tolist())


def start_scale(path: NativePath, times: Sequence[float], stepping: str, prompts: bool) -> float:
    """s of the first state s n, as the stock pipeline starts that will sample the student.

    One call, and Euler steps of a text-to-image pipeline, start at t_1 n, which is sigma n natively. A VP teacher's
    other pipelines (LCM's and DDIM's schedulers) start at unit native noise, which is n / (alpha + sigma), and EDM's at
    sqrt(sigma^2 + 1) n: both are sqrt(t_1^2 + (1 - t_1)^2) n here.

    Args:
        times: of the student.
        prompts: whether it is one from text to image.
    """
    t = times[0]
    euler = path.kind == "vp" and stepping == "deterministic" and prompts
    return t if len(times) == 1 or path.kind not in ("vp", "edm") or euler else math.hypot(t, 1 - t)
