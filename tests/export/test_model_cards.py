"""The model cards of exports and students: their data, their code, and what a run adds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard, constants

from flowdistill import __version__
from flowdistill.config import METHODS, RunConfig, save_config
from flowdistill.evaluation.report import Report, Row
from flowdistill.export import card_data, export
from flowdistill.export.card_data import (
    about_license,
    about_paper,
    about_report,
    eval_results,
    is_hub_id,
    license_of,
    portable,
    portable_report,
)
from flowdistill.export.student_cards import write_student_card
from flowdistill.students import FlowMap, Generator, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.utils.images import save_grid
from tests.fake_hub import Repository, serving
from tests.families import FAMILIES
from tests.students_of_steps import moved, pixel_student, steps_of
from tests.tiny import VP, tiny_dit_pipeline, tiny_unet_pipeline


def one_step(pipeline: Any, **settings: Any) -> FlowMap:
    return FlowMap.from_teacher(load_teacher(pipeline, **settings), StudentInfo("freeflow", "someone/teacher"))


def of_family(name: str, count: int) -> Any:
    family = FAMILIES[name]
    teacher = load_teacher(family.make(), image_size=family.image_size)
    info = StudentInfo("dmd2", "someone/teacher")
    if count == 1:
        return FlowMap.from_teacher(teacher, info)
    return moved(Generator.from_teacher(teacher, info, steps=steps_of(teacher, count, "stochastic")))


STUDENTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "pixels": (lambda: one_step(tiny_unet_pipeline()), "unconditional-image-generation", "one-step"),
    "pixels, 4 steps": (lambda: pixel_student(DDIMScheduler(**VP, clip_sample=False)),
                        "unconditional-image-generation", "few-step"),
    "a pipeline a class": (lambda: pixel_student(FlowMatchEulerDiscreteScheduler()),
                           "unconditional-image-generation", "few-step"),
    "dit": (lambda: one_step(tiny_dit_pipeline()), "unconditional-image-generation", "one-step"),
    "sd": (lambda: of_family("sd", 1), "text-to-image", "one-step"),
    "sdxl, 4 steps": (lambda: of_family("sdxl", 4), "text-to-image", "few-step"),
    "sd3": (lambda: of_family("sd3", 1), "text-to-image", "one-step"),
    "flux-dev, 4 steps": (lambda: of_family("flux-dev", 4), "text-to-image", "few-step"),
    "pixart": (lambda: of_family("pixart-sigma", 1), "text-to-image", "one-step"),
}


def run_code(folder: Path) -> dict[str, Any]:
    """The names that the card's first block of Python leaves."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.parametrize("name", STUDENTS)
def test_the_cards_code_runs_and_its_data_are_the_hubs(tmp_path: Path, name: str) -> None:
    make, tag, steps = STUDENTS[name]
    student = make()
    export(student, tmp_path)
    images = run_code(tmp_path)["images"]
    assert len(images) == (1 if tag == "text-to-image" else 4)
    card = ModelCard.load(tmp_path / "README.md")
    data, text = card.data.to_dict(), card.text
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", tag)
    assert {"flowdistill", "distillation", steps, student.info.method} <= set(data["tags"])
    assert "license" not in data and "could not be read" in text
    if student.info.base_model == "someone/teacher":
        assert (data["base_model"], data["base_model_relation"]) == ("someone/teacher", "finetune")
    scheduler = json.loads(next(tmp_path.rglob("scheduler_config.json")).read_text())["_class_name"]
    assert f"`{scheduler}`" in text and "guidance scale" in text and "| t |" in text or "is at t = " in text
    assert "arXiv " in text and f"flowdistill {__version__}" in text
    assert str(tmp_path) not in text and str(Path.cwd()) not in text


def test_the_code_of_a_students_card_runs(tmp_path: Path) -> None:
    student = pixel_student(DDIMScheduler(**VP, clip_sample=False))
    student.save(tmp_path / "student")
    write_student_card(tmp_path / "student", student)
    assert run_code(tmp_path / "student")["images"].shape == (4, 1, 8, 8)
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.library_name == "flowdistill" and "guidance" in card.text and str(tmp_path) not in card.text


def test_every_paper_of_a_method_is_cited() -> None:
    for name in METHODS:
        papers = re.findall(r"\d{4}\.\d{5}", METHODS.get(name).about.paper)
        cited = about_paper(name)
        assert all(paper in cited for paper in papers) and bool(papers) == bool(cited), name
    assert about_paper("consistency").count("\n- ") == 4 and about_paper("unknown") == ""


# --- the teacher's licence


