"""Pipeline folders as people have them: variants, adapters, gaps, pointers, damage, single files, the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from flowdistill import load_student, load_teacher
from flowdistill.conditioning.components import load_model
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.plan.meta_teacher import read_architecture
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers.loading import load_pipeline, pipeline_folder
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, stable_diffusion
from tests.scripts.test_evaluate_fid import evaluate_fid
from tests.tiny import POINTER, tiny_unet, tiny_unet_pipeline, vae

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PARTS = (UNET, VAE, TEXT)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    stable_diffusion().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def renamed(file: Path, variant: str) -> Path:
    return file.rename(file.with_name(f"{file.stem}.{variant}{file.suffix}"))


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def prompts_of(folder: Path, **settings: str) -> torch.Tensor:
    return load_teacher(folder, **settings).encode(prompts=["a cat"]).tensors["prompt_embeds"]


# Three that read pipelines: the teacher with its prompts, the stock pipeline of scripts/evaluate_fid.py, and a plan.


def as_teacher(source: Path | str, variant: str | None = None) -> object:
    teacher = load_teacher(source, variant=variant)
    return teacher, teacher.encode(prompts=["a cat"])


def as_stock_pipeline(source: Path | str, variant: str | None = None) -> object:
    given = [str(source), "--reference", "digits", "--device", "cpu", *(["--variant", variant] if variant else [])]
    return evaluate_fid.load_pipeline(evaluate_fid.parse(given))


def as_plan(source: Path | str, variant: str | None = None) -> object:
    return read_architecture(str(source), variant)


READERS = [as_teacher, as_stock_pipeline, as_plan]
Reader = Callable[..., object]


# --- variants


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("parts", [PARTS, (UNET,), (TEXT, VAE)], ids=["all", "unet", "others"])
def test_the_only_variant_is_found(pipeline: Path, read: Reader, parts: tuple[str, ...]) -> None:
    for part in parts:
        renamed(pipeline / part, "fp16")
    read(pipeline)
    read(pipeline, "fp16")
    with pytest.raises(UserError, match="teacher.variant is 'bf16', but .* has no weights of it, only those of fp16"):
        read(pipeline, "bf16")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_of_several_variants_one_must_be_named(pipeline: Path, read: Reader, part: str) -> None:
    first = renamed(pipeline / part, "fp16")
    first.with_name(first.name.replace("fp16", "ema")).write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=f"{first.parent} has its weights in the variants ema, fp16 only; set "):
        read(pipeline)
    read(pipeline, "ema")


def test_a_variant_that_is_asked_for_is_the_one_that_is_read(pipeline: Path) -> None:
    plain, half = pipeline / UNET, pipeline / UNET.replace(".safetensors", ".fp16.safetensors")
    save_file({name: 2 * value for name, value in load_file(plain).items()}, half, metadata={"format": "pt"})
    weights = [load_teacher(pipeline, variant=variant).network.backbone.conv_in.weight for variant in (None, "fp16")]
    assert torch.equal(2 * weights[0], weights[1])

    # Of the text encoder too, which is another one then, and goes with the student.
    plain, half = pipeline / TEXT, pipeline / TEXT.replace(".safetensors", ".fp16.safetensors")
    save_file({name: -value for name, value in load_file(plain).items()}, half, metadata={"format": "pt"})
    first, second = prompts_of(pipeline), prompts_of(pipeline, variant="fp16")
    assert (first - second).abs().max() > 0.1
    teacher = load_teacher(pipeline, variant="fp16")
    FlowMap.from_teacher(teacher, StudentInfo()).save(pipeline / "student")
    student = load_student(pipeline / "student")
    assert torch.equal(student.encode(prompts=["a cat"]).tensors["prompt_embeds"], second)
    assert student.prompts.text.fingerprint == teacher.prompts.text.fingerprint
    assert [file.name for file in (pipeline / "student/text/text_encoder").glob("*.safetensors")] == [half.name]


def test_shards_and_pickled_files_have_variants_too(tmp_path: Path) -> None:
    unet = tiny_unet(channels=3)
    for number, settings in enumerate([{"max_shard_size": "100KB"}, {"safe_serialization": False}, {}]):
        for variant in (None, "fp16"):
            unet.save_pretrained(tmp_path / f"{number}-{variant}", variant=variant, **settings)
            assert equal(unet, load_model(tmp_path / f"{number}-{variant}", UNet2DModel))
    assert len(list((tmp_path / "0-fp16").glob("*.safetensors"))) > 1


def test_a_run_takes_the_variant(pipeline: Path, tmp_path: Path, cli: Callable[..., object]) -> None:
    renamed(pipeline / UNET, "fp16")
    renamed(pipeline / UNET.replace("unet", "vae"), "fp16")
    (tmp_path / "p.txt").write_text("a cat")
    settings = ["method.name=dmd2", f"teacher.source={pipeline}", f"teacher.prompts={tmp_path / 'p.txt'}",
                "train.steps=1", "train.batch_size=2", "train.num_samples=1", "train.trackers=[]",
                "evaluation.at_end=false", f"output_dir={tmp_path / 'run'}", "train.device=cpu"]
    (tmp_path / "a.yaml").write_text("")
    result = cli("distill", tmp_path / "a.yaml", *settings, "teacher.variant=fp16")
    assert result.code == 0, result.err
    assert cli("plan", tmp_path / "a.yaml", *settings, "teacher.variant=fp16").code == 0
    settings += ["teacher.variant=int8", f"output_dir={tmp_path / 'other'}"]
    for command in ("distill", "plan"):
        result = cli(command, tmp_path / "a.yaml", *settings)
        assert result.code == 2 and "only those of fp16" in result.err, result.err


def test_the_commands_take_it_of_pipelines_only(tmp_path: Path, cli: Callable[..., Any]) -> None:
    pipeline = tiny_unet_pipeline(num_class_embeds=None)
    for variant in ("ema", "fp16"):
        pipeline.save_pretrained(tmp_path / "pipeline", variant=variant)
    FlowMap.from_teacher(load_teacher(pipeline), StudentInfo()).save(tmp_path / "student")
    given = {"inspect": [], "sample": ["--num-images", 2, "--steps", 1, "--out", tmp_path / "grid.png"],
             "evaluate": ["--features", "digits", "--reference", "digits", "--num-images", 4, "--teacher-steps", "1"]}
    for command, options in given.items():
        result = cli(command, tmp_path / "pipeline", *options)
        assert result.code == 2 and "in the variants ema, fp16 only" in result.err
        assert cli(command, tmp_path / "pipeline", *options, "--variant", "ema").code == 0
        options = [option for option in options if option not in ("--steps", 1)]
        result = cli(command, tmp_path / "student", *options, "--variant", "ema")
        assert result.code == 2 and f"--variant is for pipelines, and {tmp_path / 'student'} is a student" in result.err


def test_the_commands_take_another_size_of_text_to_image_pipelines(tmp_path: Path, cli: Callable[..., Any]) -> None:
    FAMILIES["sd"].make().save_pretrained(tmp_path / "sd")
    given = ["sample", tmp_path / "sd", "--prompt", "a cat", "--steps", 1, "--out", tmp_path / "grid.png"]
    assert cli(*given, "--image-size", "16x32").code == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert (image.height % 16, image.width % 32) == (0, 0) and image.height < image.width
    for size, message in (("0", "such as 832x1216, not '0'"), ("1x2x3", "not '1x2x3'"), ("3", "must be a multiple of")):
        result = cli(*given, "--image-size", size)
        assert result.code == 2 and message in result.err, result.err
    result = cli("evaluate", "assets/digits-flow", "--image-size", 16)
    assert result.code == 2 and "teacher.image_size are for text-to-image pipelines" in result.err, result.err


# --- the hub


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of some/model in a hub's cache, with its weights in fp16 only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    stable_diffusion().save_pretrained(repository / "snapshots" / "abc", variant="fp16")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return repository / "snapshots" / "abc"


@pytest.mark.parametrize("read", READERS)
def test_a_cache_of_the_hub_with_one_variant_only(cached: Path, read: Reader) -> None:
    read("some/model")


def test_a_variant_that_the_hub_has_alone_is_fetched(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(source: str, variant: str | None = None) -> Path:
        asked.append(variant)
        if variant is None:  # what is left out when files without a variant are asked for
            for file in cached.rglob("*.safetensors"):
                file.rename(file.with_suffix(".later"))
        else:
            for file in cached.rglob("*.later"):
                file.rename(file.with_suffix(".safetensors"))
        return cached

    names = [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda source: names)
    assert pipeline_folder("some/model") == cached and asked == [None, "fp16"]
    load_teacher("some/model")


# --- weights that are incomplete, or those of an adapter


@pytest.mark.parametrize("read", [as_teacher, as_stock_pipeline])
@pytest.mark.parametrize("part", PARTS)
def test_missing_weights_are_named(pipeline: Path, read: Reader, part: str) -> None:
    weights = load_file(pipeline / part)
    gone = [name for name in sorted(weights) if name.endswith("weight")][3:]
    save_file({name: value for name, value in weights.items() if name not in gone}, pipeline / part, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        read(pipeline)
    message = str(caught.value)
    assert f"{pipeline / part}".rpartition("/")[0] in message and "incomplete; missing are " in message
    assert ", ".join(gone[:5]) in message and f"and {len(gone) - 5} more" in message


@pytest.mark.parametrize("read", [as_teacher, as_stock_pipeline])
@pytest.mark.parametrize(("part", "layers"), [("unet", ["to_q", "to_k"]), ("text_encoder", ["q_proj"]),
                                              ("vae", ["conv_in"])])
def test_layers_of_an_adapter_are_to_be_fused_first(tmp_path: Path, read: Reader, part: str, layers: list[str]) -> None:
    pipeline = stable_diffusion()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=layers), getattr(pipeline, part))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{part} was saved with layers of an adapter.*fuse first"):
        read(tmp_path)


@pytest.mark.parametrize("key", ["attn1.processor.to_q_lora.down.weight", "attn1.to_q.lora_A.default_0.weight",
                                 "attn1.to_q.lora_magnitude_vector.weight", "attn1.to_q.lokr_w1"])
def test_an_adapter_beside_complete_weights_is_not_overlooked(pipeline: Path, key: str) -> None:
    weights = load_file(pipeline / UNET) | {f"mid_block.{key}": torch.zeros(2, 8)}
    save_file(weights, pipeline / UNET, {"format": "pt"})
    with pytest.raises(UserError, match=f"such as mid_block.{key}; fuse first"):
        load_teacher(pipeline)


def test_other_names_that_nothing_reads_do_no_harm(pipeline: Path) -> None:
    for part in PARTS:  # older versions stored position_ids
        weights = load_file(pipeline / part) | {"embeddings.position_ids": torch.arange(3)}
        save_file(weights, pipeline / part, {"format": "pt"})
    as_teacher(pipeline)


@pytest.mark.parametrize("name", FAMILIES)
def test_complete_pipelines_of_every_family_are_complete(tmp_path: Path, name: str) -> None:
    FAMILIES[name].make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    own = {"vqvae", "scheduler"} & index.keys()  # KarrasVeScheduler is where diffusers does not look for it
    load_pipeline(tmp_path, torch.float32, **{key: None for key in own if name == "karras-ve"})


def test_older_names_of_the_autoencoders_attention_are_read(tmp_path: Path) -> None:
    """Those of Stable Diffusion 1.5's own files, which diffusers renames as it loads."""
    made = vae()
    made.save_pretrained(tmp_path)
    file, older = tmp_path / "diffusion_pytorch_model.safetensors", {"to_q": "query", "to_k": "key", "to_v": "value",
                                                                     "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, old in older.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})
    again = load_model(tmp_path, AutoencoderKL)
    assert any(".query." in name for name in weights)
    assert equal(made, again)


def test_a_students_autoencoder_must_be_complete(tmp_path: Path) -> None:
    student = FlowMap.from_teacher(load_teacher(FAMILIES["dit"].make()), StudentInfo())
    student.save(tmp_path / "s")
    file = tmp_path / "s/vae/diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "decoder.conv_out.weight"}, file,
              {"format": "pt"})
    with pytest.raises(UserError, match="incomplete; missing are decoder.conv_out.weight"):
        load_student(tmp_path / "s")


