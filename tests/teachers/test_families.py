"""Every family against its own pipeline, on tiny random pipelines of real diffusers classes."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)

from flowdistill.export import export
from flowdistill.methods.boot import Boot, BootConfig
from flowdistill.methods.disback import DisBack, DisBackConfig
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
from flowdistill.networks.lora import LoraSettings
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.students import FlowMap, Generator, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import CLIPPED, FAMILIES, NEGATIVE, PROMPTS, pipeline_latents
from tests.pixel_families import trailing_ddim
from tests.tiny import VP

FLOW = ("sd3", "flux-dev", "flux-schnell", "sana", "lumina2", "qwen-image", "z-image")
SAMPLED = FAMILIES | CLIPPED
TEXT = [name for name, family in FAMILIES.items() if family.prompts]


def noise(model, rows=2):
    return torch.randn(rows, *model.shape, generator=torch.Generator().manual_seed(1))


def teacher_of(name, **settings):
    family = SAMPLED[name]
    pipeline = family.make()
    return pipeline, load_teacher(pipeline, image_size=family.image_size, null_label=family.null_label, **settings)


@functools.lru_cache(maxsize=2)
def shared(name, prompted=False):
    """The same, made once for the tests of a family that change neither the pipeline's networks nor the teacher."""
    return teacher_of(name, **{"prompts": PROMPTS} if prompted else {})


@functools.cache
def drawn(name, scale, negative, steps):
    """What the pipeline's own call makes, once for all that is compared with it."""
    pipeline, teacher = shared(name)
    return pipeline_latents(pipeline, SAMPLED[name], noise(teacher), steps, scale, negative)


def difference(name, scale, negative=None, steps=4, change=None):
    """Largest difference of latents between a teacher's Euler steps and its pipeline's own call.

    ``change(teacher, condition, settings)`` may spoil something, and returns the condition.
    """
    family, (_, teacher) = SAMPLED[name], shared(name) if change is None else teacher_of(name)
    n = noise(teacher)
    if family.prompts:
        negatives = None if negative is None else [negative] * len(n)
        condition = teacher.encode(prompts=PROMPTS[: len(n)], negative_prompts=negatives)
    else:
        condition = teacher.encode(family.labels)
    settings = {"guidance_scale": scale}
    if change is not None:
        condition = change(teacher, condition, settings)
    ours = teacher.sample(n * family.start(teacher), condition, steps=steps, **settings)
    theirs = drawn(name, scale, negative, steps)
    ours = ours if family.prompts else teacher.decode(ours)
    assert 0.05 < theirs.std() < 30
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_those_of_the_pipeline(name):
    family = SAMPLED[name]
    assert difference(name, 1.0) < 1e-4
    if family.prompts or family.labels:
        assert difference(name, family.guidance) < 1e-4
    if family.negative:
        assert difference(name, family.guidance, NEGATIVE) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLED)
def test_few_steps_are_those_of_the_pipeline(name, steps):
    """One step is one from the teacher's start to data, and never NaN."""
    family, (pipeline, teacher) = SAMPLED[name], shared(name)
    grid = teacher.path.time_grid(steps)
    assert grid[0] == teacher.t_max and grid[-1] == 0 and len(grid) == steps + 1 and (grid.diff() < 0).all()
    if family.scheduler is trailing_ddim and steps == 3:
        # Its second step goes to timestep 333, and its third asks at 332, as one at that time: no sampler of one path.
        assert teacher.path.coefficients(grid[:-1]).timestep.round().tolist() == [999, 666, 332]
        return
    if (name, steps) not in (("qwen-image", 1), ("karras-ve", 1)):
        assert difference(name, 1.0, steps=steps) < 1e-4
        return
    # diffusers' own single time is 0 / 0: stretched to shift_terminal, or of a geometric row from first to last.
    n, condition = noise(teacher), condition_of(name, teacher)
    assert not pipeline_latents(pipeline, family, n, 1, 1.0).isfinite().any()
    ours = teacher.sample(n, condition, steps=1)
    assert near(ours, n - teacher.velocity(n, 1.0, condition) if teacher.t_max == 1 else
                teacher.denoise(teacher.t_max * n, teacher.t_max))
    if name == "qwen-image":
        pipeline, _ = teacher_of(name)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift_terminal=None)
        assert near(ours, pipeline_latents(pipeline, family, n, 1, 1.0))


def no_guidance(teacher, condition, settings):
    settings["guidance_scale"] = 1.0
    return condition


def other_conditions(teacher, condition, settings):
    return condition[torch.tensor([1, 0])]


def wrong_schedule(teacher, condition, settings):
    if teacher.path.kind == "flow":  # all times of the pipeline, but another shift
        settings["times"] = [1.0, 0.6, 0.4, 0.2, 0.0]
    else:
        wrong = "epsilon" if teacher.path.prediction == "v_prediction" else "v_prediction"
        teacher.network.path = path_from_scheduler(DDIMScheduler(**VP, prediction_type=wrong))
        settings["times"] = teacher.path.time_grid(4).tolist()
    return condition


