"""What a run of EchoDistill leaves, read back by stock diffusers and by the command; and bad input."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from flowdistill import load_student
from flowdistill.config import OptimizerConfig
from flowdistill.export import export
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import indexed_noise
from tests.echo_world import KEPT, TOKEN, make_method, settings, student_pipeline, teacher_pipeline, write_pictures
from tests.families import VP, lively


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
  echo: {{start: 2, steps: 2, num_samples: 4, num_validation: 2, min_level: -1.0e+9, tolerance: null,
         min_separation: null}}
train: {{steps: 4, batch_size: 2, num_samples: 4, trackers: []}}
evaluation: {{at_end: false}}
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
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
    here = method.concept_teacher().sample(noise, condition, 4, guidance_scale=3.0)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_cards_and_pictures_lie_beside_the_weights(finished):
    folder, run = finished
    for name, words in (("student", "num_inference_steps=1, guidance_scale=0.0"), ("teacher", "num_inference_steps=3")):
        place = run.output_dir / name
        card = (place / "README.md").read_text()
        assert words in card and f"`{TOKEN}`" in card and "library_name: diffusers" in card
        assert str(folder) not in card and "base_model:" not in card  # whose value the hub takes for an id of its own
        assert ("trailing" in card) == (name == "student")
        assert {"image_0.png", "image_1.png", "validation.png"} <= {file.name for file in place.iterdir()}
    assert (run.output_dir / "samples" / "final.png").is_file()


def test_the_cards_own_lines_run_where_the_run_was_started(finished, monkeypatch):
    folder, run = finished
    monkeypatch.chdir(folder)
    for name in ("student", "teacher"):
        code = (run.output_dir / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict = {}
        exec(code, names)
        assert names["image"].size == (16, 16) and isinstance(names["pipe"], DiffusionPipeline)


def test_the_runs_last_line_names_what_is_there(finished):
    _, run = finished
    for name in ("student", "teacher", "echo", "samples"):
        assert f"{name}/" in run.contents and (run.output_dir / name).is_dir(), name


def test_sample_and_export_take_the_run(finished, cli, tmp_path):
    _, run = finished
    (tmp_path / "p.txt").write_text(f"a {TOKEN} on b\na cat\n")
    out = tmp_path / "g.png"
    outcome = cli("sample", run.output_dir, "--num-images", 4, "--prompts", tmp_path / "p.txt", "--out", out)
    assert outcome.code == 0 and out.is_file()
    same = ("--prompt", f"a {TOKEN} on b", "--prompt", "a cat", "--out", tmp_path / "same.png")
    assert cli("sample", run.output_dir, "--num-images", 4, *same).code == 0
    assert (tmp_path / "same.png").read_bytes() == out.read_bytes()
    inspected = cli("inspect", run.output_dir).out
    assert "echodistill, step 4 of 4" in inspected and "prompts, by" in inspected and "; 2 to show" in inspected
    student = load_student(run.output_dir)
    export(student, tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise = indexed_noise((4, 8, 8), 3, range(1))
    there = pipeline(f"a {TOKEN}", latents=noise.clone(), num_inference_steps=1, guidance_scale=1,
                     output_type="pt").images
    torch.testing.assert_close(there, student.generate(prompts=[f"a {TOKEN}"], seed=3), rtol=0, atol=1e-3)


def test_a_run_again_changes_nothing_and_a_lost_card_is_written_again(finished, monkeypatch):
    from flowdistill.training.run import distill

    folder, run = finished
    monkeypatch.chdir(folder)
    files = {file: file.stat().st_mtime_ns for file in run.output_dir.rglob("*.safetensors")}
    distill(folder / "echo.yaml")
    assert files == {file: file.stat().st_mtime_ns for file in run.output_dir.rglob("*.safetensors")}
    before = (run.output_dir / "student" / "README.md").read_bytes()
    (run.output_dir / "student" / "README.md").unlink()
    distill(folder / "echo.yaml")
    assert (run.output_dir / "student" / "README.md").read_bytes() == before


def test_a_concept_of_rectangles(finished, monkeypatch):
    from flowdistill.training.run import distill

    folder, _ = finished
    monkeypatch.chdir(folder)
    run = distill(folder / "echo.yaml", ["teacher.image_size=[8,16]", "output_dir=wide", "method.echo.start=null",
                                         "train.steps=1"])
    student = load_student(run.output_dir)
    assert student.shape == (4, 4, 8) and student.generate(prompts=[f"a {TOKEN}"]).shape == (1, 3, 8, 16)
    for name in ("student", "teacher"):
        assert Image.open(run.output_dir / name / "image_0.png").size == (16, 8)
        assert "height=8, width=16" in (run.output_dir / name / "README.md").read_text()


def test_a_student_exported_by_this_project_can_be_personalised(tmp_path):
    """Its scheduler names the one sigma of its step, whatever its table says."""
    from flowdistill.students import Generator, StudentInfo

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
