"""teacher.quantize: near the teacher that it is, for every family; students from whole weights, adapters on codes."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

from flowdistill.config import METHODS, TrainConfig, load_config
from flowdistill.methods.echodistill.adaptation import DeltaLinear
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.students import Generator, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.training.optimizer import backward
from flowdistill.training.roles import prepare_roles
from flowdistill.training.run import distill
from flowdistill.utils import quantized
from flowdistill.utils.errors import UserError
from flowdistill.utils.quantized import quantized_layers
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS
from tests.tiny import tiny_dit_pipeline


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    monkeypatch.setattr(quantized, "SMALLEST", 64)


def asked(teacher):
    draw = Draw(0, 0, rows=2)
    condition = teacher.draw_condition(draw) if teacher.prompts is None else teacher.encode(prompts=PROMPTS[:2])
    return draw.normal(teacher.shape), torch.full((2,), 0.6), condition


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_near_itself_and_passes_gradients(tmp_path, name):
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path)
    settings = {"image_size": family.image_size} if family.image_size else {}
    exact = load_teacher(tmp_path, **settings)
    x, t, condition = asked(exact)
    wanted = exact.velocity(x, t, condition)
    try:
        coarse = load_teacher(tmp_path, quantize="int8", **settings)
    except UserError as error:  # a UNet of convolutions alone
        assert "nothing of the UNet2DModel can be kept in int8" in str(error)
        return
    assert coarse.network.dtype == exact.network.dtype
    x = x.requires_grad_(True)
    found = coarse.velocity(x, t, condition)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05
    assert torch.autograd.grad(found.sum(), x)[0].abs().sum() > 0
    copied = coarse.student_copy()
    assert not quantized_layers(copied) and all(p.dtype == torch.float32 for p in copied.parameters())
    stored = exact.network.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in copied.state_dict().items())
    assert len(stored) == len(copied.state_dict())


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    tiny_dit_pipeline(num_attention_heads=2, attention_head_dim=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_adapters_stand_on_the_teachers_codes_and_export_what_they_learned(tmp_path, dit, scheme):
    teacher = load_teacher(dit, quantize=scheme, dtype="bfloat16")
    assert f"quantised     {scheme}, {len(quantized_layers(teacher.network))} linear layers" in teacher.describe()
    student = teacher.student_copy(LoraSettings(rank=2))
    own, shared = (quantized_layers(network) for network in (student, teacher.network))
    assert len(own) == len(shared) > 0
    assert all(one.weight is other.weight for one, other in zip(own, shared, strict=True))
    assert isinstance(student, VelocityNetwork)
    x, t, condition = asked(teacher)
    assert torch.equal(student(x, t, condition), teacher.velocity(x, t, condition))
    trained = [p for p in student.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    backward(student(x, t, condition).square().mean(), torch.amp.GradScaler("cpu", enabled=False))
    assert sum(p.grad.abs().sum() for p in trained) > 0


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("full", "lora")])
def test_a_run_goes_on_from_its_checkpoint_and_its_student_draws_the_same_when_loaded(tmp_path, dit, kinds):
    def configured(folder, steps):
        settings = {
            "output_dir": str(folder), "evaluation": {"at_end": False},
            "teacher": {"source": str(dit), "quantize": "int8"},
            "method": {"name": "dmd2", "student": kinds[0], "critic": kinds[1], "lora": {"rank": 2}},
            "train": {"steps": steps, "batch_size": 4, "trackers": [], "num_samples": 2, "device": "cpu"},
        }
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
        return load_config(tmp_path / "a.yaml")

    distill(configured(tmp_path / "parts", 1))
    distill(configured(tmp_path / "parts", 2))
    distill(configured(tmp_path / "whole", 2))
    one, other = (load_student(tmp_path / name) for name in ("parts", "whole"))
    images = [student.generate(labels=[0, 1], seed=3) for student in (one, other)]
    assert torch.equal(*images) and not quantized_layers(one.network)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole/checkpoints/step-000002").iterdir()}
    assert (sizes["student.safetensors"] < 60_000) == (kinds[0] == "lora")  # no weights of the teacher's


def test_text_encoders_of_codes_say_nearly_the_same_and_are_told_apart(tmp_path):
    FAMILIES["sd"].make().save_pretrained(tmp_path)
    whole, coarse = load_teacher(tmp_path), load_teacher(tmp_path, text_encoder_quantize="int8")
    one, other = (teacher.encode(prompts=PROMPTS[:2]).tensors for teacher in (whole, coarse))
    for name, value in one.items():
        assert 0 < (other[name] - value).norm() / value.norm() < 0.05
    assert whole.prompts.text.fingerprint != coarse.prompts.text.fingerprint
    Generator.from_teacher(coarse, StudentInfo()).save(tmp_path / "student")
    kept = load_student(tmp_path / "student").prompts
    assert kept.text.scheme == "int8"
    again = kept.encode(PROMPTS[:2]).tensors
    assert all(torch.equal(again[name], value) for name, value in other.items() if name in again) and again


def test_what_cannot_be_is_a_sentence(tmp_path, dit, monkeypatch):
    with pytest.raises(UserError, match="teacher.quantize is for a pipeline folder or a hub id"):
        load_teacher(tiny_dit_pipeline(), quantize="int8")
    with pytest.raises(UserError, match="text_encoder_quantize are for text-to-image pipelines"):
        load_teacher(dit, text_encoder_quantize="int8")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nf4 need the package bitsandbytes"):
        load_teacher(dit, quantize="nf4")


def test_somebody_elses_codes_cannot_be_copied(dit):
    pipeline = tiny_dit_pipeline(num_attention_heads=2, attention_head_dim=16)
    layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
    layer.weight = torch.nn.Parameter(torch.ones_like(layer.weight, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: x * 1.0
    teacher = load_teacher(pipeline)
    with pytest.raises(UserError, match="DiTTransformer2DModel are quantised, and a copy that trains needs whole ones"):
        teacher.student_copy()


def test_shares_of_codes_are_refused(dit):
    config = METHODS.get("dmd2").Config(student="lora", critic="lora")
    method = METHODS.get("dmd2")(config, load_teacher(dit, quantize="int8"))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match="role 'student' has adapters on quantised weights .*FSDP cannot cut"):
        prepare_roles(method, TrainConfig(), "fp32", accelerator)


def test_weights_that_change_freely_stand_on_codes():
    layer = quantized.QuantizedLinear(torch.nn.Linear(64, 64), "int8")
    free, x = DeltaLinear(layer), torch.randn(2, 64)
    assert torch.equal(free(x), layer(x))
    free(x).sum().backward()
    assert free.delta.dtype == torch.float32 and free.delta.grad.abs().sum() > 0
