"""The shapes world: scenes, captions, concepts, the networks that look at them, the shipped teacher and turbo."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from flowdistill import load_teacher
from flowdistill.config import load_config
from flowdistill.data import load_images, shapes
from flowdistill.data.assets import ASSETS, asset_path
from flowdistill.data.pictures import read_picture
from flowdistill.data.shapes_concepts import (
    CONCEPTS,
    HELD_OUT,
    SHOWN,
    draw_concept,
    held_out_prompts,
    references,
    write_concepts,
)
from flowdistill.evaluation import Evaluator, Reference, prompt_conditions
from flowdistill.features import load_features
from flowdistill.features.shapes_networks import (
    CLASSIFIER_HEADS,
    JUDGE_HEADS,
    ShapesClassifier,
    accuracies,
    classifier_data,
    judge_data,
    load_shapes_classifier,
    load_shapes_judge,
    train_network,
)
from flowdistill.students import Generator, StudentInfo
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import indexed_noise
from tests.families import PROMPTS, VP, stable_diffusion

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scene(shape: str, pattern: int = shapes.WHOLE, radius: float = 10.0, angle: float = 0.0) -> shapes.Scenes:
    """One white object, with a gray part, on black, in the middle."""
    one = torch.ones(1, 3)
    middle = torch.tensor([shapes.SIZE / 2])
    return shapes.Scenes(torch.tensor([shapes.SHAPES.index(shape)]), torch.tensor([pattern]), one, 0.5 * one, 0.0 * one,
                         middle, middle, torch.tensor([radius]), torch.tensor([angle]))


def area(image: torch.Tensor) -> float:
    """White pixels of an image (1, 3, H, W), in pixels."""
    return image[0, 0].double().sum().item()


STAR = 5 * 0.45 * math.sin(math.pi / 5)  # ten triangles with sides 1 and 0.45 at the angle pi / 5


@pytest.mark.parametrize("angle", [0.0, 0.2])
@pytest.mark.parametrize(("shape", "expected"), [
    ("circle", math.pi * 0.85**2), ("square", 1.5**2), ("triangle", 1.6**2 / 1.75), ("star", STAR),
    ("cross", 4 * 0.6 * 0.92 - 0.6**2),
])
def test_shapes_have_the_area_of_their_geometry(shape, expected, angle):
    assert area(shapes.render(scene(shape, angle=angle))) == pytest.approx(100 * expected, rel=0.01)


def test_patterns_colour_their_part_of_an_object():
    whole = area(shapes.render(scene("circle")))
    for pattern, share in ((shapes.HALVES, 0.5), (shapes.RING, (0.5 / 0.85) ** 2)):
        image = shapes.render(scene("circle", pattern))
        assert area(image) == pytest.approx(whole * (1 - 0.5 * share), rel=0.01)
    halves = shapes.render(scene("square", shapes.HALVES))[0, 0]
    assert halves[16, 10] == 1.0 and halves[16, 22] == pytest.approx(0.5, abs=0.003)
    stripes = shapes.render(scene("square", shapes.STRIPES))[0, 0]
    assert torch.equal(stripes[:, 12], stripes[:, 20]) and len(stripes[10:22, 16].unique()) > 1


def test_scenes_are_seeded_balanced_and_stored_exactly():
    images, classes = shapes.make_shapes(250, seed=5)
    again, _ = shapes.make_shapes(250, seed=5)
    other, _ = shapes.make_shapes(250, seed=6)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (250, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(images * 255, (images * 255).round()) and 0 <= images.min() and images.max() <= 1
    counts = classes.bincount(minlength=shapes.NUM_CLASSES)
    assert counts.max() - counts.min() <= 1
    # A corner never has the object: it shows the background, within the jitter.
    ground = shapes.palette(shapes.BACKGROUNDS)[shapes.split_class(classes)[2]]
    assert (255 * images[:, :, 0, 0] - ground).abs().max() <= shapes.JITTER + 0.5


def test_reference_set_has_twenty_of_each_class():
    images, classes = load_images("shapes")
    assert images.shape == (4320, 3, 32, 32)
    assert classes.bincount().tolist() == [20] * shapes.NUM_CLASSES


def test_captions_say_the_class_or_leave_it_open():
    for label in range(shapes.NUM_CLASSES):
        for phrasing in range(len(shapes.CAPTIONS)):
            assert shapes.class_of(shapes.caption(label, phrasing)) == label
    assert shapes.caption(0) == "a red circle on a white background"
    assert "an orange" in shapes.caption(5 * 6)
    assert len({shapes.caption(7, p) for p in range(10)}) == 10
    assert shapes.read_caption(shapes.caption(37, 6)) == (1, 0, None) and shapes.class_of(shapes.caption(37, 6)) == -1
    assert shapes.class_of("a red and blue star on a white background") == -1
    assert shapes.class_of("A Red STAR, white background.") == shapes.class_of("red star, white background") >= 0


def test_prompts_file_is_what_the_code_writes():
    prompts = (ASSETS / "shapes" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == shapes.prompt_list() and len(prompts) == 6 * shapes.NUM_CLASSES
    labels = ShapesClassifier.prompt_labels(prompts)
    assert all(len(part.unique()) == shapes.NUM_CLASSES for part in labels.split(shapes.NUM_CLASSES))
    assert len(set(prompts)) == len(prompts)


def test_shipped_classifier_reads_scenes_and_its_features_have_full_rank():
    model = load_shapes_classifier()
    images, answers = classifier_data(864, seed=77)
    found = accuracies(model, images, answers)
    assert found["all"] >= 0.98 and min(found.values()) == found["all"]
    _, classes = shapes.make_shapes(864, seed=77)
    # The joint answer is the three answers, in the order of the classes.
    assert (model(images).argmax(1) == classes).double().mean().item() == pytest.approx(found["all"])
    assert model(images[:4]).exp().sum(1).allclose(torch.ones(4), atol=1e-5)
    features = model.features(images)
    assert torch.linalg.matrix_rank(torch.cov(features.T.double())) == 64
    assert torch.allclose(model.features(images[5:6]), features[5:6], atol=1e-5)
    record = json.loads((asset_path("shapes/classifier") / "config.json").read_text())
    assert record["test_accuracy"]["all"] >= 0.98
    with pytest.raises(UserError, match=r"\(B, 3, 32, 32\), not \(2, 1, 8, 8\)"):
        model.features(torch.zeros(2, 1, 8, 8))


def test_training_a_network_learns_and_repeats_itself():
    def trained():
        torch.manual_seed(0)
        model = ShapesClassifier(CLASSIFIER_HEADS, width=4, feature_size=16)
        return train_network(model, *classifier_data(216, seed=0), 80, 64, 0)

    one, two = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    images, answers = classifier_data(216, seed=1)
    assert accuracies(one, images, answers)["background"] > 0.3  # chance is 0.17


def test_judge_knows_each_concept_and_is_not_fooled_by_its_neighbours():
    judge, names = load_shapes_judge(), JUDGE_HEADS["object"]
    for name in CONCEPTS:
        images = draw_concept(name, [*HELD_OUT, *SHOWN] * 10, seed=1234)
        answers = judge.answers(images)
        assert (answers["object"].argmax(1) == names.index(name)).float().mean() >= 0.95
        wanted = torch.tensor([list(shapes.BACKGROUNDS).index(b) for b in [*HELD_OUT, *SHOWN] * 10])
        assert (answers["background"].argmax(1) == wanted).float().mean() >= 0.95
    images, truth = judge_data(900, seed=4321)
    said = judge.answers(images)["object"].argmax(1)
    ordinary = truth["object"] < len(shapes.SHAPES) + 1
    assert (said[ordinary] > len(shapes.SHAPES)).float().mean() <= 0.03
    assert set(CLASSIFIER_HEADS["shape"]).isdisjoint(CONCEPTS)


def test_concept_folders_hold_what_the_code_draws(tmp_path):
    written = write_concepts(tmp_path)
    assert [folder.name for folder in written] == list(CONCEPTS)
    for folder in written:
        images, backgrounds = references(folder.name)
        shipped = ASSETS / "shapes" / "concepts" / folder.name
        for place in (folder, shipped):
            files = sorted(place.glob("*.png"))
            assert len(files) == len(images) == 5
            for file, image in zip(files, images, strict=True):
                assert torch.equal(read_picture(file), (255 * image).round().to(torch.uint8))
            described = json.loads((place / "concept.json").read_text())
            assert described["backgrounds"] == backgrounds
            assert set(described["held_out_backgrounds"]).isdisjoint(backgrounds)
            assert described["word"] in shapes.SHAPES
    prompts = held_out_prompts("<new1> star")
    assert ("a <new1> star on a pink background", "pink") in prompts and len(prompts) == 6
    with pytest.raises(UserError, match="unknown concept 'star'"):
        draw_concept("star", ["pink"], 0)
    with pytest.raises(UserError, match="unknown background 'plaid'"):
        draw_concept("striped-star", ["plaid"], 0)


def test_damaged_network_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        load_shapes_classifier(tmp_path)
    model = ShapesClassifier({"shape": ["a", "b"]}, width=2, feature_size=4)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": model.config}))
    with pytest.raises(UserError, match="model.safetensors is missing"):
        load_shapes_classifier(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_shapes_classifier(tmp_path).config == model.config
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_shapes_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": {"heads": 3}}))
    with pytest.raises(UserError, match="does not describe"):
        load_shapes_classifier(tmp_path)


class Brightness(nn.Module):
    """Class 1 for bright images, 0 for dark ones; the prompts "bright", "dark", and others."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images) * torch.tensor([0.0, 1.0]) - torch.tensor([0.0, 0.5])

    def prompt_labels(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([["dark", "bright"].index(p) if p in ("dark", "bright") else -1 for p in prompts])


@pytest.mark.parametrize("batch_size", [2, 5])
def test_images_are_held_against_their_prompts(batch_size):
    class Texts:
        prompts = ["bright", "dark", "anything", "bright"]

    class Model:
        prompts = Texts()

        @staticmethod
        def examples(indices):
            return torch.tensor([i % 4 for i in indices])

    def sampler(noise, given):
        return (given == 0).float()[:, None, None, None].expand(-1, 3, 4, 4)  # bright for the first prompt only

    features = load_features(Brightness(), device="cpu")
    reference = Reference("made up", torch.zeros(2), torch.eye(2), 10)
    metrics = ("frechet", "accuracy", "frechet_by_class")
    evaluator = Evaluator(features, reference, 8, batch_size=batch_size, metrics=metrics, progress=False)
    row = evaluator.measure(sampler, (1, 1, 1), condition=prompt_conditions(Model()))
    # Of eight images two have no class; of the other six the two "bright" at the list's end are wrong.
    assert row.accuracy == pytest.approx(4 / 6) and row.per_class_fid is None
    assert evaluator.measure(sampler, (1, 1, 1), condition=Model.examples).accuracy is None


@pytest.mark.parametrize("name", ["dmd2"])
def test_configuration_is_complete(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "configs" / "shapes" / f"{name}.yaml", [])
    assert config.teacher.source == "assets/shapes/teacher" and Path(config.teacher.prompts).is_file()
    assert config.evaluation.features == config.evaluation.reference == "shapes"


# --- the pipelines


def test_each_word_of_a_caption_is_one_token():
    tokenizer = script("train_shapes_teacher").build_tokenizer()
    for phrasing in range(len(shapes.CAPTIONS + shapes.SHORT_CAPTIONS)):
        for label in range(0, shapes.NUM_CLASSES, 7):
            text = shapes.caption(label, phrasing)
            assert len(tokenizer.tokenize(text)) == len(text.replace(",", " ,").split())
            assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length
    assert len(tokenizer.tokenize("zebra")) > 1 and tokenizer.unk_token not in tokenizer.tokenize("zebra!")


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_turbo_of_a_generator_is_its_one_step(prediction, tmp_path):
    """A tiny random generator through disk and the script's command; its last weights are no teacher's."""
    teacher = load_teacher(stable_diffusion(DDIMScheduler(**VP, prediction_type=prediction, clip_sample=False)),
                           prompts=PROMPTS)
    student = Generator.from_teacher(teacher, StudentInfo("dmd2", "a teacher"))
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.01)
    student.save(tmp_path / "student")
    make_shapes_turbo = script("make_shapes_turbo")
    arguments = [tmp_path / "student", "--out", tmp_path / "turbo"]
    assert make_shapes_turbo.main([str(argument) for argument in arguments]) == 0
    record = json.loads((tmp_path / "turbo" / "flowdistill.json").read_text())["largest_difference_to_the_student"]
    assert record["float32"] < 1e-5 * 30 and 0 < record["stored"] < 0.1
    again = load_teacher(tmp_path / "turbo")
    noise = indexed_noise(again.shape, 1, range(3))
    with torch.no_grad():
        ours = student(noise, student.encode(prompts=PROMPTS))
    stored = again.denoise(again.t_max * noise, again.t_max, again.encode(prompts=PROMPTS))
    assert (stored - ours).abs().max() < 0.01 * ours.abs().max()
    early = Generator.from_teacher(teacher, StudentInfo(), t_start=0.5)
    with pytest.raises(UserError, match=r"starts at t = 0.5000"):
        make_shapes_turbo.turbo(early)