# --- files that are damaged, or stand for others


@pytest.mark.parametrize("read", [as_teacher, as_stock_pipeline])
@pytest.mark.parametrize("part", [*PARTS, "tokenizer/tokenizer.json"])
def test_a_pointer_says_git_lfs_pull(pipeline: Path, read: Reader, part: str) -> None:
    (pipeline / part).write_text(POINTER)
    with pytest.raises(UserError, match=f"{part} is a git-lfs pointer.*run 'git lfs pull'"):
        read(pipeline)


def test_a_pickled_pointer_says_it_too(tmp_path: Path) -> None:
    tiny_unet_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "unet/diffusion_pytorch_model.bin").write_text(POINTER)
    with pytest.raises(UserError, match="git lfs pull"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("part", ["model.safetensors", "base.safetensors", "vae/diffusion_pytorch_model.safetensors",
                                  "text/text_encoder/model.safetensors"])
def test_so_does_a_student(tmp_path: Path, part: str) -> None:
    from flowdistill.networks.lora import LoraSettings

    teacher = load_teacher(stable_diffusion())
    FlowMap.from_teacher(teacher, StudentInfo(), lora=LoraSettings(2)).save(tmp_path / "s")
    (tmp_path / "s" / part).write_text(POINTER)
    with pytest.raises(UserError, match=f"{part} is a git-lfs pointer"):
        load_student(tmp_path / "s").encode(prompts=["a cat"])


@pytest.mark.parametrize("content", [POINTER.encode(), b"\x10\0\0\0\0\0\0\0{}", b""], ids=["pointer", "cut", "empty"])
def test_what_nothing_reads_does_not_stop_anything(pipeline: Path, content: bytes) -> None:
    unread = ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "safety_checker/model.safetensors",
              "old/model.safetensors", UNET.replace(".safetensors", ".non_ema.safetensors"),
              UNET.replace(".safetensors", ".bin"), TEXT.replace(".safetensors", ".fp16.safetensors"),
              "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "unet/flax.safetensors"]
    for name in unread:
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_bytes(content)
    teacher, _ = as_teacher(pipeline)
    FlowMap.from_teacher(teacher, StudentInfo()).save(pipeline / "student")
    load_student(pipeline / "student").encode(prompts=["another one"])
    as_stock_pipeline(pipeline)


def test_a_damaged_text_encoder_is_read_where_there_is_a_prompt(pipeline: Path) -> None:
    (pipeline / TEXT).write_bytes((pipeline / TEXT).read_bytes()[:-100])
    teacher = load_teacher(pipeline)
    with pytest.raises(UserError, match=f"{TEXT} is damaged or truncated"):
        teacher.encode(prompts=["a cat"])
    with pytest.raises(UserError, match=f"{TEXT} is damaged or truncated"):
        load_teacher(pipeline, prompts=["a cat"])


def test_folders_without_weights(pipeline: Path) -> None:
    (pipeline / UNET).unlink()
    with pytest.raises(UserError, match=r"unet has no weights \(no .safetensors or .bin file of a model\)$"):
        load_teacher(pipeline)
    (pipeline / "unet/adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="only an adapter .adapter_model.safetensors.; load it on its base"):
        load_teacher(pipeline)
    read_architecture(str(pipeline))  # a plan needs none


# --- what is no pipeline folder


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (None, "nothere.safetensors", "nothere.safetensors does not exist"),
        (None, "some/nothere.ckpt", "some/nothere.ckpt does not exist"),
        ("model.safetensors", "model.safetensors", r"is a file, not .*from_single_file\(.*model.saf.*\).save"),
        ("folder/model.ckpt", "folder", r"no model_index.json; .*from_single_file\(.*folder/model.ckpt"),
        ("folder/pytorch_lora_weights.safetensors", "folder",
         r"but an adapter \(pytorch_lora_weights.*\); (name it in teacher\.lora, .*, or )?fuse first"),
        ("folder/adapter_config.json", "folder", "but an adapter"),
        ("notes.txt", "notes.txt", "notes.txt is a file, not a pipeline folder$"),
        ("folder/notes.txt", "folder", "has no model_index.json$"),
        ("folder/class-0/model_index.json", "folder", "no model_index.json; the one in it, class-0, does, so give "
                                                      "folder/class-0$"),
    ],
)
def test_other_files_and_folders_get_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Reader, make: str | None, source: str, message: str
) -> None:
    def fetch(*given: object, **settings: object) -> None:
        raise AssertionError("this was looked up on the hub")

    monkeypatch.setattr(DiffusionPipeline, "download", fetch)
    monkeypatch.chdir(tmp_path)
    if make is not None:
        Path(make).parent.mkdir(exist_ok=True, parents=True)
        Path(make).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        read(source)


def test_a_part_of_a_pipeline_names_the_whole(pipeline: Path) -> None:
    with pytest.raises(UserError, match=f"it is a part of the one in {pipeline}"):
        load_teacher(pipeline / "unet")


def test_what_can_be_no_hub_id_is_said_by_a_plan_too() -> None:
    with pytest.raises(UserError, match="C:/model is no pipeline folder here"):
        read_architecture("C:/model")


def test_the_text_side_is_told_apart_by_what_is_read(pipeline: Path) -> None:
    before = TextEncoders(pipeline, torch.float32).fingerprint
    (pipeline / TEXT.replace(".safetensors", ".fp16.safetensors")).write_bytes(b"another one")
    assert TextEncoders(pipeline, torch.float32).fingerprint == before
    (pipeline / "tokenizer/new.json").write_text("{}")
    assert TextEncoders(pipeline, torch.float32).fingerprint != before
