"""The example of a method in a package of its own: built and installed as pip does it, and its own tests pass."""

from __future__ import annotations

import inspect
import runpy
import shutil
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from packaging.requirements import Requirement

from flowdistill import __version__
from flowdistill.config import METHODS

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "flowdistill-method-example"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its wheel, unpacked where this Python finds it, which is all that pip does with a wheel of this kind."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    monkeypatch.chdir(source)
    (tmp_path / "wheels").mkdir()
    wheel = build_wheel(str(tmp_path / "wheels"))
    with zipfile.ZipFile(tmp_path / "wheels" / wheel) as file:
        assert not [name for name in file.namelist() if "test" in name]
        file.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    yield
    METHODS.unregister("pair_regression")
    for name in [name for name in sys.modules if name.startswith("flowdistill_method_example")]:
        del sys.modules[name]


def test_its_own_tests_pass(installed: None, tmp_path: Path) -> None:
    tests = {name: test for name, test in runpy.run_path(str(EXAMPLE / "tests" / "test_pair_regression.py")).items()
             if name.startswith("test_")}
    assert len(tests) == 2
    for name, test in tests.items():
        folder = tmp_path / name
        folder.mkdir()
        test(**({"tmp_path": folder} if inspect.signature(test).parameters else {}))
    assert "pair_regression" in METHODS.names()


def test_it_allows_this_version(installed: None) -> None:
    asked = [Requirement(text) for text in requires("flowdistill-method-example") or ()]
    (requirement,) = [one for one in asked if one.marker is None]
    assert requirement.name == "flowdistill" and requirement.specifier.contains(__version__)
