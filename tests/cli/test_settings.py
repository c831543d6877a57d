"""``flowdistill config``: files, tables, searches, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowdistill.config import load_config


def test_file_is_written_once_and_read_back(cli, tmp_path: Path) -> None:
    file = tmp_path / "new" / "my.yaml"
    done = cli("config", "dmd2", "--out", file)
    assert done.code == 0 and done.out == f"{file}: written\n"
    config = load_config(file, ["teacher.source=digits-flow", "output_dir=runs/x"])
    assert config.method.name == "dmd2" and config.method.weighting == "dmd"
    before = file.read_text()
    again = cli("config", "dmd2", "--out", file)
    assert again.code == 2 and "exists already" in again.err and file.read_text() == before


def test_table_is_of_the_method_and_file_of_all(cli) -> None:
    table, whole = cli("config", "freeflow", "--markdown").out, cli("config", "freeflow").out
    assert "| `critic_optimizer.*` |" in table and "`batch_size`" not in table
    assert "\n  batch_size: 64\n" in whole and "\n  critic_fraction: 1.0\n" in whole
    assert cli("config", "freeflow", "--section", "train").out.count("\ntrain:\n") == 1


def test_shared_settings_need_no_method_and_no_torch() -> None:
    code = ("import sys\nfrom flowdistill.cli.commands import main\nmain(['config', '--section', 'train'])\n"
            "print('loaded', {'torch', 'omegaconf', 'diffusers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\n  gradient_accumulation: 1\n" in done.stdout and done.stdout.endswith("loaded set()\n")


def test_search(cli) -> None:
    done = cli("config", "dmd2", "--search", "critic", "learning", "rate")
    assert done.code == 0 and "method.critic_optimizer.lr = 0.0001\n" in done.out and "methods:" not in done.out


@pytest.mark.parametrize("arguments, words", [
    (["freflow"], "'METHOD' must be one of .*not 'freflow'; did you mean 'freeflow'"),
    (["--host", "dmd2"], "--host needs a method"),
    (["--section", "method"], "--section method needs a method"),
    (["msd", "--host", "msd"], "'method.host.name' is 'msd'"),
    (["freeflow", "--search", "qqq"], "no setting of freeflow has 'qqq'"),
    (["msd", "--host", "dmd2", "--search", "lr"], "without --host"),
])
def test_bad_input_ends_in_one_sentence(cli, arguments: list[str], words: str) -> None:
    done = cli("config", *arguments)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert re.search(words, done.err), done.err
