"""Frozen parts that rest on the CPU: the same numbers, and on the device only while they are called."""

import pytest
import torch
from torch import nn

from flowdistill.config import RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config, HostConfig, Sid, SidConfig
from flowdistill.networks.lora import LoraSettings
from flowdistill.teachers import load_teacher
from flowdistill.teachers.offload import OffloadHook
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.training.state import network_tensors
from flowdistill.utils.errors import UserError
from tests.tiny import tiny_dit_pipeline

METHODS = {
    "freeflow": lambda teacher: FreeFlow(FreeFlowConfig(), teacher),
    "sid": lambda teacher: Sid(SidConfig(), teacher),  # a gradient through the teacher
    "disback": lambda teacher: DisBack(
        DisBackConfig(degradation_steps=2, degradation_every=1, interval=[1], host=HostConfig()), teacher),
}


def trainer_of(folder, method, offload="none"):
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=4, batch_size=4, checkpoint_every=0, trackers=[], device="cpu", precision="fp32", num_samples=4))
    torch.manual_seed(0)
    made = METHODS[method](load_teacher(tiny_dit_pipeline(), offload=offload, device="cpu"))
    config.method = made.config
    return Trainer(made, config, folder, make_accelerator(config.train, folder))


def recorded(visitor, module, name, moves):
    """Let accelerate's hook move to a device whose name only differs from the CPU's, and write moves down."""
    visitor.hook.hook.execution_device = "cpu"  # a text, which is no torch.device: the hook does not skip the move
    to = module.to
    module.to = lambda device: (moves.append(f"{name} {'home' if visitor.resting else 'out'}"), to(device))[1]


class Noted(OffloadHook):
    """A visitor that knows when it is told to rest."""

    resting = False

    def offload(self):
        self.resting = True
        super().offload()
        self.resting = False


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_and_the_teacher_is_away_for_the_backward_passes(tmp_path, method, monkeypatch):
    plain = trainer_of(tmp_path / "plain", method)
    plain.train()
    monkeypatch.setattr("flowdistill.teachers.teacher.OffloadHook", Noted)
    monkeypatch.setattr("flowdistill.teachers.codec.OffloadHook", Noted)
    trainer, moves = trainer_of(tmp_path / "offload", method, "all"), []
    teacher = trainer.method.teacher
    assert teacher.device == torch.device("cpu") and trainer.method.student().codec is teacher.codec
    recorded(teacher.offload_hook, teacher.network, "network", moves)
    recorded(teacher.codec.offload_hook, teacher.codec.vae, "codec", moves)

    def noted(name):
        return lambda *arguments: moves.append(name)

    for name, role in trainer.roles.items():  # hooks run when the backward pass reaches the role's last layer
        family = role.network.velocity.family
        family.projections(role.network.velocity.backbone)[1].register_full_backward_hook(noted(f"backward {name}"))
    trainer.train()
    for name, role in plain.roles.items():
        other = network_tensors(trainer.roles[name].network)
        assert all(torch.equal(value, other[key]) for key, value in network_tensors(role.network).items())
    assert "network out" in moves and moves.count("backward student") >= 2
    inside = False  # between a move out and the move home there are the backward passes through the critic only
    for move in moves:
        inside = move == "network out" or inside and move != "network home"
        assert not (inside and move == "backward student"), moves
    assert not any(move.startswith("codec") for move in moves)
    trainer.save_samples("now.png")
    assert moves[-2:] == ["codec out", "codec home"]


def test_a_visitor_goes_to_its_device_with_its_arguments():
    """On the meta device, which is another one on every machine."""
    layer = nn.Linear(2, 3)
    visitor = OffloadHook(layer, "meta")
    assert layer.weight.device.type == "cpu"
    out = layer(torch.zeros(1, 2))
    assert out.device.type == layer.weight.device.type == "meta"
    visitor.remove()
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.zeros(1, 2))  # no hook moves the arguments any more


def test_the_device_of_a_teacher_is_where_it_works():
    teacher = load_teacher(tiny_dit_pipeline(), offload="all", device="meta")
    assert teacher.device.type == "meta" and next(teacher.network.parameters()).device.type == "cpu"
    assert teacher.codec.mean.device.type == "meta" and next(teacher.codec.vae.parameters()).device.type == "cpu"
    assert teacher.encode([0, 1]).tensors["class_labels"].device.type == "meta"
    teacher = load_teacher(tiny_dit_pipeline(), offload="all", device="cpu")
    teacher.to("cpu")  # once more
    n, plain = torch.randn(2, *teacher.shape), load_teacher(tiny_dit_pipeline())
    latents = teacher.sample(n, teacher.encode([0, 1]), steps=2)
    assert torch.equal(latents, plain.sample(n, plain.encode([0, 1]), steps=2))
    assert torch.equal(teacher.decode(latents), plain.decode(latents))
    only_codec = load_teacher(tiny_dit_pipeline(), offload="codec", device="cpu")
    assert only_codec.offload_hook is None and only_codec.codec.offload_hook is not None
    only_codec.release()


def test_what_does_not_go_together_is_refused(tmp_path):
    METHODS["lora"] = lambda teacher: Dmd2(Dmd2Config(critic="lora", lora=LoraSettings(2)), teacher)
    try:
        with pytest.raises(UserError, match="teacher.offload is 'all', but adapters"):
            trainer_of(tmp_path / "a", "lora", "all")
        trainer_of(tmp_path / "b", "lora", "codec").train()
    finally:
        METHODS.pop("lora")
    with pytest.raises(UserError, match="teacher.offload is 'vae'; allowed are none, codec, all"):
        load_teacher(tiny_dit_pipeline(), offload="vae")
