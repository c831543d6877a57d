"""Copies of networks are those that Python makes."""

import functools
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import ExtendedVelocity
from flowdistill.teachers import load_teacher
from flowdistill.utils import quantized
from tests.copies import copied, python_deepcopy, quick_deepcopy
from tests.families import FAMILIES, clip_encoder, condition_unet
from tests.tiny import tiny_unet

PLAIN = (int, float, str, bool, type(None), type, torch.dtype, torch.device, torch.Size, types.FunctionType,
         types.BuiltinFunctionType)


def alike(one, other, source, met):
    """Go through two copies of ``source`` together: the same types and values, the same objects met again at the same
    places, and of both or of neither the source's own.

    ``met`` has what was met in ``one``: id -> (it, so that no other object gets its id; its counterpart).
    """
    assert type(one) is type(other)
    if isinstance(one, PLAIN) or isinstance(one, tuple) and all(isinstance(value, PLAIN) for value in one):
        assert one == other
        return
    assert (one is source) == (other is source)
    if id(one) in met:
        assert met[id(one)][1] is other
        return
    assert id(other) not in met or one is other
    met[id(one)] = one, other
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
        assert not one.numel() or one is source or {one.data_ptr(), other.data_ptr()}.isdisjoint({source.data_ptr()})
        alike(vars(one), vars(other), vars(source), met)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            alike(value, other[key], source.get(key), met)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for parts in zip(one, other, source, strict=True):
            alike(*parts, met)
    elif isinstance(one, functools.partial):
        alike((one.func, one.args, one.keywords), (other.func, other.args, other.keywords),
              (source.func, source.args, source.keywords), met)
    elif isinstance(one, types.MethodType):
        assert one.__func__ is other.__func__
        alike(one.__self__, other.__self__, source.__self__, met)
    elif isinstance(one, (set, frozenset)):
        assert one == other
    elif hasattr(one, "__dict__"):
        alike(vars(one), vars(other), vars(source), met)


class WithHooks(nn.Module):
    """Knows one module at three places, and calls another one from hooks of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.known = [self.first]
        self.table = OrderedDict(a=self.second)
        self.empty = ({}, set(), [])
        self.call = self.first.forward
        self.ask = functools.partial(self.second.forward, self.first.weight)
        self.first.register_forward_hook(self.hook)
        self.first.register_buffer("numbers", torch.arange(3))
        self.register_buffer("none", None)

    def hook(self, module, args, output):
        return output + 1


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo):
        made = type(self)(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        memo[id(self)] = made
        made.was_copied = True
        return made


class OwnState(nn.Linear):
    def __getstate__(self):
        return self.__dict__ | {"was_copied": True}


def tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)))
    network[1][0].weight = network[0].weight
    network.append(network[1])
    return network


def extended():
    return ExtendedVelocity(load_teacher(FAMILIES["sd"].make()).student_copy(None), ("duration", "guidance"))


def with_adapters():
    return ExtendedVelocity(load_teacher(FAMILIES["dit"].make()).student_copy(LoraSettings(2)), ("duration",))


def of_codes():
    network = nn.Sequential(nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])).requires_grad_(False)
    quantized.quantize(network, "int8", "it")
    return network


NETWORKS = {
    "hooks": WithHooks, "tied": tied, "own copy": lambda: nn.Sequential(OwnCopy(2, 2), nn.Linear(2, 2)),
    "own state": lambda: nn.Sequential(OwnState(2, 2)), "recurrent": lambda: nn.Sequential(nn.LSTM(2, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.ParameterList([nn.Parameter(torch.ones(2))])),
    "normed": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))), "unet": condition_unet,
    "text": lambda: clip_encoder(1), "extended": extended, "adapters": with_adapters, "codes": of_codes,
    **{name: lambda name=name: load_teacher(FAMILIES[name].make(), image_size=FAMILIES[name].image_size).network
       for name in ("flux-dev", "sana", "z-image")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_pythons(name):
    network = NETWORKS[name]()
    network.eval()
    alike(python_deepcopy(network), copied(network), network, {})
    with torch.no_grad():  # none of its numbers is the network's
        for tensor in (made := copied(network)).state_dict().values():
            tensor.zero_()
    assert any(value.any() for value in network.state_dict().values())
    assert not any(value.any() for value in made.state_dict().values())


@pytest.mark.parametrize("name", ["tied", "extended", "adapters"])
def test_what_is_shared_stands_in_both(name):
    network = NETWORKS[name]()
    own = {id(value): value for value in list(network.parameters())[::2]}
    made = dict(copied(network, own).named_parameters())
    alike(python_deepcopy(network, dict(own)), copied(network, own), network, {})
    for key, value in network.named_parameters():
        assert (made[key] is value) == (id(value) in own), key


def test_a_network_that_is_shared_is_not_copied():
    network = tied()
    made = copied(network, {id(network[0]): network[0]})
    assert made[0] is network[0] and made[1] is not network[1] and made[1] is made[2]


@pytest.mark.parametrize("deepcopy", [quick_deepcopy, python_deepcopy])
def test_copies_with_one_memo_know_each_other(deepcopy):
    network, memo = tied(), {}
    first, both = deepcopy(network[0], memo), deepcopy([network, network[1]], memo)
    made = deepcopy(network, memo)
    assert made is both[0] and made[0] is first and made[1] is both[1] is made[2]
    assert first is not network[0] and first.weight is made[1][0].weight is not network[0].weight
    assert deepcopy(network) is not made and torch.equal(deepcopy(network)[0].weight, first.weight)


def test_scripted_parts_are_left_to_torch():
    network = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    made, x = copied(network), torch.ones(1, 2)
    assert torch.equal(made(x), network(x)) and made[0] is not network[0]
    assert made[0].weight.data_ptr() != network[0].weight.data_ptr()


def test_hooks_of_a_copy_act_on_the_copy():
    network = WithHooks()
    made = copied(network)
    hook, = made.first._forward_hooks.values()
    assert hook.__self__ is made and made.call.__self__ is made.first and made.known == [made.first]
    made.second.register_forward_hook(lambda *_: None)
    made.empty[0]["a"] = made.empty[1].add(1)
    assert not network.second._forward_hooks and network.empty == ({}, set(), [])


def test_tiny_networks_are_built_once_and_each_caller_has_its_own():
    one, other = condition_unet(), condition_unet()
    assert all(torch.equal(a, b) and a is not b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).any() and next(condition_unet().parameters()).any()
    assert condition_unet(cross=8).config.cross_attention_dim == 8
    torch.manual_seed(3)
    tiny_unet(), (drawn := torch.rand(1)), torch.manual_seed(4), tiny_unet()
    assert torch.equal(torch.rand(1), drawn)  # by its seed, built or copied
