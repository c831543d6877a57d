"""Protocols by name: what is brought is looked at before the work, and the name is claimed only where it is true."""

import dataclasses
import importlib
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor

import flowdistill
from flowdistill import load_teacher
from flowdistill.cli import main
from flowdistill.conditioning.prompts import PromptList
from flowdistill.config import PROTOCOLS, load_config
from flowdistill.evaluation import load_reference, opening, teacher_sampler
from flowdistill.evaluation.protocols import ALL_PROTOCOLS, followed
from flowdistill.features import extractor as features
from flowdistill.features import load_features
from flowdistill.features.extractor import INCEPTION_FILE, WEIGHTS_VARIABLE, clean_resize
from flowdistill.features.resizing import lanczos_square, middle_patch
from flowdistill.utils.errors import UserError
from flowdistill.utils.hashing import file_sha256
from tests.families import stable_diffusion
from tests.features.test_named import TinyInception, adm_file
from tests.tiny import tiny_unet_pipeline

evaluating = importlib.import_module("flowdistill.evaluation.evaluate")  # the package has a function of this name
CAPTIONS = [f"a photo of {count} cats" for count in range(4)]
REAL = 5


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """Random Inception weights that count as the published ones."""
    torch.manual_seed(0)
    module = TinyInception()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(tmp_path / INCEPTION_FILE))
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "INCEPTION_SHA256", file_sha256(tmp_path / INCEPTION_FILE))
    return module.requires_grad_(False)


@pytest.fixture
def small(monkeypatch):
    """The protocols with a handful of images of 16 pixels."""
    for name, (_, own) in list(PROTOCOLS.items()):
        monkeypatch.setitem(PROTOCOLS, name, (4, own))
        captions = None if ALL_PROTOCOLS[name].captions is None else len(CAPTIONS)
        changed = dataclasses.replace(ALL_PROTOCOLS[name], real_images=REAL, captions=captions)
        monkeypatch.setitem(ALL_PROTOCOLS, name, changed)
    for name in features.SQUARES:
        monkeypatch.setitem(features.SQUARES, name, 16)


def pictures(folder, count=REAL, sizes=((20, 18), (16, 31))):
    folder.mkdir()
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def captions(folder, texts=CAPTIONS):
    file = folder / f"captions-{len(texts)}.txt"
    file.write_text("\n".join(texts))
    return str(file)


def class_pipeline(folder, classes=1000):
    tiny_unet_pipeline(num_class_embeds=classes, channels=3).save_pretrained(folder)
    return str(folder)


def real_npz(path, module, count=REAL, size=8):
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(3)).byte()
    adm_file(path, module, images)
    return str(path)


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_imagenet_as_adm_on_a_synthetic_file(inception, small, tmp_path, capsys):
    model, real = class_pipeline(tmp_path / "model"), real_npz(tmp_path / "VIRTUAL.npz", inception)
    json_file, html = tmp_path / "report.json", tmp_path / "report.html"
    code, out, err = run(capsys, "evaluate", model, "--protocol", "imagenet-adm", "--reference", real,
                         "--teacher-steps", "1", "--json", json_file, "--html", html)
    assert code == 0
    wanted = ["protocol imagenet-adm", "source: ADM", "images: 4, of the labels 0 to 999 in turn", f"here {real}, 5",
              "resize: 299x299, TensorFlow 1's bilinear", "figures: FID, sFID, IS, precision as ADM"]
    assert [text for text in wanted if text not in out or text not in err] == []  # before the work and in the report
    assert err.index("protocol imagenet-adm") < err.index("measuring the teacher")
    assert "protocol imagenet-adm" in html.read_text()
    report = json.loads(json_file.read_text())
    assert report["protocol"]["protocol"] == "imagenet-adm" and "protocol_departures" not in report["protocol"]
    assert report["num_images"] == 4 and report["features"] == "inception-legacy"
    row = report["rows"][0]
    assert all(row[name] is not None for name in ("fid", "sfid", "inception_score", "precision_adm", "recall_adm"))


@pytest.mark.parametrize("name, figures", [("coco30k-256", {"fid"}), ("coco10k-512", {"fid", "patch_fid"})])
def test_coco_on_a_folder_and_captions(inception, small, tmp_path, name, figures):
    teacher = load_teacher(stable_diffusion(), prompts=["something else"])
    real, file = pictures(tmp_path / "real"), captions(tmp_path)
    report = flowdistill.evaluate(teacher, protocol=name, reference=real, prompts=file, teacher_steps=(1,),
                                  progress=False, cache_dir=tmp_path / "kept")
    assert teacher.prompts.prompts == ["something else"]  # as it was
    assert report.protocol["protocol"] == name and report.num_images == 4
    assert "4 in their order, the list's sha256" in report.protocol["protocol_captions"]
    assert {figure for figure in ("fid", "sfid", "patch_fid") if report.rows[0].figures.get(figure) is not None} == (
        figures)
    assert f"protocol {name}\n  source: DMD2" in str(report)
    # The same by statistics of the folder that were kept.
    extractor = load_features(report.features)
    load_reference(real, extractor, tmp_path / "kept").save(tmp_path / "real.npz")
    again = flowdistill.evaluate(teacher, protocol=name, reference=tmp_path / "real.npz", prompts=file,
                                 teacher_steps=(1,), progress=False, cache_dir=tmp_path / "kept")
    assert again.protocol["protocol"] == name and again.rows[0].fid == report.rows[0].fid


