"""torch.compile of a network's repeated blocks: one of a kind is compiled, and all use it."""

from __future__ import annotations

from typing import Any

from torch import nn

from flowdistill.utils.errors import UserError

HOW: dict[str, Any] = {}
"""Arguments of ``torch.compile``; the tests have another backend."""


def compile_blocks(network: nn.Module) -> int:
    """Compile the blocks of a network each by itself, in place: parameters and their names stay.

    These are of the classes that diffusers lists for the network (``_repeated_blocks``), else the members of lists of
    one class. What is around them, such as adapters on other layers, is not compiled.

    Returns:
        How many; 0 where nothing is repeated.
    """
    listed = {name for module in network.modules() for name in getattr(module, "_repeated_blocks", None) or ()}
    if listed:
        blocks = [module for module in network.modules() if type(module).__name__ in listed]
    else:
        blocks = _in_lists(network)
    for block in blocks:
        block.compile(**HOW)
    return len(blocks)


def check_blocks(count: int, name: str, network: nn.Module) -> None:
    """UserError for the network of the role ``name`` without repeated blocks."""
    if not count:
        raise UserError(f"train.compile_scope is blocks, but the network of the role '{name}' "
                        f"({type(network).__name__}) repeats no block; set it to network")


def _in_lists(module: nn.Module) -> list[nn.Module]:
    """The members of lists of several modules of one class; not what is inside these."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(one) for one in child}) == 1:
            found += child
        else:
            found += _in_lists(child)
    return found
