"""Compiled blocks and TF32: what is switched, that nothing else changes, and what is refused."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from flowdistill.config import METHODS, TrainConfig, validate
from flowdistill.networks import compilation
from flowdistill.networks.compilation import compile_blocks
from flowdistill.teachers import load_teacher
from flowdistill.training.roles import prepare_roles
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from flowdistill.utils.tf32 import tf32
from tests.families import FAMILIES
from tests.teachers.test_families import teacher_of
from tests.tiny import tiny_dit_pipeline
from tests.toy_method import make_config, make_trainer


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Traces the blocks as the compiler does, without a compiler; what it has traced is forgotten."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setitem(compilation.HOW, "backend", backend)
    yield seen
    torch._dynamo.reset()


def compiled(network):
    return [module for module in network.modules() if module._compiled_call_impl is not None]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("edm", "ncsnpp")])
def test_every_family_has_blocks(name):
    network = teacher_of(name)[1].network
    network = copy.deepcopy(network)
    names = list(network.state_dict())
    count = compile_blocks(network)
    assert count == len(compiled(network)) > 1 and list(network.state_dict()) == names
    for block in compiled(network):  # each by itself: none within another
        assert compiled(block) == [block]


def student_of(**settings):
    """The loop's student, its teacher, and the gradients of one pass."""
    torch.manual_seed(0)
    method = METHODS.get("dmd2")(METHODS.get("dmd2").Config(), load_teacher(tiny_dit_pipeline()))
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    role = prepare_roles(method, TrainConfig(device="cpu", **settings), "fp32", accelerator)["student"]
    draw = Draw(0, 0, rows=2)
    noise, condition = draw.normal(method.teacher.shape), method.teacher.draw_condition(draw)
    out = role.call(noise, torch.full((2,), 0.5), condition)
    out.square().sum().backward()
    return method.teacher, role, {name: p.grad for name, p in role.network.named_parameters() if p.grad is not None}


def test_compiled_blocks_give_the_same_gradients(eager):
    _, _, plain = student_of()
    assert not eager
    teacher, role, blocks = student_of(compile=True, compile_scope="blocks")
    assert eager
    assert len(compiled(teacher.network)) == len(compiled(role.network)) == 2
    average = role.average.network
    assert not compiled(average) and list(average.state_dict()) == list(role.network.state_dict())
    assert plain.keys() == blocks.keys() and plain
    for name, value in plain.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-4, atol=1e-5)


def test_blocks_that_are_not_there_and_a_scope_of_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="role 'student' .Sequential. repeats no block; set it to network"):
        make_trainer(tmp_path, compile=True, compile_scope="blocks")
    assert compile_blocks(nn.Linear(2, 2)) == 0
    with pytest.raises(UserError, match="'train.compile_scope' is blocks, but 'train.compile' is false"):
        validate(TrainConfig(compile_scope="blocks"), prefix="train.")


@pytest.mark.parametrize("allowed", [None, True, False])
def test_tf32_is_switched_for_the_run_and_back(tmp_path, monkeypatch, allowed):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = [switch.allow_tf32 for switch in switches], []

    def run(config):
        seen.extend(switch.allow_tf32 for switch in switches)

    monkeypatch.setattr("flowdistill.training.run.distill_one", run)
    monkeypatch.setattr("flowdistill.training.run.method_class", lambda name: METHODS.get("dmd2"))
    distill(make_config(tmp_path, tf32=allowed))
    assert seen == (before if allowed is None else [allowed] * 2)
    assert [switch.allow_tf32 for switch in switches] == before
    with pytest.raises(ValueError), tf32(True):
        raise ValueError
    assert [switch.allow_tf32 for switch in switches] == before
