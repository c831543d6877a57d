"""``scripts/evaluate_fid.py``: folders, students, pipelines, several processes, bad input."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowdistill import load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Report
from flowdistill.export import export
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "evaluate_fid.py"


def load_script():
    spec = importlib.util.spec_from_file_location("evaluate_fid", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate_fid = load_script()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student (untrained: its teacher's one Euler step), its export, and a folder of real digits."""
    root = tmp_path_factory.mktemp("made")
    source = str(asset_path("digits-flow"))
    student = FlowMap.from_teacher(load_teacher(source), StudentInfo(method="freeflow", base_model=source))
    student.save(root / "student")
    export(student, root / "export")
    save_images(load_digits()[0][:300], root / "digits")
    return root


def measure(made, *arguments) -> Report:
    file = made / "report.json"
    command = [*map(str, arguments), "--cache", str(made / "cache"), "--json", str(file)]
    assert evaluate_fid.main(command) == 0
    return Report.read_json(file)


def test_a_folder_against_a_named_set(made, capsys):
    report = measure(made, made / "digits", "--reference", "digits")
    (row,) = report.rows
    assert (row.model, row.calls, report.num_images) == ("digits", None, 300) and row.accuracy is None
    printed = capsys.readouterr().out
    for part in ("features sha256", "resize", "num images", "reference hash", "seed", "processes"):
        assert part in printed, part
    part = measure(made, made / "digits", "--reference", "digits", "--num-images", 100)
    assert part.num_images == 100 and part.rows[0].fid > row.fid > 0


def test_a_folder_against_itself_and_saved_statistics(made):
    report = measure(made, made / "digits", "--reference", made / "digits", "--save-reference", made / "own.npz")
    assert report.rows[0].fid == pytest.approx(0, abs=1e-6) and report.fid_floor is None
    again = measure(made, made / "digits", "--reference", made / "own.npz", "--no-kid")
    assert again.rows[0].fid == pytest.approx(0, abs=1e-6) and again.rows[0].kid is None


def test_a_student_and_a_teacher_of_one_step_are_the_same(made):
    common = ("--reference", "digits", "--num-images", 80)
    student = measure(made, made / "student", *common)
    # The stock pipeline of this teacher cannot pass on labels.
    teacher = measure(made, asset_path("digits-flow"), "--steps", 1, *common)
    assert student.rows[0].fid == pytest.approx(teacher.rows[0].fid, rel=1e-5)
    assert "takes no labels" in teacher.protocol["sampler"]


def test_a_stock_pipeline_does_not_depend_on_the_batch_size(made):
    common = (made / "export", "--reference", "digits", "--num-images", 80, "--steps", 1, "--num-classes", 10)
    whole, parts = measure(made, *common), measure(made, *common, "--batch-size", 33)
    assert whole.rows[0].fid == pytest.approx(parts.rows[0].fid, rel=1e-5)
    assert whole.rows[0].accuracy > 0.9 and whole.rows[0].calls == 1
    assert whole.protocol["sampler"].startswith("ConsistencyModelPipeline")
    assert measure(made, *common, "--seed", 1).rows[0].fid != pytest.approx(whole.rows[0].fid, rel=1e-3)


def test_prompts_go_to_a_text_to_image_pipeline(tmp_path):
    calls = []

    class Pipeline:
        scheduler = object()

        def __call__(self, prompt, generator, output_type, num_inference_steps=9):
            calls.append((prompt, num_inference_steps))
            return SimpleNamespace(images=np.stack([torch.rand(4, 4, 3, generator=g).numpy() for g in generator]))

    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na blue square\n")
    options = evaluate_fid.parse(["x", "--reference", "y", "--prompts", str(file), "--steps", "3"])
    sampler = evaluate_fid.PipelineSampler(Pipeline(), options)
    images = sampler(torch.zeros(3, 1), sampler.condition(range(1, 4)))
    assert calls == [(["a blue square", "a red circle", "a blue square"], 3)] and images.shape == (3, 3, 4, 4)
    assert torch.equal(images[1:2], sampler(torch.zeros(1, 1), sampler.condition(range(2, 3))))
    with pytest.raises(UserError, match="takes no guidance_scale"):
        evaluate_fid.PipelineSampler(Pipeline(), evaluate_fid.parse(["x", "--reference", "y", "--guidance-scale", "2"]))
    with pytest.raises(UserError, match="--prompts FILE"):
        evaluate_fid.PipelineSampler(Pipeline(), evaluate_fid.parse(["x", "--reference", "y"]))


def test_two_processes_give_the_figures_of_one(made):
    common = [str(made / "student"), "--reference", str(made / "digits"), "--num-images", "61", "--batch-size", "20"]
    one = measure(made, *common)
    file = made / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command = [*launch, *common, "--cache", str(made / "other cache"), "--json", str(file)]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = Report.read_json(file)
    assert (one.protocol["processes"], two.protocol["processes"]) == (1, 2)
    assert two.rows[0].fid == pytest.approx(one.rows[0].fid, rel=1e-5)
    assert two.rows[0].kid == pytest.approx(one.rows[0].kid, rel=1e-4)
    assert done.stdout.count("student") == 2  # the row and the protocol's path, printed by one process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "--reference", "digits"], "nowhere/at/all could not be loaded"),
        (["{made}/student", "--reference", "digit"], "did you mean 'digits'"),
        (["{made}/student", "--reference", "digits", "--num-images", "0"], "at least 1, not 0"),
        (["{made}/digits", "--reference", "digits", "--num-images", "301"], "holds 300 images"),
        (["{made}/cache", "--reference", "digits"], "neither a folder of images nor a pipeline"),
        (["{made}/student", "--reference", "digits", "--features", "inception"], "inception-2015-12-05.pt"),
        (["{made}/student", "--reference", "digits", "--guidance-scale", "3"], "guidance_scale is 3.0"),
        (["{made}/digits", "--reference", "digits", "--json", "{made}/student/model.safetensors/x"], "be written"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(made, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("FLOWDISTILL_WEIGHTS", str(made))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (made / "cache").mkdir(exist_ok=True)
    command = [argument.format(made=made) for argument in arguments]
    assert evaluate_fid.main([*command, "--cache", str(made / "cache")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("evaluate_fid: error: ") and message in error
