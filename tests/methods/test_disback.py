"""DisBack (arXiv 2408.15991): its path (Eq. 7), the way back along it (Eqs. 5, 8), its state, and its code's faults."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowdistill.config import EvaluationConfig, OptimizerConfig, RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.disback import DisBack, DisBackConfig, TargetSchedule
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config, HostConfig
from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers import load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.training.snapshots import WeightSnapshots
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.objectives.test_distribution_matching import SHIFT, SIGMA, TEACHER_MEAN, TEACHER_STD, T, quadrature
from tests.processes import ranks
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import figures, shard, weights

HOST = {
    "optimizer": OptimizerConfig(lr=1e-3, betas=[0.0, 0.99]),
    "critic_optimizer": OptimizerConfig(lr=2e-3, betas=[0.0, 0.99]),
}
SHORT = {"degradation_steps": 5, "degradation_every": 2, "interval": [2]}  # nodes at 2, 4, 5; targets 2, 1, 0


def teacher_of(dtype="float32"):
    return load_teacher(tiny_unet_pipeline(), null_label=3, dtype=dtype)


def config_of(host=None, **settings):
    return DisBackConfig(**{**SHORT, **settings}, host=HostConfig(**HOST, **(host or {})))


def trainer_of(folder, config, teacher=None, kind=DisBack, fsdp2=False, **train):
    settings = {"steps": 12, "batch_size": 4, "log_every": 1, "checkpoint_every": 0, "trackers": [], "device": "cpu",
                "precision": "fp32", "ema_decay": 0.5} | train  # fmt: skip
    run = RunConfig(output_dir=str(folder), teacher=TeacherConfig("tiny"), method=config, train=TrainConfig(**settings),
                    evaluation=EvaluationConfig())
    accelerator = make_accelerator(run.train, folder)
    if fsdp2:
        shard(accelerator)
    torch.manual_seed(0)
    return Trainer(kind(config, teacher or teacher_of()), run, folder, accelerator)


def stepping(trainer, steps):
    """(target, generator's weights, critic's weights) after each step."""
    seen = []
    for _ in range(steps):
        trainer.train_step()
        roles = trainer.roles
        copies = [{k: v.clone() for k, v in roles[name].network.state_dict().items()} for name in ("student", "critic")]
        seen.append((trainer.method.targets.index, *copies))
    return seen


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def nodes(folder):
    return {int(file.stem[-3:]): load_file(file) for file in sorted((folder / "path").iterdir())}


# --- the path


def test_degradation_of_a_linear_denoiser_follows_its_closed_form():
    """Gradient flow of the critic's loss on N(-0.5, 0.3^2) samples, from the denoiser of N(1, 0.7^2)."""
    z, n, weight = quadrature()
    x = SHIFT + 0.3 * z
    native = (x + SIGMA * n)[:, 0]

    def loss(theta):  # D = A x_nat + B; t^2 times the velocity's loss is the denoiser's
        denoised = theta[0] * native + theta[1]
        velocity = ((native / (1 + SIGMA) - denoised) / T).reshape(-1, 1)
        return (weight[:, 0] * T**2 * dm.flow_matching_loss(velocity, x, n)).sum()

    def slope(theta):
        theta = theta.detach().requires_grad_()
        return -torch.autograd.grad(loss(theta), theta)[0]

    def denoiser(mean, std):
        share = std**2 / (std**2 + SIGMA**2)
        return torch.tensor([share, (1 - share) * mean], dtype=torch.float64)

    theta, goal = denoiser(TEACHER_MEAN, TEACHER_STD), denoiser(SHIFT, 0.3)
    assert theta.tolist() == pytest.approx([0.433628, 0.566372], abs=1e-6)
    assert goal.tolist() == pytest.approx([0.123288, -0.438356], abs=1e-6)
    found, excess = {}, [loss(theta) - loss(goal)]
    h = 1 / 400
    for step in range(1, 801):  # Runge-Kutta 4
        k1 = slope(theta)
        k2 = slope(theta + h / 2 * k1)
        k3 = slope(theta + h / 2 * k2)
        theta = theta + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(theta + h * k3))
        found[step / 400] = theta
        excess.append(loss(theta) - loss(goal))
    assert found[0.25].tolist() == pytest.approx([0.47408, 0.23804], abs=1e-5)
    assert found[1.0].tolist() == pytest.approx([0.35346, -0.17717], abs=1e-5)
    hessian = torch.tensor([[SHIFT**2 + 0.3**2 + SIGMA**2, SHIFT], [SHIFT, 1.0]], dtype=torch.float64)
    closed = goal + torch.linalg.matrix_exp(-2 * hessian) @ (denoiser(TEACHER_MEAN, TEACHER_STD) - goal)
    assert torch.allclose(found[1.0], closed, atol=1e-9)
    assert [excess[round(400 * tau)].item() for tau in (0, 0.25, 0.5, 1, 2)] == pytest.approx(
        [0.792055, 0.340829, 0.176269, 0.060021, 0.008325], abs=2e-6)
    assert all(later < earlier for earlier, later in zip(excess[:-1], excess[1:], strict=True))


