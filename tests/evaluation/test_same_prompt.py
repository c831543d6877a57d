"""Images of one prompt held against each other, and images held against the teacher's of the same noise."""

import math
from dataclasses import replace

import pytest
import torch

import flowdistill
from flowdistill.config import EvaluationConfig
from flowdistill.evaluation import Evaluator, PromptsInTurn, Reference, kernel_distance
from flowdistill.evaluation import teacher_reference as teacher_reference_module
from flowdistill.evaluation.evaluate import teacher_sampler
from flowdistill.evaluation.kept_rows import KnownSampler
from flowdistill.evaluation.metrics.diversity import diversity
from flowdistill.evaluation.metrics.paired_distance import paired_distances
from flowdistill.evaluation.moments import moments_of
from flowdistill.evaluation.opening import open_evaluation
from flowdistill.features import load_features
from flowdistill.features.scorers import Scorer
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images, to_uint8
from flowdistill.utils.randomness import indexed_noise
from tests.families import stable_diffusion
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

AXES = torch.eye(6)
BOTH = ["diversity", "paired_distance"]


def one(rows):
    return diversity(rows, torch.zeros(len(rows), dtype=torch.int64))


@pytest.mark.parametrize(("rows", "expected"), [
    (torch.ones(5, 3), 0.0),
    (AXES[:4] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], 1.0),
    (torch.stack([AXES[0], -AXES[0]]), 2.0),
    (torch.tensor([[1, 0], [0.5, math.sqrt(0.75)]], dtype=torch.float64), 0.5),
    (torch.stack([AXES[0], AXES[0], AXES[1]]), 2 / 3),
    (torch.stack([AXES[0], 0 * AXES[0]]), 1.0),
])
def test_diversity_is_the_mean_over_pairs(rows, expected):
    assert one(rows)[0] == pytest.approx(expected, abs=1e-12)


def test_diversity_is_as_written_down_pair_by_pair():
    draw = torch.Generator().manual_seed(0)
    rows, groups = torch.randn(23, 4, generator=draw, dtype=torch.float64), torch.arange(23) % 4
    cosine = torch.nn.functional.cosine_similarity
    pairs = [[1 - cosine(rows[i], rows[j], dim=0) for i in range(23) for j in range(i)
              if groups[i] == groups[j] == group] for group in range(4)]
    expected = torch.stack([torch.stack(values).mean() for values in pairs]).mean()
    value, std = diversity(rows, groups)
    assert value == pytest.approx(expected.item(), abs=1e-12)
    # The jackknife, by leaving out.
    variance = 0.0
    for group in range(4):
        mine = (groups == group).nonzero().flatten().tolist()
        left = torch.tensor([one(rows[[row for row in mine if row != out]])[0] for out in mine])
        variance += float((left - left.mean()).square().sum()) * (len(mine) - 1) / len(mine)
    assert std == pytest.approx(math.sqrt(variance) / 4, rel=1e-5)


@pytest.mark.parametrize("each", [2, 3, 8])
def test_diversity_and_its_deviation_are_those_of_many_draws(each):
    """Of normal features two are at a right angle in the mean."""
    draw = torch.Generator().manual_seed(0)
    groups = torch.arange(20 * each) % 20
    found = [diversity(torch.randn(20 * each, 3, generator=draw) + 1, groups) for _ in range(200)]
    values, stds = (torch.tensor(column) for column in zip(*found, strict=True))
    apart = torch.randn(40_000, 2, 3, generator=draw) + 1
    truth = 1 - torch.nn.functional.cosine_similarity(apart[:, 0], apart[:, 1], dim=1).mean()
    assert values.mean() == pytest.approx(truth.item(), abs=0.02)
    # A jackknife of few rows is too large by the pairs' own spread, never much too small.
    assert 0.9 < stds.square().mean().sqrt() / values.std() < (1.6 if each == 3 else 1.2)