def teacher_card(folder: Path, data: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{data}\n---\n# A teacher\n")
    return folder


@pytest.mark.parametrize(("data", "expected"), [
    ("license: mit", {"license": "mit"}),
    ("license: other\nlicense_name: own-terms\nlicense_link: https://terms.example",
     {"license": "other", "license_name": "own-terms", "license_link": "https://terms.example"}),
    ("tags: [a]", {}),
    ("license_name: without-a-license", {}),
    ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
    ("license:\n- mit", {"license": "mit"}),
    ("license: [mit, 3]", {}), ("license: {a: b}", {}), ("license: 3", {}), ("license:", {}), ("license: []", {}),
    ("1: 2\nlicense: mit", {"license": "mit"}),
    ("yes: 2\n~: 3\nself: 4\nignore_metadata_errors: 5\nlicense: mit", {"license": "mit"}),
    ("license: mit\ntags: 3\nlanguage: 5\nmodel-index: 6\neval_results: 7", {"license": "mit"}),
    ("license: mit\nlicense_link: LICENSE", {"license": "mit"}),  # which is beside the teacher's card alone
    ("license: mit\nlicense_link: 'javascript:alert(1)'", {"license": "mit"}),
    ('license: other\nlicense_name: "two\\nlines"', {"license": "other", "license_name": "two lines"}),
    ('license: "m\\0it"', {}), ("- a list", {}), ("a text", {}), ("[" * 5000, {}), ("", {}),
    ("a: [broken", {}),
])
def test_the_licence_is_the_one_in_the_teachers_card(tmp_path: Path, data: str, expected: dict[str, str]) -> None:
    assert license_of(str(teacher_card(tmp_path / "teacher", data))) == expected


@pytest.mark.parametrize(("content", "known"), [
    ("---\nlicense: mit\n---\n" + "x" * 2_000_000, True), ("\ufeff---\r\nlicense: mit\r\n---\r\n", True),
    ("---\nlicense: mit\n---", True), ("\n---\nlicense: mit\n---\nA\n---\nlicense: gpl\n---\n", True),
    ("---\nlicense: mit\n", False), ("# A\n---\nlicense: mit\n---\n", False), ("", False),
    ("---\nlicense: mit\n---\n\xe9".encode("latin-1"), False), ("---\nlicense: mit\n---\n".encode("utf-16"), False),
], ids=lambda value: repr(value)[:24])
def test_cards_in_any_state_are_read(tmp_path: Path, content: str | bytes, known: bool, caplog, capfd) -> None:
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert license_of(str(tmp_path)) == ({"license": "mit"} if known else {})
    assert not caplog.text and not "".join(capfd.readouterr())


def test_the_words_of_a_licence_are_text() -> None:
    words = about_license({"license": "other", "license_name": "<b>[x](y)`"}, "teacher")
    assert r"\<b\>\[x\](y)\`" in words
    assert ": mit, gpl-3.0." in about_license({"license": ["mit", "gpl-3.0"]}, "teacher")


def test_no_path_of_this_machine_is_in_the_figures() -> None:
    measured = report("dinov2:/home/me/dino")
    measured.reference = "/home/me/images"
    measured.protocol |= {"note": "of the images in /home/me/images", "list": ["clip:~/clip"],
                          "a": {"b": "/home/me/c"}}
    shown = portable_report(measured)
    assert (shown.features, shown.reference) == ("dinov2:path/to/dino", "path/to/images")
    said = about_report(shown) + str(shown.protocol) + str(eval_results(shown, 1))
    assert "/home" not in said and "of the images in path/to/images" in said and "clip:path/to/clip" in said
    assert measured.reference == "/home/me/images"
    for untouched in ("https://x.org/a", "assets/digits-flow", "clip:openai/clip", "a:b", "n/a", "1:2", ""):
        assert portable(untouched) == untouched
    assert portable({"a": ["file:///home/me/x", "/home/me/y"]}) == {"a": ["file://path/to/x", "path/to/y"]}


def test_no_card_no_licence(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License")
    assert license_of(str(tmp_path)) == license_of("someone/unknown") == license_of("") == {}


def test_the_licence_of_a_repository_is_read_from_its_cached_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to a file of the repository becomes one to the hub."""
    card = teacher_card(tmp_path, "license: other\nlicense_name: terms\nlicense_link: LICENSE.md") / "README.md"
    monkeypatch.setattr(card_data, "try_to_load_from_cache", lambda *arguments: str(card))
    assert license_of("someone/teacher")["license_link"] == \
        "https://huggingface.co/someone/teacher/blob/main/LICENSE.md"


def test_the_licence_of_a_repository_is_read_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.repositories["them/teacher"] = Repository(False, {"main": {"README.md": b"---\nlicense: mit\n---\n# A\n"}})
        assert license_of("them/teacher") == {"license": "mit"} and license_of("them/none") == {}


@pytest.mark.parametrize(("source", "expected"), [
    ("someone/teacher", True), ("./someone/teacher", False), ("path/to/teacher", False), ("path/teacher", False),
    ("/a/b", False), ("assets/digits-flow", False), ("", False), ("teacher", False),
])
def test_what_can_be_a_hub_id(source: str, expected: bool) -> None:
    assert is_hub_id(source) == expected


def test_an_export_carries_the_licence(tmp_path: Path) -> None:
    teacher = teacher_card(tmp_path / "teacher", "license: apache-2.0")
    student = FlowMap.from_teacher(load_teacher(tiny_unet_pipeline()), StudentInfo("freeflow", str(teacher)))
    export(student, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and "base_model" not in card.data.to_dict()
    assert "`path/to/teacher`: apache-2.0." in card.text


# --- what a run adds


def report(features: str = "digits") -> Report:
    rows = [Row("teacher", 50, 10.0, fid=1.5), Row("student", 1, 900.0, fid=2.25, accuracy=0.96),
            Row("student", 4, 300.0, fid=2.0)]
    return Report(rows, 5000, features, "digits", 7)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, as far as a card needs it."""
    folder = tmp_path / "runs" / "mine"
    info = StudentInfo("freeflow", str(tmp_path / "teacher"))
    student = FlowMap.from_teacher(load_teacher(tiny_unet_pipeline()), info)
    student.save(folder / "student")
    config = RunConfig(str(folder), method=METHODS.get("freeflow").Config(), started_in=str(tmp_path))
    config.teacher.source = str(tmp_path / "teacher")
    save_config(config, folder / "config.yaml")
    report().write_json(folder / "report.json")
    save_grid(student.generate(num_images=4), folder / "samples" / "final.png")
    return folder


def test_an_export_of_a_run_shows_samples_figures_and_how_to_make_it_again(
    cli: Callable, run: Path, tmp_path: Path
) -> None:
    outcome = cli("export", run, tmp_path / "out")
    assert outcome.code == 0 and "flowdistill push" in outcome.out
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert "![samples](samples.png)" in text
    assert (tmp_path / "out" / "samples.png").read_bytes() == (run / "samples" / "final.png").read_bytes()
    assert "| student | 1 | 2.250" in text and "5000 images, features digits, reference digits, seed 7" in text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["frechet_distance"].metric_value == 2.25 and results["accuracy"].metric_value == 0.96
    assert "5000 images" in results["frechet_distance"].metric_name and "fid" not in results
    settings = text.split("```yaml\n")[1].split("```")[0]
    assert "flowdistill distill config.yaml\nflowdistill export runs/again exported\n" in text
    assert "source: path/to/teacher" in settings and "started_in" not in settings and str(tmp_path) not in text
    run_code(tmp_path / "out")


@pytest.mark.parametrize("option", [("--guidance-scale", "1")])
def test_the_options_of_an_export_are_in_its_commands(
    cli: Callable, run: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    assert cli("export", run, tmp_path / "out", *option).code == 0
    assert f"exported {' '.join(option)}\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_student_of_a_run_has_the_same_in_its_card(run: Path, tmp_path: Path) -> None:
    for _ in range(2):  # it is written anew, and nothing twice
        write_student_card(run / "student", load_student(run), run)
    text = (run / "student" / "README.md").read_text()
    assert text.count("## Measured") == text.count("## Samples") == text.count("## Make it again") == 1
    assert (run / "student" / "samples.png").is_file() and str(tmp_path) not in text


def test_a_folder_that_only_the_run_finds_is_no_hub_id(
    cli: Callable, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path looks like owner/name from elsewhere."""
    teacher_card(tmp_path / "teachers" / "mine", "license: mit")
    for file in (run / "config.yaml", run / "student" / "flowdistill.json"):
        file.write_text(file.read_text().replace(str(tmp_path / "teacher"), "teachers/mine"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("export", run, "out").code == 0
    data = ModelCard.load(tmp_path / "elsewhere" / "out" / "README.md").data.to_dict()
    assert data["license"] == "mit" and "base_model" not in data and "base_model_relation" not in data


def test_a_run_that_measured_nothing_says_nothing_of_figures(cli: Callable, run: Path, tmp_path: Path) -> None:
    (run / "report.json").unlink()
    (run / "samples" / "final.png").unlink()
    assert cli("export", run, tmp_path / "out").code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Measured" not in text and "model-index" not in text and "samples.png" not in text


def test_what_an_export_prints_can_be_run_whatever_its_folder_is_called(
    cli: Callable, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / """it's "q" \\ and\ntwo lines \xe9"""
    outcome = cli("export", run, folder)
    assert outcome.code == 0, outcome.err
    code, command = outcome.out.split("pipeline\n\n", 1)[1].split("# README.md is its model card; to upload both: ")
    names: dict[str, object] = {}
    exec(code.split("images =")[0], names)
    assert isinstance(names["pipe"], DiffusionPipeline)
    assert shlex.split(command) == ["flowdistill", "push", str(folder), "owner/name"]


@pytest.mark.parametrize(("features", "kind"), [("inception", "fid"), ("digits", "frechet_distance")])
def test_only_inceptions_distance_is_called_fid(features: str, kind: str) -> None:
    results = eval_results(report(features), 1)
    assert kind in {result.metric_type for result in results}
    assert [result.metric_value for result in eval_results(report(features), 4)] == [2.0]
    assert eval_results(report(features), 2) == []


def test_nothing_is_claimed_without_a_reference() -> None:
    speed = report()
    speed.features = speed.reference = None
    assert eval_results(speed, 1) == []