def test_stage_one_records_the_critic_and_leaves_the_generator_alone(tmp_path):
    teacher = teacher_of()
    trainer = trainer_of(tmp_path, config_of(), teacher)
    start = {k: v.clone() for k, v in trainer.roles["student"].network.state_dict().items()}
    assert same(start, {f"velocity.{k}": v for k, v in teacher.network.state_dict().items()})  # node 0 is the teacher
    seen = stepping(trainer, 6)
    assert all(same(start, student) for _, student, _ in seen[:5]) and not same(start, seen[5][1])
    assert trainer.roles["student"].average.count == 1
    recorded = nodes(tmp_path)
    assert list(recorded) == [1, 2, 3]
    for index, steps in ((1, 2), (2, 4), (3, 5)):  # after whole intervals, not after one step as in the published code
        assert same(recorded[index], seen[steps - 1][2])
    assert not same(recorded[1], {f"velocity.{k}": v for k, v in teacher.network.state_dict().items()})


def test_targets_are_visited_in_reverse_and_end_with_the_teacher(tmp_path):
    teacher = teacher_of()
    original = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    trainer = trainer_of(tmp_path, config_of(), teacher)
    host, visited = trainer.method.host, []
    for step in range(12):
        trainer.train_step()
        network = host.target.network
        if step >= 5:
            visited.append(trainer.method.targets.index)
            if visited[-1]:  # every load takes: the target has all of the node's weights, unlike in the published code
                assert same(network.state_dict(), nodes(tmp_path)[visited[-1]])
    assert visited == [2, 2, 1, 1, 0, 0, 0]  # and the last one is not skipped (as in the published code)
    assert host.target is teacher and same(teacher.network.state_dict(), original)
    assert trainer.method.node is None  # nothing but the teacher is kept in memory


def test_stage_two_starts_with_the_last_nodes_critic_and_no_gradient_toward_it(tmp_path):
    """A fault of the published code; and a target equal to the critic moves nothing."""
    trainer = trainer_of(tmp_path, config_of())
    for _ in range(5):
        trainer.train_step()
    method = trainer.method
    method.begin_step(5, tmp_path)
    assert same(trainer.roles["critic"].network.state_dict(), nodes(tmp_path)[3])
    networks = {name: role.network for name, role in trainer.roles.items()}
    _, metrics = method.host.loss("student", networks, Draw(0, 0, rows=8))
    assert metrics["gradient_size"] > 1e-4
    method.targets.index = 3
    method.place_target(WeightSnapshots(tmp_path / "path"))
    loss, metrics = method.host.loss("student", networks, Draw(0, 0, rows=8))
    loss.backward()
    assert metrics["gradient_size"] == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in networks["student"].parameters())


@pytest.mark.parametrize("settings", [{"degradation_steps": 0}, {"degradation_steps": 0, "backtrack": False}])
def test_without_nodes_it_is_the_host_bit_for_bit(tmp_path, settings):
    host = trainer_of(tmp_path / "host", Dmd2Config(**HOST), kind=Dmd2, steps=4)
    disback = trainer_of(tmp_path / "disback", config_of(**settings, switch_warmup=5, reset_optimizers=True), steps=4)
    for trainer in (host, disback):
        trainer.train()
    assert same(weights(host), weights(disback))
    assert not (tmp_path / "disback" / "path").exists()


def test_warm_critic_only(tmp_path):
    teacher = teacher_of()
    trainer = trainer_of(tmp_path, config_of(backtrack=False), teacher)
    seen = stepping(trainer, 6)
    assert {target for target, *_ in seen} == {0} and trainer.method.host.target is teacher
    assert same(seen[3][1], seen[4][1]) and not same(seen[4][1], seen[5][1])


# --- types and weights


def test_nodes_have_the_teachers_type(tmp_path):
    """A bfloat16 teacher's nodes are bfloat16, while what trains is float32."""
    teacher = teacher_of("bfloat16")
    trainer = trainer_of(tmp_path, config_of(), teacher)
    for _ in range(6):
        trainer.train_step()
    assert {value.dtype for node in nodes(tmp_path).values() for value in node.values()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.method.host.target.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.roles["critic"].network.parameters()} == {torch.float32}
    for _ in range(5):
        trainer.train_step()
    assert trainer.method.host.target is teacher


