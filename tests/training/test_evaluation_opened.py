"""Nothing of an evaluation fails after training: features, reference and sampling are opened before step 0."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowdistill import UserError
from flowdistill.data import load_digits
from flowdistill.evaluation import reference as reference_module
from flowdistill.evaluation.metrics import METRICS, Metric
from flowdistill.training.run import distill
from flowdistill.utils.images import save_images
from tests.evaluation.test_features import script
from tests.features.clips import tiny_clip
from tests.pixel_families import karras_ve
from tests.processes import environment, ranks
from tests.tiny import tiny_unet_pipeline

METHODS = {"one": "{name: dmd2}", "several": "{name: msd, num_students: 2, host: {name: dmd2}}"}


class NeedsImages(nn.Module):
    """Features of three channels, of which nothing but the network itself knows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Teachers of 8x8 images of four classes, and references that do not fit them."""
    folder = tmp_path_factory.mktemp("place")
    tiny_unet_pipeline().save_pretrained(folder / "teacher")
    karras_ve().save_pretrained(folder / "unseeded")
    tiny_unet_pipeline(channels=3).save_pretrained(folder / "colour teacher")
    images = load_digits()[0]
    save_images(images[:8], folder / "digits")
    save_images(images[:8], folder / "damaged")
    (folder / "damaged" / "000007.png").write_bytes(b"no image")
    save_images(images[:8], folder / "one in colour")
    Image.new("RGB", (8, 8), "red").save(folder / "one in colour" / "9.png")
    save_images(images[:8].expand(-1, 3, -1, -1), folder / "grey in RGB")
    np.savez(folder / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(folder / "others.npz", mean=np.zeros(64), covariance=np.eye(64), feature_hash="0" * 64)
    script(NeedsImages(), folder / "colour.pt")
    tiny_clip(folder / "clip")
    return folder


def configure(place, folder, method="one", teacher="teacher", evaluation="", every=0):
    (folder / "run.yaml").write_text(
        f"output_dir: {folder}/run\nteacher: {{source: {place}/{teacher}}}\nmethod: {METHODS[method]}\n"
        f"train: {{steps: 2, batch_size: 4, num_samples: 4, log_every: 1, trackers: [], device: cpu, "
        f"evaluate_every: {every}}}\n"
        "evaluation: {features: digits, reference: digits, num_images: 20, teacher_steps: [1], "
        f"{evaluation.replace('PLACE', str(place))}}}\n"
    )
    return folder / "run.yaml"


CASES = {
    "unknown features": (["evaluation.features=digitz"], "unknown features .*digitz"),
    "features without their file": (["evaluation.features=inception"], "inception-2015-12-05.pt, which do not exist"),
    "features of other images": (["evaluation.features=shapes"], r"read images of shape \(B, 3, 32, 32\), not"),
    "features that say in torch's words what they read": (
        ["evaluation.features=PLACE/colour.pt"], "the features 'colour.pt' cannot be taken of images of shape .1,"),
    "unknown reference": (["evaluation.reference=digit"], "did you mean 'digits'"),
    "reference that is not there": (["evaluation.reference=PLACE/none"], "neither a named set"),
    "statistics that are not there": (["evaluation.reference=PLACE/none.npz"], "do not exist"),
    "reference of another size": (["evaluation.reference=digits:PLACE/three.npz"], "64 numbers .* the reference has 3"),
    "reference of other features": (["evaluation.reference=PLACE/others.npz"], "made with other features"),
    "reference of images in colour": (["evaluation.reference=PLACE/one in colour"], "9.png: the picture is in colour"),
    "reference with a damaged image": (["evaluation.reference=PLACE/damaged"], "000007.png cannot be read"),
    "a scorer that is not known": (["evaluation.scorers=[clib:PLACE]"], "did you mean 'clip'"),
    "a scorer that is not there": (["evaluation.scorers=[clip:PLACE/none]"], "neither a folder here nor a hub id"),
    "a scorer of images without prompts": (["evaluation.scorers=[clip:PLACE/clip]"], "these have none; leave "),
    "guidance that the student does not take": (["evaluation.guidance_scale=3"], "guidance_scale"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_measured_is_said_before_training(place, tmp_path, cli, monkeypatch, case, method):
    overrides, sentence = CASES[case]
    monkeypatch.setenv("FLOWDISTILL_WEIGHTS", str(tmp_path))
    overrides = [text.replace("PLACE", str(place)) for text in overrides]
    result = cli("distill", configure(place, tmp_path, method), *overrides)
    assert result.code == 2 and "Traceback" not in result.err, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("flowdistill: error: ")]
    with pytest.raises(UserError, match=sentence):
        raise UserError(line)
    assert not list(tmp_path.glob("run/**/checkpoints/*")) and not list(tmp_path.glob("run/**/metrics.jsonl"))


@pytest.mark.parametrize(
    ("settings", "overrides", "sentence"),
    [
        ({"teacher": "unseeded"}, ["evaluation.pipeline_steps=[2]", "evaluation.features=null"],
         "the pipeline's own call cannot be measured"),
        ({}, ["evaluation.reference=PLACE/digits", "teacher.labels=[1,2]"], "has no labels, so it has no part"),
        ({"every": 1}, ["evaluation.reference=PLACE/digits", "teacher.labels=[1,2]", "evaluation.at_end=false"],
         "has no labels, so it has no part"),
        ({"method": "several", "every": 1}, ["evaluation.reference=PLACE/digits"], "has no labels, so it has no part"),
        ({"teacher": "colour teacher"}, [], "'digits' read images of 1 channel.* not 3"),
    ],
)
def test_so_is_what_only_some_runs_measure(place, tmp_path, cli, settings, overrides, sentence):
    overrides = [text.replace("PLACE", str(place)) for text in overrides]
    with pytest.raises(UserError, match=sentence):
        distill(configure(place, tmp_path, **settings), overrides)
    assert not list(tmp_path.glob("run/**/checkpoints/*")) and not list(tmp_path.glob("run/**/metrics.jsonl"))


def test_a_metric_is_opened_before_training(place, tmp_path, monkeypatch):
    class NeedsAFile(Metric):
        name, figures = "needs_a_file", ("needed",)

        def __init__(self):
            raise UserError("the weights of needs_a_file do not exist")

        def measure(self, images, reference):
            return {}

    METRICS.register("needs_a_file")(NeedsAFile)
    try:
        with pytest.raises(UserError, match="the weights of needs_a_file do not exist"):
            distill(configure(place, tmp_path))
    finally:
        METRICS.unregister("needs_a_file")
    assert not (tmp_path / "run").exists()


def test_two_processes_say_it_too(place, tmp_path):
    file = configure(place, tmp_path, evaluation="")
    outs = ranks(2, _refused, str(file), f"evaluation.reference={place}/damaged",
                 env=environment(ACCELERATE_USE_CPU="true", XDG_CACHE_HOME=str(tmp_path)))
    assert [json.loads(out.splitlines()[-1]) for out in outs] == ["000007.png cannot be read"] * 2
    assert not (tmp_path / "run").exists()


def _refused(file, *overrides):
    try:
        distill(file, overrides)
    except UserError as error:
        found = "000007.png cannot be read" if "000007.png cannot be read" in str(error) else str(error)
        print(json.dumps(found), flush=True)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_made_once(place, tmp_path, monkeypatch, method):
    """Also where nothing can be kept in a cache."""
    made = []
    collect = reference_module.collect
    monkeypatch.setattr(reference_module, "collect", lambda *given: made.append(1) or collect(*given))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="are not cached"):
        run = distill(configure(place, tmp_path, method, every=1 if method == "one" else 0))
    assert run.report.rows[-1].fid > 0 and made == [1]
    # A finished run is not opened again: its reference may have gone.
    again = distill(configure(place, tmp_path, method, every=1 if method == "one" else 0))
    assert again.report == run.report and made == [1]


@pytest.mark.parametrize("method", METHODS)
def test_with_nothing_set_speed_is_measured_and_a_line_says_what_to_set(place, tmp_path, cli, caplog, method):
    result = cli("distill", configure(place, tmp_path, method), "evaluation.features=null",
                 "evaluation.reference=null", "evaluation.batch_size=100", "train.batch_size=2")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["teacher", "student"]
    assert all(row["fid"] is None and row["images_per_second"] > 0 for row in report["rows"])
    assert report["num_images"] == 4  # two batches of no more than training has at once
    line = "nothing but speed is measured: set evaluation.features"
    assert line in result.out and caplog.text.count(line) == 1
