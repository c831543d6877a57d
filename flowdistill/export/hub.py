"""Uploading an export or a student to the Hugging Face hub: what is in it, whether it is whole, and its repository."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from flowdistill.conditioning.pipeline_lora import FILE
from flowdistill.config.run_folder import CONFIG
from flowdistill.export.card_data import CARD, GRID, HERE
from flowdistill.export.comfyui import COMFYUI_FILE
from flowdistill.export.finite import overflowing
from flowdistill.export.student_cards import write_student_card
from flowdistill.networks.storage import SIDECAR, find_stored
from flowdistill.students.loading import load_student
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import check_weight_file, local_path
from flowdistill.utils.text import read_json_object, read_text

INDEX, MANIFEST = "model_index.json", "manifest.json"
WEIGHTS = ".safetensors"
BESIDE = (CARD, SIDECAR, GRID, FILE, COMFYUI_FILE, "LICENSE*", "LICENCE*", "NOTICE*")
"""What lies at the top of an export besides the parts of a pipeline."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Such files are uploaded where the card shows them."""
INSIDE = (".json", ".txt", ".model", ".jinja", WEIGHTS)
"""Endings of the files of a network, a scheduler, a tokenizer or a text encoder."""
LEFT = ("*.partial", "*.tmp", "*.old", "*.incomplete", "*.lock")
"""Names of files and folders that a crash leaves."""
SECRETS = {
    "a token of the hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a key of a cloud": r"\bAKIA[0-9A-Z]{16}\b",
    "a key of an API": r"\bsk-[A-Za-z0-9_-]{32,}",
}
STALE = (*INSIDE, f"/{CARD}")
"""Endings of files of an earlier upload that are removed where this one has not got them."""
MOST_TEXT = 2**24
BRANCH = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)
"""Names of branches, which git takes too."""
UNITS = ("B", "kB", "MB", "GB", "TB")


class Upload(NamedTuple):
    """A file: its name in the repository, where it is, and its bytes."""

    name: str
    path: Path
    size: int


def push(
    source: str | os.PathLike[str], repository: str, private: bool = False, revision: str | None = None,
    message: str | None = None, dry_run: bool = False,
) -> str | None:
    """Upload an export, or a run's student, to a model repository of the hub, with its card, as one commit.

    It shows the files and their sizes first. An interrupted upload is gone on with by the same call: the hub keeps the
    weights that it has got, and its main branch changes with the commit at the end only.

    Args:
        source: folder of an export, a run or a student.
        repository: owner/name; it is created where it does not exist.
        private: whether only its owner sees it.
        revision: a branch, created where it does not exist; None: main.
        message: of the commit.
        dry_run: stop before anything is sent; needs neither a token nor a network.

    Returns:
        The commit's address; None for a dry run.

    Raises:
        UserError: what ``source`` is no part of or lacks, a name that the hub does not take, no token, no network, no
            right to write there, or a repository that holds something else.
    """
    _check_name(repository)
    if revision is not None and (not BRANCH.fullmatch(revision) or ".." in revision or revision.endswith(".lock")):
        raise UserError(f"--revision {shown(revision)} is no name of a branch; give letters, digits, dots, dashes and "
                        "slashes inside it, such as v2")
    folder, files = collect(source)
    total = sum(file.size for file in files)
    print(f"{folder}, as {repository}{'' if revision is None else f' ({revision})'}:")
    for file in files:
        print(f"  {in_units(file.size):>9}  {file.name}")
    print(f"{len(files)} files, {in_units(total)}", flush=True)
    if dry_run:
        print("nothing was uploaded (--dry-run)")
        return None
    if constants.HF_HUB_OFFLINE:
        raise UserError("the hub's client is offline, because HF_HUB_OFFLINE is set; unset it to upload")
    api = HfApi(endpoint=constants.ENDPOINT)
    token = get_token()
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UserError("the token for the hub (HF_TOKEN, or that of 'hf auth login') has characters that no token "
                        "has; copy it anew")
    if token is None:
        raise UserError("there is no token for the hub: run 'hf auth login', or set HF_TOKEN to a token with the right "
                        "to write")
    try:
        address = _upload(api, files, repository, private, revision, message)
    except UserError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(_sentence(error, api.endpoint, repository)) from error
    print(f"uploaded: {api.endpoint}/{repository}")
    return address


