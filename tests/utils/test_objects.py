"""Python objects named in settings: where their modules are looked for."""

from __future__ import annotations

import sys

import pytest

from flowdistill.utils.errors import UserError
from flowdistill.utils.objects import load_object


@pytest.fixture()
def command_path(monkeypatch, tmp_path):
    """A current folder that Python does not look in, as of the command ``flowdistill``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    return tmp_path


def test_a_module_in_the_current_folder_is_found(command_path):
    (command_path / "module_of_mine.py").write_text("thing = 'mine'")
    assert load_object("module_of_mine:thing", "method.name") == "mine"
    assert load_object("module_of_mine:thing", "method.name") == "mine" and sys.path.count(str(command_path)) == 1


def test_a_file_in_the_current_folder_hides_no_installed_module(command_path):
    (command_path / "colorsys.py").write_text("rgb_to_hls = 'mine'")
    sys.modules.pop("colorsys", None)
    assert load_object("colorsys:rgb_to_hls", "method.name") != "mine"


def test_a_module_that_is_nowhere_is_named(command_path):
    with pytest.raises(UserError, match="'method.name' names no_such_module:A, which cannot be imported: No"):
        load_object("no_such_module:A", "method.name")
