"""Folders for benchmarks: their layouts, the same files however the work is cut, and what is refused."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import load_teacher
from flowdistill.cli import main
from flowdistill.evaluation import suites, teacher_sampler
from flowdistill.evaluation.suites import SUITES, read_suite, write_suite
from flowdistill.utils.errors import UserError
from flowdistill.utils.exit import exit_process
from flowdistill.utils.images import to_uint8
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import indexed_noise
from tests.families import stable_diffusion
from tests.processes import Child, environment
from tests.tiny import tiny_unet_pipeline

COLOURS = ["red", "green", "blue"]
METADATA = [{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": colour}],
             "prompt": f"a photo of a {colour} cat"} for colour in COLOURS]
LAYOUTS = {
    "geneval": [f"{n:05d}/samples/{j:04d}.png" for n in range(3) for j in range(4)] + [
        f"{n:05d}/metadata.jsonl" for n in range(3)],
    "dpg": ["12.png", "midjourney7.png", "9.png"],
    "hps": [f"{style}/{n:05d}.jpg" for style in ("anime", "concept-art", "paintings", "photo") for n in range(2)],
    "drawbench": ["00000.jpg", "00001.jpg", "00002.jpg"],
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(stable_diffusion())


@pytest.fixture
def given(tmp_path):
    """What each benchmark's prompts are read from."""
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, METADATA)) + "\n")
    (tmp_path / "dpg").mkdir()
    for name in ("9", "12", "midjourney7"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"picture {name}\n")
    (tmp_path / "hps").mkdir()
    for style in suites.HPSv2.styles:
        (tmp_path / "hps" / f"{style}.json").write_text(json.dumps([f"{style} of a cat", f"{style} of a dog"]))
    (tmp_path / "drawbench.json").write_text(json.dumps(COLOURS))
    return {"geneval": tmp_path / "evaluation_metadata.jsonl", "dpg": tmp_path / "dpg", "hps": tmp_path / "hps",
            "drawbench": tmp_path / "drawbench.json"}


def prompts_of(name, given):
    with pytest.warns(UserWarning, match="scores are not comparable"):
        return read_suite(name, given[name])


def make(name, prompts, teacher, out, **settings):
    return write_suite(name, prompts, teacher, teacher_sampler(teacher, 1), out, progress=False,
                       **{"batch_size": 8} | settings)


