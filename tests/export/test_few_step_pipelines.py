"""Exported students of several calls: what the stock pipeline's own call makes, with the student's noises injected."""

import contextlib
import functools
import json
import re

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm
from safetensors.torch import load_file

from flowdistill.evaluation.evaluate import _open
from flowdistill.export import export
from flowdistill.export.few_step import stock_steps
from flowdistill.export.few_step_pipelines import plain_backbone
from flowdistill.networks.lora import LoraSettings
from flowdistill.students import Generator, StudentInfo, exported_student
from flowdistill.students.steps import STEPPINGS
from flowdistill.teachers import load_teacher
from flowdistill.utils.hashing import checksums
from tests.families import FAMILIES, PROMPTS
from tests.students.test_student import SCHEDULERS
from tests.students_of_steps import moved, noises, pixel_student, steps_of
from tests.tiny import VP, tiny_unet_pipeline

BOTH = ("ddim", "dit", "sd", "sd-v", "lcm", "sdxl", "pixart-sigma", "pixart-alpha", "sd3", "flux-dev", "flux-schnell",
        "sana", "lumina2", "qwen-image", "z-image")
EXPORTED = dict.fromkeys(BOTH, STEPPINGS) | dict.fromkeys(("sit", "edm", "edm-class", "sdxl-edm"), STEPPINGS[1:])
ROWS = 2


@functools.lru_cache(maxsize=2)
def trained(name):
    """A student that is not its teacher; one for the tests of a family, which set its steps."""
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size, null_label=family.null_label)
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", "tiny"), steps=steps_of(teacher, 4, "deterministic"))
    return teacher, moved(student, 0.02)


@contextlib.contextmanager
def drawing(noises):
    """Let the schedulers draw these, and zeros after them: Euler's draws for its last step too, times 0."""
    left = list(noises)

    def randn(shape, **settings):
        noise = left.pop(0) if left else torch.zeros(shape)
        assert noise.shape == tuple(shape)
        return noise.to(settings.get("dtype"))

    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_lcm, scheduling_flow_match_euler_discrete):
            patch.setattr(module, "randn_tensor", randn)
        yield left