def test_low_rank_nodes_hold_the_adapters_only(tmp_path):
    teacher = teacher_of()
    trainer = trainer_of(tmp_path, config_of(host={"critic": "lora", "critic_lora_rank": 2}), teacher)
    node = trainer.method.node
    shared = {id(p) for p in teacher.network.parameters()}
    assert sum(id(p) in shared for p in node.parameters()) == len(shared)  # the teacher's own tensors
    for _ in range(6):
        trainer.train_step()
    recorded = nodes(tmp_path)[2]
    assert recorded and all("lora" in name for name in recorded)
    values = dict(node.named_parameters())
    assert all(torch.equal(values[name], value) for name, value in recorded.items())
    assert trainer.method.host.target.network is node


@pytest.mark.parametrize("damage", ["missing", "cut", "renamed", "shape", "type"])
def test_a_node_that_does_not_fit_is_refused(tmp_path, damage):
    """A fault of the published code: a load that ignores what does not fit loads nothing at all."""
    trainer = trainer_of(tmp_path, config_of())
    for _ in range(5):
        trainer.train_step()
    file = tmp_path / "path" / "node-002.safetensors"
    values = load_file(file)
    name = next(iter(values))
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "renamed":
        save_file({f"real_unet.{key}": value for key, value in values.items()}, file)
    elif damage == "shape":
        save_file(values | {name: torch.zeros(1, 2, 3)}, file)
    else:
        save_file(values | {name: values[name].half()}, file)
    expected = "is missing or damaged" if damage in ("missing", "cut") else "does not fit"
    with pytest.raises(UserError, match=f"node-002.safetensors {expected}"):
        trainer.train_step()


# --- guidance, learning rates, optimisers


def test_guidance_of_the_nodes(tmp_path):
    for kind, expected in (("constant", [3.0] * 7), ("linear", [1 + 2 / 3] * 2 + [1 + 4 / 3] * 2 + [3.0] * 3)):
        trainer = trainer_of(tmp_path / kind, config_of(host={"guidance_scale": 3.0}, node_guidance=kind))
        scales = []
        for _ in range(12):
            trainer.train_step()
            scales.append(trainer.method.host.guidance_scale)
        assert scales[5:] == pytest.approx(expected)
        assert trainer.method.student().info.guidance_scale == 3.0


def test_learning_rates_and_moments_at_switches(tmp_path):
    settings = {"degradation_lr": 5e-4, "switch_warmup": 1, "reset_optimizers": True}
    trainer = trainer_of(tmp_path, config_of(**settings))
    rates, counts = [], []
    for _ in range(12):
        trainer.train_step()
        rates.append([role.optimizer.param_groups[0]["lr"] for role in trainer.roles.values()])
        state = trainer.roles["critic"].optimizer.state
        counts.append(int(next(iter(state.values()))["step"]))
    assert [rate for _, rate in rates] == pytest.approx([5e-4] * 5 + [1e-3, 2e-3] * 3 + [2e-3])
    assert [rate for rate, _ in rates[5:]] == pytest.approx([5e-4, 1e-3] * 3 + [1e-3])
    assert counts == [1, 2, 3, 4, 5] + [1, 2] * 3 + [3]
    plain = trainer_of(tmp_path / "plain", config_of())
    for _ in range(8):
        plain.train_step()
    state = plain.roles["critic"].optimizer.state
    assert int(next(iter(state.values()))["step"]) == 8


# --- the walk


def walked(config, sizes=None, steps=40):
    walk, targets = TargetSchedule(config), []
    for step in range(config.degradation_steps, steps):
        walk.advance(step)
        targets.append(walk.index)
        if sizes is not None:
            walk.observe(torch.tensor(float(sizes(step, walk))))
    return targets


def test_walk_by_interval_and_by_list():
    config = DisBackConfig(degradation_steps=10, degradation_every=3, interval=[4])  # nodes 3, 6, 9, 10
    assert config.nodes == 4 and walked(config) == [3] * 4 + [2] * 4 + [1] * 4 + [0] * 18
    listed = DisBackConfig(degradation_steps=10, degradation_every=3, interval=[1, 5, 2])
    assert walked(listed) == [3] + [2] * 5 + [1] * 2 + [0] * 22
    assert walked(DisBackConfig(degradation_steps=10, degradation_every=10)) == [0] * 30  # one node: where it starts
    assert walked(DisBackConfig(degradation_steps=0)) == [0] * 40
    with pytest.raises(UserError, match="4 nodes have 3 targets before the teacher"):
        DisBackConfig(degradation_steps=10, degradation_every=3, interval=[1, 2]).validate()


