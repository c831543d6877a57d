"""The notebooks run as they are stored, and what they show is what they make."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from flowdistill.config import METHODS
from scripts.run_notebooks import FOLDER, executed, main, run_cell

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHORT = {"NOTEBOOK_STEPS": "2", "NOTEBOOK_IMAGES": "20"}
LARGEST = 100_000
"""Bytes of a stored picture."""


def shown(cell: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a cell shows, as far as it does not depend on the machine and on how long a run is: kinds and words."""
    found = []
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text")})
        words = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", "".join(data["text/plain"]))
        found.append((output["output_type"], *sorted(data), re.sub(r"[-\s]+", " ", words)))
    return found


def test_there_are_notebooks() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["digits", "method"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_makes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SHORT.items():
        monkeypatch.setenv(name, value)
    stored = json.loads(file.read_text(encoding="utf-8"))
    try:
        made = executed(stored, file.name)
    finally:
        METHODS.unregister("average_velocity")
    number = 0
    for old, new in zip(stored["cells"], made["cells"], strict=True):
        assert old["source"] == new["source"]
        if old["cell_type"] == "code":
            number += 1
            assert old["execution_count"] == number and shown(old) == shown(new)
    pictures = [output["data"]["image/png"] for cell in stored["cells"] for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})]
    assert pictures and all(len(base64.b64decode(picture)) < LARGEST for picture in pictures)


def test_a_cell_shows_what_it_prints_and_its_last_expression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    assert run_cell("print('a')\nx = 2", "here", names) == (None, "a\n") and run_cell("x + 1", "here", names) == (3, "")
    cells = [{"cell_type": "markdown", "source": ["# A page"]}, {"cell_type": "code", "source": ["print(1)\n", "[2]"]}]
    file = tmp_path / "page.ipynb"
    file.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    before = Path.cwd()
    assert main([str(file)]) == 0 and Path.cwd() == before and "page.ipynb: " in capsys.readouterr().out
    page, code = json.loads(file.read_text())["cells"]
    assert page == cells[0] and code["execution_count"] == 1
    assert [output.get("text") or output["data"]["text/plain"] for output in code["outputs"]] == [["1\n"], ["[2]"]]
    cells[1]["source"] = ["\n", "1 / 0"]
    with pytest.raises(ZeroDivisionError) as error:
        executed({"cells": cells}, "page.ipynb")
    assert str(error.traceback[-1].path).endswith("page.ipynb, cell 1") and error.traceback[-1].lineno == 1


@pytest.mark.parametrize(("text", "words"), [
    (None, "does not exist"), ("{", "is not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "is no notebook"),
    ('{"cells": [3]}', "is no notebook"), ('{"cells": [{"cell_type": "code"}]}', "is no notebook"),
])
def test_what_is_no_notebook_is_one_sentence(text, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    good.write_text('{"cells": [{"cell_type": "code", "source": "1 / 0"}]}')  # is not run
    if text is not None:
        bad.write_text(text)
    assert main([str(good), str(bad)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"run_notebooks: error: {bad}") and words in said and said.count("\n") == 1
