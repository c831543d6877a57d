"""The command line: quick help, exit codes, one-sentence errors, and each command on the digits."""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

import flowdistill
from flowdistill import UserError, load_teacher
from flowdistill.cli.commands import make_parser
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import Report, comparison
from flowdistill.students import FlowMap, StudentInfo
from tests.families import FAMILIES
from tests.processes import Child

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "torchvision", "sklearn", "scipy", "omegaconf")
COMMANDS = ("distill", "sample", "evaluate", "export", "inspect", "report", "demo", "config", "methods", "families",
            "env", "init", "completion")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an untrained student, i.e. its teacher's single Euler step."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    source = str(asset_path("digits-flow"))
    info = StudentInfo(method="freeflow", base_model=source)
    FlowMap.from_teacher(load_teacher(source), info).save(folder / "student")
    return folder


def replace(monkeypatch: pytest.MonkeyPatch, module: str, **attributes: object) -> None:
    """Stand in for a module that a command imports."""
    fake = types.ModuleType(module)
    for name, value in attributes.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, module, fake)


def raising(error: BaseException):
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


# --- arguments


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    return found


@pytest.mark.parametrize("name", commands())
def test_no_argument_takes_the_working_folder_for_nothing(name: str, capsys: pytest.CaptureFixture) -> None:
    """An empty text is a path, or what else an argument is, of no command; a prompt may be one."""
    actions = [action for action in commands()[name]._actions if action.nargs != 0]
    needed = [("x" if each.choices is None else next(iter(each.choices))) for each in actions
              if not each.option_strings and each.nargs not in ("*", "?")]
    needed += [text for each in actions if each.option_strings and each.required
               for text in (each.option_strings[0], "x")]
    for action in actions:
        given = [name, *needed, *action.option_strings[-1:], ""]
        if not action.option_strings and action.nargs not in ("*", "?", "+"):
            given = [name, *[""] * len(needed)]
        if action.type is str:
            assert action.dest == "prompt" and getattr(make_parser().parse_args(given), action.dest) == [""]
            continue
        with pytest.raises(SystemExit) as end:
            make_parser().parse_args(given)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("flowdistill: error: argument ") and said.count("\n") == 1
        assert " must " in said


@pytest.mark.parametrize("given", ["", "a,", ",a", "a,,b"])
def test_names_between_commas_are_texts(given: str, capsys: pytest.CaptureFixture) -> None:
    for option in ("--more-metrics", "--scorers"):
        with pytest.raises(SystemExit):
            make_parser().parse_args(["evaluate", "x", option, given])
        assert f"argument {option}: must be texts separated by commas, none of them empty" in capsys.readouterr().err
    assert make_parser().parse_args(["evaluate", "x", "--more-metrics", "a,b"]).more_metrics == ["a", "b"]


@pytest.mark.parametrize(("words", "name", "value"), [
    ("distill a.yaml b=1 c=-2", "overrides", ["b=1", "c=-2"]),
    ("plan a.yaml --gpu-memory 24 b=1", "overrides", ["b=1"]),
    ("plan a.yaml b=1 --gpu-memory 24 c=2 --cards 8,16 d=", "overrides", ["b=1", "c=2", "d="]),
    ("plan --gpu-memory 24 a.yaml b=1", "overrides", ["b=1"]),
    ("init x --method freeflow b=1 --out y.yaml c=2", "overrides", ["b=1", "c=2"]),
    ("evaluate x --json y z", "model", ["x", "z"]),
    ("report x --out y.html z w", "run_folder", ["x", "z", "w"]),
])
def test_arguments_without_a_name_may_stand_behind_an_option(words: str, name: str, value: list[str]) -> None:
    assert getattr(make_parser().parse_args(words.split()), name) == value


def test_every_example_of_the_help_is_understood() -> None:
    for name, parser in commands().items():
        for line in parser.epilog.splitlines()[1:]:
            program, *words = shlex.split(line.split(" > ")[0])
            assert program == "flowdistill" and words[0] == name
            assert make_parser().parse_args(words).run


# --- cheap to import