def in_units(size: int) -> str:
    """Bytes in decimal units, as the hub shows them."""
    value, unit = float(size), 0
    while value >= 1000 and unit + 1 < len(UNITS):
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 else f"{value:.3g} {UNITS[unit]}"


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository} is no name of a repository: {' '.join(str(error).split())}") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository} is no name of a repository; give owner/name, such as your user name on the hub, "
                        "a slash and a name")


# --- what is uploaded


def collect(source: str | os.PathLike[str]) -> tuple[Path, list[Upload]]:
    """The folder that ``source`` names, and its files, checked.

    A run's student without a card gets one.

    Raises:
        UserError: it is no export and no student, lacks a part or weights, or holds something that is no part of it.
    """
    place = local_path(source)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{place} {what}; give the folder of an export, or a run or student folder")
    left = [path for path in place.parent.glob(f".{place.name}.*") if _is_left(path.name)]
    if (place / INDEX).is_file():
        names = list(_pipeline(place))
    elif (place / MANIFEST).is_file():
        names = list(_several(place))
    elif (place / FILE).is_file() and not (place / SIDECAR).is_file():  # adapters alone
        names = list(_tree(place, "", (), ("*" + WEIGHTS,)))
    elif (student := find_stored(place)) is not None:
        if not (student / CARD).is_file():
            write_student_card(student, load_student(student), place if (place / CONFIG).is_file() else None)
        left += [path for path in student.parent.glob(f".{student.name}.*") if _is_left(path.name)]
        place, names = student, list(_student(student))
    else:
        raise UserError(f"{place} is no export and no student: it has no {INDEX}, no {MANIFEST} and no {SIDECAR} of a "
                        "student; make one with 'flowdistill export RUN OUT'")
    if left:
        raise UserError(f"{left[0]} is left of an export or a run that did not end, so {place} may be an older one; "
                        "remove it, or export again")
    files = [Upload(name, place / name, (place / name).stat().st_size) for name in sorted(set(names))]
    for file in files:
        _check_file(file)
    return place, files


def _is_left(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in LEFT)


def _pipeline(folder: Path, inside: str = "") -> Iterator[str]:
    """Names of a pipeline's files, behind ``inside``."""
    root = folder / inside
    index = read_json_object(root / INDEX)
    parts = {name: value for name, value in index.items()
             if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[0] is not None}
    for name in parts:
        if not (root / name).is_dir():
            raise UserError(f"{root} is incomplete: it has no folder {name}, which its {INDEX} names; export again")
        _check_weights(root / name)
    yield from _tree(folder, inside, parts, (INDEX,))


def _several(folder: Path) -> Iterator[str]:
    """Names of the files of several pipelines with their manifest."""
    entries = read_json_object(folder / MANIFEST).get("pipelines")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "folder" in entry for entry in entries):
        raise UserError(f"{folder / MANIFEST} is no manifest of exported pipelines")
    names = [str(entry["folder"]) for entry in entries]
    for name in names:
        if not (folder / name / INDEX).is_file():
            raise UserError(f"{folder} is incomplete: {name}, which its {MANIFEST} names, is no pipeline; export again")
        yield from _pipeline(folder, name)
    yield from _tree(folder, "", (), (MANIFEST,), others=names)


def _student(folder: Path) -> Iterator[str]:
    """Names of a student's files: its own, or those of several with a manifest, which lie in a run folder."""
    description = read_json_object(folder / SIDECAR)
    if "students" in description:
        yield from (name for name in (SIDECAR, CARD, GRID) if (folder / name).is_file())
        for entry in description["students"]:
            if find_stored(folder / entry["folder"]) is None:
                raise UserError(f"{folder} is incomplete: there is no student in {entry['folder']}")
            yield from (f"{entry['folder']}/{name}" for name in _student(folder / entry["folder"]))
        return
    parts = [name for name in ("backbone", "scheduler", "vae", "text") if (folder / name).is_dir()]
    if not any(path.suffix == WEIGHTS for path in folder.iterdir()):
        raise UserError(f"{folder} has no weights ({WEIGHTS}); it is no whole student")
    yield from _tree(folder, "", parts, ("*" + WEIGHTS,))


