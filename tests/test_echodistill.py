"""EchoDistill: who learns from what, the exact start and target, resume, disk, and bad input."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from flowdistill import load_student
from flowdistill.config import OptimizerConfig
from flowdistill.errors import UserError
from flowdistill.methods.echodistill import EchoDistill
from flowdistill.noise import indexed_noise
from flowdistill.objectives import alignment
from flowdistill.objectives import distribution_matching as dm
from flowdistill.student import export
from flowdistill.teacher import load_teacher
from flowdistill.training.draw import Draw
from tests.echo_world import (
    KEPT,
    TOKEN,
    make_method,
    make_trainer,
    settings,
    student_pipeline,
    teacher_pipeline,
    weights,
    write_pictures,
)
from tests.families import VP, lively

EVERY = {"teacher_prior_loss_weight": 0.5, "discriminators": ["small:1", "small:2"], "texture": "gram"}


def bare(method):
    return {name: role.network for name, role in method.roles().items()}


def gradients(method, role):
    """Names of the trained weights that the loss of ``role`` reaches."""
    for other in method.roles().values():
        other.network.zero_grad(set_to_none=True)
    loss, figures = method.loss(role, bare(method), Draw(0, 3, rows=2))
    assert loss.isfinite() and loss.ndim == 0 and all(value.ndim == 0 for value in figures.values())
    loss.backward()
    reached: dict[str, list[str]] = {}
    for name, other in method.roles().items():
        for key, p in other.network.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                reached.setdefault(name, []).append(key)
    return reached


# --- who learns from what


def test_the_word_and_the_teacher_learn_from_the_teachers_loss_alone(tmp_path):
    method = make_method(tmp_path, **EVERY)
    word = "word.encoder.embeddings.token_embedding.offset"
    reached = gradients(method, "teacher")
    assert set(reached) == {"teacher"} and word in reached["teacher"]
    assert all(".lora_B." in name for name in reached["teacher"] if name != word)  # A's gradient is B, 0 at the start
    reached = gradients(method, "student")
    assert "teacher" not in reached and reached["student"]
    assert method.word.words.offset.grad is None
    assert all(p.grad is None for p in method.roles()["teacher"].network.parameters())
    assert set(gradients(method, "discriminator")) == {"discriminator"}


def test_the_adversarial_term_reaches_the_student_through_the_frozen_networks(tmp_path):
    off = {"latent_weight": 0.0, "identity_weight": 0.0, "texture": "none", "prior_loss_weight": 0.0}
    method = make_method(tmp_path, **off)
    assert gradients(method, "student")["student"]
    assert not make_method(tmp_path, **off, discriminators=[]).roles().get("discriminator")
    assert not gradients(make_method(tmp_path, **off, discriminators=[]), "student")


def test_nothing_frozen_moves_in_training(tmp_path):
    method = make_method(tmp_path, echo={"start": 3}, **EVERY,
                         teacher_optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1))
    frozen = {f"teacher {name}": value for name, value in method.teacher.network.state_dict().items()}
    frozen |= {f"student {name}": value for name, value in method.source.network.state_dict().items()}
    frozen |= {f"text {name}": value for name, value in method.word.encoder.state_dict().items()
               if not name.endswith("offset")}
    frozen |= {f"eyes {name}": value for name, value in method.eyes.state_dict().items()}
    frozen |= {f"vae {name}": value for name, value in method.teacher.codec.state_dict().items()}
    assert "text embeddings.token_embedding.table.weight" in frozen
    before, trained = {name: value.clone() for name, value in frozen.items()}, weights(method)
    make_trainer(tmp_path, method, steps=6).train()
    assert all(torch.equal(before[name], value) for name, value in frozen.items())
    assert all(not torch.equal(value, trained[name]) for name, value in weights(method).items())


def test_the_steps_order_and_the_roles(tmp_path):
    method = make_method(tmp_path)
    assert method.schedule(0) == ("teacher", "student", "discriminator")
    assert make_method(tmp_path, discriminators=[]).schedule(5) == ("teacher", "student")


# --- the start and the target


@pytest.mark.parametrize("adapter", ["kv_full", "attention", "all"])
@torch.no_grad()
def test_before_training_the_student_is_the_turbo_pipelines_one_step(tmp_path, adapter):
    pipeline = student_pipeline()
    method = make_method(tmp_path, student=pipeline, adapter=adapter)
    noise = indexed_noise((4, 8, 8), 0, range(2))
    student = method.student()
    made = student(noise, student.encode(prompts=KEPT[:2]))
    base = method.source.denoise(student.t_start * noise, student.t_start, method.source.encode(prompts=KEPT[:2]))
    torch.testing.assert_close(made, base, rtol=1e-6, atol=1e-5)  # the adapted networks are equal bit for bit
    pipeline.set_progress_bar_config(disable=True)
    one_step = pipeline(KEPT[:2], latents=noise.clone(), num_inference_steps=1, guidance_scale=0.0,
                        output_type="latent").images
    torch.testing.assert_close(made, one_step, rtol=1e-4, atol=1e-4)
    word = student(noise, student.encode(prompts=[f"a {TOKEN}"] * 2))
    assert torch.equal(word, student(noise, student.encode(prompts=["a c"] * 2)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_ddims_guided_original_sample_of_the_noised_student(tmp_path, prediction):
    pipeline = teacher_pipeline(prediction)
    method = make_method(tmp_path, teacher=pipeline, teacher_guidance_scale=7.5)
    index = torch.tensor([250, 700])
    table = pipeline.scheduler.alphas_cumprod.double()
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (table[index].sqrt(), (1 - table[index]).sqrt()))
    time = (sigma / (alpha + sigma)).flatten()
    sample, noise = indexed_noise((4, 8, 8), 5, range(2)), indexed_noise((4, 8, 8), 6, range(2))
    embeds = method.word(method.word.ids(KEPT[:2])).detach()
    with torch.no_grad():
        found = method.align.target(bare(method)["teacher"], sample, noise, time.float(), embeds)
        native = (alpha * sample + sigma * noise).float()
        empty = pipeline.encode_prompt([""] * 2, "cpu", 1, False)[0]
        raw = [pipeline.unet(native, index, encoder_hidden_states=e).sample.double() for e in (embeds, empty)]
    guided = raw[1] + 7.5 * (raw[0] - raw[1])
    clean = (native - sigma * guided) / alpha if prediction == "epsilon" else alpha * native - sigma * guided
    torch.testing.assert_close(found.double(), clean, rtol=2e-4, atol=2e-4)
    assert alignment.signal_share(time).tolist() == pytest.approx(table[index].tolist(), rel=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_teachers_loss_is_the_mean_squared_error_of_its_own_prediction(tmp_path, prediction):
    pipeline = teacher_pipeline(prediction)
    method = make_method(tmp_path, teacher=pipeline)
    loss, _ = method.loss("teacher", bare(method), Draw(4, 1, rows=2))
    draw = Draw(4, 1, rows=2)  # the same numbers once more
    images, ids = method.concept.draw(draw, None)
    noise, time = draw.normal((4, 8, 8)), method.config.time.draw(method.teacher, draw)
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    alpha, sigma = (value.reshape(-1, 1, 1, 1).float() for value in method.teacher.path.alpha_sigma(time))
    timestep = method.teacher.path.coefficients(time).timestep.float()
    target = noise if prediction == "epsilon" else alpha * noise - sigma * latents
    raw = pipeline.unet(alpha * latents + sigma * noise, timestep, encoder_hidden_states=method.word(ids)).sample
    torch.testing.assert_close(loss, (raw - target).square().mean(), rtol=1e-4, atol=1e-5)


def test_the_students_terms_are_their_weights_times_the_objectives(tmp_path):
    method = make_method(tmp_path, latent_weight=2.0, identity_weight=0.3, texture_weight=0.7, adversarial_weight=0.2,
                         prior_loss_weight=0.4)
    _, figures = method.loss("student", bare(method), Draw(0, 1, rows=2))
    draw, config = Draw(0, 1, rows=2), method.config
    noise, ids = draw.normal((4, 8, 8)), method.concept.draw_ids(draw)
    before, other, _, _ = method.kept.draw(draw)
    embeds = method.word(ids).detach()
    with torch.no_grad():
        sample = method._make(bare(method), noise, embeds)
        time = config.alignment_time.draw(method.teacher, draw)
        share = alignment.signal_share(time)
        target = method.align.target(bare(method)["teacher"], sample, noise, time, embeds)
        pictures, wanted = (method.teacher.codec.pixels(x) for x in (sample, target))
        seen, goal = (method.align.eye(x).pooled for x in (pictures, wanted))
        texture = alignment.sliced_wasserstein(pictures, wanted, draw.normal((32, 3, 5, 5)))
        logits = bare(method)["discriminator"]([method.critics[0](pictures).pooled])
    expected = {
        "prior": 0.0,  # nothing has changed yet
        "latent": (2.0 * share * 0.5 * (sample - target).square().mean((1, 2, 3))).mean().item(),
        "identity": (0.3 * share * alignment.identity_distance(seen, goal)).mean().item(),
        "texture": (0.7 * share * texture).mean().item(),
        "adversarial": 0.2 * torch.nn.functional.softplus(-logits).mean().item(),
    }
    assert set(figures) == set(expected)
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_prior_terms_measure_the_distance_to_the_untrained_models(tmp_path):
    method = make_method(tmp_path, teacher_prior_loss_weight=0.5, prior_loss_weight=0.5)
    draws = [Draw(0, 1, rows=2) for _ in range(2)]
    for name, draw in zip(("student", "teacher"), draws, strict=True):
        assert method.loss(name, bare(method), draw)[1]["prior"].item() < 1e-9
    with torch.no_grad():
        for value in method._trained().values():
            value.add_(0.05)
    student, _ = bare(method)["student"], draws
    draw = Draw(0, 1, rows=2)
    found = method.loss("student", bare(method), draw)[1]["prior"].item()
    draw = Draw(0, 1, rows=2)
    draw.normal((4, 8, 8)), method.concept.draw_ids(draw)
    before, noise, condition, ids = method.kept.draw(draw)
    assert torch.equal(method.word(ids), condition.tensors["prompt_embeds"])
    with torch.no_grad():
        now = dm.noised(noise, noise, torch.ones(2)) * method.student().t_start
        time = torch.full((2,), method.student().t_start, dtype=torch.float64)
        now = now - method.student().t_start * student(now, time, condition)
    assert found == pytest.approx((0.5 * 0.5 * (now - before).square().mean()).item(), rel=1e-4) and found > 1e-4
    assert method.loss("teacher", bare(method), Draw(0, 1, rows=2))[1]["prior"].item() > 1e-6


# --- the loop


def test_resume_is_bit_for_bit_and_seeds_decide_everything(tmp_path):
    changes = {"echo": {"start": 2, "steps": 2}, **EVERY}
    ways = {"whole": [5], "parts": [1, 3, 4, 5]}  # before the stage, within its round, at the round's end
    found = {}
    for name, stops in ways.items():
        for stop in stops:
            method = make_method(tmp_path, **changes)
            trainer = make_trainer(tmp_path, method, steps=stop, name=name)
            trainer.train()
        found[name] = weights(method), trainer.student().generate(num_images=2, seed=1)
    assert all(torch.equal(value, found["parts"][0][name]) for name, value in found["whole"][0].items())
    assert torch.equal(found["whole"][1], found["parts"][1])
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ways]
    timed = ("seconds", "images_per_second")
    plain = [[{key: value for key, value in line.items() if key not in timed} for line in each] for each in lines]
    assert plain[0] == plain[1]


def test_without_the_echo_stage_all_is_as_before_it(tmp_path):
    runs = {}
    for name, echo in (("none", {}), ("later", {"start": 4, "rate": 0.25})):
        method = make_method(tmp_path, echo=echo)
        trainer = make_trainer(tmp_path, method, steps=6, name=name)
        seen = []
        for _ in range(6):
            trainer.train_step()
            seen.append((weights(method), trainer.roles["student"].optimizer.param_groups[0]["lr"]))
        runs[name] = seen
    equal = [all(torch.equal(one[0][key], other[0][key]) for key in one[0])
             for one, other in zip(runs["none"], runs["later"], strict=True)]
    assert equal == [True] * 4 + [False] * 2
    assert [rate for _, rate in runs["later"]] == [1e-3] * 4 + [2.5e-4] * 2


# --- disk and diffusers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command's own function, with pipelines on disk."""
    from flowdistill.training.run import distill

    folder = tmp_path_factory.mktemp("echo")
    teacher_pipeline().save_pretrained(folder / "teacher")
    student_pipeline().save_pretrained(folder / "turbo")
    write_pictures(folder / "pictures")
    (folder / "kept.txt").write_text("\n".join(KEPT))
    (folder / "echo.yaml").write_text(f"""
output_dir: {folder}/run
teacher: {{source: {folder}/teacher, prompts: {folder}/kept.txt}}
method:
  name: echodistill
  student: {folder}/turbo
  instance_data_dir: {folder}/pictures
  instance_prompt: a {TOKEN} c
  initializer_token: c
  validation_prompts: [a {TOKEN}, a {TOKEN} on d]
  teacher_steps: 3
  token_lr: 0.05
  optimizer: {{lr: 1.0e-2}}
  teacher_optimizer: {{lr: 1.0e-2}}
  echo: {{start: 2, steps: 2, num_samples: 4, num_validation: 2, min_level: -1.0e+9, tolerance: null}}
train: {{steps: 4, batch_size: 2, num_samples: 4, trackers: []}}
evaluation: {{at_end: false}}
""")
    return folder, distill(folder / "echo.yaml")