def files(folder):
    """Relative path -> content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", list(SUITES))
def test_layouts(name, given, teacher, tmp_path):
    prompts, out, each = prompts_of(name, given), tmp_path / "out", SUITES[name].each
    assert make(name, prompts, teacher, out) == len(prompts) * each
    assert sorted(files(out)) == sorted(LAYOUTS[name])  # and nothing else: their programs list the folder
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out", "out.suite.json"]
    # Image j of prompt i is that of the noise of i * each + j.
    noise = indexed_noise(tuple(teacher.shape), 0, range(each, 2 * each))
    condition = teacher.encode(None, [prompts[1].text] * each)
    wanted = to_uint8(teacher_sampler(teacher, 1)(noise, condition)).permute(0, 2, 3, 1).numpy().astype(int)
    found = [np.asarray(Image.open(out / file)).astype(int) for file in SUITES[name].files(prompts[1])]
    if name == "dpg":
        size = wanted.shape[1]
        found = [found[0][y:y + size, x:x + size] for y in (0, size) for x in (0, size)]
    lossy = 40 if name in ("hps", "drawbench") else 1  # noise of 16 pixels is the worst that JPEG gets to see
    assert max(np.abs(a - b).mean() for a, b in zip(found, wanted, strict=True)) <= lossy
    if name == "geneval":
        assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == METADATA[1]
        assert (out / "00001" / "metadata.jsonl").read_text() == json.dumps(METADATA[1])
    else:
        kinds = {Image.open(out / file).format for file in LAYOUTS[name]}
        assert kinds == ({"PNG"} if name == "dpg" else {"JPEG"})


@pytest.mark.parametrize("name", list(SUITES))
def test_stopped_and_shared_work_makes_the_same_files(name, given, teacher, tmp_path, monkeypatch):
    prompts = prompts_of(name, given)
    make(name, prompts, teacher, tmp_path / "whole")
    whole, placed = files(tmp_path / "whole"), suites._place

    def stop(path, *arguments):
        if calls.append(path) is None and len(calls) == 3:
            raise KeyboardInterrupt
        placed(path, *arguments)

    calls = []
    monkeypatch.setattr(suites, "_place", stop)
    with pytest.raises(KeyboardInterrupt):
        make(name, prompts, teacher, tmp_path / "out")
    part = files(tmp_path / "out")
    assert 0 < len(part) < len(whole) and part.items() <= whole.items()
    times = {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in part}
    monkeypatch.setattr(suites, "_place", placed)
    # The rest by one process of two, then by the other.
    for rank in (1, 0):
        processes = Processes(rank, 2)
        monkeypatch.setattr(Processes, "current", classmethod(lambda cls, here=processes: here))
        monkeypatch.setattr(Processes, "together", lambda self, work: work())
        monkeypatch.setattr(Processes, "on_main", lambda self, work: work())
        make(name, prompts, teacher, tmp_path / "out")
    assert files(tmp_path / "out") == whole
    assert times == {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in part}  # kept, not made again
    sampled = []
    write_suite(name, prompts, teacher, lambda *a: sampled.append(a), tmp_path / "out", batch_size=8, progress=False)
    assert sampled == []  # nothing is left to make


def sample(word, *command):
    """What another process runs: the command, which kills itself at the seventh file when it is half on disk."""
    place, count = suites._place, []

    def cut(path, passing, content):
        count.append(1)
        if len(count) == 7 and word == "kill":
            passing.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        place(path, passing, content)

    suites._place = cut
    exit_process(main(command))


def test_a_process_that_is_killed_leaves_only_whole_images(given, tmp_path):
    """kill -9 in the middle of a file: it does not count, and the next command makes the same files."""
    stable_diffusion().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--suite", "geneval", "--prompts", str(given["geneval"]), "--steps",
               "1", "--batch-size", "4", "--out"]

    def run(word, out):
        with Child(sample, word, *command, str(out), env=environment(XDG_CACHE_HOME=str(tmp_path / "cache"))) as child:
            return child.wait(), child.output, child.errors

    killed = run("kill", tmp_path / "out")
    assert (tmp_path / ".out.partial").exists()
    assert killed[0] == -signal.SIGKILL, killed[2]
    part = files(tmp_path / "out")
    assert sorted(part) == sorted(LAYOUTS["geneval"][:5] + ["00000/metadata.jsonl"])
    before = time.time_ns()
    again, whole = run("go", tmp_path / "out"), run("go", tmp_path / "whole")
    assert again[0] == whole[0] == 0, again[2]
    assert f"12 images of 3 prompts in {tmp_path / 'out'}, as geneval reads them" in again[1]
    assert files(tmp_path / "out") == files(tmp_path / "whole") and part.items() <= files(tmp_path / "out").items()
    assert all((tmp_path / "out" / path).stat().st_mtime_ns < before for path in part)
    assert not (tmp_path / ".out.partial").exists()


def test_images_of_something_else_are_not_mixed_in(given, teacher, tmp_path):
    prompts = prompts_of("drawbench", given)
    make("drawbench", prompts, teacher, tmp_path / "out")
    for change, sentence in (({"seed": 1}, "begun with another seed .0, and here 1."),
                             ({"how": {"steps": 3}}, "begun with another steps")):
        with pytest.raises(UserError, match=sentence):
            make("drawbench", prompts, teacher, tmp_path / "out", **change)
    with pytest.raises(UserError, match="another prompts_sha256"):
        make("drawbench", prompts[:2], teacher, tmp_path / "out")
    other = load_teacher(stable_diffusion())
    with torch.no_grad():
        next(other.network.parameters()).add_(1)
    with pytest.raises(UserError, match="another weights_sha256"):
        make("drawbench", prompts, other, tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "00000.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty and was not begun by this command"):
        make("drawbench", prompts, teacher, tmp_path / "own")
    assert (tmp_path / "own" / "00000.jpg").read_bytes() == b"mine"


BAD = [
    ("geneval", "metadata.jsonl", '{"prompt": "a cat"}', 'line 1 of .* must be like {"tag"'),
    ("geneval", "metadata.jsonl", "a cat", 'line 1 of .* must be like {"tag"'),
    ("geneval", "metadata.jsonl", "", "has no prompt"),
    ("geneval", "nothing.jsonl", None, "evaluation_metadata.jsonl, and .* does not exist"),
    ("dpg", "prompts.txt", "a cat", "dpg_bench/prompts, .* is no folder of .txt files"),
    ("hps", "prompts.txt", "a cat", "has no anime.json, concept-art.json, paintings.json, photo.json"),
    ("drawbench", "prompts.json", '{"a": 1}', "must hold a list of prompts like"),
    ("drawbench", "prompts.json", '["a", 1]', "must hold a list of prompts like"),
    ("drawbench", "prompts.json", '["a", " "]', "has no prompt for 00001"),
    ("drawbench", "prompts.csv", "Text,Category\na,b\n", "has no column Prompts, but Text, Category"),
]


@pytest.mark.parametrize("name, file, content, sentence", BAD)
def test_prompts_that_are_not_the_benchmarks_are_refused(name, file, content, sentence, tmp_path, capsys):
    if content is not None:
        (tmp_path / file).write_text(content)
    code = main(["sample", "no-model-is-opened", "--suite", name, "--prompts", str(tmp_path / file), "--out",
                 str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and f"--suite {name} reads " in error
    with pytest.raises(UserError, match=sentence):
        read_suite(name, tmp_path / file)
    assert not (tmp_path / "out").exists()


def test_folders_of_prompts_that_are_not_the_benchmarks(tmp_path):
    for name in ("1.txt", "1.old.txt"):
        (tmp_path / name).write_text("a cat")
    with pytest.raises(UserError, match="has several prompts named 1, and a name ends at its first dot"):
        read_suite("dpg", tmp_path)
    (tmp_path / "1.old.txt").unlink()
    (tmp_path / "2.txt").write_text("\n")
    with pytest.raises(UserError, match="has no prompt for 2"):
        read_suite("dpg", tmp_path)


def test_other_forms_of_drawbench(tmp_path):
    (tmp_path / "a.csv").write_text("Prompts,Category\n\"a cat, red\",Colors\na dog,Counting\n")
    (tmp_path / "a.txt").write_text("a cat, red\na dog\n")
    for file in ("a.csv", "a.txt"):
        assert [p.text for p in prompts_of("drawbench", {"drawbench": tmp_path / file})] == ["a cat, red", "a dog"]


def test_options_and_models_that_do_not_go_with_a_suite(given, tmp_path, capsys):
    def message(*arguments):
        assert main(["sample", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    suite, out = ["--suite", "geneval"], ["--out", tmp_path / "out"]
    prompts = ["--prompts", given["geneval"]]
    assert "it goes without --num-images" in message("x", *suite, *out, *prompts, "--num-images", 3)
    assert "it goes without --labels" in message("x", *suite, *out, "--labels", "1")
    assert "reads GenEval's evaluation_metadata.jsonl: give it with --prompts" in message("x", *suite, *out)
    assert "must be a folder" in message("x", *suite, "--out", tmp_path / "grid.png", *prompts)
    tiny_unet_pipeline(channels=3).save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="geneval has 553"):
        assert "needs a text-to-image model" in message(tmp_path / "model", *suite, *out, *prompts)
    assert not (tmp_path / "out").exists()


def test_only_square_images_make_a_grid_of_dpg(given, teacher, tmp_path):
    with pytest.raises(UserError, match="takes square images, and these are 24 x 16"):
        write_suite("dpg", prompts_of("dpg", given), teacher, lambda noise, _: torch.zeros(len(noise), 3, 16, 24),
                    tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.suite.json").exists()
