"""Configurations: files, bases, overrides, and the sentence that every mistake gives."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowdistill.config import (
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    load_config,
    option,
    save_config,
    validate,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.registry import Registry

GOOD = """
output_dir: runs/a
teacher:
  source: some/folder
method:
  name: toy
"""


@dataclass
class ToyConfig:
    name: str = "toy"
    damping: float = option(1.0, "a number", at_least=0)
    interval: tuple[float, float] = (0.0, 1.0)
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=3e-4), "of the student")
    critic_optimizer: OptimizerConfig | None = None

    def validate(self) -> None:
        if self.damping == 13:
            raise UserError("'method.damping' must not be 13")


class Toy:
    Config = ToyConfig


@dataclass
class OtherConfig:
    name: str = "other"
    sharpness: int = 3


class Other:
    Config = OtherConfig


@pytest.fixture(autouse=True)
def toy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("no_methods")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "no_methods", package)
    registry: Registry[type] = Registry("method", package="no_methods", group="no methods")
    registry.register("toy")(Toy)
    registry.register("other")(Other)
    monkeypatch.setattr("flowdistill.config.loading.METHODS", registry)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def sentence(path: Path, *overrides: str) -> str:
    """The error of loading, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_and_types(good: Path) -> None:
    config = load_config(good)
    assert config == RunConfig(output_dir="runs/a", teacher=TeacherConfig(source="some/folder"), method=ToyConfig())
    assert isinstance(config.method, ToyConfig)
    assert config.method.optimizer.lr == 3e-4
    assert config.train == TrainConfig()
    assert config.evaluation == EvaluationConfig()


def test_overrides_replace_the_file_and_the_last_one_counts(good: Path) -> None:
    config = load_config(
        good,
        [
            "train.steps=5",
            "train.steps=7",
            "method.optimizer.betas=[0.5,0.75]",
            "method.critic_optimizer.lr=1e-3",
            "teacher.null_label=10",
            "train.compile=true",
            "train.trackers=[]",
            "output_dir=a=b",
            "evaluation.teacher_steps=[1, 4]",
        ],
    )
    assert config.train.steps == 7
    assert config.method.optimizer.betas == [0.5, 0.75]
    assert config.method.optimizer.lr == 3e-4
    assert config.method.critic_optimizer == OptimizerConfig(lr=1e-3)
    assert (config.teacher.null_label, config.train.compile, config.train.trackers) == (10, True, [])
    assert config.output_dir == "a=b"
    assert config.evaluation.teacher_steps == [1, 4]


def test_configurations_do_not_share_their_lists(good: Path) -> None:
    first = load_config(good)
    first.method.optimizer.betas[0] = 0.0
    assert load_config(good).method.optimizer.betas[0] == 0.9
    assert OptimizerConfig().betas is not OptimizerConfig().betas


