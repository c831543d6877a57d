"""Low-rank students and critics on the teacher's own weights: exact at the start, stored once, merged for export."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from flowdistill.config import RunConfig, TeacherConfig, TrainConfig, validate
from flowdistill.export import export
from flowdistill.methods.boot import Boot, BootConfig
from flowdistill.methods.consistency import Consistency, ConsistencyConfig
from flowdistill.methods.data_flow_map import DataFlowMap, DataFlowMapConfig
from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.flow_map_matching import FlowMapMatching, FlowMapMatchingConfig
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config, HostConfig, Sid, SidConfig
from flowdistill.networks.lora import LoraSettings, merged, split
from flowdistill.students import FlowMap, Generator, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.training.average import MovingAverage
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.training.state import network_tensors
from flowdistill.utils import quantized
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

TINY = {"unet": tiny_unet_pipeline, "dit": tiny_dit_pipeline}
LORA = LoraSettings(rank=2)
BOTH = {"student": "lora", "critic": "lora", "lora": LORA}
METHODS = {
    "freeflow": lambda teacher: FreeFlow(FreeFlowConfig(**BOTH, guidance_max=2.0), teacher),
    "boot": lambda teacher: Boot(BootConfig(student="lora", lora=LORA), teacher),
    "consistency": lambda teacher: Consistency(
        ConsistencyConfig(student="lora", lora=LORA, pairs=11, pairs_steps=1, target="ema"), teacher),
    "flow_map_matching": lambda teacher: FlowMapMatching(
        FlowMapMatchingConfig(**BOTH, correction_strength=1.0, guidance_max=2.0), teacher),
    "data": lambda teacher: DataFlowMap(DataFlowMapConfig(data="digits", student="lora", lora=LORA), teacher),
    "dmd2": lambda teacher: Dmd2(Dmd2Config(**BOTH), teacher),
    "sid": lambda teacher: Sid(SidConfig(**BOTH), teacher),
    "disback": lambda teacher: DisBack(
        DisBackConfig(degradation_steps=2, degradation_every=1, interval=[1], host=HostConfig(**BOTH)), teacher),
}


def teacher_of(name="unet", **settings):
    if name in TINY:
        return load_teacher(TINY[name](), null_label=3 if name == "unet" else None, **settings)
    return load_teacher(FAMILIES[name].make(), image_size=FAMILIES[name].image_size, prompts=PROMPTS, **settings)


def digits_teacher():
    return load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10)


def trained(student, size=0.1):
    """Stands for training: everything that trains has moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.network.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return student


def noise(model, rows=3):
    return torch.randn(rows, *model.shape, generator=torch.Generator().manual_seed(5))


def some(teacher):
    return teacher.examples([0, 1, 2])


def weights_in_memory(*modules):
    """Bytes of parameters, each storage once."""
    storages = {}
    for module in modules:
        for p in module.parameters():
            storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("name", [*TINY, "sd"])
def test_a_student_starts_as_its_teacher_bit_for_bit(name):
    teacher = teacher_of(name)
    n, condition = noise(teacher), some(teacher)
    with torch.no_grad():
        flow_map = FlowMap.from_teacher(teacher, StudentInfo(guidance_range=(1.0, 2.0)), lora=LORA)
        assert torch.equal(flow_map(n, condition), teacher.sample(n, condition, steps=1))
        generator = Generator.from_teacher(teacher, StudentInfo(), lora=LORA)
        assert torch.equal(generator(n, condition), teacher.denoise(teacher.t_max * n, teacher.t_max, condition))
        assert (trained(flow_map)(n, condition) - teacher.sample(n, condition, steps=1)).abs().max() > 1e-2


def test_a_layers_output_is_the_closed_form():
    """W x + b + (alpha / rank) B A x, in float64."""
    teacher = teacher_of("dit")
    network = trained(FlowMap.from_teacher(teacher, StudentInfo(), lora=LoraSettings(2, 6.0, ["to_q"]))).network
    name = "transformer_blocks.0.attn1.to_q"
    layer = network.velocity.backbone.double().get_submodule(name)
    plain = teacher.network.backbone.double().get_submodule(name)
    x = torch.randn(5, plain.in_features, dtype=torch.float64)
    a, b = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    assert torch.allclose(layer(x), x @ plain.weight.T + plain.bias + 3.0 * x @ a.T @ b.T, rtol=0, atol=1e-12)
    assert sum(p.requires_grad for p in network.velocity.parameters()) == 2 * 2  # two blocks, A and B


