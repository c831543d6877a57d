"""Every optimiser by name: its step, what skips it, its settings, its bytes, and a resume to the last bit."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowdistill.config import METHODS, OptimizerConfig, load_config, validate
from flowdistill.config.schema import OPTIMIZERS
from flowdistill.training import optimizers
from flowdistill.training.optimizer import apply_update
from flowdistill.training.optimizers import KINDS, check_shards, forget, make_optimizer
from flowdistill.training.run import distill
from flowdistill.training.state import assign_optimizer, gather, optimizer_tensors
from flowdistill.utils.errors import UserError
from tests.processes import ranks
from tests.toy_method import ToyConfig, ToyMethod, make_config, make_trainer, weights

RATES = {"prodigy": 1.0, "adafactor": 0.05}
NAMES = list(KINDS)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first that has it")
EACH = [pytest.param(name, marks=needs_muon if name == "muon" else ()) for name in NAMES]
TOY = "tests.toy_method"


def scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def config_of(name, **settings):
    config = OptimizerConfig(**{"name": name, "lr": RATES.get(name, 1e-2), "weight_decay": 0.01} | settings)
    validate(config)
    return config


class Net(nn.Module):
    """A matrix large enough for 8-bit blocks, of 256 with a rest or of rows, a convolution, a table, biases, and a
    weight that is cold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(5, 16), nn.Conv2d(1, 3, 2)
        self.wide, self.out = nn.Linear(16, 350), nn.Linear(350, 2)
        self.cold = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.out(self.wide(self.table(x)).tanh()) + self.conv(torch.ones(1, 1, 2, 2)).mean()


def step(network, optimizer, seed, bad=None, max_norm=0.0):
    network.zero_grad()
    inputs = torch.randint(0, 5, (16,), generator=torch.Generator().manual_seed(seed))
    (network(inputs) - 1).square().mean().backward()
    if bad is not None:
        network.wide.weight.grad[0, 0] = bad
    return apply_update(optimizer, scaler(), max_norm)


def everything(network, optimizer, config):
    tensors = network.state_dict() | optimizer_tensors(network, optimizer, KINDS[config.name].counters)
    return {name: value.clone() for name, value in tensors.items()}


def tensors(value):
    """The tensors of torch's that a value of a state consists of."""
    if type(value) is torch.Tensor:
        return [value]
    return [getattr(value, name) for name in value.tensor_attrs] if isinstance(value, torch.Tensor) else []


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_configuration_knows_the_names_of_all():
    assert list(OPTIMIZERS) == NAMES


@pytest.mark.parametrize("name", EACH)
def test_a_step_learns_and_one_that_is_not_finite_changes_nothing(name):
    config, network = config_of(name), Net()
    optimizer = make_optimizer(network, config)
    before = network.state_dict()["wide.weight"].clone()
    for seed in range(3):
        _, skipped = step(network, optimizer, seed, max_norm=0.5)
        assert skipped == 0
    assert not torch.equal(before, network.wide.weight) and (network.cold == 1).all()
    for bad in (math.inf, math.nan):
        kept = everything(network, optimizer, config)
        norm, skipped = step(network, optimizer, 3, bad, max_norm=0.5)
        assert skipped == 1 and not torch.isfinite(norm)
        assert same(kept, everything(network, optimizer, config))
    other = Net()
    clean = make_optimizer(other, config)
    for seed in range(4):
        step(other, clean, seed, max_norm=0.5)
    step(network, optimizer, 3, max_norm=0.5)
    assert same(everything(network, optimizer, config), everything(other, clean, config))


@pytest.mark.parametrize("name", EACH)
def test_all_of_them_bring_the_loss_down(name):
    config, network = config_of(name, lr=RATES.get(name, 3e-3), weight_decay=0.0), Net()
    optimizer = make_optimizer(network, config)

    def loss():
        return (network(torch.arange(5)) - 1).square().mean()

    first = loss().item()
    for _ in range(60):
        network.zero_grad()
        loss().backward()
        apply_update(optimizer, scaler())
    assert loss() < 0.5 * first