@pytest.mark.parametrize(
    "code",
    [
        "import flowdistill",
        "import flowdistill; dir(flowdistill); flowdistill.UserError",
        "from flowdistill.cli.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from flowdistill.cli.commands import main\ntry: main(['sample', '--help'])\nexcept SystemExit: pass",
        "from flowdistill.cli.commands import main\ntry: main(['evaluate', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys\nprint('loaded', sorted(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded []"


def test_names_load_on_first_use() -> None:
    from flowdistill.conditioning.conditions import Condition
    from flowdistill.evaluation import evaluate, frechet_distance
    from flowdistill.training.run import distill

    assert flowdistill.Condition is Condition
    assert flowdistill.evaluate is evaluate
    assert flowdistill.distill is distill
    assert flowdistill.evaluation.frechet_distance is frechet_distance
    assert {"load_teacher", "load_student", "distill", "evaluate", "__version__"} <= set(dir(flowdistill))
    with pytest.raises(AttributeError, match="no attribute 'load_techer'"):
        _ = flowdistill.load_techer


# --- help and arguments


def test_help_lists_the_commands(cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(name in result.out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0 and result.err == ""
    assert f"flowdistill {command} " in result.out.split("examples:")[1]


def test_help_lists_what_can_be_measured_and_with_what(cli, capsys) -> None:
    from flowdistill.config import FEATURES, SCORERS, EvaluationConfig
    from flowdistill.evaluation.metrics import all_metrics
    from tests.scripts.test_evaluate_fid import evaluate_fid

    texts = [" ".join(cli("evaluate", "--help").out.split())]
    with pytest.raises(SystemExit):
        evaluate_fid.parse(["--help"])
    texts.append(" ".join(capsys.readouterr().out.split()))
    for text in texts:  # whose lines may end behind a hyphen
        assert ",".join(FEATURES) in text.replace(" ", "") and ",".join(SCORERS) in text.replace(" ", "")
    asked_for = {metric.name for metric in all_metrics() if not metric.default} - {"prompt_scores"}
    helps = {item.name: item.metadata["help"] for item in fields(EvaluationConfig)}
    for text in (texts[0], helps["more_metrics"]):
        named = re.search(r"only when (?:they are )?asked for: ([a-z_, ]+)", text)[1]
        assert set(re.findall(r"[a-z]+_[a-z_]+|diversity", named)) == asked_for
    assert ", ".join(FEATURES) in helps["features"] and ", ".join(SCORERS) in helps["scorers"]


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "flowdistill"]
    result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"flowdistill {flowdistill.__version__}\n")
    result = subprocess.run([*command, "evaluate", "x", "--num-images", "1"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["distil", "a.yaml"], "invalid choice: 'distil'"),
        (["sample", "x", "--num-images", "1"], "--out"),
        (["sample", "x", "--out", "y", "--num-images", "0"], "--num-images: must be at least 1, not 0"),
        (["sample", "x", "--out", "y", "--num-images", "ten"], "--num-images: must be an integer, not 'ten'"),
        (["sample", "x", "--out", "y", "--num-images", "1", "--labels", "1,a"], "must be integers of at least 0"),
        (["sample", "x", "--out", "y", "--num-images", "1", "--labels", "1", "--prompts", "f"], "not allowed with"),
        (["sample", "x", "--out", "y", "--prompt", "a", "--prompts", "f"], "not allowed with"),
        (["sample", "x", "--out", "y", "--labels", "1", "--prompt", "a"], "not allowed with"),
        (["sample", "x", "--out", "y", "--guidance-scale", "nan"], "must be a number of at least 0, not 'nan'"),
        (["evaluate", "x", "--guidance-scale", "-5"], "must be a number of at least 0, not '-5'"),
        (["export", "x", "y", "--guidance-scale", "inf"], "must be a number of at least 0, not 'inf'"),
        (["export", "x", "y", "--guidance-scale", "much"], "must be a number of at least 0, not 'much'"),
        (["sample", "x", "--ou", "y"], "--out"),
        (["evaluate", "x", "--prompt", "y"], "unrecognized arguments: --prompt y"),
        (["evaluate", "x", "--js", "y"], "unrecognized arguments: --js y"),
        (["export", "x", "y", "--over"], "unrecognized arguments: --over"),
        (["--vers"], "COMMAND"),
        (["sample", "x", "--out", "y", "--num-images", "9" * 20], "must be at most 9,223,372,036,854,775,807, not 999"),
        (["sample", "x", "--out", "y", "--num-images", "9" * 5000], "--num-images: must be an integer, not '999"),
        (["sample", "x", "--out", "y", "--labels", "1," + "9" * 20], "must be integers of at most 9,223,372,036,854"),
        (["sample", "x", "--out", "y", "--labels", "9" * 5000], "must be integers of at most 9,223,372,036,854"),
        (["sample", "x", "--out", "y", "--image-size", "9" * 5000], "must be the side of a square in pixels"),
        (["sample", "x", "--out", "y", "--steps", "1000001"], "--steps: must be at most 1,000,000, not 1000001"),
        (["evaluate", "x", "--pipeline-steps", "1,99999999999"], "must be integers of at most 1,000,000, not '1,999"),
        (["sample", "x", "--out", "y", "--guidance-scale", "1e300"], "must be at most 3.4e+38, not '1e300'"),
        (["plan", "x", "--gpu-memory", "24", "steps"], "unrecognized arguments: steps"),
        (["plan", "x", "--gpu-mem=24"], "unrecognized arguments: --gpu-mem=24"),
        (["plan", "x", "--gpu-memory", "24", "--cards=8", "a=1", "-b=2"], "unrecognized arguments: a=1 -b=2"),
        (["report", "x", "--out", "y.html", ""], "argument RUN: must not be an empty text"),
        (["evaluate", "x", "--teacher-steps", "0,1"], "must be integers of at least 1"),
        (["evaluate", "x", "--num-images", "1"], "--num-images: must be at least 2, not 1"),
    ],
)
def test_arguments_that_do_not_fit(cli, arguments: list[str], expected: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.err.startswith("flowdistill: error: ") and result.err.count("\n") == 1
    assert expected in result.err


# --- errors


def test_a_configuration_error_in_a_real_process(tmp_path: Path) -> None:
    with Child("flowdistill", "distill", tmp_path / "none.yaml", "train.steps=1") as process:
        assert process.wait() == 2 and process.output == ""
    assert process.errors.splitlines()[-1].startswith("flowdistill: error: ")
    assert f"{tmp_path / 'none.yaml'} does not exist" in process.errors
    assert "Traceback" not in process.errors


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("wrong, and this is right"), 2, "flowdistill: error: wrong, and this is right\n"),
        (KeyboardInterrupt(), 130, "flowdistill: interrupted\n"),
        (OSError(errno.ENOSPC, "x", "/a/.b.png.k3j.tmp"), 2, "flowdistill: error: /a/b.png: No space left on device\n"),
        (PermissionError(errno.EACCES, "x", "/a/b"), 2, "flowdistill: error: /a/b: Permission denied\n"),
        (OSError(errno.EROFS, "x"), 2, "flowdistill: error: a.yaml: Read-only file system\n"),
        (RuntimeError("I/O error (os error 28)"), 2, "flowdistill: error: a.yaml: No space left on device\n"),
    ],
)
def test_exit_codes(cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str) -> None:
    replace(monkeypatch, "flowdistill.training.run", distill=raising(error))
    assert cli("distill", "a.yaml") == (code, "", expected)


