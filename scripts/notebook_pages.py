"""Pages of the site for the notebooks in docs/notebooks/: a hook of mkdocs (mkdocs.yml), which runs nothing of them.

A notebook's text stays as it is, a cell of code becomes a block of Python, and what it printed and drew stands below.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PLAIN = ((r"\\[, ]", " "), (r"\\frac\{(.*?)\}\{(.*?)\}", r"\1/\2"), (r"\\partial ", "d"), (r"\\mathrm\{(\w+)\}", r"\1"),
         (r"\\mathcal (\w)", r"\1"), (r" \.$", ""))
"""TeX and what stands for it in a line of code: the site loads no program that sets formulas."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        place = file.src_uri.replace(".ipynb", ".md")
        files.append(type(file).generated(config, place, content=as_page(file.content_string)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """On the site, links to a notebook lead to its page."""
    return re.sub(r"\]\(([\w./-]*)\.ipynb\)", r"](\1.md)", markdown)


def as_page(text: str) -> str:
    """A notebook, as its JSON, in Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(without_tex(source))
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [shown(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """What a cell printed, or drew."""
    if "text" in output:
        return f"```\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f"![What the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```\n{''.join(data['text/plain'])}\n```"


def without_tex(text: str) -> str:
    """Formulas between dollar signs as code."""
    text = re.sub(r"\$\$(.*?)\$\$", lambda match: f"    {plain(match[1])}", text, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda match: f"`{plain(match[1])}`", text)


def plain(formula: str) -> str:
    for tex, word in PLAIN:
        formula = re.sub(tex, word, formula.strip())
    return re.sub(r" +", " ", formula)