def wrong_sign(teacher, condition, settings):
    call = teacher.network.forward
    teacher.network.forward = lambda *arguments: -call(*arguments)
    return condition


def conditional(name):
    return FAMILIES[name].prompts or FAMILIES[name].labels is not None


MISTAKES = [(name, mistake) for name in FAMILIES for mistake in
            (*((no_guidance, other_conditions) if conditional(name) else ()), wrong_schedule, wrong_sign)]


@pytest.mark.parametrize("name, mistake", MISTAKES)
def test_mistakes_are_seen(name, mistake):
    assert difference(name, FAMILIES[name].guidance if conditional(name) else 1.0, change=mistake) > 1e-3


# --- students


def condition_of(name, model):
    """Of two samples."""
    return model.encode(prompts=PROMPTS[:2]) if FAMILIES[name].prompts else model.encode(FAMILIES[name].labels)


def near(one, other):
    """Equal up to the last digits: the same product of matrices may round differently at another place in memory."""
    return (one - other).abs().max() < 1e-5 * max(1, other.abs().max())


def student_of(name, guidance_range=None, trained=False, kind=FlowMap, lora=None, prompted=False, **settings):
    pipeline, teacher = teacher_of(name, **settings) if settings else shared(name, prompted)
    student = kind.from_teacher(teacher, StudentInfo("freeflow", name, guidance_range, 1.0), lora=lora)
    if trained:  # stands for training: every weight, and the zero-initialised embeddings above all
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, student.network.parameters()):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return pipeline, teacher, student


@pytest.mark.parametrize("kind", [FlowMap, Generator])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_starts_as_the_teachers_euler_step(name, kind):
    _, teacher, student = student_of(name, (1.0, 2.0), kind=kind)
    n, condition = noise(teacher), condition_of(name, teacher)
    with torch.no_grad():
        step = teacher.sample(n, condition, times=[teacher.t_max, 0.0])
        own = student(n, condition)
    clipping = teacher.path.clipping  # the teacher's, as the pipeline's; networks have none
    assert near(own if clipping is None else clipping(own), step)
    assert (clipping is not None) == (name == "ddim")


@pytest.mark.parametrize(("kind", "lora"), [(FlowMap, None), (Generator, None), (FlowMap, LoraSettings(2))])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_is_the_forward_pass(name, kind, lora):
    _, _, student = student_of(name, (1.0, 2.0) if kind is FlowMap else None, True, kind, lora)
    n, condition = noise(student), condition_of(name, student)
    with torch.no_grad():
        assert near(student.sampler()(n, condition), student(n, condition))


METHODS = {
    "FreeFlow": lambda teacher, scale: FreeFlow(FreeFlowConfig(guidance_max=scale), teacher),
    "FreeFlow, LoRA critic": lambda teacher, scale: FreeFlow(
        FreeFlowConfig(guidance_max=scale, critic="lora", critic_lora_rank=2), teacher),
    "BOOT": lambda teacher, scale: Boot(BootConfig(guidance_scale=scale), teacher),
    "DMD2": lambda teacher, scale: Dmd2(Dmd2Config(guidance_scale=scale), teacher),
    "DMD2, LoRA student and critic": lambda teacher, scale: Dmd2(
        Dmd2Config(guidance_scale=scale, student="lora", critic="lora", lora=LoraSettings(2)), teacher),
    "SiD": lambda teacher, scale: Sid(SidConfig(guidance_scale=scale), teacher),
    "Diff-Instruct": lambda teacher, scale: DiffInstruct(DiffInstructConfig(guidance_scale=scale), teacher),
    "DisBack": lambda teacher, scale: DisBack(DisBackConfig(
        degradation_steps=1, degradation_every=1, interval=[9], host=HostConfig(guidance_scale=scale)), teacher),
}


