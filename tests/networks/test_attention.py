"""Attention kernels: which are taken, what is said when they cannot be, and forward-mode differentiation."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.config import load_config
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.networks.attention import allow_forward_mode
from flowdistill.networks.lora import LoraSettings
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import load_teacher
from flowdistill.teachers.start_states import StartStates
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS
from tests.teachers.test_families import noise, teacher_of
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

MASKED = ("pixart-alpha", "pixart-sigma", "sana", "lumina2", "qwen-image", "z-image")


def velocity_of(name, t=0.6, ready=lambda: None, **settings):
    family, (_, teacher) = FAMILIES[name], teacher_of(name, **settings)
    condition = teacher.encode(prompts=PROMPTS[:2]) if family.prompts else teacher.encode(family.labels)
    ready()
    with torch.no_grad():
        return teacher, teacher.velocity(noise(teacher), t, condition)


class Missing:
    """An import system without xformers, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("xformers"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.fixture
def without_xformers(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("xformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in with xformers' layouts, (B, M, K) and (B, M, H, K), on the CPU; counts its calls."""

    def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None, p=0.0):
        module.calls += 1
        if module.broken:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n...")
        assert attn_bias is None and p == 0.0
        heads = query.ndim == 4
        q, k, v = (x.transpose(1, 2) if heads else x for x in (query, key, value))
        weights = (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        return (weights @ v).transpose(1, 2) if heads else weights @ v

    module = ModuleType("xformers")
    module.calls, module.broken = 0, False
    module.ops = ModuleType("xformers.ops")
    module.ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setitem(sys.modules, "xformers.ops", module.ops)
    monkeypatch.setattr(attention_processor, "xformers", module, raising=False)
    monkeypatch.setattr(attention_dispatch, "xops", module.ops, raising=False)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    return module


@pytest.mark.parametrize("name", FAMILIES)
def test_math_and_sdpa_agree(name, without_xformers, monkeypatch):
    """They are different kernels (the one that torch was asked for is looked at), and the same function."""
    asked, call = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        asked.append(torch.backends.cuda.flash_sdp_enabled())
        return call(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    teacher, math = velocity_of(name, ready=asked.clear, attention="math")  # text encoders have attention too
    assert teacher.network.attention == "math" and set(asked) == {False}
    teacher, fused = velocity_of(name, ready=asked.clear, attention="sdpa")
    assert teacher.network.attention == "sdpa" and set(asked) == {True}
    assert torch.allclose(math, fused, rtol=1e-5, atol=1e-5 * fused.abs().max())


def test_xformers_that_is_missing_is_said_in_one_line(without_xformers, caplog):
    teacher, fallen = velocity_of("sd", attention="xformers")
    assert teacher.network.attention == "sdpa" and "attention     sdpa" in teacher.describe()
    assert [record.message for record in caplog.records if record.name == "flowdistill"] == [
        "teacher.attention is 'xformers', but it is not installed; torch's own attention (sdpa) is used"]
    caplog.clear()
    teacher, auto = velocity_of("sd", attention="auto")
    assert teacher.network.attention == "sdpa" and not caplog.records and torch.equal(auto, fallen)


def test_xformers_that_does_not_run_here_is_said_too(xformers, caplog):
    xformers.broken = True
    teacher, _ = velocity_of("sd", attention="xformers")
    assert teacher.network.attention == "sdpa" and xformers.calls == 1
    assert "it does not run on cpu in float32 (No operator found" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("wanted", ["xformers", "auto"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MASKED])
def test_xformers_computes_the_same(name, wanted, xformers, caplog):
    """Layer by layer through the stand-in, and also in the networks copied from the teacher's."""
    _, expected = velocity_of(name, attention="sdpa")
    before = xformers.calls
    teacher, velocity = velocity_of(name, attention=wanted)
    assert teacher.network.attention == "xformers" and not caplog.records
    own = xformers.calls - before - 1  # one call tries it out
    assert own > 0 and torch.allclose(velocity, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    student = FlowMap.from_teacher(teacher, StudentInfo())
    condition = teacher.encode(prompts=PROMPTS[:2]) if FAMILIES[name].prompts else teacher.encode(FAMILIES[name].labels)
    before = xformers.calls
    student(noise(teacher), condition)
    assert xformers.calls - before == own
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value == "native"  # of other models


@pytest.mark.parametrize("name", MASKED)
def test_xformers_is_not_for_masked_prompts(name, xformers, caplog):
    teacher, _ = velocity_of(name, attention="xformers")
    assert teacher.network.attention == "sdpa" and xformers.calls == 0 and "masks its prompts" in caplog.text


def test_a_network_without_attention_layers(xformers, caplog):
    from tests.tiny import tiny_unet

    unet = tiny_unet()
    for module in unet.modules():
        module.processor = None
    pipeline = tiny_unet_pipeline()
    pipeline.register_modules(unet=unet)
    assert load_teacher(pipeline, attention="xformers").network.attention == "sdpa"
    assert "has no attention layer" in caplog.text


def test_other_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="teacher.attention is 'flash_hub'; allowed are auto, sdpa, xformers, math"):
        load_teacher(tiny_unet_pipeline(), attention="flash_hub")
    teacher = "teacher: {source: s, attention: flash_hub}"
    (tmp_path / "a.yaml").write_text(f"output_dir: r\n{teacher}\nmethod: {{name: boot}}\n")
    with pytest.raises(UserError, match="'teacher.attention' must be one of auto, sdpa, xformers, math"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("make", [tiny_unet_pipeline, tiny_dit_pipeline])
def test_recomputed_blocks_use_the_kernels_of_their_forward_pass(make, without_xformers):
    """Otherwise torch finds other tensors at the second time than at the first, and stops."""
    gradients = []
    for kernel, again in (("math", False), ("math", True), ("sdpa", True)):
        teacher = load_teacher(make(), attention=kernel)
        student = FlowMap.from_teacher(teacher, StudentInfo())
        if again:
            student.network.enable_gradient_checkpointing()
        torch.manual_seed(0)
        student(torch.randn(2, *teacher.shape), teacher.encode([0, 1])).square().mean().backward()
        gradients.append([p.grad for p in student.network.parameters() if p.grad is not None])
    for one, *others in zip(*gradients, strict=True):
        assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for other in others)


# --- forward mode


def derivatives(teacher, caplog, **settings):
    """dV/dd by forward mode and by differences, and the log of the first."""
    method = FreeFlow(FreeFlowConfig(derivative="jvp", prediction_fraction=1.0), teacher)
    student = method.roles()["student"].network
    with torch.no_grad():
        for p in student.embeddings.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    n, duration = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.6])
    prior = StartStates(n, teacher.encode([0, 1]), None)
    exact = method.derivative(student, prior, duration)
    assert method.derivative(student, prior, duration).equal(exact)
    lines = [record.message for record in caplog.records if record.name == "flowdistill"]
    method.forward_mode = False
    return exact, method.derivative(student, prior, duration), lines, method


@pytest.mark.parametrize("make", [tiny_unet_pipeline, tiny_dit_pipeline])
def test_jvp_under_sdpa_switches_to_math(make, without_xformers, caplog):
    teacher = load_teacher(make())
    exact, near, lines, _ = derivatives(teacher, caplog)
    assert len(lines) == 1 and "of torch's kernels only math has" in lines[0] and exact.abs().max() > 1e-2
    assert torch.allclose(exact, near, rtol=0.05, atol=5e-3)


def test_group_norms_get_their_input_in_order_where_it_is_differentiated_forwards():
    """The rule of torch up to 2.8 for group norm ends in an error on what a U-Net's attention leaves, transposed."""
    teacher, seen = load_teacher(tiny_unet_pipeline()), []
    network = FreeFlow(FreeFlowConfig(derivative="jvp"), teacher).student().network
    allow_forward_mode(network, "method.derivative=jvp")  # a second time
    norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {len(norm._forward_pre_hooks) for norm in norms} == {1}
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))

    def velocity(t):
        return network.velocity(torch.ones(2, *teacher.shape), t, teacher.encode([0, 1]))

    with torch.no_grad():
        velocity(torch.full((2,), 0.5))
        assert not all(seen)  # the other passes are left alone
        seen.clear()
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(velocity, (torch.full((2,), 0.5),), (torch.ones(2),))
    assert seen and all(seen)