def test_every_weight_is_in_memory_once():
    """Teacher, student, critic and the student's average: the teacher's bytes, and the adapters'."""
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    full = weights_in_memory(teacher.network)
    method = METHODS["freeflow"](teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    average = MovingAverage(networks["student"], 0.9, False)
    small = {name: sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
             for name, network in networks.items()}
    everything = weights_in_memory(teacher.network, *networks.values(), average.network)
    assert everything == full + 2 * small["student"] + small["critic"]
    own = {name: p for name, p in networks["student"].named_parameters() if not p.requires_grad}
    of_teacher = dict(teacher.network.named_parameters())
    assert all(p is of_teacher[name.removeprefix("velocity.").replace(".base_layer", "")] for name, p in own.items())
    assert len(own) == len(of_teacher)


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_and_embeddings_train(tmp_path, method):
    """Steps of the real loop, a resume, and the student on disk."""
    teacher = digits_teacher()
    before = {name: p.clone() for name, p in teacher.network.named_parameters()}
    config = RunConfig(output_dir=str(tmp_path), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=5, batch_size=4, log_every=1, checkpoint_every=3, trackers=[], device="cpu", precision="fp32"))
    untrained = METHODS[method](teacher)
    config.method = untrained.config
    config.method.name = untrained.name

    def trainer_of(folder, teacher):
        torch.manual_seed(0)
        return Trainer(METHODS[method](teacher), config, folder, make_accelerator(config.train, folder))

    trainer = trainer_of(tmp_path / "a", teacher)
    start = copy.deepcopy(network_tensors(trainer.roles["student"].network))
    trainer.train()
    for role in trainer.roles.values():
        names = network_tensors(role.network)
        assert names and all(".lora_" in name or name.startswith("embeddings.") for name in names)
    now = network_tensors(trainer.roles["student"].network)
    assert all(not torch.equal(start[name], now[name]) for name in now if ".lora_B." in name or "linear_2" in name)
    assert all(torch.equal(before[name], p) for name, p in teacher.network.named_parameters())
    assert all(p.grad is None for p in teacher.network.parameters())
    saved = load_file(tmp_path / "a" / "checkpoints" / "step-000005" / "student.safetensors")
    assert saved.keys() == now.keys()

    whole = {name: value.clone() for name, value in trainer.student().network.state_dict().items()}
    config.train.steps = 3
    first = trainer_of(tmp_path / "b", digits_teacher())
    first.train()
    config.train.steps = 5
    second = trainer_of(tmp_path / "b", digits_teacher())
    assert second.step == 3
    second.train()
    assert all(torch.equal(value, whole[name]) for name, value in second.student().network.state_dict().items())

    student = second.student()
    student.save(tmp_path / "student")
    again = load_student(tmp_path / "student")
    n, condition = noise(teacher), some(teacher)
    with torch.no_grad():
        assert torch.equal(again(n, condition), student(n, condition))
        assert not torch.equal(again(n, condition), untrained.student()(n, condition))


