"""A teacher with an autoencoder in the place of its pipeline's own, and the students distilled from it."""

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
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from flowdistill import load_student, load_teacher
from flowdistill.config import DataOptions, load_config
from flowdistill.evaluation.evaluate import _open
from flowdistill.evaluation.kept_rows import TeacherIdentity
from flowdistill.evaluation.suites import _facts
from flowdistill.export import export
from flowdistill.networks.lora import LoraSettings
from flowdistill.plan import make_plan
from flowdistill.plan.caching import cache_inputs
from flowdistill.plan.report import describe as plan_in_words
from flowdistill.students import Generator, StudentInfo, describe
from flowdistill.teachers.autoencoder import BaseVae, find_autoencoder
from flowdistill.teachers.codec import VaeCodec
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.teachers.real_data import RealData
from flowdistill.teachers.teacher import Teacher
from flowdistill.training.run import describe_run, distill
from flowdistill.utils.errors import UserError
from tests.echo_world import write_pictures
from tests.families import FAMILIES, PROMPTS, pipeline_latents
from tests.tiny import POINTER, lively, network, tiny_dit_pipeline, tiny_unet_pipeline

NAMES = ["sd", "sdxl", "sd3", "flux-dev", "pixart-sigma", "sana", "lumina2", "qwen-image", "z-image"]
CPU = torch.device("cpu")


def other_vae(own: Any, seed: int = 9, **config: Any) -> Any:
    """One of the same class and latents, with other weights."""
    plain = {key: value for key, value in own.config.items() if not key.startswith("_")}
    return lively(type(own).from_config(plain | config), seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> a folder with a family's ``base`` pipeline and a ``new`` autoencoder for it, both made once."""
    place = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> Path:
        pipeline = FAMILIES[name].make()
        pipeline.save_pretrained(place / name / "base")
        other_vae(pipeline.vae).save_pretrained(place / name / "new")
        return place / name

    return make


def teacher_of(folder: Path, name: str = "sd", new: str | Path | None = "new", **more: Any) -> Teacher:
    given = {} if new is None else {"vae": str(folder / new)}
    return load_teacher(folder / "base", image_size=FAMILIES[name].image_size, **given, **more)


def noise(model: Any) -> Tensor:
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))


def equal(one: nn.Module, other: nn.Module) -> bool:
    here, there = one.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(value, there[key]) for key, value in here.items())


def same_record(teacher: Teacher, source: Path, inside: str = "") -> bool:
    return teacher.vae == BaseVae(str(source), inside, "AutoencoderKL")


# --- latents and pictures


@pytest.mark.parametrize("name", NAMES)
def test_its_pictures_are_those_of_the_pipeline_with_it(models: Callable[[str], Path], name: str) -> None:
    """By the pipeline's own call; its own autoencoder gives what it gives without the setting, to the last bit."""
    folder, family = models(name), FAMILIES[name]
    base, teacher, own = (teacher_of(folder, name, new) for new in (None, "new", "base"))
    n = noise(teacher)
    latents = teacher.sample(n * family.start(teacher), teacher.encode(prompts=PROMPTS[:2]), steps=2,
                             guidance_scale=family.guidance)
    kind = type(family.make().vae)
    pipeline = DiffusionPipeline.from_pretrained(folder / "base", vae=kind.from_pretrained(folder / "new"))
    theirs = pipeline_latents(pipeline, family, n, 2, family.guidance, output="pt")
    ours, before = teacher.decode(latents), base.decode(latents)
    assert (ours - theirs).abs().max() < 1e-3 and (ours - before).abs().max() > 0.02
    assert torch.equal(own.decode(latents), before) and own.vae.subfolder == "vae" and base.vae is None
    assert (teacher.codec.encode(ours) - base.codec.encode(ours)).abs().max() > 1e-3
    assert torch.equal(own.codec.encode(ours), base.codec.encode(ours))
    assert equal(teacher.network, base.network) and equal(teacher.own_codec(), base.codec)


