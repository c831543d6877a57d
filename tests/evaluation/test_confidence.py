"""The deviation beside a figure is that over other images of the same model; FID without the bias of few images."""

import json
import math

import numpy as np
import pytest
import torch

from flowdistill import UserError
from flowdistill.evaluation import Evaluator, Reference, Report, Row
from flowdistill.evaluation.collect import Collected
from flowdistill.evaluation.confidence import binomial_std, frechet_std, mean_std
from flowdistill.evaluation.metrics import METRICS, MeasuredImages
from flowdistill.evaluation.metrics.frechet_at_infinity import FrechetAtInfinity, subset_sizes
from flowdistill.evaluation.metrics.kernel import _std, _subsets_distance
from flowdistill.evaluation.moments import frechet_distance, moments_of
from flowdistill.features import load_features

SIZE, COUNT, SEEDS = 6, 400, 60
SHIFTS = torch.tensor([[0.0] * SIZE, [3.0] * SIZE])  # of two classes, further apart than their own spread


def drawn(seed: int, scale: float = 1.3, shift: float = 0.3, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images of two classes in turn."""
    generator = torch.Generator().manual_seed(1_000_003 * seed)
    classes = torch.arange(count) % 2
    return torch.randn(count, SIZE, generator=generator) * scale + shift + SHIFTS[classes], classes


def reference_of(features: torch.Tensor) -> Reference:
    moments = moments_of(features)
    return Reference("these", moments.mean, moments.covariance, len(features), features)


def measured(metric: str, seed: int, reference: Reference, by_class: bool = True, count: int = COUNT) -> dict:
    features, classes = drawn(seed, count=count)
    collected = Collected(moments_of(features), features, torch.arange(count), None, 0)
    return METRICS.get(metric)().measure(MeasuredImages(collected, classes=classes if by_class else None), reference)


@pytest.mark.parametrize(("metric", "figure"), [("frechet", "fid"), ("kernel", "kid")])
def test_the_deviation_is_that_over_other_noise(metric, figure):
    """Within classes: what is known of the labels is no chance, and would double the deviation."""
    reference = reference_of(drawn(0, 1.0, 0.0)[0])
    rows = [measured(metric, seed, reference) for seed in range(1, SEEDS + 1)]
    over_seeds = np.std([row[figure] for row in rows], ddof=1)
    stated = np.array([row[f"{figure}_std"] for row in rows])
    assert stated.mean() == pytest.approx(over_seeds, rel=4 / math.sqrt(2 * SEEDS))
    assert stated.std() < 0.2 * stated.mean()
    assert measured(metric, 1, reference, by_class=False)[f"{figure}_std"] > 1.5 * over_seeds


def test_it_is_what_the_bootstrap_comes_to():
    features = drawn(1)[0].double()
    reference = reference_of(drawn(0, 1.0, 0.0)[0])
    moments, generator, found = moments_of(features), torch.Generator().manual_seed(0), []
    for _ in range(200):
        chosen = moments_of(features[torch.randint(COUNT, (COUNT,), generator=generator)])
        found.append(frechet_distance(chosen.mean, chosen.covariance, reference.mean, reference.covariance))
    stated = frechet_std(features, moments.mean, moments.covariance, reference.mean, reference.covariance, COUNT)
    assert stated == pytest.approx(np.std(found, ddof=1), rel=0.2)


def test_of_some_kept_rows_it_is_nearly_the_same():
    (features, classes), reference = drawn(1, count=2000), reference_of(drawn(0, 1.0, 0.0)[0])
    moments = moments_of(features)
    given = (moments.mean, moments.covariance, reference.mean, reference.covariance, 2000)
    whole, part = (frechet_std(features[:rows], *given, classes[:rows]) for rows in (2000, 700))
    assert part == pytest.approx(whole, rel=0.15)
    whole, part = (_std(features[:rows], reference.features, 2000, classes[:rows]) for rows in (2000, 700))
    assert part == pytest.approx(whole, rel=0.25)
    # No more images than features: the covariance is singular, and there is nothing to say.
    assert frechet_std(features[:6], *given[:4], 6) is None


def test_the_choice_of_subsets_is_part_of_the_kernel_distances():
    reference = reference_of(drawn(0, 1.0, 0.0, count=1100)[0])
    features, classes = drawn(1, count=1100)
    whole = _std(features, reference.features, 1100, classes)
    choice = _subsets_distance(features, reference.features, 0)[1]
    assert choice > 0
    assert measured("kernel", 1, reference, count=1100)["kid_std"] == pytest.approx(math.hypot(whole, choice), rel=1e-9)


def test_shares_are_binomial():
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(4000, 200, generator=generator) < 0.8
    assert binomial_std(0.8, 200) == pytest.approx(hits.float().mean(1).std().item(), rel=0.05)
    assert 0 < binomial_std(1.0, 100) < 0.02 and binomial_std(1.0, 100) == pytest.approx(binomial_std(0.0, 100))
    assert mean_std(torch.tensor([1.0, 2.0, 3.0]), 3, torch.tensor([0, 1, 2])) == mean_std(
        torch.tensor([1.0, 2.0, 3.0]), 3) == pytest.approx(1 / math.sqrt(3))


def test_a_table_and_a_report_have_it_and_older_reports_do_without(tmp_path):
    evaluator = Evaluator("digits", "digits", 90, cache_dir=tmp_path, progress=False)
    row = evaluator.measure(lambda noise, labels: noise / 3 + 0.5, (1, 8, 8), num_classes=10)
    assert all(0 < row.figures[f"{name}_std"] for name in ("fid", "kid", "precision", "recall", "accuracy"))
    report = evaluator.report([row])
    cells = str(report).splitlines()[2].split()
    assert cells[2] == f"{row.fid:.3f}±{row.fid_std:.3f}" and cells[3].count("±") == 1 and len(cells) == 8
    assert cells[6] == f"{row.accuracy:.2%}±{row.accuracy_std:.2%}"
    assert "\n90 images are few: FID is higher with fewer images" in str(report)
    assert "note" not in evaluator.protocol(1001) and "few" in evaluator.protocol(1000)["note"]
    assert report.protocol["confidence"].startswith("one standard deviation over the images, the reference fixed")
    report.write_json(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["rows"][0]["fid_std"] == row.fid_std and Report.read_json(tmp_path / "report.json") == report
    values["rows"] = [{"model": "student", "calls": 1, "fid": 2.0, "images_per_second": None}]
    (tmp_path / "report.json").write_text(json.dumps(values))
    old = Report.read_json(tmp_path / "report.json")
    assert old.rows == [Row("student", 1, fid=2.0)] and old.rows[0].fid_std is None
    assert str(old).splitlines()[2].split()[2] == "2.000"


def test_fid_at_infinity_is_that_of_many_images():
    reference = reference_of(drawn(0, 1.0, 0.0)[0])
    many = moments_of(drawn(9, count=200_000)[0])
    truth = frechet_distance(many.mean, many.covariance, reference.mean, reference.covariance)
    rows = [{} for _ in range(SEEDS)]
    for seed, row in enumerate(rows, 1):
        for metric in ("frechet", "frechet_at_infinity"):
            row |= measured(metric, seed, reference, count=500)
    means = {name: np.mean([row[name] for row in rows]) for name in ("fid", "fid_infinity", "fid_infinity_std")}
    spread = np.std([row["fid_infinity"] for row in rows], ddof=1)
    error = spread / math.sqrt(SEEDS)
    assert means["fid"] > truth + 3 * error and abs(means["fid_infinity"] - truth) < 2 * error
    assert means["fid_infinity_std"] == pytest.approx(spread, rel=0.4)
    assert subset_sizes(50_000, 2048) == np.round(np.linspace(5000, 50_000, 15)).tolist()
    assert subset_sizes(10_000, 2048)[0] == 4096 and subset_sizes(4000, 2048) == []


def test_it_is_measured_only_where_it_is_asked_for(tmp_path, cli):
    noise = lambda given, labels: given / 3 + 0.5  # noqa: E731
    settings = {"num_images": 400, "cache_dir": tmp_path, "progress": False}
    asked = Evaluator("digits", "digits", **settings, more_metrics=["frechet_at_infinity"])
    report = asked.report([asked.measure(noise, (1, 8, 8))])
    assert 0 < report.rows[0].fid_infinity < report.rows[0].fid
    assert str(report).splitlines()[0].split("FID at infinity")[0].split() == ["model", "calls", "FID", "↓"]
    assert "a line in 1 / N" in report.protocol["fid_infinity"]
    assert FrechetAtInfinity not in {type(metric) for metric in Evaluator("digits", "digits", **settings).metrics}
    with pytest.raises(UserError, match="there is no metric 'frechet_at_infinty' .did you mean 'frechet_at_infinity'"):
        Evaluator(load_features("digits", "cpu"), "digits", more_metrics=["frechet_at_infinty"])
