"""``flowdistill cache`` and ``plan`` of the images that a method names."""

import json
import sys
import time

import pytest
import torch

from flowdistill.conditioning import prompt_bank
from flowdistill.conditioning.prompt_bank import DiskBank
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.config import DataOptions, load_config
from flowdistill.methods.msd.settings import AdversarialStage, MsdConfig
from flowdistill.methods.score_distillation import Dmd2Config
from flowdistill.plan.images import Images, images_of
from flowdistill.teachers import latent_bank, load_teacher
from flowdistill.teachers.latent_bank import picture_size
from flowdistill.teachers.real_data import RealData
from flowdistill.utils.randomness import Draw
from tests.data import stored
from tests.families import FAMILIES, PROMPTS
from tests.processes import Child, environment, ranks
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

PIPELINES = {"prompts": lambda: FAMILIES["sd"].make(), "latents": lambda: tiny_dit_pipeline(layers=1),
             "pixels": lambda: tiny_unet_pipeline(num_class_embeds=4)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(path, kind, **options):
    """A configuration with images of a folder."""
    path.mkdir(parents=True, exist_ok=True)
    pipeline = PIPELINES[kind]()
    pipeline.save_pretrained(path / "pipeline")
    images, labels = stored.few(picture_size(load_teacher(pipeline)))
    folder = stored.write("jsonl", path / "photos", images, labels)
    teacher = {"source": str(path / "pipeline")}
    if kind == "prompts":
        (path / "p.txt").write_text("\n".join(PROMPTS))
        teacher |= {"prompts": str(path / "p.txt")}
    file = path / "c.yaml"
    file.write_text(json.dumps({
        "output_dir": str(path / "run"), "teacher": teacher, "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
        "method": {"name": "dmd2", "adversarial_weight": 0.1, "data": str(folder), "data_options": options}}))
    return file


def latents(path):
    return {file.name: file.read_bytes() for file in sorted((path / "flowdistill" / "latents").rglob("shard-*"))}


@pytest.mark.parametrize("mode", ["auto", "disk", "memory"])
@pytest.mark.parametrize("kind", ["prompts", "latents"])
def test_a_cached_run_encodes_nothing(tmp_path, cli, monkeypatch, kind, mode):
    """Nor does the command that fills the cache load a network."""
    config = written(tmp_path, kind, cache_latents=mode)
    with monkeypatch.context() as patch:
        patch.setattr("flowdistill.teachers.loading._load_pipeline", None)
        result = cli("cache", config)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == (2 if kind == "prompts" else 1) and lines[-1].startswith(f"7 pictures of {tmp_path}/photos")
    assert f"of latents in {tmp_path}/cache/flowdistill/latents/" in lines[-1] and len(latents(tmp_path / "cache")) == 1
    made = latents(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "opened", None)
        patch.setattr(latent_bank, "encoded", None)
        run = load_config(config)
        data = RealData(load_teacher(run.teacher), run.method.data, options=run.method.data_options)
        data.draw(Draw(0, 0, rows=3))
    assert latents(tmp_path / "cache") == made
    # The same bits as without any cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    anew = RealData(load_teacher(run.teacher), run.method.data, options=DataOptions(cache_latents="none"))
    assert torch.equal(anew.latents(torch.arange(7)), data.latents(torch.arange(7))) and not latents(tmp_path / "other")


@pytest.mark.parametrize("kind, options, why", [
    ("latents", {"cache_latents": "none"}, "data_options.cache_latents is none"),
    ("pixels", {}, "the teacher has no autoencoder"),
])
def test_pictures_without_kept_latents_are_read_once(tmp_path, cli, kind, options, why):
    result = cli("cache", written(tmp_path, kind, **options))
    assert result.code == 0 and f"each was read once, and no latents are kept ({why})" in result.out, result.err
    assert not latents(tmp_path / "cache") and list((tmp_path / "cache/flowdistill/images").glob("index-*"))


def fill_slowly(config, pause):
    """``flowdistill cache`` in shards of one picture, with a wait after each."""
    from flowdistill.cli.commands import main

    shards_of_one()
    write = DiskBank._write

    def waiting(*arguments):
        write(*arguments)
        time.sleep(pause)

    DiskBank._write = waiting
    sys.exit(main(["cache", str(config)]))


def shards_of_one():
    prompt_bank.SHARD_ROWS = latent_bank.READ_AT_ONCE = 1


def test_a_killed_filling_goes_on_and_two_processes_share_it(tmp_path, monkeypatch, cli):
    config, broken = written(tmp_path, "latents"), tmp_path / "broken"
    with Child(fill_slowly, config, 0.5, env=environment(XDG_CACHE_HOME=str(broken))) as child:
        while len(latents(broken)) < 2:
            assert child.returncode is None, child.errors
            time.sleep(0.02)
        child.kill()
    first = latents(broken)
    assert 2 <= len(first) < 7
    ranks(2, fill_slowly, config, 0.0, env=environment(XDG_CACHE_HOME=str(tmp_path / "two")))
    monkeypatch.setattr(prompt_bank, "SHARD_ROWS", 1)
    monkeypatch.setattr(latent_bank, "READ_AT_ONCE", 1)
    encoded, original = [], DiskBank._write
    monkeypatch.setattr(DiskBank, "_write", lambda bank, number, *rest: (encoded.append(number),
                                                                         original(bank, number, *rest)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(broken))
    assert cli("cache", config).code == 0 and len(encoded) == 7 - len(first)
    assert len(latents(broken)) == 7 and latents(broken) == latents(tmp_path / "two")


def test_bad_settings_are_a_sentence(tmp_path, cli):
    config = written(tmp_path, "pixels")
    for overrides, message in (
        (["method.data=digits"], "and the method names no images"),
        (["method.data=/nowhere"], "there are no images '/nowhere'"),
        (["method.data_options.cache_latents=disk"], "the teacher has no autoencoder"),
        (["teacher.labels=[9]"], "label"),
    ):
        result = cli("cache", config, *overrides)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, (overrides, result.err)


def test_every_section_of_a_method_counts():
    options = DataOptions(on_error="skip")
    host = Dmd2Config(data="photos", data_options=options)
    assert images_of(host) == [Images("photos", options)]
    assert images_of(MsdConfig(host=host, adversarial=AdversarialStage(data="more"))) == [
        Images("more", options), Images("photos", options)]
    assert images_of(Dmd2Config(data="digits")) == images_of(Dmd2Config()) == []


def test_a_plan_counts_them(tmp_path, cli):
    config = written(tmp_path, "latents")
    row = 4 * torch.Size(load_teacher(tmp_path / "pipeline").shape).numel()
    for overrides, words in (
        ([], f"images of {tmp_path}/photos: 7, latents of {row / 1e3:.3g} kB each, in the mode memory"),
        (["method.data_options.memory_gb=0"], "mode disk (data_options.cache_latents): none of host memory and "),
        (["method.data_options.cache_latents=none"], "none of host memory and none of disk"),
        (["method.data=/nowhere"], "images of /nowhere: they are not here; latents of "),
        ([f"method.data={tmp_path}/pipeline"], "how many is not known: the folder"),
    ):
        result = cli("plan", config, *overrides)
        assert result.code == 0 and words in result.out, result.out + result.err
