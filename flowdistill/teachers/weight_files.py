"""The files that a run's settings name: recorded by hash when it is trained, and compared later.

A path or a hub id in a configuration says where weights are and not which: a folder may hold others later, and a file
other prompts. What a run was trained with stands in the run folder, setting by setting; runs of versions without it are
taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowdistill.conditioning.components import read_files
from flowdistill.conditioning.text_encoders import INDEX
from flowdistill.networks.storage import BASE, SIDECAR, WEIGHTS
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors
from flowdistill.utils.hashing import file_sha256, json_sha256
from flowdistill.utils.text import read_json_object

FILE = "weights.json"
NamedFiles = dict[str, dict[str, Path]]
"""Setting, such as ``teacher.vae`` -> name of a file in its place -> the file."""
Hashes = dict[str, dict[str, str]]
VERSIONS = ("_diffusers_version", "_name_or_path", "transformers_version")
"""What a model's config says of how it was saved, and not of the model."""


def pipeline_files(folder: Path, variant: str | None, without: Iterable[str]) -> dict[str, Path]:
    """The files that decide what a pipeline's components do, ``without`` some of these: weights that are read in this
    variant, configs, and what belongs to tokenizers."""
    found: dict[str, Path] = {}
    for name, entry in sorted(read_json_object(folder / INDEX).items()):
        if isinstance(entry, list) and entry[:1] != [None] and name not in without and (folder / name).is_dir():
            found |= {f"{name}/{file.relative_to(folder / name).as_posix()}": file
                      for file in read_files(folder / name, entry, variant)}
    return found


def stored_files(folder: Path) -> dict[str, Path]:
    """The same of a stored network or student."""
    places = (WEIGHTS, BASE, "backbone/config.json", "scheduler/scheduler_config.json", SIDECAR)
    return {name: folder / name for name in places if (folder / name).is_file()}


def record_weights(folder: Path, named: NamedFiles) -> None:
    """Write the hashes of the files to a run folder; nothing where no setting names any.

    Raises:
        UserError: it cannot be written.
    """
    if named:
        text = json.dumps(hashes(named), indent=1, sort_keys=True) + "\n"
        with disk_errors(str(folder / FILE)), atomic_write(folder / FILE) as output:
            output.write(text.encode())


def check_weights(folder: Path, find: Callable[[], NamedFiles], remedy: str) -> None:
    """Refuse files that are others than those that a run was trained with.

    Args:
        folder: the run's, or one in it, such as its student's.
        find: gives the files of some or all of its settings, and is not asked where none are recorded; a setting that
            the record does not have is not compared.
        remedy: what may be done besides putting the former files back.

    Raises:
        UserError: so, or a record that is damaged.
    """
    record = next((place / FILE for place in (folder, folder.parent) if (place / FILE).is_file()), None)
    if record is None:  # an older version's
        return
    known, named = _read(record), find()
    here = hashes({setting: files for setting, files in named.items() if setting in known})
    for setting, files in here.items():
        for name in {**known[setting], **files}:
            if files.get(name) != known[setting].get(name):
                what = ("is no longer there or read" if name not in files else
                        "was not there or read then" if name not in known[setting] else "has changed since")
                place = named[setting].get(name, name)
                raise UserError(f"{record.parent} was trained with other files than there are now: {place}, of "
                                f"{setting}, {what}; put back what was there, {remedy}")


def hashes(named: Mapping[str, Mapping[str, Path]]) -> Hashes:
    """The hash of each file; of a config without the versions that it was saved by."""
    files = {file for each in named.values() for file in each.values()}
    with ThreadPoolExecutor(8) as pool:  # hashing leaves the interpreter alone, and there may be many shards
        known = dict(zip(files, pool.map(_hash, files), strict=True))
    return {setting: {name: known[file] for name, file in each.items()} for setting, each in named.items()}


def _hash(file: Path) -> str:
    if file.name in ("config.json", "scheduler_config.json"):
        content = read_json_object(file)
        return json_sha256({name: content[name] for name in sorted(content) if name not in VERSIONS})
    return file_sha256(file)


def _read(record: Path) -> Hashes:
    content = read_json_object(record)
    if not all(isinstance(files, dict) for files in content.values()):
        raise UserError(f"{record} is damaged: it holds no hashes of files; put it back, or remove it, and nothing is "
                        "compared")
    return content
