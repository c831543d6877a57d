"""The rows that come with flowdistill are those that the shipped configurations ask for, and come out so again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from flowdistill import load_teacher
from flowdistill.config import TeacherConfig, load_config
from flowdistill.evaluation import Evaluator, kept_rows, teacher_sampler
from flowdistill.evaluation.kept_rows import TeacherIdentity
from flowdistill.utils.shipped import shipped_folder

ROOT = Path(__file__).resolve().parents[2]
FILE = shipped_folder("assets") / kept_rows.SHIPPED
AGAIN = "make them again with scripts/measure_shipped_teachers.py"


def script():
    spec = importlib.util.spec_from_file_location("measure", ROOT / "scripts" / "measure_shipped_teachers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    return Evaluator("digits", "digits", cache_dir=tmp_path_factory.mktemp("cache"), device="cpu", progress=False)


def rows_of(evaluator, steps, settings=None):
    """(key, sampler, calls) of a digits teacher's rows."""
    teacher = load_teacher(TeacherConfig(**settings or {"source": "assets/digits-flow"}))
    identity = TeacherIdentity(teacher)
    samplers = {count: identity.known(teacher_sampler(teacher, count), "teacher", count, "euler", 1.0)
                for count in steps}
    return [(evaluator.row_key(sampler, teacher.shape, teacher.num_classes, None), sampler, count)
            for count, sampler in samplers.items()]


def test_the_shipped_configurations_find_them(evaluator):
    asked, teachers = {}, script().TEACHERS
    for file in sorted((ROOT / "configs" / "digits").glob("*.yaml")):
        config = load_config(file)
        section, known = config.evaluation, [name for name, one in teachers.items() if one == own_settings(config)]
        if section.features is not None:
            assert (section.features, section.reference, section.num_images, section.solver, section.more_metrics) == (
                "digits", "digits", evaluator.num_images, "euler", []), file
            assert len(known) == 1, f"{file}: add its teacher to scripts/measure_shipped_teachers.py"
            asked.setdefault(known[0], set()).update(section.teacher_steps)
    assert set(asked) == set(teachers) and asked["digits-flow"] >= {1, 2, 4, 10, 50}
    for name, steps in asked.items():
        for key, _, calls in rows_of(evaluator, sorted(steps), teachers[name]):
            found = evaluator.kept_rows.find(key)
            assert found is not None and found.shipped, f"no row of {name} at {calls} calls; {AGAIN}"
            assert found.row.calls == calls and found.row.images_per_second is None
            not_of_digits = {"per_part_fid", "fd", "fd_std"}
            figures = {name for metric in evaluator.metrics for name in metric.figures} - not_of_digits
            assert {name for name in figures if found.row.figures.get(name) is None} == set()


def own_settings(config):
    """What a configuration says of its teacher that is not the default."""
    default, given = vars(TeacherConfig()), vars(config.teacher)
    return {name: value for name, value in given.items() if value != default[name]}


def test_the_cheapest_row_comes_out_again(evaluator):
    ((key, sampler, calls),) = rows_of(evaluator, [1])
    shipped, tolerance = evaluator.kept_rows.find(key).row, json.loads(FILE.read_text())["differs_elsewhere_by"]
    fresh = Evaluator(evaluator.extractor, evaluator.reference, fresh=True, cache_dir=evaluator.kept_rows.folder,
                      progress=False)
    row = fresh.measure(sampler, (1, 8, 8), 10, "teacher", calls)
    assert tolerance == script().TOLERANCE and set(tolerance) == {"fid", "kid", "precision", "recall", "accuracy"}
    for name, most in tolerance.items():
        scale = row.fid if name == "fid" else 1.0
        assert abs(row.figures[name] - shipped.figures[name]) <= most * scale, f"{name}; {AGAIN}"
        assert row.figures[f"{name}_std"] == pytest.approx(shipped.figures[f"{name}_std"], rel=0.05), name
    again = evaluator.measure(sampler, (1, 8, 8), 10, "teacher", calls)
    assert again == row  # from the cache, where it now is


def test_the_script_measures_one_teacher_and_keeps_the_others(tmp_path, capsys):
    module = script()
    module.STEPS = [1]
    rows = [{"teacher": "another", "row": {"calls": 1}}]
    (tmp_path / "rows.json").write_text(json.dumps({"made_by": "", "rows": rows}))
    command = ["--out", str(tmp_path / "rows.json"), "--only", "digits-flow", "--num-images", "20"]
    assert module.main(command) == module.main(command) == 0
    another, row = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert another["teacher"] == "another" and row["teacher"] == "digits-flow"
    assert row["row"]["calls"] == 1 and row["row"]["fid"] > 0 and "images_per_second" not in row["row"]
    assert row["made"] == {"torch": torch.__version__, "device": "cpu"}
    (tmp_path / "rows.json").write_text("{")
    assert module.main(command) == 2 and "measure_shipped_teachers: error: " in capsys.readouterr().err