def test_it_is_found_in_every_form(models: Callable[[str], Path], tmp_path: Path) -> None:
    """A folder, one in a pipeline's, weights in one variant only, and the wanted one of two."""
    folder = models("sd")
    new = teacher_of(folder).codec
    whole = DiffusionPipeline.from_pretrained(folder / "base", vae=AutoencoderKL.from_pretrained(folder / "new"))
    whole.save_pretrained(tmp_path / "pipeline")
    for source, inside in ((tmp_path / "pipeline", "vae"), (tmp_path / "pipeline" / "vae", "")):
        teacher = teacher_of(folder, new=source)
        assert equal(teacher.codec, new) and same_record(teacher, source, inside)
    half = AutoencoderKL.from_pretrained(folder / "new")
    half.half().save_pretrained(tmp_path / "both", variant="fp16")
    assert equal(teacher_of(folder, new=tmp_path / "both").codec, VaeCodec(half.float()))
    other_vae(half, 3).save_pretrained(tmp_path / "both")
    assert equal(teacher_of(folder, new=tmp_path / "both").codec.vae, other_vae(half, 3))
    DiffusionPipeline.from_pretrained(folder / "base").save_pretrained(tmp_path / "base", variant="fp16")
    for source, expected in (("both", half), ("pipeline", new.vae)):  # which has no such variant
        teacher = load_teacher(tmp_path / "base", vae=str(tmp_path / source), variant="fp16")
        assert equal(teacher.codec.vae, expected)


def test_half_precision_is_the_new_ones_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    """One that does not say force_upcast stays in float16, beside a pipeline whose own does."""
    folder = models("sdxl")
    other_vae(FAMILIES["sdxl"].make().vae, force_upcast=False).save_pretrained(tmp_path / "fixed")
    for new, expected in ((None, torch.float32), ("new", torch.float32), (tmp_path / "fixed", torch.float16)):
        assert teacher_of(folder, new=new, dtype="float16").codec.vae.dtype == expected


def test_another_class_may_do(models: Callable[[str], Path], tmp_path: Path) -> None:
    """As the tiny autoencoders for Stable Diffusion, whose latents are scaled by themselves, which is said."""
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
              "num_decoder_blocks": (1, 1)}
    tiny = lively(AutoencoderTiny(latent_channels=4, **widths))
    tiny.save_pretrained(tmp_path / "tiny")
    teacher = teacher_of(models("sd"), new=tmp_path / "tiny")
    assert teacher.vae.kind == "AutoencoderTiny"
    images = tiny.decode(noise(teacher)).sample / 2 + 0.5
    assert torch.allclose(teacher.decode(noise(teacher)), images.clamp(0, 1), atol=1e-5)


def test_another_scale_is_the_new_ones_and_is_said(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, own = models("sd"), FAMILIES["sd"].make().vae
    other_vae(own, scaling_factor=0.5).save_pretrained(tmp_path / "scaled")
    teacher_of(folder)
    assert "scaling_factor" not in caplog.text
    teacher = teacher_of(folder, new=tmp_path / "scaled")
    assert "scaled has the scaling_factor 0.5, and the autoencoder of the teacher" in caplog.text
    assert teacher.codec.scale == 0.5
    alike = teacher_of(folder)
    ours, theirs = (each.decode(noise(each) * each.codec.scale) for each in (teacher, alike))
    assert torch.allclose(ours, theirs, atol=1e-5)


# --- what is refused


def bad_vae(case: str, models: Callable[[str], Path], place: Path) -> str:
    own, new = FAMILIES["sd"].make().vae, place / "new"
    changed: dict[str, dict[str, Any]] = {
        "channels": {"latent_channels": 8},
        "factor": {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",),
                   "up_block_types": ("UpDecoderBlock2D",)},
        "grey": {"in_channels": 1, "out_channels": 1},
        "shift": {"shift_factor": 0.1},
        "means": {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4},
    }
    if case in changed:
        other_vae(own, **changed[case]).save_pretrained(new)
    elif case in ("damaged", "pointer"):
        shutil.copytree(models("sd") / "new", new)
        file = new / "diffusion_pytorch_model.safetensors"
        file.write_bytes(POINTER.encode() if case == "pointer" else file.read_bytes()[:-10])
    elif case == "no weights":
        own.save_config(new)
    elif case == "a text encoder":
        return str(models("sd") / "base" / "text_encoder")
    elif case == "a pixel pipeline":
        tiny_unet_pipeline().save_pretrained(new)
    elif case == "no shift":
        own.save_pretrained(new)
    elif case == "video":
        dims = {"base_dim": 8, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
        network(AutoencoderKLQwenImage, z_dim=4, **dims).save_pretrained(new)
    elif case == "a file":
        new.write_bytes(b"x")
    elif case == "noise":
        shrinks = {"encoder_block_out_channels": (32, 32), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2}
        new.mkdir()
        (new / "config.json").write_text(json.dumps({"_class_name": "ConsistencyDecoderVAE", **shrinks}))
    elif case in BROKEN:
        own.save_pretrained(new)
        file = new / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | BROKEN[case]))
    elif case in ("empty", "large"):
        new.mkdir()
    if case == "large":  # somebody's home: nothing in it is read
        (new / "mail").mkdir()
        (new / "mail" / "old.txt").write_bytes(b"caf\xe9")
    return {"no name": "", "no id": "somewhere", "offline": "some/vae",
            "a network": str(models("sd") / "base" / "unet")}.get(case, str(new))