@pytest.mark.parametrize("name", EACH)
def test_the_state_goes_on_to_the_last_bit_from_plain_tensors(name):
    config, network = config_of(name), Net()
    optimizer = make_optimizer(network, config)
    for seed in range(3):
        step(network, optimizer, seed)
    saved = {key: value.clone() for key, value in
             optimizer_tensors(network, optimizer, KINDS[name].counters).items()}
    assert all(type(value) is torch.Tensor for value in saved.values())
    other = copy.deepcopy(network)
    resumed = make_optimizer(other, config)
    assign_optimizer(other, resumed, saved)
    for seed in range(3, 6):
        step(network, optimizer, seed)
        step(other, resumed, seed)
    assert same(everything(network, optimizer, config), everything(other, resumed, config))
    forget(resumed, config)
    fresh = make_optimizer(other, config)
    twin = copy.deepcopy(other)
    anew = make_optimizer(twin, config)
    assert optimizer_tensors(other, resumed, KINDS[name].counters).keys() == optimizer_tensors(
        other, fresh, KINDS[name].counters).keys()
    step(other, resumed, 6)
    step(twin, anew, 6)
    assert same(everything(other, resumed, config), everything(twin, anew, config))


@pytest.mark.parametrize("name", EACH)
def test_planned_bytes_are_those_of_the_state(name):
    config, network = config_of(name), Net()
    optimizer = make_optimizer(network, config)
    step(network, optimizer, 0)
    reached = [p for p in network.parameters() if p.grad is not None]
    values = [part for state in optimizer.state.values() for value in state.values() for part in tensors(value)]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    assert KINDS[name].state_bytes(network, reached) == sum(storages.values())


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_of_two_roles_that_was_stopped_goes_on_to_the_last_bit(tmp_path, name, precision):
    rates = {"name": name, "lr": RATES.get(name, 1e-2), "warmup_steps": 2, "schedule": "cosine"}

    def method():
        return ToyConfig(optimizer=OptimizerConfig(**rates), critic_optimizer=OptimizerConfig(**rates), bad_steps=[1],
                         width=2112)  # matrices large enough for blocks of 8 bits

    whole = make_trainer(tmp_path / "a", method(), steps=6, checkpoint_every=3, precision=precision)
    whole.train()
    assert whole.roles["student"].skipped >= 1  # in fp16 the first scale is too large as well
    assert whole.roles["critic"].optimizer.param_groups[-1]["lr"] < rates["lr"] / 2  # the schedule reaches all groups
    half = make_trainer(tmp_path / "b", method(), steps=6, checkpoint_every=3, precision=precision)
    for _ in range(3):
        half.train_step()
    half.save()
    resumed = make_trainer(tmp_path / "b", method(), steps=6, checkpoint_every=3, precision=precision)
    assert resumed.step == 3
    resumed.train()
    assert same(weights(whole), weights(resumed))


@needs_muon
def test_muon_trains_linear_layers_and_adamw_the_rest():
    network = Net()
    optimizer = make_optimizer(network, config_of("muon"))
    matrices, rest = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert matrices == [id(network.wide.weight), id(network.out.weight)]
    assert set(rest) == {id(p) for p in network.parameters() if p.requires_grad} - set(matrices)
    alone = nn.Linear(3, 2, bias=False)
    assert len(make_optimizer(alone, config_of("muon")).param_groups) == 1


def test_moments_in_pages_come_back_in_pages(monkeypatch):
    """bitsandbytes decides where they are; on the CPU there are no pages."""
    config, network = config_of("paged_adamw8bit"), Net()
    optimizer = make_optimizer(network, config)
    step(network, optimizer, 0)
    saved, made = optimizer_tensors(network, optimizer), []
    resumed = make_optimizer(network, config)
    make = resumed.get_state_buffer
    monkeypatch.setattr(resumed, "get_state_buffer", lambda p, dtype: made.append(make(p, dtype=dtype)) or made[-1])
    assign_optimizer(network, resumed, saved)
    moments = [state[key] for state in resumed.state.values() for key in ("state1", "state2")]
    assert {id(moment) for moment in moments} == {id(buffer) for buffer in made} and made