@pytest.mark.parametrize("name", ["unet", "dit", "sd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_disk_the_base_is_stored_once_and_bit_for_bit(tmp_path, name, dtype):
    teacher = teacher_of(name, dtype=dtype)
    student = trained(FlowMap.from_teacher(teacher, StudentInfo(guidance_range=(1.0, 2.0)), lora=LORA))
    student.save(tmp_path / "s")
    small, base = (load_file(tmp_path / "s" / f"{file}.safetensors") for file in ("model", "base"))
    of_teacher = teacher.network.state_dict()
    assert len(base) == len(of_teacher) and {value.dtype for value in small.values()} == {torch.float32}
    for key, value in base.items():
        kept = of_teacher[key.removeprefix("velocity.").replace(".base_layer", "")]
        assert torch.equal(value, kept) and value.dtype == kept.dtype == dtype
    again = load_student(tmp_path / "s")
    n, condition = noise(teacher), some(teacher)
    assert again.network.velocity.lora == LORA
    with torch.no_grad():  # equal weights, but matrix products round differently elsewhere in memory
        one, other = again(n, condition, 1.5), student(n, condition, 1.5)
    assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * other.norm()
    again.save(tmp_path / "t")
    assert load_file(tmp_path / "t" / "model.safetensors").keys() == small.keys()
    (tmp_path / "s" / "base.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_student(tmp_path / "s")


def test_merged_is_unmerged_in_float64():
    teacher = teacher_of()
    student = trained(FlowMap.from_teacher(teacher, StudentInfo(), lora=LoraSettings(3, 5.0)))
    backbone = student.network.velocity.backbone
    weights = {name: p.clone() for name, p in teacher.network.named_parameters()}
    alone = merged(backbone)
    assert not any("lora" in name or "base_layer" in name for name, _ in alone.named_modules())
    assert {name for name, _ in alone.named_parameters()} == {n for n, _ in teacher.network.backbone.named_parameters()}
    layer, plain = backbone.get_submodule("conv_in"), alone.conv_in.double()
    x, twin = torch.randn(2, 1, 8, 8, dtype=torch.float64), copy.deepcopy(layer).double()
    assert (twin(x) - plain(x)).abs().max() < 1e-6  # the sum itself is float32
    assert all(torch.equal(weights[name], p) for name, p in teacher.network.named_parameters())


@pytest.mark.parametrize("name", TINY)
def test_exported_pipeline_gives_the_same_images(tmp_path, name):
    student = trained(FlowMap.from_teacher(teacher_of(name), StudentInfo(guidance_range=(1.0, 2.0)), lora=LORA))
    export(student, tmp_path / "out", guidance_scale=1.25)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 3} if name == "unet" else {"guidance_scale": 1}
    images = pipe(num_inference_steps=1, class_labels=[0, 1, 2], generator=torch.Generator().manual_seed(5),
                  output_type="pt", **call).images
    expected = student.decode(student(noise(student), some(student), 1.25))
    assert 0.01 < expected.std() < 1 and (images - expected).abs().max() < 1e-5


WITH_LORA_FILES = ("sd", "sd-v", "sdxl", "lcm", "sd3", "flux-dev", "flux-schnell", "sana", "lumina2", "qwen-image",
                   "z-image")


def lora_file(name, folder, kind=FlowMap):
    """The teacher's pipeline with the LoRA file of a student's export, called as the export's README says.

    Returns:
        Relative differences of its latents to the student's and to those before training; parameters of the file's
        adapters and of the student's. None where there is no such file.
    """
    family, teacher = FAMILIES[name], teacher_of(name)
    student = trained(kind.from_teacher(teacher, StudentInfo("freeflow", "base"), lora=LoraSettings(2, 3.0)), 0.05)
    export(student, folder)
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        return None
    pipe = family.make()
    pipe.set_progress_bar_config(disable=True)
    lines = (folder / "README.md").read_text().splitlines()
    names = {"pipe": pipe, "EulerDiscreteScheduler": EulerDiscreteScheduler,
             "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler}
    exec(next(line for line in lines if line.startswith("pipe.scheduler = ")), names)
    backbone = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    plain = sum(p.numel() for p in backbone.parameters())
    pipe.load_lora_weights(folder)
    added = sum(p.numel() for p in backbone.parameters()) - plain
    adapters = sum(p.numel() for key, p in student.network.named_parameters() if ".lora_" in key)
    call = [line for line in lines if line.startswith('images = pipe("a prompt"')][-1]
    settings = eval(f"dict({call.split(', ', 1)[1].split(').images')[0]})") | family.call
    n, condition = noise(student, 2), student.encode(prompts=PROMPTS[:2])
    latents = pipe(prompt=PROMPTS[:2], latents=family.pack(n.clone()), output_type="latent", **settings).images
    with torch.no_grad():
        expected, before = student(n, condition), teacher.denoise(teacher.t_max * n, teacher.t_max, condition)
    size = expected.abs().max()
    apart, moved = ((other - expected).abs().max().item() / size.item() for other in (family.unpack(latents), before))
    return apart, moved, added, adapters


@pytest.mark.parametrize("kind", [FlowMap, Generator])
@pytest.mark.parametrize("name", WITH_LORA_FILES)
def test_the_teachers_pipeline_takes_the_lora_file(tmp_path, name, kind):
    """Constants in the time embedding are a rank of their own."""
    apart, moved, added, adapters = lora_file(name, tmp_path / "out", kind)
    assert apart < 1e-4 and moved > 1e-2
    assert added > adapters if kind is FlowMap else added == adapters


def test_no_lora_file_where_a_pipeline_could_not_use_it(tmp_path):
    for name, settings in {"unet": {}, "pixart-sigma": {}, "sdxl-edm": {}, "sd": {"t_max": 0.8}}.items():
        student = FlowMap.from_teacher(teacher_of(name, **settings), StudentInfo(), lora=LORA)
        export(student, tmp_path / name)
        assert not (tmp_path / name / "pytorch_lora_weights.safetensors").exists(), name
    export(FlowMap.from_teacher(teacher_of("sd"), StudentInfo()), tmp_path / "full")
    assert not (tmp_path / "full" / "pytorch_lora_weights.safetensors").exists()


def test_settings_that_make_no_sense_are_refused():
    teacher = teacher_of("dit")
    with pytest.raises(UserError, match=r"target_modules is \['to_x'\].*no linear or convolution layer.*to_q"):
        Boot(BootConfig(student="lora", lora=LoraSettings(target_modules=["to_x"])), teacher)
    with pytest.raises(UserError, match="'method.student' must be one of full, lora"):
        Boot(BootConfig(student="low"), teacher)
    with pytest.raises(UserError, match="'method.lora.rank' must be at least 1"):
        Dmd2(Dmd2Config(student="lora", lora=LoraSettings(rank=0)), teacher)
    with pytest.raises(UserError, match="method.student is 'lora', but the student's network was given"):
        Boot(BootConfig(student="lora"), teacher, student_network=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("settings, words", [
    ({"lora": LoraSettings(4)}, "method.lora has no effect, because method.student and method.critic are full"),
    ({"lora": LoraSettings(4), "critic": "lora"}, None),
    ({"student": "lora", "lora": LoraSettings(4)}, None),
    ({"student": "lora", "critic_lora_rank": 4}, "method.critic_lora_rank has no effect, because method.critic "),
    ({"critic": "lora", "critic_lora_rank": 4}, None),
    ({}, None),
])
def test_settings_of_adapters_that_nothing_has_are_said(recwarn, settings, words):
    validate(Dmd2Config(**settings), prefix="method.")
    said = [str(warning.message) for warning in recwarn if "no effect" in str(warning.message)]
    assert len(said) == (words is not None) and all(words in one for one in said)


def test_the_card_of_a_lora_says_that_it_goes_onto_whole_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SMALLEST", 64)
    FAMILIES["sd"].make().save_pretrained(tmp_path / "sd")
    for scheme in ("int8", None):
        teacher = load_teacher(tmp_path / "sd", quantize=scheme)
        FlowMap.from_teacher(teacher, StudentInfo(), lora=LORA).save(tmp_path / "student")
        export(load_student(tmp_path / "student"), tmp_path / str(scheme))
        said = "It was trained on weights in int8" in (tmp_path / str(scheme) / "README.md").read_text()
        assert said == (scheme is not None)


def test_a_critic_may_have_another_rank():
    def ranks(**settings):
        roles = Dmd2(Dmd2Config(**BOTH, **settings), teacher_of()).roles()
        return [{p.shape[0] for key, p in role.network.named_parameters() if ".lora_A." in key}
                for role in roles.values()]

    assert ranks() == [{2}, {2}] and ranks(critic_lora_rank=5) == [{2}, {5}]


def test_splitting_leaves_nothing_out():
    student = FlowMap.from_teacher(teacher_of(), StudentInfo(), lora=LORA)
    tensors = student.network.state_dict()
    small, base = split(tensors)
    assert small.keys() | base.keys() == tensors.keys() and not small.keys() & base.keys()
    assert all(".lora_" in key or key.startswith("embeddings.") for key in small)


def test_training_of_a_lora_student_in_bfloat16_under_autocast():
    """A bfloat16 teacher, float32 adapters: the gradients are those of float32 to bfloat16's digits."""
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        method = METHODS["dmd2"](teacher_of("unet", dtype=dtype))
        networks = {name: role.network for name, role in method.roles().items()}
        loss, _ = method.loss("critic", networks, Draw(0, 0, rows=8))
        loss.backward()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in networks["critic"].parameters() if p.requires_grad])
        assert gradients[dtype].dtype == torch.float32
    apart = (gradients["float32"] - gradients["bfloat16"]).norm() / gradients["float32"].norm()
    assert 0 < apart < 0.05