BREAKS = "a\nb\r\x1b[31mc\u2028d"


@pytest.mark.parametrize("arguments", [
    ["distill", f"{BREAKS}.yaml"], ["inspect", BREAKS], ["sample", BREAKS, "--out", "x", "--num-images", "1"],
    ["evaluate", "x", "--num-images", BREAKS], ["export", BREAKS, "y"], ["distill", "configs/x.yaml", BREAKS],
    ["push", BREAKS, "owner/name"], ["report", BREAKS], [BREAKS]])
def test_line_breaks_in_names_make_no_second_line(cli, tmp_path, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and result.err.removesuffix("\n").isprintable()
    assert r"a\nb\r\x1b[31mc\u2028d" in result.err.replace("\\\\", "\\") or "configs/x.yaml" in result.err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "x", "y"), ValueError("bug")])
def test_a_bug_keeps_its_traceback(cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    replace(monkeypatch, "flowdistill.training.run", distill=raising(error))
    with pytest.raises(type(error)):
        cli("distill", "a.yaml")


def test_a_warning_of_this_package_is_one_line() -> None:
    from flowdistill.cli.commands import __file__ as own
    from flowdistill.cli.commands import format_warning

    for file in (own, flowdistill.__file__, load_teacher.__code__.co_filename):
        assert format_warning("short\nrun", UserWarning, file, 3) == "flowdistill: warning: short\\nrun\n"
    assert __file__ in format_warning("theirs", UserWarning, __file__, 3)


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys, types; fake = types.ModuleType('flowdistill.training.run')\n"
        "class Run: output_dir, steps, interrupted, report, contents = 'x' * 100_000, 1, 0, None, ''\n"
        "fake.distill = lambda *a: Run; sys.modules['flowdistill.training.run'] = fake\n"
        "from flowdistill.cli.commands import main; sys.exit(main(['distill', 'a.yaml']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


# --- distill


def outcome(**values: object) -> types.SimpleNamespace:
    defaults = {"output_dir": Path("runs/a"), "steps": 7, "interrupted": 0, "report": None, "contents": "student/"}
    return types.SimpleNamespace(**defaults | values)


def test_distill_passes_its_arguments_and_says_where_the_run_is(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    replace(monkeypatch, "flowdistill.training.run", distill=lambda *given: calls.append(given) or outcome())
    result = cli("distill", "a.yaml", "train.steps=3", "method.x=-1")
    assert calls == [("a.yaml", ["train.steps=3", "method.x=-1"])]
    assert result.code == 0 and "runs/a" in result.out and "report.json" not in result.out


def test_the_end_of_a_run_names_the_picture_and_what_to_do_next(cli, run: Path, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "a run"
    replace(monkeypatch, "flowdistill.training.run", distill=lambda *given: outcome(output_dir=folder))
    out = cli("distill", "a.yaml").out  # nothing but a report can be made of what is not there yet
    assert out.splitlines()[1:] == [f"next     flowdistill report '{folder}'"]
    shutil.copytree(run, folder)
    for name in ("final.png", "comparison.png"):
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / name).touch()
        out = cli("distill", "a.yaml").out
        assert f"picture  {folder / 'samples' / name}\n" in out
    commands = [shlex.split(line.removeprefix("next")) for line in out.splitlines()[2:]]
    assert [words[:3] for words in commands] == [
        ["flowdistill", name, str(folder)] for name in ("report", "sample", "evaluate", "export")]
    for words in commands:  # they parse as they stand
        assert make_parser().parse_args(words[1:]).run


def test_only_the_first_process_speaks(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "flowdistill.training.run", distill=lambda *given: outcome())
    monkeypatch.setenv("RANK", "1")
    assert cli("distill", "a.yaml") == (0, "", "")


def test_an_interrupted_run_ends_with_the_signals_code(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "flowdistill.training.run", distill=lambda *given: outcome(interrupted=15))
    result = cli("distill", "a.yaml")
    assert result.code == 143 and result.out == ""
    assert "after step 7" in result.err and result.err.count("\n") == 1


# --- sample


def test_sample_grid_of_a_student(cli, run: Path, tmp_path: Path) -> None:
    result = cli("sample", run, "--num-images", 20, "--out", tmp_path / "grid.png", "--seed", 3)
    assert result.code == 0 and str(tmp_path / "grid.png") in result.out
    # Ten labels make ten columns: 10 cells of 32 pixels and 11 gaps of 2; two rows.
    assert pil_to_tensor(Image.open(tmp_path / "grid.png")).shape == (3, 2 * 34 + 2, 10 * 34 + 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["grid.png"]


def test_sample_is_what_python_generates(cli, run: Path, tmp_path: Path) -> None:
    cli("sample", run, "--num-images", 5, "--out", tmp_path, "--seed", 3, "--labels", "7,2", "--batch-size", 2)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(5)]
    expected = flowdistill.load_student(run).generate(labels=[7, 2, 7, 2, 7], seed=3)
    found = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    assert found.shape == (5, 1, 8, 8)
    torch.testing.assert_close(found.float() / 255, expected, atol=0.51 / 255, rtol=0)


def test_sample_makes_one_image_for_each_label(cli, run: Path, tmp_path: Path) -> None:
    result = cli("sample", run, "--labels", "7,2,4", "--out", tmp_path / "some")
    assert result.out == f"3 images in {tmp_path / 'some'}\n"
    assert cli("sample", run, "--out", tmp_path / "all").out == f"10 images in {tmp_path / 'all'}\n"
    assert len(list((tmp_path / "some").iterdir())) == 3 and len(list((tmp_path / "all").iterdir())) == 10


def test_sample_of_a_pipeline(cli, tmp_path: Path) -> None:
    source = asset_path("digits-flow")
    cli("sample", source, "--num-images", 3, "--out", tmp_path, "--labels", "3", "--steps", 2)
    teacher = load_teacher(source)
    from flowdistill.utils.randomness import indexed_noise

    latents = teacher.sample(indexed_noise(teacher.shape, 0, range(3)), teacher.encode([3, 3, 3]), steps=2)
    found = torch.stack([pil_to_tensor(Image.open(tmp_path / f"{number:06d}.png")) for number in range(3)])
    torch.testing.assert_close(found.float() / 255, teacher.decode(latents), atol=0.51 / 255, rtol=0)


def test_sample_errors(cli, run: Path, tmp_path: Path) -> None:
    def message(*arguments: object, model: Path = run, out: Path = tmp_path / "new") -> str:
        result = cli("sample", model, "--num-images", 1, "--out", out, *arguments)
        assert result.code == 2 and "Traceback" not in result.err
        return result.err

    assert "label 10 is out of range" in message("--labels", "3,10")
    assert "--prompts needs a text-to-image model" in message("--prompts", "prompts.txt")
    assert "--prompt needs a text-to-image model" in message("--prompt", "a red circle")
    assert "steps is 4; this student was trained for 1 call" in message("--steps", 4)
    assert "guidance_scale is 3.0" in message("--guidance-scale", 3)
    assert "--device nowhere cannot be used here" in message("--device", "nowhere")
    assert "nothing-here" in message(model=tmp_path / "nothing-here")
    (tmp_path / "file").touch()
    assert "must be a .png file for one grid, or a folder" in message(out=tmp_path / "file")
    (tmp_path / "folder.png").mkdir()
    assert "must be a .png file for one grid, or a folder" in message(out=tmp_path / "folder.png")
    for name in ("grid.jpg", "grid.JPEG", "grid.webp", "grid.gif", "grid.pdf"):
        assert "must be a .png file for one grid, or a folder" in message(out=tmp_path / name)
        assert not (tmp_path / name).exists()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    assert "has not finished" in message(model=tmp_path / "unfinished")
    assert not (tmp_path / "new").exists()


def test_sample_below_a_file_names_the_place(cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = cli("sample", run, "--num-images", 1, "--out", tmp_path / "file" / "grid.png")
    assert result.code == 2 and str(tmp_path / "file") in result.err and result.err.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no new file even of root")
def test_a_place_that_takes_no_file_is_refused_before_the_work(cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "flowdistill.students", load_student=raising(AssertionError("work has begun")))
    for arguments in (
        ["sample", run, "--num-images", 1, "--out", "/proc/new/grid.png"],
        ["sample", run, "--num-images", 1, "--out", "/proc/new"],
        ["evaluate", run, "--num-images", 20, "--json", "/proc/new.json"],
        ["export", run, "/proc/new"],
    ):
        result = cli(*arguments)
        assert result.code == 2 and result.err.count("\n") == 1
        assert "cannot be written; /proc: No such file or directory" in result.err


def test_a_link_that_leads_nowhere_is_no_place_for_a_result(
    cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowdistill.students.load_student", raising(AssertionError("work has begun")))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "file").touch()
    missing, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(missing)
    config = ["teacher.source=nowhere", "method.name=freeflow"]
    page = tmp_path / "page.html"
    page.symlink_to(missing / "page.html")
    for place, below, wrong in ((link, link / "a", link), (page, page / "a", page),
                                (None, tmp_path / "file" / "a", tmp_path / "file")):
        for arguments in (
            *([["sample", run, "--num-images", 1, "--out", place], ["export", run, place],
               ["sample", run, "--suite", "drawbench", "--prompts", tmp_path / "prompts.txt", "--out", place],
               ["distill", "configs/digits/freeflow.yaml", f"output_dir={place}", *config]] if place else []),
            ["sample", run, "--num-images", 1, "--out", below / "grid.png"],
            ["evaluate", run, "--num-images", 20, "--json", below / "report.json"],
            ["evaluate", run, "--num-images", 20, "--html", below / "report.html"],
            ["report", run, "--out", below / "report.html"],
            ["inspect", asset_path("digits-flow"), "--sample", below / "picture.png"],
            ["config", "dmd2", "--out", below / "my.yaml"],
            ["export", run, below],
            ["distill", "configs/digits/freeflow.yaml", f"output_dir={below}", *config],
        ):
            result = cli(*arguments)
            assert result.code == 2 and result.err.count("\n") == 1, (arguments, result)
            why = "a file, and no folder" if place is None else "a symbolic link that leads nowhere, to "
            assert f" cannot be written: {wrong} is {why}" in result.err
    assert cli("report", run, "--out", page).code == 2
    assert {entry.name for entry in tmp_path.iterdir()} == {"prompts.txt", "file", "link", "page.html"}


def test_only_a_report_or_a_page_gives_way_to_another(cli, run: Path, tmp_path: Path, monkeypatch) -> None:
    module = importlib.import_module("flowdistill.evaluation.evaluate")  # the function has its name
    monkeypatch.setattr(module, "_evaluate_one", lambda *given: Report([], 1, None, None, 0))
    for command, kind, own in (
        (("evaluate", run, "--json"), "the report of an evaluation", ".json"),
        (("evaluate", run, "--html"), "a page that flowdistill has written", ".html"),
        (("report", run, "--out"), "a page that flowdistill has written", ".html"),
    ):
        for name, text in (("config.yaml", "train: {}"), ("README.md", "# Mine"), ("other.json", '{"rows": []}'),
                           ("index.html", '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>')):
            (tmp_path / name).write_text(text)
            result = cli(*command, tmp_path / name)
            assert result.code == 2 and result.err.count("\n") == 1 and (tmp_path / name).read_text() == text
            if command[0] == "evaluate" or name == "index.html":
                assert f"{tmp_path / name} is there already and is not {kind}, so it is left as it is" in result.err
        if command[0] == "evaluate":
            (tmp_path / f"own{own}").touch()  # an empty one is no loss
            for _ in range(2):
                assert cli(*command, tmp_path / f"own{own}").code == 0
            assert (tmp_path / f"own{own}").stat().st_size
            (tmp_path / f"own{own}").unlink()


def test_an_export_goes_where_a_link_leads(cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert cli("export", run, tmp_path / "link").code == 0
    assert cli("export", run, tmp_path / "link", "--overwrite").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model_index.json").is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"disk", "link"}


def test_evaluate_says_what_one_folder_of_images_needs(cli, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    result = cli("evaluate", tmp_path, "--features", "digits", "--reference", "digits")
    assert result.code == 2 and f"{tmp_path} is a folder of images, of which one alone is no comparison" in result.err
    assert "a second folder of images beside it, or measure it with scripts/evaluate_fid.py" in result.err


def test_evaluate_refuses_a_folder_as_its_report(cli, run: Path, tmp_path: Path) -> None:
    result = cli("evaluate", run, "--num-images", 20, "--json", tmp_path)
    assert result.code == 2 and f"{tmp_path} is a folder; give the name of a file" in result.err


# --- evaluate, export, inspect


def test_evaluate_passes_what_was_given(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    replace(monkeypatch, "flowdistill.evaluation", evaluate=lambda *a, **k: calls.append((a, k)) or "the table")
    result = cli("evaluate", "runs/a", "--num-images", 50, "--teacher-steps", "1,4", "--json", "r.json", "--no-teacher")
    assert result == (0, "the table\n", "")
    ((positional, given),) = calls
    assert positional == ("runs/a",)
    assert (given["num_images"], given["teacher_steps"], given["json"]) == (50, [1, 4], "r.json")
    assert given["teacher_rows"] is False and given["reference"] is None and given["seed"] == 0


def test_evaluate_accepts_the_real_arguments(cli, run: Path, tmp_path: Path) -> None:
    from flowdistill.evaluation import Report

    report = tmp_path / "report.json"
    given = ("--features", "digits", "--reference", "digits", "--num-images", 40, "--teacher-steps", 1)
    result = cli("evaluate", run, *given, "--json", report, "--device", "cpu")
    assert result.code == 0
    rows = Report.read_json(report).rows
    assert [(row.model, row.calls) for row in rows] == [("teacher", 1), ("student", 1)]
    assert rows[0].fid == pytest.approx(rows[1].fid, rel=1e-4)  # an untrained student is the teacher's Euler step
    assert "images/s" in result.out


def test_export_refuses_and_overwrites(cli, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    result = cli("export", run, target)
    assert result.code == 0 and str(target) in result.out
    assert (target / "model_index.json").is_file()
    names: dict[str, Any] = {}
    exec(result.out.split("a diffusers pipeline\n")[1], names)  # how to load and to call it
    assert len(names["images"]) == 4
    card = (target / "README.md").read_text()
    assert str(asset_path("digits-flow").parent) not in card and "digits-flow" in card

    (target / "old").touch()
    result = cli("export", run, target)
    assert result.code == 2 and "--overwrite" in result.err and (target / "old").exists()

    assert cli("export", run, target, "--overwrite").code == 0
    assert not (target / "old").exists() and (target / "model_index.json").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("kind", ["other", "pipeline", "several"])
def test_export_never_overwrites_what_flowdistill_has_not_exported(cli, run: Path, tmp_path: Path, kind: str) -> None:
    files = {"other": {"thesis.txt": ""},
             "pipeline": {"model_index.json": "{}", "flowdistill.json": '{"num_classes": 10}'},  # as a teacher's
             "several": {"manifest.json": '{"pipelines": [{"folder": "a"}]}', "a/model_index.json": "{}"}}[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    result = cli("export", run, tmp_path, "--overwrite")
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"{tmp_path} is no pipeline that flowdistill has exported, so --overwrite leaves it alone" in result.err
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text


def test_export_never_overwrites_what_the_run_needs(cli, run: Path, tmp_path: Path, monkeypatch) -> None:
    """Neither what its settings name, though that may be an export as well, nor a folder with such."""
    monkeypatch.chdir(tmp_path)
    settings = {"started_in": str(tmp_path), "teacher": {"source": "made/teacher", "vae": str(tmp_path / "vae")},
                "method": {"name": "bare", "student": "turbo", "deep": {"list": ["nets/one"]}}}
    shutil.copytree(run, "mine/run")
    Path("mine/run/config.yaml").write_text(json.dumps(settings))
    Path("mine/run/weights.json").write_text('{"method.student": {}}')
    needed = {"mine": "has in it the run folder", "made": "has in it the run's teacher.source",
              "made/teacher": "is the run's teacher.source", "vae": "is the run's teacher.vae",
              "turbo": "is the run's method.student", "nets/one": "is the run's method.deep.list"}
    free = ("bare", "mine/run/pipeline")  # the name of a method is no folder's
    for name in (*needed, *free):
        Path(name).mkdir(parents=True, exist_ok=True)
        Path(name, "model_index.json").write_text("{}")
        Path(name, "flowdistill.json").write_text('{"call": {}}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, words in needed.items():
        result = cli("export", "mine/run", name, "--overwrite")
        assert result.code == 2 and f"{name} {words}, " in result.err and result.err.count("\n") == 1, result
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in free:
        assert cli("export", "mine/run", name, "--overwrite").code == 0


@pytest.mark.parametrize("value", [math.nan, 1e30, 1e18])
def test_a_student_that_diverged_is_not_exported(cli, run: Path, tmp_path: Path, value: float) -> None:
    """Nor one whose weights are finite and its images are not."""
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "student" / "model.safetensors"
    weights = load_file(file)
    for weight in weights.values() if value == 1e18 else [next(iter(weights.values()))]:
        weight.view(-1)[-1:] = value
    save_file(weights, file, metadata={"format": "pt"})
    result = cli("export", tmp_path / "run", tmp_path / "pipeline")
    what = "what the student makes is not finite" if value == 1e18 else "the student's weights are not finite, or too"
    assert result.code == 2 and what in result.err and result.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_failed_export_keeps_the_old_pipeline(cli, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    cli("export", run, target)
    result = cli("export", run, target, "--overwrite", "--guidance-scale", 5)
    assert result.code == 2 and "guidance_scale" in result.err
    assert (target / "model_index.json").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("model", [pytest.param("digits", id="run"), pytest.param("pipeline", id="pipeline")])
def test_sample_into_a_folder_with_a_dot_in_its_name(cli, run: Path, tmp_path: Path, model: str) -> None:
    source = run if model == "digits" else asset_path("digits-flow")
    steps = () if model == "digits" else ("--steps", 1)
    assert cli("sample", source, "--num-images", 1, "--out", tmp_path / "images.v2", *steps).code == 0
    assert [file.name for file in (tmp_path / "images.v2").iterdir()] == ["000000.png"]
    (tmp_path / "old.jpg").mkdir()  # a folder that is there is one, whatever its name
    assert cli("sample", source, "--num-images", 1, "--out", tmp_path / "old.jpg", *steps).code == 0
    assert [file.name for file in (tmp_path / "old.jpg").iterdir()] == ["000000.png"]


def test_sample_does_not_mix_its_images_with_others(cli, run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / ".cache").mkdir(parents=True)
    for name in ("notes.txt", ".cache/hidden.png"):  # no pictures of a set
        (tmp_path / "images" / name).touch()
    assert cli("sample", run, "--num-images", 2, "--out", "images").code == 0
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.JPG").touch()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("flowdistill.students.load_student", lambda *given, **named: pytest.fail("it was loaded"))
    for folder, first in (("images", r"00000\d.png"), ("photos", "cat/1.JPG")):
        result = cli("sample", run, "--num-images", 1, "--seed", 1, "--out", folder)
        assert result.code == 2 and result.err.count("\n") == 1
        assert re.search(f"--out {folder} has pictures already, such as {first}, and new ones would be", result.err)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -5.0, 1e300])
def test_python_refuses_a_guidance_scale_that_is_none(scale: float) -> None:
    from flowdistill import evaluate

    teacher = load_teacher(asset_path("digits-flow"))
    with pytest.raises(UserError, match=re.escape(f"guidance_scale is {scale}")):
        teacher.sample(torch.zeros(1, 1, 8, 8), teacher.encode([0]), steps=1, guidance_scale=scale)
    with pytest.raises(UserError, match=re.escape(f"guidance_scale is {scale}")):
        evaluate(teacher, 4, "digits", "digits", teacher_steps=[1], guidance_scale=scale, progress=False)


def test_scripts_take_no_abbreviations_either() -> None:
    """An option that is nearly another one is an error: in every parser of every script."""
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    parsers = 0
    for file in scripts.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                parsers += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_abbrev") == "False", f"{file.name}, line {node.lineno}"
    assert parsers > 10


def test_inspect(cli, tmp_path: Path) -> None:
    result = cli("inspect", asset_path("digits-flow"))
    assert result.code == 0 and "UNet2DModel" in result.out
    result = cli("inspect", tmp_path)
    assert result.code == 2 and str(tmp_path) in result.err and "Traceback" not in result.err


def test_inspect_draws_a_pipeline_by_its_calls(cli, tmp_path: Path) -> None:
    result = cli("inspect", asset_path("digits-flow"), "--sample", tmp_path / "grid.png")
    assert result.code == 0, result.err
    assert "UNet2DModel" in result.out and f"{tmp_path / 'grid.png'}\n" in result.out
    most = comparison.TEACHER_STEPS  # fewer here than outside the tests
    assert f"1 call, 4 calls, {most} calls of the teacher; the pipeline's own call, {most} steps" in result.out
    assert "the labels 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in result.out
    pixels = pil_to_tensor(Image.open(tmp_path / "grid.png")).float()
    one, _, many, own = (row[:, -36:] for row in pixels.chunk(4, dim=1))  # below their titles
    # The flow teacher's scheduler takes Euler steps too, at times a little apart.
    assert 0 < (many - own).abs().mean() < 0.5 * (one - own).abs().mean()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--sample", "grid.jpg"], "must be a .png file"),
    (["--sample", "nowhere/../.."], "must be a .png file"),
    (["--prompt", "a cat"], "are for the picture that --sample FILE.png draws"),
    (["--guidance-scale", 2], "are for the picture that --sample FILE.png draws"),
    (["--sample", "grid.png", "--prompt", "a cat"], "text-to-image pipeline, and {} takes no prompts"),
])
def test_inspect_refuses_pictures_that_are_none(cli, tmp_path: Path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("inspect", asset_path("digits-flow"), *arguments)
    wanted = sentence.format(asset_path("digits-flow"))
    assert result.code == 2 and wanted in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_inspect_knows_what_is_asked_of_a_picture_before_weights_are_read(cli, tmp_path: Path, monkeypatch,
                                                                          family) -> None:
    FAMILIES[family].make().save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr("flowdistill.teachers.load_teacher", lambda *_, **__: pytest.fail("weights were read"))
    given = [] if FAMILIES[family].prompts else ["--prompt", "a cat"]
    result = cli("inspect", tmp_path / "pipeline", "--sample", tmp_path / "grid.png", *given)
    sentence = "takes prompts; give --prompt TEXT" if FAMILIES[family].prompts else "takes no prompts"
    assert result.code == 2 and f"{tmp_path / 'pipeline'} {sentence}" in result.err


def test_inspect_a_student_and_a_run(cli, run: Path, tmp_path: Path) -> None:
    student = cli("inspect", run / "student").out
    for words in ("flow map, by freeflow", "UNet2DModel, 0.70 M parameters", "1 x 8 x 8, pixels", "class labels 0 to 9",
                  "scale 1 is part of the weights"):
        assert words in student, words
    (tmp_path / "run").mkdir()
    settings = "method: {name: freeflow}\nteacher: {source: somewhere}\ntrain: {steps: 70}\noutput_dir: x\n"
    (tmp_path / "run" / "config.yaml").write_text(settings)
    out = cli("inspect", tmp_path / "run").out
    assert "freeflow, no checkpoint yet" in out and "somewhere" in out and "none yet" in out
    (tmp_path / "run" / "checkpoints" / "step-000030").mkdir(parents=True)
    assert "freeflow, step 30 of 70" in cli("inspect", tmp_path / "run").out
    shutil.copytree(run / "student", tmp_path / "run" / "student")
    assert student in cli("inspect", tmp_path / "run").out
    for model, kind in ((run / "student", "a student"), (tmp_path / "run", "a run")):
        for option in (["--null-label", 3], ["--sample", tmp_path / "grid.png"]):
            result = cli("inspect", model, *option)
            assert result.code == 2 and f"{model} is {kind}" in result.err
