"""FSDP2: a network cut into one part a process, in place, as accelerate's configuration says."""

from __future__ import annotations

import functools

from accelerate import Accelerator
from accelerate.utils import get_module_children_bottom_up
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy


def cut(network: nn.Module, accelerator: Accelerator) -> None:
    """Replace the parameters of ``network`` by this process's share of them.

    accelerate's size-based policy picks lists of blocks as well, which torch refuses because nobody calls a list; so
    that policy is applied here, to modules that are called, and accelerate does the rest.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    if (policy.func if isinstance(policy, functools.partial) else policy) is not size_based_auto_wrap_policy:
        fsdp2_prepare_model(accelerator, network)
        return
    for module in units(network, plugin.min_num_params):
        fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, offload_policy=plugin.cpu_offload)
    plugin.auto_wrap_policy = None
    try:
        fsdp2_prepare_model(accelerator, network)
    finally:
        plugin.auto_wrap_policy = policy


def units(network: nn.Module, least: int) -> list[nn.Module]:
    """The modules of more than ``least`` parameters that are cut each by itself, inner ones first; not ``network``."""
    found = dict.fromkeys(get_module_children_bottom_up(network)[:-1])  # each once, however many have it
    return [module for module in found
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict, FSDPModule))
            and sum(p.numel() for p in module.parameters()) > least]


def reshard(network: nn.Module) -> None:
    """Free whole parameters that a pass without a gradient left behind, so that ``network.parameters()`` are this
    process's share and the next pass gathers them anew; nothing where nothing is sharded."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
