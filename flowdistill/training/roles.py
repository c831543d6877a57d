"""A method's networks made ready to train: placed, distributed, with optimiser, scaler and average."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from flowdistill.config import OptimizerConfig, TrainConfig
from flowdistill.networks.compilation import HOW, check_blocks, compile_blocks
from flowdistill.teachers import Teacher
from flowdistill.training.average import MovingAverage
from flowdistill.training.fsdp import cut
from flowdistill.training.method import Method, NetworkCall, Role
from flowdistill.training.optimizers import check_shards, make_optimizer
from flowdistill.training.precision import HalfPrecisionForward
from flowdistill.training.state import assign, gather, network_tensors
from flowdistill.utils.devices import usable_device
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import quantized_layers
from flowdistill.utils.randomness import Draw

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
)


@dataclass
class TrainedRole:
    """One network and everything that trains it.

    Attributes:
        network: bare; under FSDP2 its parameters are sharded in place.
        prepared: what accelerate made of it (DDP, FSDP2 or the network itself).
        call: what the method calls.
        scaler: of its own: a shared one would unscale one role's gradients by another role's updates.
        average: the moving average, or None.
        template: an unsharded copy to put whole weights in; None when nothing is sharded.
        skipped, consecutive: updates skipped in all and in a row, 0-d on the device.
    """

    network: nn.Module
    prepared: nn.Module
    call: NetworkCall
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    scaler: torch.amp.GradScaler
    average: MovingAverage | None
    template: nn.Module | None
    skipped: Tensor
    consecutive: Tensor

    def whole(self) -> nn.Module:
        """The averaged network (the trained one when there is no average) on the device that trains, unsharded; a
        collective under FSDP2."""
        source = self.network if self.average is None else self.average.on(self.skipped.device)
        if self.template is None:
            return source
        values = gather(network_tensors(source, self.network))
        assign(network_tensors(self.template), values, "the averaged network")
        return self.template

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def prepare_roles(
    method: Method, config: TrainConfig, precision: str, accelerator: Accelerator
) -> dict[str, TrainedRole]:
    """Place the method on the accelerator's device and wrap its networks.

    Raises:
        UserError: a launcher that is not supported, or not by this method, weights that are not float32, nothing to
            train, no blocks to compile, an optimiser that is not installed or cannot train shares of weights, gradient
            checkpointing for a network that has none, adapters on a teacher that is away at times or on codes that are
            to be cut, or an average on a device that this machine does not have, or apart from weights that are cut.
    """
    kind = accelerator.distributed_type
    if kind not in SUPPORTED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise UserError(
            f"accelerate was launched as {kind.value}, which is not supported; use one process, several "
            "(MULTI_GPU) or FSDP with fsdp_version 2"
        )
    if kind == DistributedType.FSDP and not method.shards:
        raise UserError(f"the method {method.name} cannot be sharded (FSDP); use one process, or several with whole "
                        "networks (MULTI_GPU)")
    roles = method.roles()
    check_not_shared(method.teacher, [role.network for role in roles.values()])
    method.to(accelerator.device)
    if config.compile and config.compile_scope == "blocks":
        compile_blocks(method.teacher.network)
    return {name: _prepare(name, role, config, precision, accelerator) for name, role in roles.items()}


def check_not_shared(teacher: Teacher, networks: Iterable[nn.Module]) -> None:
    """UserError when networks that train stand on the weights of a teacher that goes away between uses."""
    if teacher.offload != "all":
        return
    resting = {id(p) for p in teacher.network.parameters()}
    if any(id(p) in resting for network in networks for p in network.parameters()):
        raise UserError("teacher.offload is 'all', but adapters (method.student or method.critic is 'lora') use the "
                        "teacher's own weights all the time; set teacher.offload to codec")


def loss_of(
    method: Method, name: str, networks: dict[str, NetworkCall], draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """The method's loss of a role; a teacher that only visits the device is away for the backward pass."""
    loss = method.loss(name, networks, draw)
    method.teacher.release()
    return loss


def _prepare(name: str, role: Role, config: TrainConfig, precision: str, accelerator: Accelerator) -> TrainedRole:
    network, device = role.network.to(accelerator.device), accelerator.device
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"the network of the role '{name}' has no parameters that train")
    for parameter in trained:
        if parameter.dtype != torch.float32:
            raise UserError(
                f"the weights of the role '{name}' are {parameter.dtype}; weights that train are float32 "
                "masters, and train.precision makes the passes half precision"
            )
    if config.gradient_checkpointing:
        enable = getattr(network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(
                f"train.gradient_checkpointing is true, but the network of the role '{name}' "
                f"({type(network).__name__}) does not have it; set it to false"
            )
        enable()
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        check_shards(role.optimizer, name)
        if quantized_layers(network):
            raise UserError(f"the role '{name}' has adapters on quantised weights (teacher.quantize), which FSDP "
                            "cannot cut; set it to null, or start several processes with whole networks (MULTI_GPU)")
        if config.ema_device is not None:
            raise UserError(f"train.ema_device is {config.ema_device}, but FSDP cuts the average as it does the "
                            "weights; set it to null")
    # Copies come before the wrapping: a sharded network cannot be copied.
    elsewhere = usable_device(config.ema_device, "train.ema_device")
    average = MovingAverage(network, config.ema_decay, config.ema_warmup, elsewhere) if role.ema else None
    template = copy.deepcopy(network).cpu() if sharded and name == "student" else None
    if sharded:
        for whole in [network] if average is None else [network, average.network]:
            cut(whole, accelerator)  # alike: the average follows its network without communication
    optimizer = make_optimizer(network, role.optimizer)
    if config.compile and config.compile_scope == "blocks":
        check_blocks(compile_blocks(network), name, network)
    prepared = network if sharded else _wrap(network, accelerator)
    call = torch.compile(prepared, **HOW) if config.compile and config.compile_scope == "network" else prepared
    return TrainedRole(
        network=network,
        prepared=prepared,
        call=call if precision == "fp32" else HalfPrecisionForward(call, precision, device),
        optimizer=optimizer,
        config=role.optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        average=average,
        template=template,
        skipped=torch.zeros((), device=device),
        consecutive=torch.zeros((), device=device),
    )


def _wrap(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    with warnings.catch_warnings():
        # accelerate passes DDP an option that torch has begun to rename.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return accelerator.prepare(network)