def test_jvp_under_math_says_nothing(without_xformers, caplog):
    exact, near, lines, _ = derivatives(load_teacher(tiny_dit_pipeline(), attention="math"), caplog)
    assert not lines and torch.allclose(exact, near, rtol=0.05, atol=5e-3)


def test_jvp_under_xformers_takes_the_students_attention_back(xformers, caplog):
    teacher = load_teacher(tiny_dit_pipeline(), attention="xformers")
    exact, near, lines, method = derivatives(teacher, caplog)
    assert len(lines) == 1 and "which xformers has not" in lines[0]
    assert torch.allclose(exact, near, rtol=0.05, atol=5e-3)
    assert method.student().network.velocity.attention == "sdpa" and teacher.network.attention == "xformers"
    before = xformers.calls
    method.student()(torch.randn(2, *teacher.shape), teacher.encode([0, 1]))
    assert xformers.calls == before
    teacher.velocity(torch.randn(2, *teacher.shape), 0.5, teacher.encode([0, 1]))
    assert xformers.calls > before


class Double(torch.autograd.Function):
    """An operation without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_network_without_a_forward_mode_rule_falls_back_to_differences(without_xformers, caplog):
    teacher = load_teacher(tiny_dit_pipeline())
    method = FreeFlow(FreeFlowConfig(derivative="jvp"), teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    embedding = networks["student"].embeddings["duration"].mlp
    embedding.register_forward_hook(lambda module, args, output: Double.apply(output))
    with torch.no_grad():
        embedding.linear_2.bias.add_(1.0)
    caplog.clear()
    for step in range(2):
        loss, _ = method.loss("student", networks, Draw(0, step, rows=4))
        loss.backward()
        assert loss.isfinite()
    lines = [record.message for record in caplog.records if record.name == "flowdistill"]
    assert len(lines) == 1 and lines[0].endswith("finite differences are used") and method.forward_mode is False
    assert embedding.linear_2.bias.grad.abs().max() > 0


def test_other_errors_are_not_taken_for_a_missing_rule():
    method = FreeFlow(FreeFlowConfig(derivative="jvp"), load_teacher(tiny_dit_pipeline()))

    def broken(*args, **kwargs):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        method.derivative(broken, StartStates(torch.zeros(1, 4, 8, 8), None, None), torch.ones(1))


def test_the_log_is_the_first_processs(monkeypatch, caplog):
    from flowdistill.utils.logging import log_once

    monkeypatch.setenv("RANK", "1")
    log_once("not this")
    monkeypatch.setenv("RANK", "0")
    log_once("this")
    assert [record.message for record in caplog.records] == ["this"] and caplog.records[0].levelno == logging.WARNING


# --- diffusers' own names

DISPATCHED = ("flux-dev", "qwen-image")


@pytest.mark.parametrize("name", DISPATCHED)
@pytest.mark.parametrize("kernel", ["native", "_native_math"])
def test_backends_of_diffusers_are_set_by_their_names(name, kernel, caplog):
    _, expected = velocity_of(name, attention="sdpa")
    teacher, velocity = velocity_of(name, attention=kernel)
    assert teacher.network.attention == kernel and not caplog.records
    assert torch.allclose(velocity, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    backends = {str(module.processor._attention_backend) for module in teacher.student_copy().backbone.modules()
                if hasattr(getattr(module, "processor", None), "_attention_backend")}
    assert len(backends) == 1 and backends.pop().endswith(kernel.upper())
    active = attention_dispatch._AttentionBackendRegistry._active_backend  # the choice of every other model
    assert not str(active).endswith("MATH")


@pytest.mark.parametrize(("name", "kernel", "reason"), [
    ("sd", "flash", "diffusers does not dispatch the attention of the UNet2DConditionModel"),
    ("flux-dev", "flash", "it does not run on cpu in float32 ("),
    ("qwen-image", "_flash_3", "it does not run on cpu in float32, with a mask over its prompts ("),
    ("flux-dev", "sage", "it does not run on cpu in float32 ("),
])
def test_backends_that_cannot_be_are_said_in_one_line(name, kernel, reason, caplog):
    teacher, _ = velocity_of(name, attention=kernel)
    assert teacher.network.attention == "sdpa" and len(caplog.records) == 1
    said = caplog.records[0].message
    assert said.startswith(f"teacher.attention is '{kernel}', but {reason}") and said.endswith("(sdpa) is used")


def test_a_backend_without_a_backward_pass_is_the_teachers_alone(monkeypatch, caplog):
    """A stand-in for one that is not installed."""
    registry = attention_dispatch._AttentionBackendRegistry
    sage = attention_dispatch.AttentionBackendName.SAGE
    calls = []

    def forward_only(query, key, value, **settings):
        calls.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.detach().transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    monkeypatch.setitem(registry._backends, sage, forward_only)
    monkeypatch.setitem(registry._constraints, sage, [])
    monkeypatch.setitem(registry._supported_arg_names, sage, {"query", "key", "value"})
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    _, expected = velocity_of("flux-dev", attention="sdpa")
    teacher, velocity = velocity_of("flux-dev", attention="sage")
    assert teacher.network.attention == "sage" and calls and not caplog.records
    assert torch.allclose(velocity, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    condition, before = teacher.encode(prompts=PROMPTS[:2]), len(calls)
    for copied in (teacher.student_copy(), teacher.student_copy(LoraSettings(rank=2))):
        assert copied.attention == "sdpa"
        copied(noise(teacher), torch.full((2,), 0.6), condition).sum().backward()
        assert len(calls) == before and any(p.grad is not None for p in copied.parameters())
    with pytest.raises(UserError, match="attention is sage, which has no backward pass, and this loss needs the grad"):
        teacher.velocity(noise(teacher).requires_grad_(True), 0.6, condition)