NOT_GIVEN = (None, "teacher", "digits", "nowhere", "nowhere.npz", "FOLDER")


def wrong_settings():
    """(protocol, what is changed of a right evaluation, what the sentence says), for each thing that can be wrong."""
    for name in ("coco30k-256", "coco10k-512"):
        yield name, {"prompts": None}, "needs 4 captions of COCO 2014's validation set, a text file with one a line"
        yield name, {"reference": None}, r"give .* \.jpg files.* with --reference \(evaluation.reference\)$"
        yield name, {"reference": "teacher"}, "--reference .*, not 'teacher'"
        yield name, {"reference": "digits"}, "not 'digits'"
        yield name, {"reference": "nowhere"}, "nowhere does not exist"
        yield name, {"reference": "FEW"}, "this is not the protocol .*: the reference holds 3 images, not 5"
        yield name, {"reference": "ADM"}, "is something else; of files only statistics are read"
        yield name, {"reference": "DAMAGED"}, "is damaged or no .npz file"
        yield name, {"prompts": "FEW"}, "the captions are 3, not 4"
        yield name, {"features": "inception"}, "is measured with the features .*, not 'inception'"
        yield name, {"model": "CLASSES"}, "takes no prompts|this model takes none"
        yield name, {"published": False}, "the Inception weights are not the published ones"
        yield name, {"side": 64}, "images of 16 x 16 are enlarged to 64 x 64"
    yield "imagenet-adm", {"reference": None}, r"give ADM's file .*VIRTUAL_imagenet256_labeled.npz"
    yield "imagenet-adm", {"reference": "FOLDER"}, "is a folder"
    yield "imagenet-adm", {"reference": "nowhere.npz"}, "does not exist"
    yield "imagenet-adm", {"reference": "EDM"}, "has no 'mu_s' and no 'sigma_s'"
    yield "imagenet-adm", {"reference": "DAMAGED"}, "is damaged or no .npz file"
    yield "imagenet-adm", {"reference": "FEW"}, "the reference holds 3 images, not 5"
    yield "imagenet-adm", {"reference": "LARGE"}, "the images are 8 x 8, and the reference's 12 x 12"
    yield "imagenet-adm", {"features": "inception"}, "'inception-legacy', not 'inception'"
    yield "imagenet-adm", {"prompts": "RIGHT"}, "takes none"
    yield "imagenet-adm", {"model": "PROMPTS"}, "takes prompts"
    yield "imagenet-adm", {"model": "FEW"}, "has 10 classes, not 1,000"
    yield "imagenet-adm", {"published": False}, "the Inception weights are not the published ones"


@pytest.mark.parametrize("name, change, sentence", list(wrong_settings()))
def test_what_is_missing_or_wrong_is_said_before_the_work(
    inception, small, tmp_path, monkeypatch, name, change, sentence
):
    of_classes = name == "imagenet-adm"
    pictures(tmp_path / "real")
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4 cut")
    np.savez(tmp_path / "edm.npz", mu=np.zeros(12), sigma=np.eye(12))
    files = {
        "FOLDER": tmp_path / "real", "ADM": real_npz(tmp_path / "adm.npz", inception),
        "DAMAGED": tmp_path / "damaged.npz", "EDM": tmp_path / "edm.npz",
        "LARGE": real_npz(tmp_path / "large.npz", inception, size=12),
        "FEW": real_npz(tmp_path / "few.npz", inception, 3) if of_classes else pictures(tmp_path / "three", 3),
    }
    right = {"reference": "ADM" if of_classes else "FOLDER", "prompts": None if of_classes else "RIGHT",
             "model": "CLASSES" if of_classes else "PROMPTS"}
    asked = right | change
    models = {"CLASSES": lambda: class_pipeline(tmp_path / "model"), "FEW": lambda: class_pipeline(tmp_path / "f", 10),
              "PROMPTS": lambda: load_teacher(stable_diffusion(), prompts=["something else"])}
    lists = {"RIGHT": CAPTIONS, "FEW": CAPTIONS[:3]}
    given = {"reference": files.get(asked["reference"], asked["reference"]), "features": asked.get("features"),
             "prompts": None if asked["prompts"] is None else captions(tmp_path, lists[asked["prompts"]])}
    if not asked.get("published", True):
        monkeypatch.setattr(features, "INCEPTION_SHA256", "0" * 64)
    for square in features.SQUARES:
        monkeypatch.setitem(features.SQUARES, square, asked.get("side", 16))
    work = []
    monkeypatch.setattr(evaluating, "evaluate_models", lambda *arguments, **_: work.append(arguments))
    monkeypatch.setattr(evaluating, "open_reference", lambda *arguments, **_: work.append(arguments))
    with pytest.raises(UserError, match=sentence) as refused:
        flowdistill.evaluate(models[asked["model"]](), protocol=name, teacher_steps=(1,), progress=False, **given)
    assert work == [] and "\n" not in str(refused.value)
    # What is missing is said whether or not there are weights.
    if change.get("prompts", "") is None or change.get("reference", "") in NOT_GIVEN:
        monkeypatch.setattr(evaluating, "load_features", lambda *given: pytest.fail("they are opened first"))
        with pytest.raises(UserError, match=sentence):
            flowdistill.evaluate(models[asked["model"]](), protocol=name, teacher_steps=(1,), progress=False, **given)


