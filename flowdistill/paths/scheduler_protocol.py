"""What flowdistill uses of a diffusers scheduler, whose classes have no common one that says so."""

from __future__ import annotations

import os
from typing import Any, Protocol

from torch import Tensor


class SchedulerConfig(Protocol):
    """A scheduler's settings: each is an item and an attribute, and which there are depends on the class."""

    def get(self, key: str, default: object = None, /) -> Any: ...

    def __getitem__(self, key: str, /) -> Any: ...

    def __getattr__(self, name: str, /) -> Any: ...


class Step(Protocol):
    """What a scheduler's step returns."""

    prev_sample: Tensor


class Scheduler(Protocol):
    """A diffusers scheduler.

    Attributes:
        timesteps: of the network's calls, once ``set_timesteps`` was called.
        alphas_cumprod: squares of alpha at the training timesteps; of variance-preserving schedulers only.
        sigmas: noise levels at the timesteps, and a last one; of flow-matching schedulers only.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    sigmas: Tensor

    @property
    def config(self) -> SchedulerConfig: ...

    @classmethod
    def from_config(cls, config: SchedulerConfig, **settings: object) -> Scheduler: ...

    def set_timesteps(self, steps: int, /, **settings: object) -> None: ...

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, /, **settings: object) -> Step: ...

    def save_pretrained(self, folder: str | os.PathLike[str], /) -> object: ...
