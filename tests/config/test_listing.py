"""Every setting as a file, as a table and by a word."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from flowdistill.config import METHODS, HostingConfig, load_config, option
from flowdistill.config.checks import leaf_types
from flowdistill.config.listing import (
    NAME,
    allowed_in_words,
    as_found,
    as_markdown,
    as_yaml,
    as_yaml_value,
    method_settings,
    run_settings_of,
    search,
    settings_of,
)
from flowdistill.config.schema import RunConfig
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import parse_yaml
from scripts.settings_tables import MARKED, main, pages, table, updated
from tests.toy_method import ToyConfig

NEEDS = {"teacher_score_matching": {"method.student_size": 0.5}}
"""What a method refuses to be without beside the settings that have no default."""


def written(name: str, folder: Path) -> tuple[Path, dict[str, object]]:
    """The file of all of a method's settings, and what was filled in."""
    settings = run_settings_of(method_settings(name))
    filled = {each.key: "digits" for each in settings if each.required and each.active} | NEEDS.get(name, {})
    file = folder / f"{name}.yaml"
    file.write_text(as_yaml(settings, filled))
    return file, filled


@pytest.mark.parametrize("name", METHODS.names())
def test_file_of_all_settings_is_the_defaults(name: str, tmp_path: Path) -> None:
    file, filled = written(name, tmp_path)
    short = tmp_path / "short.yaml"
    short.write_text(f"method: {{name: {name}}}\n")
    host = method_settings(name)
    usual = [f"method.host.name={host.usual_host}"] if issubclass(host, HostingConfig) else []
    config = load_config(file)
    assert config == load_config(short, [*(f"{key}={value}" for key, value in filled.items()), *usual])
    # Every one is there: none is left to a default.
    keys = {key for key, _ in leaf_types(RunConfig, type(config.method))}
    listed = {each.key for each in run_settings_of(method_settings(name)) if each.section is None}
    assert listed == keys


@pytest.mark.parametrize("name", METHODS.names())
def test_sections_that_are_off_can_be_taken_out_of_their_comments(name: str, tmp_path: Path) -> None:
    file, filled = written(name, tmp_path)
    text = file.read_text()
    off = [each for each in run_settings_of(method_settings(name)) if each.section and each.default is None]
    assert "train.stop_when" in {each.key for each in off}
    for each in off:
        text = re.sub(rf"^ *{each.name}: null\n", "", text, flags=re.MULTILINE)
    for each in run_settings_of(method_settings(name)):
        if each in off or not each.active:
            line = f"{each.name}:" if each.section else f"{each.name}: {each.value}"
            text = re.sub(rf"^( *)# {re.escape(line)}$", rf"\1{line}", text, flags=re.MULTILINE)
    values = parse_yaml("\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")), "text")
    for each in off:
        node = values
        for part in each.key.split("."):
            node = node[part]
        assert set(node) == {item.name for item in fields(each.section)}


def test_every_setting_says_what_it_is() -> None:
    found = [each for name in METHODS for each in run_settings_of(method_settings(name))]
    assert [each.key for each in found if not each.help] == []
    assert {each.name for each in found if each.help == NAME} == {"name"}
    assert len(found) > 1000


@dataclass
class Inner:
    """A section."""

    rate: float = option(1e-3, "how fast", above=0)


@dataclass
class Outer:
    """Settings of every kind."""

    first: Inner = option(Inner, "the one | first")
    second: Inner = option(Inner(rate=0.5), "the other (authors of X: 3)")
    off: Inner | None = option(None, "a third")
    texts: list[str] = option(["no", "a b", "1"], "words", choices=("no", "a b", "1"))
    needed: int = option("???", "a number that has to be set", at_least=1, at_most=9)
    name: str = "outer"


def test_table_names_what_is_repeated_once() -> None:
    lines = as_markdown(list(settings_of(Outer(), Outer)), "").splitlines()
    assert lines == [
        "| Setting | Default | May be | What it is | Published |",
        "| --- | --- | --- | --- | --- |",
        "| `name` | `outer` | text | the method |  |",
        "| `first` |  | a section | the one \\| first |  |",
        "| `first.rate` | `0.001` | a number, above 0 | how fast |  |",
        "| `second.*` | `rate: 0.5` |  | the other: as `first.*` | authors of X: 3 |",
        "| `off.*` | `null` |  | a third: as `first.*` |  |",
        "| `texts` | `['no', a b, '1']` | any of `no`, `a b`, `1` | words |  |",
        "| `needed` | **required** | an integer from 1 to 9 | a number that has to be set |  |",
    ]


@pytest.mark.parametrize("value", [None, True, 1e-8, -3, "no", "0010", "a: b", "# x", [1, 2.5], [], {}, {"a": [1]},
                                   ["a, b", "]", "12:30"], "text with 'quotes' and \"others\"", "long " * 60])