def test_another_number_of_images_is_a_trial_without_the_name(inception, tmp_path, capsys):
    """Nothing is made smaller here: everything is as far from the protocol as it can be and still be measured."""
    model, real = class_pipeline(tmp_path / "model", 10), real_npz(tmp_path / "VIRTUAL.npz", inception)
    code, out, err = run(capsys, "evaluate", model, "--protocol", "imagenet-adm", "--reference", real,
                         "--num-images", "3", "--teacher-steps", "1", "--json", tmp_path / "report.json")
    assert code == 0
    line = (f"not the protocol imagenet-adm, but what it comes to where 3 images are made, not 50,000; {model} has 10 "
            "classes, not 1,000; the reference holds 5 images, not 10,000")
    assert line in out and line in err
    entries = json.loads((tmp_path / "report.json").read_text())["protocol"]
    assert entries["protocol"] is None and entries["protocol_tried_out"] == "imagenet-adm"
    assert len(entries["protocol_departures"]) == 3


def test_several_are_compared_by_one_protocol(inception, small, tmp_path, capsys):
    first, second = (class_pipeline(tmp_path / name) for name in ("first", "second"))
    real = real_npz(tmp_path / "VIRTUAL.npz", inception)
    command = ["evaluate", first, second, "--protocol", "imagenet-adm", "--reference", real, "--teacher-steps", "1"]
    code, out, err = run(capsys, *command)
    assert code == 0 and "protocol imagenet-adm\n" in out and "protocol imagenet-adm\n" in err
    assert "sFID" in out and "4 images" in out
    code, out, err = run(capsys, *command[:2], class_pipeline(tmp_path / "few", 10), *command[3:])
    assert code == 2 and "few has 10 classes, not 1,000" in err
    for name, count, side in (("right", 4, 8), ("more", 5, 8), ("large", 4, 9)):
        pictures(tmp_path / name, count, [(side, side)])
    code, out, err = run(capsys, *command[:2], tmp_path / "right", *command[3:])
    assert code == 0 and "protocol imagenet-adm\n" in out
    code, out, err = run(capsys, *command[:2], tmp_path / "more", *command[3:])
    assert code == 2 and "more holds 5 images, not 4" in err
    code, out, err = run(capsys, *command[:2], tmp_path / "large", *command[3:])
    assert code == 2 and "the images are 9 x 9, and the reference's 8 x 8" in err


def test_a_runs_protocol_may_be_left_out_or_be_another_one():
    own = {"protocol": "coco30k-256", "num_images": 30_000, "features": "inception-256", "reference": "val2014"}
    assert followed({}, own) == own
    assert followed({"protocol": "none", "features": "lite0"}, own) == own | {"protocol": None, "features": "lite0"}
    other = followed({"protocol": "imagenet-adm", "reference": "file.npz"}, own)
    assert other == {"protocol": "imagenet-adm", "num_images": 50_000, "features": "inception-legacy",
                     "reference": "file.npz"}
    assert followed({"num_images": 7}, own)["num_images"] == 7
    with pytest.raises(UserError, match="must be one of .*, or none, not 'coco30k'; did you mean 'coco30k-256'"):
        followed({"protocol": "coco30k"}, {})
    with pytest.raises(UserError, match="measured with the features 'inception-256', not 'lite0'"):
        followed({"features": "lite0"}, own)


