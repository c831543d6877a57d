"""The moving average of a network's weights (EMA), and a network that follows another one by its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """A copy of a network whose weights follow it: average <- decay * average + (1 - decay) * weights.

    torch's ``AveragedModel`` keeps its count in a tensor and reads it on the host at every update, which makes a GPU
    wait; here the count is a number and torch's kernel for lists does the rest.

    Args:
        network: the bare network, before it is wrapped. Only weights that train are averaged; the others never change
            and are shared with it.
        decay: in [0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that early weights are soon forgotten.
        device: where the averaged weights rest, another one than the network's; None: beside it.
    """

    def __init__(
        self, network: nn.Module, decay: float, warmup: bool, device: torch.device | str | None = None
    ) -> None:
        frozen = {id(p): p for p in network.parameters() if not p.requires_grad}
        self.network = copy.deepcopy(network, frozen).requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup
        self.device = None if device is None else torch.device(device)
        if self.device is not None:
            for tensor in (*self.network.parameters(), *self.network.buffers()):
                if id(tensor) not in frozen:
                    tensor.data = tensor.data.to(self.device)
        self.count = 0
        self._pairs: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None = None

    def current_decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (1 + self.count) / (10 + self.count)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow ``network``, of the same structure as the first one and always the same object."""
        if self._pairs is None:  # not earlier: sharding replaces the parameters
            own = dict(self.network.named_parameters())
            trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
            self._pairs = (
                [own[name] for name in trained],
                list(trained.values()),
                list(self.network.buffers()),
                list(network.buffers()),
            )
        averages, weights, buffers, current = self._pairs
        step = get_ema_multi_avg_fn(self.current_decay())
        if self.device is None:
            step(averages, weights, self.count)
        else:  # one weight after another: never a second copy of them all
            for average, weight in zip(averages, weights, strict=True):
                step([average], [weight.to(self.device)], self.count)
        if buffers:
            torch._foreach_copy_(buffers, current)
        self.count += 1


    def on(self, device: torch.device) -> nn.Module:
        """The averaged network on ``device``: this one where it is there already, else a copy."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        moved = {id(tensor): tensor.to(device) for tensor in tensors if tensor.device != device}
        if not moved:
            return self.network
        kept = {id(tensor): tensor for tensor in tensors if id(tensor) not in moved}
        parameters = {id(p) for p in self.network.parameters()}
        made = {key: nn.Parameter(value, requires_grad=False) if key in parameters else value
                for key, value in moved.items()}
        return copy.deepcopy(self.network, kept | made)


@torch.no_grad()
def follow(network: nn.Module, leader: nn.Module, share: float) -> None:
    """phi <- (1 - share) phi + share theta: ``network``'s parameters phi that train go some way towards those of
    ``leader`` that train and have their names; frozen ones and those of one of the two only stay.

    SenseFlow's implicit distribution alignment (Ge et al., arXiv 2506.00523), whose lambda is 1 - share. The optimiser
    of ``network`` keeps its moments. Both may be sharded in the same way (FSDP2); nothing is communicated.

    Args:
        share: in [0, 1]; 0 changes nothing, 1 copies, to the last bit.
    """
    theirs = {name: p for name, p in leader.named_parameters() if p.requires_grad}
    pairs = [(p, theirs[name]) for name, p in network.named_parameters() if p.requires_grad and name in theirs]
    if pairs:
        torch._foreach_lerp_([own for own, _ in pairs], [other for _, other in pairs], share)
