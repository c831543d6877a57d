"""Layers of codes: what they compute, the gradients through them, what a pass keeps, and the way back."""

import copy

import pytest
import torch
from torch import nn

from flowdistill.utils import quantized
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import (
    SCHEMES,
    QuantizedLinear,
    check_gradients,
    dequantize,
    parameter_count,
    plain_tensors,
    quantize,
    quantized_layers,
)

# Of normal weights in rows of 64 and 96.
ERRORS = {"int8": 0.008, "fp8": 0.04, "nf4": 0.12}
BYTES = {"int8": 96 * 64 + 4 * 96, "fp8": 96 * 64 + 4 * 96, "nf4": 96 * 64 // 2 + 4 * 96}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64, bias=False)])])
        self.small = nn.ModuleList([nn.Linear(8, 8)])
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.blocks[0]:
            x = layer(x)
        return x


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_of_codes_are_near_and_pass_gradients_in_both_modes(scheme, dtype):
    exact = Net().to(dtype)
    coarse = copy.deepcopy(exact)
    assert quantize(coarse, scheme, "it") == 2 and type(coarse.first) is type(coarse.small[0]) is nn.Linear
    layer = coarse.blocks[0][0]
    assert layer.weight.dtype == torch.int8 and not layer.weight.requires_grad
    assert layer.weight.nbytes + layer.weight_scale.nbytes == BYTES[scheme]
    assert parameter_count(coarse) == parameter_count(exact) == sum(p.numel() for p in exact.parameters())
    x, direction = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        x.requires_grad_(True)
        out = coarse(x)
    assert not kept  # no weights, and not the input: nothing here trains
    wanted = exact(x)
    assert out.dtype == dtype and 0 < relative(out, wanted) < 1.5 * ERRORS[scheme]
    given, gradient = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (out, wanted))
    assert given.dtype == dtype and relative(given, gradient) < 2 * ERRORS[scheme]
    x = x.detach()
    value, tangent = torch.func.jvp(coarse, (x,), (direction,))
    plain = copy.deepcopy(coarse)
    dequantize(plain)
    assert torch.equal(value, plain(x))
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (x,), (direction,))[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_autocast_and_with_second_derivatives(scheme):
    net = Net()
    quantize(net, scheme, "it")
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    assert first.dtype == torch.float32
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_way_back_and_copies(scheme):
    net = Net()
    names = net.state_dict().keys()
    quantize(net, scheme, "it")
    twin = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    assert all(one is other for one, other in zip(net.parameters(), twin.parameters(), strict=True))
    x = torch.randn(3, 64)
    plain = plain_tensors(net)
    assert plain.keys() == names
    other = Net()
    other.load_state_dict(plain)
    assert torch.equal(net(x), twin(x)) and torch.equal(net(x), other(x))
    dequantize(twin)
    assert not quantized_layers(twin) and len(quantized_layers(net)) == 2 and torch.equal(twin(x), net(x))
    assert twin.state_dict().keys() == names


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_the_meta_device_the_bytes_are_the_same(scheme):
    real, planned = Net(), Net().to("meta")
    for net in (real, planned):
        quantize(net, scheme, "it")
    assert [(p.shape, p.dtype) for p in real.parameters()] == [(p.shape, p.dtype) for p in planned.parameters()]
    assert planned(torch.empty(2, 64, device="meta")).shape == (2, 64)


def test_a_row_of_zeros_stays_one():
    layer = nn.Linear(64, 64)
    layer.weight.data[3] = 0
    for scheme in SCHEMES:
        made = QuantizedLinear(layer, scheme).made_weight()
        assert torch.isfinite(made).all() and (made[3] == 0).all()


def test_nothing_to_quantise_and_a_missing_package_are_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="nothing of the Linear can be kept in int8: .*4,096 weights; set it to null"):
        quantize(nn.Linear(64, 64), "int8", "it")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nf4 need the package bitsandbytes.*pip install .flowdistill.quantization.*"):
        quantize(Net(), "nf4", "it")


class CutLinear(nn.Linear):
    """What layers do that round their input."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x.round().detach() @ self.weight.to(x.dtype)


def test_somebody_elses_layers_that_cut_the_gradient_are_refused():
    check_gradients(Net(), torch.float32)
    with pytest.raises(UserError, match="Sequential has weights of the type Parameter, through which no gradient"):
        check_gradients(nn.Sequential(nn.Linear(2, 4), CutLinear()), torch.float32)
