"""Frozen weights in 8 or 4 bits: linear layers that keep codes and make their weights anew in every pass.

| scheme | bytes a weight | a weight is | package |
|---|---|---|---|
| int8 | 1 | a code, -127 to 127, times the scale of its row | |
| fp8 | 1 | a float8 (e4m3), up to 448, times the scale of its row | |
| nf4 | 0.56 | a quantile of the normal distribution times the scale of 64 weights (arXiv 2305.14314) | bitsandbytes |

Nothing else is rounded: activations, biases, norms, embeddings and the layers outside the repeated blocks keep their
type. Gradients to the input pass exactly, in backward and in forward mode, and a pass keeps codes for them, not
weights. Layers of libraries do not do all of it: torchao's tensors keep each layer's weights in whole precision until
the backward pass, or cut the gradient where they round activations too, and bitsandbytes' layers know no forward mode.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import quiet_libraries

SCHEMES = ("int8", "fp8", "nf4")
SMALLEST = 4096
"""Weights of a layer below which it stays as it is: it saves nothing."""
BLOCK = 64
"""Weights of nf4 that share a scale."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
FLOAT8 = torch.float8_e4m3fn


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of codes.

    Attributes:
        weight: the codes, int8 whatever the scheme: (out, in), of nf4 two to a byte, (bytes, 1).
        weight_scale: float32: a row's (out, 1), of nf4 a block's (blocks,).
        scheme: one of ``SCHEMES``.
        dtype: of the weights that are made of them.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme, self.dtype = scheme, linear.weight.dtype
        codes, scale = _encoded(linear.weight.detach(), scheme)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def made_weight(self) -> Tensor:
        """The weights (out, in), in ``dtype``."""
        return _decoded(self.weight, self.weight_scale, self.scheme, (self.out_features, self.in_features), self.dtype)

    def plain(self) -> nn.Linear:
        """The layer with its rounded weights, which computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.made_weight(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class _Product(torch.autograd.Function):
    """x W^T + b of codes, which keeps the codes for the gradient to x, and not W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layer: QuantizedLinear) -> Tensor:
        return F.linear(x, layer.made_weight(), layer.bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantizedLinear], output: Tensor) -> None:
        ctx.layer, ctx.dtype = inputs[1], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.layer.made_weight().to(gradient.dtype)).to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, layer: None) -> Tensor:
        return F.linear(tangent, ctx.layer.made_weight())


def weight_of(linear: nn.Linear) -> Tensor:
    """The weights (out, in) of a linear layer, which may be one of codes."""
    return linear.made_weight() if isinstance(linear, QuantizedLinear) else linear.weight


def quantize(network: nn.Module, scheme: str, key: str) -> int:
    """Replace the linear layers of a network's repeated blocks by layers of codes, in place.

    Args:
        network: frozen, in the type in which it computes.
        scheme: one of ``SCHEMES``.
        key: the setting that asks for it, for messages.

    Returns:
        How many layers.

    Raises:
        UserError: no such layer, or a package that is missing.
    """
    check_scheme(scheme)
    found = [(owner, name, layer)
             for block in network.modules() if isinstance(block, nn.ModuleList)
             for owner in block.modules() for name, layer in owner.named_children()
             if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST]
    done: dict[int, QuantizedLinear] = {}
    for owner, name, layer in found:  # lists in lists name a layer twice
        if id(layer) not in done:
            done[id(layer)] = QuantizedLinear(layer, scheme)
        setattr(owner, name, done[id(layer)])
    if not done:
        raise UserError(f"nothing of the {type(network).__name__} can be kept in {scheme}: its blocks have no linear "
                        f"layer of at least {SMALLEST:,} weights; set {key} to null")
    return len(done)


def check_scheme(scheme: str) -> None:
    """UserError for a scheme whose package is not installed; nothing is imported."""
    if scheme == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError("weights in nf4 need the package bitsandbytes, which is not installed: "
                        "pip install 'flowdistill[quantization]'")


def quantized_layers(network: nn.Module) -> list[QuantizedLinear]:
    """The layers of codes."""
    return [module for module in network.modules() if isinstance(module, QuantizedLinear)]


def dequantize(network: nn.Module) -> None:
    """Make the layers of codes ordinary ones, in place."""
    for owner in list(network.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, QuantizedLinear):
                setattr(owner, name, layer.plain())


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state dictionary on the CPU, that of a network without codes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            del tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = module.made_weight().cpu().contiguous()
    return tensors


def parameter_count(network: nn.Module) -> int:
    """How many parameters a network has, codes counted as the weights that they stand for."""
    layers = quantized_layers(network)
    kept = sum(layer.weight.numel() + layer.weight_scale.numel() for layer in layers)
    whole = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(p.numel() for p in network.parameters()) - kept + whole


def foreign_layers(network: nn.Module) -> list[nn.Linear]:
    """Linear layers that another library has quantised, one of each kind."""
    kinds: dict[tuple[type, type], nn.Linear] = {}
    for module in network.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear):
            plain = type(module.weight) is nn.Parameter and module.weight.is_floating_point()
            if not plain:
                kinds.setdefault((type(module), type(module.weight)), module)
    return list(kinds.values())


def check_gradients(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse weights of another library's through which no gradient passes: losses would miss a term silently.

    Raises:
        UserError: so.
    """
    for layer in foreign_layers(network):
        x = torch.zeros(2, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True)
        with torch.enable_grad():
            flows = layer(x).requires_grad
        if not flows:
            raise UserError(f"the {type(network).__name__} has weights of the type {type(layer.weight).__name__}, "
                            "through which no gradient passes to the input (a scheme that rounds activations); load it "
                            "without, and set teacher.quantize to int8, fp8 or nf4")


def _encoded(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    if scheme == "nf4":
        count = weight.numel()
        if weight.is_meta:
            blocks = torch.empty(-(-count // BLOCK), device="meta")
            return torch.empty((-(-count // 2), 1), dtype=torch.int8, device="meta"), blocks
        codes, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return codes.view(torch.int8), state.absmax.float()
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST[scheme]
    scaled = weight.float() / scale
    if scheme == "int8":
        return scaled.round().clamp(-127, 127).to(torch.int8), scale
    return scaled.clamp(-448, 448).to(FLOAT8).view(torch.int8), scale


def _decoded(codes: Tensor, scale: Tensor, scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if scheme == "int8":
        return (codes * scale).to(dtype)
    if scheme == "fp8":
        return (codes.view(FLOAT8).float() * scale).to(dtype)
    if codes.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    library = _bitsandbytes()
    table = library.get_4bit_type("nf4", device=codes.device)
    state = library.QuantState(scale, shape=torch.Size(shape), code=table, blocksize=BLOCK, quant_type="nf4",
                               dtype=dtype)
    return library.dequantize_4bit(codes.view(torch.uint8), state)


def _bitsandbytes() -> Any:
    with quiet_libraries():
        return importlib.import_module("bitsandbytes.functional")