def test_interpolation_and_environment(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    config = load_config(good, ["output_dir=${oc.env:PLACE}/${method.name}-${seed}", "seed=4"])
    assert config.output_dir == "/data/toy-4"


def test_save_and_load_give_the_same(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["method.critic_optimizer.lr=1e-3", "output_dir=r${seed}", "method.interval=[0.25,1]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert "output_dir: r0" in (tmp_path / "saved.yaml").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.yaml", "saved.yaml"]


def test_a_failed_save_keeps_the_old_file(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "saved.yaml"
    saved.write_text("old")

    def full(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    config = load_config(good)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_config(config, saved)
    assert saved.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.yaml", "saved.yaml"]


def test_a_base_lies_underneath(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "root.yaml").write_text(GOOD + "train:\n  steps: 1\n  batch_size: 8\n  log_every: 3\n")
    (tmp_path / "bases" / "middle.yaml").write_text("defaults_from: root.yaml\ntrain:\n  steps: 2\n  batch_size: 16\n")
    top = tmp_path / "top.yaml"
    top.write_text("defaults_from: bases/middle.yaml\ntrain:\n  steps: 3\n")
    train = load_config(top).train
    assert (train.steps, train.batch_size, train.log_every) == (3, 16, 3)
    assert load_config(top, ["train.steps=4"]).train.steps == 4


def test_errors_name_the_base_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(GOOD + "train: {steps: 0}\n")
    top = tmp_path / "top.yaml"
    top.write_text("defaults_from: base.yaml\nseed: 1\n")
    assert sentence(top) == f"'train.steps' must be at least 1, not 0 (in {tmp_path / 'base.yaml'})"
    (tmp_path / "base.yaml").write_text(GOOD + "train: {stepz: 1}\n")
    assert f"unknown key 'train.stepz' (in {tmp_path / 'base.yaml'}); did you mean 'train.steps'?" in sentence(top)


def test_a_circle_of_bases(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults_from: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults_from: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in sentence(tmp_path / "a.yaml")


UNKNOWN_KEYS = [
    ("train.stepz=3", "train.stepz", "train.steps"),
    ("trian.steps=3", "trian", "train"),
    ("teacher.sorce=x", "teacher.sorce", "teacher.source"),
    ("method.dampng=1", "method.dampng", "method.damping"),
    ("method.optimizer.batas=[0,0]", "method.optimizer.batas", "method.optimizer.betas"),
    ("method.critic_optimizer.lrr=1", "method.critic_optimizer.lrr", "method.critic_optimizer.lr"),
    ("evaluation.num_image=3", "evaluation.num_image", "evaluation.num_images"),
    ("method.lr=1", "method.lr", "method.optimizer.lr', 'method.critic_optimizer.lr"),  # a level further down
    ("num_images=3", "num_images", "evaluation.num_images"),
]


@pytest.mark.parametrize(("override", "key", "near"), UNKNOWN_KEYS)
def test_unknown_keys_name_the_closest(good: Path, override: str, key: str, near: str) -> None:
    text = sentence(good, override)
    assert f"unknown key '{key}'" in text
    assert f"did you mean '{near}'?" in text
    assert f"in the override '{override}'" in text
    assert text.endswith("(see 'flowdistill config toy')")


def test_an_unknown_key_with_nothing_near_lists_what_is_allowed(good: Path) -> None:
    text = sentence(good, "qqqqqqq=1")
    assert "did you mean" not in text
    assert all(name in text for name in ("output_dir", "seed", "teacher", "method", "train", "evaluation"))


def test_settings_of_another_method(good: Path) -> None:
    text = sentence(good, "method.name=other", "method.damping=1")
    assert "unknown key 'method.damping'" in text
    assert "'other'" in text and "sharpness" in text


BAD_VALUES = [
    ("train.steps=0", "'train.steps' must be at least 1, not 0"),
    ("train.steps=-5", "'train.steps' must be at least 1, not -5"),
    ("train.steps=abc", "'train.steps' must be an integer, not 'abc'"),
    ("train.steps=1.5", "'train.steps' must be an integer, not 1.5"),
    ("train.steps=", "'train.steps' must be an integer, not null"),
    ("train.steps=true", "'train.steps' must be an integer, not true"),
    ("train.steps={a: 1}", "'train.steps' must be an integer, not keys below it"),
    ("train=3", "'train' must be a section with keys of its own, not 3"),
    ("teacher=null", "'teacher' must be a section with keys of its own, not null"),
    ("train.compile=maybe", "'train.compile' must be true or false, not 'maybe'"),
    ("train.precision=fp61", "'train.precision' must be one of fp32, bf16, fp16, not 'fp61'; did you mean 'fp16'?"),
    ("train.ema_decay=1", "'train.ema_decay' must be at least 0 and below 1, not 1.0"),
    ("train.ema_decay=-0.1", "'train.ema_decay' must be at least 0 and below 1, not -0.1"),
    ("train.max_grad_norm=-1", "'train.max_grad_norm' must be at least 0, not -1.0"),
    ("train.device=gpu", "'train.device' must be auto, cpu, cuda, cuda:N, mps or xpu, not 'gpu'"),
    ("train.device=cuda:x", "'train.device' must be auto, cpu, cuda, cuda:N, mps or xpu, not 'cuda:x'"),
    ("train.trackers=wandb", "'train.trackers' must be a list of texts or null, not 'wandb'"),
    ("train.trackers=[wnadb]", "did you mean 'wandb'?"),
    ("teacher.dtype=float61", "'teacher.dtype' must be one of float32, bfloat16, float16, not 'float61'"),
    ("teacher.t_max=0", "'teacher.t_max' must be greater than 0 and at most 1, not 0.0"),
    ("teacher.t_max=1.1", "'teacher.t_max' must be greater than 0 and at most 1, not 1.1"),
    ("teacher.t_max=nan", "'teacher.t_max' must be a finite number, not nan"),
    ("teacher.null_label=-1", "'teacher.null_label' must be at least 0, not -1"),
    ("seed=-1", "'seed' must be at least 0"),
    ("method.optimizer.lr=0", "'method.optimizer.lr' must be greater than 0, not 0.0"),
    ("method.optimizer.lr=inf", "'method.optimizer.lr' must be a finite number, not inf"),
    ("method.critic_optimizer.lr=x", "'method.critic_optimizer.lr' must be a number, not 'x'"),
    ("method.critic_optimizer.lr=-1", "'method.critic_optimizer.lr' must be greater than 0, not -1.0"),
    ("method.optimizer.betas=0.9", "'method.optimizer.betas' must be a list of numbers or null, not 0.9"),
    ("method.optimizer.betas=[0.9]", "'method.optimizer.betas' must have 2 values, not 1"),
    ("method.optimizer.betas=[0.9,x]", "'method.optimizer.betas' must be a list of numbers or null, not [0.9, 'x']"),
    ("method.optimizer.betas=[0.9,1]", "every value of 'method.optimizer.betas' must be at least 0 and below 1"),
    ("method.optimizer.betas.0=0.9", "'method.optimizer.betas' must be a list of numbers or null, not keys below it"),
    ("method.optimizer.schedule=cosin", "did you mean 'cosine'?"),
    ("method.interval=[0,1,2]", "'method.interval' must be a list of 2 numbers, not [0, 1, 2]"),
    ("evaluation.teacher_steps=[1,0]",
     "every value of 'evaluation.teacher_steps' must be at least 1 and at most 1000000, not 0"),
    ("evaluation.num_images=1", "'evaluation.num_images' must be at least 2, not 1"),
    ("evaluation.solver=huen", "must be one of euler, heun, edm_heun, not 'huen'; did you mean 'heun'?"),
    ("train.batch_size=99999999999999999999",
     "'train.batch_size' must be an integer from -2**63 + 1 to 2**63 - 1, not 99999999999999999999"),
    ("train.steps=9223372036854775808", "must be an integer from -2**63 + 1 to 2**63 - 1"),
    ("teacher.labels=[1,99999999999999999999]", "every value of 'teacher.labels' must be an integer from"),
    ("teacher.image_size=99999999999999999999", "'teacher.image_size' must be the side of a square"),
    ("evaluation.teacher_steps=[99999999999999999999]", "must be at least 1 and at most 1000000, not 99999999999999"),
    ("evaluation.pipeline_steps=[99999999999]", "must be at least 1 and at most 1000000, not 99999999999"),
    ("evaluation.guidance_scale=1e300", "must be a number of at most 3.4e+38 or at least -3.4e+38, as float32 has"),
    ("teacher.lora_scale=-1e39", "must be a number of at most 3.4e+38 or at least -3.4e+38, as float32 has"),
    ("output_dir=null", "'output_dir' must be text, not null"),
    ("output_dir=${seeed}", "'output_dir': Interpolation key 'seeed' not found"),
    ("output_dir=${output_dir}", "'output_dir': Recursive interpolation"),
    ("seed=${output_dir}", "'seed' must be an integer, not '${output_dir}'"),
    ("method.name=toi", "'method.name' must be one of other, toy, not 'toi'; did you mean 'toy'?"),
    ("method.name=", "'method.name' is missing, for it is null; set it to one of other, toy"),
    ("method={name: null}", "'method.name' is missing, for it is null; set it to one of other, toy"),
    ("method=3", "'method' must be a section with a 'name', not 3"),
]


@pytest.mark.parametrize(("override", "expected"), BAD_VALUES)
def test_impossible_values(good: Path, override: str, expected: str) -> None:
    text = sentence(good, override)
    assert expected in text
    if not override.startswith("method.name"):
        assert f"in the override '{override}'" in text


def test_the_same_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "train:\n  steps: many\n")
    assert sentence(path) == f"'train.steps' must be an integer, not 'many' (in {path})"


def test_batch_size_and_accumulation(good: Path) -> None:
    text = sentence(good, "train.batch_size=10", "train.gradient_accumulation=4")
    assert "'train.batch_size' (10) must be a multiple of 'train.gradient_accumulation' (4)" in text
    assert load_config(good, ["train.batch_size=12", "train.gradient_accumulation=4"]).train.batch_size == 12


def test_the_methods_own_check_is_called(good: Path) -> None:
    assert sentence(good, "method.damping=13") == "'method.damping' must not be 13"


def test_validate_checks_a_configuration_made_in_python() -> None:
    config = RunConfig(output_dir="a", teacher=TeacherConfig(source="b"), method=ToyConfig())
    validate(config)
    config.method.optimizer.lr = -1.0
    with pytest.raises(UserError, match=r"'method.optimizer.lr' must be greater than 0, not -1.0"):
        validate(config)


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", ".steps=3", "--steps", ""])
def test_overrides_of_another_form(good: Path, text: str) -> None:
    assert f"the override {text!r} must have the form key=value" in sentence(good, text)


def test_an_override_that_is_no_yaml(good: Path) -> None:
    assert "the override 'train.steps=[1' has a value that is not valid YAML" in sentence(good, "train.steps=[1")


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("output_dir", "teacher: {source: x}\nmethod: {name: toy}\n"),
        ("teacher.source", "output_dir: x\nmethod: {name: toy}\n"),
        ("method.name", "output_dir: x\nteacher: {source: x}\n"),
        ("method.name", ""),
    ],
)
def test_mandatory_values(tmp_path: Path, missing: str, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = sentence(path)
    assert f"'{missing}' is missing" in message and str(path) in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train:\n  steps: [1\n", "line 3"),
        (b"seed: 1\nseed: 2\n", "line 2, found duplicate key seed"),
        (b"- a\n- b\n", "must hold sections"),
        (b"3\n", "must hold sections"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"seed: ${\n", "not valid"),
        (b"defaults_from: [3]\n", "'defaults_from' must be the path of one YAML file, not ['3']"),
        (b"defaults_from: nowhere.yaml\n", "nowhere.yaml ('defaults_from') does not exist"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = sentence(path)
    assert expected in message
    assert str(tmp_path) in message


def test_a_missing_file_names_its_neighbour(good: Path) -> None:
    message = sentence(good.with_name("rum.yaml"))
    assert "rum.yaml does not exist; did you mean 'run.yaml'?" in message
    assert "does not exist" in sentence(good.parent / "no" / "run.yaml")


def test_a_link_that_leads_nowhere_is_no_configuration(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    for target in ("loop.yaml", "none.yaml"):
        loop.unlink(missing_ok=True)
        loop.symlink_to(target)
        assert f"{loop} is a symbolic link that leads nowhere, to {target}" in sentence(loop)
        assert f"{loop / 'run.yaml'} " in sentence(loop / "run.yaml")
        above = tmp_path / "above.yaml"
        above.write_text("defaults_from: loop.yaml\n")
        assert "loop.yaml ('defaults_from') is a symbolic link that leads nowhere" in sentence(above)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read" in sentence(tmp_path)


def test_importing_costs_neither_torch_nor_omegaconf() -> None:
    code = "import sys, flowdistill.config; print(sorted({'torch', 'omegaconf', 'yaml'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_method_may_be_named_by_its_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: r\nteacher: {source: t}\nmethod: {name: tests.toy_method:ToyMethod, width: 4}\n")
    config = load_config(file)
    assert type(config.method).__module__ == "tests.toy_method" and config.method.width == 4
    assert "no_such_module:Method, which cannot be imported" in sentence(file, "method.name=no_such_module:Method")
    assert "math:pi, which is no method" in sentence(file, "method.name=math:pi")
