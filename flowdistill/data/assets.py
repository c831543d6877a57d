"""The small models shipped with the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import local_path
from flowdistill.utils.shipped import shipped_folder
from flowdistill.utils.text import read_json_object

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")
ASSETS = shipped_folder("assets")

_TEXT_TO_IMAGE = (
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
)

# What a complete folder holds, and the command that makes it.
_KNOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "digits-classifier": (
        ("config.json", "model.safetensors"),
        "python scripts/train_digits_classifier.py --out assets/digits-classifier",
    ),
    "digits-flow": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_digits_teacher.py --path flow --out assets/digits-flow",
    ),
    "digits-ddpm": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_digits_teacher.py --path ddpm --out assets/digits-ddpm",
    ),
    "fashion-classifier": (
        ("config.json", "model.safetensors"),
        "python scripts/train_fashion_classifier.py --out assets/fashion-classifier",
    ),
    "fashion-flow": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_fashion_teacher.py --path flow --steps 12600 --out assets/fashion-flow",
    ),
    "fashion-ddpm": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_fashion_teacher.py --path ddpm --steps 9000 --out assets/fashion-ddpm",
    ),
    "shapes/autoencoder": (
        ("config.json", "diffusion_pytorch_model.safetensors"),
        "python scripts/train_shapes_autoencoder.py --out assets/shapes/autoencoder",
    ),
    "shapes/classifier": (
        ("config.json", "model.safetensors"), "python scripts/train_shapes_networks.py classifier",
    ),
    "shapes/identity": (
        ("config.json", "model.safetensors"), "python scripts/train_shapes_networks.py identity",
    ),
    "shapes/judge": (
        ("config.json", "model.safetensors"),
        "python scripts/train_shapes_networks.py judge --teacher assets/shapes/teacher",
    ),
    "shapes/teacher": (_TEXT_TO_IMAGE, "python scripts/train_shapes_teacher.py --out assets/shapes/teacher"),
    "shapes/turbo": (_TEXT_TO_IMAGE, "python scripts/make_shapes_turbo.py runs/shapes-dmd2 --out assets/shapes/turbo"),
}


def asset_path(name: str) -> Path:
    """The folder of a shipped model: ``digits-classifier``, ``digits-flow``, ``shapes/teacher`` and so on.

    Raises:
        UserError: unknown name, or the folder is not complete; says what is missing and the command that makes it.
    """
    if name not in _KNOWN:
        raise UserError(f"unknown asset {shown(name)}; the shipped assets are {', '.join(sorted(_KNOWN))}")
    files, command = _KNOWN[name]
    folder = ASSETS / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"the asset {name!r} lacks {folder / missing[0]}; make it with: {command}")
    return folder


def load_network(kind: type[M], folder: str | os.PathLike[str], what: str) -> M:
    """The network in a folder with ``config.json`` and ``model.safetensors``, frozen, in eval mode, on the CPU.

    Args:
        kind: its class, made from the ``architecture`` in the config.
        what: words for it, for messages.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network its config describes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from flowdistill.utils.files import check_pointer

    config_file, weights_file = (local_path(folder) / name for name in ("config.json", "model.safetensors"))
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UserError(f"{folder} is no {what}: {file.name} is missing")
    try:
        model = kind(**read_json_object(config_file)["architecture"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config_file} does not describe a {what}: {error!r}") from error
    check_pointer(weights_file)
    try:
        model.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{weights_file} is damaged or does not fit {config_file.name}: {error}") from error
    return model.eval().requires_grad_(False)
