"""What another distribution adds by its entry points: a method and a family of backbones, without a line of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flowdistill.config import METHODS
from flowdistill.methods.boot import Boot
from flowdistill.training.method import Method
from flowdistill.utils.errors import UserError
from flowdistill.utils.registry import Registry
from tests.processes import run

METHOD = '''
"""Regression on the teacher's own samples: the whole method."""

from dataclasses import dataclass

from flowdistill.config import OptimizerConfig, option, register_method
from flowdistill.students import Generator, StudentInfo, generated
from flowdistill.teachers.pairs import teacher_pairs
from flowdistill.training.method import SingleStudentMethod


@dataclass
class RegressionConfig:
    """Settings of the regression."""

    name: str = "plain_regression"
    pairs: int = option(16, "samples of the teacher, made once", at_least=1)
    optimizer: OptimizerConfig = option(OptimizerConfig, "of the student")


@register_method
class PlainRegression(SingleStudentMethod):
    """The student learns what the teacher makes of the same noise."""

    name = "plain_regression"
    Config = RegressionConfig

    def __init__(self, config, teacher):
        self.config, self.teacher = config, teacher
        self._student = Generator.from_teacher(teacher, StudentInfo(self.name, teacher.source))
        self.samples = teacher_pairs(teacher, config.pairs, steps=2)

    def loss(self, role, networks, draw):
        index = draw.integers(len(self.samples.noise), on_cpu=True)
        noise, latents, condition = self.samples.rows(index, self.teacher)
        made = generated(networks["student"], noise, self.teacher.t_max, condition)
        error = (made - latents).square().mean()
        return error, {"error": error.detach()}
'''
BACKBONE = '''
"""A network of one's own: a time embedding and two convolutions."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from flowdistill.networks.backbones import BackboneFamily, register_family


class TwoConvolutions(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, width=8):
        super().__init__()
        self.frequencies = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(16, width)
        self.first, self.last = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, timestep):
        embedding = self.time(self.frequencies(timestep).to(x.dtype))
        return self.last(torch.nn.functional.silu(self.first(x) + embedding[:, :, None, None]))


@register_family
class TwoConvolutionsFamily(BackboneFamily):
    backbone_class = "TwoConvolutions"
    backbone_type = TwoConvolutions

    def call(self, network, x, timestep, condition):
        return network(x, timestep)

    def output_channels(self, network):
        return network.config.in_channels

    def time_embeddings(self, network):
        return [network.time]

    def projections(self, network):
        return network.first, network.last
'''
METADATA = "Metadata-Version: 2.1\nName: outside\nVersion: 1\n"
ENTRY_POINTS = ("[flowdistill.methods]\nplain_regression = outside_method:PlainRegression\n"
                "[flowdistill.backbones]\nTwoConvolutions = outside_backbone:TwoConvolutionsFamily\n")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder as pip fills it, with a distribution that has two entry points."""
    (tmp_path / "outside_method.py").write_text(METHOD)
    (tmp_path / "outside_backbone.py").write_text(BACKBONE)
    info = tmp_path / "outside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def python(folder: Path, code: str) -> str:
    """What a program in ``folder`` prints, where Python also finds what is installed there."""
    script = folder / "program.py"
    script.write_text(code)
    return run(script, cwd=folder)


def test_a_method_and_a_backbone_from_outside_train_together(outside: Path) -> None:
    out = python(outside, """
from pathlib import Path
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from flowdistill import load_student, load_teacher
from flowdistill.config import METHODS, EvaluationConfig, RunConfig, TeacherConfig, TrainConfig, load_config
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.networks.backbones import FAMILIES

Path("run.yaml").write_text(
    "{output_dir: run, teacher: {source: live}, method: {name: plain_regression, pairs: 8},"
    " train: {steps: 2, batch_size: 4, device: cpu, trackers: [], num_samples: 4}}")
config = load_config("run.yaml")
backbone = FAMILIES.get("TwoConvolutions").backbone_type
pipeline = DDPMPipeline(backbone(), FlowMatchEulerDiscreteScheduler())
teacher = load_teacher(pipeline)
method = METHODS.get(config.method.name)(config.method, teacher)
trainer = Trainer(method, config, "run", make_accelerator(config.train, "run"))
trainer.train()
trainer.student().save("run/student")
again = load_student("run")
assert torch.equal(again.generate(num_images=2), trainer.student().generate(num_images=2))
print(type(method).__module__, trainer.step, again.generate(num_images=2).shape)
""")
    assert out.strip() == "outside_method 2 torch.Size([2, 1, 8, 8])"


