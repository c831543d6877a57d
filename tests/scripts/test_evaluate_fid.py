"""``scripts/evaluate_fid.py``: folders, students, pipelines, several processes, bad input."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

from flowdistill import load_teacher
from flowdistill.data import load_digits
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Report
from flowdistill.export import export
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images, to_uint8
from tests.families import FAMILIES
from tests.pixel_families import ddim
from tests.processes import environment, ranks
from tests.students_of_steps import pixel_student
from tests.tiny import lively, tiny_dit_pipeline, tiny_unet, tiny_unet_pipeline

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate_fid.py"


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


def with_features(arguments):
    """The arguments, with the digits' features where they name none."""
    arguments = list(arguments)
    return arguments if "--features" in arguments else [*arguments, "--features", "digits"]


def measure(made, *arguments) -> Report:
    file = made / "report.json"
    command = [*with_features(map(str, arguments)), "--cache", str(made / "cache"), "--json", str(file)]
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


def test_grey_images_that_are_stored_in_rgb_are_grey(made):
    save_images(load_digits()[0][:300].expand(-1, 3, -1, -1), made / "rgb")
    report = measure(made, made / "rgb", "--reference", made / "digits")
    assert report.rows[0].fid == pytest.approx(0, abs=1e-6)


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


def test_the_null_label_of_an_export_is_no_class(made, capsys):
    """Eleven labels, ten classes: the eleventh means "no class", and drawing it costs accuracy."""
    common = (made / "export", "--reference", "digits", "--num-images", 110, "--steps", 1)
    report = measure(made, *common)
    assert (report.protocol["classes"], report.protocol["classes_are"]) == (10, "flowdistill.json")
    assert "assumed" not in capsys.readouterr().err
    assert report.rows[0].accuracy == measure(made, *common, "--num-classes", 10).rows[0].accuracy
    # The same pipeline without the record: all labels are taken for classes, which is said.
    shutil.copytree(made / "export", made / "bare")
    (made / "bare" / "flowdistill.json").unlink()
    bare = measure(made, made / "bare", *common[1:])
    assert bare.protocol["classes"] == 11 and "give --num-classes 10" in bare.protocol["classes_are"]
    assert "classes are assumed: all 11 labels of the UNet2DModel" in capsys.readouterr().err
    assert bare.rows[0].accuracy < report.rows[0].accuracy - 0.03
    (made / "bare" / "flowdistill.json").write_text('{"null_label": 10}')
    assert measure(made, made / "bare", *common[1:]).rows[0].accuracy == report.rows[0].accuracy


@pytest.mark.parametrize("kind", ["student", "export"])
def test_a_student_of_some_labels_is_asked_for_these_only(made, tmp_path, kind):
    source = str(asset_path("digits-flow"))
    student = FlowMap.from_teacher(load_teacher(source, labels=[3, 8]), StudentInfo(base_model=source))
    student.save(tmp_path / "student")
    export(student, tmp_path / "export")
    report = measure(made, tmp_path / kind, "--reference", "digits", "--num-images", 60)
    assert report.reference == "digits, labels 3, 8" and report.rows[0].accuracy > 0.8


def test_labels_that_the_stock_pipeline_cannot_pass_on(made, tmp_path, capsys):
    """DDPMPipeline with a network of eleven labels: as its flowdistill.json says, as asked, or as assumed."""
    common = ("--reference", "digits", "--num-images", 110, "--steps", 4)
    known = measure(made, asset_path("digits-flow"), *common)
    assert known.protocol["classes"] == 10
    shutil.copytree(asset_path("digits-flow"), tmp_path / "bare")
    (tmp_path / "bare" / "flowdistill.json").unlink()
    asked = measure(made, tmp_path / "bare", *common, "--num-classes", 10)
    assert asked.rows[0].fid == pytest.approx(known.rows[0].fid, rel=1e-5)
    capsys.readouterr()
    assumed = measure(made, tmp_path / "bare", *common)
    assert assumed.protocol["classes"] == 11 and assumed.rows[0].accuracy < known.rows[0].accuracy