def stock_images(pipe, name, student, call, drawn, output="pt"):
    """Latents or images of the pipeline's call, from the same noises."""
    family = FAMILIES[name]
    with drawing(map(family.pack, drawn[1:])) as left:
        if family.prompts:
            made = pipe(prompt=PROMPTS[:ROWS], latents=family.pack(drawn[0].clone()), output_type=output,
                        **call | family.call).images
        else:
            labels = {} if family.labels is None else {"class_labels": family.labels}
            rows = {} if "guidance_scale" in call else {"batch_size": ROWS}
            made = pipe(**rows, **labels, **call, generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert len(left) == (0 if student.steps.stepping == "stochastic" else len(drawn) - 1)
    return family.unpack(made) if output == "latent" else made


def encoding_once(pipe):
    """The pipeline, whose prompts are the same in all calls."""
    if hasattr(pipe, "encode_prompt"):
        known, encode = [], pipe.encode_prompt

        def encoded(*given, **settings):
            if not known:
                known.append(encode(*given, **settings))
            return known[0]

        pipe.encode_prompt = encoded
    return pipe


def own_latents(name, student, drawn):
    family = FAMILIES[name]
    condition = student.encode(prompts=PROMPTS[:ROWS]) if family.prompts else student.encode(family.labels)
    with torch.no_grad():
        return student(drawn[0], condition, between=lambda k: drawn[k - 1])


@pytest.mark.parametrize("name", EXPORTED)
def test_the_stock_pipelines_call_makes_the_students_images(tmp_path, name):
    """Called as its folder says: of 4 steps, and with the schedulers of other students in the place of its own."""
    teacher, student = trained(name)
    student.steps = steps_of(teacher, 4, EXPORTED[name][0])
    export(student, tmp_path / "out")
    pipe = encoding_once(DiffusionPipeline.from_pretrained(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((tmp_path / "out/flowdistill.json").read_text())["call"]
    for stepping, count in [(stepping, count) for stepping in EXPORTED[name] for count in (4, 2, 8)]:
        student.steps = steps_of(teacher, count, stepping)
        drawn = noises(student)
        if (stepping, count) != (EXPORTED[name][0], 4):
            found = stock_steps(student, student.network.velocity, student.steps)
            pipe.scheduler = found.scheduler()
            call = {key: value for key, value in call.items() if key != "num_inference_steps"} | found.arguments
        expected = own_latents(name, student, drawn)
        if count == 4 or not FAMILIES[name].prompts:
            images, pictures = stock_images(pipe, name, student, call, drawn), student.decode(expected)
            assert 0.01 < pictures.std() < 1
            assert (images - pictures).abs().max() < 1e-5, (stepping, count)
        if FAMILIES[name].prompts:
            latents = stock_images(pipe, name, student, call, drawn, "latent")
            assert (latents - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), (stepping, count)


@pytest.mark.parametrize("stepping", STEPPINGS)
@pytest.mark.parametrize("count", [4, 3])
@pytest.mark.parametrize("scheduler", ["epsilon", "v", "sample"])
def test_classes_of_a_diffusion_unet_are_one_pipeline(tmp_path, scheduler, count, stepping):
    """Timesteps 999, 666 and 332 of three steps are in the call; no scheduler has them by itself."""
    student = pixel_student(SCHEDULERS[scheduler](), stepping, count)
    export(student, tmp_path / "out")
    call = json.loads((tmp_path / "out/flowdistill.json").read_text())["call"]
    assert call == ({"num_inference_steps": 4} if count == 4 else
                    {"num_inference_steps": None, "timesteps": [999, 666, 332]})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == "ConsistencyModelPipeline"
    pipe.set_progress_bar_config(disable=True)
    drawn = noises(student, 3)
    with torch.no_grad():
        expected = student.decode(student(drawn[0], student.encode([0, 1, 2]), between=lambda k: drawn[k - 1]))
    assert 0.01 < expected.std() < 1
    # The pipeline hands its generator on: no injection here, and a second call is no other.
    for _ in range(2):
        images = pipe(batch_size=3, class_labels=[0, 1, 2], output_type="pt",
                      generator=torch.Generator().manual_seed(1), **call).images
        assert (images - expected).abs().max() < 1e-5


@pytest.mark.parametrize("stepping", STEPPINGS)
@pytest.mark.parametrize("unet", [{}, {"sample_size": (8, 16), "num_class_embeds": 4}])
def test_classes_of_a_flow_unet_are_a_pipeline_each(tmp_path, stepping, unet):
    """The embedding of the label is in the biases; the labels that the student was not trained for have none."""
    student = pixel_student(FlowMatchEulerDiscreteScheduler(shift=3.0), stepping, labels=[0, 2], **unet)
    export(student, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())["pipelines"]
    assert [(entry["folder"], entry["label"]) for entry in manifest] == [("class-0", 0), ("class-2", 2)]
    assert "passes no labels on" in (tmp_path / "out/README.md").read_text()
    drawn, made = noises(student, 3), []
    for label in (0, 2):
        folder = tmp_path / "out" / f"class-{label}"
        assert checksums(folder) == manifest[label // 2]["sha256"]
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert type(pipe).__name__ == "DDPMPipeline" and pipe.unet.config.num_class_embeds is None
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            condition = student.encode([label] * 3)
            expected = student.decode(student(drawn[0], condition, between=lambda k: drawn[k - 1]))
        call = json.loads((folder / "flowdistill.json").read_text())["call"]
        images = pipe(batch_size=3, output_type="pt", generator=torch.Generator().manual_seed(1), **call).images
        assert (images - expected).abs().max() < 1e-5
        made.append(images)
    assert (made[0] - made[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd", "flux-dev", "sit", "edm-class"])
def test_an_exported_pipeline_is_the_student_again(tmp_path, name, cli):
    """For flowdistill: its network is as it was, and the folder says the rest."""
    teacher, student = trained(name)
    student.steps = steps_of(teacher, 4, EXPORTED[name][0])
    export(student, tmp_path / "out")
    again = exported_student(tmp_path / "out")
    assert again.steps == student.steps and again.info.method == "dmd2" and again.shape == student.shape
    given = {"prompts": PROMPTS[:2]} if FAMILIES[name].prompts else {"labels": FAMILIES[name].labels}
    for steps in (None, 2):
        images = again.generate(**given, num_images=2, seed=4, steps=steps)
        assert (images - student.generate(**given, num_images=2, seed=4, steps=steps)).abs().max() < 1e-6
    assert exported_student(tmp_path) is None
    assert "4 of the network for an image" in cli("inspect", tmp_path / "out").out


def test_the_command_line_exports_and_samples_what_it_exported(tmp_path, cli):
    student = pixel_student(SCHEDULERS["epsilon"]())
    student.save(tmp_path / "run")
    result = cli("export", tmp_path / "run", tmp_path / "out")
    assert result.code == 0
    assert "pipe(batch_size=4, num_inference_steps=4, class_labels=[0, 1, 2, 0]).images" in result.out
    common = ("--num-images", 3, "--seed", 7, "--device", "cpu", "--out")
    for folder in ("run", "out"):
        assert cli("sample", tmp_path / folder, *common, tmp_path / f"{folder}.png").code == 0
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    result = cli("sample", tmp_path / "out", *common, tmp_path / "no.png", "--steps", 5)
    assert result.code == 2 and "trained for 4 calls, and takes 1 to 4" in result.err
    subject = _open(tmp_path / "out", torch.device("cpu"), True)
    assert subject.student.steps == student.steps and subject.teacher is None


def test_classes_that_are_a_pipeline_each_are_said_to_be(tmp_path, cli):
    pixel_student(FlowMatchEulerDiscreteScheduler()).save(tmp_path / "run")
    result = cli("export", tmp_path / "run", tmp_path / "out")
    assert result.code == 0 and "a diffusers pipeline for each class" in result.out and "out/class-0" in result.out
    assert cli("export", tmp_path / "run", tmp_path / "out", "--overwrite").code == 0


def test_the_pipeline_of_a_one_step_student_is_no_teacher(tmp_path, cli):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    export(Generator.from_teacher(teacher, StudentInfo()), tmp_path / "one")
    result = cli("sample", tmp_path / "one", "--device", "cpu", "--out", tmp_path / "no.png")
    assert result.code == 2 and "is the exported pipeline of a one-step student" in result.err


CARDS = {
    "sd-stochastic": ("num_inference_steps=4, guidance_scale=1, height=16, width=16", "leave `num_inference_steps`",
                      "| 4 | 0.409404 | 249 |", "The pipeline's `generator` is that of this noise too"),
    "sd-deterministic": ("num_inference_steps=4", "| 1 | 0.935958 | 999 |", "there is no new noise", "0.935958 times"),
    "sd3-stochastic": ("leave `num_inference_steps`", "torch's global generator", "torch.manual_seed(0)"),
    "flux-dev-stochastic": ("num_inference_steps=4, guidance_scale=1", "torch's global generator",
                            "In bfloat16 a FluxPipeline rounds the timesteps"),
    "z-image-deterministic": ("num_inference_steps=4, guidance_scale=0", "| 2 | 0.900000 | 900 |"),
    "qwen-image-stochastic": ("true_cfg_scale=1", "In bfloat16 a QwenImagePipeline"),
    "dit-stochastic": ("class_labels=[0, 1, 2, 3], num_inference_steps=4, guidance_scale=1", "torch's global generator",
                       "Class labels are 0 to 999"),
}


@pytest.mark.parametrize("cell", CARDS)
def test_what_the_card_and_the_record_say(tmp_path, cell):
    name, _, stepping = cell.rpartition("-")
    teacher, student = trained(name)
    student.steps = steps_of(teacher, 4, stepping)
    export(student, tmp_path / "out")
    card, record = ((tmp_path / "out" / file).read_text() for file in ("README.md", "flowdistill.json"))
    for words in ("# A generator of 4 steps", "made for exactly these 4 steps", *CARDS[cell]):
        assert words in card, words
    record = json.loads(record)
    assert record["student_steps"] == {"times": list(student.steps.times), "stepping": stepping,
                                       "start_scale": student.steps.start_scale}
    assert record["timesteps"] == pytest.approx(teacher.path.coefficients(
        torch.tensor(student.steps.times, dtype=torch.float64)).timestep.tolist())
    assert ("bfloat16" in card) == (name in ("flux-dev", "qwen-image"))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux-dev", "z-image"])
def test_whose_noise_is_between_the_steps(name):
    """As the card says: the pipeline's generator makes images again, or torch's global one must be seeded."""
    teacher, student = trained(name)
    student.steps = steps_of(teacher, 4, "stochastic")
    found = stock_steps(student, student.network.velocity, student.steps)
    pipe = FAMILIES[name].make()
    pipe.scheduler = found.scheduler()
    pipe.set_progress_bar_config(disable=True)

    def made(seed):
        torch.manual_seed(seed)
        return pipe(PROMPTS[0], output_type="latent", generator=torch.Generator().manual_seed(1), **found.arguments,
                    **FAMILIES[name].call).images

    assert torch.equal(made(0), made(0))
    assert torch.equal(made(0), made(1)) == found.loop.seeded == (name == "sd")


def with_lora(student, folder, **scope):
    """The pipeline, the call's arguments and the lines of the README.md that say them; a ``pipe`` given stays."""
    export(student, folder / "out")
    code = (folder / "out/README.md").read_text().split("```python\n")[2].split("```")[0]
    if "pipe" in scope:
        code = re.sub("pipe = .*", "", code)
    text = code.replace("path/to/this/folder", str(folder / "out")).replace("path/to/base", str(folder / "base"))
    exec(text.split("images = ")[0], scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"], eval(f"""dict({re.search(r'pipe."a prompt", (.*).[.]images', text)[1]})"""), code


def adapted(teacher, folder, stepping="stochastic"):
    """A student of trained adapters."""
    return moved(Generator.from_teacher(teacher, StudentInfo("dmd2", str(folder / "base")), lora=LoraSettings(2, 3.0),
                                        steps=steps_of(teacher, 4, stepping)))


LORA_FILES = {"sd": "stochastic", "sdxl": "deterministic", "sdxl-edm": "deterministic", "sd3": "stochastic",
              "flux-dev": "stochastic", "sana": "deterministic", "lumina2": "stochastic",
              "qwen-image": "deterministic", "z-image": "stochastic"}


@pytest.mark.parametrize("name", LORA_FILES)
def test_the_teachers_pipeline_takes_the_lora_file(tmp_path, name):
    """Called as the export's README says, with nothing but the adapters in the file."""
    family, pipeline = FAMILIES[name], FAMILIES[name].make()
    student = adapted(load_teacher(pipeline, image_size=family.image_size), tmp_path, LORA_FILES[name])
    drawn = noises(student)
    expected = own_latents(name, student, drawn)
    pipe, call, _ = with_lora(student, tmp_path, pipe=family.make())
    names = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert len(names) == sum(".lora_" in key for key, _ in student.network.named_parameters())
    latents = stock_images(pipe, name, student, call, drawn, "latent")
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    pipe.unload_lora_weights()
    before = stock_images(pipe, name, student, call, drawn, "latent")
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_a_lora_of_a_latent_consistency_model_is_for_stable_diffusion(tmp_path, stepping):
    """Its own pipeline has a loop of its own, which asks its scheduler for what Euler's lacks."""
    parts = FAMILIES["lcm"].make().components | {"scheduler": LCMScheduler(**VP)}
    pipeline = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "base")
    student = adapted(load_teacher(pipeline), tmp_path, stepping)
    drawn = noises(student)
    expected = own_latents("lcm", student, drawn)
    pipe, call, _ = with_lora(student, tmp_path)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    latents = stock_images(pipe, "lcm", student, call, drawn, "latent")
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_lora_file_whose_scheduler_is_in_the_folder(tmp_path):
    """A list of betas is too long for a card."""
    pipeline = FAMILIES["sd"].make()
    t_max = load_teacher(pipeline).path.native_to_linear(torch.tensor(899.0)).item()
    student = adapted(load_teacher(pipeline, t_max=t_max), tmp_path)
    drawn = noises(student)
    expected = own_latents("sd", student, drawn)
    pipe, call, code = with_lora(student, tmp_path, pipe=FAMILIES["sd"].make())
    assert 'LCMScheduler.from_pretrained("path/to/this/folder", subfolder="scheduler")' in code
    latents = stock_images(pipe, "sd", student, call, drawn, "latent")
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    assert pipe.scheduler.timesteps.tolist() == [899, 674, 449, 224]  # the times of TDM for PixArt (Luo et al. 2025)


WRONG = {"sd": lambda: LCMScheduler(**VP, steps_offset=1),
         "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
         "z-image": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)}


@pytest.mark.parametrize("name", WRONG)
def test_the_pipelines_own_scheduler_makes_another_image(name):
    """LCM's 50 original steps, the times of Stable Diffusion 3's pipeline, and the other stepping."""
    teacher, student = trained(name)
    student.steps = steps_of(teacher, 4, "stochastic")
    drawn = noises(student)
    found = stock_steps(student, student.network.velocity, student.steps)
    pipe = FAMILIES[name].make()
    setattr(pipe, "unet" if name == "sd" else "transformer", plain_backbone(student))
    pipe.set_progress_bar_config(disable=True)
    call = found.arguments | {"guidance_scale": 0 if name == "z-image" else 1}
    expected = own_latents(name, student, drawn)

    def difference(scheduler):
        pipe.scheduler = scheduler
        return (stock_images(pipe, name, student, call, drawn, "latent") - expected).abs().max() / expected.abs().max()

    assert difference(found.scheduler()) < 1e-5
    student.steps = steps_of(teacher, 4, STEPPINGS[name == "z-image"])  # of which no noise is drawn
    assert difference(WRONG[name]()) > 1e-2