def test_a_broken_entry_point_is_one_sentence(outside: Path) -> None:
    (outside / "outside_method.py").write_text("import nowhere_at_all\n")
    out = python(outside, """
from flowdistill import UserError
from flowdistill.config import METHODS
try:
    METHODS.get("plain_regression")
except UserError as error:
    print(error)
""")
    assert out.startswith("the method 'plain_regression' is provided by outside_method:PlainRegression, which cannot")


@pytest.mark.parametrize("absent", [["echodistill", "msd"]])
def test_a_method_that_is_deleted_is_missed_by_no_other(absent: list[str], tmp_path: Path) -> None:
    out = python(tmp_path, f"""
import importlib.abc, sys

class Deleted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if any(name.startswith("flowdistill.methods." + method) for method in {absent!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import pkgutil
every = pkgutil.iter_modules
pkgutil.iter_modules = lambda path, prefix="": [m for m in every(path, prefix) if m.name not in {absent!r}]
sys.meta_path.insert(0, Deleted())
from flowdistill import distill
run = distill("digits/freeflow", ["train.steps=2", "train.batch_size=8", "train.trackers=[]", "output_dir=run",
                                  "evaluation.num_images=20", "evaluation.teacher_steps=[]", "train.device=cpu"])
from flowdistill.config import METHODS
print(run.steps, METHODS.names())
""")
    last = out.strip().splitlines()[-1]
    assert last.startswith("2 [") and "'dmd2'" in last and not any(f"'{method}'" in last for method in absent)


# --- the registry and the contract


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry[type]:
    package = tmp_path / "some_things"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "square.py").write_text(f"import {__name__} as owner\nowner.CURRENT.register('square')(int)\n")
    monkeypatch.syspath_prepend(tmp_path)
    made: Registry[type] = Registry("thing", package="some_things", group="no such group")
    monkeypatch.setattr("tests.config.test_plugins.CURRENT", made)
    return made


CURRENT: Registry[type]
CURRENT = Registry("thing", package="some_things", group="no such group")


def test_a_module_is_imported_when_its_name_is_asked_for(registry: Registry[type]) -> None:
    assert "square" not in sys.modules and registry.get("square") is int and registry.names() == ["square"]
    with pytest.raises(UserError, match=r"no thing 'sqare' \(did you mean 'square'\?\); there are square"):
        registry.get("sqare")
    with pytest.raises(ValueError, match="a thing named 'square' already: builtins.int"):
        registry.register("square")(str)
    registry.register("circle", "round")(str)
    with pytest.warns(UserWarning, match="the thing 'round' is called 'circle' now"):
        assert registry.get("round") is str
    assert registry.current_name("round") == "circle" and registry.current_name("other") == "other"
    for name in ("some_things", "some_things.square"):
        sys.modules.pop(name, None)


def test_state_that_is_saved_must_be_restored() -> None:
    with pytest.raises(TypeError, match="Half has state_dict without load_state_dict"):
        type("Half", (Method,), {"state_dict": lambda self: {}})
    with pytest.raises(TypeError, match="Nameless.Config must be a dataclass with a field 'name: str'"):
        type("Nameless", (Method,), {"Config": int})
    assert METHODS.get("boot") is Boot and METHODS.current_name("tsm") == "teacher_score_matching"


def test_a_metric_from_outside_stands_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowdistill.evaluation import Report, Row
    from flowdistill.evaluation.metrics import METRICS, Column, Metric, register_metric

    class Brightness(Metric):
        name, figures, columns = "brightness", ("brightness",), (Column("brightness", "light", ".1f"),)
        better = {"brightness": "higher"}

        def measure(self, images, reference):
            return {"brightness": 0.5}

    register_metric(Brightness)
    try:
        report = Report([Row("student", 1, fid=2.0, brightness=0.25)], 10, "f", "r", 0)
        head, _, line, *_ = report.table().splitlines()
        assert "light ↑" in head and "0.2" in line.split() and report.rows[0].brightness == 0.25
        assert Report.from_dict(report.to_dict()) == report and report.to_dict()["rows"][0]["recall"] is None
    finally:
        METRICS.unregister("brightness")
