"""What the parts of the acceptance share: the device, its clock and its memory, and what they measured."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill import __version__
from flowdistill.config import TrainConfig
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from tests.every_method import make_trainer

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "xformers", "bitsandbytes", "torchao",
            "pytorch-optimizer", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotHere(Exception):
    """What a part is about is not on this machine; the message says what."""


@dataclass
class Bench:
    """Where a part runs.

    Attributes:
        device: CUDA, or the CPU for tiny sizes.
        folder: of the part's own, gone afterwards.
        figures: what it measured, by name.
    """

    device: torch.device
    folder: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether only a few cases are to be gone through, at tiny sizes."""
        return self.device.type == "cpu"

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def trainer(self, case: str, name: str = "run", changes: dict[str, Any] | None = None, **train: Any) -> Trainer:
        """The loop of one of ``tests.every_method.CASES`` on the device, in a folder of that name."""
        folder = self.folder / name
        accelerator = make_accelerator(TrainConfig(device=str(self.device), trackers=[]), folder)
        return make_trainer(case, folder, accelerator, changes, **train)


@dataclass(frozen=True)
class Part:
    """Something that is proved.

    Attributes:
        proves: what, in a few words.
        run: does it; an error means that it is not so.
        on_cpu: whether it makes sense there, at a tiny size.
    """

    proves: str
    run: Callable[[Bench], None]
    on_cpu: bool = True


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions; what was proved with others does not count."""
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {"device": properties.name, "memory (GiB)": round(properties.total_memory / 2**30, 1),
                 "compute capability": f"{properties.major}.{properties.minor}", "CUDA": torch.version.cuda,
                 "cuDNN": torch.backends.cudnn.version()}
    facts |= {"flowdistill": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value of ``other``; NaN where one is not finite."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()


def expect(holds: bool, sentence: str) -> None:
    """AssertionError with a sentence unless it holds; also where Python leaves out ``assert``."""
    if not holds:
        raise AssertionError(sentence)