BROKEN: dict[str, dict[str, Any]] = {
    "a scale in words": {"scaling_factor": "large"},
    "several scales": {"scaling_factor": [1.0]},
    "means in words": {"latents_mean": "small", "latents_std": [1.0]},
}
ALIKE = "; give one with the same latents, or set it to null"
BAD = {
    "missing": "new does not exist; give a folder or a hub id",
    "no id": r"teacher\.vae somewhere does not exist; give",
    "offline": r"some/vae is no folder here and could not be fetched from the hub",
    "a file": r"is a file; give .* with AutoencoderKL\.from_single_file",
    "empty": r"holds no autoencoder: neither it nor a folder vae in it has a config\.json",
    "large": r"holds no autoencoder: neither it nor a folder vae in it has a config\.json",
    "no name": "teacher.vae'? is (empty; give .*, or null for the pipeline's own|an empty text; .* set it to null)",
    "noise": "ConsistencyDecoderVAE is not supported: its decode.. draws noise of its own",
    **dict.fromkeys(BROKEN, r"the AutoencoderKL in .*new could not be made from its config\.json: "),
    "a pixel pipeline": r"holds no autoencoder: neither it nor a folder vae in it has a config\.json",
    "a network": "holds no autoencoder, but a UNet2DConditionModel; give",
    "a text encoder": "holds no autoencoder, but no model of diffusers; give",
    "no weights": "has no weights",
    "damaged": "is damaged or truncated",
    "pointer": "is a git-lfs pointer",
    "channels": f"makes latents of 8 channels, and the autoencoder of the teacher .* makes latents of 4 chan.*{ALIKE}",
    "factor": f"makes latents 1 times smaller than pictures along a side, and .* latents 2 times smaller .*{ALIKE}",
    "grey": "makes pictures of 1 channels, and .* makes pictures of 3 channels",
    "video": "takes pictures as frames of a video, and .* takes pictures alone",
    "no shift": "has no shift_factor, and the autoencoder of the teacher .* has one, so its pipeline does not scale",
    "shift": "has a shift_factor, and the autoencoder of the teacher .* has none, so its pipeline does not scale",
    "means": "has a latents_mean, and the autoencoder of the teacher .* has none",
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_sentence(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Before the pipeline is loaded, and in a plan."""
    def offline(*given: Any, **more: Any) -> Any:
        raise OSError("no way to the hub")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    source = bad_vae(case, models, tmp_path)
    monkeypatch.setattr("flowdistill.teachers.loading._load_pipeline", None)
    folder = models("sd3" if case == "no shift" else "sd")
    with pytest.raises(UserError, match=BAD[case]) as caught:
        load_teacher(folder / "base", vae=source)
    assert "\n" not in str(caught.value)
    if case not in ("offline", "no weights", "damaged", "pointer"):  # a plan reads neither weights nor the hub
        with pytest.raises(UserError, match=BAD[case]):
            make_plan(load_config(written(tmp_path, folder, vae=source)))


def test_teachers_of_pixels_and_live_ones_are_refused(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_unet_pipeline().save_pretrained(tmp_path / "pixels")
    new = str(models("sd") / "new")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({
        "output_dir": str(tmp_path / "run"), "method": {"name": "dmd2"},
        "teacher": {"source": str(tmp_path / "pixels"), "vae": new}}))
    config = load_config(tmp_path / "b.yaml")
    for made in (lambda: load_teacher(config.teacher), lambda: make_plan(config)):
        with pytest.raises(UserError, match=r"teacher\.vae is set, but the teacher .*pixels has no autoencoder"):
            made()
    with pytest.raises(UserError, match=r"teacher\.vae is for a pipeline folder .* as pipeline\.vae"):
        load_teacher(FAMILIES["sd"].make(), vae=new)
    shutil.copytree(models("sd") / "base", tmp_path / "bare")
    (tmp_path / "bare" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"bare has no vae/config\.json"):
        load_teacher(tmp_path / "bare", vae=new)


# --- the hub


def test_of_the_hub_one_variant_is_fetched(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the hub's cache is not asked for again."""
    asked: list[list[str]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append(sorted(allow_patterns))
        return str(models("sd") / ("base" if "vae/config.json" in allow_patterns else "new"))

    weights = "diffusion_pytorch_model"
    alone = ["README.md", "config.json", f"{weights}.bin", f"{weights}.safetensors", "sdxl_vae.safetensors"]
    inside = ["model_index.json", "unet/config.json", f"unet/{weights}.safetensors", "vae/config.json",
              f"vae/{weights}.fp16.safetensors", f"vae/{weights}.safetensors"]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for files, variant, expected, place in (
        (alone, "fp16", ["config.json", f"{weights}.safetensors"], ""),
        (inside, None, ["vae/config.json", f"vae/{weights}.safetensors"], "vae"),
        (inside, "fp16", ["vae/config.json", f"vae/{weights}.fp16.safetensors"], "vae"),
        (["config.json", f"{weights}.fp16.bin"], None, ["config.json", f"{weights}.fp16.bin"], ""),
    ):
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, files=files: files)
        found = find_autoencoder("some/vae", variant)
        assert asked[-1] == expected and found.record == BaseVae("some/vae", place, "AutoencoderKL")
        assert found.record.code() == (
            'AutoencoderKL.from_pretrained("some/vae"' + (', subfolder="vae")' if place else ")"))
    assert find_autoencoder("some/vae", download=False) is None and len(asked) == 4
    for files, message in ((["unet/config.json"], "some/vae holds no autoencoder"),
                           (["config.json", f"{weights}.a.bin", f"{weights}.b.bin"], "in the variants a, b only; set")):
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, files=files: files)
        with pytest.raises(UserError, match=message):
            find_autoencoder("some/vae")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(
        models("sd") / "base" / file) if file == "vae/config.json" else None)
    found = find_autoencoder("some/vae", download=False)
    assert found.folder == models("sd") / "base" / "vae" and len(asked) == 4