def _tree(
    folder: Path, inside: str, parts: Any, top: tuple[str, ...], others: Any = ()
) -> Iterator[str]:
    """Names of the files below ``folder / inside``, all of which must be known.

    Args:
        parts: folders whose files are a network's, a scheduler's or a tokenizer's.
        top: patterns of names at the top, beside those of every export.
        others: folders that are looked at elsewhere.

    Raises:
        UserError: a file that is no part of it.
    """
    root = folder / inside
    text = read_text(root / CARD) if (root / CARD).is_file() else None
    if text is None:
        raise UserError(f"{root} has no {CARD}, the model card; export again")
    odd, left = [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if name.parts[0] in others or path.is_dir() and not path.is_symlink():
            continue
        if name.parts[0] in parts and len(name.parts) > 1:
            known = path.suffix in INSIDE
        else:
            known = len(name.parts) == 1 and any(fnmatch.fnmatch(path.name, pattern) for pattern in (*BESIDE, *top))
        known = known or path.suffix.lower() in PICTURES and f"({name.as_posix()})" in text
        if any(_is_left(part) for part in name.parts):
            left.append(name.as_posix())
        elif not (known and path.is_file() and not path.is_symlink() and path.name.isprintable()
                  and not any(part.startswith(".") for part in name.parts)):
            odd.append(name.as_posix())
        yield path.relative_to(folder).as_posix()
    if left:
        raise UserError(f"{root} holds what is left of a crash: {listed(left)}; remove it, or export again")
    if odd:
        raise UserError(f"{root} holds files that are no part of it: {listed(odd)}; move them elsewhere, for nothing "
                        "is uploaded that was not exported (pictures may stay where the card shows them)")


def _check_weights(part: Path) -> None:
    """Refuse a network's folder without its weights.

    Raises:
        UserError: there are none, or not all that its index names.
    """
    indices = list(part.glob(f"*{WEIGHTS}.index.json"))
    for index in indices:
        for name in sorted(set(read_json_object(index).get("weight_map", {}).values())):
            if not (part / name).is_file():
                raise UserError(f"{part} is incomplete: it has no {name}, which {index.name} names; export again")
    config = part / "config.json"
    if config.is_file() and not indices and not any(path.suffix == WEIGHTS for path in part.iterdir()):
        raise UserError(f"{part} has no weights ({WEIGHTS}); export again")


def _check_file(file: Upload) -> None:
    """Refuse weights that end too early or are not finite, cards and configurations without a word, and texts with
    something secret in them.

    Raises:
        UserError: so.
    """
    if file.path.suffix == WEIGHTS:
        check_weight_file(file.path)
        if not Path(file.name).parent.name.startswith("text"):  # an encoder may well have a mask of -inf
            _check_finite(file.path)
    elif file.path.suffix.lower() not in PICTURES and file.size < MOST_TEXT and file.path.suffix != ".model":
        text = file.path.read_bytes().decode(errors="replace")
        if (file.path.name == CARD or file.path.suffix == ".json") and not text.strip():
            shows = ", and the model's page shows it" if file.path.name == CARD else ""
            raise UserError(f"{file.path} is empty{shows}; remove it and export again (a student's card is written "
                            "when it is missing)")
        for what, pattern in SECRETS.items():
            if re.search(pattern, text):
                raise UserError(f"{file.path} holds what looks like {what}; take it out before anybody reads it there")


def _check_finite(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        broken = overflowing((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
    if broken is not None:
        raise UserError(f"{file} has weights that are not finite, or too large ({broken}), so nothing is uploaded: the "
                        "training diverged; train again with a lower learning rate, in another output_dir")


# --- the card, as it is on the hub


def on_hub(text: str, repository: str, revision: str | None = None, inside: str = "") -> str:
    """A card whose code loads its repository in place of its folder.

    Args:
        inside: the folder of the repository that the card is in. Pipelines there are loaded from a copy of the whole
            repository, for diffusers knows no folder in one.
    """
    branch = "" if revision is None else f', revision="{revision}"'

    def block(match: re.Match[str]) -> str:
        copied = False

        def place(found: re.Match[str]) -> str:
            nonlocal copied
            below = "/".join(filter(None, (inside, found[1].strip("/"))))
            if not below:
                return f'"{repository}"{branch}'
            copied = True
            return f'snapshot_download("{repository}"{branch}) + "/{below}"'

        code = re.sub(rf'"{HERE}((?:/[^"]*)?)"', place, match[2])
        if copied:
            code = f"from huggingface_hub import snapshot_download\n{code}"
        if revision is not None:  # it has no such argument
            code = re.sub(r'load_student\("([^"]*)", revision="([^"]*)"\)',
                          r'load_student(snapshot_download("\1", revision="\2"))', code)
            if "snapshot_download" in code and not copied:
                code = f"from huggingface_hub import snapshot_download\n{code}"
        return f"{match[1]}{code}{match[3]}"

    return re.sub(r"(```python\n)(.*?)(```)", block, text, flags=re.S)


# --- the repository


def _upload(
    api: HfApi, files: list[Upload], repository: str, private: bool, revision: str | None, message: str | None
) -> str:
    existing = _existing(api, repository, revision)
    if existing is None:
        api.create_repo(repository, private=private, exist_ok=True)
    elif private and not existing.private:
        raise UserError(f"{repository} exists and is public, and --private was asked for; make it private on the hub, "
                        "or choose another name")
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    operations: list[Any] = []
    for file in files:
        content: Any = file.path
        if file.path.name == CARD:
            inside = file.name.rpartition("/")[0]
            content = on_hub(read_text(file.path), repository, revision, inside).encode()
        operations.append(CommitOperationAdd(file.name, content))
    mine = {file.name for file in files}
    there = set() if existing is None else set(api.list_repo_files(repository, revision=revision))
    operations += [CommitOperationDelete(name) for name in sorted(there - mine) if name.endswith(STALE)]
    return str(api.create_commit(repository, operations, commit_message=message or "Upload with flowdistill",
                                 revision=revision).commit_url)


def _existing(api: HfApi, repository: str, revision: str | None) -> Any:
    """The repository, where there is one; refused where it holds anything that flowdistill has not put there.

    Raises:
        UserError: so.
    """
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None
    names = {sibling.rfilename for sibling in info.siblings or ()}
    blank = all(name in (".gitattributes", CARD) or name.startswith("LICENSE") for name in names)
    if not blank and not names & {SIDECAR, MANIFEST, FILE}:
        raise UserError(f"{repository} exists and holds something else: {listed(sorted(names))}; choose another name")
    return info


def _sentence(error: Exception, endpoint: str, repository: str) -> str:
    """What the hub's client means, in one sentence."""
    again = "what has arrived is kept, and the same command goes on"
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, HfHubHTTPError):  # threads that upload wrap what they meet
        inner = inner.__cause__
    if inner is not None and inner.response is not None:
        code = inner.response.status_code
        said = " ".join((inner.server_message or "").split())[:200]
        if code == 401:
            return f"{endpoint} does not know the token: run 'hf auth login', or set HF_TOKEN to one that is valid"
        if code == 403:
            return (f"the token has no right to write to {repository}{f' ({said})' if said else ''}: choose an owner "
                    "that is yours, or take a token with the right to write")
        if code >= 500 or code == 429:
            return f"{endpoint} answered {code}{f' ({said})' if said else ''}: {again}"
        return f"{endpoint} refused the upload to {repository} ({code}): {said or ' '.join(str(error).split())[:200]}"
    reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
    return f"{endpoint} could not be reached, or the connection broke ({reason}): {again}"