@pytest.mark.parametrize("name", ["adamw8bit", "ao_adamw8bit"])
def test_8_bit_moments_stay_near_those_of_32(name):
    networks = [Net(), Net()]
    optimizers = [make_optimizer(network, config_of(one)) for network, one in
                  zip(networks, ("adamw", name), strict=True)]
    for seed in range(20):
        for network, optimizer in zip(networks, optimizers, strict=True):
            step(network, optimizer, seed)
    exact, coarse = (network.wide.weight for network in networks)
    moved = (exact - Net().wide.weight).norm()
    assert 0 < (exact - coarse).norm() < 0.1 * moved


# --- settings


@pytest.mark.parametrize("name", EACH)
def test_settings_that_an_optimiser_has_not_are_refused_and_the_untouched_ones_null(name):
    lacking = OPTIMIZERS[name]
    config = config_of(name)
    assert {key for key in ("betas", "eps") if getattr(config, key) is None} == set(lacking)
    for key, value in (("betas", [0.5, 0.9]), ("eps", 1e-4)):
        if key in lacking:
            with pytest.raises(UserError, match=f"{key}' is .*, but the optimiser {name} has no {key}; set it to null"):
                config_of(name, **{key: value})
        else:
            chosen = make_optimizer(Net(), config_of(name, **{key: value})).param_groups[-1][key]
            assert (list(chosen) if key == "betas" else chosen) == value


def written(folder, text):
    (folder / "a.yaml").write_text(f"teacher: {{source: x}}\noutput_dir: {folder}/run\nmethod: {text}\n")
    return folder / "a.yaml"


@pytest.fixture
def toy_is_known():
    if "toy" not in METHODS:
        METHODS.register("toy")(ToyMethod)


def test_a_file_names_the_optimiser_of_each_network(tmp_path, toy_is_known):
    file = written(tmp_path, "{name: toy, optimizer: {name: lion}, critic_optimizer: {name: adafactor, lr: 0.1}}")
    method = load_config(file).method
    assert (method.optimizer.name, method.critic_optimizer.name) == ("lion", "adafactor")
    assert method.optimizer.betas == [0.9, 0.99] and method.critic_optimizer.betas is None
    for setting in ("betas=[0.9, 0.99]", "betas=[0.5,0.99]", "eps=1e-8"):
        key = setting.partition("=")[0]
        with pytest.raises(UserError, match=f"'method.critic_optimizer.{key}' is .* adafactor has no {key}; set it to "
                                            "null .in the override"):
            load_config(file, [f"method.critic_optimizer.{setting}"])
    with pytest.raises(UserError, match="'method.optimizer.name' must be one of .*did you mean 'adamw'"):
        load_config(file, ["method.optimizer.name=adam"])


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name].package is not None])
def test_a_missing_package_is_one_sentence_before_the_work(tmp_path, monkeypatch, toy_is_known, name):
    monkeypatch.setattr(optimizers, "find_spec", lambda module: None)
    config = make_config(tmp_path / "run", ToyConfig(critic_optimizer=OptimizerConfig(name=name)))
    extra = KINDS[name].package.extra
    with pytest.raises(UserError, match=f"optimiser {name} needs the package .*: pip install .flowdistill.{extra}"):
        distill(config)
    assert not (tmp_path / "run").exists()


def test_a_package_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda module: True)
    monkeypatch.setattr(optimizers, "version", lambda name: "0.17.2")
    with pytest.raises(UserError, match="ao_adamw8bit needs torchao 0.18.x, and 0.17.2 is installed: pip install .f"):
        make_optimizer(Net(), config_of("ao_adamw8bit"))