def test_a_dits_null_label_is_beside_its_classes(tmp_path, capsys):
    tiny_dit_pipeline().save_pretrained(tmp_path)
    given = [str(tmp_path), "--reference", "x", "--device", "cpu"]
    options = evaluate_fid.parse([*given, "--guidance-scale", "1"])
    folder, pipeline = evaluate_fid.load_pipeline(options)
    sampler = evaluate_fid.PipelineSampler(pipeline, options, folder)
    assert sampler.num_classes == 4 and "has its null label beside them" in sampler.classes_are
    assert "assumed: labels 0 to 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="takes label 1000 for the one that means 'no class'.*give --guidance-scale 1"):
        evaluate_fid.PipelineSampler(pipeline, evaluate_fid.parse(given), folder)


@pytest.mark.parametrize("make", ["unet", "rectangle", "dit", "sd", "z-image"])
def test_an_export_is_called_as_it_says(tmp_path, make):
    """Its one step and the guidance in its weights, which are not the pipelines' defaults."""
    if make in ("unet", "rectangle"):
        network = tiny_unet(None, sample_size=8 if make == "unet" else (8, 16))
        pipeline, size = DDPMPipeline(network, DDPMScheduler(clip_sample=False)), None
    else:
        pipeline = tiny_dit_pipeline() if make == "dit" else FAMILIES[make].make()
        size = FAMILIES[make].image_size if make in FAMILIES else None
    export(FlowMap.from_teacher(load_teacher(pipeline, image_size=size), StudentInfo()), tmp_path / "export")
    (tmp_path / "prompts.txt").write_text("a cat")
    options = evaluate_fid.parse([str(tmp_path / "export"), "--reference", "x", "--device", "cpu",
                                  "--prompts", str(tmp_path / "prompts.txt")])
    folder, loaded = evaluate_fid.load_pipeline(options)
    sampler = evaluate_fid.PipelineSampler(loaded, options, folder)
    expected = {"num_inference_steps": 1}
    expected |= {"dit": {"guidance_scale": 1}, "sd": {"guidance_scale": 1, "height": 16, "width": 16},
                 "z-image": {"guidance_scale": 0, "height": 16, "width": 16}}.get(make, {})
    assert sampler.arguments == expected
    calls = []
    network = getattr(loaded, "unet", None) or loaded.transformer
    network.register_forward_hook(lambda *given: calls.append(1))
    assert len(sampler(torch.zeros(2, 1), sampler.condition(range(2)))) == 2 and len(calls) == 1


def test_an_export_of_several_calls_says_how_many(made, tmp_path):
    """Also where a list of timesteps is in the place of their number."""
    export(pixel_student(DDPMScheduler(), count=3, num_class_embeds=10), tmp_path / "export")
    reports = [measure(made, tmp_path / "export", "--reference", "digits", "--num-images", 30) for _ in range(2)]
    assert [report.rows[0].calls for report in reports] == [3, 3] and reports[0].rows[0].fid == reports[1].rows[0].fid