@pytest.fixture(scope="module")
def pipelines():
    folders = {name: asset_path(f"shapes/{name}") for name in ("teacher", "turbo")}
    return {name: StableDiffusionPipeline.from_pretrained(folder) for name, folder in folders.items()}


def agreement(images: torch.Tensor, prompts: list[str]) -> float:
    labels = ShapesClassifier.prompt_labels(prompts)
    return (load_shapes_classifier()(images).argmax(1) == labels).double().mean().item()


def test_pipelines_are_small_and_know_the_worlds_words(pipelines):
    files = [file for name in pipelines for file in asset_path(f"shapes/{name}").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 14e6
    for pipeline in pipelines.values():
        assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
        words = pipeline.tokenizer.tokenize("a photo of an orange star on a gray background")
        assert len(words) == 10
        pipeline.tokenizer.add_tokens("<new1>") if "<new1>" not in pipeline.tokenizer.get_vocab() else None
        assert pipeline.tokenizer.tokenize("a <new1> star")[1] == "<new1>"


def test_autoencoder_keeps_what_the_classifier_and_the_judge_read():
    teacher = load_teacher(asset_path("shapes/teacher"))
    images, answers = classifier_data(216, seed=88)
    decoded = teacher.decode(teacher.codec.encode(images))
    assert accuracies(load_shapes_classifier(), decoded, answers)["all"] >= 0.97
    latents = teacher.codec.encode(images)
    assert latents.shape[1:] == (4, 8, 8) and 0.8 < latents.std() < 1.2
    for name in CONCEPTS:
        seen = teacher.decode(teacher.codec.encode(references(name)[0]))
        said = load_shapes_judge().answers(seen)["object"].argmax(1)
        assert (said == JUDGE_HEADS["object"].index(name)).float().mean() >= 0.8


def test_teacher_follows_prompts():
    teacher = load_teacher(asset_path("shapes/teacher"))
    assert teacher.disagreement() is None
    prompts = shapes.prompt_list()[:48]
    latents = teacher.sample(indexed_noise(teacher.shape, 0, range(len(prompts))), teacher.encode(prompts=prompts), 10,
                             guidance_scale=2.0)
    assert agreement(teacher.decode(latents), prompts) >= 0.9


def test_turbo_is_one_step_of_a_generator_and_follows_prompts(pipelines):
    teacher, pipeline = load_teacher(asset_path("shapes/turbo")), pipelines["turbo"]
    pipeline.set_progress_bar_config(disable=True)
    prompts = shapes.prompt_list()[:108]
    noise = indexed_noise(teacher.shape, 0, range(len(prompts)))
    condition = teacher.encode(prompts=prompts)
    latents = pipeline(prompts, latents=noise, num_inference_steps=1, guidance_scale=0.0, output_type="latent").images
    generator = Generator.from_teacher(teacher, StudentInfo())
    with torch.no_grad():
        expected = generator(noise, condition)
    assert (latents - expected).abs().max() < 1e-5
    assert (teacher.denoise(teacher.t_max * noise, teacher.t_max, condition) - expected).abs().max() < 1e-5
    assert agreement(teacher.decode(expected), prompts) >= 0.85
