"""Teachers, students and every method on a device that is not the CPU: nothing mixes, and no step makes the host wait.

There need be no GPU. What only a GPU shows is in tests/gpu.
"""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.config import METHODS, TrainConfig
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.training.run import make_accelerator
from flowdistill.utils.devices import OnDevices, as_tensor, sent
from flowdistill.utils.randomness import Draw, indexed_noise
from tests.every_method import CASES, make_trainer
from tests.other_device import other_device, waits
from tests.teachers.test_families import condition_of, teacher_of

BACKBONES = ("dit", "edm-class", "sd", "pixart-sigma", "sd3", "flux-dev", "sana", "lumina2", "qwen-image", "z-image")
# Whose networks ask, at every pass, how long each prompt is: Z-Image's takes a list of texts.
READS = {"lumina2": "transformer_lumina2.py", "qwen-image": "transformer_qwenimage.py", "z-image": "z_image.py"}
# Forward-mode rules of torch's make tensors of another kind for tensors of Python's.
ON_IT = [name for name in CASES if "jvp" not in name]


@pytest.fixture
def device():
    with other_device() as other:
        yield other


# --- the device itself


def test_it_computes_refuses_and_writes_down_as_a_gpu_does(device):
    here = torch.arange(6.0).reshape(2, 3)
    there = here.to(device)
    assert there.device == device and torch.equal((there * 2 + 1).cpu(), here * 2 + 1)
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)  # a single number of the CPU's
    mistakes = (lambda: there + here, lambda: torch.cat([there, here]), lambda: there @ here.T,
                lambda: torch.stack([there[0, 0], torch.tensor(1.0)]), lambda: there.clone().add_(here))
    for mixed in mistakes:
        with pytest.raises(RuntimeError, match="all tensors to be on python_device:0"):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    waiting = (lambda: there.sum().item(), lambda: bool(there.sum() > 1), lambda: there.cpu(), lambda: here.to(device),
               lambda: there[there > 2], lambda: there.nonzero(), lambda: there[torch.tensor([0])],
               lambda: torch.tensor([1.0, 2.0], device=device), lambda: there.tolist(), lambda: there.new_tensor([1.0]),
               lambda: there.copy_(here), lambda: torch.equal(there, there))
    for wait in waiting:
        with waits() as found:
            wait()
        assert found
    with waits() as found:
        torch.full((2,), 1.0, device=device) + torch.arange(2, device=device) + torch.randn(2, device=device)
        here.to(device, non_blocking=True)
        there[torch.ones(2, dtype=torch.int64, device=device)].where(there > 1, 0.0)
    assert not found


def test_gradients_and_copies_of_modules_stay_there(device):
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    here[1].weight = here[0].weight
    there = copy.deepcopy(here).to(device)
    assert there[1].weight is there[0].weight and copy.deepcopy(there)[1].weight.device == device
    for network, x in ((here, torch.ones(2, 3)), (there, torch.ones(2, 3, device=device))):
        network(x).square().sum().backward()
    assert there[0].weight.grad.device == device
    torch.testing.assert_close(there[0].weight.grad.cpu(), here[0].weight.grad)
    z = torch.view_as_complex(torch.ones(3, 2, device=device)).requires_grad_()
    (z * z.detach() * 1j).abs().sum().backward()
    assert z.grad.cpu().abs().sum() > 0


# --- the ways there


def test_nothing_waits_on_the_way_there(device):
    constant = OnDevices(torch.arange(3.0))
    with waits() as found:
        values = [sent(torch.ones(2), device), as_tensor(2.5, torch.float64, device), constant.on(device)]
        values += [Draw(0, 0, rows=4, device=device).normal((2,)), as_tensor(torch.ones(1), torch.float64, device)]
    assert not found and all(value.device == device for value in values)
    assert constant.on(device) is constant.on(device) and values[1].dtype == values[4].dtype == torch.float64
    assert as_tensor(2.5, torch.float32, torch.device("cpu")) == 2.5


# --- teachers and students


def passes(name, device):
    """What a teacher and a student of its say, with the student's gradients, and the waits of a second pass."""
    _, teacher = teacher_of(name)
    condition, scale = condition_of(name, teacher), 2.0 if teacher.can_guide else 1.0
    torch.manual_seed(0)
    student = FlowMap.from_teacher(teacher, StudentInfo("made up", name, (1.0, 2.0) if teacher.can_guide else None))
    teacher.to(device)
    student.to(device)
    noise = indexed_noise(teacher.shape, 1, range(2)).to(device)
    condition = None if condition is None else condition.to(device)
    t = torch.full((2,), 0.5, device=device)
    with torch.no_grad():
        teacher.velocity(noise, t, condition, scale)
        with waits() as found:
            velocity = teacher.velocity(noise, t, condition, scale)
    student.network.requires_grad_(True)
    sample = student(noise, condition)
    images = teacher.decode(sample)
    sample.square().mean().backward()
    gradients = {key: p.grad for key, p in student.network.named_parameters() if p.grad is not None}
    return {"velocity": velocity, "sample": sample, "images": images, **gradients}, found


@pytest.mark.parametrize("name", BACKBONES)
def test_teachers_and_students_of_every_backbone(name, device):
    here, there = passes(name, "cpu")[0], passes(name, device)
    assert here.keys() == there[0].keys() and len(here) > 10
    largest = max(value.abs().max() for key, value in here.items() if "." in key)
    for key, value in here.items():
        limit = 1e-4 * (largest if "." in key else value.abs().max())
        assert there[0][key].device == device and (there[0][key].cpu() - value).abs().max() < limit, key
    if name in READS:
        assert there[1] and all(READS[name] in place for place in there[1])
    else:
        assert there[1] == []


# --- methods


def trainer_on(device, name, folder):
    AcceleratorState._reset_state(True)  # of an earlier device
    accelerator = make_accelerator(TrainConfig(device="cpu", trackers=[]), folder)
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = device
    return make_trainer(name, folder, accelerator)


@pytest.fixture
def own_state():
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", ON_IT)
def test_a_step_of_every_method_mixes_nothing_and_never_waits(name, device, tmp_path, own_state):
    found = {}
    for place in (torch.device("cpu"), device):
        trainer = trainer_on(place, name, tmp_path / place.type)
        with sdpa_kernel(SDPBackend.MATH):  # which is what other devices have: a balanced loss amplifies rounding
            trainer.train_step()
        found[place.type] = trainer.meters.read()
    for _ in range(CASES[name].steps):
        trainer.train_step()
    with waits() as waited:
        trainer.train_step()
    assert waited == []
    for role in trainer.roles.values():
        assert all(p.device == device for p in role.network.parameters())
    here, there = found["cpu"], found["python_device"]
    assert here.keys() == there.keys() and any(key.startswith("loss/") for key in here)
    for key, value in here.items():
        assert value is None or there[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_every_method_is_there():
    assert {case.method for case in CASES.values()} == set(METHODS)
