"""A network that follows another one by its weights, and the loop's place for it."""

import copy

import pytest
import torch
from torch import nn

from flowdistill.config import OptimizerConfig
from flowdistill.training.average import follow
from flowdistill.training.optimizers import make_optimizer
from tests.toy_method import ToyConfig, ToyMethod, make_trainer


def two():
    """A network and its leader: other numbers, and each with a layer that the other does not have."""
    torch.manual_seed(0)
    network, leader = (nn.ModuleDict({"shared": nn.Linear(3, 2), name: nn.Linear(2, 2)}) for name in ("own", "other"))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    network["frozen"], leader["frozen"] = frozen, copy.deepcopy(frozen)
    with torch.no_grad():
        leader["frozen"].weight.add_(1)
    network["partly"], leader["partly"] = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    return network, leader


def values(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("share", [0.0, 0.03, 0.8, 1.0])
def test_what_trains_in_both_goes_a_share_of_the_way(share):
    network, leader = two()
    before, theirs = values(network), values(leader)
    follow(network, leader, share)
    after = values(network)
    for name, value in before.items():
        if not name.startswith("shared"):
            assert torch.equal(after[name], value), name  # frozen in one of them, or not in both
        elif share in (0.0, 1.0):
            assert torch.equal(after[name], theirs[name] if share else value)
        else:
            assert torch.allclose(after[name], (1 - share) * value + share * theirs[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(after[name], value)
    assert all(torch.equal(values(leader)[name], value) for name, value in theirs.items())


def test_moments_and_gradients_stay():
    network, leader = two()
    optimizer = make_optimizer(network, OptimizerConfig(lr=0.1))
    network["shared"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weight = network["shared"].weight
    gradient, state = weight.grad.clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    follow(network, leader, 0.5)
    assert torch.equal(weight.grad, gradient) and weight.requires_grad and weight.is_leaf
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())


def test_the_loop_says_after_each_update_and_after_the_average(tmp_path, monkeypatch):
    said = []

    def after_update(method, role):
        said.append((role, values(method.roles()["student"].network), trainer.roles["student"].average.count))

    monkeypatch.setattr(ToyMethod, "after_update", after_update)
    trainer = make_trainer(tmp_path, ToyConfig(critic_updates=2, bad_steps=[1]), steps=2)
    start = values(trainer.roles["student"].network)
    trainer.train_step()
    (role, updated, count), *others = said
    assert (role, count) == ("student", 1) and [role for role, *_ in others] == ["critic", "critic"]
    assert any(not torch.equal(updated[name], value) for name, value in start.items())
    assert all(torch.equal(updated[name], value) for name, value in values(trainer.roles["student"].network).items())
    trainer.train_step()
    assert len(said) == 6 and trainer.roles["student"].skipped == 1  # a skipped update is said too
