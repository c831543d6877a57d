"""Velocity networks on disk: safetensors weights, and JSON that says everything needed to build them again.

A stored network is a folder with ``flowdistill.json``; a student is one with more in it.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowdistill.networks.backbones import FAMILIES
from flowdistill.networks.lora import LoraSettings, split
from flowdistill.networks.velocity import TARGET_TIMES, ExtendedVelocity, VelocityNetwork
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.paths.schedulers import load_scheduler, path_from_scheduler
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_pointer, local_path
from flowdistill.utils.quantized import plain_tensors
from flowdistill.utils.text import JsonObject, read_json_object, without_marks

FORMAT = 4
"""The newest known."""
ADAPTERS, SEVERAL_STEPS, TWO_TIMES = 2, 3, 4
"""The formats of networks with adapters, which need the file BASE, of generators of several calls, and of flow maps
between any two times. The oldest that has all of a student is written, so that earlier versions load what they can."""
SIDECAR = "flowdistill.json"
WEIGHTS = "model.safetensors"
BASE = "base.safetensors"


def find_stored(path: str | os.PathLike[str]) -> Path | None:
    """The folder that ``path`` is (a stored network or student) or holds (a run); None when there is none."""
    for folder in (local_path(path) / "student", local_path(path)):
        file = folder / SIDECAR
        if file.is_file():
            try:
                if "kind" in read_json_object(file):
                    return folder
            except UserError:
                return folder  # a damaged description is for the loader to report, not to overlook
    return None


def locate(path: str | os.PathLike[str]) -> Path:
    """Find a stored network as :func:`find_stored` does, and fetch a hub repository (owner/name).

    Raises:
        UserError: nothing there.
    """
    source = os.fspath(path)
    folder, place = find_stored(source), local_path(source)
    if folder is None and not place.exists() and source.count("/") == 1 and not source.startswith((".", "~")):
        folder = _download(source)
    if folder is None:
        if not place.exists():
            raise UserError(f"{source} does not exist; give a run folder or a student folder")
        hint = "its training has not finished yet" if (place / "config.yaml").is_file() else (
            "it is a pipeline already") if (place / "model_index.json").is_file() else (
            "it has no flowdistill.json that describes one")
        raise UserError(f"{source} holds no student: {hint}")
    return folder


def _download(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return find_stored(snapshot_download(repository))
    except Exception as error:  # the hub client raises many unrelated types, and every one means the same to a user
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repository} is no folder here and could not be fetched from the hub: {reason}") from error


def read_description(folder: Path) -> JsonObject:
    """The JSON of a stored network, with at least ``kind`` and ``format``.

    Raises:
        UserError: it is damaged.
    """
    description = read_json_object(folder / SIDECAR)
    for key in ("kind", "format"):
        if key not in description:
            raise UserError(f"{folder / SIDECAR} is damaged: it has no '{key}'")
    return description


def write_network(network: ExtendedVelocity, scheduler: Scheduler, folder: Path) -> JsonObject:
    """Write weights, the backbone's configuration and the scheduler into ``folder``; returns the description."""
    velocity = network.velocity
    velocity.backbone.save_config(folder / "backbone")
    scheduler.save_pretrained(folder / "scheduler")
    weights = plain_tensors(network)
    if velocity.lora is not None:  # what trained by itself, and the teacher's weights in their own type
        weights, base = split(weights)
        save_file(base, folder / BASE, metadata={"format": "pt"})
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    path = velocity.path
    return {
        "format": 1 if velocity.lora is None else ADAPTERS,
        "backbone": velocity.family.backbone_class,
        "path": path.kind,
        "prediction": path.prediction,
        "t_min": path.t_min,
        "t_max": path.t_max,
        "scalars": list(network.embeddings),
        "target_time": network.target_time,
        "lora": None if velocity.lora is None else asdict(velocity.lora),
    }


def read_network(folder: Path, description: JsonObject) -> tuple[ExtendedVelocity, Scheduler]:
    """The network of a folder, and its scheduler.

    Raises:
        UserError: a newer format, a backbone that is not supported, or files that are missing, damaged or do not fit.
    """
    folder = without_marks(folder)
    kind, version = description["kind"], description["format"]
    if version > FORMAT:
        raise UserError(f"{folder} holds a '{kind}' student of format {version}; this version loads students up to "
                        f"format {FORMAT}")
    if description.get("backbone") not in FAMILIES:
        raise UserError(f"{folder} has the backbone {description.get('backbone')}, which is not supported")
    family = FAMILIES.get(description["backbone"])
    backbone_class = family.backbone_type
    try:
        config = backbone_class.load_config(folder / "backbone")
        weights: dict[str, Tensor] = {}
        for name in (WEIGHTS, BASE)[: 1 if description.get("lora") is None else 2]:
            if (folder / name).is_file():
                check_pointer(folder / name)
            weights |= load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the student in {folder} is incomplete or damaged: {' '.join(str(error).split())}") from error
    backbone = backbone_class.from_config(config)
    scheduler = load_scheduler(folder / "scheduler")
    native = path_from_scheduler(scheduler)
    if description["t_max"] < native.t_max:
        native = native.with_t_max(description["t_max"])
    wiring = description.get("target_time", "separate")
    if wiring not in TARGET_TIMES:
        raise UserError(f"{folder / SIDECAR} has target_time '{wiring}'; this version knows {', '.join(TARGET_TIMES)}")
    lora = None if description.get("lora") is None else LoraSettings(**description["lora"])
    velocity = VelocityNetwork(backbone, native, family, lora=lora)
    network = ExtendedVelocity(velocity, tuple(description["scalars"]), wiring)
    for name, parameter in network.named_parameters():  # in the types on the disk: a frozen base may be bfloat16
        if name in weights:
            parameter.data = parameter.data.to(weights[name].dtype)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder / WEIGHTS} do not fit {folder / 'backbone'}: "
                        f"{' '.join(str(error).split())[:300]}") from error
    return network, scheduler
