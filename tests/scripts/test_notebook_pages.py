"""The pages that the site makes of notebooks."""

import json
import runpy
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "notebook_pages.py"))


def test_text_code_and_what_it_showed_become_a_page():
    page = SCRIPT["as_page"](json.dumps({"cells": [
        {"cell_type": "markdown", "source": ["# A title\n", "\n", "at $x_t = (1 - t)\\, x_0$, so\n", "\n",
                                             "$$d\\,\\frac{\\partial V}{\\partial d} = 0 .$$\n"]},
        {"cell_type": "code", "source": ["print(1)\n", "picture"], "outputs": [
            {"output_type": "stream", "text": ["1\n"]},
            {"output_type": "execute_result", "data": {"image/png": "iVBORw0=\n", "text/plain": ["<Image>"]}}]},
        {"cell_type": "code", "source": ["2"], "outputs": [
            {"output_type": "execute_result", "data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": ["x = 3"], "outputs": []},
    ]}))
    assert page == (
        "# A title\n\nat `x_t = (1 - t) x_0`, so\n\n    d dV/dd = 0\n\n\n"
        "```python\nprint(1)\npicture\n```\n\n```\n1\n```\n\n"
        "![What the cell draws](data:image/png;base64,iVBORw0=)\n\n"
        "```python\n2\n```\n\n```\n2\n```\n\n```python\nx = 3\n```\n")


def test_links_to_notebooks_lead_to_their_pages():
    said = SCRIPT["on_page_markdown"]("[a](../notebooks/a.ipynb), [b](b.ipynb), [c](c.md), `d.ipynb`", page=None)
    assert said == "[a](../notebooks/a.md), [b](b.md), [c](c.md), `d.ipynb`"
