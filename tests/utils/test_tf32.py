"""What is kept on disk does not depend on a run's TF32, or is kept under it."""

import pytest
import torch

from flowdistill.features import extractor
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.latent_bank import one_by_one
from flowdistill.teachers.pairs import teacher_facts
from flowdistill.utils.tf32 import OWN, SWITCHES, as_torch_has_it, tf32, tf32_facts
from tests.families import FAMILIES
from tests.tiny import tiny_dit_pipeline


def now():
    return tuple(switch.allow_tf32 for switch in SWITCHES)


@pytest.fixture(params=[None, True, False])
def of_a_run(request):
    with as_torch_has_it(), tf32(request.param):
        yield request.param
        assert now() == (OWN if request.param is None else (request.param,) * 2)


def test_prompts_and_latents_are_encoded_as_torch_has_it(tmp_path, monkeypatch, of_a_run):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []
    teacher = load_teacher(FAMILIES["sd"].make())
    family = type(teacher.prompts.family)
    encode, encoder = family.encode, type(teacher.codec.vae).encode
    monkeypatch.setattr(family, "encode", lambda *given: seen.append(now()) or encode(*given))
    monkeypatch.setattr(type(teacher.codec.vae), "encode", lambda *given: seen.append(now()) or encoder(*given))
    teacher.encode(prompts=["a cat"])
    one_by_one(teacher, torch.zeros(1, 3, 16, 16))
    assert seen == [OWN, OWN]


def test_features_are_computed_without(of_a_run):
    with extractor.precise(torch.device("cpu")):
        assert now() == (False, False)


def test_samples_of_a_teacher_are_kept_under_it(monkeypatch, of_a_run):
    teacher = load_teacher(tiny_dit_pipeline(layers=1))
    plain = teacher_facts(teacher, 1)
    assert tf32_facts(teacher.device) == []
    monkeypatch.setattr(Teacher, "device", property(lambda self: torch.device("cuda")))
    assert (teacher_facts(teacher, 1) == plain) == (of_a_run is None)
