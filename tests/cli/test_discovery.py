"""``methods``, ``families``, ``env``, ``init`` and ``completion``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowdistill.cli.tables import method_rows
from flowdistill.config import METHODS, load_config, option
from flowdistill.config.listing import method_settings, search
from flowdistill.export.card_data import about_paper
from flowdistill.networks.backbones import FAMILIES
from flowdistill.plan.starting import _method
from flowdistill.training.method import About, Method, facts_of
from flowdistill.utils import environment
from flowdistill.utils.errors import UserError


def test_methods_are_all_there_with_what_they_need(cli) -> None:
    table = cli("methods", "--markdown").out
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]}
    assert list(rows) == METHODS.names()
    assert all(all(cells) for cells in rows.values())
    assert {name for name, cells in rows.items() if cells[2] == "yes"} == {"data_flow_map"}
    assert rows["freeflow"][2:] == ["no", "1", "critic"] and rows["flow_map_matching"][3] == "1 to 8"
    plain = cli("methods")
    assert plain.code == 0 and max(map(len, plain.out.splitlines())) <= 100


def test_a_method_without_a_word_of_its_own_is_described() -> None:
    @dataclass
    class Settings:
        name: str = "mine"
        data: str = option("???", "images")
        steps: int = option(1, "calls", at_least=1, at_most=4)
        judge_optimizer: str = ""

    class Mine(Method):
        """What it does
        in two lines.

        And more.
        """

        Config = Settings

    assert facts_of(Mine) == About("What it does in two lines.", "", "yes", "1 to 4", "judge")


def test_a_broken_package_is_a_row(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("broken", "no_such_module:Method", "flowdistill.methods")
    monkeypatch.setattr(METHODS, "_entry_points", lambda: {"broken": point})
    done = cli("methods")
    row = done.out.split("\nbroken\n")[1].split("\n\n")[0]
    assert done.code == 0 and "cannot be imported" in " ".join(row.split()) and "\nfreeflow\n" in done.out


class Odd:
    """A class of another package that is no method."""

    about = None


def test_broken_packages_stop_nothing_but_their_own_methods(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {name: importlib.metadata.EntryPoint(name, value, "flowdistill.methods")
              for name, value in (("a_broken", "no_such_module:Method"), ("an_odd", f"{__name__}:Odd"))}
    METHODS.names()  # imports this package's own
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))
    monkeypatch.setattr(METHODS, "_entry_points", lambda: points)
    found = {row.name: row.facts["what it does"] for row in method_rows()}
    assert "cannot be imported" in found["a_broken"] and "cannot be described" in found["an_odd"]
    assert _method(None)[0] == "dmd2"
    assert search(["finite_difference_step"])
    with pytest.raises(UserError, match=r"'METHOD' names an_odd, which is no method"):
        method_settings("an_odd")
    done = cli("distill", "digits/freeflow", "method.critic_steps=3")
    assert done.code == 2 and "unknown key 'method.critic_steps'" in done.err
    assert "FreeFlow" in about_paper("freeflow") and about_paper("an_odd") == about_paper("a_broken") == ""


def test_families_are_all_there(cli) -> None:
    done = cli("families")
    names = [line for line in done.out.splitlines() if line and not line.startswith(" ")]
    assert done.code == 0 and names == FAMILIES.names()
    table = cli("families", "--markdown").out
    assert "| `UNet2DModel` | every pipeline of such a network without prompts | class labels, or nothing |" in table
    assert "StableDiffusionXLPipeline" in table and "an input of the network (dev)" in table


def test_env_has_versions_and_devices(cli) -> None:
    import torch

    found = json.loads(cli("env", "--json").out)
    assert found["torch"] == importlib.metadata.version("torch") and found["flowdistill"]
    assert ("cuda:0" in found["devices"]) == torch.cuda.is_available()
    assert cli("env").out.startswith("flowdistill ")


def test_env_imports_torch_alone() -> None:
    code = ("import sys\nfrom flowdistill.cli.commands import main\nmain(['env'])\n"
            "print('loaded', sorted({'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded []\n") and "diffusers" in done.stdout


def test_env_says_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    found = environment.collected()
    assert found["no-such-package"] == "not installed" and "torch cannot be imported" in found["devices"]


def test_init_writes_a_file_once(cli, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    done = cli("init", "assets/digits-flow", "--method", "data_flow_map", "--out", file)
    assert done.code == 0 and f"{file}: written" in done.out and "first set method.data: images" in done.out
    assert f"then  flowdistill distill {file}" in done.out
    assert load_config(file, ["method.data=digits"]).teacher.source == "assets/digits-flow"
    before = file.read_text()
    again = cli("init", "assets/digits-flow", "--out", file)
    assert again.code == 2 and "exists already" in again.err and file.read_text() == before
    nothing = cli("init", "no/such/pipeline", "--out", tmp_path / "other.yaml")
    assert nothing.code == 2 and nothing.err.count("\n") == 1 and not (tmp_path / "other.yaml").exists()


def test_completion_is_of_the_whole_parser(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[argparse.ArgumentParser, str]] = []
    fake = types.ModuleType("shtab")
    fake.FILE, fake.DIRECTORY = {"bash": "file"}, {"bash": "folder"}  # type: ignore[attr-defined]
    fake.complete = lambda parser, shell: asked.append((parser, shell)) or "a script"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shtab", fake)
    assert cli("completion", "bash").out == "a script\n"
    (parser, shell), = asked
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    assert shell == "bash" and {"distill", "config", "completion"} <= set(commands)
    paths = {name: [getattr(action, "complete", None) for action in commands[name]._actions if action.metavar == shown]
             for name, shown in (("distill", "CONFIG.yaml"), ("export", "OUT_DIR"), ("distill", "key=value"))}
    assert paths["export"] == [fake.DIRECTORY] and paths["distill"] == [None]
    monkeypatch.setitem(sys.modules, "shtab", None)
    missing = cli("completion", "zsh")
    assert missing.code == 2 and "pip install 'flowdistill[completion]'" in missing.err