def test_values_stand_in_one_line_and_are_read_back(value: object) -> None:
    text = as_yaml_value(value)
    assert "\n" not in text and parse_yaml(f"key: {text}\n", "text") == {"key": value}


@pytest.mark.parametrize("hint, limits, words", [
    (bool, {}, "true or false"),
    (float | None, {"above": 0, "at_most": 1}, "a number, above 0 and at most 1, or null"),
    (int, {"at_least": 0, "at_most": 8}, "an integer from 0 to 8"),
    (int, {"at_least": 0, "below": 2**64}, "an integer, at least 0 and below 2^64"),
    (str | None, {"choices": ("a", "b")}, "one of a, b, or null"),
    (list[float], {"length": 2, "at_least": 0}, "a list of 2 numbers, each at least 0"),
    (list[str] | None, {"choices": ("a",)}, "a list with any of a, or null"),
])
def test_ranges_in_words(hint: object, limits: dict[str, object], words: str) -> None:
    assert allowed_in_words(hint, limits) == words


def test_search_finds_the_critics_learning_rate() -> None:
    found = {(each.setting.key, *each.methods) for each in search(["critic's", "learning rate"], ["dmd2"])}
    assert ("method.critic_optimizer.lr", "dmd2") in found
    assert {key for key, *_ in found}.isdisjoint({"method.optimizer.lr"})
    everywhere = as_found(search(["critic_optimizer.lr"]), methods=True)
    assert re.search(r"^method\.critic_optimizer\.lr = 0\.0001$", everywhere, re.MULTILINE)
    assert "optimiser of the critic" in everywhere and re.search(r"methods: .*dmd2.*freeflow", everywhere)
    shared = search(["batch_size"], ["dmd2"], "train")
    assert [each.setting.key for each in shared] == ["train.batch_size"] and not shared[0].methods


def test_search_without_a_result_says_so() -> None:
    with pytest.raises(UserError, match="no setting of dmd2 has 'no such words' in its name or its help text"):
        search(["no", "such words"], ["dmd2"])


def test_host_is_for_methods_that_have_one() -> None:
    hosting = [name for name in METHODS if issubclass(METHODS.get(name).Config, HostingConfig)]
    assert hosting
    for name in hosting:
        other = method_settings(name, "freeflow")
        assert "host.prediction_fraction" in {key for key, _ in leaf_types(other, other)}
    with pytest.raises(UserError, match="--host dmd2 is for a method over another one, and freeflow is none"):
        method_settings("freeflow", "dmd2")


def test_method_of_an_object_is_listed() -> None:
    try:
        settings = method_settings("tests.toy_method:ToyMethod")
    finally:
        METHODS.unregister("tests.toy_method:ToyMethod")
    assert settings is ToyConfig and is_dataclass(settings)
    assert "method.name" in {each.key for each in run_settings_of(settings)}


def test_tables_of_the_pages_are_up_to_date() -> None:
    known: dict[str, str] = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- settings:") == len(MARKED.findall(text)), f"{page} has a table without an end"
        new = updated(text, lambda name: known[name] if name in known else known.setdefault(name, table(name)))
        assert new == text, f"{page}: run scripts/settings_tables.py"


def test_a_table_of_a_page_is_replaced_between_its_marks() -> None:
    page = "before\n\n<!-- settings:train -->\nold\n<!-- /settings -->\n\nafter\n"
    new = updated(page)
    assert "old" not in new and new.startswith("before\n") and new.endswith("<!-- /settings -->\n\nafter\n")
    assert "| `steps` | `1000` | an integer, at least 1 | training steps |" in new and updated(new) == new


@pytest.mark.parametrize(("text", "words"), [
    (None, "does not exist"),
    ("<!-- settings:train -->\nown\n<!-- settings:teacher -->\n<!-- /settings -->\n", "settings:train --> has no line"),
    ("<!-- settings:train -->\nown words\n", "settings:train --> has no line"),
    ("own words\n<!-- /settings -->\n", "<!-- /settings --> ends no table"),
    ("<!-- settings:freflow -->\n<!-- /settings -->\n", "did you mean 'freeflow'"),
])
def test_a_page_whose_tables_are_not_marked_rightly_stays(text, words, tmp_path, capsys):
    page, fine = tmp_path / "page.md", tmp_path / "fine.md"
    fine.write_text("<!-- settings:train -->\n<!-- /settings -->\n")
    if text is not None:
        page.write_text(text)
    assert main([str(fine), str(page)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("settings_tables: error: ") and words in said and said.count("\n") == 1
    assert text is None or page.read_text() == text
    assert len(fine.read_text()) < 60
