"""One update: learning rate, precision, scaling, accumulation, skipping, and nothing read on the host."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it

from flowdistill.config import OptimizerConfig
from flowdistill.training.average import MovingAverage
from flowdistill.training.optimizer import apply_update, backward, learning_rate
from flowdistill.training.optimizers import make_optimizer
from flowdistill.training.precision import HalfPrecisionForward, resolve_precision
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.toy_method import ToyConfig, ToyMethod, make_trainer, weights

CPU = torch.device("cpu")


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


# --- learning rate


def test_constant_rate_grows_to_its_peak_and_stays():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.55), ("linear", 0.55)])
def test_falling_rates(schedule, half):
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=10, final_lr_fraction=0.1)
    assert learning_rate(config, 10, 110) == pytest.approx(2.0)
    assert learning_rate(config, 60, 110) == pytest.approx(2.0 * half)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    rates = [learning_rate(config, step, 110) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_above_the_line_in_its_first_half():
    cosine, linear = (OptimizerConfig(lr=1.0, schedule=name) for name in ("cosine", "linear"))
    assert learning_rate(cosine, 25, 100) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert learning_rate(linear, 25, 100) == pytest.approx(0.75)


# --- skipping


def stepped_optimizer():
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = make_optimizer(network, OptimizerConfig(lr=0.1, weight_decay=0.5))
    network(torch.randn(4, 3)).square().mean().backward()
    apply_update(optimizer, no_scaler())
    optimizer.zero_grad()
    return network, optimizer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_moments_and_count_alone(bad):
    network, optimizer = stepped_optimizer()
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    network(torch.randn(4, 3)).square().mean().backward()
    network.weight.grad[0, 0] = bad
    norm, skipped = apply_update(optimizer, no_scaler(), max_norm=1.0)
    assert skipped == 1 and not torch.isfinite(norm)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[0][name])
    for index, state in optimizer.state_dict()["state"].items():
        assert state["step"] == 1
        assert all(torch.equal(state[key], before[1][index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_step_after_a_skipped_one_is_the_step_without_it():
    (network, optimizer), (other, clean) = stepped_optimizer(), stepped_optimizer()
    (network(torch.ones(1, 3)).sum() * math.nan).backward()
    apply_update(optimizer, no_scaler(), 1.0)
    optimizer.zero_grad()
    for model, opt in ((network, optimizer), (other, clean)):
        model(torch.ones(1, 3)).sum().backward()
        assert apply_update(opt, no_scaler(), 1.0)[1] == 0
    assert torch.equal(network.weight, other.weight)


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too():
    network, optimizer = stepped_optimizer()
    before = network.weight.clone()
    loss = network(torch.ones(1, 3)).sum() + math.inf
    backward(loss, no_scaler())
    assert apply_update(optimizer, no_scaler())[1] == 1
    assert torch.equal(network.weight, before)


def test_clipping_scales_the_gradient_to_the_norm_and_reports_the_norm_before():
    network, optimizer = stepped_optimizer()
    network.weight.grad, network.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    norm, _ = apply_update(optimizer, no_scaler(), max_norm=0.5)
    assert norm == pytest.approx(math.sqrt(6 * 9 + 2 * 16))
    after = torch.cat([network.weight.grad.flatten(), network.bias.grad])
    assert after.norm() == pytest.approx(0.5, rel=1e-5)
    network.weight.grad.fill_(3.0)
    apply_update(optimizer, no_scaler(), max_norm=0.0)
    assert (network.weight.grad == 3.0).all()


# --- precision


def test_networks_under_autocast_return_float32_and_keep_their_gradients():
    network = nn.Linear(4, 4)
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    call = HalfPrecisionForward(network, "bf16", CPU)
    with torch.no_grad():
        assert call(torch.ones(1, 4)).dtype == torch.float32
    output = call(torch.ones(1, 4))
    output.sum().backward()
    assert output.dtype == torch.float32 and seen == [torch.bfloat16] * 2
    assert network.weight.dtype == network.weight.grad.dtype == torch.float32 and network.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_forward_mode_derivatives_run_in_float32(precision):
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 1))
    call, x = HalfPrecisionForward(network, precision, CPU), torch.randn(3, 2, 4, 4)
    direction = torch.randn_like(x)
    with torch.no_grad():
        value, derivative = torch.func.jvp(call, (x,), (direction,))
        exact = torch.func.jvp(network, (x,), (direction,))
    assert torch.equal(value, exact[0]) and torch.equal(derivative, exact[1])
    assert not torch.equal(call(x), network(x))


def test_precision_follows_the_launcher_only_when_it_is_left_open(monkeypatch):
    assert resolve_precision(None, CPU) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert resolve_precision(None, CPU) == "fp16" and resolve_precision("bf16", CPU) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision is 'fp8'; allowed are fp32, bf16, fp16"):
        resolve_precision(None, CPU)


def trained_in(precision, folder, steps=4):
    """A trainer after ``steps`` steps of two roles with clipping; fp16 with a scale that the toy does not overflow."""
    # A seed without a gradient near 0, of which AdamW sees the sign only: rounding would turn such a step round.
    trainer = make_trainer(folder, ToyConfig(critic_updates=2), seed=2, precision=precision, max_grad_norm=0.05)
    if precision == "fp16":
        for role in trainer.roles.values():
            role.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for _ in range(steps):
        trainer.train_step()
    assert all(role.skipped == 0 for role in trainer.roles.values())
    return trainer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_updates_of_both_roles_equal_float32_up_to_rounding(tmp_path, precision):
    exact, half = trained_in("fp32", tmp_path / "a"), trained_in(precision, tmp_path / "b")
    rounding = {"bf16": 2e-2, "fp16": 2e-3}[precision]
    one, other = weights(exact), weights(half)
    assert one.keys() == other.keys() and any("critic.optimizer" in name for name in one)
    for name in one:
        # AdamW does not see a wrong factor of the gradient, but its moments do; they pass on the forward's rounding.
        allowed = 20 * rounding if "optimizer" in name else rounding
        assert (one[name] - other[name]).abs().max() < allowed * one[name].abs().max(), name
    a, b = exact.meters.read(), half.meters.read()
    for name in ("grad_norm/student", "grad_norm/critic", "loss/student"):
        assert b[name] == pytest.approx(a[name], rel=rounding) and a[name] > 0.01
    assert one["critic.0.weight"].dtype == torch.float32


def test_an_overflow_of_one_role_lowers_its_own_scale_only(tmp_path):
    trainer = make_trainer(tmp_path, precision="fp16")
    student, critic = trainer.roles["student"], trainer.roles["critic"]
    student.scaler, critic.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (2.0**40, 4.0))
    before = weights(trainer)
    trainer.train_step()
    after = weights(trainer)
    assert (student.skipped, critic.skipped) == (1, 0)
    assert (student.scaler.get_scale(), critic.scaler.get_scale()) == (2.0**39, 4.0)
    assert torch.equal(before["student.0.weight"], after["student.0.weight"])
    assert not torch.equal(before["critic.0.weight"], after["critic.0.weight"])


# --- roles and accumulation


def test_accumulation_equals_the_joined_batch(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation=2, max_grad_norm=0.5)
    reference = copy.deepcopy(trainer.method)
    trainer.train_step()

    class Joined(Draw):
        def __init__(self):
            self.step, self.parts, self.world = 0, [Draw(0, 0, self.update_number, m, rows=4) for m in range(2)], 1

        def normal(self, shape, rows=None):
            return torch.cat([part.normal(shape) for part in self.parts])

    networks = {name: role.network for name, role in reference.roles().items()}
    for number, name in enumerate(reference.schedule(0)):
        Joined.update_number = number
        role = reference.roles()[name]
        optimizer = make_optimizer(role.network, role.optimizer)
        role.network.zero_grad()
        reference.loss(name, networks, Joined())[0].backward()
        torch.nn.utils.clip_grad_norm_(role.network.parameters(), 0.5)
        optimizer.step()
    for name, role in reference.roles().items():
        for key, value in role.network.state_dict().items():
            torch.testing.assert_close(trainer.roles[name].network.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_a_loss_that_reaches_another_role_does_not_change_that_roles_update(tmp_path):
    apart = make_trainer(tmp_path / "a", ToyConfig(critic_weight=0.0))
    through = make_trainer(tmp_path / "b", ToyConfig(critic_weight=5.0))
    for role in (apart.roles["student"], through.roles["student"]):
        role.config.lr = 0.0  # the same samples for the critic in both
    for trainer in (apart, through):
        trainer.train_step()
        assert all(p.grad is None for role in trainer.roles.values() for p in role.network.parameters())
    for key, value in apart.roles["critic"].network.state_dict().items():
        assert torch.equal(value, through.roles["critic"].network.state_dict()[key])


def test_the_average_follows_its_formula_and_only_its_own_role(tmp_path):
    trainer = make_trainer(tmp_path, ToyConfig(critic_updates=3), ema_decay=0.15)
    role = trainer.roles["student"]
    expected = role.network.state_dict()["0.weight"].clone()
    for decay in (0.1, 0.15, 0.15):  # (1 + n) / (10 + n) = 0.1, 0.18, 0.25, at most 0.15
        trainer.train_step()
        expected = decay * expected + (1 - decay) * role.network.state_dict()["0.weight"]
    torch.testing.assert_close(role.average.network.state_dict()["0.weight"], expected)
    assert role.average.count == 3 and trainer.roles["critic"].average is None


def test_the_average_copies_buffers_and_shares_nothing():
    network = nn.BatchNorm1d(2)
    average = MovingAverage(network, 0.9, warmup=False)
    network.running_mean.fill_(3.0)
    network.weight.data.fill_(2.0)
    average.update(network)
    assert (average.network.running_mean == 3).all() and torch.allclose(average.network.weight, torch.tensor(1.1))
    assert not average.network.training and not average.network.weight.requires_grad


class Reads(TorchDispatchMode):
    """Counts values read on the host: .item(), float(), bool(), `if tensor`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function) or "is_nonzero" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_reads_nothing_on_the_host(tmp_path, monkeypatch, precision):
    trainer = make_trainer(tmp_path, precision=precision, gradient_accumulation=2)
    trainer.train_step()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("tolist() within a step"))
    with Reads() as reads:
        trainer.train_step()
        assert reads.count == 0
        assert bool(trainer.roles["student"].skipped >= 0)
        assert reads.count > 0  # the counter counts