def test_a_run_that_ends_before_the_teacher_is_the_target():
    """The steps said to be needed are those of the walk: one more and the last of them is on the teacher."""
    config = config_of(interval=[3])  # stage 1: 5 steps; two nodes of 3
    assert config.check_steps(12) is None
    short = config.check_steps(11)
    assert short.startswith("train.steps is 11,") and "from step 12 on" in short and "well above 11" in short
    assert walked(config, steps=12)[-2:] == [1, 0]
    assert "the nodes up to 6, so" in config_of(interval=[3], switch="gradient").check_steps(11)
    with pytest.raises(UserError, match="train.steps is 5, which ends in stage 1.*above 11, or lower"):
        config.check_steps(5)
    assert config_of(degradation_steps=0).check_steps(1) is None
    assert config_of(backtrack=False).check_steps(6) is None


def test_walk_by_gradient():
    """A gradient that halves every 3 steps on a target; it moves on at the first window below 0.3 of the first."""
    settings = {"degradation_steps": 6, "degradation_every": 2, "switch": "gradient", "gradient_fraction": 0.3,
                "gradient_window": 2}  # fmt: skip
    falling = walked(DisBackConfig(**settings, interval=[100]), lambda step, walk: 0.5 ** ((step - walk.since) / 3))
    assert falling == [2] * 8 + [1] * 8 + [0] * 18  # windows at ratio 0.63^k: 0.25 in the fourth
    level = walked(DisBackConfig(**settings, interval=[10]), lambda step, walk: 1.0)
    assert level == [2] * 10 + [1] * 10 + [0] * 14  # at the latest


# --- crashes


def crash_config(switch):
    return config_of(switch=switch, gradient_window=1, gradient_fraction=0.95, interval=[3], reset_optimizers=True)


@pytest.fixture(scope="module", params=["interval", "gradient"])
def uninterrupted(request, tmp_path_factory):
    """How targets switch; the trainer of a run that saves nothing on its way; the folder of one that saves every step.

    Each test of a crash makes of a copy of that folder what a crash would have left.
    """
    folder = tmp_path_factory.mktemp(request.param)
    whole = trainer_of(folder / "whole", crash_config(request.param))
    whole.train()
    trainer_of(folder / "saved", crash_config(request.param), checkpoint_every=1, keep_checkpoints=99).train()
    return request.param, whole, folder / "saved"


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 8, 10])  # within and between nodes and targets, in both stages
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path, stop):
    switch, whole, saved = uninterrupted
    shutil.copytree(saved, tmp_path / "parts")
    for folder in (tmp_path / "parts" / "checkpoints").iterdir():
        if folder.name != f"step-{stop:06d}":
            shutil.rmtree(folder)
    for index, recorded in ((1, 2), (2, 4), (3, 5)):
        if recorded >= stop:  # a crash right after the checkpoint
            (tmp_path / "parts" / "path" / f"node-{index:03d}.safetensors").unlink()
    second = trainer_of(tmp_path / "parts", crash_config(switch))
    assert second.step == stop
    second.train()
    assert same(weights(whole), weights(second))
    assert whole.method.state_dict() == second.method.state_dict()
    folders = (whole.folder, tmp_path / "parts")
    assert all(same(a, b) for a, b in zip(*(nodes(folder).values() for folder in folders), strict=True))
    targets = [[json.loads(line).get("student/target") for line in (folder / "metrics.jsonl").open()]
               for folder in folders]
    assert targets[0] == targets[1] and targets[0][:5] == [None] * 5 and targets[0][-1] is not None


def test_checkpoint_state_is_json(tmp_path):
    trainer = trainer_of(tmp_path, config_of(switch="gradient", gradient_window=3, interval=[9]), steps=9)
    trainer.train()
    state = json.loads((tmp_path / "checkpoints" / "step-000009" / "state.json").read_text())["method"]
    assert state["index"] == 2 and state["since"] == 5 and state["count"] == 1 and math.isfinite(state["total"])


# --- several processes


def main(folder, *flags):
    """What one process of several runs: SiD, whose gradient goes through critic and target, with both stages."""
    steady = {"lr": 1e-3, "eps": 1e-2}  # so that gradients that are zero but for rounding move nothing
    host = HostConfig(weighting="sid", optimizer=OptimizerConfig(**steady), critic_optimizer=OptimizerConfig(**steady))
    config = DisBackConfig(**SHORT | {"interval": [3]}, switch="gradient", gradient_window=1, host=host)
    trainer = trainer_of(folder, config, fsdp2="fsdp2" in flags)
    trainer.train()
    average = trainer.student().network
    if trainer.main:
        save_file(average.state_dict(), Path(folder) / "average.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    main(folder)
    return folder


@pytest.mark.parametrize("flags", [(), ("fsdp2",)], ids=["copies", "shards"])
def test_two_processes_train_as_one(alone, tmp_path, flags):
    ranks(2, main, tmp_path, *flags)
    one, other = ([load_file(folder / "average.safetensors"), *nodes(folder).values()] for folder in (alone, tmp_path))
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    one, other = (sum(figures(folder), []) for folder in (alone, tmp_path))  # losses, gradients, targets, line by line
    assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
