"""First configurations: what is chosen for a pipeline, and that they load, are planned and train."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from flowdistill.config import METHODS, load_config
from flowdistill.plan import starting
from flowdistill.plan.advice import Step
from flowdistill.plan.memory import Plan, make_plan
from flowdistill.plan.starting import Start, start
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS
from tests.tiny import tiny_unet_pipeline

SMALL = ["train.steps=1", "train.batch_size=2", "train.sample_every=0", "train.num_samples=2", "train.device=cpu"]


@pytest.fixture
def pipelines(tmp_path: Path):
    """A function that saves a pipeline in a folder."""

    def save(pipeline) -> str:
        folder = tmp_path / "teacher"
        pipeline.save_pretrained(folder)
        return str(folder)

    return save


def written(found: Start, folder: Path) -> Path:
    file = folder / "my.yaml"
    file.write_text(found.text("A test"))
    return file


@pytest.mark.parametrize("family", ["dit", "edm", "sd", "sd3"])
def test_file_loads_is_planned_and_trains(family: str, pipelines, tmp_path: Path) -> None:
    source = pipelines(FAMILIES[family].make())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    given = [f"teacher.prompts={prompts}"] if FAMILIES[family].prompts else []
    found = start(source, overrides=[*given, f"output_dir={tmp_path / 'run'}"])
    assert found.missing == {} and "The method dmd2 was chosen" in found.remarks[1]
    file = written(found, tmp_path)
    config = load_config(file)
    assert make_plan(config).parts["student"].parameters
    epsilon = family in ("dit", "sd")
    assert (config.method.start, config.method.start_unit) == ((399.0, "timestep") if epsilon else (None, "linear"))
    assert distill(file, SMALL).steps == 1


def test_words_about_a_teacher_without_conditions(pipelines) -> None:
    found = start(pipelines(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None)))
    assert "and takes neither labels nor prompts." in found.remarks[0]
    assert "text to image" not in " ".join(found.remarks)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_a_file_that_says_what_is_missing(name: str, pipelines, tmp_path: Path) -> None:
    source = pipelines(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=11))
    found = start(source, name, overrides=["teacher.null_label=10"])
    filled = [f"{key}=digits" for key in found.missing]
    config = load_config(written(found, tmp_path), filled)
    assert config.method.name == name and config.teacher.null_label == 10
    assert all(found.values[key] == "???" for key in found.missing)


@pytest.mark.parametrize("name, key, value", [
    ("freeflow", "teacher.t_max", 0.97), ("boot", "teacher.t_max", 0.97), ("consistency", "teacher.t_max", 0.97),
    ("flow_map_matching", "teacher.t_max", 0.97), ("data_flow_map", "teacher.t_max", 0.97),
    ("dmd2", "method.start", 399.0), ("sid", "method.start", 399.0), ("disback", "method.host.start", 399.0),
    ("msd", "method.host.start", 399.0),
])
def test_epsilon_teachers_start_before_pure_noise(name: str, key: str, value: float, pipelines) -> None:
    noisy = start(pipelines(tiny_unet_pipeline(DDPMScheduler())), name)
    assert noisy.values[key] == value
    assert any("predicts epsilon" in each.reason for each in noisy.settings if each.key == key)
    line = f"{key.rpartition('.')[2]}: {value:g}"  # 399, and not 399.0
    assert line in [text.strip() for text in noisy.text("a title").splitlines()]


@pytest.mark.parametrize("name", ["freeflow", "dmd2"])
def test_flow_teachers_start_in_noise(name: str, pipelines) -> None:
    plain = start(pipelines(tiny_unet_pipeline(FlowMatchEulerDiscreteScheduler())), name)
    assert not {"teacher.t_max", "method.start"} & set(plain.values)
    assert not any(key.startswith("method.guidance") for key in plain.values)  # it cannot be guided


def test_guidance_is_that_of_the_pipeline(pipelines) -> None:
    found = start(pipelines(FAMILIES["z-image"].make()), "freeflow")
    assert (found.values["method.guidance_min"], found.values["method.guidance_max"]) == (6.0, 6.0)  # its 5 is 1 + 5
    assert found.values["teacher.prompts"] == "prompts.txt"


def test_what_fits_the_card_is_advised(pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pipelines(tiny_unet_pipeline(FlowMatchEulerDiscreteScheduler()))
    roomy = start(source, gpu_memory=24)
    assert "it fits 24 GiB" in roomy.remarks[-1] and "train.gradient_checkpointing" not in roomy.values

    def advise(path: Path, overrides: tuple[()], plan: Plan, gpu_memory: float) -> list[Step]:
        assert load_config(path).method.name == "dmd2" and gpu_memory == 1
        return [Step("a teacher in half precision", ["teacher.dtype=bfloat16"], plan),
                Step("a low-rank critic", ["method.critic=lora"], plan),
                Step("smaller micro-batches", ["train.gradient_accumulation=2", "train.batch_size=2"], plan)]

    monkeypatch.setattr(starting, "advise", advise)
    tight = start(source, gpu_memory=1, overrides=["train.batch_size=64"])
    assert "it does not fit 1 GiB with all that helps" in tight.remarks[-1]
    config = load_config(written(tight, tmp_path))
    assert (config.teacher.dtype, config.train.gradient_accumulation) == ("bfloat16", 2)
    assert config.train.batch_size == 64  # what was given stays
    assert config.method.critic == "lora" and config.method.optimizer.lr == config.method.critic_optimizer.lr == 1e-4
    monkeypatch.setattr(starting, "LARGE", 0)
    config = load_config(written(start(source, gpu_memory=1), tmp_path))
    assert (config.method.optimizer.lr, config.method.critic_optimizer.lr) == (1e-5, 5e-5)


def test_hub_ids_bring_their_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(source: str, allow_patterns: list[str]) -> None:
        asked.append((source, allow_patterns))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="the hub does not give its configurations: no network"):
        starting.configurations("some/pipeline")
    assert asked == [("some/pipeline", ["*.json"])]
    with pytest.raises(UserError):
        starting.configurations("not-there/at/all")
    assert len(asked) == 1


def test_overrides_that_are_none_and_unknown_methods(pipelines) -> None:
    source = pipelines(tiny_unet_pipeline(DDPMScheduler()))
    with pytest.raises(UserError, match="must have the form key=value"):
        start(source, overrides=["teacher.prompts"])
    with pytest.raises(UserError, match="did you mean 'freeflow'"):
        start(source, "freflow")


@pytest.mark.parametrize(("overrides", "words"), [
    (["train=5"], "'train' must be a section"),
    (["train.stepz=5"], "unknown key 'train.stepz' .*did you mean 'train.steps'"),
    (["train.steps=abc"], "'train.steps' must be an integer, not 'abc'"),
    (["train.steps=1e400"], "'train.steps' must be an integer, not inf"),
    (["train.steps=0"], "'train.steps' must be at least 1"),
    (["method.optimizer.lr=nan"], "'method.optimizer.lr' must be a finite number"),
    (["method.optimizer=null"], "'method.optimizer' must be a section"),
    (["method=freeflow"], "'method' must be a section with a 'name'"),
    (["method.prediction_fraction=0.5"], "unknown key 'method.prediction_fraction'"),
    (["foo.bar=1"], "unknown key 'foo'"),
    (["foo=1"], "unknown key 'foo'"),
    (["teacher.source.x=1"], "'teacher.source' must be text"),
    (["teacher.source=elsewhere"], "an override sets teacher.source to 'elsewhere'"),
    (["train..steps=3"], "must have the form key=value"),
    ([".=3"], "must have the form key=value"),
    (["output_dir="], "'output_dir' must be text, not null"),
    (["teacher.null_label=99"], "null_label"),
    (["teacher.dtype=float8"], "'teacher.dtype' must be one of"),
])
def test_overrides_that_a_run_would_refuse_are_refused(overrides: list[str], words: str, pipelines) -> None:
    source = pipelines(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=11))
    with pytest.raises(UserError, match=words) as caught:
        start(source, overrides=overrides)
    assert "config.yaml" not in str(caught.value)  # which nobody wrote


def test_overrides_are_taken_as_a_run_takes_them(pipelines, tmp_path: Path) -> None:
    source = pipelines(tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=11))
    overrides = ["output_dir=a: b #c", "train={steps: 7, batch_size: 3}", "train.batch_size=5", "method.name=freeflow",
                 "teacher.null_label=10", "method.student=lora", "method.lora={rank: 3}", "evaluation.reference=0010",
                 "train.log_every=${seed}", "seed=3", "started_in=/there"]
    found = start(source, overrides=overrides)
    config = load_config(written(found, tmp_path))
    assert (config.output_dir, config.seed, config.evaluation.reference) == ("a: b #c", 3, "0010")
    assert (config.train.steps, config.train.batch_size, config.train.log_every) == (7, 5, 3)
    assert (config.method.name, config.method.lora.rank, config.started_in) == ("freeflow", 3, "/there")
    assert config.train.sample_every == 250  # what is beside a given setting stays
    assert "null label 10" in found.remarks[0]  # of the teacher as the run has it
    with pytest.raises(UserError, match="name two methods; give one"):
        start(source, "dmd2", overrides=["method.name=freeflow"])


@pytest.mark.parametrize("name", ["it's \"q\" #x: {a}", "two\nlines", "a\x07b\u2028c", "- é"])
def test_names_of_all_kinds_make_a_file_that_loads(name: str, pipelines, tmp_path: Path) -> None:
    source = Path(pipelines(tiny_unet_pipeline(DDPMScheduler()))).rename(tmp_path / name)
    file = tmp_path / "my.yaml"
    file.write_text(start(str(source)).text(f"Written for {source}"))
    assert load_config(file).teacher.source == str(source)


def test_a_method_that_fails_at_suggesting_is_named(pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("in suggest")

    monkeypatch.setattr(METHODS.get("dmd2"), "suggest", fail)
    with pytest.raises(UserError, match="dmd2 fails at saying what it is .*ZeroDivisionError: in suggest"):
        start(pipelines(tiny_unet_pipeline(DDPMScheduler())))
