"""Flow maps between any two times: their calls, disk and words."""

import json

import pytest
import torch

from flowdistill.students import FlowMap, StudentInfo, load_student
from flowdistill.students.steps import STEPPINGS
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from tests.students.test_student import SCHEDULERS
from tests.students_of_steps import moved, steps_of
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline


def map_of(scheduler="flow", count=4, stepping="deterministic", guidance=None, dit=False, trained=True, **settings):
    pipeline = (tiny_dit_pipeline if dit else tiny_unet_pipeline)(SCHEDULERS[scheduler]())
    teacher = load_teacher(pipeline, null_label=None if dit else 3)
    info = StudentInfo("flow_map_matching", "tiny", guidance, 1.5 if guidance else 1.0)
    chains = [steps_of(teacher, k, stepping) for k in range(1, count + 1)]
    student = FlowMap.from_teacher(teacher, info, chains=chains, **settings)
    return teacher, moved(student) if trained else student


def noise(student, rows=3, seed=5):
    return torch.randn(rows, *student.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_starts_as_the_teachers_euler_steps(scheduler):
    """For every end of a jump; and where the times are one it is the identity, whatever the network."""
    teacher, student = map_of(scheduler, trained=False)
    x, condition = noise(student), student.encode([0, 1, 2])
    t = torch.tensor([0.8, 0.5, 0.3], dtype=torch.float64)
    slope = teacher.velocity(x, t, condition)
    for r in (0.0, 0.5 * t):
        wanted = x - (t - r).reshape(-1, 1, 1, 1).float() * slope
        assert torch.allclose(student.jump(x, t, r, condition), wanted, atol=1e-5)
    _, student = map_of(scheduler)
    assert torch.equal(student.jump(x, t, t, condition), x)
    assert not torch.equal(student.jump(x, 0.5, 0.0, condition), student.jump(x, 0.5, 0.1, condition))


@pytest.mark.parametrize("dit", [False, True])
@pytest.mark.parametrize("stepping", STEPPINGS)
@pytest.mark.parametrize("scheduler", ["flow", "epsilon", "edm"])
def test_its_calls_are_its_jumps(scheduler, stepping, dit):
    """Deterministic: from each time to the next; stochastic: to the image, and noise anew. By either way of sampling
    bit for bit, with guidance an input, and with a gradient through the last call alone."""
    _, student = map_of(scheduler, stepping=stepping, guidance=(1.0, 2.0), dit=dit)
    n, condition = noise(student), student.encode([0, 1, 2])
    fresh = [noise(student, seed=k) for k in range(5)]
    for count in (1, 2, 4):
        chain = student.chains[count - 1]
        with torch.no_grad():
            state = chain.start_scale * n
            for k, t in enumerate(chain.times, start=1):
                later = chain.times[k] if k < count else 0.0
                if stepping == "deterministic":
                    state = student.jump(state, t, later, condition, 2.0)
                else:
                    clean = student.jump(state, t, 0.0, condition, 2.0)
                    state = (1 - later) * clean + later * fresh[min(k + 1, 4)]
            made = student(n, condition, 2.0, steps=count, between=lambda k: fresh[k])
            assert torch.allclose(made, state, atol=1e-4 * state.abs().max().item())
            one = student.sampler(2.0, count)(n, condition)
            assert torch.equal(one, student(n, condition, 2.0, steps=count))
            assert not torch.equal(one, student(n, condition, 1.0, steps=count))
    assert torch.equal(student(n, condition), student(n, condition, steps=4))
    (t, later), network = student.chains[1].times, student.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(student(n, condition, 2.0, steps=2, between=lambda k: fresh[k]).sum(), parameters)
    with torch.no_grad():
        state = student.chains[1].start_scale * n
        if stepping == "deterministic":
            state = student.jump(state, t, later, condition, 2.0)
        else:
            state = (1 - later) * student.jump(state, t, 0.0, condition, 2.0) + later * fresh[2]
    wanted = torch.autograd.grad(student.jump(state, later, 0.0, condition, 2.0).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * max(1.0, other.abs().max().item()))


def test_one_call_is_that_of_a_map_from_the_prior():
    teacher, student = map_of()
    plain = FlowMap.around(student.network, teacher, teacher.t_max, student.info)
    n, condition = noise(student), student.encode([0, 1, 2])
    assert torch.equal(student(n, condition, steps=1), plain(n, condition))
    assert torch.equal(student(n, condition, duration=0.4), plain(n, condition, duration=0.4))
    assert plain.num_steps == 1 and list(plain.step_counts) == [1] and plain.own_description() == {}
    with pytest.raises(UserError, match="steps is 2; this student was trained for 1 call"):
        plain(n, condition, steps=2)


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_images_are_those_of_their_seed_for_any_number_of_calls(stepping):
    _, student = map_of(stepping=stepping)
    seen = []
    for steps in (1, 3, None):
        many = student.generate(num_images=5, seed=4, batch_size=5, steps=steps)
        few = student.generate(num_images=5, seed=4, batch_size=2, steps=steps)
        assert torch.allclose(many, few, atol=1e-5)
        seen.append(many)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2) and not torch.allclose(seen[1], seen[2], atol=1e-2)
    for steps in (0, 5):
        with pytest.raises(UserError, match=f"steps is {steps}; this student was trained for 4 calls, and takes 1 to"):
            student.generate(num_images=1, steps=steps)


def test_numbers_of_calls_that_are_shown():
    for count, shown in ((1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        assert list(map_of(count=count, trained=False)[1].step_counts) == shown


@pytest.mark.parametrize("scheduler", ["flow", "epsilon"])
def test_disk(tmp_path, scheduler, cli):
    _, student = map_of(scheduler, guidance=(1.0, 2.0))
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert again.chains == student.chains and again.info == student.info
    n, condition = noise(student), student.encode([0, 1, 2])
    for steps in (1, 2, None):
        assert torch.equal(again(n, condition, 1.25, steps=steps), student(n, condition, 1.25, steps=steps))
    other = student.with_network(student.network)
    assert other.chains == student.chains
    file = tmp_path / "s" / "flowdistill.json"
    description = json.loads(file.read_text())
    assert description["format"] == 4
    assert "one to 4 of the network for an image, deterministic" in cli("inspect", tmp_path / "s").out
    for change, message in (
        ({"chains": description["chains"][1:]}, "its chains must be one of each number of calls"),
        ({"chains": [{"times": [0.5]}] * 4}, "is damaged: its steps are"),
        ({"target_time": "reuse", "scalars": ["guidance"]}, None),
    ):
        file.write_text(json.dumps(description | change))
        with pytest.raises(UserError, match=message):
            load_student(tmp_path / "s")


def test_a_network_that_is_told_one_time_is_refused():
    with pytest.raises(UserError, match="target_time is 'reuse'.*needs both, so set it to separate"):
        map_of(target_time="reuse")
