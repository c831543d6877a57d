"""flowdistill push: what is uploaded and what is refused, against a hub in memory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from flowdistill.export import export
from flowdistill.export.hub import collect, in_units, on_hub
from tests.fake_hub import TOKEN, FakeHub, Repository, serving
from tests.students_of_steps import pixel_student
from tests.tiny import POINTER

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports: ``one``, a pipeline, and ``several``, one a class; and a student's folder."""
    folder = tmp_path_factory.mktemp("exports")
    export(pixel_student(FlowMatchEulerDiscreteScheduler(), num_class_embeds=None), folder / "one")
    student = pixel_student(FlowMatchEulerDiscreteScheduler())
    export(student, folder / "several")
    student.save(folder / "student")
    return folder


@pytest.fixture
def one(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "one", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda seconds: None))
        yield hub


def test_an_export_arrives_as_one_commit(cli: Callable, one: Path, hub: FakeHub) -> None:
    outcome = cli("push", one, "me/few-steps", "--private", "--message", "The first")
    assert outcome.code == 0, outcome.err
    repository = hub.repositories["me/few-steps"]
    files = repository.branches["main"]
    assert repository.private and repository.messages == ["The first"]
    assert files.keys() == {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    assert all(files[name] == (one / name).read_bytes() for name in files.keys() - {"README.md"})
    assert f"uploaded: {hub.endpoint}/me/few-steps" in outcome.out
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/few-steps")' in card.text and "path/to/this/folder" not in card.text
    assert card.data.library_name == "diffusers"


def test_the_listing_has_every_file_and_its_size_and_a_dry_run_sends_nothing(
    cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    outcome = cli("push", one, "me/x", "--dry-run")
    assert outcome.code == 0 and "nothing was uploaded" in outcome.out
    for path in one.rglob("*"):
        if path.is_file():
            line = rf"\s+{re.escape(in_units(path.stat().st_size))}  {re.escape(path.relative_to(one).as_posix())}$"
            assert re.search(line, outcome.out, re.M), outcome.out
    assert not hub.repositories and not hub.received


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.44e9, "3.44 GB")])
def test_sizes_are_in_decimal_units(size: float, words: str) -> None:
    assert in_units(int(size)) == words


def test_pushed_again_nothing_is_sent_and_a_changed_file_only_itself(cli: Callable, one: Path, hub: FakeHub) -> None:
    for _ in range(2):
        assert cli("push", one, "me/x").code == 0
    assert len(hub.received) == 1 and len(hub.repositories["me/x"].messages) == 1
    card = one / "README.md"
    card.write_text(card.read_text() + "\nMore.\n")
    assert cli("push", one, "me/x").code == 0
    assert len(hub.received) == 1 and len(hub.repositories["me/x"].messages) == 2
    assert hub.repositories["me/x"].branches["main"]["README.md"].endswith(b"More.\n")


def test_files_of_an_earlier_export_do_not_stay(cli: Callable, one: Path, made: Path, hub: FakeHub) -> None:
    assert cli("push", made / "several", "me/x").code == 0
    hub.repositories["me/x"].branches["main"] |= {"extra.png": b"a picture"}
    assert cli("push", one, "me/x").code == 0
    files = hub.repositories["me/x"].branches["main"]
    assert "model_index.json" in files and "extra.png" in files
    assert "manifest.json" not in files
    assert not [name for name in files if name.startswith("class-")]


def test_a_branch_is_made(cli: Callable, one: Path, hub: FakeHub) -> None:
    assert cli("push", one, "me/x", "--revision", "v2").code == 0
    branches = hub.repositories["me/x"].branches
    assert not branches["main"] and WEIGHTS in branches["v2"]
    assert b'from_pretrained("me/x", revision="v2")' in branches["v2"]["README.md"]