def test_a_configuration_follows_the_protocol(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nteacher: {source: x}\nmethod: {name: freeflow}\n"
                    "evaluation: {protocol: coco10k-512}\n")
    settings = load_config(file).evaluation
    assert (settings.num_images, settings.features) == (10_000, "inception-512")
    settings = load_config(file, ["evaluation.protocol=imagenet-adm", "evaluation.num_images=12"]).evaluation
    assert (settings.num_images, settings.features) == (12, "inception-legacy")
    with pytest.raises(UserError, match="the protocol coco10k-512 is measured with the features 'inception-512', not"):
        load_config(file, ["evaluation.features=digits"])
    with pytest.raises(UserError, match="'evaluation.protocol' must be one of coco30k-256, coco10k-512, imagenet-adm"):
        load_config(file, ["evaluation.protocol=coco"])


def test_a_run_with_a_protocol_looks_at_it_before_training_and_measures_so_at_the_end(
    inception, small, tmp_path, capsys, caplog
):
    model, real = class_pipeline(tmp_path / "model"), real_npz(tmp_path / "VIRTUAL.npz", inception)
    (tmp_path / "run.yaml").write_text(f"""
output_dir: {tmp_path}/out
teacher: {{source: {model}}}
method: {{name: freeflow}}
train: {{steps: 1, batch_size: 2, num_samples: 2, trackers: [], device: cpu}}
evaluation: {{protocol: imagenet-adm, teacher_steps: [1]}}
""")
    code, _, err = run(capsys, "distill", tmp_path / "run.yaml")
    assert code == 2 and "give ADM's file" in err and not (tmp_path / "out" / "checkpoints").exists()
    code, out, _ = run(capsys, "distill", tmp_path / "run.yaml", f"evaluation.reference={real}")
    assert code == 0 and "protocol imagenet-adm\n" in out and "protocol imagenet-adm" in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["protocol"]["protocol"] == "imagenet-adm"
    assert [row["model"] for row in report["rows"]] == ["teacher", "student"]
    code, out, _ = run(capsys, "evaluate", tmp_path / "out", "--protocol", "none", "--num-images", 3, "--no-teacher")
    assert code == 0 and "the protocol" not in out and "protocol imagenet" not in out


def test_prompts_of_the_evaluation_are_not_those_of_the_training(tmp_path):
    """They are opened before training, used while it measures, and the training's are there again after it."""
    teacher = load_teacher(stable_diffusion(), prompts=["something else", "another"])
    (tmp_path / "eval.txt").write_text("a cat\n")
    settings = load_config_of(tmp_path, prompts=str(tmp_path / "eval.txt"))
    opened = opening.open_evaluation(settings, teacher, "cpu")
    expected = teacher.encode(prompts=["a cat"])
    with teacher.prompts.using(PromptList(["a cat"], [1.0])):
        assert torch.equal(opened.image, evaluating.first_image(teacher, teacher_sampler(teacher, 1)))
        assert teacher.examples([0]).tensors.keys() == expected.tensors.keys()
    assert teacher.prompts.prompts == ["something else", "another"] and len(teacher.examples([0, 1])) == 2
    (tmp_path / "eval.txt").write_text("")
    with pytest.raises(UserError, match="has no prompt"):
        opening.open_evaluation(settings, teacher, "cpu")


def load_config_of(folder, **evaluation):
    (folder / "run.yaml").write_text("output_dir: out\nteacher: {source: x}\nmethod: {name: freeflow}\n")
    return load_config(folder / "run.yaml", [f"evaluation.{key}={value}" for key, value in evaluation.items()]
                       ).evaluation


def test_squares_and_patches_are_those_of_pil(inception):
    generator = torch.Generator().manual_seed(0)
    for height, width in ((64, 64), (31, 47), (301, 300)):
        images = torch.randint(0, 256, (2, 3, height, width), generator=generator).byte()
        square = lanczos_square(images, 40)
        for image, found in zip(images, square, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            cut = center_crop(picture, min(picture.size)).resize((40, 40), Image.LANCZOS)
            assert torch.equal(found, pil_to_tensor(cut))
        patch = middle_patch(images, 299)
        assert patch.shape[-2:] == ((299, 299) if height > 299 else (height, width))
    extractor = load_features("inception-512", "cpu")
    whole, patches = extractor.with_spatial(images)
    model = inception.layers
    given = clean_resize(lanczos_square(images, 512))
    assert torch.allclose(whole, model((given - 128) / 128).flatten(1), atol=1e-4)
    assert torch.allclose(patches, model((clean_resize(middle_patch(images, 299)) - 128) / 128).flatten(1), atol=1e-4)
    one = extractor.with_spatial(images[:1])  # read one by one by a folder's threads
    assert torch.equal(one[0], extractor(images[:1])) and one[1].shape == patches[:1].shape


def test_help_names_the_protocols():
    code = "from flowdistill.cli import main; main(['evaluate', '--help'])"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert "--protocol NAME" in text and all(name in " ".join(text.split()) for name in PROTOCOLS)
