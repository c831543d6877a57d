"""Scores of images with their prompts in an evaluation: rows, table, page, cache and processes."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import flowdistill
from flowdistill.config import EvaluationConfig, RunConfig, StopConfig, TrainConfig
from flowdistill.evaluation import Evaluator, PromptsInTurn, Reference, Report, evaluate_models
from flowdistill.evaluation.kept_rows import KnownSampler
from flowdistill.evaluation.moments import moments_of
from flowdistill.features import load_features
from flowdistill.features.scorers import Scorer, load_scorers
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import load_teacher
from flowdistill.training.callbacks import FidCallback
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images, to_uint8
from flowdistill.utils.randomness import indexed_noise
from tests.families import stable_diffusion
from tests.features.clips import tiny_clip
from tests.scripts.test_evaluate_fid import evaluate_fid
from tests.tiny import tiny_unet_pipeline

PROMPTS = ["a cat", "dog", "x"]
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tiny_clip(folder, 5)
    return folder


def sampler(noise, given):
    return torch.sigmoid(noise)


def in_turn(prompts=PROMPTS):
    return PromptsInTurn(lambda indices: None, list(prompts))


def scored(folder, count=10, prompts=PROMPTS, **settings):
    evaluator = Evaluator(None, None, count, 5, 4, scorers=[f"clip:{folder}"], device="cpu", progress=False, **settings)
    return evaluator, evaluator.measure(sampler, SHAPE, condition=in_turn(prompts))


def by_hand(folder, count=10, prompts=PROMPTS):
    (scorer,) = load_scorers([f"clip:{folder}"], "cpu")
    images = to_uint8(sampler(indexed_noise(SHAPE, 5, range(count)), None))
    return scorer(images, [prompts[index % len(prompts)] for index in range(count)]).double()


def test_every_image_is_scored_with_its_prompt_without_features(clip):
    evaluator, row = scored(clip)
    scores = by_hand(clip)
    assert row.clip_score == pytest.approx(max(scores.mean().item(), 0), abs=1e-3)
    # One deviation of the mean, within prompts: which prompts there are is no chance.
    squares = sum(scores[first::3].var() * len(scores[first::3]) for first in range(3))
    assert row.clip_score_std == pytest.approx(math.sqrt(squares / 10 / 10), abs=1e-3)
    report = evaluator.report([row])
    assert report.num_images == 10 and "nothing but speed and what the scorers say is measured" in str(report)
    facts = report.protocol["scorers"]["clip_score"]
    assert facts["weights_sha256"] == evaluator.scorers[0].hash and facts["score"] == "max(100 x mean cosine, 0)"
    assert f"{row.clip_score:.3f}±{row.clip_score_std:.3f}" in str(report) and "CLIP score" in str(report)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).rows == [row]


def test_a_prompt_twice_in_the_list_is_one_prompt(clip):
    prompts = ["x", "x", "dog"]
    scores = by_hand(clip, 12, prompts)
    groups = [[scores[index] for index in range(12) if prompts[index % 3] == prompt] for prompt in ("x", "dog")]
    expected = math.sqrt(sum(torch.stack(group).var() * len(group) for group in groups) / 12 / 12)
    assert scored(clip, 12, prompts)[1].clip_score_std == pytest.approx(expected, abs=1e-3)


def test_the_deviation_is_that_over_other_noise():
    draw = Scorer("own", "own", lambda images, prompts: images.float().mean((1, 2, 3)) + 50 * torch.tensor(
        [PROMPTS.index(prompt) for prompt in prompts]))
    rows = []
    for seed in range(40):
        evaluator = Evaluator(None, None, 30, seed, 30, scorers=[draw], progress=False)
        rows.append(evaluator.measure(sampler, SHAPE, condition=in_turn()))
    found = torch.tensor([row.own for row in rows])
    stated = torch.tensor([row.own_std for row in rows]).mean()
    assert 0.75 < found.std() / stated < 1.3 and found.std() < 5  # between prompts, it is 41


def test_scores_stand_beside_the_other_figures_and_change_none(clip):
    extractor = load_features(torch.nn.AdaptiveAvgPool2d(1), "cpu")
    images = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(0))
    features = extractor(to_uint8(images))
    moments = moments_of(features)
    reference = Reference("some", moments.mean, moments.covariance, 12, features)
    plain = Evaluator(extractor, reference, 10, 5, 4, progress=False).measure(sampler, SHAPE, condition=in_turn())
    evaluator = Evaluator(extractor, reference, 10, 5, 4, scorers=[f"clip:{clip}"], device="cpu", progress=False)
    report = evaluate_models([("student", 1, sampler)], SHAPE, None, evaluator, in_turn())
    (row,) = report.rows
    alone = scored(clip)[1]
    assert row.figures == plain.figures | alone.figures and plain.fid is not None


def test_a_kept_row_is_of_the_scorers_too(clip, tmp_path):
    made = []

    def counted(noise, given):
        made.append(len(noise))
        return sampler(noise, given)

    def measure(*names):
        evaluator = Evaluator(load_features(torch.nn.AdaptiveAvgPool2d(1), "cpu"), None, 10, 5, 10, scorers=names,
                              metrics=("accuracy",), device="cpu", cache_dir=tmp_path / "cache", progress=False)
        return evaluator.measure(KnownSampler(counted, lambda: "known"), SHAPE, condition=in_turn())

    first = measure(f"clip:{clip}")
    assert measure(f"clip:{clip}").figures == first.figures and made == [10]
    shutil.copytree(clip, tmp_path / "moved")
    assert measure(f"clip:{tmp_path / 'moved'}").figures == first.figures and made == [10]
    tiny_clip(tmp_path / "other", 9)
    assert measure(f"clip:{tmp_path / 'other'}").clip_score != first.clip_score and made == [10, 10]
    assert measure(f"clip:{clip}", f"pickscore:{clip}").pickscore is not None and made == [10] * 3


@pytest.fixture(scope="module")
def prompted():
    return load_teacher(stable_diffusion(), device="cpu", prompts=PROMPTS)


def test_evaluate_scores_a_teacher_and_writes_it(clip, prompted, tmp_path):
    report = flowdistill.evaluate(prompted, 6, teacher_steps=[1, 2], scorers=[f"clip:{clip}", f"hpsv2:{clip}"],
                                  device="cpu", batch_size=3, json=tmp_path / "r.json", html=tmp_path / "r.html",
                                  cache_dir=tmp_path, progress=False)
    assert [row.calls for row in report.rows] == [1, 2] and all(row.hpsv2_std > 0 for row in report.rows)
    written = json.loads((tmp_path / "r.json").read_text())
    assert [row["hpsv2"] for row in written["rows"]] == [row.hpsv2 for row in report.rows]
    page = (tmp_path / "r.html").read_text()
    assert "HPSv2 x 100" in page and f"{100 * report.rows[0].hpsv2:.3f}±" in page
    assert report.protocol["scorers"]["hpsv2"]["weights_sha256"] in page
    other = load_teacher(stable_diffusion(), device="cpu", prompts=PROMPTS, t_max=0.9)
    several = flowdistill.evaluate([prompted, other], 6, teacher_steps=[1], scorers=[f"clip:{clip}"], device="cpu",
                                   cache_dir=tmp_path, progress=False)
    assert [row.clip_score is None for row in several.rows] == [False, False]


def test_images_without_prompts_are_refused_in_a_sentence(clip, prompted, tmp_path):
    plain = load_teacher(tiny_unet_pipeline(channels=3), device="cpu")
    save_images(torch.rand(4, 3, 8, 8), tmp_path / "images")
    sentence = "scorers .clip_score. say how well images fit their prompts, and these have none; leave evaluation.scor"
    for source in (plain, [plain, plain], [prompted, tmp_path / "images"]):
        with pytest.raises(UserError, match=sentence):
            flowdistill.evaluate(source, 4, tmp_path / "images", torch.nn.AdaptiveAvgPool2d(1), teacher_steps=[1],
                                 scorers=[f"clip:{clip}"], device="cpu", cache_dir=tmp_path, progress=False)
    with pytest.raises(UserError, match="'prompt_scores' is what scorers say, and none is named; set"):
        Evaluator(None, None, more_metrics=["prompt_scores"])


def test_images_that_are_not_finite_have_no_score(clip):
    evaluator = Evaluator(None, None, 4, scorers=[f"clip:{clip}"], device="cpu", progress=False)
    with pytest.warns(UserWarning, match="not finite"):
        row = evaluator.measure(lambda noise, given: noise * torch.nan, SHAPE, condition=in_turn())
    assert row.clip_score is None



def test_the_command_and_the_script_score_a_student_and_a_pipeline(clip, prompted, tmp_path, cli, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stable_diffusion().save_pretrained(tmp_path / "teacher")
    FlowMap.from_teacher(prompted, StudentInfo(base_model=str(tmp_path / "teacher"))).save(tmp_path / "student")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ("--prompts", tmp_path / "prompts.txt", "--num-images", 6, "--scorers", f"clip:{clip},hpsv2:{clip}",
             "--batch-size", 6, "--device", "cpu")
    result = cli("evaluate", tmp_path / "student", *given, "--teacher-steps", 2, "--json", tmp_path / "r.json")
    assert result.code == 0 and "CLIP score" in result.out, result.err
    teacher, student = Report.read_json(tmp_path / "r.json").rows
    assert (teacher.model, student.model) == ("teacher", "student") and teacher.hpsv2 != student.hpsv2
    assert teacher.hpsv2_std > 0 < student.hpsv2_std and teacher.clip_score is not None is not student.clip_score
    save_images(torch.rand(4, 3, 16, 16), tmp_path / "images")
    script = ["--features", "torch.nn:Flatten", "--reference", tmp_path / "images", *given, "--steps", 2]
    assert evaluate_fid.main([str(word) for word in (tmp_path / "teacher", *script)]) == 0
    assert "HPSv2 x 100" in capsys.readouterr().out
    script[4:] = ["--scorers", f"clip:{clip}"]
    assert evaluate_fid.main([str(word) for word in (tmp_path / "images", *script)]) == 2
    assert "how well images fit their prompts, and these have none" in capsys.readouterr().err


def test_a_run_may_stop_by_a_score(clip, prompted):
    """The scorers are loaded for the measurements during training where these are asked for one, and else not."""
    settings = EvaluationConfig(num_images=3, features="torch.nn:Flatten", reference="images", scorers=[f"clip:{clip}"])
    images = torch.rand(4, 3 * 16 * 16)
    moments = moments_of(images)
    reference = Reference("some", moments.mean, moments.covariance, 4)
    student = FlowMap.from_teacher(prompted, StudentInfo())
    for stop, measured in ((StopConfig("clip_score"), True), (None, False)):
        config = RunConfig(output_dir="run", train=TrainConfig(evaluate_every=5, stop_when=stop), evaluation=settings)
        found = FidCallback(config, SimpleNamespace(device=torch.device("cpu")), reference)(student)
        assert ("clip_score" in found) == measured and found["fid"] is not None
