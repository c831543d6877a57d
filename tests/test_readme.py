"""Every block of the README, and of the page about Python, runs as it stands and in order, in a copy of the checkout.

Runs are short: the steps of a configuration are scaled down (fewer stay fewer), and at most 20 images are measured. The
README's placeholders are there: ``path/to/pipeline`` is the digits' teacher, ``my.yaml`` the README's own YAML, and the
features "inception", whose weights nothing ships, are the digits'.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from flowdistill.config import load_config
from flowdistill.data import load_digits
from flowdistill.evaluation import Evaluator
from flowdistill.training import run
from flowdistill.utils.images import save_images
from tests.data.fashion import FOLDER_VARIABLE, write_fashion

ROOT = Path(__file__).resolve().parents[1]
MOST_IMAGES = 20


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, and its indented commands."""
    found, fenced, start = [], None, 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if fenced is None:
                language, fenced, start = line[3:].strip(), [], number
            else:
                found.append(Block(start, language, "\n".join(fenced)))
                fenced = None
        elif fenced is not None:
            fenced.append(line)
        elif line.startswith("    ") and line.strip():
            found.append(Block(number, "", line.strip()))
    assert fenced is None, f"the block of line {start} does not end"
    return found


PAGES = {"README.md": ("runs/digits-freeflow/report.json", "runs/fashion-dmd2/report.json", "grid.png", "report.json",
                       "my-one-step-pipeline/model_index.json"),
         "docs/reference/api/index.md": ("runs/short/student",)}  # and what their blocks make
BLOCKS = {page: blocks((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the README uses, as the working folder, with its placeholders; runs in it are short."""
    for name in ("configs", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv(FOLDER_VARIABLE, str(write_fashion(tmp_path / "fashion")))  # what Debian's package would bring
    for name in ("digits-classifier", "digits-flow", "fashion-classifier", "fashion-flow"):
        shutil.copytree(ROOT / "assets" / name, tmp_path / "assets" / name)
    for place in ("path/or/hub-id", "path/to/pipeline"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(tmp_path / "assets" / "digits-flow")
    save_images(load_digits()[0][:MOST_IMAGES], tmp_path / "path" / "to" / "images")
    (yaml,) = (block for block in BLOCKS["README.md"] if block.language == "yaml")
    (tmp_path / "my.yaml").write_text(yaml.text)
    monkeypatch.chdir(tmp_path)

    def short(path, overrides=()):
        config = load_config(path, overrides)
        steps = max(1, config.train.steps.bit_length() - 8)  # 500: 1, 1000: 2, 100000: 9
        train = replace(config.train, steps=steps, batch_size=16, log_every=1, num_samples=10, trackers=[])
        known = config.evaluation.features
        features = "digits" if known == "inception" else known
        return replace(config, train=train, evaluation=replace(config.evaluation, features=features))

    def measures(self, features, reference, num_images=10_000, *arguments, **settings):
        initialize(self, features, reference, min(num_images, MOST_IMAGES), *arguments, **settings)

    initialize = Evaluator.__init__
    monkeypatch.setattr(run, "load_config", short)
    monkeypatch.setattr(Evaluator, "__init__", measures)
    return tmp_path


def commands(block: Block) -> list[list[str]]:
    """The words of each command; those of `a && b` are two."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(command, comments=True) for line in lines for command in line.split(" && ") if command.strip()]


def run_command(words: list[str], cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if words[:3] == ["python3", "-m", "venv"] or program == "pip":
        # An environment takes minutes and a network; what it asks of this project is there.
        for extra in re.findall(r"\[(.*?)\]", words[-1]):
            assert re.search(rf"^{extra} = \[", Path("pyproject.toml").read_text(), re.M), extra
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert "-n" not in arguments or importlib.util.find_spec("xdist")  # the suite, which this test is in
    elif program == "flowdistill":
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
    else:
        raise AssertionError(f"not a command that a reader could give: {words}")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_in_its_order(page, checkout, cli, monkeypatch):
    monkeypatch.setattr("flowdistill.utils.exit.exit_process", sys.exit)  # which ends the process at once
    for block in BLOCKS[page]:
        try:
            if block.language == "python":
                exec(compile(block.text, f"{page}, line {block.line}", "exec"), {})
            elif block.language == "":
                for words in commands(block):
                    run_command(words, cli, monkeypatch)
            else:
                assert block.language == "yaml"  # my.yaml, which the commands read
        except Exception as error:
            raise AssertionError(f"the block at line {block.line} of {page} fails: {error}") from error
    for made in PAGES[page]:
        assert (checkout / made).exists(), made
    steps = {"README.md": ("digits-freeflow", 2), "docs/reference/api/index.md": ("short", 1)}
    run_name, short = steps[page]
    assert load_config(checkout / "runs" / run_name / "config.yaml").train.steps == short


def test_the_blocks_are_of_every_kind():
    assert {block.language for block in BLOCKS["README.md"]} == {"", "python", "yaml"}
    assert [block.language for block in BLOCKS["docs/reference/api/index.md"]] == ["python"]


def test_a_block_is_found_with_its_line():
    page = textwrap.dedent("""\
        Words

            indented --command

        ```yaml
        a: 1

        b: 2
        ```
        ```
        one && two 'three four'  # five
        ```
    """)
    assert blocks(page) == [Block(3, "", "indented --command"), Block(5, "yaml", "a: 1\n\nb: 2"),
                            Block(10, "", "one && two 'three four'  # five")]
    assert commands(blocks(page)[2]) == [["one"], ["two", "three four"]]
