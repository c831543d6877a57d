"""Run the notebooks in docs/notebooks/ and store what their cells show.

    python scripts/run_notebooks.py                              all of them, as a reader would, in minutes
    python scripts/run_notebooks.py docs/notebooks/digits.ipynb

Cells run in this process and in a temporary folder, without Jupyter, which they do not need: they are plain Python.
What is stored is what they print and the value of a last expression, pictures as PNG. Progress and warnings (stderr)
are not.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from PIL import Image

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write
from flowdistill.utils.text import read_json_object

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
MODULE = "notebook"
"""Where a notebook's names live while it runs: dataclasses look their annotations up in the module of their name."""


def outputs_of(value: object, printed: str, number: int) -> list[dict[str, Any]]:
    """A cell's outputs as a notebook stores them: what it printed, then the value of its last expression."""
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is None:
        return outputs
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode(),
                "text/plain": [f"<{value.width} x {value.height} pixels>"]}
    else:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
    return [*outputs, {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}]


def run_cell(source: str, name: str, names: dict[str, Any]) -> tuple[object, str]:
    """Run a cell whose variables are ``names``: the value of its last expression (else None), and what it printed."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    return value, printed.getvalue()


def read_notebook(file: Path) -> dict[str, Any]:
    """The content of a notebook's file.

    Raises:
        UserError: it is missing, or no notebook.
    """
    notebook = read_json_object(file)
    cells = notebook.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and {"cell_type", "source"} <= set(cell)
                                              for cell in cells):
        raise UserError(f"{file} is no notebook: it has no list of cells, each with a cell_type and a source")
    return notebook


def executed(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a notebook (the content of its file) with the outputs of its code cells, run in their order.

    The variables of the notebook are those of a module while it runs.

    Raises:
        Exception: whatever a cell raises, with the number of the cell in its traceback.
    """
    notebook = json.loads(json.dumps(notebook))
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    try:
        number = 0
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                value, printed = run_cell("".join(cell["source"]), f"{name}, cell {number}", module.__dict__)
                cell["execution_count"], cell["outputs"] = number, outputs_of(value, printed, number)
    finally:
        del sys.modules[MODULE]
    return notebook


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all in docs/notebooks/")
    files = [file.resolve() for file in parser.parse_args(arguments).notebooks] or sorted(FOLDER.glob("*.ipynb"))
    before = Path.cwd()
    try:
        notebooks = {file: read_notebook(file) for file in files}  # what is wrong is said before any is run
    except UserError as error:
        print(f"run_notebooks: error: {error}", file=sys.stderr)
        return 2
    for file, notebook in notebooks.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                made = executed(notebook, file.name)
            finally:
                os.chdir(before)
        with atomic_write(file) as output:
            output.write((json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode())
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