def train_one_step(name, method):
    """One step of each network of a method; checks that the loss is finite and that what can train has moved."""
    _, teacher = shared(name, prompted=FAMILIES[name].prompts)
    trained = METHODS[method](teacher, 2.0 if teacher.can_guide else 1.0)
    networks = {role: part.network for role, part in trained.roles().items()}
    with tempfile.TemporaryDirectory() as folder:
        for step in range(2 * hasattr(trained, "begin_step")):  # DisBack: to the target that is recorded at step 1
            trained.begin_step(step, Path(folder))
    for role, network in networks.items():
        before = {key: p.detach().clone() for key, p in network.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        loss, _ = trained.loss(role, networks, Draw(0, 1, rows=4))
        loss.backward()
        optimizer.step()
        moved = [key for key, p in network.named_parameters() if p.requires_grad and not torch.equal(p, before[key])]
        assert loss.isfinite() and len(moved) > 0.4 * len(before) > 0, (role, len(moved), len(before))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_training_step(name, method):
    train_one_step(name, method)


@pytest.mark.parametrize("kind", [FlowMap, Generator])
@pytest.mark.parametrize("name", TEXT)
def test_disk_round_trip(tmp_path, name, kind):
    _, teacher, student = student_of(name, (1.0, 2.0), trained=True, kind=kind, prompted=True)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    n, condition = noise(student), teacher.encode(prompts=PROMPTS[:2])
    saved = again.network.state_dict()
    assert all(torch.equal(value, saved.pop(key)) for key, value in student.network.state_dict().items()) and not saved
    with torch.no_grad():
        assert near(again(n, condition, 1.25), student(n, condition, 1.25))
    images = again.generate(num_images=2)
    assert (images - student.generate(num_images=2)).abs().max() < 1e-5 and 0.01 < images.std() < 0.5
    reencoded = again.encode(prompts=PROMPTS[:2])
    for key, value in condition.tensors.items():
        assert torch.equal(value, reencoded.tensors[key]), key


def exported(name, folder, kind=FlowMap, lora=None):
    """The stock pipeline of a student, called as its README says; differences of latents (relative) and images."""
    _, _, student = student_of(name, (1.0, 2.0), trained=True, kind=kind, lora=lora)
    export(student, folder, guidance_scale=1.25)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    line = next(line for line in (folder / "README.md").read_text().splitlines() if "pipe(" in line)
    family, n = FAMILIES[name], noise(student)
    if not family.prompts:
        rows = {"batch_size": 2, "class_labels": family.labels}
        if isinstance(pipe, DiTPipeline):
            rows = {"class_labels": family.labels, "guidance_scale": 1}
        seeded = torch.Generator().manual_seed(1)
        images = pipe(**rows, num_inference_steps=1, output_type="pt", generator=seeded).images
        own = student.decode(student(n, student.encode(family.labels), 1.25))
        return type(pipe).__name__, None, (images - own).abs().max().item()
    expected = student(n, student.encode(prompts=PROMPTS[:2]), 1.25)
    size = {"height": student.prompts.image_size[0], "width": student.prompts.image_size[1]}
    call = eval(f"dict({line.split('(', 1)[1].split(').images')[0].split(', ', 1)[1]})")  # as the README says
    assert call.pop("num_inference_steps") == 1 and {key: call[key] for key in size} == size
    call |= family.call
    latents, images = (
        pipe(prompt=PROMPTS[:2], latents=family.pack(n.clone()), num_inference_steps=1, output_type=output,
             **call).images
        for output in ("latent", "pt")
    )
    size = max(1, expected.abs().max().item())
    return type(pipe).__name__, (family.unpack(latents) - expected).abs().max().item() / size, (
        images - student.decode(expected)).abs().max().item()


@pytest.mark.parametrize(("kind", "lora"), [(FlowMap, None), (Generator, None), (FlowMap, LoraSettings(2))])
@pytest.mark.parametrize("name", TEXT)
def test_exported_pipeline_gives_the_same_latents_and_images(tmp_path, name, kind, lora):
    _, latents, images = exported(name, tmp_path / "out", kind, lora)
    assert latents < 1e-5 and images < 1e-4


def test_a_latent_consistency_pipeline_exports_as_stable_diffusion(tmp_path):
    """Its own pipeline noises what the first step has made."""
    parts = FAMILIES["lcm"].make().components | {"scheduler": LCMScheduler(**VP)}
    pipeline = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    teacher = load_teacher(pipeline)
    assert teacher.takes_guidance and teacher.path.kind == "vp"
    export(FlowMap.from_teacher(teacher, StudentInfo()), tmp_path / "out")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ == "StableDiffusionPipeline"


def test_karras_ve_on_disk(tmp_path):
    """The pipeline's folder and the student's; its students have no stock pipeline."""
    pipeline, teacher, student = student_of("karras-ve", trained=True)
    pipeline.save_pretrained(tmp_path / "p")
    n, again = noise(teacher), load_teacher(tmp_path / "p")
    with torch.no_grad():
        assert near(again.sample(n, steps=3), teacher.sample(n, steps=3))
        student.save(tmp_path / "s")
        assert near(load_student(tmp_path / "s")(n), student(n))
    with pytest.raises(UserError, match="students of KarrasVe teachers cannot be exported"):
        export(student, tmp_path / "out")


def test_variants_that_are_not_supported_are_named():
    other = StableDiffusionImg2ImgPipeline(**FAMILIES["sd"].make().components, requires_safety_checker=False)
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline is not supported.*StableDiffusionPipeline"):
        load_teacher(other)
    pipeline = FAMILIES["qwen-image"].make()
    pipeline.transformer.register_to_config(zero_cond_t=True)
    with pytest.raises(UserError, match="has zero_cond_t"):
        load_teacher(pipeline)
    pipeline = FAMILIES["karras-ve"].make()
    with pytest.raises(UserError, match="'fourier', of the logarithm of sigma, but DDIMScheduler"):
        load_teacher(DDPMPipeline(pipeline.unet, DDIMScheduler(**VP)))
    pipeline = FAMILIES["sd"].make()
    pipeline.unet.register_to_config(num_class_embeds=3)
    with pytest.raises(UserError, match="has num_class_embeds 3"):
        load_teacher(pipeline)
    with pytest.raises(UserError, match="takes no class labels"):
        load_teacher(FAMILIES["sd3"].make(), null_label=1)


def test_pairs_of_a_prompt_teacher_go_through_its_prompts(tmp_path, capsys):
    teacher = teacher_of("sd", prompts=PROMPTS)[1]
    pairs = teacher_pairs(teacher, 5, 2, folder=tmp_path)
    assert "making 5 pairs, 2 teacher steps each\n" in capsys.readouterr().err
    assert pairs.labels.tolist() == [0, 1, 2, 0, 1]
    noise, latents, condition = pairs.rows(torch.tensor([4, 2]), teacher)
    expected = teacher.encode(prompts=[PROMPTS[1], PROMPTS[2]])
    assert torch.equal(condition.tensors["prompt_embeds"], expected.tensors["prompt_embeds"])
    assert near(teacher.sample(noise, expected, steps=2), latents)
    teacher_pairs(teacher_of("sd", prompts=PROMPTS[:2])[1], 5, 2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other prompts are other pairs
    method = Dmd2(Dmd2Config(regression_weight=1.0, regression_pairs=4, regression_steps=1), teacher)
    networks = {role: part.network for role, part in method.roles().items()}
    assert method.loss("student", networks, Draw(0, 0, rows=2))[0].isfinite()


def test_a_generator_of_a_prompt_teacher_is_kept_and_exported(tmp_path):
    _, teacher = teacher_of("sd-v", prompts=PROMPTS)
    student = Dmd2(Dmd2Config(), teacher).student()
    n, condition = noise(teacher), teacher.encode(prompts=PROMPTS[:2])
    with torch.no_grad():
        expected = student(n, condition)
        assert near(expected, teacher.denoise(teacher.t_max * n, teacher.t_max, condition))
        student.save(tmp_path / "s")
        assert near(load_student(tmp_path / "s")(n, condition), expected)
    export(student, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    size = dict(zip(("height", "width"), student.prompts.image_size, strict=True))
    latents = pipe(prompt=PROMPTS[:2], latents=n.clone(), num_inference_steps=1, guidance_scale=1, output_type="latent",
                   **size).images
    assert near(latents, expected)


def test_a_flow_student_from_a_later_start_has_no_stock_pipeline(tmp_path):
    _, _, student = student_of("sd3", t_max=0.9)
    with pytest.raises(UserError, match="starts at the noise itself.*at t = 0.9000"):
        export(student, tmp_path / "out")


@pytest.mark.parametrize("name", TEXT)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    """Also when another forward pass, with other scalars, comes between forward and backward."""
    _, teacher, student = student_of(name, trained=True)
    network, n, condition = student.network, noise(student), teacher.encode(prompts=PROMPTS[:2])
    time = torch.full((2,), teacher.t_max, dtype=torch.float64)

    def gradients():
        network.zero_grad()
        out = network(n, time, condition, duration=torch.tensor([0.1, 0.9]))
        with torch.no_grad():
            network(n, time, condition, duration=torch.zeros(2))
        out.square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    network.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, a.abs().max()))


# --- half precision


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FLOW])
def test_half_precision_at_both_ends(name):
    """Coefficients stay out of half precision: 5e-3 at t_max, where epsilon is divided by alpha, and at t_min."""
    teachers = [teacher_of(name, dtype=dtype)[1] for dtype in ("float32", "float16")]
    overflown = []
    for part in teachers[1].network.modules():
        part.register_forward_hook(lambda m, a, out: overflown.extend(
            [type(m).__name__] if isinstance(out, torch.Tensor) and not out.isfinite().all() else []))
    family = FAMILIES[name]
    given = {"prompts": PROMPTS[:2]} if family.prompts else {"labels": family.labels}
    for t in (teachers[0].t_max, teachers[0].t_min):
        for size in (1.0, 6.0):
            x = size * noise(teachers[0])
            with torch.no_grad():
                single, half = (teacher.velocity(x, t, teacher.encode(**given)) for teacher in teachers)
            assert half.dtype == torch.float32 and not overflown
            assert (half - single).norm() < 5e-3 * single.norm(), (t, size)
