"""A diffusers backbone as a velocity field on the linear path, and the same with extra scalar conditions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.attention import FORWARD_ONLY, attention_kernels, only_math, use_attention
from flowdistill.networks.backbones import Backbone, BackboneFamily
from flowdistill.networks.lora import LoraSettings, add_lora, lora_layers
from flowdistill.paths.native_path import Coefficients, NativePath
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import foreign_layers

EMBEDDING_FREQUENCIES = 256
Around = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes the context in which a block that is recomputed runs, each time."""
TARGET_TIMES = ("separate", "reuse")


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values shaped and typed to multiply x (B, ...)."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class VelocityNetwork(nn.Module):
    """v(x, t) of a diffusers backbone, whatever it predicts and whatever schedule it was trained on.

    ``forward(x, t, condition)`` takes x (B, C, H, W) on the linear path and t (B,) in [t_min, t_max] and returns the
    velocity E[n - x_0 | x_t = x] (B, C, H, W) in x's dtype. No guidance here. With ``lora`` the backbone is frozen and
    gets adapters that train.

    Attributes:
        attention: the kernels it is called with, of :mod:`flowdistill.networks.attention`.
        whole: makes the backbone anew with the weights it had before they were quantised; None where they are not.
    """

    def __init__(
        self,
        backbone: Backbone,
        path: NativePath,
        family: BackboneFamily,
        attention: str = "sdpa",
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Backbone = backbone if lora is None else add_lora(backbone, lora)
        self.lora = lora
        self.path = path
        self.family = family
        self.attention = attention
        self.whole: Callable[[], Backbone] | None = None
        self._dtype: tuple[torch.dtype, torch.dtype] = (self._first_dtype(), backbone.dtype)

    def _first_dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in; looked for again when its first weight has another type than before.

        diffusers goes through every module for it, which of a small network takes 1 % of its forward pass.
        """
        first = self._first_dtype()
        if first != self._dtype[0]:
            self._dtype = (first, self.backbone.dtype)
        return self._dtype[1]

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition | None = None, asked_at: Tensor | None = None,
        native: bool = False,
    ) -> Tensor:
        """``asked_at`` (B,): time that the backbone is told instead of ``t``; every scale stays that of ``t``.

        ``native``: ``x`` and ``t`` are what the backbone itself takes, and its prediction is returned as it is.
        """
        if native:
            return self._predict(x, t, condition).to(x.dtype)
        return self.with_coefficients(x, self.coefficients(t, asked_at), condition)

    def _predict(self, native: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        if self.attention in FORWARD_ONLY and native.requires_grad and torch.is_grad_enabled():
            raise UserError(f"teacher.attention is {self.attention}, which has no backward pass, and this loss needs "
                            "the gradient through the teacher; set it to auto")
        with attention_kernels(self.attention):
            return self.family.call(self.backbone, native.to(self.dtype), timestep.float(), condition)

    def coefficients(self, t: Tensor, asked_at: Tensor | None = None) -> Coefficients:
        """Coefficients of the path at times ``t``, the backbone's timestep at ``asked_at``; see :meth:`forward`."""
        c = self.path.coefficients(t)  # float64: these divide by 1 - t, and half precision loses exactly that
        return c if asked_at is None else replace(c, timestep=self.path.coefficients(asked_at).timestep)

    def with_coefficients(self, x: Tensor, c: Coefficients, condition: Condition | None = None) -> Tensor:
        """Do what :meth:`forward` does with given coefficients: ``c`` of (B,), or of (1,) but for its timestep (B,)."""
        native = x * per_sample(c.input_scale, x)
        prediction = self._predict(native + c.input_shift if c.input_shift else native, c.timestep, condition)
        # Under autocast the prediction may be half; the affine map must not be.
        return x * per_sample(c.state, x) + prediction.to(x.dtype) * per_sample(c.output, x)

    def frozen_copy(self, path: NativePath | None = None) -> VelocityNetwork:
        """A second module tree over the very same parameter tensors, for adapters on top of shared weights."""
        tree = copy.deepcopy(self.backbone, {id(p): p for p in self.backbone.parameters()})
        return VelocityNetwork(tree, path or self.path, self.family, self.attention)

    def trainable_copy(self, path: NativePath | None = None, lora: LoraSettings | None = None) -> VelocityNetwork:
        """An independent float32 copy with gradients: trained weights are float32 masters.

        With ``lora``, a :meth:`frozen_copy` and float32 adapters that train. Either stays in evaluation mode: a
        distilled student must match its frozen teacher, whose label dropout and dropout are off.

        Raises:
            UserError: the backbone has adapters of somebody else's in it, or its weights are somebody else's codes.
        """
        if self.lora is None and next(lora_layers(self.backbone), None) is not None:
            raise UserError("the pipeline's network has an adapter in it, which a student could not be told from; call "
                            "fuse_lora() and unload_lora_weights() first")
        kernel = "sdpa" if self.attention in FORWARD_ONLY else self.attention
        if lora is not None:
            tree = self.frozen_copy().backbone
            use_attention(tree, kernel)
            return VelocityNetwork(tree, path or self.path, self.family, kernel, lora).eval()
        if self.whole is not None:
            backbone = self.whole()
        elif foreign_layers(self.backbone):
            raise UserError(f"the weights of the pipeline's {type(self.backbone).__name__} are quantised, and a copy "
                            "that trains needs whole ones; load it without, and set teacher.quantize, or train "
                            "adapters (method.student and method.critic: lora)")
        else:
            backbone = copy.deepcopy(self.backbone)
        use_attention(backbone, kernel)
        if self.dtype != torch.float32:
            backbone = backbone.float()
        copied = VelocityNetwork(backbone, path or self.path, self.family, attention=kernel)
        copied.requires_grad_(True).eval()
        for module in copied.modules():
            if isinstance(module, GaussianFourierProjection):  # its frequencies are drawn once and never trained
                module.requires_grad_(False)
        return copied


class ScalarEmbedding(nn.Module):
    """Sinusoidal embedding of a raw scalar (B,), then a two-layer MLP whose last layer starts at zero.

    FreeFlow, official code: 256 frequencies, maximal period 10,000, raw value (not times 1,000).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.frequencies = Timesteps(EMBEDDING_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(EMBEDDING_FREQUENCIES, size)
        nn.init.zeros_(self.mlp.linear_2.weight)
        nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(self.frequencies(value).to(self.mlp.linear_1.weight.dtype))


class _AddToTimeEmbedding:
    """Forward hook that adds the current extra embedding to a time embedding.

    An object, not a closure, so that a deep copy of the network (EMA) owns a copy of it.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output if self.value is None else output + self.value.to(output.dtype)

    def checkpoint(self, around: Around, block: nn.Module, *args: object) -> object:
        """Activation checkpointing that recomputes a block with the embedding, and by the attention kernels, of its own
        forward pass."""
        value, kernel = self.value, "math" if only_math() else "sdpa"

        def run(*inner: object) -> object:
            current, self.value = self.value, value
            try:
                with attention_kernels(kernel), around():
                    return block(*inner)
            finally:
                self.value = current

        return checkpoint(run, *args, use_reentrant=False)


class ExtendedVelocity(nn.Module):
    """A velocity network with extra scalar conditions, added to its time embedding and zero at the start.

    With ``scalars=("duration", "guidance")`` it is a flow map's average velocity, with ``("guidance",)`` a critic that
    knows which guidance scale made the sample it looks at. Before training it equals the velocity network bit for bit.

    With ``target_time="reuse"`` a duration d has no embedding: the backbone is told the time t - d through its own time
    channel, while the input and output scales stay those of t (BOOT's other wiring). Before training that equals the
    velocity network at d = 0.

    ``forward(x, t, condition, **scalars)``: x (B, C, H, W), t (B,), each scalar (B,); returns (B, C, H, W).
    """

    def __init__(
        self, velocity: VelocityNetwork, scalars: tuple[str, ...] = (), target_time: str = "separate"
    ) -> None:
        super().__init__()
        if target_time not in TARGET_TIMES:
            raise ValueError(f"target_time is '{target_time}'; it must be one of {', '.join(TARGET_TIMES)}")
        self.velocity = velocity
        self.target_time = target_time
        if target_time == "reuse":
            scalars = tuple(name for name in scalars if name != "duration")
        size = velocity.family.embedding_size(velocity.backbone)
        self.embeddings = nn.ModuleDict({name: ScalarEmbedding(size) for name in scalars})
        self._extra = _AddToTimeEmbedding()
        for module in velocity.family.time_embeddings(velocity.backbone):
            module.register_forward_hook(self._extra)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None, **scalars: Tensor) -> Tensor:
        asked_at = self._asked_at(t, scalars)
        self._extra.value = self.extra_embedding(**scalars)
        return self.velocity(x, t, condition, asked_at)

    def _asked_at(self, t: Tensor, scalars: dict[str, Tensor]) -> Tensor | None:
        """The time that the backbone is told, where it is not ``t``; takes the duration out of ``scalars``."""
        return t.double() - scalars.pop("duration").double() if self.target_time == "reuse" else None

    def fixed(self, t: Tensor, **scalars: Tensor) -> Callable[[Tensor, Condition | None], Tensor]:
        """:meth:`forward` at one time, bit for bit: what the time and the scalars make is computed here and once.

        Args:
            t, scalars: (1,) each.

        Returns:
            ``(x, condition) -> velocity``; of the weights as they are now, so not one to keep while they train.
        """
        c = self.velocity.coefficients(t, self._asked_at(t, scalars))
        extra = self.extra_embedding(**scalars)

        def velocity(x: Tensor, condition: Condition | None = None) -> Tensor:
            self._extra.value = extra
            rows = replace(c, timestep=c.timestep.expand(len(x)))
            return self.velocity.with_coefficients(x, rows, condition)

        return velocity

    def extra_embedding(self, **scalars: Tensor) -> Tensor | None:
        """Sum of the extra embeddings (B, D); None when there are none."""
        if set(scalars) != set(self.embeddings):
            raise ValueError(f"expected the scalars {sorted(self.embeddings)}, got {sorted(scalars)}")
        total: Tensor | None = None
        for name, embedding in self.embeddings.items():
            part = embedding(scalars[name])
            total = part if total is None else total + part
        return total

    def enable_gradient_checkpointing(self, around: Around = contextlib.nullcontext) -> None:
        """Recompute activations in the backward pass (diffusers' blocks) to save memory.

        ``around`` makes a context in which each block runs, the first time and again.
        """
        self.velocity.backbone.enable_gradient_checkpointing(partial(self._extra.checkpoint, around))