def test_of_the_cache_only_the_variant_that_is_wanted_is_taken_unasked(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub is asked for another, which it may have; where it does not answer, what is here is said."""
    own = AutoencoderKL.from_pretrained(models("sd") / "new")
    for repository, variants in (("plain", [None]), ("half", ["fp16"]), ("two", ["a", "b"]), ("shards", [None])):
        for variant in variants:
            own.save_pretrained(tmp_path / "me" / repository, variant=variant,
                                **({"max_shard_size": "20KB"} if repository == "shards" else {}))
    (shard,) = (tmp_path / "me" / "shards").glob("*-00001-of-*")

    def cached(repository: str, file: str) -> str | None:
        found = tmp_path / repository / file
        return str(found) if found.is_file() else None

    def offline(repository: str) -> list[str]:
        asked.append(repository)
        raise OSError("no way to the hub")

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    for repository, variant in (("me/plain", None), ("me/half", "fp16"), ("me/two", "b"), ("me/shards", None)):
        assert find_autoencoder(repository, variant).folder == tmp_path / repository
    assert not asked and not caplog.text
    for repository, variant, words in (
        ("me/plain", "fp16", "its weights without a variant only, which are taken in the place of those of the variant "
                             "fp16, for the hub does not answer"),
        ("me/half", None, "its weights in the variant fp16 only, which are taken in the place of those without a"),
    ):
        assert find_autoencoder(repository, variant).folder == tmp_path / repository
        assert f"teacher.vae {repository} is in the hub's cache with {words}" in caplog.text
        assert find_autoencoder(repository, variant, download=False).folder == tmp_path / repository
    for variant, words in ((None, "those without a variant"), ("fp16", "those of the variant fp16")):
        with pytest.raises(UserError, match=f"its weights in the variants a, b only, and {words} could not be fetched "
                                            r"from the hub \(no way to the hub\); set teacher\.variant to one of"):
            find_autoencoder("me/two", variant)
    assert asked == ["me/plain", "me/half", "me/two", "me/two"]
    shard.unlink()
    with pytest.raises(UserError, match="me/shards is no folder here and could not be fetched from the hub: no way"):
        find_autoencoder("me/shards")
    with pytest.raises(UserError, match=r"me/shards has 3 of the 4 files of its weights only; fetch or copy it again$"):
        teacher_of(models("sd"), new=tmp_path / "me" / "shards")
    for wanted, there in (("fp16", "plain"), (None, "half")):  # and where it answers, it is what the hub has
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: [
            "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: (
            asked.extend(allow_patterns) or str(tmp_path / repository)))
        find_autoencoder(f"me/{there}", wanted)
        assert asked[-1] == f"diffusion_pytorch_model{'' if wanted is None else '.fp16'}.safetensors"


# --- caches


def test_caches_of_latents_and_pictures_tell_it_from_the_pipelines_own(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Pairs, which are latents of the network alone, are the same ones."""
    folder, own = models("sd"), FAMILIES["sd"].make().vae
    AutoencoderKL.from_pretrained(folder / "new").save_pretrained(tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    other_vae(own, 3).save_pretrained(tmp_path / "third")
    sources = [None, "new", tmp_path / "scaled", tmp_path / "third"]
    teachers = [teacher_of(folder, new=new, prompts=PROMPTS) for new in sources]
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{i}.png", "text": "a cat"}) + "\n" for i in range(4)))
    data = [RealData(teacher, str(tmp_path / "pictures"), options=DataOptions(cache_latents="disk"))
            for teacher in teachers]
    assert len({each.bank.folder for each in data}) == 4
    held = [each.bank.latents(torch.arange(4)) for each in data]
    for i, teacher in enumerate(teachers):
        assert all((held[i] - held[j]).abs().max() > 1e-3 for j in range(i))
        teacher_pairs(teacher, 1, 1, folder=tmp_path / "pairs")
    assert len(list((tmp_path / "pairs").iterdir())) == 1
    assert len({TeacherIdentity(teacher)._hash("teacher", 2) for teacher in teachers}) == 4
    assert len({_facts("a", [], teacher, 0, {})["weights_sha256"] for teacher in teachers}) == 4
    students = [Generator.from_teacher(teacher, StudentInfo()) for teacher in teachers]
    assert len({_facts("a", [], student, 0, {})["weights_sha256"] for student in students}) == 4
    assert len({teacher.prompts.text.fingerprint for teacher in teachers}) == 1


def test_what_is_cached_beforehand_is_what_the_run_reads(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_dit_pipeline().save_pretrained(tmp_path / "base")
    other_vae(tiny_dit_pipeline().vae).save_pretrained(tmp_path / "new")
    for label in "0123":
        write_pictures(tmp_path / label, 1)
        (tmp_path / "pictures" / label).mkdir(parents=True)
        shutil.move(tmp_path / label / "0.png", tmp_path / "pictures" / label / "0.png")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({
        "output_dir": str(tmp_path / "run"),
        "teacher": {"source": str(tmp_path / "base"), "vae": str(tmp_path / "new")},
        "method": {"name": "data_flow_map", "data": str(tmp_path / "pictures")}, "train": {"device": "cpu"}}))
    assert "of latents in" in cache_inputs(tmp_path / "a.yaml")[0]
    teacher = load_teacher(tmp_path / "base", vae=str(tmp_path / "new"))
    monkeypatch.setattr(VaeCodec, "encode", None)
    data = RealData(teacher, str(tmp_path / "pictures"))
    assert data.bank is not None


# --- its record


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in NAMES if name != "lumina2"),
                                            ("sd", "full")])
