"""DisBack: distribution backtracking (Zhang et al., arXiv 2408.15991), a sequence of targets for score distillation.

    stage 1    the critic, which starts as the teacher, learns the samples of the untrained generator; every so many
               steps its weights are recorded: nodes 1 ... N. Node 0 is the teacher itself.           (Eq. 7)
    stage 2    score distillation, the critic going on from node N, with the targets N - 1, N - 2, ..., 0 in the
               place of the teacher; node 0 stays to the end.                                         (Eqs. 5, 8)

Only which network is the real score changes. The host does the rest, whatever its weight; without stage 1 it is all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdistill.config import needs, option, validate
from flowdistill.methods.score_distillation import HostConfig, ScoreDistillation, suggestions
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.training.method import About, Method, Role, Suggestion, register_method
from flowdistill.training.snapshots import WeightSnapshots
from flowdistill.training.state import network_tensors
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from flowdistill.utils.text import JsonObject

PATH = "path"
"""The folder of the nodes in the run folder."""


@dataclass
class DisBackConfig:
    """Settings of DisBack. "(authors: ...)" is their published SDXL script; every other default is ours."""

    name: str = "disback"
    degradation_steps: int = option(200, "steps of stage 1; 0: the host alone (authors: 1000)", at_least=0)
    degradation_every: int = option(50, "steps between nodes (authors: 100)", at_least=1,
                                    only=needs("degradation_steps"))
    degradation_lr: float | None = option(None, "learning rate of stage 1; null: the critic's", above=0,
                                          only=needs("degradation_steps"))
    backtrack: bool = option(True, "walk back over the nodes; false: the teacher is the target all along, and only the "
                                   "critic starts at the last node")
    interval: list[int] = option([1000], "steps on each target before the teacher, or one number for all (authors: "
                                         "1000)", at_least=1, only=needs("degradation_steps"))
    switch: str = option(
        "interval",
        "when the next target comes; gradient: at the latest then, and earlier when the matching gradient has become "
        "small",
        choices=("interval", "gradient"),
    )
    gradient_fraction: float = option(
        0.5, "size that counts as small, as a share of its size on the target's first window", above=0, below=1,
        only=needs("switch", "gradient"))
    gradient_window: int = option(20, "steps over which the size is averaged", at_least=1,
                                  only=needs("switch", "gradient"))
    switch_warmup: int = option(0, "steps of linear growth of the learning rates after each switch", at_least=0,
                                only=needs("degradation_steps"))
    reset_optimizers: bool = option(False, "forget the optimisers' moments at each switch",
                                    only=needs("degradation_steps"))
    node_guidance: str = option("constant", "guidance scale on the nodes; linear: from 1 at the last to the host's at "
                                            "the teacher", choices=("constant", "linear"),
                                            only=needs("degradation_steps"))
    host: HostConfig = option(HostConfig, "score distillation, see its methods")

    @property
    def nodes(self) -> int:
        """N, the number of recorded nodes: one every ``degradation_every`` steps and one at the end of stage 1."""
        return -(-self.degradation_steps // self.degradation_every)

    @property
    def intervals(self) -> list[int]:
        """Steps on the targets N - 1, ..., 1, in this order."""
        targets = max(self.nodes - 1, 0) if self.backtrack else 0  # without backtracking, the teacher only
        return self.interval * targets if len(self.interval) == 1 else self.interval[:targets]

    def validate(self) -> None:
        """UserError for a list of intervals that does not have one for each target, or nodes that need a step."""
        if self.host.critic_told_step and self.degradation_steps:
            raise UserError("method.host.critic_told_step is true, but the nodes are networks of the critic's kind in "
                            "the teacher's place, which is told no step; set it to false, or degradation_steps to 0")
        wanted = max(self.nodes - 1, 0)
        if len(self.interval) not in (1, wanted):
            raise UserError(f"method.interval has {len(self.interval)} values; {self.nodes} nodes have {wanted} "
                            "targets before the teacher, so it must have as many values, or one for all")

    def check_steps(self, steps: int) -> str | None:
        """A sentence about a run of ``steps`` that ends before the teacher is the target; None for a longer one.

        Raises:
            UserError: it ends in stage 1, before the generator is trained at all.
        """
        first, walk = self.degradation_steps, sum(self.intervals)
        if steps > first + walk:
            return None
        needed = (f"stage 1 has {first} steps and the nodes {'up to ' * (self.switch == 'gradient')}{walk}, so the "
                  f"teacher is the target from step {first + walk + 1} on")
        if steps <= first:
            raise UserError(f"train.steps is {steps}, which ends in stage 1, where no generator trains: {needed}; "
                            f"set it above {first + walk}, or lower method.degradation_steps")
        return (f"train.steps is {steps}, which ends before the backtracking reaches the teacher: {needed}; raise "
                f"train.steps well above {first + walk}, or lower method.interval")


class TargetSchedule:
    """The schedule of targets: which node is the target, and since when. Every process comes to the same answer.

    Attributes:
        index: of the target; 0 is the teacher.
        since: step at which it became the target.
    """

    def __init__(self, config: DisBackConfig) -> None:
        self.config = config
        self.index, self.since = len(config.intervals), config.degradation_steps
        self.first: float | None = None  # mean gradient size over the target's first window
        self.total: Tensor | float = 0.0
        self.count = 0

    def advance(self, step: int) -> bool:
        """Go to the next target if its time has come before the updates of ``step``."""
        if self.index == 0 or step <= self.since:
            return False
        stayed, longest = step - self.since, self.config.intervals[-self.index]
        small = False
        if self.config.switch == "gradient" and stayed % self.config.gradient_window == 0 and self.count:
            size = float(self.total) / self.count  # waits for the device, once a window
            small = self.first is not None and size <= self.config.gradient_fraction * self.first
            self.first = size if self.first is None else self.first
            self.total, self.count = 0.0, 0
        if stayed < longest and not small:
            return False
        self.index, self.since, self.first, self.total, self.count = self.index - 1, step, None, 0.0, 0
        return True

    def observe(self, size: Tensor) -> None:
        """Size of the matching gradient in one loss: 0-d, the same on every process."""
        if self.index and self.config.switch == "gradient":
            self.total, self.count = self.total + size, self.count + 1

    def state_dict(self) -> JsonObject:
        return {"index": self.index, "since": self.since, "first": self.first, "total": float(self.total),
                "count": self.count}

    def load_state_dict(self, state: JsonObject) -> None:
        self.index, self.since, self.first = state["index"], state["since"], state["first"]
        self.count = state["count"]
        self.total = torch.tensor(state["total"]) if self.count else 0.0  # float32, as it was summed


@register_method
class DisBack(Method):
    """The host with its targets."""

    name = "disback"
    Config = DisBackConfig
    about = About("score distillation whose target walks from the untrained student's distribution to the teacher's",
                  "DisBack, arXiv 2408.15991", data="optional", calls="1 to 8", networks="critic")

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        return suggestions(teacher, guidance, "method.host.")

    def __init__(
        self, config: DisBackConfig, teacher: Teacher, student_network: nn.Module | None = None,
        critic_network: nn.Module | None = None,
    ) -> None:
        validate(config, prefix="method.")
        self.config, self.teacher = config, teacher
        self.host = ScoreDistillation(config.host, teacher, student_network, critic_network, self.name)
        self.targets = TargetSchedule(config)
        self.node: nn.Module | None = None if self.targets.index == 0 else self._target_network()
        self._placed = 0  # index of the node that is the host's target now

    # --- the two stages

    def schedule(self, step: int) -> tuple[str, ...]:
        return ("critic",) if step < self.config.degradation_steps else self.host.schedule(step)

    def calls_without_gradient(self, role: str) -> float:
        return self.host.calls_without_gradient(role)

    def begin_step(self, step: int, folder: Path) -> Sequence[str]:
        path, last = WeightSnapshots(folder / PATH), self.config.degradation_steps
        if 0 < step <= last and (step % self.config.degradation_every == 0 or step == last):
            score, like = network_tensors(self.host.score), self.node or self.host.score
            index = -(-step // self.config.degradation_every)
            path.write(index, score, network_tensors(like, self.host.score))
        if step < last:
            return ()
        switched = self.targets.advance(step) or step == last > 0
        if self._placed != self.targets.index or switched:
            self.place_target(path)
        return ("student", "critic") if switched and self.config.reset_optimizers else ()

    def place_target(self, path: WeightSnapshots) -> None:
        """Make the scheduled node the host's target."""
        index, scale = self.targets.index, self.config.host.guidance_scale
        share = index / self.config.nodes if self.config.nodes else 0.0
        self.host.guidance_scale = scale - share * (scale - 1) if self.config.node_guidance == "linear" else scale
        if index == 0:  # not a file of it: the teacher itself, to the last bit
            self.host.target, self.node = self.teacher, None
        else:
            assert self.node is not None
            path.read_into(index, network_tensors(self.node, self.host.score))
            if self.host.target is self.teacher:
                self.host.target = copy.copy(self.teacher)
                self.host.target.network = self.node
        self._placed = index

    def _target_network(self) -> nn.Module:
        """A frozen network for the nodes, one after the other: what the critic trains is its own, in the teacher's
        type when that is all of it; what the critic shares with the teacher is shared here too."""
        shared = {id(p): p for p in self.host.score.parameters() if not p.requires_grad}
        weights = next(self.teacher.network.parameters(), None)
        dtype = torch.float32 if shared or weights is None else weights.dtype
        network = copy.deepcopy(self.host.score, shared).requires_grad_(False).eval()
        return network if dtype == torch.float32 else network.to(dtype)

    def loss(
        self, role: str, networks: Mapping[str, Callable[..., Tensor]], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.host.loss(role, networks, draw)
        if role == "student":
            self.targets.observe(metrics["gradient_size"])
            metrics["target"] = torch.full((), float(self.targets.index), device=loss.device)
        return loss, metrics

    def shown(self, role: str) -> str | None:
        return self.host.shown(role)

    def after_update(self, role: str) -> None:
        self.host.after_update(role)

    def learning_rate_factor(self, role: str, step: int) -> float:
        config = self.config
        if step < config.degradation_steps:
            return (config.degradation_lr or config.host.critic_optimizer.lr) / config.host.critic_optimizer.lr
        since = step - self.targets.since
        warming = config.degradation_steps > 0 and since < config.switch_warmup
        return (since + 1) / (config.switch_warmup + 1) if warming else 1.0

    # --- what the trainer needs besides

    @classmethod
    def check_length(cls, config: DisBackConfig, steps: int) -> str | None:
        return config.check_steps(steps)

    def state_dict(self) -> JsonObject:
        return self.targets.state_dict()

    def load_state_dict(self, state: JsonObject) -> None:
        self.targets.load_state_dict(state)
        if self.targets.index == 0:
            self.node = None

    def roles(self) -> dict[str, Role]:
        return self.host.roles()

    def student(self, network: nn.Module | None = None) -> Student:
        return self.host.student(network)

    def to(self, device: torch.device | str) -> DisBack:
        self.host.to(device)
        if self.node is not None:
            self.node.to(device)
        return self