def test_muon_wants_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match="muon needs torch 2.9 or later"):
        make_optimizer(Net(), config_of("muon"))


def test_prodigy_says_what_its_rate_is(caplog):
    make_optimizer(Net(), config_of("prodigy", lr=1e-4))
    assert "takes lr as a factor of it, which is 0.0001 here; its authors leave it at 1" in caplog.text


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    make_trainer(tmp_path, steps=2).train()
    with pytest.raises(UserError, match="optimiser of the role 'student' was adamw there and is lion here"):
        make_trainer(tmp_path, ToyConfig(optimizer=OptimizerConfig(name="lion")), steps=4)


@pytest.mark.parametrize("name", [name for name in NAMES if not KINDS[name].shards])
def test_an_optimiser_of_whole_weights_is_refused_where_they_are_cut(name):
    with pytest.raises(UserError, match=f"role 'critic' is {name}, .*FSDP .*one of adamw, ao_adamw8bit, lion, or"):
        check_shards(config_of(name), "critic")


def toy_trainer(folder, name, **train):
    method = ToyConfig(width=2112)
    method.optimizer.name = method.critic_optimizer.name = name
    return make_trainer(folder, method, steps=4, **train)


def say_moments(folder, name):
    """What each of two processes runs: whether the moments with which it would go on are those of the last checkpoint,
    all of them together and bit for bit."""
    trainer = toy_trainer(folder, name, fsdp2=True)
    file = folder / "checkpoints" / f"step-{trainer.step:06d}" / "student.optimizer.safetensors"
    role = trainer.roles["student"]
    whole = gather(optimizer_tensors(role.network, role.optimizer, KINDS[name].counters))
    print("moments", len(whole), same(whole, load_file(file)))


@pytest.mark.parametrize("name", ["lion", "ao_adamw8bit"])
def test_shares_of_weights_are_trained_as_whole_ones_and_go_on_as_such(tmp_path, name):
    ranks(2, TOY, tmp_path / "cut", f"optimizer={name}", "width=2112", "fsdp2=1", "steps=4")
    whole = toy_trainer(tmp_path / "whole", name)
    whole.train()
    cut = load_file(tmp_path / "cut" / "average.safetensors")
    for key, value in whole.student().network.state_dict().items():
        torch.testing.assert_close(cut[key], value, rtol=1e-4, atol=1e-5)
    # One process goes on with the moments that two have written, and two with those of one.
    role = toy_trainer(tmp_path / "cut", name).roles["student"]
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step-000004" / "student.optimizer.safetensors")
    assert same(optimizer_tensors(role.network, role.optimizer, KINDS[name].counters), saved)
    outs = ranks(2, say_moments, tmp_path / "whole", name)
    assert all(f"moments {len(saved)} True" in out for out in outs)


def test_moments_of_rows_that_a_process_has_none_of(tmp_path):
    """A matrix of one row on two processes."""
    outs = ranks(2, step_on_one_row)
    assert len({out for out in outs}) == 1 and "codes (1, 4096) torch.uint8 scales (1, 16)" in outs[0]


def step_on_one_row():
    torch.distributed.init_process_group("gloo")
    network = nn.Linear(4096, 1, bias=False)
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    config = config_of("ao_adamw8bit")
    optimizer = make_optimizer(network, config)
    for _ in range(2):
        network(torch.ones(2, 4096)).sum().backward()
        apply_update(optimizer, scaler())
    whole = gather(optimizer_tensors(network, optimizer))
    resumed = make_optimizer(network, config)
    assign_optimizer(network, resumed, whole)
    assert same(whole, gather(optimizer_tensors(network, resumed)))
    codes, scales = whole["weight/exp_avg.codes"], whole["weight/exp_avg.scales"]
    print("codes", tuple(codes.shape), codes.dtype, "scales", tuple(scales.shape), flush=True)