def test_what_has_no_pair_or_no_spread_says_so():
    assert diversity(AXES, torch.arange(6)) is None
    assert one(AXES[:2]) == (1.0, None)
    assert diversity(AXES[:5], torch.tensor([0, 0, 1, 1, 2]))[1] == 0.0


def test_paired_distance_is_0_of_the_same_and_chance_of_anothers_noise():
    draw = torch.Generator().manual_seed(0)
    rows, groups = torch.randn(12, 5, generator=draw), torch.arange(12) % 3
    same, chance = paired_distances(rows, rows, groups)
    assert same.abs().max() < 1e-12 and chance == pytest.approx(diversity(rows, groups)[0], abs=1e-12)
    others = torch.randn(12, 5, generator=draw)
    distances, chance = paired_distances(rows, others, groups)
    cosines = torch.nn.functional.cosine_similarity(rows.double()[:, None], others.double()[None], dim=2)
    assert torch.allclose(distances, 1 - cosines.diagonal(), atol=1e-12)
    apart = [1 - cosines[i, j] for i in range(12) for j in range(12) if i != j and groups[i] == groups[j]]
    assert chance == pytest.approx(torch.stack(apart).mean().item(), abs=1e-12)
    assert paired_distances(AXES[:1], AXES[:1])[1] is None and paired_distances(rows, -rows)[0].mean() == 2


@pytest.fixture(scope="module")
def prompted():
    return load_teacher(stable_diffusion(), device="cpu", prompts=["a cat", "dog", "x"])


@pytest.fixture(scope="module")
def classes():
    return load_teacher(tiny_dit_pipeline(), device="cpu")


def means():
    return load_features(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()), "cpu")


def measured(teacher, folder, count=12, **settings):
    given = {"reference": "teacher", "teacher_steps": [1, 3], "more_metrics": BOTH, "batch_size": 6}
    return flowdistill.evaluate(teacher, count, features=means(), device="cpu", cache_dir=folder, progress=False,
                                **given | settings)


@pytest.mark.parametrize("kind", ["prompted", "classes"])
def test_a_teachers_own_row_is_paired_with_itself(kind, tmp_path, request):
    teacher = request.getfixturevalue(kind)
    report = measured(teacher, tmp_path)
    few, most = report.rows
    assert most.paired_distance < 1e-6 < few.paired_distance and few.paired_distance_std > 0
    # Of the same images against each other: what is between two of a prompt.
    assert most.paired_distance_of_chance == pytest.approx(most.diversity, rel=1e-5)
    assert report.protocol["paired_with"].endswith("3 calls, guidance 1, 12 samples of the same noise")
    reference = teacher_reference_module.SEED
    features = means()
    groups = torch.arange(12) % (3 if kind == "prompted" else teacher.num_classes)
    noise = indexed_noise(teacher.shape, reference, range(12))
    given = teacher.prompts.examples(range(12)) if kind == "prompted" else groups
    drawn = teacher_sampler(teacher, 3)(noise, given)
    theirs = diversity(features(to_uint8(drawn)), groups)[0]
    assert few.diversity_of_reference == most.diversity_of_reference == pytest.approx(theirs, rel=1e-3)
    text = str(report)
    assert "paired distance" in text and f"diversity of the reference: {theirs:.4f}" in text
    assert f"{few.diversity:.4f}±{few.diversity_std:.4f}" in text


@pytest.mark.parametrize("given", ["its own", "a file"])
def test_the_teachers_images_are_drawn_once_for_a_seed(prompted, tmp_path, monkeypatch, given):
    (tmp_path / "prompts.txt").write_text("\n".join(prompted.prompts.prompts))
    prompts = {"prompts": str(tmp_path / "prompts.txt")} if given == "a file" else {}
    first = measured(prompted, tmp_path, **prompts)
    with monkeypatch.context() as no_drawing:
        no_drawing.setattr(teacher_reference_module, "generate", None)
        again = measured(prompted, tmp_path, fresh=True, **prompts)
        assert again.rows[0].paired_distance == first.rows[0].paired_distance
        with pytest.raises(TypeError):
            measured(prompted, tmp_path, seed=1, reference=None, **prompts)