def test_half_precision_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyMethod, "to", lambda self, device: self.critic.half())
    with pytest.raises(UserError, match="role 'critic' are torch.float16; weights that train are float32 masters"):
        make_trainer(tmp_path)


def test_gradient_checkpointing_is_switched_on_or_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="role 'student' .Sequential. does not have it"):
        make_trainer(tmp_path, gradient_checkpointing=True)
    called = []
    monkeypatch.setattr(nn.Sequential, "enable_gradient_checkpointing", lambda self: called.append(self), raising=False)
    make_trainer(tmp_path, gradient_checkpointing=True)
    assert len(called) == 2


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size is 9, but 1 processes with train.gradient_accumulation=2"):
        make_trainer(tmp_path, batch_size=9, gradient_accumulation=2)


# --- the average on another device


@pytest.mark.parametrize("tied", [False, True])
def test_an_average_that_rests_elsewhere_is_the_same_to_the_last_bit(tied):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    network[0].bias.requires_grad_(False)
    if tied:
        network[2].weight = network[0].weight
    beside, apart = MovingAverage(network, 0.9, True), MovingAverage(network, 0.9, True, "cpu")
    assert apart.network[0].bias is network[0].bias and apart.device == CPU
    for _ in range(4):
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        for average in (beside, apart):
            average.update(network)
    assert beside.count == apart.count == 4
    for key, value in beside.network.state_dict().items():
        assert torch.equal(value, apart.network.state_dict()[key])
    assert apart.on(CPU) is apart.network
    moved = apart.on(torch.device("meta"))
    assert all(p.is_meta for p in moved.parameters()) and not any(p.is_meta for p in apart.network.parameters())
    assert isinstance(moved[2].weight, nn.Parameter) and (moved[2].weight is moved[0].weight) == tied


def test_runs_with_the_average_elsewhere_are_the_same_runs_and_go_on(tmp_path):
    beside = make_trainer(tmp_path / "a", steps=6)
    apart = make_trainer(tmp_path / "b", steps=6, ema_device="cpu")
    beside.train()
    for _ in range(3):
        apart.train_step()
    apart.save()
    apart = make_trainer(tmp_path / "b", steps=6, ema_device="cpu")
    assert apart.step == 3 and apart.roles["student"].average.device == CPU
    apart.train()
    one, other = weights(beside), weights(apart)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_average_on_a_device_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(UserError, match="train.ema_device is cuda:7, which cannot be used here"):
        make_trainer(tmp_path, ema_device="cuda:7")
