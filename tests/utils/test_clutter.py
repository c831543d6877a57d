"""What systems leave behind in folders changes no hash of them."""

import shutil

import torch

from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.utils.hashing import checksums, files_below
from tests.families import stable_diffusion


def clutter(folder):
    for name in (".DS_Store", "._model.safetensors", "Thumbs.db", ".ipynb_checkpoints/config-checkpoint.json",
                 "deep/@eaDir/model.safetensors", "__MACOSX/._config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\x05\x16\x07")


def test_checksums_and_lists_of_files(tmp_path):
    folder = tmp_path / ".cache" / "student"
    for name in ("model.safetensors", "deep/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    before = checksums(folder)
    clutter(folder)
    assert checksums(folder) == before and before.keys() == {"model.safetensors", "deep/config.json"}
    assert files_below(folder) == [folder / "deep" / "config.json", folder / "model.safetensors"]
    (folder / "added.json").write_text("{}")
    assert checksums(folder).keys() == {*before, "added.json"}


def test_fingerprints_of_text_encoders(tmp_path):
    folder = tmp_path / "pipeline"
    stable_diffusion().save_pretrained(folder)
    before = TextEncoders(folder, torch.float32).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("text_encoder", "tokenizer"):
        clutter(tmp_path / "copy" / name)
    assert TextEncoders(tmp_path / "copy", torch.float32).fingerprint == before
    (tmp_path / "copy" / "tokenizer" / "more.json").write_text("{}")
    assert TextEncoders(tmp_path / "copy", torch.float32).fingerprint != before
