"""Where scripts are to write: a place where nothing can be made is refused before the work, in one sentence."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train_digits_teacher": ["--path", "flow"],
    "train_digits_classifier": [],
    "train_shapes_teacher": [],
    "train_shapes_autoencoder": [],
    "train_shapes_networks": ["classifier"],
    "write_shapes": [],
    "convert_sit": ["checkpoint.pt", "--vae", "vae"],
    "make_shapes_turbo": ["run"],
    "shapes_judge_sheet": [],
    "run_experiment": ["configs/experiments/ring.yaml"],
    "ring_benchmark": [],
    "echodistill_experiment": [],
    "full_size": ["emoji", "--tiny", "--device", "cpu"],
    "train_fashion_classifier": [],
    "benchmark_step": ["configs/digits/freeflow.yaml"],
    "benchmark_folder_fid": [],
}
FILES = {
    "benchmark_step": "--json",
    "benchmark_folder_fid": "--json",
    "evaluate_fid": "--json",
    "nearest_neighbours": "--json",
    "measure_shipped_teachers": "--out",
    "shapes_judge_sheet": "--out",
}
GIVEN = {
    "evaluate_fid": ["model", "--reference", "digits", "--features", "digits"],
    "nearest_neighbours": ["images", "--training", "a", "--held-out", "b", "--features", "digits"],
}


@pytest.mark.parametrize("name", FILES)
def test_a_script_leaves_a_file_that_is_not_its_own(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    main = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]
    for file, text in (("config.yaml", "train: {}"), ("other.json", '{"rows": 1}')):
        (tmp_path / file).write_text(text)
        try:
            code = main([*GIVEN.get(name, []), FILES[name], str(tmp_path / file)])
        except SystemExit as stop:  # argparse's own
            code = stop.code
        assert code == 2 and (tmp_path / file).read_text() == text
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / file} is there already and is not " in said or "must be a .png file" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_refuses_a_link_that_leads_nowhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    link, threads = tmp_path / "link", torch.get_num_threads()
    link.symlink_to(tmp_path / "disk")
    option = "--json" if name.startswith("benchmark") else "--out"
    monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name], option, str(link / "new")])
    try:
        code = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]()
    except SystemExit as stop:  # argparse's own
        code = stop.code
    finally:
        torch.set_num_threads(threads)
    assert code == 2 and list(tmp_path.iterdir()) == [link]
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot be written: {link} is a symbolic link that leads nowhere, to {tmp_path / 'disk'}; make" in said


TRAINED = {
    "train_emoji_teacher": ("flowdistill.json", []),
    "train_fashion_teacher": ("flowdistill.json", ["--path", "flow"]),
    "train_fashion_classifier": ("config.json", []),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_folder_that_a_script_has_not_made_is_not_replaced(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    file, given = TRAINED[name]
    where = ["--work" if "emoji" in name else "--state", str(tmp_path / "state")]
    main, threads = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"], torch.get_num_threads()
    (tmp_path / "out").mkdir()
    for record, text in (("thesis.txt", "mine"), (file, '{"command": "python scripts/another.py"}')):
        (tmp_path / "out" / record).write_text(text)
        try:
            assert main([*given, *where, "--out", str(tmp_path / "out")]) == 2
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr().err
        assert f"{tmp_path / 'out'} is not empty and was not made by {name}.py ({file} there" in said, said
        assert (tmp_path / "out" / record).read_text() == text


def test_shapes_are_not_written_among_other_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    (tmp_path / "000000.png").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["write_shapes", "--images", str(tmp_path), "--count", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "write_shapes.py"))["main"]()
    assert f"--images {tmp_path} has pictures already, such as 000000.png" in capsys.readouterr().err
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
