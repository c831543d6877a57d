"""A teacher's own samples as the reference."""

import pytest
import torch

import flowdistill
from flowdistill.config import EvaluationConfig, RunConfig, TrainConfig
from flowdistill.evaluation import load_reference
from flowdistill.evaluation.evaluate import is_teacher, open_reference, teacher_sampler
from flowdistill.evaluation.kept_rows import TeacherIdentity
from flowdistill.evaluation.opening import open_evaluation
from flowdistill.evaluation.teacher_reference import SEED, teacher_reference
from flowdistill.features import load_features
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8
from flowdistill.utils.randomness import indexed_noise
from tests.tiny import tiny_dit_pipeline


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(tiny_dit_pipeline(), device="cpu")


FEATURES = load_features(torch.nn.AdaptiveAvgPool2d(1), "cpu")
SETTINGS = {"num_images": 8, "teacher_steps": (1, 2), "solver": "euler", "guidance_scale": 1.0, "batch_size": 3}


def opened(teacher, folder, **settings):
    return open_reference(FEATURES, "teacher", teacher, SETTINGS | settings, "cpu", cache_dir=folder, progress=False)[1]


def test_it_is_the_samples_of_other_noise_at_the_most_steps(teacher, tmp_path):
    reference = opened(teacher, tmp_path)
    labels = torch.arange(8) % teacher.num_classes
    images = teacher_sampler(teacher, 2)(indexed_noise(teacher.shape, SEED, range(8)), labels)
    assert torch.allclose(reference.features, FEATURES(to_uint8(images)), atol=0.02)
    assert torch.equal(reference.labels, labels) and reference.count == 8
    assert reference.name == "teacher, euler, 2 calls, guidance 1, 8 samples of other noise"
    assert load_reference(reference, FEATURES) is reference


def test_it_is_drawn_once_for_what_decides_it(teacher, tmp_path, monkeypatch):
    first = opened(teacher, tmp_path)
    with monkeypatch.context() as no_drawing:
        no_drawing.setattr("flowdistill.evaluation.teacher_reference.generate", None)
        assert torch.equal(opened(teacher, tmp_path).features, first.features)
        assert opened(teacher, tmp_path, batch_size=8).count == 8  # decides nothing
        for other in ({"num_images": 9}, {"teacher_steps": (3,)}, {"solver": "heun"}, {"guidance_scale": 2.0}):
            with pytest.raises(TypeError):
                opened(teacher, tmp_path, **other)
    damaged = next(tmp_path.glob("teacher-*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert torch.equal(opened(teacher, tmp_path).features, first.features)


def test_evaluate_measures_against_it(teacher, tmp_path):
    report = flowdistill.evaluate(teacher, 24, "teacher", FEATURES, (1, 12), cache_dir=tmp_path, device="cpu",
                                  batch_size=24, progress=False)
    one, most = report.rows
    assert most.fid < one.fid  # the row at as many steps is the floor
    assert report.reference.startswith("teacher, euler, 12 calls") and most.fid > 0
    with pytest.raises(UserError, match="'teacher' is one model's own; evaluate models one by one"):
        flowdistill.evaluate([teacher, teacher], 24, "teacher", FEATURES, (1,), device="cpu", progress=False)
    with pytest.raises(UserError, match="there is no teacher here"):
        open_reference(FEATURES, "teacher", None, SETTINGS)
    with pytest.raises(UserError, match="at least 2 images"):
        opened(teacher, tmp_path, num_images=1)


def test_samples_that_are_not_finite_are_no_reference(teacher):
    with pytest.raises(UserError, match="not finite"):
        teacher_reference(teacher, lambda noise, given: noise[:, :1] * torch.nan, "nowhere", FEATURES, 4, 2)


def test_a_teacher_with_prompts_is_its_own_reference(teacher):
    class Prompted:
        prompts = object()

    assert is_teacher(None, Prompted()) and is_teacher("teacher", teacher) and is_teacher("teacher", None)
    assert not is_teacher(None, teacher) and not is_teacher("digits", Prompted()) and not is_teacher(None, None)
    assert not is_teacher("teachers", Prompted())


def test_a_run_opens_it_at_the_scale_that_it_knows(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = EvaluationConfig(num_images=4, features="torch.nn:Flatten", reference="teacher", teacher_steps=[1])
    assert open_evaluation(settings, teacher, "cpu").reference is None  # the student's scale comes with the student
    settings.guidance_scale = 2.0
    assert "guidance 2, 4 samples" in open_evaluation(settings, teacher, "cpu").reference.name
    settings.guidance_scale = None
    config = RunConfig(output_dir="run", train=TrainConfig(evaluate_every=5), evaluation=settings)
    with pytest.raises(UserError, match="set evaluation.guidance_scale as well"):
        config.validate()


def test_its_identity_is_that_of_the_weights(teacher):
    sampler = TeacherIdentity(teacher).known(teacher_sampler(teacher, 2), "teacher", 2, "euler", 1.0)
    other = load_teacher(tiny_dit_pipeline(layers=1), device="cpu")
    changed = TeacherIdentity(other).known(teacher_sampler(other, 2), "teacher", 2, "euler", 1.0)
    assert sampler.identity() != changed.identity()