REFUSED = [
    (tiny_unet_pipeline, {"num_class_embeds": None, "channels": 3}, {"more_metrics": ["diversity"]},
     "several images of one prompt or label, and these images have neither"),
    (tiny_dit_pipeline, {}, {"count": 5}, "which with 5 images 3 of 4 do not have; set num_images to 8 or more"),
    (tiny_dit_pipeline, {}, {"count": 3}, "which with 3 images 4 of 4 do not have; set num_images to 8 or more"),
]


@pytest.mark.parametrize(("make", "config", "settings", "sentence"), REFUSED)
def test_too_few_images_of_a_prompt_are_refused_before_any_is_made(make, config, settings, sentence, tmp_path,
                                                                   monkeypatch):
    teacher = load_teacher(make(**config), device="cpu")
    monkeypatch.setattr(teacher_reference_module, "generate", None)
    with pytest.raises(UserError, match=sentence):
        measured(teacher, tmp_path, **settings)
    given = {"more_metrics": BOTH} | settings
    section = EvaluationConfig(num_images=given.pop("count", 12), features="torch.nn:Flatten", reference="teacher",
                               guidance_scale=1.0, **given)
    with pytest.raises(UserError, match=sentence):
        open_evaluation(section, teacher, "cpu")


def test_kid_allows_for_prompts_in_even_numbers():
    """Of two sets of one model, each with the same prompts as often, a KID would be far below 0 otherwise."""
    features = means()

    def sampler(noise, given):
        return (given[:, None, None, None] / 12 + 0.02 * noise).clamp(0, 1)

    def drawn(seed):
        evaluator = Evaluator(features, reference, 48, seed, 48, progress=False)
        prompts = PromptsInTurn(lambda indices: torch.tensor([i % 12 for i in indices]), [f"p{i}" for i in range(12)])
        return evaluator.measure(sampler, (3, 8, 8), condition=prompts)

    images = sampler(torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 12)
    rows = features(to_uint8(images))
    moments = moments_of(rows)
    plain = Reference("some", moments.mean, moments.covariance, 48, rows)
    reference = replace(plain, groups=torch.arange(48) % 12)
    made = sampler(indexed_noise((3, 8, 8), 5, range(48)), torch.arange(48) % 12)
    without = kernel_distance(features(to_uint8(made)), rows, 5)
    assert without < 0 and abs(drawn(5).kid) < 0.1 * abs(without)


def test_without_a_teacher_nothing_is_paired(classes, tmp_path):
    save_images(torch.rand(4, 3, 8, 8), tmp_path / "images")
    sentence = "'paired_distance' compares with what the teacher makes of the same noise, and there is no teacher here"
    with pytest.raises(UserError, match=sentence):
        measured([classes, classes], tmp_path, reference=str(tmp_path / "images"))
    with pytest.raises(UserError, match=sentence):
        Evaluator(means(), None, 4, more_metrics=["paired_distance"], progress=False)


def test_a_run_is_opened_without_drawing_them(prompted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(teacher_reference_module, "generate", None)
    section = EvaluationConfig(num_images=6, features="torch.nn:Flatten", reference="teacher", teacher_steps=[1],
                               more_metrics=BOTH)
    assert open_evaluation(section, prompted, "cpu").reference is None


def test_more_figures_change_no_key_of_rows_without_them(prompted):
    def key(**settings):
        evaluator = Evaluator(means(), None, 6, metrics=("accuracy",), device="cpu", progress=False, **settings)
        sampler = KnownSampler(teacher_sampler(prompted, 1), lambda: "known")
        return evaluator.row_key(sampler, (1,), None, PromptsInTurn(lambda indices: None, ["x"]))

    own = Scorer("own", "own", lambda images, prompts: images.float().mean((1, 2, 3)), hash="0" * 64)
    assert key() == key(scorers=()) != key(scorers=[own]) is not None
    unhashed = Scorer("own", "own", own.score)
    assert key(scorers=[unhashed]) is None
