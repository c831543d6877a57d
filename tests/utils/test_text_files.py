"""Every text file that the project reads: encodings, byte-order marks, ends of lines, and who may open one."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from flowdistill.conditioning.prompts import read_prompts
from flowdistill.config import load_config, run_settings
from flowdistill.evaluation import Report, Row
from flowdistill.features.digits_classifier import DigitsClassifier, load_digits_classifier
from flowdistill.features.vision import load_vision
from flowdistill.methods.echodistill.concept_images import load_concept_images
from flowdistill.methods.msd.partition import split_classes
from flowdistill.plan.meta_teacher import read_architecture
from flowdistill.students import FlowMap, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.training.callbacks import truncate_metrics
from flowdistill.training.checkpoint import read_state
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import dump_yaml, parse_yaml, read_json, read_lines, read_text, read_yaml
from tests.families import PROMPTS, stable_diffusion
from tests.tiny import tiny_unet_pipeline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "output_dir: runs/é\nteacher:\n  source: t\nmethod:\n  name: freeflow\n"


@dataclass
class Reader:
    """A file that is read.

    Attributes:
        file: its path in the folder.
        text: what is written there; None: what ``prepare`` has left.
        read: folder -> what was understood of it.
        prepare: makes the rest of the folder.
    """

    file: str
    read: Callable[[Path], Any]
    text: str | None = None
    prepare: Callable[[Path], Any] | None = None


def noted(file: Path) -> None:
    """A JSON file over several lines, with a note that is not in ASCII."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_note": "é"}, indent=2, ensure_ascii=False) + "\n",
                    encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders that take long to make: pipelines, students and a network of transformers."""
    folder = tmp_path_factory.mktemp("made")
    tiny_unet_pipeline().save_pretrained(folder / "unet")
    (folder / "unet" / "flowdistill.json").write_text('{"null_label": 3}')
    stable_diffusion().save_pretrained(folder / "text")
    FlowMap.from_teacher(load_teacher(folder / "unet"), StudentInfo("freeflow", "t")).save(folder / "student")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "vision")
    (folder / "vision" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    a_classifier(folder / "classifier")
    for file in (*folder.rglob("config.json"), *folder.rglob("*_config.json"), *folder.rglob("model_index.json"),
                 *folder.rglob("flowdistill.json")):
        noted(file)
    return folder


def a_classifier(folder: Path) -> None:
    folder.mkdir()
    save_file(DigitsClassifier(width=4).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": {"width": 4}}')


def a_teacher(folder: Path) -> Any:
    teacher = load_teacher(folder)
    if teacher.prompts is not None:
        return teacher.encode(prompts=PROMPTS).tensors["prompt_embeds"].tolist()
    state = torch.ones(1, *teacher.shape)
    return teacher.classes, teacher.velocity(state, 0.5, teacher.encode([1])).tolist()


def a_student(folder: Path) -> Any:
    return load_student(folder).generate(labels=[1]).tolist()


def an_experiment(folder: Path) -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from run_experiment import read_experiment, read_results

        experiment = read_experiment(folder / "e.yaml")
        return experiment, read_results(experiment, folder)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def a_line_of_results(folder: Path) -> None:
    """An experiment whose one run is finished, and its line without the settings that decide it."""
    (folder / "base.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "e.yaml").write_text(f"name: e\nbase: {folder / 'base.yaml'}\nseeds: [0]\n")
    asked = {"base": str(folder / "base.yaml"), "overrides": ["seed=0"], "measured": None}
    line = {"label": "e", "seed": 0, "note": "é", **asked}
    (folder / "results.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "e" / "seed-0").mkdir(parents=True)
    (folder / "e" / "seed-0" / "report.json").touch()


def of(name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(MADE[0] / name, folder, dirs_exist_ok=True)

    return copy


MADE: list[Path] = []


@pytest.fixture(autouse=True)
def made_folders(made: Path) -> None:
    MADE[:] = [made]


def a_picture(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "1.png")


def a_base(folder: Path) -> None:
    (folder / "top.yaml").write_text("defaults_from: base.yaml\nseed: 3\n")


READERS = {
    "prompts": Reader("p.txt", lambda folder: read_prompts(folder / "p.txt"), "a café\n\nthe sea\u2028at night\n"),
    "prompts.jsonl": Reader("p.jsonl", lambda folder: read_prompts(folder / "p.jsonl"),
                            '{"prompt": "a café\u2028\x85", "weight": 3}\n\n{"prompt": "the sea"}\n'),
    "prompts.csv": Reader("p.csv", lambda folder: read_prompts(folder / "p.csv"),
                          'weight,prompt\n3,"a café\u2028\x85, alone"\n\n1,the sea\n'),
    "metadata.jsonl": Reader("metadata.jsonl", lambda folder: load_concept_images(folder, 8, "c").captions,
                             '{"file_name": "1.png", "text": "a café\u2028"}\n', a_picture),
    "configuration": Reader("c.yaml", lambda folder: load_config(folder / "c.yaml"),
                            CONFIG.replace("t\n", "t\n  negative_prompt: ugly\u2028\x85 \u2029too\n", 1)),
    "defaults_from": Reader("base.yaml", lambda folder: load_config(folder / "top.yaml"), CONFIG, a_base),
    "config of a run": Reader("config.yaml", run_settings, CONFIG + "  note: [a\u2028b]\n"),
    "partition, YAML": Reader("p.yaml", lambda folder: split_classes("file", 3, 2, file=folder / "p.yaml"),
                              "# é\n- [0, 1]\n- [2]\n"),
    "partition, JSON": Reader("p.json", lambda folder: split_classes("file", 3, 2, file=folder / "p.json"),
                              "[[0, 1],\n[2]]\n"),
    "report": Reader("r.json", lambda folder: Report.read_json(folder / "r.json"),
                     json.dumps(Report([Row("é", 1)], 9, "f\u2028", "r", 0).to_dict(), ensure_ascii=False, indent=1)),
    "checkpoint": Reader("state.json", read_state, '{"step": 3,\n"note": "é\u2028"}'),
    "experiment": Reader("e.yaml", an_experiment, "# é\nname: e\nbase: configs/digits/freeflow.yaml\nseeds: [0]\n"),
    "teacher": Reader("model_index.json", a_teacher, prepare=of("unet")),
    "teacher's scheduler": Reader("scheduler/scheduler_config.json", a_teacher, prepare=of("unet")),
    "teacher's network": Reader("unet/config.json", a_teacher, prepare=of("unet")),
    "teacher's record": Reader("flowdistill.json", a_teacher, prepare=of("unet")),
    "text encoder": Reader("text_encoder/config.json", a_teacher, prepare=of("text")),
    "tokenizer": Reader("tokenizer/tokenizer_config.json", a_teacher, prepare=of("text")),
    "tokenizer's words": Reader("tokenizer/tokenizer.json", a_teacher, prepare=of("text")),
    "prompts' pipeline": Reader("model_index.json", a_teacher, prepare=of("text")),
    "plan": Reader("model_index.json", lambda folder: read_architecture(str(folder)).components, prepare=of("unet")),
    "plan's network": Reader("unet/config.json", lambda folder: read_architecture(str(folder)).components,
                             prepare=of("unet")),
    "student": Reader("flowdistill.json", a_student, prepare=of("student")),
    "student's network": Reader("backbone/config.json", a_student, prepare=of("student")),
    "student's scheduler": Reader("scheduler/scheduler_config.json", a_student, prepare=of("student")),
    "classifier": Reader("config.json", lambda folder: load_digits_classifier(folder).config, prepare=of("classifier")),
    "vision": Reader("config.json", lambda folder: load_vision(f"transformers:{folder}", "x").mean.tolist(),
                     prepare=of("vision")),
    "vision's pictures": Reader("preprocessor_config.json",
                                lambda folder: load_vision(f"transformers:{folder}", "x").mean.tolist(),
                                prepare=of("vision")),
}
IN_ASCII = {"partition, JSON", "tokenizer's words"}  # nothing can be noted in them


def written(reader: Reader, folder: Path) -> tuple[Path, str]:
    folder.mkdir()
    if reader.prepare is not None:
        reader.prepare(folder)
    if reader.text is not None:
        (folder / reader.file).write_bytes(reader.text.encode())
    return folder / reader.file, (folder / reader.file).read_bytes().decode()


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_and_every_end_of_line_change_nothing(tmp_path, name):
    reader = READERS[name]
    file, text = written(reader, tmp_path / "f")
    assert "\n" in text and "\r" not in text
    assert text.isascii() == (name in IN_ASCII)
    expected = reader.read(tmp_path / "f")
    for encoding in ("utf-8", "utf-8-sig"):
        for end in ("\n", "\r\n", "\r"):
            file.write_bytes(text.replace("\n", end).encode(encoding))
            assert reader.read(tmp_path / "f") == expected, (encoding, end)


OTHERS = {"utf-16": "UTF-16", "utf-16-be": "UTF-16 without a byte-order mark", "utf-32": "UTF-32",
          "latin-1": "0xe9, as Latin-1"}


@pytest.mark.parametrize(("name", "encoding"), [
    (name, encoding) for name in READERS for encoding in OTHERS if encoding != "latin-1" or name not in IN_ASCII])
def test_other_encodings_are_refused_by_name(tmp_path, name, encoding):
    reader = READERS[name]
    file, text = written(reader, tmp_path / "f")
    file.write_bytes("".join(c for c in text if ord(c) < 256).encode(encoding))
    with pytest.raises(UserError) as caught:
        reader.read(tmp_path / "f")
    assert OTHERS[encoding] in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_log_that_a_crash_cut_short_is_read_as_far_as_it_goes(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", b'\xef\xbb\xbf{"step": 1, "a": "\xc3\xa9"}\r\n{"step": 2}\r'
    for rest in (b"", b'{"step": 3, "b": "\xc3', b"\0\0\0\0", b'{"step": 9}\n{"step": 2}\n'):
        path.write_bytes(whole + rest)
        truncate_metrics(path, 5)
        assert [json.loads(line)["step"] for line in read_lines(path)] == [1, 2]


def test_results_that_a_crash_cut_short(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    a_line_of_results(tmp_path)
    whole = (tmp_path / "results.jsonl").read_bytes()
    cut = whole.replace(b"\n", b"\r\n") + b'{"label": "\xc3'
    for content in (whole, b"\xef\xbb\xbf" + whole, cut, whole + b"\0\0"):
        (tmp_path / "results.jsonl").write_bytes(content)
        assert list(an_experiment(tmp_path)[1]) == [("e", 0)]


# --- lines


NO_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("mark", NO_BREAKS)
def test_only_three_ends_of_line(tmp_path, mark):
    text = tmp_path / "p.txt"
    text.write_bytes(f"one{mark}two\nthree\rfour\r\n\nfive".encode())
    assert read_lines(text) == [f"one{mark}two", "three", "four", "", "five"]
    assert read_prompts(text).prompts == [f"one{mark}two", "three", "four", "five"]
    lines = tmp_path / "p.jsonl"
    inside = mark if mark > "\x1f" else json.dumps(mark)[1:-1]  # JSON has the others as escapes only
    lines.write_bytes(f'{{"prompt": "one{inside}two"}}\n'.encode())
    assert read_prompts(lines).prompts == [f"one{mark}two"]


def test_files_with_marks_that_were_joined(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("a\n".encode("utf-8-sig") + "b\r\n".encode("utf-8-sig") + "c\ufeffd\n".encode())
    assert read_prompts(file).prompts == ["a", "b", "c\ufeffd"]  # within a line it may stand for a joiner
    assert read_text(file) == "a\nb\nc\ufeffd\n"


def test_empty_files(tmp_path):
    (tmp_path / "e").write_bytes(b"\xef\xbb\xbf")
    assert read_lines(tmp_path / "e") == [] and read_yaml(tmp_path / "e") is None
    with pytest.raises(UserError, match="e is not valid JSON: line 1, column 1"):
        read_json(tmp_path / "e")


@pytest.mark.parametrize(("text", "words"), [
    ('{"a": 1,}', "line 1, column"), ("[1\n2]", "line 2, column 1"), ("[" * 100_000, "recursion"),
    ("1" * 5000, "digits"), ("NaN x", "column 5"),
])
def test_json_that_is_none(tmp_path, text, words):
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(UserError, match=f"j.json is not valid JSON: .*{words}"):
        read_json(tmp_path / "j.json")


@pytest.mark.parametrize("line", ['{"prompt": "\\ud83d"}', '{"prompt": 3}', "[", "3", "null", "[" * 5000])
def test_lines_of_another_form_are_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r'line 3 of .*p.jsonl must be like \{"prompt"') as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert len(str(caught.value)) < 400


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="the file is nowhere: .*x does not exist|the prompts .*x does not exist"):
        read_text(tmp_path / "x", f"the prompts {tmp_path}/x")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


# --- YAML


@pytest.mark.parametrize(("text", "value"), [
    ("0010", "0010"), ("0x10", 16), ("0b11", 3), ("0o10", "0o10"), ("1_000", 1000), ("1_", "1_"), ("-3", -3), ("0", 0),
    ("12:30:00", "12:30:00"), ("1:30.5", "1:30.5"), ("2024-11-25", "2024-11-25"), ("2024_11_25", 20241125),
    ("1e3", 1000.0), ("1.5e-3", 0.0015), (".5", 0.5), ("1.", 1.0), ("-.inf", -float("inf")), ("yes", True),
    ("Off", False), ("y", "y"), ("~", None), ("null", None), ("", None), ("=", "="), ("'no'", "no"), ('"1"', "1"),
])
def test_plain_values(text, value):
    assert parse_yaml(f"a: {text}", "x") == {"a": value}
    written_as = parse_yaml(f"a: {text}", "x", as_written=True)["a"]
    assert written_as == (None if value is None else text.strip("'\""))


def test_mappings():
    text = "a: &a {x: 1, no: 2}\nb: &b {x: 3, z: 4, <<: *a}\nc: {<<: [*b, *a], y: {<<: *b, z: 5}}\n1: 2\n~: 3\n"
    value = parse_yaml(text, "x")
    assert value["b"] == {"x": 3, "z": 4, "no": 2} and value["c"] == {"y": value["b"] | {"z": 5}, **value["b"]}
    assert value["1"] == 2 and value["~"] == 3
    for text, words in (("a: 1\nb: {c: 1, c: 2}", "line 2, found duplicate key c"), ("a: {<<: 3}", "<< must name"),
                        ("a: 1\n---\nb: 1", "another document"), ("? [1]\n: 2", "unhashable"), ("a: [", "line 2")):
        with pytest.raises(UserError, match=f"x is not valid YAML: .*{words}"):
            parse_yaml(text, "x")


@pytest.mark.parametrize("mark", "\x85\u2028\u2029")
def test_the_line_breaks_of_yaml_1_1_break_no_line(mark):
    for text in (f"a: b{mark}c\nd: e", f"a: 'b{mark}c'\nd: e", f"a: \"b{mark}c\"\nd: e", f"a: |-\n  b{mark}c\nd: e"):
        assert parse_yaml(text, "x") == {"a": f"b{mark}c", "d": "e"}
    with pytest.raises(UserError, match="line 3, found duplicate key c"):
        parse_yaml(f"a: b{mark}\nc: 1\nc: 2", "x")


TEXTS = ["no", "y", "0010", "1e3", "12:30:00", "2024-11-25", "null", "~", "", " x", "x ", "'q'", '"q"', "a: b", "# c",
         "a #b", "\ufeffx", "l1\nl2", "\U0010f000x", "é", "- a", "[a]", "{a}", "$x", "!t", "&a", "*a", "%p", "@p", "`p",
         "1_000", "0x10", "=", "<<", ".inf", "a\tb", "a\rb", "y" * 300 + " z", *(f"a{mark}b" for mark in NO_BREAKS),
         "\u2028", "\u2028 \x85"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_as_they_were(text):
    import yaml

    value = {"a": text, "b": [text], "c": {"d": 1.5, "e": None, "f": True, "g": [1, 2]}}
    assert parse_yaml(dump_yaml(value), "x") == value == yaml.safe_load(dump_yaml(value))


# --- the next file


def test_no_other_module_opens_a_text_file():
    """A file that is read elsewhere would be read in another way: utils/text.py is the one place."""
    found = []
    for file in (*(ROOT / "flowdistill").rglob("*.py"), *(ROOT / "scripts").glob("*.py")):
        if file.relative_to(ROOT).as_posix() == "flowdistill/utils/text.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and reads_text(node):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found


def reads_text(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in ("json.load", "csv.reader", "csv.DictReader", "OmegaConf.load") or name.startswith("yaml."):
        return True
    if name.endswith((".read_text", ".readlines")):
        return True
    if name == "open" or name.endswith(".open") and not name.startswith((
        "Demo.", "Image.", "archive.", "os.", "webbrowser.", "tarfile.", "pictures.", "self.pictures."
    )):
        mode = call.args[1] if name in ("open", "io.open") and len(call.args) > 1 else next(iter(call.args), None)
        mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), mode)
        written = ast.literal_eval(mode) if isinstance(mode, ast.Constant) else "r"
        return "b" not in str(written) and not set("wax") & set(str(written))
    return False
