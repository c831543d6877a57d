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
from PIL import Image

from flowdistill import load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Report
from flowdistill.export import export
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images, to_uint8

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


@pytest.fixture(scope="module")
def strange(made):
    """Folders of the same 300 digits: of 16 bits in class folders behind links, with the clutter of many systems."""
    images = to_uint8(load_digits()[0][:300, 0]).numpy()
    for number, image in enumerate(images):
        file = made / "elsewhere" / str(number % 3) / f"{number:03}.{('png', 'tif', 'png')[number % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint16) * 257).save(file)
    for number in range(3):
        link = made / "strange" / f"class {number}"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(made / "elsewhere" / str(number), target_is_directory=True)
    (made / "strange" / "circle").symlink_to(made / "strange", target_is_directory=True)
    save_images(load_digits()[0][:100], made / "strange" / ".ipynb_checkpoints")
    for name in ("._0000.png", "Thumbs.db", "photo.heic"):
        (made / "strange" / name).write_bytes(b"\0\x05\x16\x07")
    return made / "strange"


def test_bits_links_and_clutter_do_not_change_the_figures(made, strange):
    report = measure(made, strange, "--reference", made / "digits")
    assert report.num_images == 300 and report.rows[0].fid == pytest.approx(0, abs=1e-6)
    left_out = "1 x .heic, 1 x folder .ipynb_checkpoints, 1 x hidden file, 1 x link to a folder already read"
    assert report.protocol["images_left_out"] == left_out and report.protocol["reference_left_out"] is None
    again = measure(made, made / "digits", "--reference", strange)
    assert again.rows[0].fid == pytest.approx(0, abs=1e-6) and again.protocol["reference_left_out"] == left_out


def test_some_images_of_a_folder_are_a_seeded_sample(made, strange):
    """The first by path would all be of one class."""
    images = to_uint8(load_digits()[0])
    labels = load_digits()[1]
    for image, label, number in zip(images, labels.tolist(), range(600), strict=False):
        file = made / "sorted" / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)
    first, same, other = (
        measure(made, made / "sorted", "--reference", made / "sorted", "--num-images", 150, "--seed", seed, "--no-kid")
        for seed in (0, 0, 1)
    )
    assert first.protocol["images_drawn"] == "150 of 600, drawn with seed 0" and first.num_images == 150
    assert first.rows[0].fid == same.rows[0].fid != other.rows[0].fid
    save_images(load_digits()[0][labels < 3][:150], made / "first classes")
    by_path = measure(made, made / "first classes", "--reference", made / "sorted", "--no-kid")
    assert first.rows[0].fid < 0.2 * by_path.rows[0].fid


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
        (["{made}/digits", "--reference", "{made}/one"], "one holds one image only; statistics need at least 2"),
        (["{made}/digits", "--reference", "{made}/adm.npz"], "name the file digits:{made}/adm.npz"),
        (["{made}/digits", "--reference", "legacy_pytorch:{made}/adm.npz"], "the two cannot be compared"),
        (["{made}/one/absent", "--reference", "{made}/ABSENT.NPZ"], "ABSENT.NPZ do not exist"),
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
    save_images(load_digits()[0][:1], made / "one")
    np.savez(made / "adm.npz", mu=np.zeros(64), sigma=np.eye(64))
    command = [argument.format(made=made) for argument in arguments]
    assert evaluate_fid.main([*command, "--cache", str(made / "cache")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("evaluate_fid: error: ") and message.format(made=made) in error
