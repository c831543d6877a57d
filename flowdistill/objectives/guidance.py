"""Classifier-free guidance that keeps the size of what it guides."""

from __future__ import annotations

from torch import Tensor

from flowdistill.objectives.flow_map import column

NORMS = ("none", "per_sample", "last_dim")


def kept_norm(guided: Tensor, conditional: Tensor, kind: str) -> Tensor:
    """A guided prediction brought back to the norm of the conditional one; both (B, ...), as the network returns them.

    It is no affine map: what it does depends on whether the prediction is the noise, a velocity or the data.

    Args:
        kind: ``none``: as it is; ``per_sample``: never longer than the conditional one, each sample as a whole;
            ``last_dim``: exactly as long, each vector along the last dimension, which is a token where the network's
            output is tokens and else a row of pixels.
    """
    if kind == "none":
        return guided
    if kind == "last_dim":
        own, size = conditional.norm(dim=-1, keepdim=True), guided.norm(dim=-1, keepdim=True)
        return guided * (own / size.where(size > 0, 1.0))  # divided first, as the pipelines do; of 0 it stays 0
    if kind == "per_sample":
        own, size = (value.flatten(1).norm(dim=1) for value in (conditional, guided))
        return guided * column((own / size.where(size > 0, 1.0)).clamp(max=1), guided)
    raise ValueError(f"kind is '{kind}'; it must be one of {', '.join(NORMS)}")
