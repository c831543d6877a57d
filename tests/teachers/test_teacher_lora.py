"""A teacher that is a base model plus a user's LoRA, and the students distilled from it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowdistill import load_student, load_teacher
from flowdistill.conditioning.pipeline_lora import BaseLora, find_lora
from flowdistill.config import RunConfig, TeacherConfig, TrainConfig, load_config
from flowdistill.evaluation.evaluate import _open
from flowdistill.export import export
from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.methods.freeflow import FreeFlow, FreeFlowConfig
from flowdistill.methods.score_distillation import (
    DiffInstruct,
    DiffInstructConfig,
    Dmd2,
    Dmd2Config,
    HostConfig,
    Sid,
    SidConfig,
)
from flowdistill.networks.lora import LoraSettings, lora_tensors
from flowdistill.plan import make_plan
from flowdistill.plan.report import describe as plan_in_words
from flowdistill.students import Generator, StudentInfo, describe, given_times
from flowdistill.students.steps import Steps, start_scale
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.teachers.teacher import Teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import describe_run, distill, make_accelerator
from flowdistill.utils.errors import UserError
from tests.echo_world import settings, student_pipeline
from tests.families import FAMILIES, PROMPTS, pipeline_latents
from tests.lora_files import kohya_file, lora_file, matrices, network_of
from tests.tiny import POINTER, tiny_dit_pipeline, tiny_unet_pipeline

SCALE = 0.7
NAMES = ["sd", "lcm", "sdxl", "sd3", "flux-dev", "sana", "lumina2", "qwen-image", "z-image"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> a folder with a family's ``base`` pipeline and its ``lora`` (a folder), both made once."""
    place = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> Path:
        pipeline = FAMILIES[name].make()
        pipeline.save_pretrained(place / name / "base")
        if hasattr(pipeline, "save_lora_weights"):
            lora_file(pipeline, place / name / "lora")
        return place / name

    return make


def teacher_of(folder: Path, name: str, lora: str | Path | None = "lora", scale: float = SCALE, **more: Any) -> Teacher:
    given = {} if lora is None else {"lora": str(folder / lora), "lora_scale": scale}
    return load_teacher(folder / "base", image_size=FAMILIES[name].image_size, **given, **more)


def fused(folder: Path, lora: Path, scale: float = SCALE) -> Any:
    """The pipeline with its LoRA, by diffusers alone."""
    pipeline = DiffusionPipeline.from_pretrained(folder / "base")
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(pipeline._lora_loadable_modules, lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


def noise(model: Any) -> Tensor:
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))


def samples(teacher: Teacher, name: str) -> Tensor:
    n, family = noise(teacher), FAMILIES[name]
    condition = teacher.encode(prompts=PROMPTS[:2])
    return teacher.sample(n * family.start(teacher), condition, steps=2, guidance_scale=family.guidance)


def equal(one: nn.Module, other: nn.Module) -> bool:
    here, there = one.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(value, there[key]) for key, value in here.items())


