"""The documentation: links lead somewhere, pages that are named exist, and commands and settings are real ones."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flowdistill.cli.commands import make_parser
from flowdistill.config import load_config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "configs", "docs", "flowdistill", "scripts", "tests")
SUFFIXES = (".md", ".py", ".sh", ".toml", ".yaml", ".yml", "")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PLACEHOLDERS = ("PAGE", "VERSION")  # names that a reader replaces
SECTIONS = {"output_dir", "seed", "teacher", "method", "train", "evaluation", "defaults_from"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files() -> Iterator[Path]:
    """The text files of the repository; this one has paths that are made up."""
    for folder in FOLDERS:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES and path.is_file()
                    and "__pycache__" not in path.parts and path != Path(__file__).resolve())
    yield from (path for path in sorted(ROOT.iterdir()) if path.suffix in SUFFIXES and path.is_file())


def anchors(page: Path) -> set[str]:
    """Where a link may lead on a page, by the rule that Python-Markdown and code forges have in common."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", head) for head in re.findall(r"^#+ +(.*)$", text, re.M)]
    plain = [unicodedata.normalize("NFKD", head).encode("ascii", "ignore").decode() for head in heads]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in plain}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in place or place.startswith("mailto:"):
            continue
        aim = (page.parent / place).resolve() if place else page
        if not aim.exists() or anchor and aim.suffix == ".md" and anchor not in anchors(aim):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_every_page_and_picture_that_is_named_exists():
    missing = {(name_of(file), name) for file in files() if file.suffix != "" or file.parent.name == ".ci"
               for name in re.findall(r"(?<![\w/])docs/[\w./-]+?\.(?:md|png)\b", file.read_text(encoding="utf-8"))
               if not (ROOT / name).is_file() and Path(name).stem not in PLACEHOLDERS}
    assert missing == set()


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `title`, it is: (so)\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#a-title-it-is-so) [c](#here) `[d](none.md)`\n\n# Here\n"
                    "[e](none.md) [f](other.md#none) [g](#none) [h](https://example.org/none.md)\n"
                    "```\n[i](none.md)\n```\n")
    assert broken_links(page) == ["none.md", "other.md#none", "#none"]


# --- what a reader would copy


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, and "" with each indented command."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = [(language.strip(), body) for language, body in re.findall(r"^```(.*?)\n(.*?)^```", text, re.M | re.S)]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return found + [("", line.strip()) for line in re.findall(r"^    (?:\$ )?(flowdistill .*)$", outside, re.M)]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every call of flowdistill on a page, alone or behind a launcher."""
    for language, text in blocks(page):
        if language not in ("", "bash", "sh"):
            continue
        for line in text.splitlines():
            match = re.search(r"(?:^|&& |-m |bin/)flowdistill (.*)", line.strip())
            if match and not match[1].startswith(("error", "warning")):
                yield shlex.split(match[1].split(" && ")[0], comments=True)


COMMANDS = [(page, words) for page in PAGES if page.name != "CHANGELOG.md" for words in commands(page)]


def test_pages_have_commands():
    assert len(COMMANDS) > 50 and ["distill", "configs/digits/freeflow.yaml"] in [words for _, words in COMMANDS]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: name_of(value) if isinstance(value, Path)
                         else " ".join(value))
def test_commands_and_their_settings_exist(page, words, capsys):
    try:
        args = make_parser().parse_args(words)
    except SystemExit as stop:
        assert stop.code in (0, None), capsys.readouterr().err  # 0: --version, --help
        return
    if getattr(args, "config", "").startswith("configs/"):
        load_config(ROOT / args.config, [each for each in args.overrides if not each.endswith("=...")])


def script_calls(page: Path) -> Iterator[list[str]]:
    """The words of every call of a script of this repository, from its path on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for call in re.findall(r"\bpython (scripts/\w+\.py[^\n`]*)", text):
        yield shlex.split(call.split(" && ")[0], comments=True)


SCRIPT_CALLS = [(page, words) for page in PAGES if page.name != "CHANGELOG.md" for words in script_calls(page)]


@pytest.mark.parametrize(("page", "words"), SCRIPT_CALLS, ids=lambda value: name_of(value) if isinstance(value, Path)
                         else " ".join(value))
def test_scripts_and_their_options_exist(page, words):
    script, *arguments = words
    source = (ROOT / script).read_text(encoding="utf-8")
    imports = " ".join(re.findall(r"^ *(?:from|import) (.*)", source, re.M))
    for module in set(re.findall(r"\w+", imports)):  # where some have their options from
        source += "".join(file.read_text(encoding="utf-8") for folder in ("scripts", "tests/gpu")
                          if (file := ROOT / folder / f"{module}.py").is_file())
    for name in (word for word in arguments if word.startswith("--")):
        assert f'"{name}"' in source, name
    for name in (word for word in arguments if word.startswith("configs/")):
        assert (ROOT / name).is_file(), name
    if script == "scripts/run_experiment.py" and "--write-docs" in arguments:  # the table that it writes has its place
        experiment = yaml.safe_load((ROOT / arguments[0]).read_text(encoding="utf-8"))["name"]
        place = ROOT / arguments[arguments.index("--write-docs") + 1]
        assert f"<!-- table:{experiment} -->" in place.read_text(encoding="utf-8")


def test_files_for_launchers_exist():
    named = {(name_of(page), name) for page in PAGES
             for name in re.findall(r"\bconfigs/(?:accelerate|slurm)/\w+\.\w+", page.read_text(encoding="utf-8"))}
    assert named and [pair for pair in named if not (ROOT / pair[1]).is_file()] == []


def configurations(page: Path) -> list[dict]:
    """The YAML blocks that are a configuration, or a part of one."""
    read = [yaml.safe_load(text) for language, text in blocks(page) if language == "yaml"]
    return [content for content in read if isinstance(content, dict) and set(content) <= SECTIONS]


CONFIGURATIONS = [(page, number, content) for page in PAGES for number, content in enumerate(configurations(page))]


@pytest.mark.parametrize(("page", "number", "content"), CONFIGURATIONS,
                         ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_settings_on_the_pages_exist(page, number, content, tmp_path):
    base = content.pop("defaults_from", None)
    if base is not None and (ROOT / base).is_file():
        content["defaults_from"] = str(ROOT / base)
    given = {"output_dir": "runs/mine", "teacher.source": "path"}
    if "defaults_from" not in content and "name" not in (content.get("method") or {}):
        given["method.name"] = "dmd2"  # a part of a configuration: a method that has all that they speak of
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(content))
    load_config(file, [f"{key}={value}" for key, value in given.items() if not in_file(content, key)])


def in_file(content: dict, key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in ((content.get(section) or {}) if section else content)
