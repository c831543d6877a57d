"""Schedulers as pipeline folders have them: what cannot be made of one is one sentence."""

import json

import pytest
from diffusers import DDPMScheduler, EDMEulerScheduler

from flowdistill.paths.schedulers import load_scheduler, make_scheduler, path_from_scheduler
from flowdistill.utils.errors import UserError


@pytest.mark.parametrize("kind", [DDPMScheduler, EDMEulerScheduler])
def test_a_saved_scheduler_is_read_as_it_was(kind, tmp_path):
    saved = kind(num_train_timesteps=77)
    saved.save_pretrained(tmp_path)
    found = load_scheduler(tmp_path)
    assert type(found) is kind and found.config.num_train_timesteps == 77
    assert {k: v for k, v in found.config.items() if k[0] != "_"} == {
        k: v for k, v in saved.config.items() if k[0] != "_"}


@pytest.mark.parametrize(("config", "words"), [
    ({"_class_name": "MyScheduler"}, "names the scheduler 'MyScheduler', which diffusers does not have"),
    ({"_class_name": "UNet2DModel"}, "names the scheduler 'UNet2DModel', which"),
    ({"_class_name": "utils"}, "names the scheduler 'utils', which"),
    ({"_class_name": ["DDPMScheduler"]}, "names the scheduler ['DDPMScheduler'], which"),
    ({"_class_name": None}, "names the scheduler None, which"), ({}, "names the scheduler '', which"),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "nope"}, "of which no DDPMScheduler can be made: nope"),
    ({"_class_name": "DDPMScheduler", "num_train_timesteps": "many"}, "of which no DDPMScheduler can be made: "),
    ({"_class_name": "DDPMScheduler", "trained_betas": {}}, "of which no DDPMScheduler can be made: "),
])
def test_what_is_no_scheduler_is_one_sentence(config, words, tmp_path):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_scheduler(tmp_path)
    assert str(caught.value).startswith(f"{file} ") and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_scheduler_that_needs_a_package_names_it(monkeypatch):
    def away(config):
        raise ImportError("\nSomeScheduler requires the torchsde library\nbut it was not found.\n")

    monkeypatch.setattr(DDPMScheduler, "from_config", away)
    with pytest.raises(UserError, match="x names a scheduler that cannot be used here: SomeScheduler requires"):
        make_scheduler({"_class_name": "DDPMScheduler"}, "x")


@pytest.mark.parametrize(("values", "words"), [
    ({"num_train_timesteps": 0}, "0 noise levels for 0 timesteps"),
    ({"num_train_timesteps": 1}, "1 noise levels for 1 timesteps"),
    ({"trained_betas": [0.1, 0.2]}, "2 noise levels for 1000 timesteps"),
    ({"beta_end": float("nan")}, "1000 noise levels for 1000 timesteps; there must be a finite one for each"),
])
def test_a_table_of_noise_levels_that_is_none_is_one_sentence(values, words):
    with pytest.raises(UserError, match=f"DDPMScheduler has {words}"):
        path_from_scheduler(DDPMScheduler(**values))
