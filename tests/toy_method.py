"""A method of two tiny networks that needs no teacher, and a command that trains it (for tests in other processes).

The student maps noise to a rotated copy of itself and is pushed down the critic; the critic learns the squared norm of
the student's samples. So the student's loss sends gradients through the critic, as an adversarial one does.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import nn

from flowdistill.config import EvaluationConfig, OptimizerConfig, RunConfig, StopConfig, TeacherConfig, TrainConfig
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.training import checkpoint, loop
from flowdistill.training.loop import Trainer
from flowdistill.training.method import Method, Role
from flowdistill.training.run import make_accelerator
from flowdistill.training.state import optimizer_tensors
from flowdistill.utils.exit import exit_process


@dataclass
class ToyConfig:
    name: str = "toy"
    dropout: float = 0.0
    critic_updates: int = 1
    critic_weight: float = 0.1
    bad_steps: list[int] = field(default_factory=list)  # steps whose student loss is NaN
    width: int = 16
    calls: int = 1  # more: a figure of the student is of one call of so many, another one each update
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2))
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-2, weight_decay=0.1))


class ToyStudent:
    num_classes = None
    num_steps = 1
    shape = (2,)

    def __init__(self, network):
        self.network = network

    def generate(self, labels=None, num_images=None, seed=0):
        noise = torch.randn(num_images, 2, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            values = self.network(noise.to(next(self.network.parameters()).device))
        return values.sigmoid()[:, :1, None, None].expand(-1, 1, 4, 4)

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.network.state_dict().items()}, folder / "model.safetensors")


class ToyFigures:
    """In the place of ``FidCallback``: a figure that is best at step 10 of the default run, and rises from there."""

    def __init__(self, config=None, accelerator=None, reference=None):
        pass

    def __call__(self, student):
        return {"fid": abs(float(student.network[3].weight.norm()) - 0.9), "accuracy": None}


class ToyMethod(Method):
    name = "toy"
    Config = ToyConfig

    def __init__(self, config, teacher=None):
        self.config = config
        self.teacher = teacher or exact_teacher(GaussianVelocity(torch.zeros(2), 1.0))
        self.student_network = nn.Sequential(
            nn.Linear(2, config.width), nn.SiLU(), nn.Dropout(config.dropout), nn.Linear(config.width, 2)
        )
        self.critic = nn.Sequential(nn.Linear(2, config.width), nn.SiLU(), nn.Linear(config.width, 1))
        self._roles = {
            "student": Role(self.student_network, config.optimizer, ema=True),
            "critic": Role(self.critic, config.critic_optimizer),
        }

    def roles(self):
        return self._roles

    def schedule(self, step):
        return ("student", *["critic"] * self.config.critic_updates)

    def loss(self, role, networks, draw):
        noise = draw.normal((2,))
        if role == "critic":
            with torch.no_grad():
                sample = networks["student"](noise)
            return (networks["critic"](sample)[:, 0] - sample.square().sum(1)).square().mean(), {}
        sample = networks["student"](noise)
        target = torch.stack([noise[:, 1], -noise[:, 0]], 1)
        distance = (sample - target).square().sum(1).mean()
        loss = distance + self.config.critic_weight * networks["critic"](sample).mean()
        if draw.step in self.config.bad_steps:
            loss = loss * float("nan")
        figures = {"distance": distance.detach(), "spread": draw.mean(sample.square())}
        if self.config.calls > 1:
            figures[f"size/{draw.one(self.config.calls) + 1}"] = draw.mean(sample.abs())
        return loss, figures

    def student(self, network=None):
        return ToyStudent(self.student_network if network is None else network)

    def to(self, device):
        self.student_network.to(device)
        self.critic.to(device)
        return self


def make_config(folder, method=None, seed=0, **train):
    settings = {
        "steps": 8,
        "batch_size": 8,
        "log_every": 2,
        "checkpoint_every": 4,
        "num_samples": 4,
        "trackers": [],
        "device": "cpu",
        "precision": "fp32",
    } | train
    return RunConfig(
        output_dir=str(folder),
        seed=seed,
        teacher=TeacherConfig(source="none"),
        method=method or ToyConfig(),
        train=TrainConfig(**settings),
        evaluation=EvaluationConfig(features="digits", reference="digits"),
    )


def make_trainer(folder, method=None, seed=0, fsdp2=False, **train):
    config = make_config(folder, method, seed, **train)
    accelerator = make_accelerator(config.train, folder)
    if fsdp2:
        shard(accelerator)
    torch.manual_seed(seed)
    return Trainer(ToyMethod(config.method), config, Path(folder), accelerator)


def shard(accelerator, **settings):
    """Make accelerate shard on the CPU, which it does on GPUs only; its state is shared by all its objects.

    Nothing public of accelerate's sets it.
    """
    settings = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "reshard_after_forward": True} | settings
    plugin = FullyShardedDataParallelPlugin(**settings)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2


def weights(trainer):
    """All weights, averages and moments of a trainer, by name."""
    values = {}
    for name, role in trainer.roles.items():
        values |= {f"{name}.{key}": value for key, value in role.network.state_dict().items()}
        if role.average is not None:
            values |= {f"{name}.average.{key}": value for key, value in role.average.network.state_dict().items()}
        state = optimizer_tensors(role.network, role.optimizer)
        values |= {f"{name}.optimizer.{key}": value for key, value in state.items()}
    return {name: value.detach().clone() for name, value in values.items()}


def figures(folder):
    """Losses, gradient norms and other figures of each line of a run's ``metrics.jsonl``."""
    lines = [json.loads(text) for text in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [[value for key, value in line.items() if "/" in key] for line in lines]


def main(arguments):
    """FOLDER key=value ...: train, then save the averaged student as average.safetensors.

    Keys are those of ``train`` and ``fsdp2``, with integers but for ``precision``; each file of the checkpoint
    of step ``slow`` takes a second more, and each step ``pause`` milliseconds. ``patience``: of early stopping by
    ``ToyFigures``, and the best student is saved. ``calls`` and ``width`` are the method's, ``optimizer`` the
    name of that of both roles.
    """
    folder, *settings = arguments
    pairs = [text.split("=") for text in settings]
    values = {key: value if key in ("precision", "optimizer") else int(value) for key, value in pairs}
    slow, pause, patience = (values.pop(name, 0) for name in ("slow", "pause", "patience"))
    method = ToyConfig(**{name: values.pop(name) for name in ("calls", "width") if name in values})
    method.optimizer.name = method.critic_optimizer.name = values.pop("optimizer", "adamw")
    if patience:
        loop.FidCallback = ToyFigures
        values["stop_when"] = StopConfig(patience=patience)
    if slow:
        write = checkpoint.write_tensors

        def write_slowly(path, tensors):
            if f"step-{slow:06d}" in str(path):
                print("writing", path.name, flush=True)
                time.sleep(1)
            write(path, tensors)

        checkpoint.write_tensors = write_slowly
    trainer = make_trainer(folder, method, **values)
    print(f"rank {trainer.rank} of {trainer.world} from step {trainer.step}", flush=True)
    if pause:
        step = trainer.train_step
        trainer.train_step = lambda: (step(), print("step", trainer.step, flush=True), time.sleep(pause / 1000))
    trainer.train()
    trainer.take_best()
    average = trainer.student().network
    if trainer.main:
        save_file(average.state_dict(), Path(folder) / "average.safetensors")
    print(f"ended at step {trainer.step} with signal {trainer.interrupted}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    exit_process(0)