def test_noise_of_the_global_generator_is_seeded(tmp_path):
    """Of which some pipelines take what comes between the steps; and images are those of their indices in any run."""
    export(pixel_student(DDPMScheduler(), dit=True), tmp_path / "export")
    options = evaluate_fid.parse([str(tmp_path / "export"), "--reference", "x", "--device", "cpu"])
    folder, loaded = evaluate_fid.load_pipeline(options)
    sampler = evaluate_fid.PipelineSampler(loaded, options, folder)
    images = [sampler(torch.zeros(2, 1), sampler.condition(range(2))) for _ in range(2)]
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["consistency", "rectangle", "ddpm", "ddim", "dit"])
def test_every_pipeline_is_drawn_in_half_precision(tmp_path, kind, dtype):
    """Most stock pipelines of pixel models turn their images into arrays in their network's own type."""
    torch.manual_seed(0)
    if kind in ("consistency", "rectangle"):
        network = lively(tiny_unet(None, sample_size=8 if kind == "consistency" else (8, 16)))
        teacher = load_teacher(DDPMPipeline(network, DDIMScheduler(prediction_type="v_prediction", clip_sample=False)))
        export(FlowMap.from_teacher(teacher, StudentInfo()), tmp_path / "pipeline")
    else:
        made = {"ddpm": lambda: tiny_unet_pipeline(DDPMScheduler(), num_class_embeds=None), "ddim": ddim,
                "dit": tiny_dit_pipeline}[kind]()
        made.save_pretrained(tmp_path / "pipeline")
    drawn = {}
    for kind_of_number in ("float32", dtype):
        options = evaluate_fid.parse([str(tmp_path / "pipeline"), "--reference", "x", "--steps", "1", "--device", "cpu",
                                      "--dtype", kind_of_number, *(["--guidance-scale", "1"] if kind == "dit" else [])])
        folder, pipeline = evaluate_fid.load_pipeline(options)
        assert pipeline.dtype == getattr(torch, kind_of_number)
        sampler = evaluate_fid.PipelineSampler(pipeline, options, folder)
        drawn[kind_of_number] = sampler(torch.zeros(3, 1), sampler.condition(range(3)))
    assert drawn[dtype].dtype == torch.float32 and drawn[dtype].isfinite().all()
    assert drawn[dtype].shape == drawn["float32"].shape and len(drawn[dtype]) == 3


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
    common = [str(made / "student"), "--reference", str(made / "digits"), "--num-images", "61", "--batch-size", "20",
              "--features", "digits"]
    one = measure(made, *common)
    file = made / "two.json"
    command = [*common, "--cache", str(made / "other cache"), "--json", str(file)]
    outs = ranks(2, SCRIPT, *command, env=environment(ACCELERATE_USE_CPU="true"))
    two = Report.read_json(file)
    assert (one.protocol["processes"], two.protocol["processes"]) == (1, 2)
    assert two.rows[0].fid == pytest.approx(one.rows[0].fid, rel=1e-5)
    assert two.rows[0].kid == pytest.approx(one.rows[0].kid, rel=1e-4)
    assert [out.count("student") for out in outs] == [2, 0]  # the row and the protocol's path, by one process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "--reference", "digits"], "the pipeline nowhere/at/all does not exist"),
        (["{made}/student", "--reference", "digit"], "did you mean 'digits'"),
        (["{made}/student", "--reference", "digits", "--num-images", "0"], "at least 1, not 0"),
        (["{made}/digits", "--reference", "digits", "--num-images", "301"], "holds 300 images"),
        (["{made}/digits", "--reference", "{made}/one"], "one holds one image only; statistics need at least 2"),
        (["{made}/digits", "--reference", "{made}/adm.npz"], "name the file digits:{made}/adm.npz"),
        (["{made}/digits", "--reference", "legacy_pytorch:{made}/adm.npz"], "the two cannot be compared"),
        (["{made}/one/absent", "--reference", "{made}/ABSENT.NPZ"], "ABSENT.NPZ do not exist"),
        (["{made}/colour", "--reference", "{made}/colour"], "000000.png: the picture is in colour, and the features"),
        (["{made}/digits", "--reference", "{made}/colour"], "000000.png: the picture is in colour, and the features"),
        (["{made}/colour", "--reference", "digits"], "000000.png: the picture is in colour, and the features"),
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
    save_images(torch.rand(2, 3, 8, 8), made / "colour")
    np.savez(made / "adm.npz", mu=np.zeros(64), sigma=np.eye(64))
    command = with_features(argument.format(made=made) for argument in arguments)
    assert evaluate_fid.main([*command, "--cache", str(made / "cache")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("evaluate_fid: error: ") and message.format(made=made) in error


def test_features_must_be_named(made, capsys):
    """Digits' features measure anything, so that they stand for nobody who names none."""
    assert evaluate_fid.main([str(made / "digits"), "--reference", "digits", "--cache", str(made / "cache")]) == 2
    assert "error: --features is not given" in capsys.readouterr().err
