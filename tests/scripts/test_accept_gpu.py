"""The acceptance without a GPU: its parts at tiny sizes, what is kept and run again, and what is refused."""

import importlib
import multiprocessing
import os
import re
import time

import pytest
import torch

from scripts import accept_gpu, benchmark_parts, memory_table
from tests.gpu import beside, runner
from tests.gpu.bench import NotHere, Part, expect
from tests.gpu.parts import PARTS
from tests.processes import ROOT


def passes(bench):
    bench.figures["size"] = 0.123456


def fails(bench):
    bench.figures["off by"] = 2.0
    expect(bench.device.type == "cuda", "the device is off by 2")


def breaks(bench):
    raise ValueError("first line\nsecond line")


def is_not_here(bench):
    raise NotHere("it needs two devices")


def hangs(bench):
    time.sleep(60)


def dies(bench):
    os._exit(3)


MADE_UP = {"good": Part("that it passes", passes), "bad": Part("that it fails", fails),
           "broken": Part("nothing", breaks), "away": Part("what is not here", is_not_here),
           "cuda": Part("a GPU", passes, on_cpu=False)}


def test_a_few_parts_on_the_cpu(tmp_path, capsys):
    names = "machine,families-fp32,quantized,ways,cuda-graphs,graph-breaks"
    assert accept_gpu.main(["--device", "cpu", "--parts", names, "--output", str(tmp_path)]) == 0
    report = (tmp_path / "accept_gpu.md").read_text()
    for name in PARTS:
        assert f"| {name} | {PARTS[name].proves} | {'passed' if name in names.split(',') else 'not run'} |" in report
    assert all(text in report for text in (f"- torch: {torch.__version__}", "| int8 | 0.0", "| dit: ours, its own | ",
                                       "| clipping and AdamW: fused / one weight after another (ms, ms, ratio) | ",
                                       "| dit (ms: as it is, compiled, with CUDA graphs) | ",
                                       "| dit, critic | 0 breaks |"))
    assert "6 parts, 0 failed" in capsys.readouterr().out


def test_what_passed_is_kept_and_what_failed_is_run_again(tmp_path, capsys):
    command = ["--device", "cpu", "--output", str(tmp_path)]
    assert runner.main(MADE_UP, command) == 1
    out = capsys.readouterr().out
    assert "bad: failed: the device is off by 2 (" in out and "away: not here: it needs two devices" in out
    assert "broken: failed: ValueError: first line (test_accept_gpu.py:" in out and "cuda" not in out
    report = (tmp_path / "accept_gpu.md").read_text()
    assert "| cuda | a GPU | not run | |" in report and "| size | 0.1235 |" in report and "second line" not in report
    assert runner.main(MADE_UP, [*command, "--parts", "good,bad"]) == 1
    out = capsys.readouterr().out
    assert "good: passed before" in out and "bad: failed" in out and "2 parts, 1 failed" in out
    assert runner.main(MADE_UP, [*command, "--parts", "good", "--again"]) == 0
    assert "good: passed (" in capsys.readouterr().out
    other = runner.Record(tmp_path, {"device": "another"})
    assert not other.outcomes  # what another device has passed says nothing here
    other.add("good", runner.Outcome("passed", 1.0), MADE_UP)
    assert len(runner.Record(tmp_path, {"device": "another"}).outcomes) == 1
    assert runner.main(MADE_UP, [*command, "--parts", "good"]) == 0
    assert "good: passed before" in capsys.readouterr().out


def test_a_part_apart_may_hang_or_die(monkeypatch):
    context = multiprocessing.get_context("fork")  # a spawned one imports torch anew, for seconds
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda name: context)
    cpu = torch.device("cpu")
    assert runner.run_apart(Part("", passes), cpu).figures == {"size": 0.123456}
    assert runner.run_apart(Part("", hangs), cpu, 0.2).sentence == "it took more than 0.2 seconds"
    assert runner.run_apart(Part("", dies), cpu).sentence == "its process ended with code 3"


@pytest.mark.parametrize(("arguments", "sentence"), [
    ([], "--device is cuda, but this machine has 0 CUDA devices; --device cpu runs the parts that make sense there"),
    (["--device", "cuda:1"], "--device is cuda:1, but this machine has 0 CUDA devices"),
    (["--device", "mps"], "--device is 'mps'; it must be cuda, cuda:N or cpu"),
    (["--device", "cpu", "--parts", "good,odd"], "there is no part 'odd'; the parts are good, bad, broken, away, cuda"),
    (["--device", "cpu", "--parts", "cuda"], "the part 'cuda' needs a CUDA device; leave it out of --parts"),
])
def test_what_cannot_be_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main(MADE_UP, [*arguments, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"accept_gpu: error: {sentence}") and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_damaged_record_is_one_sentence(tmp_path, capsys):
    (tmp_path / "accept_gpu.json").write_text("{")
    assert runner.main(MADE_UP, ["--device", "cpu", "--output", str(tmp_path)]) == 2
    assert "accept_gpu.json is damaged; delete it to begin anew" in capsys.readouterr().err


def test_the_list_says_what_there_is(capsys):
    assert accept_gpu.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and part.proves in out for name, part in PARTS.items()) and out.count("(CUDA only)") > 3


