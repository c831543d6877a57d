"""Samples of any size and number of channels: through a run to pictures, figures and a stock pipeline, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

from flowdistill import load_student, load_teacher
from flowdistill.data.assets import asset_path
from flowdistill.export import export
from flowdistill.export.cards import rounding
from flowdistill.export.pipelines import export_problem
from flowdistill.networks.lora import LoraSettings
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.students.generator import Generator
from flowdistill.teachers.codec import VaeCodec
from flowdistill.training.method import METHODS
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS, sd3, sdxl, stable_diffusion
from tests.scripts.test_evaluate_fid import evaluate_fid
from tests.tiny import lively, tiny_dit_pipeline, tiny_unet

SCHEDULERS = {
    "epsilon": lambda: DDPMScheduler(clip_sample=False),
    "v": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "sample": lambda: DDIMScheduler(prediction_type="sample", clip_sample=False),
    "flow": FlowMatchEulerDiscreteScheduler,
    "edm": EDMEulerScheduler,
}


def unet(size: int | tuple[int, int] = (8, 16), channels: int = 1, blocks: int = 2, **settings: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return lively(UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8,) * blocks,
        layers_per_block=1, down_block_types=("DownBlock2D",) * blocks, up_block_types=("UpBlock2D",) * blocks,
        norm_num_groups=4, attention_head_dim=8, **settings,
    ))


def student_of(network: UNet2DModel, scheduler: str = "epsilon", trained: bool = True) -> FlowMap:
    student = FlowMap.from_teacher(load_teacher(DDPMPipeline(network, SCHEDULERS[scheduler]())), StudentInfo())
    if trained:
        for embedding in student.network.embeddings.values():
            torch.nn.init.normal_(embedding.mlp.linear_2.weight, std=0.1)
    return student


def written(folder: Path, network: UNet2DModel, method: str = "freeflow", **settings: Any) -> list[str]:
    DDPMPipeline(network, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "pipeline")
    config = {"teacher": {"source": str(folder / "pipeline")}, "method": {"name": method},
              "output_dir": str(folder / "run"), "evaluation": {"at_end": False}}
    config["train"] = {"steps": 1, "batch_size": 4, "num_samples": 2, "trackers": [], "device": "cpu"}
    (folder / "a.yaml").write_text(yaml.safe_dump(config | settings))
    return [str(folder / "a.yaml")]


# --- rectangles


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_rectangles_export_draws_the_students_images(tmp_path: Path, scheduler: str, channels: int) -> None:
    student = student_of(unet(channels=channels), scheduler)
    export(student, tmp_path / "export")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert type(pipeline).__module__.startswith("diffusers.")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *student.shape, generator=torch.Generator().manual_seed(1))
    images = pipeline(3, num_inference_steps=1, generator=torch.Generator().manual_seed(1), output_type="np").images
    expected = student.decode(student(noise))
    assert expected.shape == (3, channels, 8, 16) and expected.std() > 0.05
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [lambda scheduler: DDPMPipeline(unet(), scheduler), tiny_dit_pipeline])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noises_share_of_an_export_is_exact(
    tmp_path: Path, make: Callable[..., Any], beta_schedule: str, prediction_type: str
) -> None:
    """A clipped picture hides it: with one beta it was off by up to 0.06 times the noise."""
    scheduler = DDIMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule, clip_sample=False)
    student = FlowMap.from_teacher(load_teacher(make(scheduler)), StudentInfo())
    export(student, tmp_path / "export")
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "export").scheduler
    scheduler.set_timesteps(1)
    share = scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.ones(1)).prev_sample.item()
    c = student.network.velocity.path.coefficients(torch.tensor([student.t_start], dtype=torch.float64))
    assert share == pytest.approx(student.t_start * (1 - student.t_start * c.state.item()), rel=3e-7)


SHORT = {"disback": ["method.degradation_steps=1", "method.degradation_every=1", "train.steps=3"],
         "consistency": ["method.pairs=4", "method.pairs_steps=1"], "flow_map_matching": ["method.steps=1"]}
OTHERS = ("data_flow_map", "echodistill", "msd", "teacher_score_matching")  # of data, prompts, methods, another shape


@pytest.mark.parametrize("method", [name for name in sorted(METHODS) if name not in OTHERS])
def test_every_method_trains_on_rectangles(tmp_path: Path, cli: Callable[..., Any], method: str) -> None:
    result = cli("distill", *written(tmp_path, unet((8, 16), 3), method), *SHORT.get(method, []))
    assert result.code == 0, result.err
    picture = Image.open(tmp_path / "run" / "samples" / "final.png")
    assert picture.size == (2 * (16 * 4 + 2) + 2, 8 * 4 + 4)  # two cells, each pixel in a square of 4
    assert load_student(tmp_path / "run").generate(num_images=1).shape == (1, 3, 8, 16)


def test_a_rectangle_from_the_run_to_figures(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """A tall one of four channels: train, plan, sample as a grid and as files, export, and measure the export."""
    config = written(tmp_path, unet((16, 8), 4))
    run, images, exported = (str(tmp_path / name) for name in ("run", "images", "export"))
    for command in (["distill", *config], ["plan", *config], ["inspect", str(tmp_path / "pipeline")],
                    ["sample", run, "--num-images", "3", "--out", images],
                    ["sample", run, "--num-images", "3", "--out", str(tmp_path / "grid.png")],
                    ["export", run, exported]):
        result = cli(*command)
        assert result.code == 0, result.err
    assert Image.open(tmp_path / "images" / "000000.png").size == (8, 16)
    features = tmp_path / "features.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())).save(features)
    save = tmp_path / "reference.npz"
    from flowdistill.evaluation.reference import Reference

    Reference("made up", torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)).save(save)
    given = ["--reference", str(save), "--features", str(features), "--num-images", "4", "--no-kid"]
    assert evaluate_fid.main([exported, *given, "--device", "cpu"]) == 0


@pytest.mark.parametrize("make", [stable_diffusion, sdxl])
def test_a_text_to_image_unet_of_two_sizes_is_exported_with_them(tmp_path: Path, make: Callable[..., Any]) -> None:
    pipeline = make()
    wide = dict(pipeline.unet.config) | {"sample_size": (8, 16)}
    pipeline.register_modules(unet=lively(UNet2DConditionModel.from_config(wide)))
    pipeline.save_pretrained(tmp_path / "pipeline")
    student = FlowMap.from_teacher(load_teacher(tmp_path / "pipeline", prompts=PROMPTS), StudentInfo())
    assert student.generate(num_images=1).shape == (1, 3, 16, 32)
    export(student, tmp_path / "export")
    call = json.loads((tmp_path / "export/flowdistill.json").read_text())["call"]
    assert (call["height"], call["width"]) == (16, 32)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *student.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = stock(prompt=PROMPTS, latents=noise.clone(), output_type="latent", **call).images
        expected = student(noise, student.encode(prompts=PROMPTS))
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rectangles_of_classes_are_refused_before_training(tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli("distill", *written(tmp_path, unet(num_class_embeds=3)))
    assert result.code == 2 and result.err.count("flowdistill: error: ") == 1
    assert "rectangles (8 x 16) of classes cannot be exported" in result.err and "nothing was trained" in result.err
    assert not (tmp_path / "run").exists()
    assert cli("inspect", tmp_path / "pipeline").code == 0
    with pytest.raises(UserError, match="rectangles"):
        export(student_of(unet(num_class_embeds=3), trained=False), tmp_path / "export")


def test_what_no_stock_pipeline_can_draw_is_known_from_the_teacher() -> None:
    def problem(teacher: Any) -> str | None:
        return export_problem(teacher, teacher.network)

    assert "KarrasVe" in problem(load_teacher(FAMILIES["karras-ve"].make()))
    centred = load_teacher(DDPMPipeline(unet(8, center_input_sample=True), DDPMScheduler()))
    assert "centres its input" in problem(centred)
    latent = load_teacher(DDPMPipeline(unet(8, 4), DDPMScheduler()))
    latent.codec = VaeCodec(tiny_dit_pipeline().vae)
    assert "beside an autoencoder" in problem(latent)
    for teacher in (load_teacher(stable_diffusion()), load_teacher(tiny_dit_pipeline()),
                    load_teacher(DDPMPipeline(unet(8, num_class_embeds=3), DDPMScheduler())),
                    load_teacher(DDPMPipeline(unet(), DDPMScheduler()))):
        assert problem(teacher) is None


# --- channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [8, (8, 16)])
def test_a_card_s_call_works_for_any_number_of_channels(tmp_path: Path, channels: int, size: Any) -> None:
    classes = 3 if size == 8 else None
    student = student_of(unet(size, channels, num_class_embeds=classes))
    export(student, tmp_path)
    card = (tmp_path / "README.md").read_text()
    call = next(line for line in card.splitlines() if line.startswith("images = ")).removeprefix("images = ")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = eval(call, {"pipe": pipeline})
    assert len(images) == 4
    if channels <= 4:
        assert [image.mode for image in images] == [{1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]] * 4
    else:
        assert images.shape == (4, 8, 8 if size == 8 else 16, channels)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_a_run_of_many_channels_ends_in_pictures(tmp_path: Path, cli: Callable[..., Any], channels: int) -> None:
    result = cli("distill", *written(tmp_path, unet(8, channels)))
    assert result.code == 0, result.err
    assert all(Image.open(tmp_path / "run/samples" / name).size for name in ("final.png", "comparison.png"))
    assert cli("sample", tmp_path / "run", "--num-images", 2, "--out", tmp_path / "images").code == 0


@pytest.mark.parametrize("when", ["evaluation.at_end=true", "train.evaluate_every=1"])
def test_features_that_cannot_read_the_images_are_refused_before_training(
    tmp_path: Path, cli: Callable[..., Any], when: str
) -> None:
    measured = ["evaluation.features=digits", "evaluation.reference=digits"]
    result = cli("distill", *written(tmp_path, unet(8, 4)), *measured, when)
    assert result.code == 2 and "the features 'digits' read images of 1 channel(s), not 4" in result.err
    assert not (tmp_path / "run").exists()


# --- sizes that a network cannot have


def test_sizes_that_the_downsamplings_do_not_divide(tmp_path: Path, cli: Callable[..., Any]) -> None:
    config = written(tmp_path, unet(28, blocks=4))
    for command in (["inspect", tmp_path / "pipeline"], ["distill", *config], ["plan", *config]):
        result = cli(*command)
        assert result.code == 2 and result.err.count("\n") == 1
        assert "halves its samples 3 times" in result.err and "multiples of 8, and they are 28 x 28" in result.err


@pytest.mark.parametrize("size", [8, 12, 13, 28, (8, 12), (12, 8), (4, 64), (2, 2)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_a_size_is_refused_where_the_network_itself_fails(size: int | tuple[int, int], blocks: int) -> None:
    network = unet(size, blocks=blocks)
    height, width = (size, size) if isinstance(size, int) else size
    try:
        network(torch.zeros(1, 1, height, width), 1)
        fails = False
    except RuntimeError:
        fails = True
    try:
        load_teacher(DDPMPipeline(network, DDPMScheduler()))
        assert not fails
    except UserError as error:
        assert fails and f"{height} x {width}" in str(error)


def test_patches_and_position_embeddings_have_their_sizes_too() -> None:
    with pytest.raises(UserError, match="patches of 2 x 2, so .* multiples of 2, and they are 9 x 9"):
        load_teacher(tiny_dit_pipeline(sample_size=9))
    most = sd3().transformer.config.pos_embed_max_size * 2 * 2  # patches of two latents, each of two pixels
    load_teacher(sd3(), image_size=most)
    with pytest.raises(UserError, match=f"position embeddings for samples of up to {most // 2} x {most // 2}"):
        load_teacher(sd3(), image_size=most + 4)


# --- autoencoders


def test_an_autoencoder_of_the_tiny_kind_encodes() -> None:
    tiny = lively(AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    ))
    codec, images = VaeCodec(tiny), torch.rand(2, 3, 16, 16)
    assert (codec.factor, codec.channels) == (4, 4)
    latents = codec.encode(images)
    torch.testing.assert_close(latents, tiny.encode(images * 2 - 1).latents)
    assert latents.std() > 0.01 and codec.decode(latents).shape == images.shape


def test_an_autoencoder_that_needs_more_than_latents_is_refused() -> None:
    video = AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    with pytest.raises(UserError, match="KLTemporalDecoder is not supported: its decode.. also needs num"):
        VaeCodec(video)


# --- half precision


def measured(student: Any, folder: Path, dtype: torch.dtype) -> float:
    """How far the export in ``dtype`` is from itself in float32, a standard deviation; before any clipping."""
    results = []
    for kind in (torch.float32, dtype):
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=kind)
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(1)
        noise = torch.randn(32, *student.shape, generator=torch.Generator().manual_seed(0)).to(kind)
        labels = None if student.classes is None else torch.arange(32) % student.num_classes
        time = scheduler.timesteps[0]
        state = noise * scheduler.init_noise_sigma
        with torch.no_grad():
            out = pipeline.unet(scheduler.scale_model_input(state, time), time, class_labels=labels).sample
            results.append(scheduler.step(out, time, state, generator=torch.Generator()).prev_sample.float())
    return (results[1] - results[0]).std().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["digits-ddpm", "digits-flow"])
def test_half_precision_is_about_as_bad_as_is_said(tmp_path: Path, source: str, dtype: torch.dtype) -> None:
    student = FlowMap.from_teacher(load_teacher(asset_path(source)), StudentInfo())
    export(student, tmp_path / "export")
    c = student.network.velocity.path.coefficients(torch.tensor([student.t_start], dtype=torch.float64))
    said = rounding(student.t_start * (1 - student.t_start * c.state.item()), dtype)
    assert said / 2 < measured(student, tmp_path / "export", dtype) < 2 * said


def test_a_card_says_which_types_to_load(tmp_path: Path) -> None:
    texts = {}
    for name, start in (("epsilon", None), ("late epsilon", 0.9), ("v", None), ("flow", None)):
        teacher = load_teacher(DDPMPipeline(unet(8), SCHEDULERS[name.split()[-1]]()))
        export(Generator.from_teacher(teacher, StudentInfo(), start), tmp_path / name)
        texts[name] = (tmp_path / name / "README.md").read_text()
    assert "Load it in float32, not in bfloat16: its one step multiplies what its network rounds" in texts["epsilon"]
    assert "In bfloat16 its pixels from -1 to 1 are off by about 0.7" in texts["epsilon"]
    assert "Load it in float32 or float16, not in bfloat16" in texts["late epsilon"]
    assert "bfloat16" not in texts["v"] + texts["flow"]


# --- the label that is no class


def test_an_export_says_which_label_is_no_class(tmp_path: Path) -> None:
    teacher = load_teacher(DDPMPipeline(unet(8, num_class_embeds=4), FlowMatchEulerDiscreteScheduler()), null_label=3)
    export(FlowMap.from_teacher(teacher, StudentInfo()), tmp_path / "all")
    record = json.loads((tmp_path / "all/flowdistill.json").read_text())
    assert record == {"call": {"num_inference_steps": 1}, "num_classes": 3, "null_label": 3, "labels": None}
    card = (tmp_path / "all/README.md").read_text()
    assert 'Class labels are 0 to 2; label 3 means "no class"' in card and "class_labels=[0, 1, 2, 0]" in card

    own = load_teacher(DDPMPipeline(unet(8, num_class_embeds=4), FlowMatchEulerDiscreteScheduler()), labels=[1, 3])
    export(FlowMap.from_teacher(own, StudentInfo()), tmp_path / "own")
    record = json.loads((tmp_path / "own/flowdistill.json").read_text())
    assert (record["num_classes"], record["null_label"], record["labels"]) == (4, None, [1, 3])
    card = (tmp_path / "own/README.md").read_text()
    assert "Class labels are 1, 3." in card and "class_labels=[1, 3, 1, 3]" in card

    export(FlowMap.from_teacher(load_teacher(tiny_dit_pipeline()), StudentInfo()), tmp_path / "dit")
    assert load_teacher(tmp_path / "dit").null_label == 4
    export(student_of(tiny_unet(num_class_embeds=None)), tmp_path / "none")
    assert json.loads((tmp_path / "none/flowdistill.json").read_text()) == {"call": {"num_inference_steps": 1}}


def test_a_teacher_with_a_label_of_unknown_meaning_says_what_was_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DDPMPipeline(unet(8, num_class_embeds=4), DDPMScheduler()).save_pretrained(tmp_path)
    said = f"{tmp_path}: all 4 class labels are taken for classes; where the last one means 'no class', set"
    assert load_teacher(tmp_path).num_classes == 4
    assert said in caplog.text and "teacher.null_label to 3" in caplog.text
    caplog.clear()
    assert load_teacher(tmp_path, null_label=3).num_classes == 3
    (tmp_path / "flowdistill.json").write_text('{"null_label": null}')
    assert load_teacher(tmp_path).num_classes == 4
    assert caplog.text == ""


def test_adapters_do_not_hide_the_network_from_the_checks() -> None:
    teacher = load_teacher(DDPMPipeline(unet(8, center_input_sample=True), DDPMScheduler()))
    student = FlowMap.from_teacher(teacher, StudentInfo(), lora=LoraSettings(2))
    assert "centres its input" in export_problem(student, student.network.velocity)
