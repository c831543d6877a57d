"""``flowdistill report``: the page of runs in every state, as a parser and a reader without a network see it."""

import base64
import io
import json
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from flowdistill import __version__
from flowdistill.evaluation import Report, Row
from flowdistill.training.run_page import GRIDS, names, write_report
from flowdistill.training.run_record import read_run
from flowdistill.utils.charts import POINTS, Line, chart, log_ticks, thinned, ticks
from flowdistill.utils.errors import UserError
from flowdistill.utils.html import HEAVIEST, WIDEST, picture

VOID = {"meta", "link", "img", "input", "br"}
SETTINGS = """output_dir: {folder}
seed: 3
teacher: {{source: assets/digits-flow}}
method: {{name: freeflow, optimizer: {{lr: 0.002}}}}
train: {{log_every: 20, steps: 40, ema_decay: 0.98}}
evaluation: {{num_images: 10}}
started_in: /some where
"""


class Page(HTMLParser):
    """What a page is made of; wrong nesting is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.words = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(page: Page) -> None:
    """Nothing from elsewhere, every picture decodes and has words, headings follow each other, links lead somewhere."""
    assert not re.search(r"@import|url\(|\ssrcset=|<(iframe|object|embed|base|form)\b", page.text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:60])
        assert not any(name.startswith("on") for name in attributes)
    for image in page.of("img"):
        assert image["alt"].strip() and image["src"].startswith("data:image/")
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as opened:
            opened.load()
            assert [str(side) for side in opened.size] == [image["width"], image["height"]]
    assert all(drawing.get("aria-label") or drawing.get("aria-hidden") for drawing in page.of("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    found = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(found) == len(set(found))
    assert {link["href"][1:] for link in page.of("a")} <= set(found)
    assert page.of("html")[0]["lang"] == "en" and "prefers-color-scheme: dark" in page.text
    assert "NaN" not in page.said and "None" not in page.said.replace("NoneType", "")


def grid(path: Path, size=(66, 34)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 128).save(path)


def lines(folder: Path, steps=(10, 20, 30, 40), **figures) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "images": 8 * step, "seconds": step / 4, "images_per_second": 100.0 + step,
             "lr/student": 1e-3, "loss/student": 1 / step, "student/residual": None if step == 20 else 2.0,
             "skipped": 0, **figures} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, settings=SETTINGS, **figures) -> Path:
    """A run folder that has come to its end."""
    lines(folder, **figures)
    (folder / "config.yaml").write_text(settings.format(folder=folder))
    for name in ("comparison", "final", "step-000000", "step-000020", "step-000040"):
        grid(folder / "samples" / f"{name}.png")
    report = Report([Row("teacher", 50, 10.0, fid=0.25, fid_std=0.1), Row("student", 1, 90.0, fid=1.5)], 10, "digits",
                    "digits", 0, 1.25, {"torch": "2.9", "device": "cpu", "labels": None, "floors": [1, 2]})
    report.write_json(folder / "report.json")
    return folder


def page_of(*folders) -> Page:
    out = Path(folders[0]).parent / "page.html"
    write_report(folders, out)
    page = Page(out.read_text(encoding="utf-8"))
    check(page)
    return page


def test_a_page_has_what_a_run_came_to(tmp_path):
    page = page_of(make_run(tmp_path / "a run"))
    for words in ("finished", "freeflow", "assets/digits-flow", "40 of 40", "320", "10.0 s", "125.0", "FID ↓ KID",
                  "0.250±0.100", "1.500", "lower is better", "torch 2.9 on cpu", "halves of the reference: 1.250",
                  "method.optimizer.lr 0.002 0.0001", "train.ema_decay 0.98 0.999"):
        assert words in page.said, words
    assert "method.optimizer.weight_decay 0.0 0.0" not in page.said  # what is not in config.yaml is not shown
    # What nobody changed comes after what somebody did, and is folded up.
    opened = [("open" in attributes) for attributes in page.of("details")]
    assert opened[-1] is False and page.said.index("train.ema_decay") < page.said.index("train.log_every 20")
    for command in (f"cd '/some where' && flowdistill distill '{tmp_path}/a run/config.yaml' "
                    f"output_dir='{tmp_path}/a run-again'", f"evaluate '{tmp_path}/a run' --num-images 10 --seed 0",
                    f"flowdistill export '{tmp_path}/a run' exported/"):
        assert command in page.said, command
    assert [figure["data-step"] for figure in page.of("figure") if "data-step" in figure] == ["0", "20", "40"]
    label = next(drawing["aria-label"] for drawing in page.of("svg") if "loss/student" in drawing.get("aria-label", ""))
    assert label == "loss/student by step: all 0.1 at step 10 to 0.025 at step 40"
    assert "skipped" not in page.said  # nothing was


def drop(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()
    return change


def cut_short(folder):
    drop("samples/final.png", "samples/comparison.png", "report.json")(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "loss/stu')


def spoil(folder):
    (folder / "samples" / "final.png").write_bytes(b"\x89PNG no picture")
    (folder / "report.json").write_text('{"rows": 3}')


def several(folder):
    for name in ("student-10", "student-2"):
        make_run(folder / name)
        (folder / name / "report.json").unlink()
    drop("metrics.jsonl")(folder)


def empty(folder):
    for file in [*folder.glob("samples/*"), folder / "metrics.jsonl", folder / "report.json"]:
        file.unlink()


def strange(folder):
    (folder / "config.yaml").write_text("method: {name: gone, sharpness: 2}\nteacher: {source: x}\noutput_dir: y\n")


def carded(folder):
    for name in ("student", "teacher"):
        grid(folder / name / "validation.png")


@pytest.mark.parametrize(("change", "words", "pictures"), [
    (cut_short, ["has not come to its end; its last line is of 20", "without 1 line of", "40 of 40",
                 "No evaluation is there", "No picture of its end", "to its end, from its last checkpoint"], 3),
    (spoil, ["final.png cannot be read", "is no report of an evaluation", "No evaluation is there"], 4),
    (several, ["student-2 40, student-10 40", "20.0 s", "student-2", "1.500"], 8),
    (empty, ["nothing is logged yet", "0 of 40", "No sample grids are there", "Nothing is logged yet"], 0),
    (strange, ["without the defaults of its settings: ", "method.sharpness 2", "gone"], 5),
    (carded, ["Validation pictures in teacher/ Validation pictures in student/"], 7),
    (drop("samples/step-000000.png", "samples/step-000020.png", "samples/step-000040.png"), ["No sample grids"], 2),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_page_of_a_run_in_any_state(tmp_path, change, words, pictures):
    change(make_run(tmp_path / "run"))
    page = page_of(tmp_path / "run")
    for text in words:
        assert text in page.said, (text, page.said)
    assert len(page.of("img")) == pictures


@pytest.mark.parametrize("line", [
    '{"step": 1e400, "a": 1}', '{"step": -5, "a": 1}', '{"step": "12", "a": 1}', '{"step": null}', '{"step": true}',
    '{"step": ' + "9" * 400 + "}", '{"step": ' + "9" * 5000 + "}", "[1]", "3", '{"step": 4, "best_step": "x"}', "\0\0",
    '{"step": 4, "images": [1]}', "[" * 100_000,
], ids=lambda line: line[:24])
def test_a_line_that_no_run_writes_is_counted_and_left_out(tmp_path, line):
    lines(make_run(tmp_path / "run"))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    part = read_run(tmp_path / "run", "run").parts[0]
    assert part.damaged == 1 and part.step == 40 and set(part.last) >= {"step", "loss/student"}
    assert "without 1 line of" in page_of(tmp_path / "run").said


@pytest.mark.parametrize(("values", "shown"), [
    ([5e-324, 1.7e308], None), ([-1.7e308, 1.7e308], None), ([5e-324], "4.94e-324"), ([1e-320, 1e299], "1e-320"),
    ([-9e299, 9e299], "-9.0e+299"), ([float("nan"), float("inf"), 2.0], "2 at step 3"), ([0.0, -0.0], "-0 at step 2"),
    ([10**400, 3], "3 at step 2"), ([1e-299, 9e299], "1e-299"),
])
def test_figures_of_any_size_are_drawn_or_left_out(tmp_path, values, shown):
    make_run(tmp_path / "run")
    rows = [{"step": step, "odd": value, "seconds": value} for step, value in enumerate(values, 1)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path / "run")
    labels = [drawing["aria-label"] for drawing in page.of("svg") if "odd by" in drawing.get("aria-label", "")]
    assert bool(labels) == (shown is not None or 5e-324 in values) and "nan" not in page.text.lower().split("<svg")[-1]
    assert shown is None or shown in labels[0]


@pytest.mark.parametrize("change", [
    {"rows": None}, {"rows": ["a"]}, {"num_images": "10"}, {"num_images": None}, {"seed": []}, {"protocol": []},
    {"protocol": None}, {"fid_floor": "x"}, {"fid_floor": float("nan")}, {"features": 3}, {"reference": ["a"]},
    {"protocol": {"teacher_remarks": 5}}, {"protocol": {"note": [1]}}, {"protocol": {"distance": None}},
    *({"rows": [{"model": "student", "calls": 1, "fid": 1.5} | row]} for row in (
        {"fid": "<b>"}, {"fid": float("inf")}, {"fid": [1]}, {"calls": 0}, {"calls": -1}, {"calls": "x"}, {"model": 5},
        {"stored_parameters": 3}, {"images_per_second": {}}, {"images_per_second": float("nan")},
        {"per_part_fid": [1]})),
], ids=str)
def test_a_report_that_is_none_is_said_to_be_none(tmp_path, change):
    file = make_run(tmp_path / "run") / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"report.json is no report of an evaluation, or one of another version: ."):
        Report.read_json(file)
    page = page_of(tmp_path / "run")
    assert "is no report of an evaluation" in page.said and "No evaluation is there" in page.said


@pytest.mark.parametrize("figures", [{"fid": 1e308}, {"fid": 1e-310}, {"fid": 1.0, "fid_std": 1e308}, {"fid": -0.0}])
def test_distances_of_any_size_are_in_the_table(tmp_path, figures):
    Report([Row("student", 1, 90.0, **figures)], 10, "digits", "digits", 0).write_json(
        make_run(tmp_path / "run") / "report.json")
    page = page_of(tmp_path / "run")
    assert f"{figures['fid']:.3f}"[:200] in page.text and "FID by network calls" not in page.said


def test_several_runs_stand_side_by_side(tmp_path):
    one, two = make_run(tmp_path / "one" / "seed-0"), make_run(tmp_path / "two" / "seed-0")
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("0.98", "0.9"))
    page = page_of(one, two)
    assert "2 runs of flowdistill" in page.said and "What differs between these runs (2)" in page.said
    assert "train.ema_decay 0.98 0.9 0.999" in page.said
    assert page.said.count("teacher 50") == 1
    assert "one/seed-0: student 1" in page.said and "two/seed-0: student 1" in page.said
    loss = next(drawing for drawing in page.of("svg") if "loss/student" in drawing.get("aria-label", ""))
    assert "one/seed-0 0.1 at" in loss["aria-label"] and "two/seed-0 0.1 at" in loss["aria-label"]
    values = json.loads((two / "report.json").read_text()) | {"num_images": 20}
    (two / "report.json").write_text(json.dumps(values))
    page = page_of(one, two)
    assert "their figures cannot be compared" in page.said and page.said.count("teacher 50") == 2
    assert names([one, two]) == ["one/seed-0", "two/seed-0"] and names([one]) == ["seed-0"]
    assert names(["/a", "/a/b"]) == ["a", "b"]
    with pytest.raises(UserError, match="is given twice"):
        names([one, f"{two.parent}/../one/seed-0"])


def test_a_page_has_the_versions_that_runs_were_trained_with(tmp_path):
    """And not those of the machine that makes the page."""
    starts = {"a": [(0, "2.8<"), (20, "2.9")], "b": [(0, "2.9")], "c": [(0, "2.9"), (0, "2.8<")], "old": []}
    for name, environments in starts.items():
        make_run(tmp_path / name)
        text = "".join(json.dumps({"step": step, "environment": {"torch": version, "devices": "a card"}}) + "\n"
                       for step, version in environments)
        (tmp_path / name / "environment.jsonl").write_text(text)
    page = page_of(*(tmp_path / name for name in starts))
    assert "trained with a, c a, from step 20, b torch 2.8< 2.9 devices a card a card" in page.said
    assert "What old was trained with is not recorded." in page.said
    assert f"This page was written with flowdistill {__version__}." in page.said


def test_what_users_write_is_text(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    settings = SETTINGS.replace("assets/digits-flow", json.dumps(evil))
    folder = make_run(tmp_path / "<b>&'\"run", settings, **{"loss/<i>x": 2.0})
    values = json.loads((folder / "report.json").read_text())
    values["rows"][0]["model"], values["protocol"]["note"] = evil, evil
    (folder / "report.json").write_text(json.dumps(values))
    page = page_of(folder, make_run(tmp_path / "other"))
    assert page.said.count(evil) >= 3 and len(page.of("script")) == 1 and not page.of("b") and not page.of("i")


def test_figures_of_each_call_lie_over_each_other(tmp_path):
    folder = make_run(tmp_path / "run", **{"student/size": 1.0, "student/size/2": 3.0, "student/size/1": 2.0})
    page = page_of(folder)
    label = next(drawing["aria-label"] for drawing in page.of("svg") if "student/size" in drawing.get("aria-label", ""))
    assert re.findall(r"(all|call \d) (\d) at step 10", label) == [("all", "1"), ("call 1", "2"), ("call 2", "3")]


def test_many_grids_and_long_curves_are_thinned(tmp_path):
    folder = make_run(tmp_path / "run")
    for step in range(60, 2060, 20):
        grid(folder / "samples" / f"step-{step:06d}.png")
    steps = [int(figure["data-step"]) for figure in page_of(folder).of("figure") if "data-step" in figure]
    assert len(steps) == GRIDS and steps[0] == 0 and steps[-1] == 2040
    points = [(step, 5.0 if step == 777 else -1.0 if step == 3 else 0.1) for step in range(5000)] + [(5000, None)]
    kept = thinned(Line("", points))
    assert len(kept) <= POINTS + 2 and (777, 5.0) in kept and (3, -1.0) in kept and kept == sorted(kept)


def test_pictures_in_a_page_are_neither_wide_nor_heavy(tmp_path):
    noisy = Image.effect_noise((WIDEST + 400, 400), 80).convert("RGB")
    noisy.save(tmp_path / "noisy.png")
    for image in (noisy, tmp_path / "noisy.png"):
        found = Page(picture(image, "noise")).of("img")[0]
        assert found["width"] == str(WIDEST) and found["src"].startswith("data:image/jpeg")
        assert len(found["src"]) < 4 * HEAVIEST
    grid(tmp_path / "small.png")
    stored = base64.b64decode(Page(picture(tmp_path / "small.png", "x")).of("img")[0]["src"].split(",")[1])
    assert stored == (tmp_path / "small.png").read_bytes()


def test_a_file_that_claims_to_be_a_huge_picture_is_a_sentence(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert "x.png cannot be read: Image size (3600000000 pixels) exceeds" in picture(tmp_path / "x.png", "x")


def test_charts_keep_to_their_frame():
    for values in ([1.0], [3.0, 3.0], [0.0, 0.0], [-1.0, 1.0], [1e-8, 1e-2], [1.0, None, 2.0], [float("inf"), 1.0],
                   [1e9, 2e9]):
        drawn = chart("figure", [Line("a", list(enumerate(values)))])
        places = [float(number) for number in re.findall(r"[ML](-?[\d.]+) ", drawn)]
        heights = [float(number) for number in re.findall(r"[ML]-?[\d.]+ (-?[\d.]+)", drawn)]
        assert places and all(0 <= place <= 460 for place in places) and all(0 <= height <= 230 for height in heights)
    assert chart("figure", [Line("a", [(0, None)])]) == "" == chart("figure", [])
    assert ticks(0, 1000, 4) == [0, 250, 500, 750, 1000] and ticks(0.1, 0.34, 4) == [0.1, 0.2, 0.3]
    assert log_ticks(-0.1, 1.1) == [1, 2, 5, 10] and len(log_ticks(-8, 0, 4)) <= 9


def test_the_command_and_what_it_refuses(tmp_path, cli, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = cli("report", "run")
    assert result.code == 0 and "report.html: a page of the run" in result.out
    check(Page((tmp_path / "report.html").read_text(encoding="utf-8")))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "folder.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")
    for arguments, sentence in ((["nothing"], "nothing is no run folder: it has no config.yaml"),
                                (["nowhere"], "nowhere does not exist"), (["run", "run"], "given twice"),
                                (["report.html"], "report.html is a file; give the folder of a run"),
                                (["run", "--out", "nothing"], "must be a .html file"),
                                (["run", "--out", "folder.html"], "is a folder"),
                                (["run", "--out", "pipe.html"], "is a device or a pipe"),
                                (["run", "--out", "run/metrics.jsonl"], "must be a .html file")):
        result = cli("report", *arguments)
        assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert read_run("run", "run").planned == 40