def test_the_pages_have_every_part():
    """In the order of the command, with what came of it, the same on both pages."""
    tables = []
    for page in ("gpu.md", "experiments/gpu_h100.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        table = text.partition("| part | proves | result | seconds |")[2].partition("\n\n")[0]
        rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[1:]]
        assert [row[:2] for row in rows] == [[name, part.proves] for name, part in PARTS.items()]
        assert all(re.match("passed|failed: |not here: |not run", row[2]) for row in rows)
        tables.append(rows)
    assert tables[0] == tables[1]


def test_the_page_has_the_cards_of_the_memory_page():
    """Both tables are written by scripts/memory_table.py, of the same plans."""
    def cells(page):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        table = text.partition(memory_table.BEGIN_CARDS)[2].partition(memory_table.END_CARDS)[0]
        head, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}

    here, there, sizes = cells("gpu.md"), cells("experiments/memory.md"), [f"{size} GB" for size in (24, 48, 80)]
    assert here == {name: {size: row[size] for size in sizes} for name, row in there.items()} and len(here) > 10
    made = memory_table.card_table({name.strip("`").removeprefix("configs/").removesuffix(".yaml"): {
        int(size.removesuffix(" GB")): text for size, text in row.items()} for name, row in there.items()},
        memory_table.GPU_CARDS)
    assert made in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


STAND_IN = """
import argparse
from accelerate import Accelerator

SDText2ImageDataset = tqdm = None

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_batch_size", type=int)
    return parser.parse_known_args()[0]

def main(arguments):
    Accelerator(mixed_precision="bf16", cpu=True)
    bar = tqdm(range(1000))
    for step, (images, texts) in enumerate(SDText2ImageDataset(resolution=8).train_dataloader):
        assert len(images) == len(texts) == arguments.train_batch_size
        bar.update(1)
        bar.set_postfix(loss=LOSS, lr=1.0)
"""


@pytest.mark.parametrize("project", [beside.FASTGEN, beside.LCM_SCRIPT])
def test_what_stands_beside_may_be_missing(project, tmp_path, monkeypatch):
    part = PARTS["beside-fastgen" if project is beside.FASTGEN else "beside-lcm-script"]
    monkeypatch.delenv(project.variable, raising=False)
    outcome = runner.run_part(part, torch.device("cpu"))
    assert outcome.result == "not here" and outcome.sentence == (
        f"{project.name} is not installed beside: git clone {project.address}, install what it imports, and set "
        f"{project.variable} to the folder")
    monkeypatch.setenv(project.variable, str(tmp_path))
    outcome = runner.run_part(part, torch.device("cpu"))
    assert outcome.result == "failed" and outcome.sentence == (
        f"{project.variable} is {tmp_path}, which has no {project.file}")
    (tmp_path / project.file).parent.mkdir(parents=True)
    (tmp_path / project.file).write_text("import no_such_package")
    assert beside.checkout(project) == (tmp_path, "unknown, no git checkout")
    with pytest.raises(NotHere, match="does not import here: No module named"), beside.their_imports(project):
        importlib.import_module("no_such_package")


@pytest.mark.parametrize("loss", ["0.5", "float('nan')"])
def test_a_script_and_our_step_go_in_turns(loss, tmp_path, monkeypatch):
    """Its loop runs, with the batch that it is given, until there are rounds enough; a broken one proves nothing."""
    file = tmp_path / beside.LCM_SCRIPT.file
    file.parent.mkdir(parents=True)
    file.write_text(STAND_IN.replace("LOSS", loss))
    monkeypatch.setenv(beside.LCM_SCRIPT.variable, str(tmp_path))
    outcome = runner.run_part(PARTS["beside-lcm-script"], torch.device("cpu"))
    if loss == "0.5":
        assert outcome.result == "passed", outcome.sentence
        assert outcome.figures["rounds"] == 3 and outcome.figures["the LCM script / flowdistill"] < 0.5
    else:
        assert outcome.sentence == "the script's loss is not finite"


def test_parts_of_a_step_are_measured_in_pairs(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_parts, "CHANNELS", (32, 32))
    monkeypatch.setattr(benchmark_parts, "SIDE", 8)
    assert benchmark_parts.main(["--rounds", "1"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 8 and all(float(row[4]) > 0 for row in rows)
    assert benchmark_parts.main(["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "benchmark_parts: error: --rounds is 0; it must be at least 1\n"
