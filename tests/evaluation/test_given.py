"""What will be measured is known before anything is made: by what a run may be stopped is checked before it begins."""

import dataclasses

import pytest
import torch

from flowdistill import load_teacher
from flowdistill.config import EvaluationConfig
from flowdistill.evaluation import Evaluator, evaluate
from flowdistill.evaluation.evaluate import first_image, teacher_sampler
from flowdistill.evaluation.metrics import all_metrics
from flowdistill.evaluation.opening import open_evaluation
from flowdistill.evaluation.reference import Reference
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.utils.errors import UserError
from tests.tiny import tiny_unet_pipeline

RANKING = [kind for kind in all_metrics() if kind.better and kind.needs_features and not kind.needs_teacher]
"""Scores of prompts have figures of their own, and tests of their own."""
FULL = FeatureExtractor(
    "full", None, lambda images: images.flatten(1)[:, :4], lambda images: images.float() / 255,
    classifier=lambda images: images.flatten(1)[:, :10], logits=lambda features: features, embeds=True,
    spatial=lambda images: (images.flatten(1)[:, :4], images.flatten(1)[:, 4:7]), mode="legacy_tensorflow",
    distance="FID",
)
KINDS = {
    "all that features can be": FULL,
    "patches": dataclasses.replace(FULL, patches=True),
    "only features": dataclasses.replace(FULL, classifier=None, logits=None, embeds=False, spatial=None, mode=""),
    "not Inception's": dataclasses.replace(FULL, distance="FD-lite0"),
}


def reference_of(extractor, features=True, spatial=True):
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    values, places = extractor.with_spatial(images)
    known = {} if places is None or not spatial else {
        "spatial_mean": places.double().mean(0), "spatial_covariance": places.double().T.cov()}
    kept = values if features else None
    return Reference("some", values.double().mean(0), values.double().T.cov(), 40, features=kept, **known)


@pytest.fixture(scope="module")
def teachers():
    labelled, plain = tiny_unet_pipeline(num_class_embeds=10), tiny_unet_pipeline()
    return {"labels": load_teacher(labelled), "none": load_teacher(plain)}


@pytest.mark.parametrize("name", ["reference", "features", "prompts", "protocol", "weights", "cache_dir", "json",
                                  "html", "solver"])
def test_an_empty_text_is_none_of_evaluates_arguments(name):
    """Of a path it would be the working folder, and of others what is not given."""
    with pytest.raises(UserError, match=f"^{name} is an empty text; give one, or leave it out$"):
        evaluate("nowhere", **{name: ""})


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("labels", ["labels", "none"])
@pytest.mark.parametrize("held", ["images", "moments", "no places"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_knows_before_which_figures_it_will_have(teachers, kind, held, labels, count):
    teacher, extractor = teachers[labels], KINDS[kind]
    reference = reference_of(extractor, held == "images", held != "no places")
    named = [one.name for one in RANKING if one.applies(extractor)]
    evaluator = Evaluator(extractor, reference, count, metrics=named, device="cpu", progress=False)
    sampler = teacher_sampler(teacher, 1)
    figures = evaluator.measure(sampler, tuple(teacher.shape), teacher.num_classes).figures
    image = first_image(teacher, sampler)
    assert len(evaluator.metrics) == len(named)
    for metric in RANKING:
        if metric.applies(extractor):
            measured = {name for name in metric.better if figures.get(name) is not None}
            assert set(evaluator.given(metric, image, teacher.num_classes, None)) == measured, metric.name


REFUSED = {
    "of other features": ("fid", "not Inception's", "do not have .*; these have fd; choose"),
    "not of these": ("fd", "only features", "do not have .*; these have fid; choose"),
    "no classifier": ("accuracy", "only features", "accuracy, which 12 images .* do not have with the features"),
    "does not apply": ("cmmd", "only features", "the metric 'cmmd' cannot be measured with the features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_be_stopped_by_its_figure_does_not_begin(teachers, case, monkeypatch):
    figure, kind, sentence = REFUSED[case]
    extractor, settings = KINDS[kind], EvaluationConfig(num_images=12, features="some", reference="some")
    monkeypatch.setattr("flowdistill.evaluation.opening.open_reference",
                        lambda *given, **named: (extractor, reference_of(extractor)))
    with pytest.raises(UserError, match=sentence):
        open_evaluation(settings, teachers["labels"], "cpu", ranking=figure, key="train.stop_when.metric")
    assert open_evaluation(settings, teachers["labels"], "cpu", ranking="recall").reference is not None
