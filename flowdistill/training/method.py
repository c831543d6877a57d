"""The seam between a method and the trainer: neither knows more of the other than what stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowdistill.config import OptimizerConfig
from flowdistill.utils.randomness import Draw

__all__ = ["Concluding", "Draw", "Method", "Role", "SingleStudent", "Staged"]


@dataclass
class Role:
    """A network that trains.

    Attributes:
        network: float32; its parameters with ``requires_grad`` are trained, the others belong to the teacher or are
            rebuilt by the method and are not saved.
        optimizer: its AdamW and learning rate.
        ema: whether a moving average of the weights is kept.
    """

    network: nn.Module
    optimizer: OptimizerConfig
    ema: bool = False


class Method(Protocol):
    """What the trainer asks of a method.

    A class behind the name in ``flowdistill.methods.METHODS`` also has ``Config``, the dataclass of its settings, and
    is built as ``Class(config.method, teacher)`` right after ``torch.manual_seed``. A ``Config`` may have
    ``check_steps(steps)``, which returns a warning about the length of a run or None, or raises UserError. ``shards =
    False`` on the class refuses FSDP.
    """

    name: str
    teacher: Any

    def roles(self) -> Mapping[str, Role]:
        """The networks that train, by name, always the same objects. One is named ``"student"``.

        The trainer decides neither train() nor eval(): the networks stay as the method leaves them.
        """

    def schedule(self, step: int) -> Sequence[str]:
        """Names of the roles to update at ``step`` (from 0), in order; a name may come more than once."""

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Any]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``role`` on one micro-batch.

        Args:
            role: whose weights are about to be updated. Gradients that reach another role's weights are dropped.
            networks: by role name, called as the bare networks are; they run under the chosen precision, distributed,
                and return float32.
            draw: every random number comes from here; ``draw.rows`` rows over all processes.

        Returns:
            The mean loss over the local rows, 0-d and float32, and figures to log: 0-d, detached, without ``.item()``.
        """

    def student(self, network: nn.Module | None = None) -> Any:
        """The user's student around ``network`` (a copy of the role "student", e.g. its average), or the trained one.

        It has ``generate(labels=None, num_images=None, seed=0)``, ``num_classes`` and ``save(folder)``.
        """

    def to(self, device: torch.device | str) -> Any:
        """Move the frozen parts and the networks to ``device``."""


@runtime_checkable
class Staged(Protocol):
    """What a method with stages or with state besides its networks has on top of :class:`Method`; all of it or none."""

    def begin_step(self, step: int, folder: Path) -> Sequence[str]:
        """Called before the updates of ``step`` (from 0), by all processes together.

        The same step may begin twice: once before a crash and once after the resume, with the same networks.

        Args:
            folder: the run folder, for files of the method's own.

        Returns:
            The roles whose optimisers start anew, without moments and count.
        """

    def rate(self, role: str, step: int) -> float:
        """Factor on the learning rate of ``role`` at ``step``."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint, the same on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; the next call is ``begin_step``."""


@runtime_checkable
class Concluding(Protocol):
    """What a method that ends with more than a saved student has on top of :class:`Method`."""

    def conclude(self, step: int, folder: Path) -> None:
        """Called by all processes together when all steps are done, before the student is saved."""

    def publish(self, folder: Path) -> None:
        """Called by the main process once ``student/`` is in the run folder; the last file is ``student/README.md``."""


class SingleStudent:
    """What of :class:`Method` does not depend on the algorithm where one student trains at every step.

    A subclass sets ``teacher``, ``config`` (with ``optimizer``) and ``_student`` and has ``loss``; one with more
    networks extends the others.
    """

    teacher: Any
    config: Any
    _student: Any

    def roles(self) -> dict[str, Role]:
        return {"student": Role(self._student.network, self.config.optimizer, ema=True)}

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def student(self, network: nn.Module | None = None) -> Any:
        return self._student if network is None else self._student.with_network(network)

    def to(self, device: torch.device | str) -> Any:
        self.teacher.to(device)  # and the codec with it, which the student has too
        for role in self.roles().values():
            role.network.to(device)
        return self