def test_the_card_draws_the_students_picture(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Its lines, as they stand: of the pipeline, which holds the autoencoder, and of the LoRA, which loads it."""
    family, folder = FAMILIES[name], models(name)
    monkeypatch.chdir(folder)
    teacher = load_teacher("base", image_size=family.image_size, vae="new")
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", "base"),
                                     lora=LoraSettings(2, 3.0) if kind == "lora" else None)
    export(student, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from base with the autoencoder new." in card and "autoencoder in this folder is `new`, whose" in card
    blocks = [block.split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
              for block in card.split("```python\n")[1:]]
    lora = (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert len(blocks) == 1 + lora and lora == (kind == "lora" and hasattr(family.make(), "save_lora_weights"))
    assert "ComfyUI has no names" in card or ("with the autoencoder `new` in the place" in card) == lora
    n = noise(student)
    with torch.no_grad():
        latents = student(n, student.encode(prompts=PROMPTS[:2]))
    expected, before = student.decode(latents), teacher_of(folder, name, None).decode(latents)
    for block in blocks:
        *lines, call = block.strip().splitlines()
        names: dict[str, Any] = {"latents": family.pack(n.clone()), "PROMPTS": PROMPTS[:2], "extra": {
            key: value for key, value in family.call.items() if f"{key}=" not in call}}
        code = call.replace('"a prompt"', 'PROMPTS, latents=latents, output_type="pt", **extra')
        exec("\n".join([*lines, "pipe.set_progress_bar_config(disable=True)", code]), names)
        assert (names["images"] - expected).abs().max() < 1e-3
        assert (names["images"] - before).abs().max() > 0.02
    if lora:
        assert ", vae=Autoencoder" in blocks[1]
    state = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, teacher.codec.vae.state_dict()[key]) for key, value in state.items())


def test_without_it_cards_and_records_are_as_they_were(models: Callable[[str], Path], tmp_path: Path) -> None:
    student = Generator.from_teacher(teacher_of(models("sd"), new=None), StudentInfo("dmd2", "base"),
                                     lora=LoraSettings(2))
    export(student, tmp_path / "out")
    assert "autoencoder" not in (tmp_path / "out" / "README.md").read_text().lower()
    student.save(tmp_path / "student")
    assert "base_vae" not in json.loads((tmp_path / "student" / "flowdistill.json").read_text())
    assert load_student(tmp_path / "student").info.base_vae is None


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
    file = written(Path(), Path(), vae="new")
    distill(file, ["output_dir=run"])
    assert load_config("run/config.yaml").teacher.vae == "new"
    assert "teacher       base with the autoencoder new\n" in describe_run("run")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    whole = teacher_of(models("sd"))
    for place in (tmp_path / "here" / "run", tmp_path / "here" / "run" / "student"):
        subject = _open(str(place), CPU, with_teacher=True)
        assert equal(subject.teacher.codec, whole.codec) and equal(subject.student.codec, whole.codec)
        assert subject.student.info.base_vae == BaseVae("new", "", "AutoencoderKL")
        assert "distilled from base with the autoencoder new" in describe(subject.student)
    shutil.rmtree(tmp_path / "here" / "new")  # a student is complete without its teacher
    assert _open(str(tmp_path / "here" / "run" / "student"), CPU, with_teacher=True).teacher is None
    assert equal(load_student(tmp_path / "here" / "run").codec, whole.codec)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"holds another run: teacher\.vae is new there and None here"):
        distill(file, ["output_dir=run", "teacher.vae=null"])
    assert f"autoencoder   {models('sd') / 'new'}, in the place of the pipeline's own" in whole.describe()


def test_a_plan_counts_it(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights in the place of the pipeline's own; of the hub's, before they are here, the pipeline's own stand."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    large = other_vae(FAMILIES["sd"].make().vae, block_out_channels=(16, 16))
    large.save_pretrained(tmp_path / "large")
    file = written(tmp_path, models("sd"))
    plain, with_it, unknown = (make_plan(load_config(file, given)) for given in (
        [], [f"teacher.vae={tmp_path / 'large'}"], ["teacher.vae=some/vae"]))
    assert with_it.parts["autoencoder"].parameters == sum(p.numel() for p in large.parameters())
    assert with_it.parts["autoencoder"].parameters > plain.parts["autoencoder"].parameters
    assert unknown.parts == plain.parts and with_it.parts["teacher"] == plain.parts["teacher"]
    assert f"base with the autoencoder {tmp_path / 'large'}, for one process" in plan_in_words(with_it)