# --- the weights, and the samples


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_pipeline_with_the_lora_fused(models: Callable[[str], Path], name: str) -> None:
    """Of diffusers' own files, with text encoders where its class writes them; at scale 0 it is the base."""
    folder, family = models(name), FAMILIES[name]
    teacher, base, none = teacher_of(folder, name), teacher_of(folder, name, None), teacher_of(folder, name, scale=0.0)
    pipeline = fused(folder, folder / "lora")
    assert equal(teacher.network.backbone, network_of(pipeline)[1])
    theirs = pipeline_latents(pipeline, family, noise(teacher), 2, family.guidance)
    ours, before = samples(teacher, name), samples(base, name)
    assert (ours - theirs).abs().max() < 1e-4 and (ours - before).abs().max() > 1e-2
    assert equal(none.network.backbone, base.network.backbone) and torch.equal(samples(none, name), before)
    text = teacher.prompts.text.lora
    assert (text is not None) == any(key.startswith("text") for key in load_file(find_lora(str(folder / "lora"))))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohyas_files_are_read_with_their_alphas(models: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder, family = models(name), FAMILIES[name]
    file = kohya_file(family.make(), tmp_path / "kohya.safetensors")
    teacher, pipeline = teacher_of(folder, name, file), fused(folder, file)
    assert equal(teacher.network.backbone, network_of(pipeline)[1])
    theirs = pipeline_latents(pipeline, family, noise(teacher), 2, family.guidance)
    assert (samples(teacher, name) - theirs).abs().max() < 1e-4
    # alpha / rank is 1 / 4, by hand.
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = FAMILIES[name].make().unet
    a, b = (matrices(plain, ("to_q", "to_v", "to_out.0"), seed=7)[f"{key}.lora_{side}.weight"] for side in "AB")
    expected = plain.get_submodule(key).weight + SCALE * 0.25 * b @ a
    assert torch.allclose(teacher.network.backbone.get_submodule(key).weight, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_comfyuis_names_are_read(models: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = models(name)
    ends = ("to_q", "to_v")
    layers = matrices(FAMILIES[name].make().transformer, ends)
    save_file({f"diffusion_model.{key}": value for key, value in layers.items()}, tmp_path / "comfy.safetensors")
    teacher = teacher_of(folder, name, tmp_path / "comfy.safetensors")
    assert equal(teacher.network.backbone, fused(folder, tmp_path / "comfy.safetensors").transformer)
    assert not equal(teacher.network.backbone, teacher_of(folder, name, None).network.backbone)


def test_a_half_precision_teacher_is_fused_as_diffusers_does(models: Callable[[str], Path]) -> None:
    teacher = teacher_of(models("sd"), "sd", dtype="bfloat16")
    pipeline = DiffusionPipeline.from_pretrained(models("sd") / "base", torch_dtype=torch.bfloat16)
    pipeline.load_lora_weights(models("sd") / "lora")
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    assert equal(teacher.network.backbone, pipeline.unet)
    with teacher.prompts.text.opened(CPU) as text:
        assert equal(text.text_encoder, pipeline.text_encoder)


def test_caches_tell_it_from_its_base(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Encoded prompts go by the text encoders' hash, pairs by that of the weights too."""
    kinds = {"lora": SCALE, "other scale": 0.5, "base": 0.0}
    teachers = [teacher_of(models("sd"), "sd", scale=scale) for scale in kinds.values()]
    teachers.append(teacher_of(models("sd"), "sd", None))
    assert len({teacher.prompts.text.fingerprint for teacher in teachers}) == len(teachers)
    for teacher in teachers:
        teacher_pairs(teacher, 1, 1, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(teachers)
    embeds = [teacher.encode(prompts=["a cat"]).tensors["prompt_embeds"] for teacher in teachers]
    assert torch.equal(embeds[2], embeds[3]) and (embeds[0] - embeds[3]).abs().max() > 1e-2
    assert (embeds[0] - embeds[1]).abs().max() > 1e-2


# --- its record


def test_a_students_folder_has_all_of_it(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights, text encoders and the record; without base model and LoRA at hand."""
    folder = models("sd")
    teacher = teacher_of(folder, "sd", prompts=PROMPTS)
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", teacher.source), lora=LoraSettings(2))
    student.save(tmp_path / "s")
    base = load_file(tmp_path / "s" / "base.safetensors")
    own = network_of(fused(folder, folder / "lora"))[1].state_dict()
    assert len(base) == len(own)
    for key, value in base.items():
        assert torch.equal(value, own[key.removeprefix("velocity.backbone.").replace(".base_layer", "")])
    again = load_student(tmp_path / "s")
    assert again.info.base_lora == BaseLora(str(folder / "lora"), SCALE)
    assert again.prompts.text.lora is None
    assert torch.equal(again.encode(prompts=["a dog"]).tensors["prompt_embeds"],
                       teacher.encode(prompts=["a dog"]).tensors["prompt_embeds"])
    words = f"base with the LoRA {folder / 'lora'} at scale 0.7"
    assert words in describe(again) and f"LoRA          {folder / 'lora'} at scale 0.7" in teacher.describe()
    Generator.from_teacher(teacher_of(folder, "sd", None), StudentInfo()).save(tmp_path / "plain")
    assert "base_lora" not in json.loads((tmp_path / "plain" / "flowdistill.json").read_text())
    assert load_student(tmp_path / "plain").info.base_lora is None


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in NAMES), ("sd", "full"), ("flux-dev", "full"),
                                            *((name, "two calls") for name in ("sd", "sd3", "flux-dev", "qwen-image"))])
def test_the_card_draws_the_students_picture(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Its lines, as they stand; a full student is a pipeline, one of adapters a LoRA file on top of the user's too."""
    full = kind == "full"
    family, sources = FAMILIES[name], models(name)
    monkeypatch.chdir(sources)
    teacher = load_teacher("base", image_size=family.image_size, lora="lora", lora_scale=SCALE)
    steps = two_calls(teacher) if kind == "two calls" else None
    student = trained(Generator.from_teacher(teacher, StudentInfo("dmd2", "base"), steps=steps,
                                             lora=None if full else LoraSettings(2, 3.0)))
    export(student, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from base with the LoRA lora at scale 0.7." in card
    blocks = [block.split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
              for block in card.split("```python\n")[1:]]
    assert len(blocks) == (1 if full else 2)
    n, condition = noise(student), student.encode(prompts=PROMPTS[:2])
    with torch.no_grad():
        expected = student(n, condition)
        before = Generator.from_teacher(teacher, StudentInfo(), steps=steps)(n, condition)
    size = expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * size
    for block in blocks:
        assert apart(block, family, n, expected) < 1e-4 * size
    if not full:
        lines = [line for line in blocks[1].splitlines() if "load_lora_weights(\"lora\")" not in line
                 and "fuse_lora" not in line and "unload_lora" not in line]
        assert apart("\n".join(lines), family, n, expected) > 1e-2 * size  # the base alone will not do
        held = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        assert len(held) == len(lora_tensors(student.network.velocity.backbone))


def two_calls(teacher: Teacher) -> Steps:
    """Without noise between them, which another one would draw."""
    times = given_times(teacher, 2, None, "linear", None)
    return Steps(times, "deterministic", start_scale(teacher.path, times, "deterministic", True))


def apart(block: str, family: Any, n: Tensor, expected: Tensor) -> float:
    """Largest difference of what a card's lines make of the noise."""
    *lines, call = block.strip().splitlines()
    names: dict[str, Any] = {"latents": family.pack(n.clone()), "PROMPTS": PROMPTS[:2], "extra": {
        key: value for key, value in family.call.items() if f"{key}=" not in call}}
    code = call.replace('"a prompt"', 'PROMPTS, latents=latents, output_type="latent", **extra')
    exec("\n".join([*lines, "pipe.set_progress_bar_config(disable=True)", code]), names)
    return (family.unpack(names["images"]) - expected).abs().max().item()


def trained(student: Generator, size: float = 0.05) -> Generator:
    """Stands for training: everything that trains has moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.network.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return student


# --- runs


def written(folder: Path, sources: Path, **teacher: Any) -> Path:
    """A configuration of a run of one step."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    both = {"student": "lora", "critic": "lora", "lora": {"rank": 2}}
    settings = {
        "output_dir": str(folder / "run"), "method": {"name": "dmd2", **both},
        "evaluation": {"at_end": False},
        "teacher": {"source": str(sources / "base"), "prompts": str(folder / "prompts.txt"), **teacher},
        "train": {"steps": 1, "batch_size": 2, "trackers": [], "num_samples": 2, "device": "cpu"},
    }
    (folder / "a.yaml").write_text(yaml.safe_dump(settings))
    return folder / "a.yaml"


def test_a_run_and_its_evaluation_know_it(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder than that of the run, and of the student's folder alone."""
    shutil.copytree(models("sd"), tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    file = written(Path(), Path(), lora="lora", lora_scale=SCALE)
    run = distill(file, ["output_dir=run"])
    assert load_config("run/config.yaml").teacher.lora == "lora"
    assert "teacher       base with the LoRA lora at scale 0.7" in describe_run("run")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    whole = teacher_of(models("sd"), "sd")
    for place in (tmp_path / "here" / "run", tmp_path / "here" / "run" / "student"):
        subject = _open(str(place), CPU, with_teacher=True)
        assert equal(subject.teacher.network.backbone, whole.network.backbone)
        assert subject.student.info.base_lora == BaseLora("lora", SCALE)
    assert run.steps == 1
    shutil.rmtree(tmp_path / "here" / "lora")  # a student is complete without its teacher
    assert _open(str(tmp_path / "here" / "run" / "student"), CPU, with_teacher=True).teacher is None
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"holds another run: teacher\.lora is lora there and None here"):
        distill(file, ["output_dir=run", "teacher.lora=null", "teacher.lora_scale=1"])


def test_a_plan_has_the_same_memory(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = written(tmp_path, models("sd"), lora_scale=1)
    lora = f"teacher.lora={models('sd') / 'lora'}"
    plain, with_it = (make_plan(load_config(file, given)) for given in ([], [lora, "teacher.lora_scale=0.5"]))
    assert plain.parts == with_it.parts and plain.activations == with_it.activations and plain.peak == with_it.peak
    words = f"dmd2 of {models('sd') / 'base'} with the LoRA {models('sd') / 'lora'} at scale 0.5, for one process"
    assert words in plan_in_words(with_it)


SMALL = LoraSettings(2, target_modules=["to_q", "to_v"])
BOTH = {"student": "lora", "critic": "lora", "lora": SMALL}
HOSTS = {
    "dmd2": lambda teacher: Dmd2(Dmd2Config(**BOTH), teacher),
    "dmd2, full critic": lambda teacher: Dmd2(Dmd2Config(student="lora", lora=SMALL), teacher),
    "dmd2, several steps": lambda teacher: Dmd2(Dmd2Config(steps=4, **BOTH), teacher),
    "sid": lambda teacher: Sid(SidConfig(**BOTH), teacher),
    "diff_instruct": lambda teacher: DiffInstruct(DiffInstructConfig(**BOTH), teacher),
    "disback": lambda teacher: DisBack(
        DisBackConfig(degradation_steps=1, degradation_every=1, interval=[1], host=HostConfig(**BOTH)), teacher),
    "freeflow": lambda teacher: FreeFlow(FreeFlowConfig(**BOTH), teacher),
}


@pytest.mark.parametrize("host", HOSTS)
def test_adapters_train_on_the_fused_weights(models: Callable[[str], Path], tmp_path: Path, host: str) -> None:
    """Steps of the real loop on one set of base weights, which is the base model's and the LoRA's together."""
    folder = models("sd")
    teacher = teacher_of(folder, "sd", prompts=PROMPTS)
    method = HOSTS[host](teacher)
    method.config.name = method.name
    config = RunConfig(str(tmp_path), 0, TeacherConfig("base"), method.config, TrainConfig(
        steps=3, batch_size=2, log_every=1, checkpoint_every=0, trackers=[], device="cpu", precision="fp32"))
    trainer = Trainer(method, config, tmp_path, make_accelerator(config.train, tmp_path))
    trainer.train()
    shared = {p.data_ptr() for p in teacher.network.parameters()}
    for name, role in trainer.roles.items():
        own = {p.data_ptr() for p in role.network.parameters() if not p.requires_grad}
        assert own == (set() if name == "critic" and host == "dmd2, full critic" else shared)
    student = trainer.student()
    student.save(tmp_path / "student")
    whole = network_of(fused(folder, folder / "lora"))[1].state_dict()
    for key, value in load_file(tmp_path / "student" / "base.safetensors").items():
        assert torch.equal(value, whole[key.removeprefix("velocity.backbone.").replace(".base_layer", "")])
    held = load_file(tmp_path / "student" / "model.safetensors")
    assert all(".lora_" in key or key.startswith("embeddings.") for key in held)
    assert all(value.abs().max() > 0 for key, value in held.items() if ".lora_B." in key)
    again, n = load_student(tmp_path / "student"), noise(student)
    with torch.no_grad():
        made = again(n, again.encode(prompts=PROMPTS[:2]))
        assert (made - student(n, student.encode(prompts=PROMPTS[:2]))).abs().max() < 1e-4 * made.abs().max()


# --- errors


def changed(file: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    save_file(change(load_file(file)), target, {"format": "pt"})
    return str(target)


def unet_of(file: Path) -> dict[str, Tensor]:
    return {key: value for key, value in load_file(file).items() if key.startswith("unet.")}


def bad_lora(case: str, models: Callable[[str], Path], place: Path) -> str:
    """A path for ``teacher.lora`` of the Stable Diffusion teacher."""
    good, new = models("sd") / "lora" / "pytorch_lora_weights.safetensors", place / "new.safetensors"
    if case == "missing":
        return str(place / "nothing.safetensors")
    if case == "no id":
        return "somewhere"
    if case == "offline":
        return "some/lora"
    if case == "pickled":
        torch.save({}, place / "lora.bin")
        return str(place / "lora.bin")
    if case == "empty folder":
        return str(place)
    if case == "several":
        for name in "ab":
            shutil.copy(good, place / f"{name}.safetensors")
        return str(place)
    if case == "pointer":
        new.write_text(POINTER)
        return str(new)
    if case == "damaged":
        new.write_bytes(good.read_bytes()[:-10])
        return str(new)
    if case == "other family":
        return str(models("sd3") / "lora")
    changes: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "nothing": lambda tensors: {},
        "no network": lambda tensors: {key.removeprefix("unet."): value for key, value in tensors.items()},
        "no lora": lambda tensors: {"unet.conv_in.weight": torch.ones(2, 2)},
        "one layer": lambda tensors: {
            key.replace("mid_block.attentions.0", "mid_block.attentions.7"): value for key, value in tensors.items()},
        "other model": lambda tensors: unet_of(models("sdxl") / "lora" / good.name),
        "half": lambda tensors: {key: value for key, value in tensors.items() if "attn1.to_q.lora.up" not in key
                                 and "attn1.to_q.lora_B" not in key},
        "text": lambda tensors: {key.replace("layers.0", "layers.9"): value for key, value in tensors.items()
                                 if key.startswith("text")},
        "dora": lambda tensors: tensors | {"unet.conv_in.dora_scale": torch.ones(2)},
    }
    return changed(good, new, changes[case])


BAD = {
    "missing": r"nothing\.safetensors does not exist; give a \.safetensors file, a folder with pytorch_lora_weights",
    "no id": r"somewhere does not exist; give",
    "offline": r"some/lora is no file or folder here and could not be fetched from the hub",
    "pickled": r"lora\.bin is no \.safetensors file",
    "empty folder": r"holds no \.safetensors file",
    "several": r"holds several files, a\.safetensors, b\.safetensors; name one of them",
    "pointer": "is a git-lfs pointer",
    "damaged": "is damaged or truncated",
    "other model": r"is a LoRA of another model: its .* is for a layer of .* and the UNet2DConditionModel's has",
    "other family": r"is no LoRA of a StableDiffusionPipeline, which may have one of its unet, text_encoder: its "
                    "'text_encoder_2",
    "nothing": "it is empty",
    "no network": "is no LoRA of a StableDiffusionPipeline, which may have one of its unet, text_encoder: its 'down_",
    "no lora": r"is no LoRA: 'conv_in\.weight' is none of a layer's two matrices",
    "one layer": r"is a LoRA of another model: \d+ of its \d+ layers, such as mid_block\.attentions\.7\S*, are none of",
    "half": "is incomplete: .* has one of its two matrices only",
    "text": r"is a LoRA of another model: 2 of its 4 layers, such as encoder\.layers\.9\S*, are none of the CLIP",
    "dora": "is a DoRA",
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora_of_the_teacher_is_refused_before_the_work(
    models: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any], case: str
) -> None:
    place = tmp_path / "lora"
    place.mkdir()
    lora = bad_lora(case, models, place)
    file = written(tmp_path, models("sd"), lora=lora)
    told = cli("distill", file)
    with pytest.raises(UserError, match=BAD[case]):
        load_teacher(models("sd") / "base", lora=lora, prompts=PROMPTS)
    assert told.code == 2 and told.err.count("\n") == 1 and not (tmp_path / "run").exists()
    if case not in ("text", "offline"):  # what a plan does not look at: encoders and the hub
        planned = cli("plan", file)
        assert planned.code == 2 and planned.err == told.err


@pytest.mark.parametrize("name", ["pixart-sigma", "dit", "unet"])
def test_teachers_without_a_loader_are_refused(models: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    pipeline = {"dit": tiny_dit_pipeline, "unet": tiny_unet_pipeline}.get(name) or FAMILIES[name].make
    made = pipeline()
    made.save_pretrained(tmp_path / "base")
    (tmp_path / "a.yaml").write_text(
        f"{{output_dir: {tmp_path}/run, teacher: {{source: {tmp_path}/base, lora: {models('sd')}/lora}}, "
        "method: {name: dmd2}}")
    match = f"is a {type(made).__name__}, for which diffusers loads no LoRA files; set it to null"
    with pytest.raises(UserError, match=match):
        load_teacher(tmp_path / "base", lora=str(models("sd") / "lora"))
    with pytest.raises(UserError, match=match):
        make_plan(load_config(tmp_path / "a.yaml"))


def test_other_settings_that_make_no_sense(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.lora_scale is 0\.5, but teacher\.lora is null"):
        load_config(written(tmp_path, models("sd"), lora_scale=0.5))
    with pytest.raises(UserError, match=r"teacher\.lora_scale is 0\.5, but teacher\.lora is null"):
        load_teacher(models("sd") / "base", lora_scale=0.5)
    with pytest.raises(UserError, match=r"a live pipeline, whose own weights are used, takes it by load_lora_weights"):
        load_teacher(FAMILIES["sd"].make(), lora=str(models("sd") / "lora"))
    with pytest.raises(UserError, match=r"teacher\.lora is set, but echodistill writes LoRA files of teacher\.source"):
        EchoDistill(settings(tmp_path), teacher_of(models("sd"), "sd"), student_pipeline())


def test_a_live_pipeline_with_an_adapter_in_it_has_no_student(models: Callable[[str], Path]) -> None:
    """It may be sampled; its copies would train the adapter and could not be stored."""
    pipeline = DiffusionPipeline.from_pretrained(models("sd") / "base")
    pipeline.load_lora_weights(models("sd") / "lora")
    teacher = load_teacher(pipeline)
    for lora in (None, LoraSettings(2)):
        with pytest.raises(UserError, match=r"has an adapter in it.*fuse_lora\(\) and unload_lora_weights\(\) first"):
            Generator.from_teacher(teacher, StudentInfo(), lora=lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    Generator.from_teacher(load_teacher(pipeline), StudentInfo())


def test_files_of_the_hub(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the usual name, the only one, or the one that is given; from the cache without asking."""
    good = models("sd") / "lora" / "pytorch_lora_weights.safetensors"
    for name in ("pytorch_lora_weights.safetensors", "only.safetensors", "sub/one.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / name)
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for files, source in (
        (["README.md", "pytorch_lora_weights.safetensors", "only.safetensors"], "some/lora"),
        (["only.safetensors", "sub/one.safetensors"], "some/lora"),
        ([], "some/lora/sub/one.safetensors"),
    ):
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, files=files: files)
        assert find_lora(source, download=False) is None
        assert find_lora(source) == tmp_path / asked[-1][1]
    assert asked == [("some/lora", "pytorch_lora_weights.safetensors"), ("some/lora", "only.safetensors"),
                     ("some/lora", "sub/one.safetensors")]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: ["a.safetensors", "b.safetensors"])
    with pytest.raises(UserError, match="some/lora holds several files, a.safetensors, b.safetensors; name one"):
        find_lora("some/lora")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(tmp_path / file))
    assert find_lora("some/lora", download=False) == tmp_path / "pytorch_lora_weights.safetensors"
    assert find_lora("some/lora") == tmp_path / "pytorch_lora_weights.safetensors" and len(asked) == 3