def stock(folder, name):
    base = folder / {"student": "turbo"}.get(name, name)
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(folder / "run" / name)
    pipeline.load_textual_inversion(folder / "run" / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_run_folder_loads_in_stock_diffusers_and_here_with_the_same_images(finished):
    folder, run = finished
    assert run.completed
    assert {"teacher", "student", "samples", "echo"} <= {entry.name for entry in run.output_dir.iterdir()}
    student, prompts = load_student(run.output_dir), [f"a {TOKEN}", f"a {TOKEN} on d", "a cat"]
    noise = indexed_noise((4, 8, 8), 3, range(3))
    pipeline = stock(folder, "student")
    stock_images = pipeline(prompts, latents=noise.clone(), num_inference_steps=1, guidance_scale=0.0,
                            output_type="pt").images
    here = student.generate(prompts=prompts, seed=3)
    torch.testing.assert_close(here, stock_images, rtol=0, atol=1e-4)
    base = StableDiffusionPipeline.from_pretrained(folder / "turbo", safety_checker=None)
    base.set_progress_bar_config(disable=True)
    before = base(prompts, latents=noise.clone(), num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
    assert (before - stock_images).abs().max() > 0.01
    rows = [load_file(run.output_dir / name / "learned_embeds.safetensors") for name in ("student", "teacher")]
    assert set(rows[0]) == {TOKEN} and rows[0][TOKEN].shape == (1, 16) and torch.equal(rows[0][TOKEN], rows[1][TOKEN])
    assert student.examples(range(2)).tensors["prompt_embeds"].shape == (2, 16, 16)


def test_the_trained_teacher_loads_in_stock_diffusers(finished):
    folder, run = finished
    torch.manual_seed(0)
    config = settings(folder, student_prompts=[], token_lr=0.05, teacher_optimizer=OptimizerConfig(lr=1e-2))
    method = EchoDistill(config, load_teacher(folder / "teacher", prompts=KEPT), student_pipeline())
    for name in ("teacher", "student"):
        parts = load_file(run.output_dir / "checkpoints" / "step-000004" / f"{name}.safetensors")
        method.roles()[name].network.load_state_dict(parts, strict=False)
    pipeline = stock(folder, "teacher")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = indexed_noise((4, 8, 8), 3, range(1))
    there = pipeline([f"a {TOKEN}"], latents=noise.clone(), num_inference_steps=4, guidance_scale=3.0,
                     output_type="latent").images
    condition = method.student().encode(prompts=[f"a {TOKEN}"])
    here = method.personal_teacher().sample(noise, condition, 4, guidance_scale=3.0)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_cards_and_pictures_lie_beside_the_weights(finished):
    folder, run = finished
    for name, words in (("student", "num_inference_steps=1, guidance_scale=0.0"), ("teacher", "num_inference_steps=3")):
        place = run.output_dir / name
        card = (place / "README.md").read_text()
        assert words in card and f"`{TOKEN}`" in card and "library_name: diffusers" in card and str(folder) in card
        assert ("trailing" in card) == (name == "student")
        assert {"image_0.png", "image_1.png", "validation.png"} <= {file.name for file in place.iterdir()}
    assert (run.output_dir / "samples" / "final.png").is_file()


def test_the_cards_own_lines_run(finished, monkeypatch):
    folder, run = finished
    monkeypatch.chdir(run.output_dir)
    code = (run.output_dir / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (16, 16) and isinstance(names["pipe"], DiffusionPipeline)


def test_sample_and_export_take_the_run(finished, cli, tmp_path):
    _, run = finished
    (tmp_path / "p.txt").write_text(f"a {TOKEN} on b\na cat\n")
    out = tmp_path / "g.png"
    outcome = cli("sample", run.output_dir, "--num-images", 4, "--prompts", tmp_path / "p.txt", "--out", out)
    assert outcome.code == 0 and out.is_file()
    student = load_student(run.output_dir)
    export(student, tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise = indexed_noise((4, 8, 8), 3, range(1))
    there = pipeline(f"a {TOKEN}", latents=noise.clone(), num_inference_steps=1, guidance_scale=1,
                     output_type="pt").images
    torch.testing.assert_close(there, student.generate(prompts=[f"a {TOKEN}"], seed=3), rtol=0, atol=1e-3)


def test_a_run_again_changes_nothing_and_a_lost_card_is_written_again(finished):
    from flowdistill.training.run import distill

    folder, run = finished
    files = {file: file.stat().st_mtime_ns for file in run.output_dir.rglob("*.safetensors")}
    distill(folder / "echo.yaml")
    assert files == {file: file.stat().st_mtime_ns for file in run.output_dir.rglob("*.safetensors")}
    before = (run.output_dir / "student" / "README.md").read_bytes()
    (run.output_dir / "student" / "README.md").unlink()
    distill(folder / "echo.yaml")
    assert (run.output_dir / "student" / "README.md").read_bytes() == before


def test_a_student_exported_by_this_project_can_be_personalised(tmp_path):
    """Its scheduler names the one sigma of its step, whatever its table says."""
    from flowdistill.student import Generator, StudentInfo

    teacher = load_teacher(teacher_pipeline("epsilon"), prompts=KEPT)
    generator = Generator.from_teacher(teacher, StudentInfo("test", "tiny"))
    lively(generator.network.velocity.backbone, seed=3)
    export(generator, tmp_path / "turbo")
    method = make_method(tmp_path, teacher=teacher_pipeline("epsilon"), student=None or
                         StableDiffusionPipeline.from_pretrained(tmp_path / "turbo"))
    noise = indexed_noise((4, 8, 8), 0, range(2))
    student = method.student()
    made = student(noise, student.encode(prompts=KEPT[:2]))
    torch.testing.assert_close(made, generator(noise, teacher.encode(prompts=KEPT[:2])), rtol=1e-3, atol=1e-3)


# --- bad input


def problem(tmp_path, **changes):
    with pytest.raises(UserError) as caught:
        make_method(tmp_path, **changes)
    return str(caught.value)


def test_bad_settings_are_refused_by_name(tmp_path):
    assert "method.instance_prompt is 'a dog'" in problem(tmp_path, instance_prompt="a dog")
    assert "one of method.student_prompts is 'on b'" in problem(tmp_path, student_prompts=["on b"])
    assert "one of method.echo.prompts is 'on b'" in problem(tmp_path, echo={"prompts": ["on b"]})
    assert "placeholder_token" in problem(tmp_path, placeholder_token="b", instance_prompt="a b")
    assert "initializer_token" in problem(tmp_path, initializer_token="cat")
    assert "method.discriminators" in problem(tmp_path, discriminators=["dino"])
    assert "method.adapter" in problem(tmp_path, adapter="lora")
    (tmp_path / "empty").mkdir()
    assert "it is empty" in problem(tmp_path, instance_data_dir=str(tmp_path / "empty"))
    assert "such as" in problem(tmp_path, placeholder_token="my dog", instance_prompt="a my dog")


def test_kept_prompts_are_needed_and_have_no_new_word(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(UserError, match="needs teacher.prompts"):
        EchoDistill(config, load_teacher(teacher_pipeline()), student_pipeline())
    with pytest.raises(UserError, match="has the new word '<new1>' in it"):
        EchoDistill(config, load_teacher(teacher_pipeline(), prompts=[f"a {TOKEN}"]), student_pipeline())


def test_a_student_that_does_not_fit_ends_the_command_in_one_sentence(finished, cli):
    folder, _ = finished
    other = student_pipeline()
    lively(other.text_encoder, seed=9)
    other.save_pretrained(folder / "other")
    for override, words in (
        (f"method.student={folder}/other", "another text encoder than the teacher"),
        (f"method.student={folder}/gone", "does not exist"),
        ("method.identity=transformers:dino", "hf download"),
    ):
        outcome = cli("distill", folder / "echo.yaml", override, f"output_dir={folder}/bad")
        assert outcome.code == 2 and words in outcome.err and len(outcome.err.strip().splitlines()) == 1, outcome.err
        assert not (folder / "bad" / "student").exists()


def test_schedulers_that_are_not_trailing_start_at_the_end_all_the_same(tmp_path):
    pipeline = student_pipeline()
    pipeline.scheduler = DDIMScheduler(**VP, clip_sample=False, steps_offset=1)
    assert make_method(tmp_path, student=pipeline).student().t_start == pytest.approx(0.9361, abs=1e-3)