def test_after_the_server_died_the_same_command_goes_on(cli: Callable, made: Path, hub: FakeHub) -> None:
    """What had arrived is not sent again, and nothing half is to be seen before."""
    weights = [path for path in (made / "several").rglob("*.safetensors")]
    assert len(weights) == 3
    hub.dies_after = 1
    outcome = cli("push", made / "several", "me/x")
    assert outcome.code == 2 and "the same command goes on" in outcome.err and "Traceback" not in outcome.err
    assert not hub.repositories["me/x"].branches["main"]
    before, hub.dies_after = len(hub.received), None
    assert cli("push", made / "several", "me/x").code == 0
    assert before >= 1 and len(hub.received) == len(set(hub.received)) == len(weights)
    assert hub.repositories["me/x"].branches["main"].keys() >= {"manifest.json", f"class-0/{WEIGHTS}"}


# --- what the hub refuses


def test_no_token(cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "no token for the hub" in outcome.err and not hub.repositories


def test_a_wrong_token(cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "does not know the token" in outcome.err


def test_another_owner(cli: Callable, one: Path, hub: FakeHub) -> None:
    outcome = cli("push", one, "them/x")
    assert outcome.code == 2 and "no right to write to them/x" in outcome.err
    hub.repositories["them/y"] = Repository(private=False)
    outcome = cli("push", one, "them/y")
    assert outcome.code == 2 and "no right to write to them/y" in outcome.err


def test_no_network(cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "127.0.0.1:1 could not be reached" in outcome.err and len(outcome.err.splitlines()) < 4


def test_a_client_that_is_offline(cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "HF_HUB_OFFLINE" in outcome.err


def test_a_repository_of_something_else_stays_as_it_is(cli: Callable, one: Path, hub: FakeHub) -> None:
    hub.repositories["me/x"] = Repository(False, {"main": {"model.gguf": b"another", "config.json": b"{}"}})
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "holds something else: config.json, model.gguf" in outcome.err
    assert hub.repositories["me/x"].branches["main"].keys() == {"model.gguf", "config.json"}


def test_a_blank_repository_is_used(cli: Callable, one: Path, hub: FakeHub) -> None:
    blank = {".gitattributes": b"", "README.md": b"# x", "LICENSE": b"MIT"}
    hub.repositories["me/x"] = Repository(False, {"main": dict(blank)})
    assert cli("push", one, "me/x").code == 0
    assert hub.repositories["me/x"].branches["main"].keys() > blank.keys()


def test_private_weights_do_not_go_to_a_public_repository(cli: Callable, one: Path, hub: FakeHub) -> None:
    hub.repositories["me/x"] = Repository(private=False)
    outcome = cli("push", one, "me/x", "--private")
    assert outcome.code == 2 and "is public" in outcome.err and not hub.received


@pytest.mark.parametrize("name", ["x", "a/b/c", "me/has a space", "me/", "datasets/me/x"])
def test_a_name_that_is_none(cli: Callable, one: Path, name: str) -> None:
    outcome = cli("push", one, name, "--dry-run")
    assert outcome.code == 2 and "is no name of a repository" in outcome.err


@pytest.mark.parametrize("name", ["a b", "a..b", "/a", "a/", "a.lock", "-a", "a\nb", "a~1", "\xe9"])
def test_a_branch_that_is_none(cli: Callable, one: Path, name: str) -> None:
    outcome = cli("push", one, "me/x", "--dry-run", f"--revision={name}")
    assert outcome.code == 2 and "is no name of a branch" in outcome.err and not outcome.out


@pytest.mark.parametrize("token", ["\xe9", "hf_a b", "hf_a\tb"])
def test_a_token_that_is_none(
    cli: Callable, one: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = cli("push", one, "me/x")
    assert outcome.code == 2 and "characters that no token has" in outcome.err and not hub.received
    assert token not in outcome.err


# --- what is refused here


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def added(name: str, content: str = "x") -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return add


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])


def diverged(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.weight"].view(-1)[-1] = math.inf
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def linked(folder: Path) -> None:
    (folder / "unet/more.json").symlink_to("/etc/hostname")


def piped(folder: Path) -> None:
    os.mkfifo(folder / "unet/more.json")


REFUSED = {
    "a pipe": (piped, "no part of it: unet/more.json"),
    "two lines": (added("unet/a\nb.json", "{}"), "no part of it: unet/a"),
    "no export": (removed("model_index.json"), "is no export and no student"),
    "no weights": (removed(WEIGHTS), "unet has no weights"),
    "no network": (removed("unet"), "it has no folder unet"),
    "no card": (removed("README.md"), "has no README.md"),
    "an empty card": (added("README.md", ""), "README.md is empty, and the model's page shows it; remove"),
    "a blank card": (added("README.md", " \n\n"), "README.md is empty"),
    "an empty configuration": (added("unet/config.json", ""), "config.json is empty; remove it and export again"),
    "truncated": (cut, "damaged or truncated"),
    "diverged": (diverged, "safetensors has weights that are not finite, or too large (conv_in.weight), so nothing"),
    "a shard": (added("unet/diffusion_pytorch_model.safetensors.index.json",
                      json.dumps({"weight_map": {"a": "model-2-of-2.safetensors"}})), "it has no model-2-of-2"),
    "a pointer": (added(WEIGHTS, POINTER), "git-lfs pointer"),
    "unrelated": (added("notes.docx"), "no part of it: notes.docx"),
    "a folder": (added("old/unet/config.json", "{}"), "no part of it: old/unet/config.json"),
    "a pickle": (added("unet/diffusion_pytorch_model.bin"), "no part of it: unet/diffusion_pytorch_model.bin"),
    "hidden": (added(".env", "HF_TOKEN=1"), "no part of it: .env"),
    "a picture": (added("me.png"), "no part of it: me.png"),
    "a link": (linked, "no part of it: unet/more.json"),
    "a crash": (added("unet/.config.json.abc.tmp"), "left of a crash"),
    "a crash beside": (added("../.out.partial/model_index.json"), "left of an export or a run that did not end"),
    "a token": (added("flowdistill.json", f'{{"x": "hf_{"a" * 34}"}}'), "looks like a token of the hub"),
    "a key": (added("unet/config.json", "-----BEGIN OPENSSH PRIVATE KEY-----"), "looks like a private key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_uploaded(cli: Callable, one: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    spoil(one)
    outcome = cli("push", one, "me/x", "--dry-run")
    assert outcome.code == 2 and words in outcome.err and "Traceback" not in outcome.err, outcome.err


def test_a_folder_that_is_not_there(cli: Callable, tmp_path: Path) -> None:
    outcome = cli("push", tmp_path / "none", "me/x")
    assert outcome.code == 2 and "does not exist" in outcome.err


def test_what_users_add_to_a_card_goes_with_it(one: Path) -> None:
    card = one / "README.md"
    card.write_text(card.read_text() + "\n![one](pictures/one.png)\n")
    added("pictures/one.png")(one)
    added("LICENSE", "MIT")(one)
    assert {"pictures/one.png", "LICENSE"} <= {file.name for file in collect(one)[1]}


def test_a_student_gets_a_card_of_its_own(cli: Callable, made: Path, tmp_path: Path, hub: FakeHub) -> None:
    shutil.copytree(made / "student", tmp_path / "run" / "student")
    added("run/metrics.jsonl")(tmp_path)
    assert cli("push", tmp_path / "run", "me/student").code == 0
    files = hub.repositories["me/student"].branches["main"]
    assert {"README.md", "flowdistill.json", "model.safetensors"} <= files.keys() and "metrics.jsonl" not in files
    assert b'load_student("me/student")' in files["README.md"]


def test_the_code_of_several_pipelines_loads_a_copy_of_the_repository(
    cli: Callable, made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers takes no folder inside a repository."""
    assert cli("push", made / "several", "me/x").code == 0
    files = hub.repositories["me/x"].branches["main"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(made / "several"))
    for card in ("README.md", "class-1/README.md"):
        names: dict[str, Any] = {}
        exec(files[card].decode().split("```python\n")[1].split("```")[0], names)
        assert isinstance(names["pipe"], DiffusionPipeline) and len(names["images"]) == 4


def test_a_branch_of_a_student_is_fetched_first() -> None:
    card = '```python\nfrom flowdistill import load_student\n\nstudent = load_student("path/to/this/folder")\n```'
    code = on_hub(card, "me/x", "v2")
    assert 'load_student(snapshot_download("me/x", revision="v2"))' in code and "import snapshot_download" in code
